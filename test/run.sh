#!/bin/bash
# run.sh demo|test|torture|check-sanitizers|coverage|bench|shell|eval|lint|setup - sets up a private PostgreSQL with kne in it and runs what was asked.
#
# Everything happens under one temporary folder: a copy of PostgreSQL's bin, lib and share trees (a
# copied server finds its own share folder), kne installed into the copy, a copy of the clone and of the model, a cluster on
# a Unix socket there. Nothing is written to system folders but packages, and nothing is left running.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?demo, test, torture, check-sanitizers, coverage, bench, shell, eval, lint or setup}
clone=$PWD

packages="gcc make libc6-dev perl postgresql postgresql-server-dev-all libpcre2-dev libutf8proc-dev libcjson-dev libssl-dev libipc-run-perl"

say() { printf '== %s\n' "$*"; }

# The newest PostgreSQL (15 to 18) that is here with its headers; empty when there is none.
find_pg() {
    local v
    for v in ${PG_VERSION:-15 18 17 16}; do
        if [ -x /usr/lib/postgresql/$v/bin/postgres ] && [ -e /usr/include/postgresql/$v/server/postgres.h ] &&
           [ -e /usr/lib/postgresql/$v/lib/pgxs/src/makefiles/pgxs.mk ]; then
            echo $v
            return
        fi
    done
}

have_all() {
    [ -n "$(find_pg)" ] && command -v gcc make perl >/dev/null &&
        perl -MIPC::Run -e 1 2>/dev/null && [ "$(command -v gcc make perl | wc -l)" = 3 ] &&
        printf '#include <%s>\n' pcre2.h utf8proc.h cjson/cJSON.h openssl/evp.h stdio.h |
            sed 's/^/#define PCRE2_CODE_UNIT_WIDTH 8\n/' | gcc -fsyntax-only -w -x c - 2>/dev/null
}

# Debian's postgresql-server-dev-N depends on clang, which kne does not need but apt brings.
install_missing() {
    have_all && return
    local ver list
    if [ "$(id -u)" != 0 ]; then
        echo "Something is missing. As root:" >&2
        echo "  apt-get install -y --no-install-recommends $packages" >&2
        exit 1
    fi
    say "installing what is missing"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1   # RUNLEVEL=1: packages start no service
    apt-get update -qq
    ver=$(apt-cache show postgresql 2>/dev/null | sed -n 's/^Version: *\([0-9]*\).*/\1/p' | head -1)
    list=${packages/postgresql postgresql-server-dev-all/postgresql-$ver postgresql-server-dev-$ver}
    apt-get install -y -qq --no-install-recommends $list >/dev/null
    have_all || { echo "packages were installed, but something is still missing" >&2; exit 1; }
}

# The fuzzers of `make test` need a clang that links them: any version, with the runtime of the same. Where it is not to be had, they are skipped.
install_fuzzer() {
    local n
    test/fuzz.sh --can && return
    if [ "$(id -u)" != 0 ]; then
        echo "The fuzzers will be skipped. As root: apt-get install -y --no-install-recommends clang libclang-rt-N-dev (N: clang's version)" >&2
        return
    fi
    say "installing clang's fuzzer"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || true
    n=$(ls /usr/bin 2>/dev/null | sed -n 's/^clang-\([0-9]*\)$/\1/p' | sort -rn | head -1)
    n=${n:-$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -1)}
    # before Debian 12 the runtime was part of libclang-common-N-dev
    apt-get install -y -qq --no-install-recommends clang-$n libclang-rt-$n-dev >/dev/null 2>&1 ||
        apt-get install -y -qq --no-install-recommends clang-$n libclang-common-$n-dev >/dev/null 2>&1 || true
}

# install_tools PROGRAM...: programs that only some checks need, each in the package of its name
install_tools() {
    local t missing=
    for t in "$@"; do
        command -v $t >/dev/null || missing="$missing $t"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "Something is missing. As root: apt-get install -y --no-install-recommends$missing" >&2
        exit 1
    fi
    say "installing$missing"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

install_missing
case $what in
    test) install_fuzzer ;;
    lint) install_tools clang-tidy cppcheck ;;
    check-sanitizers) install_tools valgrind ;;
esac
pgver=$(find_pg)
say "PostgreSQL $pgver, $(gcc -dumpfullversion 2>/dev/null | sed 's/^/gcc /')"

if [ "$what" = setup ]; then
    exit 0
fi

if [ "$what" = eval ]; then # needs no server
    make -s -j"$(nproc)" -f src/engine.mk BUILD=build build/bench_eval
    exec bench/run_eval.sh
fi

if [ "$what" = lint ]; then # nor does this
    exec test/lint.sh "/usr/include/postgresql/$pgver/server"
fi

# What is not built for use is built in the copy, whole, without the kernels: in the clone nothing of it is left.
case $what in
    check-sanitizers)
        export ENGINE_EXTRA="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
        export COPT="-O1 -fsanitize=undefined -fno-sanitize-recover=undefined" NVCC= ;;
    coverage) export ENGINE_EXTRA="-O1 --coverage" COPT="-O1 --coverage" NVCC= ;;
esac
fresh=${COPT:+yes}

# ---- the temporary folder, and who works in it ----
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kne.XXXXXX")
if [ "$(id -u)" = 0 ]; then
    as() { (cd "$tmp" && runuser -u postgres -- env HOME="$tmp" "$@"); }
else
    as() { (cd "$tmp" && env HOME="$tmp" "$@"); }
fi
pg=$tmp/pg/lib/postgresql/$pgver
export PATH="$pg/bin:$PATH" LC_ALL=C.UTF-8 PGHOST=$tmp/s PGPORT=5499 PGUSER=postgres PGDATABASE=postgres
export LD_LIBRARY_PATH=$pg/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
unset PGDATA PGSERVICE PGPASSFILE PGOPTIONS || true

cleanup() {
    local status=$?
    trap - EXIT INT TERM
    if [ -e "$tmp/data/postmaster.pid" ]; then
        as pg_ctl -D "$tmp/data" -m immediate -w stop >/dev/null 2>&1 || true
    fi
    ! mountpoint -q "$tmp/small" 2>/dev/null || umount "$tmp/small"
    if [ -n "${KNE_KEEP:-}" ]; then
        echo "kept: $tmp"
    else
        rm -rf "$tmp"
    fi
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say "building"
export CUDA_ARCHS="${CUDA_ARCHS:-75}" # enough to see that the kernels compile; `make` builds for every chip
[ -n "$fresh" ] || make -s -j"$(nproc)" -f src/engine.mk BUILD=build engine $([ "$what" = test ] && echo engine-tests kernels)
[ "$what" != bench ] || make -s -j"$(nproc)" -f src/engine.mk BUILD=build engine-bench

say "a private PostgreSQL in $tmp"
mkdir -p "$tmp/pg/lib/postgresql/$pgver" "$tmp/pg/share/postgresql" "$tmp/s"
cp -r /usr/lib/postgresql/$pgver/bin /usr/lib/postgresql/$pgver/lib "$tmp/pg/lib/postgresql/$pgver/"
cp -rL /usr/share/postgresql/$pgver "$tmp/pg/share/postgresql/"
ln -s /usr/include "$tmp/pg/include"
# the clone, without its history; build/ travels so that nothing is compiled twice
mkdir "$tmp/src"
tar -C "$clone" --exclude=.git --exclude=tmp_check --exclude=results ${fresh:+--exclude=./build --exclude=*.o --exclude=*.so} -cf - . | tar -C "$tmp/src" -xf -
mkdir "$tmp/models" "$tmp/small"
# A disk that can be filled, where this user may mount one; tests that need it are skipped elsewhere.
if [ "$what" != demo ] && [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=64m,mode=777 tmpfs "$tmp/small" 2>/dev/null; then
    export KNE_SMALL_DISK=$tmp/small
fi
cp -r models/atlas "$tmp/models/atlas"
chmod -R u+rwX,go+rX "$tmp/models" "$tmp/src" "$tmp/pg"
chmod 755 "$tmp"
if [ "$(id -u)" = 0 ]; then
    chown -R postgres "$tmp"
fi
as make -s ${fresh:+-j"$(nproc)"} -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" all install >"$tmp/install.log" 2>&1 ||
    { cat "$tmp/install.log" >&2; exit 1; }

start_server() {
    as initdb -D "$tmp/data" -U postgres -A trust -E UTF8 --no-locale --no-sync >/dev/null
    cat >>"$tmp/data/postgresql.conf" <<CONF
shared_preload_libraries = 'kne'
kne.model_dir = '$tmp/models'
listen_addresses = ''
unix_socket_directories = '$tmp/s'
port = 5499
fsync = off
max_prepared_transactions = 10
CONF
    as pg_ctl -D "$tmp/data" -l "$tmp/server.log" -w start >/dev/null ||
        { cat "$tmp/server.log" >&2; exit 1; }
}
stop_server() { as pg_ctl -D "$tmp/data" -m fast -w stop >/dev/null; }

export KNE_TEST_MODEL=$tmp/models/atlas KNE_TMP=$tmp
. test/"$what".sh
