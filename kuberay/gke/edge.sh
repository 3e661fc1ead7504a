#!/usr/bin/env bash
# Usage: kuberay/gke/edge.sh [--dry-run]
#
# Creates what the Gateway refers to, from `site` in configs/gke.yaml: a certificate for the host in a map of
# Certificate Manager, and a policy of Cloud Armor against floods. At the end it prints the DNS record that
# proves that you own the host; Google issues the certificate when that record exists.
#
#   --dry-run   print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for option in "$@"; do common_option "$option"; done
settings
configured service site
project=--project="$IMAGEN_PROJECT"

ensure gcloud certificate-manager dns-authorizations VERB "$SERVICE" "$project" -- --domain="$HOST"
ensure gcloud certificate-manager certificates VERB "$SERVICE" "$project" \
  -- --domains="$HOST" --dns-authorizations="$SERVICE"
ensure gcloud certificate-manager maps VERB "$CERTIFICATE_MAP" "$project"
ensure gcloud certificate-manager maps entries VERB "$SERVICE" --map="$CERTIFICATE_MAP" "$project" \
  -- --certificates="$SERVICE" --hostname="$HOST"

# Far above the rate of a person or a batch client: it stops floods, and is not a fair share.
ensure gcloud compute security-policies VERB "$SECURITY_POLICY" "$project"
ensure gcloud compute security-policies rules VERB 1000 --security-policy="$SECURITY_POLICY" \
  "$project" \
  -- --src-ip-ranges='*' --action=throttle --rate-limit-threshold-count=600 \
  --rate-limit-threshold-interval-sec=60 --enforce-on-key=IP --conform-action=allow \
  --exceed-action=deny-429

run gcloud certificate-manager dns-authorizations describe "$SERVICE" "$project" \
  --format='value(dnsResourceRecord.name,dnsResourceRecord.type,dnsResourceRecord.data)'
