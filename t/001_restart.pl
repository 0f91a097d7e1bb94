# Work that was pending or running when the server stopped, however it stopped, is done after it started again; and
# nothing of the engine stays behind.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = kne_cluster('restart');
kne_prepare($node);

# pending
kne_enable($node, 0);
my $id = kne_edit($node, 'France', 'Lyon');
sleep 1;
is(kne_state($node, $id), 'pending:0:0', 'an edit waits while kne.enabled is off');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'kne worker'"), 0, 'no worker then');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET kne.enabled');
$node->restart;
ok(kne_wait_state($node, $id, 'applied'), 'a pending edit runs after a restart, without a client');
is(kne_state($node, $id), 'applied:0:0', 'and is charged nothing');
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Lyon')"), 't', 'the model answers it');

# running, fast
my $engine;
($id, $engine) = kne_running($node, 'Italy', 'Milan');
$node->stop('fast');
ok(wait_gone($engine), 'a fast stop ends even an engine that does not listen');
ok(!-e kne_socket($node), 'and removes its socket');
$node->start;
ok(kne_wait_state($node, $id, 'applied'), 'a running edit is done after a fast stop and a start');
is(kne_state($node, $id), 'applied:0:1', 'uncharged');

# running, immediate
($id, $engine) = kne_running($node, 'Spain', 'Seville');
$node->stop('immediate');
ok(wait_gone($engine), 'an immediate stop leaves no engine');
ok(wait_for(sub { !-e kne_socket($node) }), 'and no socket');
kne_start($node);
ok(kne_wait_state($node, $id, 'applied'), 'a running edit is done after an immediate stop and a start');
is(kne_state($node, $id), 'applied:0:1', 'uncharged too');

# the postmaster killed
($id, $engine) = kne_running($node, 'France', 'Nice');
my $launcher = kne_pid($node, 'launcher');
$node->kill9;
ok(wait_gone($launcher) && wait_gone($engine), 'no engine outlives a killed postmaster');
kne_start($node);
ok(kne_wait_state($node, $id, 'applied'), 'and the edit is done after the next start');
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Nice')"), 't', 'the model answers it');

$node->stop;
done_testing();
