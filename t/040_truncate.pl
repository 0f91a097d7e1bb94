# A file of a model truncated while it is mapped costs an engine at most: no session, no server, no other model.
use strict;
use warnings;
use File::Copy;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('truncate', 'kne.idle_timeout' => '1min');
kne_prepare($node);

# a model folder of its own
my $from = $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'");
my $dir = PostgreSQL::Test::Utils::tempdir();
my $file = "$dir/model.safetensors";
sub put_back
{
	foreach my $name (qw(config.json tokenizer.json tokenizer_config.json model.safetensors))
	{
		copy("$from/$name", "$dir/$name") or die "cannot copy $name: $!";
	}
	return;
}
put_back();
chmod 0755, $dir;
$node->safe_psql('postgres', "SELECT kne_load_model('copy', '$dir', is_default => false)");

my $session = $node->background_psql('postgres', on_error_stop => 0);
my $backend = $session->query_safe('SELECT pg_backend_pid()');
my $postmaster = (split /\n/, slurp_file($node->data_dir . '/postmaster.pid'))[0];
my $ask = "SELECT kne_complete('The capital of France is', 4";
my $said = $session->query_safe("$ask, model => 'copy')");
isnt($said, '', 'a copy of the model is read');
my $engine = kne_pid($node, 'engine');

# in the midst of an edit that would go on for long
my $long = '{"step": "adam", "contrast": 0, "anchors": 0, "protect": 0, "reference": 1, "select": "all", "lr": 1e-9, "max_steps": 10000}';
my $id = $node->safe_psql('postgres', "SELECT kne_edit('France', 'capital', 'Lyon', model => 'copy', options => '$long')");
ok(kne_wait_state($node, $id, 'running'), 'an edit of it runs');
sleep 1;
truncate($file, 4096) or die "cannot truncate: $!";
ok(wait_gone($engine), 'truncated under its map, the file ends the engine');
ok(wait_for(sub { return slurp_file($node->logfile) =~ /kne engine \(process $engine\) died: exited with code 4/; }), 'the log says so');
like(slurp_file($node->logfile), qr/truncated/, 'and why');

is($session->query_safe("SELECT kne_knows('France', 'capital', 'Paris')"), 't', 'the next engine serves the other model');
is($session->query_safe('SELECT pg_backend_pid()'), $backend, 'to the same session');
my ($rc, $out, $err) = $node->psql('postgres', "$ask, model => 'copy')");
isnt($rc, 0, 'the truncated model is an error');
like($err, qr/ERROR:.*(model\.safetensors|changed)/s, 'which names what is wrong');
ok($node->poll_query_until('postgres', "SELECT state IN ('failed', 'pending') FROM kne.edit_request WHERE edit_id = $id"),
	'its edit runs no longer');
note($node->safe_psql('postgres', "SELECT concat_ws(' ', edit_id, state, attempts, deaths) FROM kne.edit_request"));
$node->psql('postgres', "SELECT kne_cancel($id)");
$engine = kne_pid($node, 'engine');
is($session->query_safe("SELECT kne_knows('Italy', 'capital', 'Rome')"), 't', 'reads of the other go on');
is(kne_pid($node, 'engine'), $engine, 'in an engine that stays');

# whole again
put_back();
ok(wait_for(sub { my ($r, $o) = $node->psql('postgres', "$ask, model => 'copy')"); return $r == 0 && $o eq $said; }),
	'put back, the model answers as before');

is((split /\n/, slurp_file($node->data_dir . '/postmaster.pid'))[0], $postmaster, 'the server is the same');
unlike(slurp_file($node->logfile), qr/terminating any other active server processes/, 'and never restarted its sessions');
$session->quit;
$node->stop;
done_testing();
