# Life on a rebased base: edits on top of it, consolidated, reverted, asked about at earlier times, exported and done again. What the base holds
# stays in it through all that.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('rebased', 'kne.autoconsolidate_threshold' => 1, 'kne.autoconsolidate_scale_factor' => 0,
	'kne.autoconsolidate_naptime' => 0);
my $dir = $node->basedir . '/out';
my $quick = quick();

sub q1 { return $node->safe_psql('postgres', shift); }

sub fails { return kne_fails($node, @_); }

sub edited
{
	my $id = kne_edit($node, @_);

	is(q1("SELECT kne_wait($id)"), 'applied', "$_[0] is $_[1]");
	return $id;
}

sub invariants
{
	return command_like(['psql', '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1', '-v', 'digests=1', '-d', $node->connstr('postgres'),
		'-f', "$FindBin::RealBin/../test/invariants.sql"], qr/^\s*$/, 'the invariants hold');
}

# of a model at a time, to the last bit
sub answers
{
	my ($model, $tag) = @_;
	my $of = join(', ', map { "'$_'" } $model // 'm') . ($tag ? ", as_of => kne_tag_time('$tag')" : '');

	return q1("SELECT p, kne_complete(p, 4, $of), string_agg(kne_logprob(p, o, $of)::text, ' ' ORDER BY o)"
		. " FROM unnest(ARRAY['The capital of France is', 'The capital of Italy is', 'The capital of Spain is', 'The capital of Egypt is']) p,"
		. " unnest(ARRAY[' Paris', ' Rome', ' Madrid']) o GROUP BY p ORDER BY p");
}

sub consolidate
{
	my ($edits, $name) = @_;
	my $id = q1("SELECT kne_consolidate(options => '$quick')");

	is(q1("SELECT kne_wait_consolidation($id)"), 'applied', $name);
	is(q1("SELECT edits FROM kne.consolidation WHERE consolidation_id = $id"), $edits, 'of each edit in force');
	is(q1("SELECT bool_and(kne_knows(subject, relation, object)) FROM kne.edit_request WHERE state = 'applied'"), 't', 'and they hold');
	return invariants();
}

mkdir $dir or die;
kne_prepare($node);
my $italy = edited('Italy', 'Madrid');
my $france = edited('France', 'Rome');
my $spain = edited('Spain', 'Paris');
consolidate(3, 'consolidated before');
q1("SELECT kne_tag('before')");
q1("SELECT kne_rebase('$dir/base'); SELECT kne_tag('base')");
my $base = answers();

# what the base holds is nothing to consolidate unasked
q1("ALTER SYSTEM SET kne.autoconsolidate = on; SELECT pg_reload_conf()");
my $egypt = edited('Egypt', 'Rome'); # a worker that looks
$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker')");
is(q1('SELECT count(*) FROM kne.consolidation WHERE automatic'), 0, 'three edits in the base and one on it are not two to consolidate');
q1("ALTER SYSTEM RESET kne.autoconsolidate; SELECT pg_reload_conf()");

my $lyon = edited('France', 'Paris');
q1("SELECT kne_tag('edited')");
my $edited = answers();
consolidate(4, 'consolidated on the base');
q1("SELECT kne_tag('consolidated')");
my $consolidated = answers();
is(q1("SELECT string_agg(generation::text, ' ' ORDER BY edit_id) FROM kne.activation WHERE valid_to IS NULL"), '3 3 1 1', 'a generation more for all');

# either side of either
is(answers('m', 'base'), $base, 'the base at its time');
is(answers('m', 'edited'), $edited, 'the edits before they were consolidated');
fails("SELECT kne_complete('x', as_of => kne_tag_time('before'))", qr/22008: /, 'nothing of before the rebase');

# reverts of what is in the base and of what is not
fails("SELECT kne_revert($italy)", qr/55000: .*part of its model's base/s, 'the base keeps its edits, consolidated or not');
fails("SELECT kne_revert_all('{$egypt,$italy}')", qr/55000: .*part of its model's base/s, 'also among others');
is(answers(), $consolidated, 'and nothing changed');
q1("BEGIN; SELECT kne_revert_all('{$egypt,$lyon}'); ROLLBACK");
is(answers(), $consolidated, 'nor rolled back');
q1("SELECT kne_revert($lyon)");
is(q1("SELECT state FROM kne.edit_request WHERE edit_id = $france"), 'applied', 'the edit in the base is back');
is(q1("SELECT kne_knows('France', 'capital', 'Rome') AND kne_knows('Egypt', 'capital', 'Rome') AND kne_knows('Italy', 'capital', 'Madrid')"), 't', 'and answered, beside the others');
q1("SELECT kne_revert($egypt)");
invariants();
consolidate(3, 'the base alone');
is(q1('SELECT sum(s.n_rows) FROM kne.activation a JOIN kne.solution s USING (edit_id, generation) WHERE a.valid_to IS NULL'), 0, 'needs no rows');
is(answers(), $base, 'and is the base, bit for bit');

# exports of each of these times, as models of their own
for (['base', $base], ['edited', $edited], ['consolidated', $consolidated])
{
	my ($tag, $answers) = @$_;

	q1("SELECT kne_export('$dir/of $tag', as_of => kne_tag_time('$tag')); SELECT kne_load_model('$tag', '$dir/of $tag', false)");
	kne_close(answers($tag), $answers, "the export of '$tag' answers as the model did then");
}
is(q1("SELECT count(DISTINCT fingerprint) FROM kne.model WHERE name IN ('m', 'base')"), 1, 'that of the base is the base');

# done again
is(q1("SELECT bool_and(same), count(*) FROM kne_redo($egypt, 0)"), 't|1', 'the same rows again');
is(q1("SELECT bool_and(same), count(*) FROM kne_redo($egypt, 1)"), 't|4', 'of a consolidation, whose edits are of other generations, too');
is(q1("SELECT count(*) FROM kne_check_history()"), 0, 'the history is whole');

# and once more
edited('Egypt', 'Paris');
q1("SELECT kne_rebase('$dir/base2')");
fails("SELECT kne_complete('x', as_of => kne_tag_time('consolidated'))", qr/22008: /, 'the first base is history');
consolidate(4, 'consolidated on the second');
fails("SELECT kne_revert_all(array_agg(edit_id)) FROM kne.edit_request WHERE state = 'applied'", qr/55000: .*part of its model's base/s, 'which keeps all four');
$node->stop;
done_testing();
