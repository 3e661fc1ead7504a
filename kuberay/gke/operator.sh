#!/usr/bin/env bash
# Usage: kuberay/gke/operator.sh [--dry-run]
#
# Installs the KubeRay operator of kuberay/operator into kuberay-system, or upgrades it to that version.
# Needs github.com, where its manifests are. Refuses a cluster that has GKE's own Ray operator, because
# both would change the same RayService.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings

ADDON=
look ADDON gcloud container clusters describe "$IMAGEN_CLUSTER" --project="$IMAGEN_PROJECT" \
  --location="$IMAGEN_REGION" --format='value(addonsConfig.rayOperatorConfig.enabled)'
[ "$ADDON" != True ] || fail "the cluster $IMAGEN_CLUSTER has the add-on RayOperator. Disable it first:
  gcloud container clusters update $IMAGEN_CLUSTER --location=$IMAGEN_REGION --update-addons=RayOperator=DISABLED"

if missing kubectl --context="$CONTEXT" get namespace kuberay-system; then
  kube create namespace kuberay-system # the network policies admit this namespace
fi
# Server-side, because the CRDs are too large for kubectl's own annotation.
kube apply --server-side --force-conflicts --kustomize="$ROOT/kuberay/operator"
kube wait --for=condition=Established --timeout=60s crd/rayclusters.ray.io crd/rayservices.ray.io
kube --namespace=kuberay-system rollout status deployment/kuberay-operator --timeout=5m
