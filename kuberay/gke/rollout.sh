#!/usr/bin/env bash
# Usage: kuberay/gke/rollout.sh [--to REVISION] [--replace-cluster] [--yes] [--dry-run]
#
# Shows the differences, asks, applies them, and waits until KubeRay has finished: a rolling update, or a
# rollback with --to. kuberay/README.md has the cost of each kind of change.
#
#   --to REVISION       the manifests of that commit instead of those of the working tree
#   --replace-cluster   only if ray_service.upgradeStrategy.type is None: afterwards end the running Ray
#                       cluster, so that KubeRay starts one from the new manifests. The service is down
#                       meanwhile.
#   --yes               do not ask
#   --dry-run           print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

REVISION=
REPLACE=
while [ $# -gt 0 ]; do
  case $1 in
    --to)
      REVISION=${2:-}
      git -C "$ROOT" rev-parse --verify --quiet "$REVISION^{commit}" >/dev/null ||
        fail "--to: no such commit: $REVISION"
      shift
      ;;
    --replace-cluster) REPLACE=1 ;;
    *) common_option "$1" ;;
  esac
  shift
done
settings
configured service

field() { # NAME PATH: of the RayService
  look "$1" kubectl --context="$CONTEXT" --namespace="$NAMESPACE" get rayservice "$SERVICE" \
    --output="jsonpath={$2}"
}

# The other checks are for the present Ray and models, and would refuse a commit from before an upgrade.
pinned() { # MANIFESTS: refuses placeholders, and images without a digest
  "$PYTHON" - "$1" <<'PYTHON'
import sys
from pathlib import Path

from kuberay.checks import pods
from kuberay.checks.manifests import read

rules = ("placeholder", "image-unpinned")
found = [one for one in pods.check(read(Path(sys.argv[1]))) if one.rule in rules]
sys.exit("\n".join(map(str, found)) or None)
PYTHON
}

wait_for() { # CONDITION TIMEOUT
  kube --namespace="$NAMESPACE" wait "rayservice/$SERVICE" --for="$1" --timeout="$2"
}

# 1) Apply.
if [ -z "$REVISION" ]; then
  run "$ROOT/kuberay/deploy.sh" --dry-run --context "$CONTEXT" "$IMAGEN_OVERLAY"
  confirm "$IMAGEN_OVERLAY"
  run "$ROOT/kuberay/deploy.sh" --context "$CONTEXT" "$IMAGEN_OVERLAY"
else
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
  say "# kuberay/ of commit $REVISION is unpacked in $place"
  [ -n "$DRY_RUN" ] || git -C "$ROOT" archive "$REVISION" kuberay | tar -x -C "$place"
  run kubectl kustomize "$place/kuberay/overlays/$IMAGEN_OVERLAY" --output="$place/manifests.yaml"
  say '# placeholders and images without a digest are refused; the other checks passed when it was deployed'
  [ -n "$DRY_RUN" ] || pinned "$place/manifests.yaml"
  kube apply --server-side --dry-run=server --validate=strict --filename="$place/manifests.yaml"
  kube diff --server-side --filename="$place/manifests.yaml" || [ $? -eq 1 ]
  confirm "$IMAGEN_OVERLAY"
  kube apply --server-side --filename="$place/manifests.yaml"
fi

# 2) Replace the cluster, if KubeRay does not do so itself.
if [ -n "$REPLACE" ]; then
  STRATEGY='' CLUSTER=''
  field STRATEGY .spec.upgradeStrategy.type
  [ -n "$DRY_RUN" ] || [ "$STRATEGY" = None ] ||
    fail "--replace-cluster is for upgradeStrategy None, and this RayService has '$STRATEGY'"
  field CLUSTER .status.activeServiceStatus.rayClusterName
  say "# This ends $CLUSTER and every request in it; the service is down until the next cluster is ready."
  confirm "$IMAGEN_CLUSTER"
  kube --namespace="$NAMESPACE" delete raycluster "$CLUSTER" --timeout=30m
  wait_for condition=UpgradeInProgress 5m
fi

# 3) Wait, first until KubeRay has accepted the change.
GENERATION=
field GENERATION .metadata.generation
wait_for jsonpath='{.status.observedGeneration}'="$GENERATION" 5m
wait_for condition=UpgradeInProgress=false 60m
wait_for condition=Ready 60m
