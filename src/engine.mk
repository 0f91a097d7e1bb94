# engine.mk - builds the engine (no PostgreSQL header), its library and its tests.
# Included by the top Makefile; works alone too: make -f src/engine.mk engine
BUILD   ?= build
CC      ?= cc
ENGINE_CFLAGS = -std=gnu11 -O3 -g -fno-math-errno -ffp-contract=fast -Wall -Wextra -Wshadow -Wvla \
                -Wno-unused-parameter -fvisibility=hidden -D_GNU_SOURCE $(ENGINE_EXTRA)
ENGINE_LIBS   = -lpcre2-8 -lutf8proc -lcjson -lcrypto -lpthread -lm -ldl

ENGINE_SRC  = $(filter-out src/kne_main.c,$(wildcard src/*.c))
ENGINE_OBJ  = $(ENGINE_SRC:src/%.c=$(BUILD)/%.o)
TEST_BIN    = $(patsubst test/%.c,$(BUILD)/%,$(filter-out $(if $(HOST_CXX),,test/test_cuda.c),$(wildcard test/test_*.c)))
BENCH_BIN   = $(patsubst bench/%.c,$(BUILD)/%,$(wildcard bench/bench_*.c))

# Kernels for one instruction set each are compiled with their own flags and
# chosen at run time, so that one binary runs everywhere.
$(BUILD)/%_avx2.o:       ISA = -mavx2 -mfma -mf16c
$(BUILD)/%_avx512.o:     ISA = -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
$(BUILD)/%_avx512bf16.o: ISA = -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c

engine: $(BUILD)/kne-engine

include kernels/kernels.mk

engine-tests: $(TEST_BIN) $(if $(HOST_CXX),$(BUILD)/emul/kne-engine)
engine-bench: $(BENCH_BIN)

$(BUILD)/%.o: src/%.c $(wildcard src/*.h)
	@mkdir -p $(@D)
	$(CC) $(ENGINE_CFLAGS) $(ISA) -c $< -o $@

$(BUILD)/libkne.a: $(ENGINE_OBJ)
	rm -f $@ && $(AR) rcs $@ $^

$(BUILD)/kne-engine: src/kne_main.c $(BUILD)/libkne.a
	$(CC) $(ENGINE_CFLAGS) $< $(BUILD)/libkne.a -o $@ $(ENGINE_LIBS)

$(BUILD)/test_%: test/test_%.c $(wildcard test/*.h bench/*.h) $(BUILD)/libkne.a
	$(CC) $(ENGINE_CFLAGS) -Isrc $< $(BUILD)/libkne.a -o $@ $(ENGINE_LIBS)

$(BUILD)/bench_%: bench/bench_%.c $(wildcard bench/*.h) $(BUILD)/libkne.a
	$(CC) $(ENGINE_CFLAGS) -Isrc $< $(BUILD)/libkne.a -o $@ $(ENGINE_LIBS)

.PHONY: engine engine-tests engine-bench
