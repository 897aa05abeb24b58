# syntax=docker/dockerfile:1
# Two images of one file, for BuildKit, which builds only the stages that it needs:
#
#   docker build -t gurukul:cuda .                                      an NVIDIA card; CUDA_COMPUTE_CAP is the card's
#   docker build -t gurukul:cpu --build-arg CPU=1 .                     no card
#
# CUDA_COMPUTE_CAP: 75 for a T4, 86 for an RTX 30, 89 for an RTX 40 or an L4, 90 for an H100. Part of the kernels is
# machine code for that one generation, so an image serves one. The driver comes from the host, through the NVIDIA
# Container Toolkit (docker run --gpus all).
#
# In a container the server listens on all addresses, so it wants API keys and does not start without: give
# GURUKUL_API_KEYS. scripts/rootfs.sh lays the CPU image out without Docker, from these very lines, and runs it.

ARG CPU=0
ARG CUDA=13.0.2
ARG RUST=1.95.0

# ---- what compiles: with nvcc, or without

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS toolchain-0
ARG RUST
ENV RUSTUP_TOOLCHAIN=${RUST} CARGO_FEATURES=cuda PATH=/root/.cargo/bin:${PATH}
# The distribution's packages are of one release as it is; a version that is pinned is gone with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc libc6-dev rustup \
    && rm -rf /var/lib/apt/lists/* \
    && rustup toolchain install "${RUST}" --profile minimal

FROM rust:${RUST}-slim-bookworm AS toolchain-1
ARG RUST
ENV RUSTUP_TOOLCHAIN=${RUST} CARGO_FEATURES=""

# hadolint ignore=DL3006
FROM toolchain-${CPU} AS build
ARG CUDA_COMPUTE_CAP=89
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP} CARGO_HOME=/root/.cargo
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY benches benches
COPY examples examples
COPY test_prompts test_prompts
COPY assets assets
COPY configs configs
COPY src src
# The dependencies are kept between builds in the mounts; what is compiled is copied out of them.
RUN --mount=type=cache,target=/root/.cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin gurukul --features "${CARGO_FEATURES}" \
    && install -D -s target/release/gurukul /out/gurukul

# ---- what runs: with CUDA's libraries, or without

FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS base-0

FROM debian:12.12-slim AS base-1

# hadolint ignore=DL3006
FROM base-${CPU} AS runtime
LABEL org.opencontainers.image.title="gurukul" \
      org.opencontainers.image.description="Serves a small language model over HTTP and trains LoRA adapters beside it" \
      org.opencontainers.image.licenses="Apache-2.0"
# Certificate authorities, for hubs, buckets and sources; everything else is in the binary. The user has a fixed number,
# so that the owner of a volume does not depend on the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 gurukul \
    && useradd --uid 10001 --gid gurukul --no-create-home --home-dir /data --shell /usr/sbin/nologin gurukul \
    && install -d -o gurukul -g gurukul /data
WORKDIR /opt/gurukul
COPY LICENSE README.md ./
COPY configs configs
COPY assets/phrasebook assets/phrasebook
COPY scripts/smoke.sh scripts/smoke.sh
COPY --from=build /out/gurukul /usr/local/bin/gurukul
ENV GURUKUL_HOST=0.0.0.0 GURUKUL_PORT=8110 GURUKUL_DATA_DIR=/data HF_HOME=/data/huggingface
USER 10001:10001
VOLUME /data
EXPOSE 8110
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 CMD ["gurukul", "health"]
ENTRYPOINT ["gurukul"]
CMD ["serve"]
