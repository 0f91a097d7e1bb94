# A database of an earlier version, updated: its objects are those of a new installation, its rows and answers what they were, and a dump
# of it restores. Until it is updated the new library serves it.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# every object with its definition, comment and rights; of tables also columns, constraints, indexes, triggers; what a dump takes along
my $objects = q{
WITH own AS (
    SELECT classid, objid FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
    AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'kne')
), rel AS (
    SELECT c.* FROM own JOIN pg_class c ON classid = 'pg_class'::regclass AND objid = c.oid
)
SELECT i.type || ' ' || i.identity AS object, obj_description(objid, classid::regclass::name) AS a, NULL AS b, NULL AS c
FROM own, pg_identify_object(classid, objid, 0) i
UNION ALL
SELECT 'definition of ' || oid::regprocedure, pg_get_functiondef(oid), proacl::text, NULL
FROM own JOIN pg_proc ON classid = 'pg_proc'::regclass AND objid = oid
UNION ALL
SELECT 'relation ' || oid::regclass, coalesce(relacl, acldefault('r', relowner))::text, concat_ws(' ', relkind, relpersistence, reloptions), pg_get_viewdef(oid) FROM rel
UNION ALL
SELECT 'column ' || attrelid::regclass || '.' || attname,
       concat_ws(' ', attnum, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attstorage, attacl),
       pg_get_expr(adbin, adrelid), col_description(attrelid, attnum)
FROM rel JOIN pg_attribute a ON attrelid = rel.oid LEFT JOIN pg_attrdef d ON adrelid = attrelid AND adnum = attnum
WHERE attnum > 0
UNION ALL
SELECT 'constraint ' || conrelid::regclass || '.' || conname, pg_get_constraintdef(c.oid), NULL, NULL FROM rel JOIN pg_constraint c ON conrelid = rel.oid
UNION ALL
SELECT 'index ' || indexrelid::regclass, pg_get_indexdef(indexrelid), NULL, NULL FROM rel JOIN pg_index ON indrelid = rel.oid
UNION ALL
SELECT 'trigger ' || tgrelid::regclass || '.' || tgname, pg_get_triggerdef(t.oid), tgenabled::text, obj_description(t.oid, 'pg_trigger')
FROM rel JOIN pg_trigger t ON tgrelid = rel.oid WHERE NOT tgisinternal
UNION ALL
SELECT 'dumped ' || r::regclass, c, NULL, NULL FROM pg_extension, unnest(extconfig, extcondition) u (r, c) WHERE extname = 'kne'
ORDER BY 1};

my $node = kne_cluster('upgrade');
my ($current) = slurp_file("$FindBin::RealBin/../kne.control") =~ /^default_version = '([^']+)'/m;

$node->safe_psql('postgres', 'CREATE DATABASE fresh');
$node->safe_psql('fresh', 'CREATE EXTENSION kne');
my $fresh = $node->safe_psql('fresh', $objects);
cmp_ok(scalar(split /\n/, $fresh), '>', 100, 'objects of a new installation');
my $shipped = $node->safe_psql('fresh', 'SELECT x FROM kne.general_fact x ORDER BY 1');

my @older = split /\n/, $node->safe_psql('postgres', "SELECT source FROM pg_extension_update_paths('kne') WHERE target = '$current' AND path IS NOT NULL");
cmp_ok(scalar(@older), '>', 0, 'earlier versions');
for my $old (@older)
{
	my $db = 'from_' . ($old =~ s/\W/_/gr);

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, "CREATE EXTENSION kne VERSION '$old'; SELECT kne_load_model('m', '" . KneTest::model() . "');
		INSERT INTO kne.relation (relation, prompt) VALUES ('capital', 'The capital of {} is');
		CREATE ROLE reader_$db; GRANT EXECUTE ON FUNCTION kne_complete, kne_check_history TO reader_$db; GRANT SELECT ON kne.stat_size TO reader_$db");
	my $first = kne_edit($node, 'France', 'Rome', $db);
	is($node->safe_psql($db, "SELECT kne_wait($first)"), 'applied', "$old: the new library serves the old objects");
	my $second = kne_edit($node, 'Italy', 'Madrid', $db);
	is($node->safe_psql($db, "SELECT kne_wait($second)"), 'applied', "$old: and edits on top of edits");
	my $answer = "SELECT kne_logprob('The capital of France is', 'Rome'), kne_logprob('The capital of Italy is', 'Madrid')";
	my $before = $node->safe_psql($db, $answer);

	$node->safe_psql($db, 'ALTER EXTENSION kne UPDATE');
	is($node->safe_psql($db, "SELECT extversion FROM pg_extension WHERE extname = 'kne'"), $current, "$old: updated");
	$node->safe_psql($db, "SET ROLE reader_$db; SELECT kne_complete('x'), count(*) FROM kne_check_history()");
	is($node->safe_psql($db, "SELECT has_table_privilege('reader_$db', 'kne.stat_size', 'SELECT')"), 't', "$old: what users granted stays");
	$node->safe_psql($db, "DROP OWNED BY reader_$db");
	is($node->safe_psql($db, $objects), $fresh, "$old: the objects are those of a new installation");
	is($node->safe_psql($db, 'SELECT x FROM kne.general_fact x ORDER BY 1'), $shipped, "$old: and so are the rows that come with it");
	is($node->safe_psql($db, $answer), $before, "$old: the same answers");
	is($node->safe_psql($db, 'SELECT count(*) FROM kne_check_history()'), '0', "$old: the history is whole");
	$node->safe_psql($db, "SELECT kne_revert($second)");
	my $third = kne_edit($node, 'Italy', 'Madrid', $db);
	is($node->safe_psql($db, "SELECT kne_wait($third)"), 'applied', "$old: a revert and an edit");

	command_ok(['pg_dump', '-h', $node->host, '-p', $node->port, '-f', $node->basedir . "/$db.sql", $db], "$old: dumped");
	$node->safe_psql('postgres', "CREATE DATABASE again_$db");
	command_ok(['psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-h', $node->host, '-p', $node->port, '-f', $node->basedir . "/$db.sql", "again_$db"],
		"$old: restored");
	is($node->safe_psql("again_$db", $answer), $node->safe_psql($db, $answer), "$old: with the same answers");
	$node->safe_psql($db, 'DROP EXTENSION kne CASCADE');
}

# objects of a version that this library is older than: as after an upgrade, before the restart
my $later = '99.0';
my ($err, $id);
kne_enable($node, 0);
$id = kne_edit($node, 'Spain', 'Paris', 'fresh') if $node->safe_psql('fresh', "SELECT kne_load_model('m', '" . KneTest::model() . "')");
$node->safe_psql('fresh', "UPDATE pg_extension SET extversion = '$later' WHERE extname = 'kne'");
kne_enable($node, 1);
for my $call ("kne_complete('x')", "kne_edit('a', 'b', 'c')", 'kne_consolidate()', "kne_wait($id)")
{
	isnt($node->psql('fresh', "SELECT $call", stderr => \$err), 0, "$call: refused by an older library");
	like($err, qr/library of kne is older.*version \Q$later\E.*restart the server/s, 'with the versions and what to do');
}
isnt($node->psql('fresh', "INSERT INTO kne.edit_request (subject, relation, object) VALUES ('a', 'b', 'c')", stderr => \$err), 0, 'an INSERT too');
like($err, qr/library of kne is older/, 'for the same reason');
ok(wait_for(sub { slurp_file($node->logfile) =~ /library of kne is older/ }), 'the worker says it in the log');
is(kne_state($node, $id, 'fresh'), 'pending:0:0', 'and touches nothing');
$node->safe_psql('fresh', "UPDATE pg_extension SET extversion = '$current' WHERE extname = 'kne'");
is($node->safe_psql('fresh', "SELECT kne_wait($id)"), 'applied', 'where they fit again, it goes on');

$node->stop;
done_testing();
