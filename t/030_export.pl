# An exported folder is the model that the server answers with: loaded again, or put together from base and adapter, and at an earlier time.
# Nothing is overwritten, nothing half-written, and not everybody may.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('export');
my $dir = $node->basedir . '/out';
my ($out, $err);

sub fails
{
	my ($sql, $like, $name) = @_;

	$node->psql('postgres', "\\set VERBOSITY verbose\n$sql", stdout => \$out, stderr => \$err);
	return like($err, $like, $name);
}

mkdir $dir or die;
kne_prepare($node);
my $probe = "unnest(ARRAY['The capital of France is', 'The capital of Italy is', 'The capital of Spain is']) p, unnest(ARRAY['Paris', 'Rome', 'Madrid']) o";

# what two models answer: the same but for the order in which sums are rounded
sub differ
{
	my ($a, $b) = @_;

	return $node->safe_psql('postgres', "SELECT max(abs(kne_logprob(p, o, $a) - kne_logprob(p, o, $b))) < 1e-4 FROM $probe");
}

for my $edit (['France', 'Rome'], ['Italy', 'Madrid'])
{
	my $id = kne_edit($node, @$edit);
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', "$edit->[0] is edited");
}
my $first = $node->safe_psql('postgres', "SELECT valid_from FROM kne.activation ORDER BY edit_id LIMIT 1");

my $hf = $node->safe_psql('postgres', "SELECT kne_export('$dir/now')");
like($hf, qr/"edits": 2.*"name": "model.safetensors"/, 'exported');
is($node->safe_psql('postgres', "SELECT kne_load_model('now', '$dir/now', false) > 0"), 't', 'loaded again');
is($node->safe_psql('postgres', "SELECT fingerprint FROM kne.model WHERE name = 'now'"),
	$node->safe_psql('postgres', "SELECT '$hf'::jsonb->>'fingerprint'"), 'it is what the answer says');
is(differ("model => 'm'", "model => 'now'"), 't', 'and answers as the edited model does');
is($node->safe_psql('postgres', "SELECT kne_knows('Italy', 'capital', 'Madrid', 'now')"), 't', 'the edits are in it');
like(slurp_file("$dir/now/README.md"), qr/^\| 1 \| France \| capital \| Rome \| .*\n\| 2 \| Italy \| capital \| Madrid \|/m, 'the card lists them');
is((stat "$dir/now/model.safetensors")[2] & 07777, 0644, 'readable for all');
is((stat "$dir/now")[2] & 07777, 0755, 'and so is the folder');

$node->safe_psql('postgres', "SELECT kne_export('$dir/then', as_of => '$first'); SELECT kne_load_model('then', '$dir/then', false)");
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Rome', 'then'), kne_knows('Italy', 'capital', 'Madrid', 'then')"), 't|f',
	'an earlier state has the first edit only');
is(differ("as_of => '$first'", "model => 'then'"), 't', 'as as_of has');

like($node->safe_psql('postgres', "SELECT kne_export('$dir/lora', format => 'peft')"), qr/adapter_model\.safetensors/, 'an adapter');
like(slurp_file("$dir/lora/adapter_config.json"), qr/rank_pattern/, 'has its configuration');

# an uncommitted revert is the exporter's own
$node->safe_psql('postgres', "BEGIN; SELECT kne_revert(2); SELECT kne_export('$dir/mine'); ROLLBACK; SELECT kne_load_model('mine', '$dir/mine', false)");
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Rome', 'mine'), kne_knows('Italy', 'capital', 'Madrid', 'mine')"), 't|f',
	'the transaction\'s own state is exported');

# refusals
fails("SELECT kne_export('$dir/now')", qr/58P02: .*exists already.*not empty/s, 'a folder that holds something');
fails("SELECT kne_export('$dir/now/config.json')", qr/58P02: .*not a folder/s, 'a file');
fails("SELECT kne_export('out')", qr/42602: .*absolute path/s, 'a relative path');
fails("SELECT kne_export('/')", qr/42602/, 'the root');
fails("SELECT kne_export('$dir/..')", qr/58P02|42602/, 'a folder above');
fails("SELECT kne_export('$dir/none/x')", qr/58P01: .*must exist/s, 'no parent');
fails("SELECT kne_export('" . $node->data_dir . "/base/x')", qr/42602: .*data directory/s, 'the data directory');
symlink $node->data_dir, "$dir/link" or die;
fails("SELECT kne_export('$dir/link/x')", qr/42602: .*data directory/s, 'nor by a link');
symlink '/etc/passwd', "$dir/target" or die;
fails("SELECT kne_export('$dir/target')", qr/58P02/, 'a link in the place');
fails("SELECT kne_export('$dir/x', format => 'gguf')", qr/22023: .*not a format.*huggingface/s, 'another format');
fails("SELECT kne_export(NULL)", qr/22004/, 'no path');
fails("SELECT kne_export('$dir/x', 'nobody')", qr/42704/, 'no such model');
fails("SELECT kne_export('$dir/x', format => 'peft', as_of => '2000-01-01')", qr/22023: .*without edits/s, 'an adapter of nothing');
fails("CREATE ROLE plain; GRANT EXECUTE ON FUNCTION kne_export TO plain; SET ROLE plain; SELECT kne_export('$dir/x')", qr/42501: .*pg_write_server_files/s, 'a plain role');
is($node->safe_psql('postgres', "GRANT pg_write_server_files TO plain; SET ROLE plain; SELECT kne_export('$dir/x')->>'edits'"), '2', 'a member of pg_write_server_files');
opendir(my $h, $dir) or die;
is_deeply([sort grep { !/^\.\.?$/ } readdir $h], [qw(link lora mine now target then x)], 'nothing else was left there');

# a folder exported is exported again
$node->safe_psql('postgres', "SELECT kne_export('$dir/again', 'now')");
system_or_bail('diff', '-r', '-x', 'README.md', '-x', 'SHA256SUMS', '-x', 'README-base.md', "$dir/now", "$dir/again");

$node->stop;
done_testing();
