# A rebase: the same answers before and after from a base that holds the edits; history stays, deltas and earlier states go; what cannot be is
# refused in words; a dump and the old folder bring the earlier state back.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('rebase');
my $dir = $node->basedir . '/out';

sub q1 { return $node->safe_psql('postgres', shift); }

sub fails { return kne_fails($node, @_); }

sub invariants
{
	command_like(['psql', '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1', '-v', 'digests=1', '-d', $node->connstr('postgres'),
		'-f', "$FindBin::RealBin/../test/invariants.sql"], qr/^\s*$/, 'the invariants hold');
	return is(q1('SELECT count(*) FROM kne_check_history()'), 0, 'and the history is whole');
}

mkdir $dir or die;
kne_prepare($node);
my @edits = map { my $id = kne_edit($node, @$_); is(q1("SELECT kne_wait($id)"), 'applied', "$_->[0] is $_->[1]"); $id }
	(['France', 'Rome'], ['France', 'Madrid'], ['Italy', 'Madrid'], ['Spain', 'Paris']);
q1("SELECT kne_revert($edits[3])");
my $tag = q1("SELECT kne_tag('before')");
my $told = q1("SELECT subject, object, edit_id FROM kne.fact WHERE valid_to IS NULL ORDER BY 1, 2");
my $answers = "SELECT string_agg(kne_complete(p), '|' ORDER BY p), array_agg(kne_logprob(p, o) ORDER BY p, o) FROM"
	. " unnest(ARRAY['The capital of France is', 'The capital of Italy is', 'The capital of Spain is']) p, unnest(ARRAY['Paris', 'Rome', 'Madrid']) o";
my $before = q1($answers);
my $history = 'SELECT edit_id, subject, relation, object, answer_before, probability_before, state, requested_by FROM kne.edit_history WHERE edit_id <= 4 ORDER BY 1';
my $history_before = q1($history);
my $events = "SELECT x FROM kne.edit_event x WHERE event <> 'rebased' AND edit_id <= 4 ORDER BY event_id";
my $events_before = q1($events);
my $ensemble = q1('SELECT count(*) FROM kne.ensemble');
my ($path, $fingerprint) = split /\|/, q1('SELECT path, fingerprint FROM kne.model');
command_ok(['pg_dump', '-h', $node->host, '-p', $node->port, '-f', "$dir/before.sql", 'postgres'], 'a dump, for the state before');

# refused
kne_enable($node, 0);
my $pending = kne_edit($node, 'Spain', 'Rome');
fails("SELECT kne_rebase('$dir/no')", qr/55006: .*while work is pending.*1 edits and 0 consolidations.*cancel/s, 'while an edit is pending');
q1("SELECT kne_cancel($pending)");
q1('SELECT kne_consolidate()');
fails("SELECT kne_rebase('$dir/no')", qr/55006: .*0 edits and 1 consolidations/s, 'or a consolidation');
q1('SELECT kne_cancel_consolidation(1)');
kne_enable($node, 1);
fails("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT kne_rebase('$dir/no')", qr/25000: /, 'with an old snapshot');
fails("SELECT kne_rebase(NULL)", qr/22004: /, 'without a path');
fails("SELECT kne_rebase('$dir/no', 'nobody')", qr/42704: /, 'of no model');
fails("SELECT kne_rebase('$path')", qr/42602: .*its own folder/s, 'into the base itself');
fails("CREATE ROLE plain; SET ROLE plain; SELECT kne_rebase('$dir/no')", qr/42501: /, 'by anybody');
fails("GRANT EXECUTE ON FUNCTION kne_rebase TO plain; SET ROLE plain; SELECT kne_rebase('$dir/no')", qr/42501: .*pg_read_server_files/s, 'without the files');
fails("GRANT pg_read_server_files TO plain; SET ROLE plain; SELECT kne_rebase('$dir/no')", qr/42501: .*write files/s, 'without writing them');
q1("DROP OWNED BY plain; DROP ROLE plain");
ok(!-e "$dir/no", 'and nothing is written');
q1("BEGIN; SELECT kne_rebase('$dir/rolled back'); ROLLBACK");
is(q1('SELECT count(*) FROM kne.rebase'), 0, 'rolled back, it was not');
is(q1($answers), $before, 'and answers are as they were');

# done
my $rows = q1('SELECT count(*) FROM kne.weight_delta');
cmp_ok(q1("SELECT kne_rebase('$dir/base') ->> 'edits'"), '==', 2, 'two edits are taken into the base');
kne_close(q1($answers), $before, 'the same answers');
is(q1($history), $history_before, 'the same history');
is(q1($events), $events_before, 'the same events');
is(q1("SELECT subject, object, edit_id FROM kne.fact WHERE valid_to IS NULL ORDER BY 1, 2"), $told, 'the same facts');
is(q1('SELECT count(*) FROM kne.ensemble'), $ensemble, 'the neurons are still told');
is(q1('SELECT count(*) FROM kne.weight_delta'), 0, 'no deltas');
is(q1("SELECT edits, delta_rows, path_before, fingerprint_before, path FROM kne.rebase"), "2|$rows|$path|$fingerprint|$dir/base", 'where the bases are');
is(q1("SELECT m.path = r.path AND m.fingerprint = r.fingerprint FROM kne.model m, kne.rebase r"), 't', 'and the model says so');
is(q1("SELECT bytes_in_force + bytes_kept FROM kne.stat_model"), 0, 'nothing is left to store');
fails("SELECT kne_complete('x', as_of => kne_tag_time('before'))", qr/22008: .*rebased after that.*kne.rebase/s, 'no state of before');
fails("SELECT kne_export('$dir/no', as_of => '$tag')", qr/22008: /, 'nor an export of one');
fails("SELECT kne_revert($edits[1])", qr/55000: .*part of its model's base/s, 'no revert');
fails("SELECT kne_redo($edits[1])", qr/55000: .*another model/s, 'nothing is done again');
fails("SELECT kne_rebase('$dir/no')", qr/55000: .*no edits/s, 'nothing to rebase');
invariants();

# life goes on: supersede, revert, consolidate, a tracked table, another rebase
my $next = kne_edit($node, 'France', 'Paris');
is(q1("SELECT kne_wait($next)"), 'applied', 'another object');
is(q1("SELECT kne_knows('France', 'capital', 'Paris')"), 't', 'which the model answers');
fails("SELECT kne_revert_all('{$edits[1],$next}')", qr/55000: .*part of its model's base/s, 'not back to before');
q1("SELECT kne_revert($next)");
kne_close(q1($answers), $before, 'back to the base, which has the edits');
is(q1("SELECT state FROM kne.edit_request WHERE edit_id = $edits[1]"), 'applied', 'and so the row says');
q1("CREATE TABLE country (name text, capital text); INSERT INTO country VALUES ('Italy', 'Madrid'); SELECT kne_track_table('country', 'name', 'capital', 'capital');
    DELETE FROM country");
is(q1("SELECT state FROM kne.edit_request WHERE edit_id = $edits[2]"), 'applied', 'a tracked row that goes leaves what is in the base');
my $more = kne_edit($node, 'Spain', 'Rome');
is(q1("SELECT kne_wait($more)"), 'applied', 'another fact');
invariants();
$node->restart;
is(q1("SELECT kne_knows('Spain', 'capital', 'Rome') AND kne_knows('France', 'capital', 'Madrid')"), 't', 'after a restart too');
PostgreSQL::Test::RecursiveCopy::copypath("$dir/base", "$dir/moved");
my ($rebase, $move) = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 2;
$rebase->query_safe('BEGIN');
cmp_ok($rebase->query_safe("SELECT kne_rebase('$dir/base2') ->> 'edits'"), '==', 1, 'and once more');
$move->query_until(qr/begun/, "\\echo begun\nSELECT kne_move_model('m', '$dir/moved');\n");
ok($node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query ~ '^SELECT kne_move_model' AND wait_event_type = 'Lock')"),
	'the base is moved while it is rebased');
$rebase->query_safe('COMMIT');
$_->quit for $move, $rebase;
is(q1('SELECT path FROM kne.model'), "$dir/base2", 'which is of a base that is no more');
is(q1("SELECT string_agg(edits::text, ' ' ORDER BY rebase_id) FROM kne.rebase"), '2 3', 'three are in it by now');
invariants();

# a dump of what is restored elsewhere; the dump of before, with the folder of before
command_ok(['pg_dump', '-h', $node->host, '-p', $node->port, '-f', "$dir/after.sql", 'postgres'], 'dumped');
for (['after', "kne_knows('Spain', 'capital', 'Rome')"], ['before', "kne_knows('Italy', 'capital', 'Madrid', as_of => kne_tag_time('before'))"])
{
	my ($db, $question) = @$_;

	q1("CREATE DATABASE $db");
	command_ok(['psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-h', $node->host, '-p', $node->port, '-f', "$dir/$db.sql", $db], "$db restored");
	is($node->safe_psql($db, "SELECT $question"), 't', "and $db answers");
}

# the model goes with all that
q1("SELECT kne_drop_model('m', force => true)");
is(q1('SELECT count(*) FROM kne.rebase'), 0, 'dropped');
$node->stop;
done_testing();
