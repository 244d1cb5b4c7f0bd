# sft-dist with CUDA, a compiler for packages that come as source, and every package at the release that the tests ran with.
#
#     docker build -t sft-dist .
#     docker run --rm --gpus all --ipc=host -v "$PWD:/work" sft-dist train RUN.yaml
#
# apptainer.def makes the same for clusters; docs/install.md says how to use either, and what was tried.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# python3-dev, g++ and ninja build Triton's kernels, and flash attention where it is added; nothing here is compiled.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sft-dist/source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sft_dist sft_dist
COPY launch launch
COPY ds_configs ds_configs
COPY slurm slurm
COPY examples/presets examples/presets
RUN python3 -m venv /opt/sft-dist/venv \
    && /opt/sft-dist/venv/bin/pip install --no-cache-dir -c constraints.txt torch numpy \
    && /opt/sft-dist/venv/bin/pip install --no-cache-dir -c constraints.txt ".[data]" \
    && /opt/sft-dist/venv/bin/sft-dist --version

ENV PATH=/opt/sft-dist/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["sft-dist"]
CMD ["--help"]
