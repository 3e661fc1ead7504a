#!/usr/bin/env bash
# Usage: kuberay/gke/bucket.sh [--dry-run]
#
# Creates the bucket of published models, site.mirror in configs/gke.yaml, and gives pods access to it by
# Workload Identity: imagen-worker reads, imagen-publisher reads and adds. No account may replace or
# delete an object, and no account has a key. Soft delete keeps its default.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings
configured service bucket

ensure gcloud storage buckets VERB "gs://$BUCKET" --project="$IMAGEN_PROJECT" \
  -- --location="$IMAGEN_REGION" --uniform-bucket-level-access --public-access-prevention

PROJECT_NUMBER=
look PROJECT_NUMBER gcloud projects describe "$IMAGEN_PROJECT" --format='value(projectNumber)'
pool="projects/$PROJECT_NUMBER/locations/global/workloadIdentityPools/$IMAGEN_PROJECT.svc.id.goog"

allow() { # KUBERNETES-ACCOUNT ROLE
  run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role="roles/storage.$2" \
    --member="principal://iam.googleapis.com/$pool/subject/ns/$NAMESPACE/sa/$1" --format=none
}
allow imagen-worker objectViewer
allow imagen-publisher objectViewer
allow imagen-publisher objectCreator
