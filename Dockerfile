# The image of every node, for KubeRay or wherever containers run.
#
#   docker build -t ernie-cluster:0.1.0-cpu .
#   docker build -t ernie-cluster:0.1.0-cuda --build-arg VARIANT=cuda .
#
# Change first: nothing; --build-arg PYTHON_IMAGE=... where images come from a mirror. torch brings CUDA's libraries as
# wheels, so both variants begin alike, and the node's NVIDIA runtime adds the driver.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=cpu
ARG TORCH=2.13.0
ARG RAY=2.60.0
RUN python -m venv /opt/ernie
ENV PATH=/opt/ernie/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN case "$VARIANT" in cpu) index=cpu ;; cuda) index=cu130 ;; *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; esac \
    && pip install "torch==$TORCH" --index-url "https://download.pytorch.org/whl/$index"
RUN pip install "ray[serve]==$RAY"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ernie_cluster ernie_cluster
# hadolint ignore=DL3013  # pyproject.toml bounds them
RUN case "$VARIANT" in cuda) extra='[gpu]' ;; *) extra='' ;; esac && pip install ".$extra"

FROM ${PYTHON_IMAGE}
# wget: what KubeRay's own probes are made of
# hadolint ignore=DL3008  # whichever Debian has mended last
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ernie
COPY --from=build /opt/ernie /opt/ernie
# cupy looks for NCCL where the loader does; the folder is not there in the cpu variant
ENV PATH=/opt/ernie/bin:$PATH \
    LD_LIBRARY_PATH=/opt/ernie/lib/python3.11/site-packages/nvidia/nccl/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/ernie
CMD ["ernie-cluster", "--help"]
