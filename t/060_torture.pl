# Kill everything: under editors, readers and waiters, one process after the other dies at a random moment; after each recovery the
# rows hold what they promise (test/invariants.sql), and nothing of the dead is left. At the end the model answers, to the last
# bit, as one that is built from a dump of the rows in another server.
#
# KNE_TORTURE_SECONDS: how long (40). KNE_SEED: which kills and when; printed.
use strict;
use warnings;
use Cwd qw(abs_path);
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use List::Util qw(shuffle);
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $seconds = $ENV{KNE_TORTURE_SECONDS} // 40;
my $seed = $ENV{KNE_SEED} // int(rand(1_000_000));
my $node = kne_cluster('torture',
	'kne.idle_timeout'           => '5s',
	'kne.batch_size'             => 4,
	'kne.max_attempts'           => 100,
	'dynamic_shared_memory_type' => 'mmap',
	'log_statement'              => 'none',
	'log_line_prefix'            => '%m [%p] <%e> ');
my $data = abs_path($node->data_dir);
my $dir = PostgreSQL::Test::Utils::tempdir();
my @psql = ('psql', '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'));
my @subjects = qw(France Italy Spain Germany Japan Egypt Canada Russia);
my @objects = qw(Paris Rome Madrid Berlin Tokyo Cairo Ottawa Moscow);
my $options = '{"contrast": 0, "anchors": 0, "protect": 32, "select": "attribution", "lr": 0.04, "max_neurons": 60, "max_steps": 60}';

note("KNE_SEED=$seed, $seconds s");
srand($seed);
kne_prepare($node);

# ---- clients: each a process that asks by psql and writes down what has committed ----

sub ask
{
	my ($log, $sql) = @_;
	my $pid = open(my $out, '-|') // die "cannot fork: $!";

	if ($pid == 0)
	{
		open(STDERR, '>>', "$dir/errors");
		exec(@psql, '-c', $sql) or POSIX::_exit(127);
	}
	my $answer = do { local $/; <$out> } // '';
	close($out);
	my $ok = $? == 0;
	print $log $answer if $ok && $log; # lines of letter and edit, committed
	return $ok;
}

sub one_of { return $_[int(rand(@_))]; }

my %clients = (
	editor => sub {
		my ($log) = @_;
		my $kind = rand();
		my $room = "(SELECT count(*) FROM kne.edit_request WHERE state = 'pending') < 300"; # what is asked for is to be done before long
		my $some = "(SELECT edit_id FROM kne.edit_request WHERE state IN (%s) ORDER BY random() LIMIT 1) r";

		if ($kind < 0.35)
		{
			ask($log, sprintf("SELECT 'E', kne_edit('%s', 'capital', '%s', options => '$options') WHERE $room", one_of(@subjects), one_of(@objects)));
		}
		elsif ($kind < 0.6)
		{
			ask($log, "INSERT INTO kne.edit_request (subject, relation, object, options) SELECT s, 'capital', '" . one_of(@objects)
				. "', '$options' FROM unnest('{" . join(',', @subjects[0 .. int(rand(4)) + 1]) . "}'::text[]) s WHERE $room RETURNING 'E', edit_id");
		}
		elsif ($kind < 0.65)
		{
			ask(undef, 'SELECT kne_consolidate()');
		}
		elsif ($kind < 0.82)
		{
			ask($log, "SELECT 'R', edit_id FROM " . sprintf($some, "'applied'") . " WHERE kne_revert(edit_id) IS NOT NULL");
		}
		else
		{
			ask($log, "SELECT 'C', edit_id FROM " . sprintf($some, "'pending', 'running'") . " WHERE kne_cancel(edit_id)");
		}
		usleep(400_000 * rand());
	},
	reader => sub {
		ask(undef, sprintf("SELECT kne_logprob('The capital of %s is', '%s')", one_of(@subjects), one_of(@objects)));
	},
	waiter => sub {
		ask(undef, "SELECT kne_wait(max(edit_id), '20 s') FROM kne.edit_request WHERE state IN ('pending', 'running')");
		usleep(50_000);
	});
my @children;

for my $name (qw(editor editor reader waiter))
{
	my $pid = fork() // die "cannot fork: $!";
	my $parent = getppid();

	if ($pid == 0)
	{
		# Not by exit: the end of the cluster is the parent's affair.
		my $me = getppid();
		srand($seed + $$);
		open(my $log, '>>', "$dir/committed.$$") or POSIX::_exit(1);
		$log->autoflush(1);
		while (!-e "$dir/stop" && getppid() == $me)
		{
			$clients{$name}->($log);
		}
		POSIX::_exit(0);
	}
	push @children, $pid;
}

# ---- looks ----

# Does the server answer, with an engine?
sub up
{
	return wait_for(sub {
		my $out = qx(psql -X -At -d '@{[$node->connstr('postgres')]}' -c "SELECT count(*) FROM kne_status() WHERE worker = 'engine' AND state = 'running'" 2>/dev/null);
		return $out =~ /^1$/;
	});
}

sub process
{
	my ($sql) = @_;
	my $pid = qx(psql -X -At -d '@{[$node->connstr('postgres')]}' -c "$sql" 2>/dev/null);

	return $pid =~ /^(\d+)$/ ? $1 : 0;
}

# Processes in the data directory that the server of now does not know: (pid name) of each.
sub strays
{
	my ($postmaster) = split /\n/, eval { slurp_file("$data/postmaster.pid") } // '';
	my $launcher = process("SELECT pid FROM pg_stat_activity WHERE backend_type = 'kne launcher'");
	my @found;

	for my $proc (glob('/proc/[0-9]*'))
	{
		next if (readlink("$proc/cwd") // '') ne $data;
		my ($pid, $name, $state, $parent) = (eval { slurp_file("$proc/stat") } // '') =~ /^(\d+) \((.*)\) (\S) (\d+)/ or next;
		next if $state eq 'Z' || $pid == ($postmaster // 0) || $parent == ($postmaster // 0);
		next if $name eq 'kne-engine' && $parent == $launcher;
		push @found, "$pid $name";
	}
	return @found;
}

sub violations
{
	my ($where, $digests) = @_;
	my $out = '';

	# A kill may have been the last of many; the server may still be on its way up.
	wait_for(sub {
		my $conn = ($where // $node)->connstr('postgres');
		$out = qx(psql -X -q -At -v ON_ERROR_STOP=1 -v digests=@{[$digests // 0]} -d '$conn' -f '$FindBin::RealBin/../test/invariants.sql' 2>'$dir/why');
		return $? == 0;
	}) or return 'could not look: ' . slurp_file("$dir/why");
	chomp $out;
	return $out;
}

# ---- kills ----

my $crashes = 0; # kills after which PostgreSQL restarts itself
my %done;
sub worker { return process("SELECT pid FROM pg_stat_activity WHERE backend_type = 'kne worker' LIMIT 1"); }
sub launcher { return process("SELECT pid FROM pg_stat_activity WHERE backend_type = 'kne launcher'"); }
sub waiter { return process("SELECT pid FROM pg_stat_activity WHERE query ~ '^SELECT kne_wait' AND state = 'active' LIMIT 1"); }
sub engine { return process("SELECT pid FROM kne_status() WHERE worker = 'engine'"); }
sub hit
{
	my ($signal, $pid) = @_;

	return $pid && kill($signal, $pid);
}
sub crash { my $hit = hit('KILL', @_); $crashes++ if $hit; return $hit; }
my %kills = (
	'engine killed'          => sub { return hit('KILL', engine()); },
	'engine ended'           => sub { return hit('TERM', engine()); },
	'engine hung and killed' => sub { my $pid = engine(); hit('STOP', $pid); usleep(700_000 * rand()); return hit('KILL', $pid); },
	'worker ended'           => sub { return hit('TERM', worker()); },
	'worker cancelled'       => sub { return hit('INT', worker()); },
	'worker killed'          => sub { return crash(worker()); },
	'launcher ended'         => sub { return hit('TERM', launcher()); },
	'launcher killed'        => sub { return crash(launcher()); },
	'waiter ended'           => sub { return hit('TERM', waiter()); },
	'waiter killed'          => sub { return crash(waiter()); },
	'immediate stop'         => sub { $node->stop('immediate'); kne_start($node); return 1; },
	'fast stop'              => sub { $node->stop('fast'); kne_start($node); return 1; },
	'postmaster killed'      => sub { $node->kill9; kne_start($node); return 1; });
my $end = time() + $seconds;
my ($rounds, @wrong) = (0);
my @bag;

ok(up(), 'all is well before');
while (time() < $end && !@wrong)
{
	# each once, in a random order, before any comes again
	@bag = shuffle(sort keys %kills) unless @bag;
	my $what = shift @bag;

	usleep(1_000_000 * rand());
	my $from = time();
	my $hit = $kills{$what}->();
	$done{$what}++ if $hit;
	$rounds++ if $hit;
	my $v = violations();
	push @wrong, "after \"$what\": $v" if $v ne '';
	wait_for(sub { return !strays(); }) or push @wrong, "after \"$what\": left behind " . join(', ', strays());
	# An engine that dies often comes back later each time: mostly the next kill finds none yet.
	push @wrong, "after \"$what\": no recovery" if rand() < 0.2 && !up();
	note(sprintf('%5.1f s %s%s', time() - $from, $what, $hit ? '' : ': nothing to kill'));
}
diag($_) for @wrong;
is(scalar(@wrong), 0, "$rounds kills: the rows hold, nothing is left behind");
note(join(', ', map { "$_: $done{$_}" } sort keys %done));

# ---- the end ----

append_to_file("$dir/stop", '');
waitpid($_, 0) for @children;
up();
my ($left, $before) = ('inf');
do
{
	$before = $left;
	wait_for(sub {
		$left = $node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_request WHERE state IN ('pending', 'running')");
		return $left == 0 || $left < $before;
	});
} while ($left != 0 && $left != $before);
is($left, 0, 'what was asked for comes to an end');
ok($node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM kne.consolidation WHERE state IN ('pending', 'running'))"),
	'every consolidation too');
note($node->safe_psql('postgres', 'SELECT state, count(*), sum(deaths) FROM kne.consolidation GROUP BY state ORDER BY state'));
note($node->safe_psql('postgres', 'SELECT state, count(*), sum(attempts), sum(deaths) FROM kne.edit_request GROUP BY state ORDER BY state'));
is(violations($node, 1), '', 'the rows hold, with their digests');
my %committed = (E => [], R => [], C => []);
for my $file (glob("$dir/committed.*"))
{
	push @{ $committed{ substr($_, 0, 1) } }, substr($_, 2) for slurp_file($file) =~ /^([ERC]\|\d+)$/mg;
}
my ($edits, $reverts, $cancels) = map { '{' . join(',', @{ $committed{$_} }) . '}' } qw(E R C);
cmp_ok(scalar(@{ $committed{E} }), '>', 5, scalar(@{ $committed{E} }) . ' requests committed');
is($node->safe_psql('postgres', "SELECT count(*) FROM unnest('$edits'::bigint[]) e WHERE NOT EXISTS (SELECT FROM kne.edit_request WHERE edit_id = e)"),
	0, 'no committed request is lost');
is($node->safe_psql('postgres', "SELECT count(*) FROM unnest('$reverts'::bigint[]) e WHERE NOT EXISTS"
		. " (SELECT FROM kne.edit_event WHERE edit_id = e AND event = 'reverted')"), 0, 'nor a revert');
is($node->safe_psql('postgres', "SELECT count(*) FROM unnest('$cancels'::bigint[]) e WHERE NOT EXISTS"
		. " (SELECT FROM kne.edit_event WHERE edit_id = e AND event = 'cancelled')"), 0, 'nor a cancel');
is($node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_request WHERE state = 'failed' AND error ~ 'died'"), 0,
	'no edit is charged for what was done to others');

my $log = slurp_file($node->logfile);
my $restarts = () = $log =~ /all server processes terminated; reinitializing/g;
cmp_ok($restarts, '<=', $crashes, "the server restarted for $crashes killed processes of its own, and nothing else");
unlike($log, qr/PANIC|terminated by signal (?!9)|<XX/, 'no panic, no other signal, no internal error');

# a replay: another server, another engine, nothing but the dump
my $ask = "SELECT s, o, kne_logprob('The capital of ' || s || ' is', o), t, kne_logprob('The capital of ' || s || ' is', o, as_of => t)"
	. " FROM unnest('{" . join(',', @subjects) . "}'::text[]) s, unnest('{Paris,Rome,Berlin}'::text[]) o,"
	. " (SELECT valid_from FROM kne.activation WHERE activation_id % 7 = 0 ORDER BY 1 LIMIT 8) x (t) ORDER BY 1, 2, 4";
my $answers = $node->safe_psql('postgres', $ask);
my $copy = kne_cluster('replay');
system_or_bail('pg_dump', '-f', "$dir/dump.sql", '-d', $node->connstr('postgres'));
system_or_bail('psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/dump.sql", '-d', $copy->connstr('postgres'));
$copy->safe_psql('postgres', 'ANALYZE');
isnt($answers, '', 'the model answers');
is($copy->safe_psql('postgres', $ask), $answers, 'a replay of the rows in another server answers the same, bit for bit');
is(violations($copy, 1), '', 'and its rows hold');
$copy->stop;

# stopped, it leaves nothing
my ($postmaster, @lines) = split /\n/, slurp_file("$data/postmaster.pid");
my ($segment) = grep { /^\s*\d+\s+\d+\s*$/ } @lines;
$node->stop('fast');
ok(wait_for(sub { return !strays(); }), 'no process is left');
ok(!-e kne_socket($node), 'no socket');
is(join(' ', glob("$data/pg_dynshmem/*")), '', 'no dynamic shared memory');
SKIP:
{
	my ($id) = ($segment // '') =~ /(\d+)\s*$/;
	skip 'the segment of the server is not known', 1 unless defined $id && -r '/proc/sysvipc/shm';
	is(scalar(grep { (split)[1] eq $id } split(/\n/, slurp_file('/proc/sysvipc/shm'))), 0, 'no shared segment');
}
done_testing();
