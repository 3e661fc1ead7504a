#!/usr/bin/env bash
# Usage: kuberay/gke/teardown.sh service|cluster|all [--yes] [--dry-run]
#
# Deletes what the other scripts created. It lists what will be lost, and asks.
#
#   service     the objects of the overlay
#   cluster     also the cluster
#   all         also models, pictures of jobs, images, certificate and Cloud Armor policy
#   --yes       do not ask
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WHAT=
for option in "$@"; do
  case $option in
    service | cluster | all) WHAT=$option ;;
    *) common_option "$option" ;;
  esac
done
[ -n "$WHAT" ] || fail 'what, service, cluster or all? (see --help)'
settings
configured service
[ "$WHAT" != all ] || configured bucket jobs registry site

say "This is lost:
  the service in namespace $NAMESPACE of $CONTEXT, with every request in it, the disk of Redis
  with every job, all Secrets there, and the load balancer with its address (DNS names that point to it go stale)"
[ "$WHAT" = service ] || say "  the cluster $IMAGEN_CLUSTER, with whatever else runs on it"
[ "$WHAT" != all ] || say "  every model in gs://$BUCKET and everything else there (kept for the bucket's soft-delete time)
  every picture of a job in gs://$JOBS_BUCKET, and everything else there; the account $JOBS_ACCOUNT
  every image in $REGISTRY_LOCATION-docker.pkg.dev/$REGISTRY_PROJECT/$REGISTRY_NAME
  the certificate of $HOST, its map $CERTIFICATE_MAP, and the policy $SECURITY_POLICY"
confirm "$IMAGEN_CLUSTER"

remove() { # gcloud ... VERB ...: deletes the thing, if it exists
  local word describe=() delete=()
  for word in "$@"; do
    if [ "$word" = VERB ]; then
      describe+=(describe)
      delete+=(delete --quiet)
    else
      describe+=("$word")
      delete+=("$word")
    fi
  done
  if present "${describe[@]}"; then run "${delete[@]}"; fi
}

project=--project="$IMAGEN_PROJECT"
# First the RayService alone: KubeRay clears its state in Redis with a Job, which it cannot create in a
# namespace that is being deleted. All before the cluster, or the load balancer would stay.
if present kubectl --context="$CONTEXT" get namespace "$NAMESPACE"; then
  kube --namespace="$NAMESPACE" delete rayservice "$SERVICE" --ignore-not-found --timeout=5m
  kube --namespace="$NAMESPACE" wait raycluster --all --for=delete --timeout=30m
  kube delete --kustomize="$ROOT/kuberay/overlays/$IMAGEN_OVERLAY" --ignore-not-found --timeout=30m
fi
[ "$WHAT" != service ] || exit 0

remove gcloud container clusters VERB "$IMAGEN_CLUSTER" "$project" --location="$IMAGEN_REGION"
[ "$WHAT" != cluster ] || exit 0

for place in "$BUCKET" "$JOBS_BUCKET"; do
  if present gcloud storage buckets describe "gs://$place" "$project"; then
    run gcloud storage rm --recursive "gs://$place" "$project"
  fi
  [ "$JOBS_BUCKET" != "$BUCKET" ] || break
done
remove gcloud iam service-accounts VERB "$JOBS_ACCOUNT" --project="$JOBS_PROJECT"
remove gcloud artifacts repositories VERB "$REGISTRY_NAME" --project="$REGISTRY_PROJECT" \
  --location="$REGISTRY_LOCATION"
remove gcloud certificate-manager maps entries VERB "$SERVICE" --map="$CERTIFICATE_MAP" "$project"
remove gcloud certificate-manager maps VERB "$CERTIFICATE_MAP" "$project"
remove gcloud certificate-manager certificates VERB "$SERVICE" "$project"
remove gcloud certificate-manager dns-authorizations VERB "$SERVICE" "$project"
remove gcloud compute security-policies VERB "$SECURITY_POLICY" "$project"
