#!/bin/bash
# check_tree.sh - promises about the tree itself, as TAP.
n=0 bad=0
check() {
    n=$((n + 1))
    if [ "$2" = "$3" ]; then
        echo "ok $n - $1"
    else
        echo "not ok $n - $1: got '$2', wanted '$3'"
        bad=1
    fi
}
version=$(sed -n "s/^default_version *= *'\(.*\)'/\1/p" kne.control)
check "a full install script of the default version" "$(ls extension/kne--$version.sql)" "extension/kne--$version.sql"
check "META.json's version" "$(sed -n 's/^ *"version": "\([0-9.]*\)".*/\1/p' META.json | head -1)" "$version.0"
check "the library's version" "$(sed -n 's/^#define KNE_ENGINE_VERSION "\(.*\)"/\1/p' src/kne_protocol.h)" "$version.0"
check "the changelog's newest version" "$(sed -n 's/^## \([0-9.]*\).*/\1/p' CHANGELOG.md | head -1)" "$version"
check "no CREATE OR REPLACE, no IF NOT EXISTS in install scripts" \
      "$(ls extension/kne--*.sql | grep -v -- '--.*--' | xargs cat | grep -ciE 'create or replace|if not exists')" 0
check "the script of 0.1 is as it was released" "$(cksum <extension/kne--0.1.sql)" "3671838261 64755"
check "no exit, abort or assert in the engine outside main" \
      "$(grep -nE '\b(exit|abort|assert)\(' src/*.c src/*.h | grep -vE 'src/kne_main.c|_exit\(|^\S+\s*(/?\*|//)' | wc -l)" 0
check "the engine includes no PostgreSQL header" "$(grep -lE '#include "(postgres|utils|storage|libpq)' src/*.[ch] | wc -l)" 0
if [ -e build/kne-engine ] && [ -e kne.so ]; then
    check "kne.so exports only its own names" \
          "$(nm -D --defined-only kne.so | awk '{print $3}' | grep -vE '^(kne_|pg_finfo_|Pg_magic_func|_PG_init)' | wc -l)" 0
fi
check "the roles of docs/security.md are those of the matrix" \
      "$(grep -E "^(CREATE ROLE|GRANT)" docs/security.md | cksum)" "$(sed -n "/^BEGIN/,/^$/p" sql/11_matrix.sql | grep -E "^(CREATE ROLE|GRANT)" | cksum)"
check "committed files under 9 MB" "$(git ls-files 2>/dev/null | xargs -r stat -c %s | awk '$1 > 9000000' | wc -l)" 0
echo "1..$n"
exit $bad
