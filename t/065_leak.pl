# A thousand reads and fifty edits, again and again: the memory of worker, engine and session stays where it was. What is measured is the private
# memory that has no file behind it, once caches are full, and at the end.
#
# KNE_LEAK_PARTS: how often (4; ten thousand reads and five hundred edits are 10).
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $parts = $ENV{KNE_LEAK_PARTS} // 4;
my $options = '{"contrast": 0, "anchors": 0, "protect": 32, "select": "attribution", "lr": 0.04, "max_neurons": 60, "max_steps": 60}';
my $node = kne_cluster('leak', 'kne.idle_timeout' => '10min', 'kne.cpu_threads' => 2, 'autovacuum' => 'off');
kne_prepare($node);
my $session = $node->background_psql('postgres');
$session->set_query_timer_restart(); # its time limit is of each query
my %pid = (engine => kne_pid($node, 'engine'), session => $session->query_safe('SELECT pg_backend_pid()'));

# kB
sub memory
{
	my ($pid) = @_;

	return slurp_file("/proc/$pid/status") =~ /^RssAnon:\s+(\d+) kB/m ? $1 : die "no such process: $pid";
}

# n reads by one session: each calls another function, or asks something else
sub reads
{
	my ($n) = @_;

	$session->query_safe(qq{DO \$\$
	DECLARE
		subject text;
	BEGIN
		FOR i IN 1 .. $n / 4 LOOP
			subject := 'Land ' || i % 50;
			PERFORM kne_logprob('The capital of ' || subject || ' is', 'Rome');
			PERFORM kne_knows(subject, 'capital', 'Paris');
			PERFORM kne_complete('The capital of ' || subject || ' is', 1);
			PERFORM * FROM kne_next_tokens('The capital of ' || subject || ' is', 5);
		END LOOP;
	END \$\$});
	return;
}

# 50 edits: of the same subjects each time, so that each supersedes one of the time before
my $round = 0;
sub edits
{
	my $object = (qw(Rome Paris Madrid Berlin))[$round++ % 4];

	$node->safe_psql('postgres', "INSERT INTO kne.edit_request (subject, relation, object, options) SELECT 'Land ' || i, 'capital', '$object', '$options'"
		. " FROM generate_series(1, 50) i");
	$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM kne.edit_request WHERE state IN ('pending', 'running'))") or die;
	return;
}

my (%before, %last, %grew); # what leaks grows in each part, a cache in some
for my $part (1 .. $parts)
{
	edits();
	reads(1000);
	$pid{worker} //= kne_pid($node, 'worker');
	my %now = map { $_ => memory($pid{$_}) } sort keys %pid;
	note("after part $part: " . join(', ', map { "$_ $now{$_} kB" } sort keys %now));
	%before = %now if $part == 2;
	$grew{$_} += $part > 2 && $now{$_} > $last{$_} + 100 for sort keys %now;
	%last = %now;
	is(kne_pid($node, $_), $pid{$_}, "the $_ is the same") for $part == $parts ? qw(engine worker) : ();
	ok($now{$_} - $before{$_} < 4096 || 2 * $grew{$_} < $part - 2, "the $_ has grown by less than 4 MB since the second part, or in few parts: "
			. ($now{$_} - $before{$_}) . " kB, in $grew{$_}") for $part == $parts ? sort keys %pid : ();
}
is($node->safe_psql('postgres', "SELECT count(*) FROM kne.edit_request WHERE state IN ('applied', 'superseded')"), 50 * $parts, 'all edits were done');
$session->quit;
$node->stop;
done_testing();
