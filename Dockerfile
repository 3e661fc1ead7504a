# The images of Imagen: `make image` (kuberay/README.md, "Images"). All targets stand on one base, so
# that Ray and Python are the same to the last digit on every node, which Ray requires.
#
#   cpu         head, ingress and Jobs; with the starter models, a whole service without a GPU
#   gpu         model replicas: the CUDA build of torch, xformers
#   airgapped   gpu, and models that were pulled before

# kuberay/images.lock has it. This value is not a digest, so Docker refuses it.
ARG PYTHON_DIGEST=sha256:unresolved

FROM docker.io/library/python:3.11-slim-bookworm@${PYTHON_DIGEST} AS base
# wget: KubeRay's own readiness probe of workers runs it, in bash. Its version is Debian's: an index
# holds the newest alone, so that a pinned one could soon not be installed any more.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 imagen \
    && useradd --uid 1000 --gid 1000 --create-home imagen \
    && install --directory --owner 1000 --group 1000 /models
WORKDIR /app
COPY constraints.txt ./
# The source is not installed but found: a change of it leaves the packages' layers as they are.
ENV PYTHONPATH=/app IMAGEN_MODELS=/models

# What the images run; .dockerignore says what of it may come here at all.
FROM scratch AS application
COPY LICENSE /
COPY starter_models /starter_models
COPY benchmarks /benchmarks
COPY docs /docs
COPY configs /configs
COPY deployments /deployments
COPY kuberay /kuberay
COPY serve_app /serve_app
COPY cli /cli

FROM base AS gpu
# GKE mounts the driver here, and tells the linker nothing of it.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
# Nine tenths of the image's bytes in a layer that changes with constraints.txt alone.
RUN pip install --no-cache-dir --constraint constraints.txt torch xformers
# Its packages, and the command `imagen`: pyproject.toml finds no source here, and wants a README.
COPY pyproject.toml ./
RUN touch README.md \
    && pip install --no-cache-dir --constraint constraints.txt '.[gpu,c2pa]' \
    && rm -rf README.md build imagen.egg-info
COPY --from=application / ./
USER 1000:1000
# What is missing, or may not be read, shows here and not on a node.
RUN python -c "import serve_app.app, torch, diffusers"
CMD ["imagen", "run"]

# Replaced by `--build-context models=FOLDER`: a store that `imagen models pull` filled.
FROM scratch AS models

FROM gpu AS airgapped
# Not at /models: Kubernetes mounts a node's cache over that.
ENV IMAGEN_MODELS=/weights
COPY --from=models --chown=1000:1000 / /weights/
# An image that lacks a model which is served, or holds a damaged one, is none.
ARG REGISTRY=configs/models/production.yaml
# hadolint ignore=SC2086
RUN served=$(python -c 'import pathlib, sys; from deployments.registry import load_registry as load; \
        print(*(spec.name for spec in load(pathlib.Path(sys.argv[1])).values()))' "$REGISTRY") \
    && imagen models verify --registry "$REGISTRY" $served
USER 1000:1000

FROM base AS cpu
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml ./
RUN touch README.md \
    && pip install --no-cache-dir --constraint constraints.txt '.[c2pa]' \
    && rm -rf README.md build imagen.egg-info
COPY --from=application / ./
USER 1000:1000
# What is missing, or may not be read, shows here and not on a node.
RUN python -c "import serve_app.app, torch, diffusers"
CMD ["imagen", "run"]
