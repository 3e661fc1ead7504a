#!/usr/bin/env bash
# Usage: kuberay/gke/secrets.sh [--oauth-file FILE] [--keys-file FILE] [--dry-run]
#
# Creates the Secrets that the prod overlays need: imagen-redis and imagen-ray-token from random bytes,
# imagen-oauth and imagen-keys from files. Values are never printed and never on a command line. An
# existing Secret is left as it is.
#
#   --oauth-file FILE   holds the client secret of Identity-Aware Proxy's OAuth client
#   --keys-file FILE    holds the API keys: `imagen keys create NAME --keys FILE` writes it
#   --dry-run           print the commands, run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OAUTH_FILE='' KEYS_FILE=''
while [ $# -gt 0 ]; do
  case $1 in
    --oauth-file)
      OAUTH_FILE=${2:-}
      [ -s "$OAUTH_FILE" ] || fail "--oauth-file: no such file, or it is empty: $OAUTH_FILE"
      shift
      ;;
    --keys-file)
      KEYS_FILE=${2:-}
      [ -s "$KEYS_FILE" ] || fail "--keys-file: no such file, or it is empty: $KEYS_FILE"
      shift
      ;;
    *) common_option "$1" ;;
  esac
  shift
done
settings
configured service

random_bytes() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
keys_file() { cat "$KEYS_FILE"; }
oauth_file() { tr -d '\r\n' <"$OAUTH_FILE"; } # editors end a file with a newline

absent() { # SECRET
  missing kubectl --context="$CONTEXT" --namespace="$NAMESPACE" get secret "$1"
}

put() { # SECRET KEY COMMAND: the output of the command is the value
  local create=(
    kubectl --context="$CONTEXT" --namespace="$NAMESPACE"
    create secret generic "$1" --from-file="$2=/dev/stdin"
  )
  say "# reads the value from its standard input ($3):"
  show "${create[@]}"
  [ -n "$DRY_RUN" ] || "$3" | "${create[@]}"
}

if missing kubectl --context="$CONTEXT" get namespace "$NAMESPACE"; then
  kube create namespace "$NAMESPACE" # its labels come with the first deployment
fi
if absent imagen-redis; then put imagen-redis password random_bytes; fi
if absent imagen-ray-token; then put imagen-ray-token auth_token random_bytes; fi
if absent imagen-oauth; then
  [ -n "$OAUTH_FILE$DRY_RUN" ] || fail 'imagen-oauth does not exist: give its value with --oauth-file FILE'
  put imagen-oauth key oauth_file
fi
if absent imagen-keys; then
  [ -n "$KEYS_FILE$DRY_RUN" ] || fail 'imagen-keys does not exist: give its file with --keys-file FILE'
  put imagen-keys keys.yaml keys_file
fi
