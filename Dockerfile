# PostgreSQL 15 with kne and the bundled model.
#   docker build -t kne .                       on the CPU
#   docker build -t kne-cuda --target cuda .    with the GPU backend; run with --gpus all
#   docker run -d --name kne -v kne:/var/lib/postgresql kne && docker exec -it kne psql
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc make libc6-dev postgresql-server-dev-15 \
    libpcre2-dev libutf8proc-dev libcjson-dev libssl-dev
COPY . /src
RUN make -C /src && make -C /src install DESTDIR=/out

# Built where the toolkit is; the runtime is linked in, cuBLASLt is not. glibc of Ubuntu 22.04 is older than that of bookworm.
FROM nvidia/cuda:12.8.1-devel-ubuntu22.04 AS kernels
COPY . /src
RUN make -C /src -f src/engine.mk BUILD=build kernels && mkdir /out \
    && cp /src/build/kne_cuda.so /usr/local/cuda/lib64/libcublasLt.so.12 /out/

FROM debian:bookworm-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-common \
    && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf \
    && apt-get install -y --no-install-recommends postgresql-15 libpcre2-8-0 libutf8proc2 libcjson1 libssl3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out /
COPY models/atlas /srv/models/atlas
COPY examples /usr/share/doc/kne/examples
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/15
USER postgres
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
# On a Unix socket only; who wants more sets listen_addresses and pg_hba.conf.
CMD ["sh", "-c", "[ -s $PGDATA/PG_VERSION ] || { initdb -A peer -E UTF8 --locale=C.UTF-8 && printf '%s\\n' \
\"shared_preload_libraries = 'kne'\" \"kne.model_dir = '/srv/models'\" \"listen_addresses = ''\" >>$PGDATA/postgresql.conf; }; exec postgres"]

FROM cpu AS cuda
COPY --from=kernels /out/kne_cuda.so /usr/lib/postgresql/15/lib/
COPY --from=kernels /out/libcublasLt.so.12 /usr/lib/x86_64-linux-gnu/
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What `docker build` without --target makes.
FROM cpu
