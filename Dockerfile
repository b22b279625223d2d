# Octavo in a container.
#
#   docker build -t octavo .                                        CPU
#   docker build -t octavo --build-arg MODEL=smollm2-135m-instruct .   the same with a model inside
#   docker build -t octavo --build-arg DEVICE=cuda .                CUDA build of torch
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -v "$PWD/my-model:/models/my-model:ro" octavo /models/my-model
#
# With CUDA add --gpus all, and mount /tmp as --tmpfs /tmp:exec: there Triton puts the launchers that it compiles.
# Several GPUs: NCCL exchanges data over shared memory and Docker's 64 MB are too few; add --shm-size=1g or --ipc=host.

ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# cpu or cuda
ARG DEVICE=cpu
# Where pip finds torch's CPU build. Empty where pip knows a source by itself; not used for cuda.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Further sources of packages; pip reads both from the environment.
ARG PIP_FIND_LINKS
ARG PIP_EXTRA_INDEX_URL

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# The dependencies alone first: they change seldom, and this layer is the big one.
COPY pyproject.toml .
RUN python3 -m venv /opt/octavo \
    && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
       > requirements.txt \
    && if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL $TORCH_INDEX_URL"; fi \
    && /opt/octavo/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY . .
RUN /opt/octavo/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps . \
    && cd / && /opt/octavo/bin/python -m octavo.kernels.cpu.build
# A name for `octavo pull`, to put the model into the image.
ARG MODEL=
ENV OCTAVO_CACHE=/var/lib/octavo
RUN mkdir -p "$OCTAVO_CACHE" && if [ -n "$MODEL" ]; then /opt/octavo/bin/octavo pull "$MODEL"; fi

FROM ${BASE}
ARG DEVICE=cpu
# Triton compiles its launchers at run time, with a C compiler and Python's headers; python:3.11-slim has the headers.
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --uid 1000 --home-dir /tmp --no-create-home octavo
COPY --from=build /opt/octavo /opt/octavo
COPY --from=build /var/lib/octavo /var/lib/octavo
ENV PATH=/opt/octavo/bin:$PATH OCTAVO_CACHE=/var/lib/octavo PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
# Not the source tree: `python -m` would find modules there first.
WORKDIR /tmp
EXPOSE 8000
# Loading and warming up a model takes a while; after that 503 means that the server is past saving its streams.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# SIGTERM drains: give it more than --shutdown-timeout (docker stop --time 40).
STOPSIGNAL SIGTERM
ENTRYPOINT ["octavo", "serve", "--host", "0.0.0.0"]
