#!/usr/bin/env bash
# Usage: kuberay/gke/registry.sh [--dry-run]
#
# Creates the Artifact Registry repository of the images in configs/gke.yaml, and lets the cluster's nodes
# pull from it and your Docker client push to it.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings
configured registry

ensure gcloud artifacts repositories VERB "$REGISTRY_NAME" --project="$REGISTRY_PROJECT" \
  --location="$REGISTRY_LOCATION" -- --repository-format=docker
node_account
run gcloud artifacts repositories add-iam-policy-binding "$REGISTRY_NAME" \
  --project="$REGISTRY_PROJECT" --location="$REGISTRY_LOCATION" --member="$NODE_ACCOUNT" \
  --role=roles/artifactregistry.reader --format=none
run gcloud auth configure-docker "$REGISTRY_LOCATION-docker.pkg.dev" --quiet
