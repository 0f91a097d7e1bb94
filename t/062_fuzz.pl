# Every function of the extension with arguments that nobody would think of, rows that nobody would insert, and model folders that
# somebody has tampered with: errors, each with a code of its own, and never a crash, an internal error (XX000), a lost engine.
#
# KNE_FUZZ_CALLS: how many calls (400); KNE_FUZZ_FOLDERS: how many folders (100); KNE_SEED repeats a run.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;
use KneTest;
use POSIX qw(mkfifo);
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{KNE_SEED} // int(rand(1_000_000));
my $n_calls = $ENV{KNE_FUZZ_CALLS} // 400;
my $n_folders = $ENV{KNE_FUZZ_FOLDERS} // 100;
my $dir = PostgreSQL::Test::Utils::tempdir();
my $node = kne_cluster('fuzz', 'log_statement' => 'none', 'log_line_prefix' => '%m [%p] <%e> ', 'log_min_error_statement' => 'panic');

note("KNE_SEED=$seed");
srand($seed);
$node->safe_psql('postgres', "CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'");
kne_prepare($node, $_) for qw(postgres bytes);
my $engine = kne_pid($node, 'engine');

sub one_of { return $_[int(rand(@_))]; }
sub quoted { my ($s) = @_; $s =~ s/([\\'])/$1$1/g; return " E'$s'"; }

# ---- values, as SQL ----

sub bytes
{
	my ($n) = @_;

	return join('', map { sprintf('\\x%02x', 1 + int(rand(255))) } 1 .. $n);
}

sub text
{
	my ($db) = @_;

	return one_of(
		sub { return 'NULL'; },
		sub { return "''"; },
		sub { return quoted(one_of('France', 'The capital of France is', 'capital', 'Paris', 'm', 'no model', "it's {}", '{}{}')); },
		sub { return quoted(one_of(' ', "\t\n", '%s%n%d', '$1', '\\', '"', '"; DROP', '../../etc', "\x{1}")); },
		sub { return "repeat(" . quoted(one_of('a', ' ', 'The capital of France is ', "\xc3\xa9", '{}')) . ", " . one_of(100, 1001, 5000, 100_000, 1_000_000) . ")"; },
		sub { return "(SELECT string_agg(chr(1 + (random() * 40000)::int), '') FROM generate_series(1, " . one_of(5, 500) . "))"; },
		sub { return $db eq 'bytes' ? "E'" . bytes(one_of(1, 3, 40)) . "'" : quoted('x'); },
		sub { return quoted('a') . " || chr(" . one_of(0x200b, 0x202e, 0xfeff, 0x10ffff, 0x0301) . ") || " . quoted('b'); })->() . '::text' unless $db eq 'bytes';
	return one_of("E'" . bytes(one_of(1, 3, 40)) . "'", "repeat(E'" . bytes(1) . "', 100000)", quoted('France'), 'NULL', "''") . '::text';
}

sub number
{
	my ($max) = @_;

	return one_of('NULL', 0, 1, 2, 3, 10, -1, 1000, "'$max'", "'-$max'", int(rand(100)));
}

sub json
{
	my $depth = one_of(10, 1000, 5000);
	my @names = qw(points path quadrature score tokens signed contrast reference select fraction max_neurons layer_min layer_max matrices
	  step lr momentum ridge alpha max_steps probability beta anchors protect phrasings seed nothing);

	return one_of(
		sub { return 'NULL'; },
		sub { return "'{}'"; },
		sub { return one_of("'[]'", "'null'", "'1'", "'\"x\"'", "'[1,2]'", "'true'"); },
		sub { return "(repeat('[', $depth) || repeat(']', $depth))"; },
		sub { return "(repeat('{\"lr\":', $depth) || '1' || repeat('}', $depth))"; },
		sub { return "(SELECT jsonb_object_agg('k' || i, i) FROM generate_series(1, 20000) i)"; },
		sub { return "jsonb_build_object(repeat('n', 100000), 1)"; },
		sub { return "jsonb_build_object('path', repeat('v', 1000000))"; },
		sub {
			return "jsonb_build_object(" . join(', ', map { "'" . one_of(@names) . "', " . one_of('1', '0', '-1', '1e300', '0.5', "'down'", "'joint'",
					'true', 'NULL::text', "'NaN'::numeric", "repeat('9', 400)::numeric", "'[1]'::jsonb") } 1 .. 1 + int(rand(4))) . ")";
		})->() . '::jsonb';
}

my %value = (
	'text' => \&text,
	'integer' => sub { return number('2147483647') . '::integer'; },
	'bigint' => sub { return number('9223372036854775807') . '::bigint'; },
	'boolean' => sub { return one_of('true', 'false', 'NULL') . '::boolean'; },
	'jsonb' => \&json,
	'bytea' => sub { return one_of("''", 'NULL', "'\\x00'", "decode(repeat('ff', 100000), 'hex')") . '::bytea'; },
	'name' => sub { return one_of("''", 'NULL', "'oid'", "repeat('n', 100)", "'no such'", "'\"'") . '::name'; },
	'regclass' => sub { return one_of("'pg_catalog.pg_class'", 'NULL', "'0'", "'4294967295'", "'no_such'") . '::regclass'; },
	'bigint[]' => sub { return one_of("'{}'", "'{NULL}'", "'{{1,2},{3,4}}'", "'{-1}'", "'{9223372036854775807}'", "'[5:6]={1,1}'", 'NULL') . '::bigint[]'; },
	'text[]' => sub {
		return one_of("'{}'", "'{NULL}'", "'{{a,b},{c,d}}'", "'{\"\"}'", "'[5:6]={France,Italy}'", 'NULL', "array_fill('x'::text, '{5000}')", "ARRAY[repeat('y', 1000000)]") . '::text[]';
	},
	'interval' => sub { return one_of("'0'", "'10 ms'", "'-1 s'", "'178000000 years'", 'NULL', "'-178000000 years'", "'1 month -30 days'") . '::interval'; },
	'timestamp with time zone' => sub { return one_of("now() - interval '1 s'", 'now()', "'infinity'", "'-infinity'", "'4714-11-24 BC'", "'294276-12-31'", 'NULL', 'clock_timestamp()') . '::timestamptz'; },
	'integer[]' => sub {
		return one_of("'{}'", "'{NULL}'", "'{{1,2},{3,4}}'", "'{-1}'", "'{2147483647}'", "'[5:6]={1,2}'", 'NULL', "array(SELECT i % 500 FROM generate_series(1, 300000) i)",
			"'{" . join(',', map { int(rand(600)) } 1 .. 10) . "}'") . '::integer[]';
	});
# A path is written to or read from: nothing that is somebody's.
sub path { return one_of("'/nonexistent/x'", "''", "'relative'", "'/'", quoted("$dir/out" . int(rand(5))), "repeat('/x', 3000)", 'NULL', quoted("$dir/../") , "E'/tmp/\\x01'") . '::text'; }

# ---- calls ----

sub script
{
	my ($db) = @_;
	my @functions = split /\n/, $node->safe_psql($db, q{
		SELECT p.oid::regproc || '|' || coalesce((SELECT string_agg(format_type(t, NULL) || ':' || coalesce(p.proargnames[i], ''), ';' ORDER BY i)
			FROM unnest(p.proargtypes) WITH ORDINALITY a (t, i)), '')
		FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
		JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'kne' ORDER BY 1});
	my $sql = "SET statement_timeout = '5s';\n";
	my %unknown;

	for my $i (1 .. $n_calls)
	{
		my ($name, $types) = split /\|/, one_of(@functions);
		my @args = map {
			my ($type, $arg) = split /:/;
			$unknown{$type} = 1 unless $value{$type} || $type =~ /^(internal|cstring)$/;
			($arg // '') eq 'path' ? path() : ($arg // '') eq 'model' && rand() < 0.8 ? 'NULL' : $value{$type} ? $value{$type}->($db) : 'NULL';
		} split /;/, $types // '';
		my $call = "SELECT " . one_of('* FROM', '') . " $name(" . join(', ', @args) . ")" . one_of('', '', ' LIMIT 1');

		# what a call writes is taken back half of the time; what drops a model always
		$call = "BEGIN; $call; " . one_of('ROLLBACK', 'SAVEPOINT s; ROLLBACK TO s; ROLLBACK') if $name =~ /drop/ || rand() < 0.5;
		$sql .= "$call;\n";
		if ($i % 10 == 0)
		{
			$sql .= "INSERT INTO kne.edit_request (subject, relation, object, options, model_id) SELECT " . text($db) . ", " . text($db) . ", "
			  . text($db) . ", " . json() . ", " . number('2147483647') . "::integer;\n";
			$sql .= "INSERT INTO kne.fact (subject, relation, object) VALUES (" . text($db) . ", " . text($db) . ", " . text($db) . ");\n";
			$sql .= "INSERT INTO kne.relation (relation, prompt, paraphrases) VALUES (" . text($db) . ", " . text($db) . ", ARRAY[" . text($db) . ", '{}'," . text($db) . "]);\n";
			$sql .= "INSERT INTO kne.general_fact (prompt, object) VALUES (" . text($db) . ", " . text($db) . ");\n";
			$sql .= "SELECT count(kne_cancel(edit_id)) FROM kne.edit_request WHERE state IN ('pending', 'running');\n" if $i % 50 == 0;
		}
	}
	is(join(' ', sort keys %unknown), '', "values of every type that a function of kne takes ($db)");
	return "$sql SELECT 'the end';\n";
}

for my $db (qw(postgres bytes))
{
	my $file = "$dir/$db.sql";
	my ($out, $err);

	append_to_file($file, script($db));
	my $ok = IPC::Run::run(['psql', '-X', '-q', '-A', '-t', '-v', 'VERBOSITY=verbose', '-f', $file, '-d', $node->connstr($db)], '>', \$out, '2>', \$err);
	like($out, qr/^the end$/m, "$n_calls calls in one session ($db)");
	my @errors = $err =~ /ERROR:  (\w{5}):/g;
	cmp_ok(scalar(@errors), '>', $n_calls / 10, scalar(@errors) . ' of them errors');
	my %codes;
	$codes{$_}++ for @errors;
	note(join(' ', map { "$_:$codes{$_}" } sort keys %codes));
	is(join("\n", grep { /ERROR:  XX/ } split /\n/, $err), '', 'none of them internal');
	$node->safe_psql($db, "SELECT count(kne_cancel(edit_id)) FROM kne.edit_request WHERE state IN ('pending', 'running')");
	ok($node->poll_query_until($db, "SELECT NOT EXISTS (SELECT FROM kne.edit_request WHERE state IN ('pending', 'running'))"), 'no request is stuck');
	is(qx(psql -X -q -At -v digests=1 -d "@{[$node->connstr($db)]}" -f '$FindBin::RealBin/../test/invariants.sql' 2>&1), '', 'the rows hold');
}
is(kne_pid($node, 'engine'), $engine, 'the engine is still the first one');

# ---- model folders ----

my @models = sort grep { -f "$_/model.safetensors" } glob("$FindBin::RealBin/../test/golden/*");
my @corpus = sort grep { -f } glob("$FindBin::RealBin/../test/corpus/*/*");

sub change
{
	my ($file, $how) = @_;
	my $data = slurp_file($file);

	$how->(\$data);
	unlink $file;
	open(my $out, '>:raw', $file) or die $!;
	print $out $data;
	close $out;
	return;
}

my %tamper = (
	'flipped bytes' => sub { change($_[0], sub { my $d = shift; substr($$d, int(rand(length($$d))), 1) = chr(int(rand(256))) for 1 .. 1 + int(rand(8)); }) },
	'flipped bytes at the start' => sub { change($_[0], sub { my $d = shift; substr($$d, int(rand(length($$d) > 600 ? 600 : length($$d))), 1) = chr(int(rand(256))) for 1 .. 1 + int(rand(4)); }) },
	'digits changed' => sub { change($_[0], sub { my $d = shift; my $n = 1 + int(rand(3)); $$d =~ s/(\d+)/rand() < 0.1 && $n-- > 0 ? one_of(0, -1, 4294967296, '9' x 30, 7, 1) : $1/ge; }) },
	'cut' => sub { change($_[0], sub { my $d = shift; $$d = substr($$d, 0, int(rand(length($$d)))); }) },
	'a piece doubled' => sub { change($_[0], sub { my $d = shift; my $at = int(rand(length($$d))); substr($$d, $at, 0) = substr($$d, $at, 1 + int(rand(2000))); }) },
	'of the corpus' => sub { my $from = one_of(@corpus); change($_[0], sub { ${ $_[0] } = slurp_file($from); }) if $from; },
	'empty' => sub { change($_[0], sub { ${ $_[0] } = ''; }) },
	'gone' => sub { unlink $_[0]; },
	'a folder' => sub { unlink $_[0]; mkdir $_[0]; },
	'a pipe' => sub { unlink $_[0]; mkfifo($_[0], 0600); },
	'a device' => sub { unlink $_[0]; symlink '/dev/zero', $_[0]; },
	'a link to itself' => sub { unlink $_[0]; symlink $_[0], $_[0]; },
	'a terabyte of nothing' => sub { unlink $_[0]; open(my $f, '>', $_[0]); truncate($f, 1 << 40); },
	'deep' => sub { change($_[0], sub { ${ $_[0] } = '{"a":' x 100_000; }) },
	'an index to elsewhere' => sub {
		my ($folder) = $_[0] =~ m{^(.*)/};
		unlink "$folder/model.safetensors";
		append_to_file("$folder/model.safetensors.index.json", '{"weight_map": {"a": "' . one_of('../m/model.safetensors', '/etc/passwd', '.', '..', 'x/../../y') . '"}}');
	});
my (%seen, $loaded, @bad) = ();
$loaded = 0;
for my $i (1 .. $n_folders)
{
	my $from = one_of(@models);
	my $to = "$dir/f$i";
	my $what = one_of(('flipped bytes') x 6, ('digits changed') x 4, sort keys %tamper);
	my ($out, $err) = ('', '');

	system_or_bail('cp', '-r', $from, $to);
	system_or_bail('chmod', '-R', 'u+rwX', $to);
	$tamper{$what}->("$to/" . one_of('config.json', 'tokenizer.json', ('model.safetensors') x 2));
	my $rc = $node->psql('postgres', "SET statement_timeout = '60s'; SELECT kne_load_model('f$i', '$to', false)", stdout => \$out, stderr => \$err);
	if ($rc == 0)
	{
		$loaded++;
		for my $call ("kne_complete('a b', 3, 'f$i')", "kne_logprob('a', 'b', 'f$i')", "kne_tokenize('a b c', 'f$i')", "kne_detokenize('{1,2,3}', 'f$i')",
			"kne_locate('a', 'b', 'c', 'f$i')", "kne_drop_model('f$i')")
		{
			my ($o, $e);
			$node->psql('postgres', "SET statement_timeout = '60s'; SELECT $call", stdout => \$o, stderr => \$e);
			$err .= $e // '';
		}
	}
	$seen{$what}++;
	push @bad, "$what of $from: $err" if $err =~ /XX\d\d\d|server closed|engine (died|is not running)|statement timeout/;
	system_or_bail('rm', '-rf', $to);
}
is(join("\n", @bad), '', "$n_folders folders that were tampered with, $loaded of them loaded all the same");
note(join(', ', map { "$_: $seen{$_}" } sort keys %seen));
is(kne_pid($node, 'engine'), $engine, 'one engine has read them all');
my $log = slurp_file($node->logfile);
unlike($log, qr/<XX|PANIC|terminated by signal|kne engine \(process \d+\) died/, 'no internal error, no crash, no engine lost');
$node->stop;
done_testing();
