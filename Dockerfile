# cpn-fast on a GPU. Build it and check that everything works:
#     docker build -t cpn-fast . && docker run --rm --gpus all cpn-fast doctor
# docs/install.md says how to train with it, and which parts of this file have been tested.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# The compiler stays: Triton and torch.compile use it at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/cpn-fast/bin:$PATH
COPY . /src
RUN python3 -m venv /opt/cpn-fast && pip install --no-cache-dir "/src[fast-slic,coco,onnx]" && rm -rf /src

# Not root. With docker run --user "$(id -u):$(id -g)" you own the written files. Then caches need a folder that anyone
# may write to, and torch needs a user name.
ENV HOME=/tmp USER=cpn-fast
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["cpn-fast"]
