# Consolidations when something goes wrong: the engine or the worker dies, edits are reverted meanwhile, somebody changes his mind;
# and those that nobody asked for.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('consolidate', 'kne.idle_timeout' => '1min');
my $options = quick();
my ($c, $engine);

kne_prepare($node);

sub sql { return $node->safe_psql('postgres', shift); }

# state:deaths
sub state_of
{
	return sql("SELECT concat_ws(':', state, deaths) FROM kne.consolidation WHERE consolidation_id = " . shift);
}

sub reached
{
	my ($id, $state) = @_;

	return $node->poll_query_until('postgres', "SELECT state = '$state' FROM kne.consolidation WHERE consolidation_id = $id");
}

# Ask for one that gets no further than its start, for the engine is stopped.
sub begin_one
{
	$engine = kne_pid($node, 'engine');
	kill 'STOP', $engine;
	$c = sql("SELECT kne_consolidate(options => '$options')");
	reached($c, 'running') or die "consolidation $c does not start";
	return;
}

my @ids = map { kne_edit($node, $_->[0], $_->[1]) } (['France', 'Lyon'], ['Italy', 'Turin'], ['Spain', 'Toledo']);
ok(kne_wait_state($node, $_, 'applied'), "edit $_") for @ids;
my $generations = 'SELECT string_agg(generation::text, \' \' ORDER BY edit_id) FROM kne.activation WHERE valid_to IS NULL';
my $knows = q{SELECT bool_and(kne_knows(subject, 'capital', object)) FROM kne.edit_request WHERE state = 'applied'};

# the engine dies
begin_one();
is(sql("SELECT consolidation_id || ':' || total FROM kne.stat_progress"), "$c:3", 'kne.stat_progress shows it');
like(sql("SELECT state FROM kne_status() WHERE worker = 'editing worker'"), qr/consolidation $c of 3 edits/, 'kne_status() too');
kill 'KILL', $engine;
ok(reached($c, 'applied'), 'a consolidation whose engine was killed is done by the next one');
is(state_of($c), 'applied:1', 'the death is counted');
is(sql($generations), '1 1 1', 'each edit has a new generation');
is(sql($knows), 't', 'and holds');

# the worker dies
begin_one();
my $worker = kne_pid($node, 'worker');
kill 'KILL', $worker;
kill 'CONT', $engine;
ok(reached($c, 'applied'), 'a consolidation whose worker was killed is done by the next one');
is(sql($generations), '2 2 2', 'once');

# the server stops at once
begin_one();
kill 'CONT', $engine;
$node->stop('immediate');
$node->start;
ok(reached($c, 'applied'), 'or after the server was');
is(sql($knows), 't', 'the edits hold');

# an edit is reverted meanwhile
my $before = sql($generations);
begin_one();
sql("SELECT kne_revert($ids[1])");
kill 'CONT', $engine;
ok(reached($c, 'abandoned'), 'abandoned when an edit was reverted meanwhile');
like(sql("SELECT error FROM kne.consolidation WHERE consolidation_id = $c"), qr/active edits changed/, 'it says why');
is(sql("SELECT count(DISTINCT generation) FROM kne.solution WHERE consolidation_id = $c"), 0, 'nothing of it is kept');
is(sql("SELECT kne_wait_consolidation($c)"), 'abandoned', 'the wait ends');
is(sql('SELECT count(*) FROM kne.activation WHERE valid_to IS NULL'), 2, 'the others are as they were');

# ... and not yet committed
begin_one();
my $session = $node->background_psql('postgres');
$session->query_safe('BEGIN');
$session->query_safe("SELECT kne_revert($ids[0])");
kill 'CONT', $engine;
sleep 2;
is(state_of($c), 'running:0', 'it waits, in memory, for a revert that is not committed');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'kne worker' AND xact_start < clock_timestamp() - interval '1 s'"), 0,
	'and holds no transaction open');
$session->query_safe('ROLLBACK');
ok(reached($c, 'applied'), 'rolled back, it goes on');
is(sql($knows), 't', 'the edits hold');
$session->quit;

# changing one's mind
begin_one();
is(sql("SELECT kne_cancel_consolidation($c)"), 't', 'a running one is cancelled');
my $id = kne_edit($node, 'Italy', 'Genoa');
kill 'CONT', $engine;
ok(kne_wait_state($node, $id, 'applied'), 'the worker goes on to other work');
is(state_of($c), 'cancelled:0', 'it stays cancelled');

# in the background
sql("ALTER SYSTEM SET kne.autoconsolidate = on");
sql("ALTER SYSTEM SET kne.autoconsolidate_threshold = 1");
sql("ALTER SYSTEM SET kne.autoconsolidate_naptime = 0");
$node->reload;
$id = kne_edit($node, 'Spain', 'Bilbao');
ok(kne_wait_state($node, $id, 'applied'), 'two edits since the last consolidation');
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM kne.consolidation WHERE automatic AND state = 'applied'"),
	'and an automatic one');
is(sql("SELECT count(*) FROM kne.activation JOIN kne.solution USING (edit_id, generation) WHERE valid_to IS NULL AND consolidation_id IS NULL"),
	0, 'leaves none that was not solved with the others');
$id = kne_edit($node, 'Spain', 'Toledo');
ok(kne_wait_state($node, $id, 'applied'), 'one edit more');
sleep 1;
is(sql('SELECT count(*) FROM kne.consolidation WHERE automatic'), 1, 'is below the threshold');
sql("INSERT INTO kne.edit_event (edit_id, event, by) SELECT $id, 'disturbed', 'test' FROM generate_series(1, 5)");
$id = kne_edit($node, 'Spain', 'Bilbao');
ok(kne_wait_state($node, $id, 'applied'), 'facts are disturbed');
ok($node->poll_query_until('postgres', "SELECT count(*) = 2 FROM kne.consolidation WHERE automatic AND state = 'applied'"),
	'and that calls for one');
$node->stop;
done_testing();
