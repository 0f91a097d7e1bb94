# Examples run as they are, on thousands of rows; a batch is cancelled as a whole; reverts of many are exact; trackers ask and take back;
# an edit of an earlier state is done again.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = kne_cluster('store');
my $home = "$FindBin::RealBin/..";
my ($out, $err);

sub q1 { return $node->safe_psql('postgres', shift); }

sub example
{
	my ($file, @vars) = @_;
	local $ENV{PGOPTIONS} = '-c client_min_messages=warning';

	IPC::Run::run(['psql', '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1', (map { ('-v', $_) } @vars), '-d', $node->connstr('postgres'),
		'-f', "$home/examples/$file"], '>', \$out, '2>', \$err);
	return is($err, '', "$file runs") ? $out : $out;
}

kne_prepare($node);
q1("CREATE ROLE bob; GRANT EXECUTE ON FUNCTION kne_edit TO bob");

# a table of thousands of rows that the model knows nothing of, and one that it knows
q1("CREATE TABLE country (name text, capital text);
    INSERT INTO country SELECT 'Land ' || i, 'Paris' FROM generate_series(1, 3000) i;
    INSERT INTO country VALUES ('France', 'Paris'), ('Nowhere', NULL)");
kne_enable($node, 0);
my $t0 = time;
my $asked = q1("INSERT INTO kne.edit_request (subject, relation, object)
    SELECT k.subject, k.relation, k.object FROM (SELECT array_agg(name) s, array_agg(capital) o FROM country WHERE capital <> '') c,
    kne_knows_all(c.s, '{capital}', c.o) k WHERE NOT k.knows; SELECT count(*) FROM kne.edit_request");
note sprintf('%d requests of 3001 rows in one statement: %.1f s', $asked, time - $t0);
cmp_ok($asked, '>', 1000, 'thousands of requests');
is(q1("SELECT count(*) FROM kne.edit_request WHERE subject = 'France'"), 0, 'none of what is known');
is(q1("SELECT count(DISTINCT detail ->> 'xid') FROM kne.edit_event WHERE event = 'requested'"), 1, 'of one transaction');
$t0 = time;
is(q1("SELECT count(*) FILTER (WHERE kne_cancel(edit_id)) FROM kne.edit_request WHERE state IN ('pending', 'running')"), $asked, 'cancelled as a whole');
note sprintf('cancelled in %.1f s', time - $t0);
is(q1('SELECT count(*) FROM kne_check_history()'), 0, 'the history is whole');
kne_enable($node, 1);

# the example, on a few rows
q1("DELETE FROM country; INSERT INTO country VALUES ('France', 'Paris'), ('Italy', 'Madrid'), ('Spain', 'Rome')");
like(example('sync_kb.sql'), qr/^applied\|2$/m, 'two edits applied');
is(q1("SELECT bool_and(kne_knows(name, 'capital', capital)) FROM country"), 't', 'the model answers what the table says');
my $tag = q1("SELECT kne_tag('v1')");
q1("UPDATE country SET capital = 'Rome' WHERE name = 'France'");
my $tracked = q1("SELECT max(edit_id) FROM kne.edit_request");
is(q1("SELECT kne_wait($tracked)"), 'applied', 'a change of the table is an edit');
my $id = q1("SET ROLE bob; SELECT kne_edit('Italy', 'capital', 'Paris', options => '" . quick() . "')");
q1("SELECT kne_wait($id)");

my $before = q1("SELECT kne_logprob('The capital of Italy is', 'Madrid', as_of => '$tag')");
like(example('questions.sql', 'day=now'), qr/bob/, 'with answers');
is(q1("BEGIN; SELECT kne_revert_all(array_agg(edit_id)) FROM kne_diff(kne_tag_time('v1')) WHERE change = 'added';
       SELECT kne_logprob('The capital of Italy is', 'Madrid'); ROLLBACK") =~ s/^\d+\n//r, $before, 'back to a tag, bit for bit');

# the short forms for psql
for my $call (':edits', ':work', ':health', ":ask 'The capital of France is');", ":next 'The capital of France is');", "\\set edit $id\n:history", "\\set edit $id\n:picture",
	':sizes', ':unknown')
{
	my $cmd = "\\i $home/examples/psqlrc\n\\cd " . $node->basedir . "\n$call\n";

	IPC::Run::run(['psql', '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres')], '<', \$cmd, '>', \$out, '2>', \$err);
	is($err, '', "$call runs");
	isnt($out, '', 'and says something') unless $call =~ /picture|unknown/;
}
like(slurp_file($node->basedir . '/edit.svg'), qr/<svg.*<\/svg>/s, 'a picture is written');

# redo of an edit that has others on top of it: in a transaction that is rolled back
is(q1("BEGIN; SELECT kne_revert_all(array_agg(edit_id)) FROM kne.edit_request WHERE edit_id >= $tracked AND state = 'applied';
       SELECT bool_and(same) FROM kne_redo($tracked); ROLLBACK") =~ s/^\d+\n//r, 't', 'done again, the same rows');

# a thousand reverts in one statement: rows of one edit stand for many
q1("INSERT INTO kne.edit_request (edit_id, model_id, subject, relation, object, state, requested_by, origin, origin_database)
      SELECT 100000 + i, model_id, 'Land ' || i, 'capital', 'Rome', 'applied', 'bob', origin, database FROM generate_series(1, 1000) i, kne.model, kne.instance;
    INSERT INTO kne.solution SELECT (x).* FROM (SELECT jsonb_populate_record(s, jsonb_build_object('edit_id', 100000 + i)) x
      FROM kne.solution s, generate_series(1, 1000) i WHERE s.edit_id = $tracked) y;
    INSERT INTO kne.weight_delta SELECT 100000 + i, generation, layer, neuron, matrix, delta FROM kne.weight_delta, generate_series(1, 1000) i WHERE edit_id = $tracked AND layer = 0;
    INSERT INTO kne.activation (model_id, edit_id, generation) SELECT model_id, 100000 + i, 0 FROM generate_series(1, 1000) i, kne.model;
    INSERT INTO kne.fact (model_id, subject, relation, object, edit_id) SELECT model_id, 'Land ' || i, 'capital', 'Rome', 100000 + i FROM generate_series(1, 1000) i, kne.model");
my $digests = 'SELECT string_agg(edit_id::text, \',\' ORDER BY edit_id) FROM kne.in_force(NULL, NULL) WHERE edit_id < 100000';
my $kept = q1($digests);
$t0 = time;
is(q1("SELECT kne_revert_all(array_agg(edit_id)) FROM kne.edit_request WHERE requested_by = 'bob' AND edit_id > 100000 AND state = 'applied'"), 1000, 'a thousand reverts');
note sprintf('1000 reverts in one statement: %.2f s', time - $t0);
is(q1($digests), $kept, 'the others stay');
is(q1('SELECT count(*) FROM kne.in_force(NULL, NULL) WHERE edit_id > 100000'), 0, 'and they are gone');
is(q1("SELECT count(DISTINCT valid_to) FROM kne.activation WHERE edit_id > 100000"), 1, 'at one instant');

$node->stop;
done_testing();
