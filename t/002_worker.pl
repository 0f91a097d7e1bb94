# The worker and the launcher are ended while an edit runs.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('worker', 'kne.idle_timeout' => '1min');
kne_prepare($node);

# terminated
my ($id, $engine) = kne_running($node, 'France', 'Lyon');
my $worker = kne_pid($node, 'worker');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker)");
ok(wait_gone($worker), 'a terminated worker leaves, though the engine does not answer');
kill 'CONT', $engine;
ok(kne_wait_state($node, $id, 'applied'), 'another one takes over its edit');
is(kne_state($node, $id), 'applied:0:1', 'uncharged');

# a cancelled statement of the worker is not the edit's fault either
($id, $engine) = kne_running($node, 'Italy', 'Milan');
$worker = kne_pid($node, 'worker');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($worker)");
ok($node->poll_query_until('postgres', "SELECT count(*) = 2 FROM kne.edit_event WHERE edit_id = $id AND event = 'started'"),
	'pg_cancel_backend on the worker puts the edit back, to begin again');
kill 'CONT', $engine;
ok(kne_wait_state($node, $id, 'applied'), 'and it is done');
is(kne_state($node, $id), 'applied:0:0', 'uncharged');
is(kne_pid($node, 'worker'), $worker, 'in the same worker');

# cancelled by a user while it runs: the result is dropped, whenever the engine comes to it
($id, $engine) = kne_running($node, 'Spain', 'Seville');
is($node->safe_psql('postgres', "SELECT kne_cancel($id)"), 't', 'a running edit is cancelled');
is(kne_state($node, $id), 'cancelled:0:0', 'at once');
kill 'CONT', $engine;
my $other = kne_edit($node, 'Germany', 'Hamburg');
ok(kne_wait_state($node, $other, 'applied'), 'the worker goes on');
is(kne_state($node, $id), 'cancelled:0:0', 'the cancelled edit stays cancelled');
is($node->safe_psql('postgres', "SELECT count(*) FROM kne.solution WHERE edit_id = $id"), 0, 'with no rows');

# one whose attribution would take an hour: cancelled, it holds nobody up
$id = $node->safe_psql('postgres', "SELECT kne_edit('Spain', 'capital', 'Seville', options =>"
	. " '{\"points\": 64, \"path\": \"layer\", \"reference\": 4096, \"contrast\": 0.1}')");
ok(kne_wait_state($node, $id, 'running'), 'a long edit runs');
ok($node->poll_query_until('postgres', "SELECT phase = 'attribute' AND step > 0 FROM kne.stat_progress"), 'and says how far it is');
$node->safe_psql('postgres', "SELECT kne_cancel($id)");
$other = kne_edit($node, 'Germany', 'Munich');
ok(kne_wait_state($node, $other, 'applied'), 'the next edit is done, long before the first would have been');
is(kne_state($node, $id), 'cancelled:0:0', 'which is cancelled');

# kne.enabled switched off while it runs
($id, $engine) = kne_running($node, 'Spain', 'Malaga');
$worker = kne_pid($node, 'worker');
$node->safe_psql('postgres', 'ALTER SYSTEM SET kne.enabled = off');
$node->reload;
ok(wait_gone($worker), 'the worker leaves when kne.enabled is switched off');
kill 'CONT', $engine;
is(kne_state($node, $id), 'pending:0:0', 'its edit waits');
like($node->safe_psql('postgres', "SELECT state FROM kne_status() WHERE worker = 'launcher'"), qr/kne.enabled is off/,
	'kne_status says why');
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Lyon')"), 't', 'reads go on');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET kne.enabled');
$node->reload;
ok(kne_wait_state($node, $id, 'applied'), 'and runs when it is on again');

# the launcher
($id, $engine) = kne_running($node, 'France', 'Nice');
my $launcher = kne_pid($node, 'launcher');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($launcher)");
ok(wait_gone($launcher), 'a terminated launcher leaves');
ok(wait_gone($engine), 'with its engine');
ok(kne_wait_state($node, $id, 'applied'), 'the next launcher starts the next engine, and the edit is done');
is(kne_state($node, $id), 'applied:0:1', 'uncharged');

# killed: PostgreSQL restarts all of itself
($id, $engine) = kne_running($node, 'Italy', 'Turin');
$worker = kne_pid($node, 'worker');
kill 'KILL', $worker;
ok(wait_gone($engine), 'the engine goes when the server restarts after a crash');
ok(wait_for(sub {
	# The server takes no connections for a moment.
	return (eval { kne_state($node, $id) } // '') eq 'applied:0:1';
}), 'the edit of a killed worker is done after the server has restarted');
is(kne_state($node, $id), 'applied:0:1', 'uncharged');

$node->stop;
done_testing();
