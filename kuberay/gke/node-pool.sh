#!/usr/bin/env bash
# Usage: kuberay/gke/node-pool.sh cpu|gpu [--dry-run]
#
# Adds node pools to an existing cluster.
#
#   cpu         the pool that cluster.sh creates with a new cluster
#   gpu         GPU pools: one of spot nodes if gpu.spot_first, and one on demand. Only if GKE must not
#               create pools by itself: then add the component kuberay/gke/manual-pool to your overlay.
#               Sizes are those of the ComputeClass, from configs/gke.yaml.
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

POOL=
for option in "$@"; do
  case $option in
    cpu | gpu) POOL=$option ;;
    *) common_option "$option" ;;
  esac
done
[ -n "$POOL" ] || fail 'which pool, cpu or gpu? (see --help)'
settings IMAGEN_ZONES

add_pool() { # NAME OPTION...
  local name=$1
  shift
  ensure gcloud container node-pools VERB "$name" --project="$IMAGEN_PROJECT" \
    --location="$IMAGEN_REGION" --cluster="$IMAGEN_CLUSTER" \
    -- --node-locations="$IMAGEN_ZONES" --workload-metadata=GKE_METADATA \
    --enable-image-streaming "$@"
}

if [ "$POOL" = cpu ]; then
  cpu_nodes
  add_pool imagen-cpu "${CPU_NODES[@]}"
  exit
fi

configured gpu
for kind in $GPU_KINDS; do
  nodes=(
    --machine-type="$GPU_MACHINE"
    --accelerator="$GPU_ACCELERATOR"
    --image-type=COS_CONTAINERD # the driver's installer needs it
    --disk-type="$GPU_DISK_TYPE"
    --disk-size="$GPU_DISK_GB"
    --ephemeral-storage-local-ssd="count=$GPU_SSD_COUNT" # the models' emptyDir is there
    --num-nodes=0
    --enable-autoscaling
    --total-min-nodes=0
    --total-max-nodes="$GPU_NODES_MAX" # enough for both clusters of an upgrade
    --location-policy=ANY # whichever zone has one
    --node-labels="cloud.google.com/compute-class=$COMPUTE_CLASS,imagen.dev/pool=gpu"
    --node-taints="cloud.google.com/compute-class=$COMPUTE_CLASS:NoSchedule"
  )
  [ "$kind" = on-demand ] || nodes+=(--spot)
  add_pool "$COMPUTE_CLASS-$kind" "${nodes[@]}"
done
