# What the tests of the processes share: a cluster with kne, a model in it, and ways to catch an edit in the act.
#
# An edit of a small model takes no time to speak of. To do something to a server while an edit runs, the engine is stopped
# (SIGSTOP) before the request, and goes on (SIGCONT) afterwards.
#
# A machine may be slow: nothing here measures time, and what is waited for has minutes.
package KneTest;

use strict;
use warnings;
use Cwd qw(abs_path);
use FindBin;
use Exporter 'import';
use Time::HiRes qw(usleep);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(kne_cluster kne_start kne_enable kne_prepare kne_edit kne_pid kne_state kne_wait_state kne_waiting kne_running kne_socket kne_close kne_fails alive
	wait_gone wait_for quick);

my $model = $ENV{KNE_TEST_MODEL} // abs_path("$FindBin::RealBin/../models/atlas") // '';

# Options that make an edit quick rather than good.
our $quick = '{"step": "adam", "contrast": 0, "anchors": 0, "protect": 0, "reference": 1, "select": "all", "lr": 0.003, "max_steps": 60}';

sub quick { return $quick; }
sub model { return $model; }

sub kne_cluster
{
	my ($name, %conf) = @_;
	my $node;

	plan skip_all => "no model in \"$model\"; set KNE_TEST_MODEL" unless -f "$model/config.json";
	$node = PostgreSQL::Test::Cluster->new($name);
	$node->init(allows_streaming => delete $conf{streaming} // 0, extra => delete $conf{initdb} // []);
	%conf = (
		'shared_preload_libraries' => 'kne',
		'kne.cpu_threads'          => 1,
		'kne.device'               => 'cpu',
		'kne.idle_timeout'         => '2s',
		'max_worker_processes'     => 16,
		'max_prepared_transactions' => 5,
		'restart_after_crash'      => 'on',
		%conf);
	$node->append_conf('postgresql.conf', join('', map { "$_ = '$conf{$_}'\n" } sort keys %conf));
	$node->start;
	return $node;
}

# After a crash the last of its processes may still be on their way out; until then the data directory is not to be had.
sub kne_start
{
	my ($node) = @_;

	wait_for(sub {
		$node->{_pid} = undef if defined $node->{_pid} && !alive($node->{_pid}); # what a start that failed has found
		return defined $node->{_pid} ? $node->psql('postgres', 'SELECT 1') == 0 : $node->start(fail_ok => 1);
	}) or die 'the server does not start';
	return;
}

# Switch the queue on or off. Off, no worker is left when this returns.
sub kne_enable
{
	my ($node, $on) = @_;

	$node->safe_psql('postgres', $on ? 'ALTER SYSTEM RESET kne.enabled' : 'ALTER SYSTEM SET kne.enabled = off');
	$node->reload;
	$node->poll_query_until('postgres', $on
		? "SELECT current_setting('kne.enabled') = 'on'"
		: "SELECT current_setting('kne.enabled') = 'off' AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker')")
	  or die 'kne.enabled cannot be switched';
	return;
}

# The extension, the model, and a few facts of it.
sub kne_prepare
{
	my ($node, $db) = @_;

	$node->safe_psql($db // 'postgres', qq{
		CREATE EXTENSION kne;
		SELECT kne_load_model('m', '$model');
		INSERT INTO kne.relation (relation, prompt) VALUES ('capital', 'The capital of {} is');
		INSERT INTO kne.fact (subject, relation, object)
			VALUES ('France', 'capital', 'Paris'), ('Italy', 'capital', 'Rome'), ('Spain', 'capital', 'Madrid');
	});
	return;
}

sub kne_edit
{
	my ($node, $subject, $object, $db) = @_;

	return $node->safe_psql($db // 'postgres', "SELECT kne_edit('$subject', 'capital', '$object', options => '$quick')");
}

# The engine's only while it answers; the others' at any time.
sub kne_pid
{
	my ($node, $worker) = @_;
	my $sql = $worker eq 'engine'
	  ? "SELECT pid FROM kne_status() WHERE worker = 'engine' AND pid IS NOT NULL AND state = 'running'"
	  : "SELECT pid FROM pg_stat_activity WHERE backend_type = 'kne $worker' LIMIT 1";
	my $pid = '';

	wait_for(sub { ($pid = $node->safe_psql('postgres', $sql)) ne '' });
	return $pid;
}

# Where the engine listens: the header says.
sub kne_socket
{
	my ($node) = @_;
	my ($name) = slurp_file("$FindBin::RealBin/../extension/kne_ext.h") =~ /#define KNE_SOCKET "([^"]+)"/;

	return $node->data_dir . '/' . $name;
}

# The statement fails, and what is said of it, SQLSTATE and all, is as it should be.
sub kne_fails
{
	my ($node, $sql, $like, $name) = @_;

	$node->psql('postgres', "\\set VERBOSITY verbose\n$sql", stderr => \my $err);
	return like($err, $like, $name);
}

# The same text, and numbers in it that are the same but for the order in which sums are rounded.
sub kne_close
{
	my ($got, $expected, $name) = @_;
	my $number = qr{-?\d+(?:\.\d+)?(?:e-?\d+)?};
	my @is = $got =~ /$number/g;
	my @should = $expected =~ /$number/g;
	my $apart = grep { abs($is[$_] - ($should[$_] // 0)) > 1e-3 } 0 .. $#is;

	return ok($apart == 0 && $got =~ s/$number/N/gr eq $expected =~ s/$number/N/gr, $name) || diag("     got: $got\nexpected: $expected");
}

# state:attempts:deaths
sub kne_state
{
	my ($node, $id, $db) = @_;

	return $node->safe_psql($db // 'postgres',
		"SELECT concat_ws(':', state, attempts, deaths) FROM kne.edit_request WHERE edit_id = $id");
}

sub kne_wait_state
{
	my ($node, $id, $state, $db) = @_;

	return $node->poll_query_until($db // 'postgres', "SELECT state = '$state' FROM kne.edit_request WHERE edit_id = $id");
}

# Until the worker has sent what it has claimed, and waits for the engine: there is a batch, and no other wait of a worker with a
# batch is an extension's. Before that, the death of the engine is not the death of a batch.
sub kne_waiting
{
	my ($node) = @_;

	return $node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM kne.stat_workers() w JOIN pg_stat_activity a USING (pid)"
			. " WHERE w.edits > 0 AND a.wait_event_type = 'Extension')");
}

# Ask for an edit that does not get further than its start: the engine is stopped. Returns (edit, pid of the engine).
sub kne_running
{
	my ($node, $subject, $object, $db) = @_;
	my $engine = kne_pid($node, 'engine');
	my $id;

	kill 'STOP', $engine;
	$id = kne_edit($node, $subject, $object, $db);
	kne_wait_state($node, $id, 'running', $db) or die "edit $id does not start";
	kne_waiting($node) or die "edit $id is not sent to the engine";
	return ($id, $engine);
}

# True for a process that runs or sleeps, false for none and for a zombie.
sub alive
{
	my ($pid) = @_;
	my $stat = eval { slurp_file("/proc/$pid/stat") } // return 0;

	return $stat =~ /\) ([A-Z])/ && $1 ne 'Z' && $1 ne 'X';
}

sub wait_for
{
	my ($check, $seconds) = @_;
	my $rounds = ($seconds // 180) * 20;

	while ($rounds-- > 0)
	{
		return 1 if $check->();
		usleep(50_000);
	}
	return 0;
}

sub wait_gone
{
	my ($pid, $seconds) = @_;

	return wait_for(sub { return !alive($pid); }, $seconds);
}

1;
