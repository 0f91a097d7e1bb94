# Ten thousand requests in one statement: one wake-up, at commit; progress that can be seen, also by who waits; a restart loses none; cancelled
# as a whole; queued again. A batch stays within kne.batch_bytes.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = kne_cluster('bulk', 'kne.idle_timeout' => '1h');
my ($out, $err);

sub q1 { return $node->safe_psql('postgres', shift); }

# lines of the server's log that say that a worker was woken
sub wakes { return scalar(() = slurp_file($node->logfile) =~ /a worker is woken/g); }

kne_prepare($node);
my $engine = kne_pid($node, 'engine');
q1('SELECT kne_wait(' . kne_edit($node, 'France', 'Rome') . ')'); # the worker is connected: a stopped engine greets nobody
my $n = 10_000;
my $t0 = time;

my $session = $node->background_psql('postgres', on_error_stop => 1);
$session->query_safe("SET log_min_messages = debug1");
$session->query_safe('BEGIN');
$session->query_safe("INSERT INTO kne.edit_request (subject, relation, object, options)
	SELECT 'Land ' || i, 'capital', 'Rome', '" . quick() . "' FROM generate_series(1, $n) i");
is(wakes(), 0, 'nobody is woken before the commit');
kill 'STOP', $engine;
$session->query_safe('COMMIT');
$session->quit;
is(wakes(), 1, "one wake-up for $n rows");
note sprintf('%d requests in one statement: %.1f s', $n, time - $t0);
is(q1("SELECT count(*) FROM kne.edit_request WHERE state IN ('pending', 'running')"), $n, 'all of them wait');

ok($node->poll_query_until('postgres', "SELECT total = 64 FROM kne.stat_progress"), 'a batch is at work');
ok(kne_waiting($node), 'in the engine');
is(q1("SELECT string_agg(n::text, ' ' ORDER BY what) FROM kne.stat_health WHERE what IN ('running', 'queued')"), ($n - 64) . ' 64', 'and seen to be');

# who waits is told, unless it does not want to hear
my ($first, $last) = split /\|/, q1("SELECT min(edit_id), max(edit_id) FROM kne.edit_request WHERE subject LIKE 'Land %'");
$node->psql('postgres', "SELECT kne_wait($first, '3 s')", stdout => \$out, stderr => \$err);
like($err, qr/NOTICE:  edit $first is running; at work: edit $first and 63 more.*ERROR:  timeout while waiting/s, 'told how far it is');
$node->psql('postgres', "SELECT kne_wait($last, '3 s')", stdout => \$out, stderr => \$err);
like($err, qr/NOTICE:  edit $last is pending; at work: edit $first and 63 more/, 'and what goes before it');
$node->psql('postgres', "SET client_min_messages = warning; SELECT kne_wait($last, '3 s')", stdout => \$out, stderr => \$err);
unlike($err, qr/NOTICE/, 'or not');
kill 'CONT', $engine;
my $finished = "SELECT count(*) FROM kne.edit_request WHERE subject LIKE 'Land %' AND state IN ('applied', 'failed')";
ok($node->poll_query_until('postgres', "SELECT ($finished) > 0"), 'some are done');

# a restart in the midst of it
$node->restart;
my $done = q1($finished);
ok($node->poll_query_until('postgres', "SELECT ($finished) > $done"), 'after a restart it goes on');

# cancelled as a whole, then some of it after all
$t0 = time;
my $cancelled = q1("SELECT count(*) FILTER (WHERE kne_cancel(edit_id)) FROM kne.edit_request WHERE state IN ('pending', 'running')");
note sprintf('%d cancelled in one statement: %.1f s', $cancelled, time - $t0);
is(q1("SELECT count(*) FROM kne.edit_request WHERE state NOT IN ('applied', 'failed', 'cancelled')"), 0, 'cancelled as a whole');
is(q1($finished) + $cancelled, $n, 'and none is lost');
is(q1("SELECT count(kne_retry(edit_id)) FROM kne.edit_request WHERE state = 'cancelled' AND edit_id > $last - 3"), 3, 'queued again');
is(q1("SELECT count(kne_wait(edit_id)) FROM kne.edit_request WHERE edit_id > $last - 3"), 3, 'and done');
is(q1('SELECT count(*) FROM kne_check_history()'), 0, 'the history is whole');

# by bytes: the same requests in one batch, and one by one
sub batches
{
	my ($object) = @_;

	kne_enable($node, 0);
	q1("INSERT INTO kne.edit_request (subject, relation, object) SELECT s, 'capital', '$object' FROM unnest('{France,Italy,Spain}'::text[]) s");
	kne_enable($node, 1);
	q1("SELECT kne_wait(edit_id) FROM kne.edit_request WHERE object = '$object'");
	return q1("SELECT string_agg(DISTINCT detail ->> 'batch', ',') FROM kne.edit_event JOIN kne.edit_request r USING (edit_id)
		WHERE r.object = '$object' AND event = 'applied'");
}
is(batches('Berlin'), '3', 'three edits in one batch');
q1("ALTER SYSTEM SET kne.batch_bytes = '64kB'");
$node->reload;
is(batches('Warsaw'), '1', 'in batches of one where more would be too many bytes');

$node->stop;
done_testing();
