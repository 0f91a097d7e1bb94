# Several databases on one engine; databases that are dropped, copied, and emptied of kne under the worker's feet.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('databases');
$node->safe_psql('postgres', 'CREATE DATABASE one');
$node->safe_psql('postgres', 'CREATE DATABASE two');
$node->safe_psql('postgres', 'CREATE EXTENSION kne');
kne_prepare($node, 'one');
kne_prepare($node, 'two');

sub workers
{
	my ($db) = @_;

	return $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'kne worker' AND datname = '$db'");
}

# A worker that only looks whether there is work may be in it, but not for long.
sub drop_database
{
	my ($db) = @_;

	return wait_for(sub { return $node->psql('postgres', "SET statement_timeout = '3min'; DROP DATABASE $db") == 0; });
}

# both at once
my $engine = kne_pid($node, 'engine');
kill 'STOP', $engine;
my $a = kne_edit($node, 'France', 'Lyon', 'one');
my $b = kne_edit($node, 'France', 'Nice', 'two');
ok(kne_wait_state($node, $a, 'running', 'one') && kne_wait_state($node, $b, 'running', 'two'), 'two databases at work');
is($node->safe_psql('postgres', "SELECT count(*) FROM kne_status() WHERE worker = 'editing worker' AND database IN ('one', 'two')"),
	2, 'kne_status shows both workers');
kill 'CONT', $engine;
ok(kne_wait_state($node, $a, 'applied', 'one'), 'an edit in one database');
ok(kne_wait_state($node, $b, 'applied', 'two'), 'and one in another');
is($node->safe_psql('one', "SELECT kne_knows('France', 'capital', 'Lyon'), kne_knows('France', 'capital', 'Nice')"), 't|f',
	'each database has its own edits');
is($node->safe_psql('two', "SELECT kne_knows('France', 'capital', 'Lyon'), kne_knows('France', 'capital', 'Nice')"), 'f|t',
	'of one model in one engine');

# idle workers leave; then a database can be a template
ok(wait_for(sub { workers('one') eq '0' }), 'an idle worker leaves');
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE one');
pass('the database can be a template then');
is($node->safe_psql('copy', "SELECT kne_knows('France', 'capital', 'Lyon')"), 't', 'the copy has its edits');

# pending requests of a copy are not run there until somebody says so
my $id;
($id, $engine) = kne_running($node, 'Italy', 'Milan', 'one');
kne_enable($node, 0);
kill 'CONT', $engine;
$node->safe_psql('postgres', 'CREATE DATABASE copy2 TEMPLATE one');
kne_enable($node, 1);
ok(kne_wait_state($node, $id, 'applied', 'one'), 'a pending request runs where it was made');
sleep 2;
is($node->safe_psql('copy2', "SELECT state FROM kne.edit_request WHERE edit_id = $id"), 'pending', 'and not in a copy');
is($node->safe_psql('copy2', 'SELECT kne_adopt()'), 1, 'unless it is adopted');
ok(kne_wait_state($node, $id, 'applied', 'copy2'), 'then it does');

# dropping
ok(wait_for(sub { workers('copy2') eq '0' }), 'its worker leaves');
# (the statements below would wait for as long as the engine is stopped)
ok(drop_database('copy2'), 'a database without work is dropped');
($id, $engine) = kne_running($node, 'Spain', 'Seville', 'two');
ok(drop_database('one'), 'while a worker of another waits for the engine');
my ($rc, $out, $err) = $node->psql('postgres', 'DROP DATABASE two');
like($err, qr/is being accessed by other users/, 'a database with work is not dropped');
$node->safe_psql('postgres', 'DROP DATABASE two WITH (FORCE)');
pass('unless forced');
kill 'CONT', $engine;
ok(wait_for(sub {
	$node->safe_psql('postgres', "SELECT count(*) FROM kne_status() WHERE worker = 'editing worker' AND state <> 'idle'") eq '0'
}), 'the launcher forgets it');
unlike(slurp_file($node->logfile), qr/PANIC|terminated by signal/, 'nothing crashed');

# DROP EXTENSION with a worker at work
($id, $engine) = kne_running($node, 'Spain', 'Seville', 'copy');
$node->safe_psql('copy', "SET statement_timeout = '3min'; DROP EXTENSION kne CASCADE");
pass('the extension can be dropped while an edit runs');
kill 'CONT', $engine;
ok(wait_for(sub { workers('copy') eq '0' }), 'its worker leaves');
kne_prepare($node, 'copy');
$id = kne_edit($node, 'Spain', 'Malaga', 'copy');
ok(kne_wait_state($node, $id, 'applied', 'copy'), 'and comes back with the extension');

# databases that kne is not in cost nothing but a visit
is($node->safe_psql('postgres', "SELECT count(*) FROM kne_status() WHERE database IN ('template1')"), 0, 'no slot for others');

$node->stop;
done_testing();
