#!/usr/bin/env bash
# Usage: kuberay/gke/cluster.sh [--dry-run]
#
# Creates a regional GKE cluster with the features that the manifests need, and adds it to your
# kubeconfig: Workload Identity, the Gateway API, managed Prometheus, image streaming, and Dataplane V2,
# which enforces NetworkPolicies and cannot be added later. Its first node pool is for the CPU pods.
# GPU nodes start by themselves, by the rules of the ComputeClass.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings IMAGEN_ZONES

run gcloud services enable --project="$IMAGEN_PROJECT" artifactregistry.googleapis.com \
  certificatemanager.googleapis.com compute.googleapis.com container.googleapis.com \
  containerfilesystem.googleapis.com iamcredentials.googleapis.com iap.googleapis.com \
  monitoring.googleapis.com storage.googleapis.com

# For logs and metrics of nodes: new projects give this account no role.
node_account
run gcloud projects add-iam-policy-binding "$IMAGEN_PROJECT" --member="$NODE_ACCOUNT" \
  --role=roles/container.defaultNodeServiceAccount --condition=None --format=none

cpu_nodes
ensure gcloud container clusters VERB "$IMAGEN_CLUSTER" --project="$IMAGEN_PROJECT" \
  --location="$IMAGEN_REGION" \
  -- --node-locations="$IMAGEN_ZONES" --release-channel=regular --enable-ip-alias \
  --enable-dataplane-v2 --workload-pool="$IMAGEN_PROJECT.svc.id.goog" --gateway-api=standard \
  --enable-managed-prometheus --enable-image-streaming "${CPU_NODES[@]}"
run gcloud container clusters get-credentials "$IMAGEN_CLUSTER" --project="$IMAGEN_PROJECT" \
  --location="$IMAGEN_REGION"
