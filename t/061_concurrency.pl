# Editors, superseders, reverters, cancellers, retriers and readers at once, by pgbench; the rows hold all along (test/invariants.sql),
# a REPEATABLE READ transaction sees one model, nobody deadlocks, and everything comes to an end.
#
# KNE_CONCURRENCY_SECONDS: how long (20).
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use POSIX qw(WNOHANG);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $seconds = $ENV{KNE_CONCURRENCY_SECONDS} // 20;
my $node = kne_cluster('concurrency', 'kne.batch_size' => 4, 'log_statement' => 'none', 'log_line_prefix' => '%m [%p] <%e> ');
my $dir = PostgreSQL::Test::Utils::tempdir();
my $options = '{"contrast": 0, "anchors": 0, "protect": 32, "select": "attribution", "lr": 0.04, "max_neurons": 60, "max_steps": 60}';

plan skip_all => 'no pgbench' if system('pgbench --version >/dev/null 2>&1') != 0;
kne_prepare($node);
$node->safe_psql('postgres', "INSERT INTO kne.alias VALUES ('France', 'Gaul'), ('Spain', 'Hispania')"); # an edit of one belongs with one of the other
# One of many: somebody else may have been there first, which is an error of the one and of nobody else.
$node->safe_psql('postgres', q{
	CREATE FUNCTION one_of(list text[]) RETURNS text LANGUAGE sql AS 'SELECT list[1 + floor(random() * cardinality(list))::int]';
	CREATE FUNCTION subject() RETURNS text LANGUAGE sql AS $$ SELECT one_of('{France,Italy,Spain,Germany,Japan,Egypt,Canada,Russia}') $$;
	CREATE FUNCTION object() RETURNS text LANGUAGE sql AS $$ SELECT one_of('{Paris,Rome,Madrid,Berlin,Tokyo,Cairo,Ottawa,Moscow}') $$;
	CREATE FUNCTION try(call text, states text[]) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		id bigint;
	BEGIN
		SELECT edit_id INTO id FROM kne.edit_request WHERE state = ANY (states) ORDER BY random() LIMIT 1;
		IF id IS NOT NULL THEN
			EXECUTE format('SELECT %s(%s)', call, id);
		END IF;
		RETURN 'done';
	EXCEPTION WHEN object_not_in_prerequisite_state THEN
		RETURN 'too late';
	END $$;
	-- an error where two answers differ
	CREATE FUNCTION same(a double precision, b double precision) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		IF a IS DISTINCT FROM b THEN
			RAISE 'a snapshot saw two models: % and %', a, b;
		END IF;
	END $$;
});
my %script = (
	'edit@3'   => "SELECT kne_edit(subject(), 'capital', object(), options => '$options');\n\\sleep 50 ms\n",
	'batch@2'  => "INSERT INTO kne.edit_request (subject, relation, object, options) SELECT s, 'capital', object(), '$options'"
	  . " FROM unnest('{France,Italy,Spain}'::text[]) s;\n\\sleep 100 ms\n",
	'unit@1'   => "SELECT kne_edit_unit(subject(), 'capital', object(), options => '$options');\n\\sleep 100 ms\n",
	'tag@1'    => "SELECT kne_tag('state ' || :client_id || ' ' || clock_timestamp());\n\\sleep 50 ms\n",
	'revert@3' => "SELECT try('kne_revert', '{applied}');\n\\sleep 30 ms\n",
	'cancel@2' => "SELECT try('kne_cancel', '{pending,running}');\n\\sleep 30 ms\n",
	'retry@1'  => "SELECT try('kne_retry', '{failed,cancelled}');\n\\sleep 30 ms\n",
	'consolidate@1' => "SELECT kne_consolidate() AS id \\gset\nSELECT kne_wait_consolidation(:id);\n",
	'undo@1'   => "BEGIN;\nSELECT try('kne_revert', '{applied}');\nSELECT kne_edit(subject(), 'capital', object(), options => '$options');\nROLLBACK;\n",
	'wait@1'   => "SELECT kne_wait(edit_id, '10 minutes') FROM (SELECT max(edit_id) AS edit_id FROM kne.edit_request"
	  . " WHERE state IN ('pending', 'running')) r WHERE edit_id IS NOT NULL;\n",
	'stand@2'  => "BEGIN ISOLATION LEVEL REPEATABLE READ;\nSELECT kne_logprob('The capital of France is', 'Rome') AS a \\gset\n\\sleep 100 ms\n"
	  . "SELECT same(:a, kne_logprob('The capital of France is', 'Rome'));\nCOMMIT;\n",
	'serial@1' => "BEGIN ISOLATION LEVEL SERIALIZABLE;\nSELECT kne_edit(subject(), 'capital', object(), options => '$options');\nSELECT kne_knows('Spain', 'capital', 'Rome');\nCOMMIT;\n");
my @scripts;

for my $name (sort keys %script)
{
	my ($file, $weight) = split /@/, $name;

	append_to_file("$dir/$file", $script{$name});
	push @scripts, '-f', "$dir/$file\@$weight";
}
append_to_file("$dir/read", "SELECT kne_logprob('The capital of ' || subject() || ' is', object());\n");

sub background
{
	my ($name, @command) = @_;
	my $pid = fork() // die "cannot fork: $!";

	if ($pid == 0)
	{
		open(STDOUT, '>', "$dir/$name.out");
		open(STDERR, '>&', \*STDOUT);
		exec(@command) or POSIX::_exit(127);
	}
	return $pid;
}

# The readers apart, so that their times can be told. A writer that meets a serialization failure tries again.
my @pgbench = ('pgbench', '-n', '-T', $seconds);
my $where = $node->connstr('postgres');
my %running = (
	writers => background('writers', @pgbench, '-c', 6, '-j', 2, '--max-tries', 100, @scripts, $where),
	readers => background('readers', @pgbench, '-c', 2, '-l', '--log-prefix', "$dir/times", '-f', "$dir/read", $where));
my ($looks, @wrong, %status) = (0);
while (%running)
{
	for my $name (sort keys %running)
	{
		if (waitpid($running{$name}, WNOHANG) > 0)
		{
			$status{$name} = $?;
			delete $running{$name};
		}
	}
	my $out = qx(psql -X -q -At -v ON_ERROR_STOP=1 -d "@{[$node->connstr('postgres')]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1);
	push @wrong, $out if $? != 0 || $out ne '';
	$looks++;
	usleep(200_000);
}
is($status{$_}, 0, $_) || diag(slurp_file("$dir/$_.out")) for qw(writers readers);
my $writes = slurp_file("$dir/writers.out");
is(join('', @wrong), '', "the rows held in $looks looks");
like($writes, qr/number of failed transactions: 0 /, 'nobody is turned away');
my @times = sort { $a <=> $b } map { (split)[2] / 1000 } map { split /\n/, slurp_file($_) } glob("$dir/times.*");
note(sprintf('%d reads while edits ran: half within %.1f ms, 99 of 100 within %.1f ms, the slowest %.1f ms',
	scalar(@times), $times[@times / 2], $times[@times * 0.99], $times[-1])) if @times;

note('an optimiser step took ' . $node->safe_psql('postgres', q{SELECT format('%s ms, 99 of 100 less than %s ms', round(1000 * a[1]::numeric, 1), round(1000 * a[2]::numeric, 1))
	FROM (SELECT percentile_cont('{0.5, 0.99}'::float8[]) WITHIN GROUP (ORDER BY optimise_seconds / steps) AS a FROM kne.solution WHERE steps > 0) s}));

ok($node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM kne.edit_request WHERE state IN ('pending', 'running'))"),
	'all of it comes to an end');
note($node->safe_psql('postgres', 'SELECT state, count(*), sum(deaths) FROM kne.consolidation GROUP BY state ORDER BY state'));
note($node->safe_psql('postgres', 'SELECT state, count(*), sum(attempts), sum(deaths) FROM kne.edit_request GROUP BY state ORDER BY state'));
is(qx(psql -X -q -At -v digests=1 -d "@{[$node->connstr('postgres')]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1), '', 'and holds');
unlike(slurp_file($node->logfile), qr/deadlock detected|PANIC|terminated by signal|<XX/, 'no deadlock, no crash, no internal error');
$node->stop;
done_testing();
