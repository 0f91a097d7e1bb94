# Without shared_preload_libraries, without process slots, without the engine's program; and a model that goes away.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use File::Copy qw(move);
use File::Path qw(rmtree);
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('settings', 'shared_preload_libraries' => '');
my ($rc, $out, $err);

# not preloaded
$node->safe_psql('postgres', 'CREATE EXTENSION kne');
like($node->safe_psql('postgres', 'SELECT state, note FROM kne_status()'), qr/not loaded\|.*shared_preload_libraries/,
	'kne_status says that kne is not preloaded');
($rc, $out, $err) = $node->psql('postgres', "SELECT kne_load_model('m', '/')");
like($err, qr/shared_preload_libraries = 'kne'/, 'and every call says how to');
is($node->safe_psql('postgres', 'SELECT count(*) FROM kne.stat_worker'), 0, 'no workers');
$node->safe_psql('postgres', 'DROP EXTENSION kne');
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'kne'");

# no slot for a worker: the launcher and logical replication take them
$node->append_conf('postgresql.conf', 'max_worker_processes = 2');
$node->restart;
kne_prepare($node);
my $id = kne_edit($node, 'France', 'Lyon');
ok($node->poll_query_until('postgres', "SELECT note LIKE '%max_worker_processes%' FROM kne_status() WHERE worker = 'launcher'"),
	'without a slot for a worker kne_status says so');
is(kne_state($node, $id), 'pending:0:0', 'and the edit waits');
$node->append_conf('postgresql.conf', 'max_worker_processes = 8');
$node->restart;
ok(kne_wait_state($node, $id, 'applied'), 'until there is one');

# two that load a model at once: one after the other, and the later one is the default
my @both = map { $node->background_psql('postgres') } 1, 2;
my $folder = $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'");
$both[0]->query_safe("BEGIN; SELECT kne_load_model('first', '$folder')");
$both[1]->query_until(qr/asked/, "\\echo asked\nSELECT kne_load_model('second', '$folder');\n");
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND relation = 'kne.model'::regclass"),
	'a second load waits for the first');
$both[0]->query_safe('COMMIT');
$both[1]->query_safe('SELECT 1');
is($node->safe_psql('postgres', 'SELECT name, is_default FROM kne.model ORDER BY name'), "first|f\nm|f\nsecond|t", 'both are there');
$_->quit for @both;
$node->safe_psql('postgres', "SELECT kne_drop_model('first'), kne_drop_model('second'); UPDATE kne.model SET is_default = true");

# what a database sets for people does not decide how the worker works
$node->safe_psql('postgres', 'CREATE ROLE weak');
$node->safe_psql('postgres', "SET ROLE NONE; ALTER DATABASE postgres SET $_")
  for ('role = weak', 'search_path = nowhere', "default_transaction_isolation = 'serializable'", 'exit_on_error = on',
	'session_replication_role = replica');
$node->restart; # so that no worker is there from before
my $free = "SET ROLE NONE; SET search_path = public; SET session_replication_role = origin;";
$id = $node->safe_psql('postgres', "$free SELECT kne_edit('Italy', 'capital', 'Lyon', options => '" . quick() . "')");
ok(wait_for(sub { $node->safe_psql('postgres', "$free SELECT state FROM kne.edit_request WHERE edit_id = $id") eq 'applied' }),
	'an edit is applied whatever ALTER DATABASE sets');
$node->safe_psql('postgres', 'SET ROLE NONE; ALTER DATABASE postgres RESET ALL');

# a model whose folder is gone: its edits wait and say why
my $dir = $node->basedir . '/model';
my $model = $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'");
system_or_bail('cp', '-r', $model, $dir);
$node->safe_psql('postgres', "SELECT kne_load_model('n', '$dir', false)");
move($dir, "$dir.away") or die $!;
$node->restart; # so that no engine has it open
$id = $node->safe_psql('postgres', "SELECT kne_edit('France', 'capital', 'Nice', 'n', '" . quick() . "')");
ok($node->poll_query_until('postgres', "SELECT error IS NOT NULL FROM kne.edit_request WHERE edit_id = $id"),
	'the edit of a model that is gone says so');
like(kne_state($node, $id), qr/^(pending|running):0:0$/, 'it waits, uncharged');
my $other = kne_edit($node, 'Spain', 'Seville');
ok(kne_wait_state($node, $other, 'applied'), 'other models go on');
move("$dir.away", $dir) or die $!;
ok(kne_wait_state($node, $id, 'applied'), 'it runs when the model is back');

$node->stop;
done_testing();
