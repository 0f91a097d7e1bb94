# A dump takes everything along and starts nothing: history as it was, the same model bit for bit, requests that wait to be adopted.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('dump');
my ($out, $err);

kne_prepare($node);
$node->safe_psql('postgres', "INSERT INTO kne.general_fact (prompt, object) VALUES ('my own', 'fact')");
for my $object ('Rome', 'Madrid')
{
	my $id = kne_edit($node, 'France', $object);
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', "France is $object");
}
my $gone = kne_edit($node, 'Italy', 'Paris');
$node->safe_psql('postgres', "SELECT kne_wait($gone)");
$node->safe_psql('postgres', "SELECT kne_revert($gone)");
kne_enable($node, 0);
my $pending = kne_edit($node, 'Spain', 'Paris');
my $consolidation = $node->safe_psql('postgres', 'SELECT kne_consolidate()');

# everything but where a request comes from
my $tables = join(";\n", map { "SELECT '$_', x FROM kne.$_ x ORDER BY x::text" }
		qw(model relation edit_request fact solution ensemble weight_delta activation edit_event general_fact consolidation));
my $answers = "SELECT p, kne_complete(p), kne_logprob(p, 'Paris'), kne_complete(p, as_of => (SELECT min(valid_from) FROM kne.activation))"
	. " FROM unnest(ARRAY['The capital of France is', 'The capital of Italy is', 'The capital of Spain is']) p ORDER BY p";
my $rows_before = $node->safe_psql('postgres', $tables);
my $answers_before = $node->safe_psql('postgres', $answers);

command_ok(['pg_dump', '-h', $node->host, '-p', $node->port, '-f', $node->basedir . '/all.sql', 'postgres'], 'dumped');
$node->safe_psql('postgres', 'CREATE DATABASE restored');
command_ok(['psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-h', $node->host, '-p', $node->port, '-f', $node->basedir . '/all.sql',
	'restored'], 'restored');
is($node->safe_psql('restored', $tables), $rows_before, 'every row, times included');
is($node->safe_psql('restored', $answers), $answers_before, 'the same model, now and then');
isnt($node->safe_psql('restored', 'SELECT origin FROM kne.instance'), $node->safe_psql('postgres', 'SELECT origin FROM kne.instance'),
	'another origin');

# a copied database has the same origin, but is another database
$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE restored');

# revert works on what was restored
$node->safe_psql('restored', "SELECT kne_revert(edit_id) FROM kne.edit_request WHERE subject = 'France' AND state = 'applied'");
is($node->safe_psql('restored', "SELECT object FROM kne.edit_request WHERE subject = 'France' AND state = 'applied'"), 'Rome', 'reinstated');
is($node->safe_psql('restored', "SELECT kne_knows('France', 'capital', 'Rome')"), 't', 'and so the model says');

kne_enable($node, 1);
is($node->safe_psql('postgres', "SELECT kne_wait($pending)"), 'applied', 'the request runs where it was made');
for my $db ('restored', 'copied')
{
	$node->psql($db, "SELECT kne_wait($pending)", stdout => \$out, stderr => \$err);
	like($err, qr/requested in another database.*kne_adopt/s, "and not in $db");
}
is($node->safe_psql('restored', "SELECT state FROM kne.edit_request WHERE edit_id = $pending"), 'pending', 'still pending');
is($node->safe_psql('postgres', "SELECT kne_wait_consolidation($consolidation)"), 'applied', 'so does the consolidation');
is($node->safe_psql('restored', 'SELECT state FROM kne.consolidation'), 'pending', 'and not there');
is($node->safe_psql('restored', 'SELECT kne_adopt()'), '2', 'adopted');
is($node->safe_psql('restored', "SELECT kne_wait($pending)"), 'applied', 'and run');
is($node->safe_psql('restored', "SELECT kne_wait_consolidation($consolidation)"), 'applied', 'and consolidated');
my $new = kne_edit($node, 'Spain', 'Rome', 'copied');
is($node->safe_psql('copied', "SELECT kne_wait($new)"), 'applied', 'a new request runs in the copy');
is($node->safe_psql('copied', "SELECT state FROM kne.edit_request WHERE edit_id = $pending"), 'pending', 'the copied one does not');
cmp_ok($new, '>', $pending, 'sequences go on');

# a dump of what was restored is no different
command_ok(['pg_dump', '-h', $node->host, '-p', $node->port, '-Fc', '-f', $node->basedir . '/again.dump', 'restored'], 'dumped again');

# another encoding: what the model says is shown as far as it goes
$node->safe_psql('postgres', "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'");
kne_prepare($node, 'latin');
is($node->safe_psql('latin', "SELECT count(*) > 100 FROM kne_next_tokens('The capital of France is', 1000000)"), 't', 'a LATIN1 database');
my $latin = kne_edit($node, 'France', 'Rome', 'latin');
is($node->safe_psql('latin', "SELECT kne_wait($latin)"), 'applied', 'edits in a LATIN1 database');
$node->stop;

# a server that does not preload kne: rows can be restored and looked at, nothing else
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''\n");
$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE bare');
command_ok(['psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-h', $node->host, '-p', $node->port, '-f', $node->basedir . '/all.sql', 'bare'],
	'restored without preload');
is($node->safe_psql('bare', $tables), $rows_before, 'every row there too');
for my $call ("kne_complete('x')", "kne_edit('a', 'b', 'c')", "kne_locate('a', 'b', 'c')", "kne_tokenize('x')", "kne_wait($pending)",
	"kne_load_model('n', '/')", 'kne_adopt()')
{
	my $rc = $node->psql('bare', "SELECT $call", stderr => \$err);

	isnt($rc, 0, "$call fails");
	like($err, qr/not loaded at server start.*shared_preload_libraries/s, "$call says how to enable it");
}
is($node->safe_psql('bare', "SELECT kne_cancel($pending)"), 't', 'a request can be cancelled without');
$node->safe_psql('bare', "SELECT kne_revert(edit_id) FROM kne.edit_request WHERE subject = 'France' AND state = 'applied'");
$node->stop;
done_testing();
