# What runs out, and what is taken away: connections, disk, memory, room in a path, a model's files, the order of the clock. Edits wait
# or fail with the reason; nothing that was committed is lost, and what can go on goes on.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use File::Copy qw(copy move);
use KneTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

sub violations
{
	my ($node) = @_;

	return qx(psql -X -q -At -v digests=1 -d "@{[$node->connstr('postgres')]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1);
}

# ---- all connections taken; the path of the data directory longer than a socket's may be ----

my $node = kne_cluster('a_name_as_long_as_' . ('x' x 100), max_connections => 8, 'kne.idle_timeout' => '1min', superuser_reserved_connections => 0,
	autovacuum => 'off');
my ($out, $err, $id, $engine);
kne_prepare($node);
cmp_ok(length($node->data_dir), '>', 108, 'a data directory with a path of ' . length($node->data_dir) . ' bytes has an engine');
is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Paris')"), 't', 'and its socket is found');
my @sessions = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 8;
$_->query_safe('SET client_min_messages = error') for @sessions;
isnt($node->psql('postgres', 'SELECT 1', stdout => \$out, stderr => \$err), 0, 'no connection is left');
$id = $sessions[0]->query_safe("SELECT kne_edit('France', 'capital', 'Lyon', options => '" . quick() . "')");
is($sessions[0]->query_safe("SELECT kne_wait($id)"), 'applied', 'an edit is done when no connection is left');
is($sessions[$_]->query_safe("SELECT kne_knows('France', 'capital', 'Lyon')"), 't', "session $_ reads") for 1 .. 7;
$_->quit for @sessions;

# ---- the clock ----

# as if the last change had been made by a clock that was an hour ahead
$node->safe_psql('postgres', "UPDATE kne.activation SET valid_from = valid_from + interval '1 hour'");
$id = kne_edit($node, 'Italy', 'Milan');
is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', 'an edit after the clock was set back');
is($node->safe_psql('postgres', "SELECT valid_from > (SELECT valid_from FROM kne.activation ORDER BY activation_id LIMIT 1)"
		. " FROM kne.activation WHERE edit_id = $id"), 't', 'is later than what was before it all the same');
is($node->safe_psql('postgres', "SELECT kne_knows('Italy', 'capital', 'Milan')"), 't', 'and seen by a snapshot, which has no clock');
$node->safe_psql('postgres', "SELECT kne_revert($id)");
is($node->safe_psql('postgres', "SELECT valid_from < valid_to FROM kne.activation WHERE edit_id = $id"), 't', 'its end is later again');
is(violations($node), '', 'the rows hold');

# ---- the model's files are replaced while they are mapped ----

my $from = $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'");
my $dir = $node->basedir . '/model';
system_or_bail('cp', '-r', $from, $dir);
system_or_bail('chmod', '-R', 'u+rwX', $dir);
$node->safe_psql('postgres', "SELECT kne_load_model('n', '$dir', false)");
my $said = $node->safe_psql('postgres', "SELECT kne_logprob('The capital of France is', 'Paris', 'n')");
$engine = kne_pid($node, 'engine');
{
	my $data = slurp_file("$dir/model.safetensors");
	substr($data, length($data) - 4000, 2) = "\x01\x40";
	append_to_file("$dir/other", $data);
	rename("$dir/model.safetensors", "$dir/kept") or die $!;
	rename("$dir/other", "$dir/model.safetensors") or die $!;
}
ok(wait_for(sub { $node->psql('postgres', "SELECT kne_logprob('The capital of France is', 'Paris', 'n')", stderr => \$err) != 0; }),
	'replaced under its map, a model is refused');
like($err, qr/changed|fingerprint/, 'with the reason');
rename("$dir/kept", "$dir/model.safetensors") or die $!;
ok(wait_for(sub { $node->psql('postgres', "SELECT kne_logprob('The capital of France is', 'Paris', 'n')", stdout => \$out) == 0; }), 'put back, it is served');
is($out, $said, 'as before');
is(kne_pid($node, 'engine'), $engine, 'by the same engine');

# ---- memory ----

SKIP:
{
	skip 'no prlimit', 5 if system("prlimit --version >/dev/null 2>&1") != 0;
	my $backend = $node->background_psql('postgres', on_error_stop => 0);
	$backend->query_safe('SET client_min_messages = error');
	my $pid = $backend->query_safe('SELECT pg_backend_pid()');
	my ($size) = slurp_file("/proc/$engine/status") =~ /^VmSize:\s+(\d+) kB/m;

	# four megabytes more than it has now; an edit of everything in one batch wants more
	system_or_bail('prlimit', "--pid=$engine", '--as=' . ($size + 4096) * 1024 . ':unlimited');
	$node->safe_psql('postgres', q{INSERT INTO kne.edit_request (subject, relation, object, options) SELECT 'Land ' || i, 'capital', 'Lyon',
		'{"select": "all", "matrices": "all", "max_steps": 3, "reference": 512, "anchors": 64}' FROM generate_series(1, 32) i});
	ok($node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM kne.edit_request WHERE subject ~ '^Land' AND error IS NOT NULL)"),
		'an engine without memory says so');
	note($node->safe_psql('postgres', "SELECT DISTINCT error FROM kne.edit_request WHERE subject ~ '^Land' AND error IS NOT NULL LIMIT 3"));
	is($backend->query_safe('SELECT pg_backend_pid()'), $pid, 'no session is touched');
	$node->safe_psql('postgres', "SELECT kne_cancel(edit_id) FROM kne.edit_request WHERE state IN ('pending', 'running')");
	my $now = kne_pid($node, 'engine');
	system_or_bail('prlimit', "--pid=$now", '--as=unlimited:unlimited') if $now == $engine;
	ok(wait_for(sub { ($backend->query("SELECT kne_knows('France', 'capital', 'Lyon')") // '') eq 't'; }), 'and reads go on');
	$id = kne_edit($node, 'Spain', 'Seville');
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', 'edits too');
	unlike(slurp_file($node->logfile), qr/terminating any other active server processes/, 'the server has not restarted');
	$backend->quit;
}
is(violations($node), '', 'the rows hold');
$node->stop;

# ---- a disk so slow that no commit ends: a commit waits for a standby as it does for its disk ----

$node = kne_cluster('slow', 'kne.idle_timeout' => '1min', streaming => 1);
kne_prepare($node);
{
	local $ENV{PGOPTIONS} = '-c synchronous_commit=local'; # the worker waits, these sessions do not
	my $slow = sub {
		$node->safe_psql('postgres', $_[0] ? "ALTER SYSTEM SET synchronous_standby_names = 'nobody'" : 'ALTER SYSTEM RESET synchronous_standby_names');
		$node->reload;
	};
	my $stuck = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker' AND wait_event = 'SyncRep')";

	kne_pid($node, 'engine');
	$slow->(1);
	$id = kne_edit($node, 'France', 'Lyon');
	ok($node->poll_query_until('postgres', $stuck), 'the worker waits for its commit');
	is($node->safe_psql('postgres', "SELECT kne_knows('France', 'capital', 'Paris') FROM generate_series(1, 3)"), "t\nt\nt", 'reads go on');
	is(kne_state($node, $id), 'pending:0:0', 'of what has not committed nothing is seen');
	$slow->(0);
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', 'when commits end, so does the edit');
	$slow->(1);
	$id = kne_edit($node, 'Italy', 'Milan');
	$node->poll_query_until('postgres', $stuck) or die;
	$node->stop('fast');
	$node->start;
	$slow->(0);
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', 'a server that is stopped meanwhile stops, and ends the edit later');
	is(violations($node), '', 'the rows hold');
}
$node->stop;

# ---- disk ----

SKIP:
{
	my $disk = $ENV{KNE_SMALL_DISK} // '';

	skip 'no disk that can be filled (the tests run without the right to mount one)', 16 unless -d $disk;

	# a table's disk is full: the solution cannot be written, the request waits
	$node = kne_cluster('disk', initdb => ['--wal-segsize=1'], 'kne.idle_timeout' => '1min', 'log_line_prefix' => '%m [%p] <%e> ', 'min_wal_size' => '2MB', 'max_wal_size' => '32MB');
	kne_prepare($node);
	mkdir "$disk/space" or die $!;
	$node->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$disk/space'");
	$node->safe_psql('postgres', 'ALTER TABLE kne.weight_delta SET TABLESPACE small');
	my $fill = sub { system("dd if=/dev/zero of='$disk/fill' bs=64k 2>/dev/null"); };
	$fill->();
	$id = kne_edit($node, 'France', 'Lyon');
	ok($node->poll_query_until('postgres', "SELECT state = 'pending' AND error ~ 'could not be recorded' FROM kne.edit_request WHERE edit_id = $id"),
		'without room for its rows an edit waits, and says why');
	like($node->safe_psql('postgres', "SELECT error FROM kne.edit_request WHERE edit_id = $id"), qr/No space left|could not extend/, 'by the system\'s word');
	is(kne_state($node, $id), 'pending:0:0', 'uncharged');
	is(violations($node), '', 'no part of it is there');
	unlink "$disk/fill";
	is($node->safe_psql('postgres', "SELECT kne_wait($id)"), 'applied', 'with room again, it is applied');
	$node->safe_psql('postgres', 'ALTER TABLE kne.weight_delta SET TABLESPACE pg_default; DROP TABLESPACE small');

	# an export's disk is full: no part of it stays
	my $weights = -s $node->safe_psql('postgres', "SELECT path FROM kne.model WHERE name = 'm'") . '/model.safetensors';
	$fill->();
	truncate("$disk/fill", (-s "$disk/fill") - $weights / 2) or die $!;
	isnt($node->psql('postgres', "SELECT kne_export('$disk/out')", stderr => \$err), 0, 'without room for a model it is not exported');
	like($err, qr/ERROR: .*No space left/, 'the disk is said to be full');
	is(join(' ', grep { !m{/(fill|space)$} } glob("$disk/* $disk/.[!.]*")), '', 'nothing is left of it');
	unlink "$disk/fill";
	like($node->safe_psql('postgres', "SELECT kne_export('$disk/out') ->> 'files'"), qr/model\.safetensors/, 'with room again, it is');
	system_or_bail('rm', '-rf', "$disk/out");

	# the disk of the WAL is full: the server stops, and loses nothing
	$node->stop;
	move($node->data_dir . '/pg_wal', "$disk/pg_wal") or system_or_bail('mv', $node->data_dir . '/pg_wal', "$disk/pg_wal");
	symlink("$disk/pg_wal", $node->data_dir . '/pg_wal') or die $!;
	$node->start;
	my @ids = map { kne_edit($node, $_, 'Lyon') } qw(Italy Spain Germany);
	$fill->();
	my @asked;
	for my $i (1 .. 400)
	{
		my $rc = $node->psql('postgres', "SELECT kne_edit('Land $i', 'capital', 'Lyon', options => '" . quick() . "')", stdout => \$out, stderr => \$err);
		last if $rc != 0;
		push @asked, $out;
	}
	note(scalar(@asked) . ' requests until the WAL had no room');
	ok(wait_for(sub { slurp_file($node->logfile) =~ /<53100> PANIC/; }), 'without room for its WAL the server stops');
	unlink "$disk/fill";
	kne_start($node);
	is($node->safe_psql('postgres', 'SELECT count(*) FROM kne.edit_request WHERE edit_id = ANY (\'{' . join(',', @ids, @asked) . '}\')'), @ids + @asked,
		'with room again, every committed request is there');
	$node->safe_psql('postgres', "SELECT kne_cancel(edit_id) FROM kne.edit_request WHERE subject ~ '^Land' AND state IN ('pending', 'running')");
	is($node->safe_psql('postgres', "SELECT kne_wait($_)"), 'applied', "edit $_ is done") for @ids;
	is(violations($node), '', 'the rows hold');
	unlike(slurp_file($node->logfile), qr/<XX/, 'no internal error');
	$node->stop;
	system_or_bail('rm', '-rf', "$disk/pg_wal", "$disk/space");
}
done_testing();
