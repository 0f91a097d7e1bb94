#!/usr/bin/perl
# coverage.pl FILE.gcda... - what gcov says of them, summed up: lines that ran of each file of src/ and extension/ (a line of a header
# ran if it did in any object), and the functions that never did.
use strict;
use warnings;
use JSON::PP;

my (%line, %function);
for my $gcda (@ARGV)
{
	my $json = do { local $/; open(my $gcov, '-|', 'gcov', '--json-format', '--stdout', $gcda) or die $!; <$gcov> };

	for my $file (map { @{ $_->{files} } } JSON::PP->new->incr_parse($json))
	{
		my ($name) = $file->{file} =~ m{\b((?:src|extension)/[^/]+\.[ch])$} or next;
		$line{$name}{ $_->{line_number} } += $_->{count} for @{ $file->{lines} };
		$function{$name}{ $_->{name} } += $_->{execution_count} for @{ $file->{functions} };
	}
}

my %sum;
for my $name (sort keys %line)
{
	my @ran = grep { $_ > 0 } values %{ $line{$name} };
	my $all = keys %{ $line{$name} };
	my @never = sort grep { !$function{$name}{$_} } keys %{ $function{$name} };
	my ($folder) = $name =~ m{(.*)/};

	$sum{$_}[0] += @ran, $sum{$_}[1] += $all for $folder, 'both';
	printf "%-32s %5d of %5d  %5.1f %%%s\n", $name, scalar(@ran), $all, 100 * @ran / $all, @never ? "  never called: @never" : '';
}
printf "%-32s %5d of %5d  %5.1f %%\n", $_, @{ $sum{$_} }, 100 * $sum{$_}[0] / $sum{$_}[1] for sort keys %sum;
