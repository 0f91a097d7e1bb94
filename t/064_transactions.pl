# Requests inside of all that a transaction can be; the extension created, used, changed and dropped in one; pg_upgrade.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('transactions', 'log_line_prefix' => '%m [%p] <%e> ');
my ($out, $err);
kne_prepare($node);
my $model = $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'");
my $quick = quick();

sub objects { return $node->safe_psql('postgres', "SELECT string_agg(object, ' ' ORDER BY object) FROM kne.edit_request WHERE subject = '$_[0]'"); }
sub state_of { return $node->safe_psql('postgres', "SELECT kne_wait(edit_id) FROM kne.edit_request WHERE object = '$_[0]'"); }

# savepoints: what is rolled back was never asked for, what is not was
$node->safe_psql('postgres', qq{
	BEGIN;
	SELECT kne_edit('France', 'capital', 'Lyon', options => '$quick');
	SAVEPOINT a;
	SELECT kne_edit('France', 'capital', 'Nice', options => '$quick');
	SAVEPOINT b;
	SELECT kne_edit('Italy', 'capital', 'Milan', options => '$quick');
	RELEASE b;
	ROLLBACK TO a;
	SAVEPOINT c;
	SELECT kne_edit('Italy', 'capital', 'Turin', options => '$quick');
	RELEASE c;
	COMMIT});
is(objects('France') . ' ' . objects('Italy'), 'Lyon Turin', 'savepoints');
is(state_of($_), 'applied', "$_ is applied") for qw(Lyon Turin);

# a savepoint that fails in a block with an exception handler
$node->safe_psql('postgres', qq{DO \$\$ BEGIN
	PERFORM kne_edit('Spain', 'capital', 'Malaga', options => '$quick');
	BEGIN PERFORM kne_edit('Spain', 'capital', 'Cadiz', options => '$quick'); RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN NULL; END;
END \$\$});
is(objects('Spain'), 'Malaga', 'exception blocks');
is(state_of('Malaga'), 'applied', 'the request outside of it is done');

# procedures that commit
$node->safe_psql('postgres', qq{CREATE PROCEDURE three() LANGUAGE plpgsql AS \$\$ BEGIN
	FOR i IN 1 .. 3 LOOP PERFORM kne_edit('Land ' || i, 'capital', 'Lyon' || i, options => '$quick'); IF i = 2 THEN ROLLBACK; ELSE COMMIT; END IF; END LOOP; END \$\$;
	CALL three()});
is($node->safe_psql('postgres', "SELECT string_agg(object, ' ' ORDER BY object) FROM kne.edit_request WHERE subject ~ '^Land'"), 'Lyon1 Lyon3', 'a procedure that commits and rolls back');

# one snapshot, one model; the own revert is seen
my $id = $node->safe_psql('postgres', "SELECT edit_id FROM kne.edit_request WHERE object = 'Lyon'");
for my $level ('REPEATABLE READ', 'SERIALIZABLE')
{
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $ask = "SELECT kne_knows('France', 'capital', 'Lyon')";

	$session->query_safe("BEGIN ISOLATION LEVEL $level");
	is($session->query_safe($ask), 't', "$level: before");
	$node->safe_psql('postgres', "SELECT kne_revert($id)");
	is($node->safe_psql('postgres', $ask), 'f', 'reverted by another session');
	is($session->query_safe($ask), 't', 'the snapshot stands still');
	isnt($session->query("SELECT kne_revert($id); SELECT 'done'"), 'done', 'and cannot revert again what it still sees');
	$session->query('ROLLBACK'); # of what could not be serialized
	is($session->query($ask), 'f', 'the next one sees it');
	$session->quit;
	$id = kne_edit($node, 'France', 'Lyon');
	$node->safe_psql('postgres', "SELECT kne_wait($id)");
}
# two serializable transactions that each look and then ask
{
	my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;

	$_->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE') for @s;
	$_->query_safe("SELECT count(*) FROM kne.edit_request WHERE subject = 'Twice'") for @s;
	$s[0]->query_safe("SELECT kne_edit('Twice', 'capital', 'Rome', options => '$quick')");
	$s[1]->query("SELECT kne_edit('Twice', 'capital', 'Paris', options => '$quick')");
	$_->query('COMMIT') for @s;
	$_->quit for @s;
	is($node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_request WHERE subject = 'Twice'"), 1, 'SERIALIZABLE: one of two that depend on each other');
}

# DDL in the transaction of a request
$node->safe_psql('postgres', qq{
	BEGIN;
	SELECT kne_edit('Spain', 'capital', 'Toledo', options => '$quick');
	ALTER TABLE kne.edit_request ADD COLUMN mine text;
	CREATE INDEX mine ON kne.edit_request (mine);
	COMMIT});
is(state_of('Toledo'), 'applied', 'a request and DDL of its table');
$node->safe_psql('postgres', 'ALTER TABLE kne.edit_request DROP COLUMN mine');
# a read-only transaction asks the model, and writes nothing
is($node->safe_psql('postgres', "BEGIN READ ONLY; SELECT kne_knows('Spain', 'capital', 'Toledo'); COMMIT"), 't', 'a read-only transaction reads');
isnt($node->psql('postgres', "BEGIN READ ONLY; SELECT kne_edit('a', 'b', 'c')", stderr => \$err), 0, 'and asks for nothing');
like($err, qr/read-only transaction/, 'which says so');

# the extension, made and used and dropped in one transaction; the session's prepared statements outlive none of it
$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('other', qq{
	BEGIN;
	CREATE EXTENSION kne;
	SELECT kne_load_model('m', '$model');
	SELECT kne_edit('France', 'capital', 'Lyon', options => '$quick');
	SELECT kne_complete('The capital of France is', 1);
	ROLLBACK;
	CREATE EXTENSION kne;
	SELECT kne_load_model('m', '$model');
	SELECT kne_edit('France', 'capital', 'Lyon', options => '$quick');
	DROP EXTENSION kne CASCADE;
	BEGIN;
	CREATE EXTENSION kne;
	SELECT kne_load_model('m', '$model');
	SELECT kne_edit('France', 'capital', 'Nice', options => '$quick');
	COMMIT});
is($node->safe_psql('other', 'SELECT object, kne_wait(edit_id) FROM kne.edit_request'), 'Nice|applied', 'CREATE EXTENSION, twice and within a transaction');
is(qx(psql -X -q -At -v digests=1 -d "@{[$node->connstr($_)]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1), '', "the rows hold in $_") for qw(postgres other);

# pg_upgrade, to the same version: files move, rows and model stay
my $answers = "SELECT s, kne_logprob('The capital of ' || s || ' is', 'Rome') FROM unnest('{France,Italy,Spain}'::text[]) s ORDER BY 1";
my $before = $node->safe_psql('postgres', $answers);
kne_enable($node, 0);
my $pending = kne_edit($node, 'Spain', 'Madrid');
$node->stop;
my $new = PostgreSQL::Test::Cluster->new('upgraded');
$new->init;
$new->append_conf('postgresql.conf', "shared_preload_libraries = 'kne'\nkne.device = 'cpu'\nkne.cpu_threads = 1\nkne.idle_timeout = '2s'\nmax_worker_processes = 16\nkne.enabled = off\n");
my $bin = $node->config_data('--bindir');
chdir($new->basedir) or die $!;
command_ok(['pg_upgrade', '-b', $bin, '-B', $bin, '-d', $node->data_dir, '-D', $new->data_dir, '-p', $node->port, '-P', $new->port, '-s', $new->host],
	'pg_upgrade');
$new->start;
$new->safe_psql('postgres', 'ANALYZE'); # statistics are not upgraded
is($new->safe_psql('postgres', $answers), $before, 'the upgraded server answers the same, bit for bit');
is(qx(psql -X -q -At -v digests=1 -d "@{[$new->connstr('postgres')]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1), '', 'the rows hold');
$new->safe_psql('postgres', 'ALTER SYSTEM SET kne.enabled = on');
$new->reload;
is($new->safe_psql('postgres', "SELECT kne_wait($pending)"), 'applied', 'what was pending is done: it is the same database');
unlike(slurp_file($_->logfile), qr/<XX|PANIC|terminated by signal/, 'no internal error') for ($node, $new);
$new->stop;
done_testing();
