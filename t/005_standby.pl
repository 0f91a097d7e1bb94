# A hot standby reads with an engine of its own and writes nothing; promoted, it goes on with the work.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = kne_cluster('primary', streaming => 1, max_connections => 20);
kne_prepare($primary);
my $first = kne_edit($primary, 'France', 'Lyon');
ok(kne_wait_state($primary, $first, 'applied'), 'an edit on the primary');

$primary->backup('copy');
my $socket = substr(kne_socket($primary), length($primary->data_dir));
ok(!-e $primary->backup_dir . "/copy$socket", 'a base backup holds no socket');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'copy', has_streaming => 1);
$standby->start;
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));

# every question has the primary's answer
for my $question ("kne_complete('The capital of France is')", "kne_logprob('The capital of France is', 'Lyon')",
	"kne_complete('The capital of France is', as_of => (SELECT min(valid_from) - interval '1 microsecond' FROM kne.activation))",
	"array_agg(t) FROM kne_next_tokens('The capital of France is') t", "kne_knows_all('{France,Italy}', '{capital}', '{Lyon}')",
	"array_agg(l) FROM kne_locate('Italy', 'capital', 'Milan') l", "kne_detokenize(kne_tokenize('The capital'))", "array_agg(d) FROM kne_diff('-infinity') d",
	"count(*) FROM kne_check_history()", "same FROM kne_redo($first)", "array_agg(e) FROM kne_evaluate($first) e WHERE metric <> 'fluency'",
	'array_agg(h) FROM kne.edit_history h', 'array_agg(s) FROM kne.stat_size s', "length(kne_ensemble_svg($first))")
{
	is($standby->safe_psql('postgres', "SELECT $question"), $primary->safe_psql('postgres', "SELECT $question"), $question =~ s/\(.*//r);
}

isnt(kne_pid($standby, 'engine'), kne_pid($primary, 'engine'), 'the standby has an engine of its own');
is($standby->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Lyon')"), 't', 'which answers with the edit');

# work goes on on the primary, and the standby sees it when it is replayed
my $second = kne_edit($primary, 'Italy', 'Milan');
ok(kne_wait_state($primary, $second, 'applied'), 'another edit on the primary');
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));
is($standby->safe_psql('postgres', "SELECT kne_knows('Italy', 'capital', 'Milan')"), 't', 'the standby answers with it');
$primary->safe_psql('postgres', "SELECT kne_revert($second)");
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));
is($standby->safe_psql('postgres', "SELECT kne_knows('Italy', 'capital', 'Milan')"), 'f', 'and without it when it is reverted');

# nothing runs on the standby
my ($id, $engine) = kne_running($primary, 'Spain', 'Seville');
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));
sleep 2;
is($standby->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'kne worker'"), 0,
	'no worker on the standby');
is(kne_state($standby, $id), 'running:0:0', 'it sees the request run');
my ($rc, $out, $err) = $standby->psql('postgres', "SELECT kne_edit('Spain', 'capital', 'Malaga')");
like($err, qr/read-only transaction/, 'and takes none');

# the primary dies; the standby takes over what was running
$primary->stop('immediate');
ok(wait_gone($engine), 'the engine of the primary goes with it');
$standby->promote;
ok(kne_wait_state($standby, $id, 'applied'), 'after its promotion the standby does the edit that was running');
is(kne_state($standby, $id), 'applied:0:1', 'uncharged');
$id = kne_edit($standby, 'Italy', 'Turin');
ok(kne_wait_state($standby, $id, 'applied'), 'and new ones');

$standby->stop;
done_testing();
