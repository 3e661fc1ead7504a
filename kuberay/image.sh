#!/usr/bin/env bash
# Builds the images of the Dockerfile on the base that images.lock pins: `make image`.
#
#   kuberay/image.sh [--dry-run] [TARGET…]     of cpu, gpu and airgapped; by default cpu and gpu
#
#   TAG        of the images; by default the commit, with -dirty if there are uncommitted changes
#   REGISTRY   to push to, such as europe-west4-docker.pkg.dev/my-project/imagen
#   MODELS     for airgapped: a store that `imagen models pull` has filled
#
# Exit codes: 0 built, 2 something is missing and nothing was built, otherwise that of Docker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
  printf 'image.sh: %s\n' "$*" >&2
  exit 2
}

run() {
  echo "+ $*"
  [ -n "$dry_run" ] || "$@"
}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
[ $# -gt 0 ] || set -- cpu gpu

for target in "$@"; do
  case $target in
    cpu | gpu) ;;
    airgapped)
      [ -d "${MODELS:-}/store" ] || refuse "airgapped needs MODELS, a model store, and '${MODELS:-}' is" \
        "not one. Fill one: imagen models pull --registry configs/models/production.yaml --store /FOLDER NAME…"
      ;;
    *) refuse "there is no target '$target'. Name cpu, gpu or airgapped." ;;
  esac
done
digest=$(sed -n 's/^python: *//p' kuberay/images.lock)
[[ -n $dry_run || $digest =~ ^sha256:[0-9a-f]{64}$ ]] || refuse "kuberay/images.lock has no digest of the base image" \
  "(python: ${digest:-no line}). With a network, run: make image-lock IMAGES=python"
tag=${TAG:-$(git describe --always --dirty --exclude='*')} ||
  refuse "there is no commit to name the images after. Set TAG=."
[ -n "$dry_run" ] || command -v docker >/dev/null || refuse "docker is not on the PATH. Install Docker 23 or newer."

for target in "$@"; do
  image=${REGISTRY:+${REGISTRY%/}/}imagen-$target:$tag
  build=(docker build --target "$target" --build-arg "PYTHON_DIGEST=$digest" --tag "$image")
  [ "$target" != airgapped ] || build+=(--build-context "models=$MODELS")
  run "${build[@]}" .
  [ -z "${REGISTRY:-}" ] || run docker push "$image"
done
