# syntax=docker/dockerfile:1
# One image for every node of a cluster, for jobs and for the endpoint. With CUDA:
#
#     docker build --build-arg COMMIT=$(git rev-parse HEAD) --tag aft-ray:0.1.0-gpu .
#     docker build --build-arg COMMIT=$(git rev-parse HEAD) --build-arg DEVICE=cpu --tag aft-ray:0.1.0-cpu .
#     docker run --rm --gpus all --network host --volume $PWD/runs:/runs aft-ray:0.1.0-gpu \
#       aft-ray run --config configs/quickstart.yaml --set run.dir=/runs/quickstart
#
# Packages are those of requirements/<device>.txt and no others. What is sent to the build is an allow list
# (.dockerignore). The image holds no key and listens nowhere by itself. docs/deploy.md says more.
ARG DEVICE=gpu

FROM ubuntu:24.04 AS base-cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# The CUDA of requirements/gpu.txt. Its libraries come with PyTorch's packages; this base tells the driver what to mount.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS base-gpu

# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG DEVICE
ARG COMMIT=unknown

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=30 \
    RAY_USAGE_STATS_ENABLED=0

# gcc and Python's headers: Triton and vLLM compile kernels where they run. wget: the probes of KubeRay.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ gcc libnuma1 python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /bin/bash aft \
    && install --directory --owner aft /opt/aft_ray /runs \
    && python3 -m venv /opt/venv

# The largest packages first, in a layer of their own: they change least.
WORKDIR /opt/aft_ray
COPY requirements/${DEVICE}.txt requirements/
RUN grep --extended-regexp '^(torch|triton|nvidia-|vllm)' requirements/${DEVICE}.txt > /tmp/largest.txt \
    && pip install --no-deps --requirement /tmp/largest.txt
RUN pip install --no-deps --requirement requirements/${DEVICE}.txt

COPY pyproject.toml README.md LICENSE ./
COPY aft_ray aft_ray
RUN printf %s "${COMMIT}" > aft_ray/COMMIT \
    && pip install --no-deps --no-build-isolation --editable .
COPY jobs jobs
COPY configs configs
COPY serve_configs serve_configs

USER 10001
# A Ray node answers, or the endpoint does. Kubernetes has probes of its own (deploy/kuberay/).
HEALTHCHECK --interval=30s --timeout=15s --start-period=15m --retries=4 \
    CMD ["bash", "-c", "wget -qO /dev/null --tries=1 http://127.0.0.1:8000/health || ray health-check"]
CMD ["aft-ray", "--help"]
