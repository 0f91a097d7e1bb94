# The published files of CounterFact and zsRE, record by record: a request each, and the probes that the record has; and a few of them
# from the file to the figures.
use strict;
use warnings;
use Cwd qw(abs_path);
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $data = ($ENV{KNE_SHARED} // "$FindBin::RealBin/../../shared") . '/data';
plan skip_all => "no benchmarks in \"$data\"" unless -r "$data/counterfact/counterfact-edit.json" && -r "$data/zsre/zsre_mend_train-1k.json";

my $node = kne_cluster('suite', 'kne.enabled' => 'off');
kne_prepare($node);

# A copy that the server can read.
sub suite
{
	my ($file) = @_;
	my $path = $node->basedir . '/suite.json';

	append_to_file($path, '');
	system('cp', "$data/$file", $path) == 0 or die "cannot copy $file";
	chmod 0644, $path;
	return $path;
}

# Loaded, counted and rolled back: edits, relations, then probes by kind.
sub load
{
	my ($file, $records) = @_;
	my $path = suite($file);

	return $node->safe_psql('postgres', qq{
		SET client_min_messages = error;
		BEGIN;
		SELECT count(*), count(DISTINCT id) FROM kne_load_suite(pg_read_file('$path')::jsonb, records => $records) id;
		SELECT kind, count(*), count(DISTINCT edit_id), count(versus) FROM kne.probe GROUP BY kind ORDER BY kind;
		SELECT count(*) FROM kne.edit_request r JOIN kne.relation t USING (relation)
		JOIN kne.probe p ON p.edit_id = r.edit_id AND p.kind = 'edit' AND p.prompt = replace(t.prompt, '{}', r.subject) AND p.answer = r.object;
		ROLLBACK;});
}

is(load('counterfact/counterfact-edit.json', 10_000), join("\n", '10000|10000', 'edit|10000|10000|10000', 'locality|10000|10000|10000',
	'paraphrase|10000|10000|10000', '10000'), 'CounterFact, all of it');
is(load('zsre/zsre_mend_train-1k.json', 1000), join("\n", '998|998', 'edit|998|998|998', 'locality|998|998|0',
	'paraphrase|998|998|998', '998'), 'zsRE, all but two records without a new object');
is($node->safe_psql('postgres', 'SELECT count(*) FROM kne.edit_request'), 0, 'rolled back');

# From records of the published files to their figures, on a model that this project did not make.
my $model = abs_path("$data/../models/lre-llama-5m") // '';

SKIP:
{
	skip 'no lre-llama-5m', 2 unless -f "$model/config.json";
	$node->safe_psql('postgres', "SELECT kne_load_model('lre', '$model')");
	$node->safe_psql('postgres', 'ALTER SYSTEM SET kne.enabled = on');
	$node->reload;
	$node->poll_query_until('postgres', q{SELECT current_setting('kne.enabled') = 'on'}) or die;
	for my $file ('counterfact/counterfact-edit.json', 'zsre/zsre_mend_train-1k.json')
	{
		my $path = suite($file);

		is($node->safe_psql('postgres', qq{
			SELECT kne_load_suite(pg_read_file('$path')::jsonb, 'lre', records => 4) AS id INTO asked;
			SELECT count(*) FROM asked, kne_wait(id) AS state WHERE state NOT IN ('applied', 'failed');
			SELECT count(*), bool_and((value = 1) = (state = 'applied')), count(*) FILTER (WHERE state = 'applied') >= 3
				FROM asked JOIN kne.edit_request ON edit_id = id, kne_evaluate(id) WHERE metric = 'edit_success_exact';
			SELECT count(DISTINCT edit_id), count(*) FROM kne.evaluation JOIN asked ON edit_id = id WHERE metric IN ('generality', 'locality', 'fluency');
			DROP TABLE asked;}), join("\n", 0, '4|t|t', '4|12'), "four records of $file: edited with, and evaluated");
	}
}
$node->stop;
done_testing();
