#!/bin/bash
# lint.sh SERVER_HEADERS - clang-tidy (.clang-tidy says what it looks for, and why not for the rest) and cppcheck (test/cppcheck.txt)
# over src/ and extension/. Any finding fails. KNE_LINT: only these files.
set -u
cd "$(dirname "$0")/.."
headers=${1:?headers of the server}
work=$(mktemp -d "${TMPDIR:-/tmp}/kne-lint.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export headers work
files=${KNE_LINT:-$(ls src/*.c extension/*.c)}

# A file a run: of several, clang-tidy 14 takes each va_list but the first file's for uninitialized.
tidy() {
    local flags="-std=gnu11 -D_GNU_SOURCE -Isrc"
    case $1 in
        extension/*) flags="$flags -Iextension -isystem $headers -DUSE_ASSERT_CHECKING=1" ;; # what is asserted is known
        *_avx2.c) flags="$flags -mavx2 -mfma -mf16c" ;;
        *_avx512.c) flags="$flags -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c" ;;
    esac
    # the two builtins are gcc's
    clang-tidy --quiet --warnings-as-errors='*' "$1" -- $flags '-D__builtin_shuffle(a,b,m)=(a)' '-D__builtin_cpu_supports(name)=*(name)' 2>/dev/null || echo failed
}
export -f tidy
printf '%s\n' $files | xargs -P"$(nproc)" -I{} bash -c 'tidy "$1" >"$work/$(basename "$1")"' - {}
cppcheck --quiet --std=c11 --enable=warning,performance,portability --suppressions-list=test/cppcheck.txt --error-exitcode=1 \
    -D_GNU_SOURCE -D__x86_64__ -DPG_VERSION_NUM=150000 -Isrc -j"$(nproc)" $files >"$work/cppcheck" 2>&1 || echo failed >>"$work/cppcheck"
cat "$work"/*
! grep -q '^failed' "$work"/*
