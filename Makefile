# kne - knowledge edits for language models, inside PostgreSQL
#
#   make demo      does the main job for real, in a private PostgreSQL under a temporary folder
#   make test      the same set-up, and every test
#   make, make install, make installcheck, make uninstall     plain PGXS (PG_CONFIG=...)
#   make shell     a psql on such a server, bundled model loaded
#   make bench     speed and quality, measured
#   make kernels   the GPU backend alone (make builds it too, where there is an nvcc)
#   make gpu-check checks that against the CPU on a GPU, and measures it; needs nvcc, gcc and a GPU, nothing else
#   make torture   half an hour of kills and of everybody at once
#   make lint      clang-tidy and cppcheck over src/ and extension/
#   make check-sanitizers   the engine's and the server's tests under ASan and UBSan, and some under valgrind
#   make coverage  which lines of src/ and extension/ the tests run
#   make eval      quality alone: methods compared on the same edits (KNE_EVAL=full: hours)
#
# demo, test and bench install what is missing (as root; otherwise they say what to install),
# so they must work before there is a pg_config: they stand apart from PGXS.

PG_CONFIG ?= pg_config
APART = demo test torture lint check-sanitizers coverage bench shell eval setup engine engine-tests engine-bench kernels gpu-check clean-engine

ifneq ($(filter $(APART),$(MAKECMDGOALS)),)

include src/engine.mk

demo test torture lint check-sanitizers coverage bench shell eval setup:
	@test/run.sh $@

clean-engine:
	rm -rf $(BUILD)

.PHONY: $(APART)

else

EXTENSION  = kne
EXTVERSION = $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" kne.control)
MODULE_big = kne
OBJS       = $(patsubst %.c,%.o,$(wildcard extension/*.c)) src/kne_options.o src/kne_error.o
DATA       = $(wildcard extension/kne--*.sql)
DOCS       = README.md
REGRESS    = $(patsubst sql/%.sql,%,$(sort $(wildcard sql/*.sql)))
ISOLATION  = $(patsubst specs/%.spec,%,$(sort $(wildcard specs/*.spec)))
TAP_TESTS  = 1
PG_CFLAGS  = -std=gnu11 -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers \
             -Wno-declaration-after-statement -fvisibility=hidden
EXTRA_CLEAN = build

all: build/kne-engine

# No bitcode: nothing of kne is worth inlining into a query, and .bc would need clang.
override with_llvm = no
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

build/kne-engine: FORCE
	$(MAKE) -f src/engine.mk BUILD=build engine kernels
FORCE:
.PHONY: FORCE

$(OBJS): $(wildcard extension/*.h) src/kne_protocol.h src/kne_wire.h src/kne_options.h src/kne_base.h

install: install-engine
install-engine: build/kne-engine
	$(MKDIR_P) '$(DESTDIR)$(pkglibdir)'
	$(INSTALL_PROGRAM) build/kne-engine '$(DESTDIR)$(pkglibdir)/kne-engine'
	if [ -e build/kne_cuda.so ]; then $(INSTALL_PROGRAM) build/kne_cuda.so '$(DESTDIR)$(pkglibdir)/kne_cuda.so'; fi

uninstall: uninstall-engine
uninstall-engine:
	rm -f '$(DESTDIR)$(pkglibdir)/kne-engine' '$(DESTDIR)$(pkglibdir)/kne_cuda.so'
.PHONY: install-engine uninstall-engine

endif
