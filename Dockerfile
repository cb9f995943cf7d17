# docker build --target cpu .     serves on a CPU; also what `docker build .` makes
# docker build --target cuda .    serves on NVIDIA GPUs
# docker build --target load .    locust, without vLLM
#
# How to run them: docs/deployment.md.

ARG PYTHON_BASE=python:3.12.11-slim-bookworm
# vLLM's own images bring what is hard: its kernels and the build of PyTorch that they need.
ARG CPU_BASE=vllm/vllm-openai-cpu:v0.32.0
ARG CUDA_BASE=vllm/vllm-openai:v0.33.0
# 1: the image carries SmolLM2-135M-Instruct; else it is prepared at the first start.
ARG BAKE_MODEL=""
ARG VERSION=0.1.0
ARG REVISION=""


FROM ${PYTHON_BASE} AS wheel
WORKDIR /source
RUN python3 -m pip install --no-cache-dir build==1.3.0
COPY . .
RUN python3 -m build --wheel --outdir /dist


FROM ${PYTHON_BASE} AS load
RUN useradd --uid 10001 --gid 0 --no-create-home locust \
    && python3 -m pip install --no-cache-dir "locust>=2.40,<3" "httpx>=0.27,<1" "numpy>=1.26,<3" \
    "prometheus-client>=0.20,<1" "pydantic>=2.7,<3" "pyyaml>=6,<7"
WORKDIR /app
COPY loadtests loadtests
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app
USER 10001:0
EXPOSE 8089
STOPSIGNAL SIGTERM
ENTRYPOINT ["locust", "--locustfile=loadtests/locustfile.py"]


FROM ${CUDA_BASE} AS cuda
USER 0
COPY --from=wheel /dist /source/deploy/image/install.sh /tmp/image/

ARG BAKE_MODEL
# Empty means below $HOME, which is the volume. USER is for users that /etc/passwd lacks.
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    ADAPTIVE_HEAD_CACHE=${BAKE_MODEL:+/opt/adaptive-head} \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=adaptive
RUN /tmp/image/install.sh

USER 10001:0
WORKDIR /cache

# Only here, so that a new revision finds the installation in the builder's cache.
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="adaptive-head-server" \
    org.opencontainers.image.description="OpenAI-compatible server that picks its temperature" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/health"]
# A container is reached from outside only; where, is for who runs it to say.
ENTRYPOINT ["adaptive-serve", "--host=0.0.0.0"]


# The same on another base. The last stage is what a build without --target makes.
FROM ${CPU_BASE} AS cpu
USER 0
COPY --from=wheel /dist /source/deploy/image/install.sh /tmp/image/

ARG BAKE_MODEL
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    ADAPTIVE_HEAD_CACHE=${BAKE_MODEL:+/opt/adaptive-head} \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=adaptive
RUN /tmp/image/install.sh

USER 10001:0
WORKDIR /cache

ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="adaptive-head-server" \
    org.opencontainers.image.description="OpenAI-compatible server that picks its temperature" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/health"]
# A container is reached from outside only; where, is for who runs it to say.
ENTRYPOINT ["adaptive-serve", "--host=0.0.0.0"]
