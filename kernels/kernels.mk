# kernels.mk - the CUDA backend kne_cuda.so, built where there is an nvcc (on PATH or in /usr/local/cuda), and the
# programs that check it: test_cuda, with the kernels compiled for the host, and gpu_check, on a GPU.
# Included by src/engine.mk. CUDA_ARCHS: compute capabilities; those that the toolkit does not know are left out.
NVCC       ?= $(firstword $(wildcard $(addsuffix /nvcc,$(subst :, ,$(PATH))) /usr/local/cuda/bin/nvcc))
NO_CUDA     = no nvcc
CUDA_ARCHS ?= 75 80 86 89 90 100 120
CU_SRC      = $(wildcard kernels/*.cu)

# The engine's sources that need no library but libc and libm: what gpu_check links on a machine with nothing else.
PLAIN_SRC = $(filter-out src/kne_main.c,$(shell grep -LE 'include [<"](pcre2|utf8proc|cjson/|cJSON|openssl/|kne_tokenizer_impl|kne_bpe_impl)' src/*.c))

$(BUILD)/libkne_plain.a: $(PLAIN_SRC:src/%.c=$(BUILD)/%.o)
	rm -f $@ && $(AR) rcs $@ $^

# A toolkit that cannot build this is as good as none: it must not stop the rest.
ifneq ($(NVCC),)
CUDA_TOP  := $(abspath $(dir $(realpath $(NVCC)))/..)
ifeq ($(shell test "$$($(NVCC) --version | sed -n 's/.*release \([0-9]*\).*/\1/p')" -ge 12 2>/dev/null && echo yes),)
NO_CUDA   := $(NVCC) is not of toolkit 12 or newer
override NVCC :=
else ifeq ($(wildcard $(addsuffix /cublasLt.h,$(CUDA_TOP)/include $(CUDA_TOP)/targets/*/include /usr/include $(subst :, ,$(CPATH)))),)
NO_CUDA   := $(NVCC) is there but cublasLt.h is not (libcublas-dev)
override NVCC :=
endif
endif

ifneq ($(NVCC),)
CUDA_KNOWN = $(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
CUDA_USED  = $(filter $(CUDA_ARCHS),$(CUDA_KNOWN))
NVCC_FLAGS = -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter -Isrc \
             $(foreach a,$(CUDA_USED),-gencode arch=compute_$(a),code=sm_$(a)) \
             $(foreach a,$(sort $(firstword $(CUDA_USED)) $(lastword $(CUDA_USED))),-gencode arch=compute_$(a),code=compute_$(a))
CUDA_LIB   = $(CUDA_TOP)/lib64

kernels: $(BUILD)/kne_cuda.so

# Another list of architectures is another program.
$(BUILD)/cuda.archs: FORCE
	@mkdir -p $(@D)
	@echo $(NVCC) $(CUDA_USED) | cmp -s - $@ || echo $(NVCC) $(CUDA_USED) >$@
FORCE:

$(BUILD)/cuda/%.o: kernels/%.cu kernels/kne_cuda.h src/kne_backend.h src/kne_model.h src/kne_base.h $(BUILD)/cuda.archs
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@

$(BUILD)/kne_cuda.so: $(CU_SRC:kernels/%.cu=$(BUILD)/cuda/%.o)
	$(NVCC) -shared -cudart static $(filter %.o,$^) -o $@ -lcublasLt -Xlinker -rpath,$(CUDA_LIB)
else
kernels:
	@echo "$(NO_CUDA): built without the GPU backend"
endif

# The kernels compiled for the host, by whichever C++ compiler there is; without one test_cuda is not built.
HOST_CXX = $(firstword $(foreach c,g++ clang++,$(wildcard $(addsuffix /$(c),$(subst :, ,$(PATH))))))
EMUL_FLAGS = -std=c++20 -O2 -g -ffp-contract=fast -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas -Wno-missing-field-initializers \
             -DKNE_EMUL -D_GNU_SOURCE -fPIC -Itest -Isrc
EMUL_OBJ   = $(patsubst kernels/%.cu,$(BUILD)/emul/%.o,$(filter-out kernels/lt.cu,$(CU_SRC))) $(BUILD)/emul/cuda_emul.o
CHECK_C    = $(CC) $(ENGINE_CFLAGS) -Isrc test/test_cuda.c

$(BUILD)/emul/%.o: kernels/%.cu kernels/kne_cuda.h test/cuda_emul.h $(wildcard src/*.h) kernels/kernels.mk
	@mkdir -p $(@D)
	$(HOST_CXX) $(EMUL_FLAGS) -x c++ -c $< -o $@

$(BUILD)/emul/cuda_emul.o: test/cuda_emul.cc test/cuda_emul.h kernels/kne_cuda.h kernels/kernels.mk
	@mkdir -p $(@D)
	$(HOST_CXX) $(EMUL_FLAGS) -c $< -o $@

# The emulation as kne_cuda.so, with an empty driver and the engine beside it: what test_server breaks.
$(BUILD)/emul/kne-engine: $(EMUL_OBJ) src/kne_base.c src/kne_error.c $(BUILD)/kne-engine
	$(CC) $(ENGINE_CFLAGS) -fPIC -shared src/kne_base.c src/kne_error.c $(EMUL_OBJ) -o $(BUILD)/emul/kne_cuda.so -lstdc++ -lm
	$(CC) -shared -x c /dev/null -o $(BUILD)/emul/libcuda.so.1
	cp $(BUILD)/kne-engine $@

$(BUILD)/test_cuda: test/test_cuda.c $(wildcard test/*.h) $(EMUL_OBJ) $(BUILD)/libkne_plain.a
	$(CHECK_C) $(EMUL_OBJ) $(BUILD)/libkne_plain.a -o $@ -lstdc++ -lpthread -lm -ldl

$(BUILD)/gpu_check: test/test_cuda.c $(wildcard test/*.h) $(BUILD)/libkne_plain.a
	$(CHECK_C) -DKNE_GPU_CHECK $(BUILD)/libkne_plain.a -o $@ -lpthread -lm -ldl

$(BUILD)/gpu_bench: bench/gpu_bench.c test/plain_tokenizer.h $(BUILD)/libkne_plain.a
	$(CC) $(ENGINE_CFLAGS) -Isrc -Itest $< $(BUILD)/libkne_plain.a -o $@ -lpthread -lm -ldl

gpu-check: kernels $(BUILD)/gpu_check $(BUILD)/gpu_bench
	@test/gpu_check.sh $(BUILD)

.PHONY: kernels gpu-check FORCE
