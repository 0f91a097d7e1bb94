# The engine dies, is replaced, or refuses its device; no session is touched by any of it.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('engine', 'kne.idle_timeout' => '1min');
kne_prepare($node);
my $session = $node->background_psql('postgres');
my $backend = $session->query_safe('SELECT pg_backend_pid()');
is($session->query_safe("SELECT kne_knows('France', 'capital', 'Paris')"), 't', 'a session reads');

is((stat(kne_socket($node)))[2] & 07777, 0700, 'only the server may connect to the socket');
my $engine = kne_pid($node, 'engine');
is(slurp_file("/proc/$engine/comm"), "kne-engine\n", 'the process is named kne-engine');
is(readlink("/proc/$engine/cwd"), Cwd::abs_path($node->data_dir), 'and runs in the data directory');
my @fds = grep { my $t = readlink $_ // ''; $t =~ m{/base/|/global/|pg_wal} } glob("/proc/$engine/fd/*");
is(scalar(@fds), 0, 'it holds no file of the server');

# killed in the midst of an edit; a first one makes the worker connect
my $id = kne_edit($node, 'Germany', 'Bonn');
ok(kne_wait_state($node, $id, 'applied'), 'an edit');
($id, $engine) = kne_running($node, 'France', 'Lyon');
my $worker = kne_pid($node, 'worker');
kill 'KILL', $engine;
ok(kne_wait_state($node, $id, 'applied'), 'an edit whose engine was killed is done by the next one');
is(kne_state($node, $id), 'applied:0:1', 'uncharged');
is(kne_pid($node, 'worker'), $worker, 'by the same worker');
isnt(kne_pid($node, 'engine'), $engine, 'in another engine');
is($session->query_safe("SELECT kne_knows('France', 'capital', 'Lyon')"), 't',
	'the session reads again, without knowing');
is($session->query_safe('SELECT pg_backend_pid()'), $backend, 'it is the same session');
like(slurp_file($node->logfile), qr/kne engine \(process $engine\) died: killed by signal 9/, 'the log says what happened');

# a read in flight is asked again of the next engine
$engine = kne_pid($node, 'engine');
kill 'STOP', $engine;
$session->query_until(qr/asked/, "\\echo asked\nSELECT kne_knows('France', 'capital', 'Lyon') AS answer \\gset\n");
ok($node->poll_query_until('postgres', "SELECT state = 'active' FROM pg_stat_activity WHERE pid = $backend"), 'a read waits');
kill 'KILL', $engine;
is($session->query_safe('\echo :answer'), 't', 'the engine is killed, the read has its answer');

# a batch, alone at last; again a first edit makes the worker connect
$id = kne_edit($node, 'Germany', 'Kiel');
ok(kne_wait_state($node, $id, 'applied'), 'an edit by the next engine');
$engine = kne_pid($node, 'engine');
kill 'STOP', $engine;
$node->safe_psql('postgres', q{INSERT INTO kne.edit_request (subject, relation, object, options)
	SELECT s, 'capital', 'Lyon', '} . quick() . q{' FROM unnest('{Italy,Spain,Germany}'::text[]) s});
ok($node->poll_query_until('postgres', "SELECT count(*) = 3 FROM kne.edit_request WHERE state = 'running'"), 'three run together');
ok(kne_waiting($node), 'in the engine');
kill 'KILL', $engine;
ok($node->poll_query_until('postgres', "SELECT count(*) = 3 FROM kne.edit_request WHERE edit_id > $id AND state = 'applied'"),
	'a batch is done after its engine was killed');
is($node->safe_psql('postgres', "SELECT sum(attempts), sum(deaths) FROM kne.edit_request WHERE edit_id > $id"), '0|3', 'uncharged');

# a change of its settings
$engine = kne_pid($node, 'engine');
$node->safe_psql('postgres', 'ALTER SYSTEM SET kne.cpu_threads = 2');
$node->reload;
ok(wait_gone($engine), 'a change of kne.cpu_threads ends the engine');
ok($node->poll_query_until('postgres', "SELECT state = 'running' FROM kne_status() WHERE worker = 'engine'"), 'and starts another');

# a device that is not there
SKIP:
{
	skip 'there is a GPU', 6 if -e '/dev/nvidiactl';
	$node->safe_psql('postgres', "ALTER SYSTEM SET kne.device = 'cuda'");
	$node->reload;
	ok($node->poll_query_until('postgres', "SELECT state = 'refused' FROM kne_status() WHERE worker = 'engine'"),
		'cuda without a GPU is refused');
	like($node->safe_psql('postgres', "SELECT note FROM kne_status() WHERE worker = 'engine'"), qr/cuda/, 'kne_status says why');
	$id = kne_edit($node, 'France', 'Nice');
	my ($rc, $out, $err) = $node->psql('postgres', "SELECT kne_knows('France', 'capital', 'Nice')");
	like($err, qr/does not start as it is configured.*kne\.device/s, 'a read says why, and what to do');
	sleep 1;
	is(kne_state($node, $id), 'pending:0:0', 'edits wait');
	$node->safe_psql('postgres', "ALTER SYSTEM SET kne.device = 'cpu'");
	$node->reload;
	ok(kne_wait_state($node, $id, 'applied'), 'and run when the device is one that there is');
	is(kne_state($node, $id), 'applied:0:0', 'uncharged');
}

my ($rc, $out, $err) = $node->psql('postgres', "ALTER SYSTEM SET kne.device = 'tpu'");
like($err, qr/invalid value for parameter "kne.device"/, 'an unknown device is refused by the setting');

$session->quit;
$node->stop;
done_testing();
