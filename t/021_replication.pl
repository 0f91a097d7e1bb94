# Logical replication of edits to a second server with the same folder: it answers as the first does, runs none of its work, keeps every
# column of its history, goes on with edits of its own, answers nothing from the base of before a rebase, and takes over what waits when
# told to.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $docs = slurp_file("$FindBin::RealBin/../docs/replication.md");
my ($out, $err);
my $one = kne_cluster('one', streaming => 1, wal_level => 'logical');
my $two = kne_cluster('two', streaming => 1, wal_level => 'logical');

sub block
{
	my ($name) = @_;
	my ($sql) = $docs =~ /<!-- $name -->\s*```sql\n(.*?)```/s;

	return $sql // die "no block $name";
}

sub same
{
	my ($sql, $name) = @_;

	return is($two->safe_psql('postgres', $sql), $one->safe_psql('postgres', $sql), $name);
}

kne_prepare($one);
my $first = kne_edit($one, 'France', 'Rome');
is($one->safe_psql('postgres', "SELECT kne_wait($first)"), 'applied', 'an edit before');

sub fails
{
	my ($node, $sql, $like, $name) = @_;

	$node->psql('postgres', "\\set VERBOSITY verbose\n$sql", stdout => \$out, stderr => \$err);
	return like($err, $like, $name);
}

# what the page says, word for word but for names
$two->safe_psql('postgres', "CREATE EXTENSION kne; SELECT kne_load_model('other name', '" . $one->safe_psql('postgres', 'SELECT path FROM kne.model') . "')");
my ($id, $fingerprint) = split /\|/, $one->safe_psql('postgres', 'SELECT model_id, fingerprint FROM kne.model');
# as if other models had been there before
$two->safe_psql('postgres', 'UPDATE kne.model SET model_id = 77');
$two->safe_psql('postgres', block('map') =~ s/:'fingerprint'/'$fingerprint'/r =~ s/:model_id/$id/r);
$two->safe_psql('postgres', block('ids'));
$one->safe_psql('postgres', block('publication'));
my $connection = $one->connstr . ' dbname=postgres';
$two->safe_psql('postgres', block('subscription') =~ s/'host=[^']*'/'$connection'/r);
$two->wait_for_subscription_sync($one, 'kne');

my $answers = "SELECT p, kne_complete(p), kne_logprob(p, 'Rome') FROM unnest(ARRAY['The capital of France is', 'The capital of Italy is']) p ORDER BY p";
same($answers, 'the same answers');
my $second = kne_edit($one, 'Italy', 'Madrid');
$one->safe_psql('postgres', "SELECT kne_wait($second)");
$one->wait_for_catchup('kne');
same($answers, 'also after another edit');
$one->safe_psql('postgres', "SELECT kne_revert($first); SELECT kne_tag('v1')");
$one->wait_for_catchup('kne');
same($answers, 'and after a revert');
my $then = $one->safe_psql('postgres', 'SELECT max(valid_from) FROM kne.activation');
same("SELECT kne_complete('The capital of France is', as_of => '$then')", 'and at an earlier time');
sub all_rows
{
	same("SELECT x FROM kne.$_ x ORDER BY x::text", "every column of kne.$_")
	  for qw(relation fact edit_request solution ensemble weight_delta activation edit_event tag rebase);
	return is($two->safe_psql('postgres', 'SELECT count(*) FROM kne_check_history()'), '0', 'the history is whole');
}
all_rows();

# what the second has made by itself is its own, also when the first is rebased
my $early = kne_edit($two, 'Spain', 'Rome');
is($two->safe_psql('postgres', "SELECT kne_wait($early)"), 'applied', 'an edit of its own before');
$two->safe_psql('postgres', "SELECT kne_revert($early)");

# the first is rebased: the second answers nothing until it has the new base
my $old = $one->safe_psql('postgres', 'SELECT path FROM kne.model');
my $folder = $one->basedir . '/rebased';
$one->safe_psql('postgres', 'ALTER PUBLICATION kne DROP TABLE kne.rebase');
fails($one, "SELECT kne_rebase('$folder')", qr/55000: .*publication "kne" has edits without kne.rebase/s, 'no rebase that subscribers would not see');
$one->safe_psql('postgres', 'ALTER PUBLICATION kne ADD TABLE kne.rebase');
$two->safe_psql('postgres', 'ALTER SUBSCRIPTION kne REFRESH PUBLICATION');
$two->wait_for_subscription_sync($one, 'kne');
fails($two, "SELECT kne_rebase('$folder')", qr/55000: .*subscription "kne" brings edits/s, 'nor one of what comes from elsewhere');
my $before = $one->safe_psql('postgres', $answers);
$one->safe_psql('postgres', "SELECT kne_rebase('$folder')");
$one->wait_for_catchup('kne');
my $not_here = qr/55000: .*model "other name" was rebased on another server, and has its earlier base here.*fingerprint.*kne_move_model/s;
fails($two, $answers, $not_here, 'not from the old base');
fails($two, "SELECT kne_complete('x', as_of => '$then')", $not_here, 'at no time');
my $waits = kne_edit($two, 'Spain', 'Lisbon');
ok($two->poll_query_until('postgres', "SELECT error ~ 'rebased on another server' FROM kne.edit_request WHERE edit_id = $waits"), 'an edit waits, and says for what');
fails($two, "SELECT kne_move_model('other name', '$old')", qr/55000: .*is not that of model/s, 'the old folder is not taken');
my $copy = $two->basedir . '/copied';
PostgreSQL::Test::RecursiveCopy::copypath($folder, $copy);
$two->safe_psql('postgres', "SELECT kne_move_model('other name', '$copy')");
is($two->safe_psql('postgres', "SELECT kne_wait($waits)"), 'applied', 'with the new one it is applied');
$two->safe_psql('postgres', "SELECT kne_revert($waits)");
same($answers, 'the same answers');
fails($two, "SELECT kne_complete('x', as_of => '$then')", qr/22008: .*rebased after that/s, 'and no state of before');
is($two->safe_psql('postgres', "SELECT bool_or(delta_bytes > 0) FILTER (WHERE edit_id <= $second), bool_and(delta_bytes > 0) FILTER (WHERE edit_id = $early) FROM kne.stat_size WHERE delta_rows > 0"),
	'f|t', 'the deltas of the first are gone, its own are not');
my $third = kne_edit($one, 'France', 'Madrid');
is($one->safe_psql('postgres', "SELECT kne_wait($third)"), 'applied', 'an edit after');
$one->wait_for_catchup('kne');
same($answers, 'the same answers');
$one->safe_psql('postgres', "SELECT kne_revert($third)");
$one->wait_for_catchup('kne');

# work that waits is the first's
kne_enable($one, 0);
my $pending = kne_edit($one, 'Spain', 'Paris');
$one->wait_for_catchup('kne');
$two->psql('postgres', "SELECT kne_wait($pending)", stdout => \$out, stderr => \$err);
like($err, qr/requested in another database/, 'the second does not run it');

# edits of its own do not meet the first's
my $own = kne_edit($two, 'Spain', 'Rome');
cmp_ok($own, '>', 1 << 40, 'ids far away');
is($two->safe_psql('postgres', "SELECT kne_wait($own)"), 'applied', 'an edit of its own');
is($two->safe_psql('postgres', "SELECT state FROM kne.edit_request WHERE edit_id = $pending"), 'pending', 'the other still waits');

fails($two, 'SELECT kne_consolidate()', qr/55000: .*cannot consolidate while subscription "kne" brings edits/s, 'no consolidation of what comes from elsewhere');
$two->safe_psql('postgres', "ALTER SYSTEM SET $_") for 'kne.autoconsolidate = on', 'kne.autoconsolidate_threshold = 0', 'kne.autoconsolidate_scale_factor = 0', 'kne.autoconsolidate_naptime = 0';
$two->reload;
$own = kne_edit($two, 'Spain', 'Lisbon');
is($two->safe_psql('postgres', "SELECT kne_wait($own)"), 'applied', 'another');
$two->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker')");
is($two->safe_psql('postgres', 'SELECT count(*) FROM kne.consolidation WHERE automatic'), '0', 'none by itself either');

# the first is gone: what waits is taken over
$one->stop('immediate');
$two->safe_psql('postgres', 'ALTER SUBSCRIPTION kne DISABLE');
is($two->safe_psql('postgres', 'SELECT kne_adopt()'), '1', 'adopted');
is($two->safe_psql('postgres', "SELECT kne_wait($pending) IN ('applied', 'failed')"), 't', 'and run');

$two->stop;
done_testing();
