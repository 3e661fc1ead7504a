#!/usr/bin/env bash
# Usage: kuberay/gke/bucket.sh [--dry-run]
#
# Creates the bucket of published models, site.mirror in configs/gke.yaml, and that of the pictures of jobs,
# serve.args.jobs.storage, which may be the same. It gives pods access by Workload Identity; no account has a
# key. In the models' bucket imagen-worker reads, imagen-publisher reads and adds, and neither may replace or
# delete an object. The account of the ingress pods, site.jobs_account, adds, reads and deletes objects in the
# folder of jobs and signs links to them. Soft delete keeps its default.
#
# Pictures expire once `imagen storage init` has told the bucket so.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings
configured service bucket jobs

bucket() { # NAME
  ensure gcloud storage buckets VERB "gs://$1" --project="$IMAGEN_PROJECT" \
    -- --location="$IMAGEN_REGION" --uniform-bucket-level-access --public-access-prevention
}
bucket "$BUCKET"
[ "$JOBS_BUCKET" = "$BUCKET" ] || bucket "$JOBS_BUCKET"

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

# Only an account of Google's can sign (IAM's signBlob), and it needs that right on itself.
project=--project="$JOBS_PROJECT"
run gcloud services enable iamcredentials.googleapis.com "$project"
if missing gcloud iam service-accounts describe "$JOBS_ACCOUNT" "$project"; then
  run gcloud iam service-accounts create "$JOBS_ACCOUNT_ID" "$project" --display-name='Imagen: pictures of jobs'
fi

on_itself() { # ROLE MEMBER
  run gcloud iam service-accounts add-iam-policy-binding "$JOBS_ACCOUNT" "$project" \
    --role="roles/iam.$1" --member="serviceAccount:$2" --format=none
}
on_itself serviceAccountTokenCreator "$JOBS_ACCOUNT"
on_itself workloadIdentityUser "$IMAGEN_PROJECT.svc.id.goog[$NAMESPACE/imagen-ingress]"

in_bucket() { # ROLE OPTION...
  local role=$1
  shift
  run gcloud storage buckets add-iam-policy-binding "gs://$JOBS_BUCKET" --role="roles/storage.$role" \
    --member="serviceAccount:$JOBS_ACCOUNT" "$@" --format=none
}
folder="projects/_/buckets/$JOBS_BUCKET/objects/$JOBS_FOLDER/"
in_bucket objectUser "--condition=title=imagen-jobs,expression=resource.name.startsWith(\"$folder\")"
# Lists names, which a condition on names cannot allow.
in_bucket legacyBucketReader --condition=None
