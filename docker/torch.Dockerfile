# syntax=docker/dockerfile:1
# The jobs without Spark: training, kNN, evaluation, release; also the MLflow server.
#   docker build -f docker/torch.Dockerfile --build-arg DEVICE=cpu -t crane-torch .
#   docker build -f docker/torch.Dockerfile --build-arg DEVICE=cuda -t crane-torch-cuda .
# CUDA comes with the wheels (torch, faiss-gpu); the node provides the driver. `tests/bench/gpu.sh` of a clone that is
# mounted into the CUDA image tests both on a GPU. The CPU builds of torch are not on the
# package index: name where they are with --build-arg PIP_EXTRA_INDEX_URL=... The hashes of the lock hold either way.
#checkov:skip=CKV_DOCKER_7:The base image's version is the default of PYTHON_IMAGE.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/install.sh docker/install.sh
COPY docker/locks docker/locks
COPY crane_core crane_core
COPY jobs jobs
RUN docker/install.sh "torch-${DEVICE}" /opt/crane

FROM ${PYTHON_IMAGE}
ARG DEVICE=cpu
# At their first launch, Triton compiles the host code of its kernels with a C compiler.
# hadolint ignore=DL3008
RUN if [ "${DEVICE}" = cuda ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin crane \
    && install -d -o crane -g crane /scratch
COPY --from=build /opt/crane /opt/crane
ENV PATH=/opt/crane/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /scratch
# A batch image: healthy when its code and what it was built for can be imported.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s CMD ["python", "-c", "import torch, jobs, crane_core"]
CMD ["crane", "--help"]
