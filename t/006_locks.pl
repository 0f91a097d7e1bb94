# The worker never waits for a lock that a user holds, and learns of two-phase commits.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('locks', 'kne.idle_timeout' => '1min');
kne_prepare($node);
my $session = $node->background_psql('postgres');

# a locked request is written later, the others meanwhile
my $quick = quick();
my $engine = kne_pid($node, 'engine');
kill 'STOP', $engine;
$node->safe_psql('postgres', qq{INSERT INTO kne.edit_request (subject, relation, object, options)
	SELECT s, 'capital', 'Lyon', '$quick' FROM unnest('{Italy,Spain,Germany}'::text[]) s});
ok($node->poll_query_until('postgres', "SELECT count(*) = 3 FROM kne.edit_request WHERE state = 'running'"), 'three run together');
$session->query_safe('BEGIN');
$session->query_safe('SELECT 1 FROM kne.edit_request WHERE edit_id = 2 FOR UPDATE');
kill 'CONT', $engine;
ok(kne_wait_state($node, 3, 'applied'), 'what is not locked is written');
is(kne_state($node, 1) . ' ' . kne_state($node, 2), 'applied:0:0 running:0:0', 'what is locked is not');
my $id = kne_edit($node, 'France', 'Nice');
ok(kne_wait_state($node, $id, 'applied'), 'and does not stop what comes after');
$session->query_safe('COMMIT');
ok(kne_wait_state($node, 2, 'applied'), 'it is written when the lock is gone');
is($node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_event WHERE edit_id = 2 AND event = 'started'"), 1,
	'without computing it again');

# a locked table, a locked model
for my $lock ('LOCK TABLE kne.weight_delta', 'LOCK TABLE kne.edit_event', 'SELECT 1 FROM kne.model FOR UPDATE')
{
	($id, $engine) = kne_running($node, 'France', 'Lyon');
	$session->query_safe('BEGIN');
	$session->query_safe($lock);
	kill 'CONT', $engine;
	sleep 2;
	ok($node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker'"
			. " AND xact_start < clock_timestamp() - interval '1 s')"), "no transaction of the worker waits for $lock");
	is(kne_state($node, $id), 'running:0:0', 'the result does, in memory');
	$session->query_safe('ROLLBACK');
	ok(kne_wait_state($node, $id, 'applied'), 'and goes on afterwards');
	$node->safe_psql('postgres', "SELECT kne_revert($id)");
}

# an uncommitted revert of the edit that would be superseded
my $old = kne_edit($node, 'France', 'Lyon');
ok(kne_wait_state($node, $old, 'applied'), 'an edit');
($id, $engine) = kne_running($node, 'France', 'Marseille');
$session->query_safe('BEGIN');
$session->query_safe("SELECT kne_revert($old)");
kill 'CONT', $engine;
sleep 2;
is(kne_state($node, $id), 'running:0:0', 'a newer one waits for the revert of the older one to end');
$session->query_safe('COMMIT');
ok(kne_wait_state($node, $id, 'applied'), 'and is applied then');
is(kne_state($node, $old), 'reverted:0:0', 'the older one is reverted, not superseded');

# one that began before the newer one was asked for, and has not seen it
$old = $id;
$session->query_safe('BEGIN');
$session->query_safe("SELECT kne_revert($old)");
$id = kne_edit($node, 'France', 'Lyon');
ok(kne_wait_state($node, $id, 'running'), 'the newer one runs');
sleep 2;
is(kne_state($node, $id), 'running:0:0', 'and waits for the revert to end');
$session->query_safe('COMMIT');
ok(kne_wait_state($node, $id, 'applied'), 'then it is applied');
is(kne_state($node, $old), 'reverted:0:0', 'the older one is reverted');

# of the fact's earlier requests none but the one in force is of interest
$session->query_safe('BEGIN');
$session->query_safe("SELECT 1 FROM kne.edit_request WHERE edit_id = $old FOR UPDATE");
$old = $id;
$id = kne_edit($node, 'France', 'Nice');
ok(kne_wait_state($node, $id, 'applied'), 'a lock of a finished one stops nobody');
is(kne_state($node, $old), 'superseded:0:0', 'and the one in force is superseded');
$session->query_safe('ROLLBACK');

# two-phase commit
$node->safe_psql('postgres', "BEGIN; SELECT kne_edit('Italy', 'capital', 'Turin', options => '$quick'); PREPARE TRANSACTION 'x'");
sleep 2;
$node->safe_psql('postgres', "COMMIT PREPARED 'x'");
ok($node->poll_query_until('postgres', "SELECT state = 'applied' FROM kne.edit_request WHERE object = 'Turin'"),
	'COMMIT PREPARED: the request is found');
$node->safe_psql('postgres', "BEGIN; SELECT kne_edit('Italy', 'capital', 'Naples', options => '$quick'); PREPARE TRANSACTION 'y'");
$node->restart;
sleep 1;
$node->safe_psql('postgres', "COMMIT PREPARED 'y'");
ok($node->poll_query_until('postgres', "SELECT state = 'applied' FROM kne.edit_request WHERE object = 'Naples'"),
	'also when the server restarted in between');
$node->safe_psql('postgres', "BEGIN; SELECT kne_edit('Italy', 'capital', 'Genoa', options => '$quick'); ROLLBACK");
is($node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_request WHERE object = 'Genoa'"), 0, 'a rolled back request is none');

$session->quit;
$node->stop;
done_testing();
