#!/usr/bin/env bash
# Applies an overlay to the cluster of kubectl's current context: `make deploy OVERLAY=prod`.
#
#   kuberay/deploy.sh [--dry-run] [--context NAME] OVERLAY
#
# Everything is checked before anything is applied; --dry-run ends there. What is made for GKE goes to
# the cluster that kuberay/gke/site.env means, and nothing else goes to GKE, unless --context names
# where.
# Exit codes: 0 applied, or would be; 1 the manifests or the cluster are not ready; 2 usage.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$root/.venv/bin:$PATH

refuse() {
  printf 'deploy.sh: %s\n' "$*" >&2
  exit 1
}

usage() {
  local known
  known=$(cd "$root/kuberay/overlays" && printf '%s ' */kustomization.yaml)
  printf 'deploy.sh: %s Usage: deploy.sh [--dry-run] [--context NAME] OVERLAY, one of: %s\n' \
    "$1" "${known//\/kustomization.yaml/}" >&2
  exit 2
}

# The context cannot change under way.
kube() { kubectl --context "$context" "$@"; }

# Of the manifests, `NAMESPACE SERVICE google|any STRATEGY IMAGE…`: whether only GKE has such kinds,
# how pods are replaced, and images that no node pulls. Then `KIND/NAME` of every object.
objects() {
  "$python" - "$1" <<'PYTHON'
import sys
import yaml

with open(sys.argv[1]) as file:
    found = [one for one in yaml.safe_load_all(file) if one]
service = next(one for one in found if one["kind"] == "RayService")
about, cluster = service["metadata"], service["spec"]["rayClusterConfig"]
google = (".gke.io/", "cloud.google.com/", "monitoring.googleapis.com/")
for_gke = any(part in one["apiVersion"] for one in found for part in google)
groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
ours = [one for group in groups for one in group["template"]["spec"]["containers"]]
local = {one["image"] for one in ours if one.get("imagePullPolicy") == "Never"}
strategy = service["spec"]["upgradeStrategy"]["type"]
where = "google" if for_gke else "any"
print(about["namespace"], about["name"], where, strategy, *sorted(local))
for one in found:
    print(f"{one['kind']}/{one['metadata']['name']}")
PYTHON
}

# Marks the pods with what they are made of: the images' ids, which a new build changes under the same
# tag, and their definition. Prints the mark.
mark() {
  "$python" - "$1" "$2" <<'PYTHON'
import hashlib
import sys
import yaml

with open(sys.argv[1]) as file:
    found = [one for one in yaml.safe_load_all(file) if one]
cluster = next(one for one in found if one["kind"] == "RayService")["spec"]["rayClusterConfig"]
mark = hashlib.sha256((sys.argv[2] + yaml.safe_dump(cluster)).encode()).hexdigest()[:16]
about = cluster["headGroupSpec"]["template"]["metadata"]
about["annotations"] = about.get("annotations", {}) | {"imagen.dev/made-of": mark}
with open(sys.argv[1], "w") as file:
    yaml.safe_dump_all(found, file)
print(mark)
PYTHON
}

# Ends the Ray clusters whose pods are marked otherwise; KubeRay starts one as it was applied. Only on
# a machine of one's own: elsewhere, with upgradeStrategy None, somebody chooses the moment.
replace_clusters() {
  local clusters name mark
  clusters=$(kube --namespace "$namespace" get raycluster \
    --selector "ray.io/originated-from-cr-name=$service" --output go-template='{{range .items -}}
      {{.metadata.name}} {{with .spec.headGroupSpec.template.metadata.annotations -}}
      {{index . "imagen.dev/made-of"}}{{end}}{{"\n"}}{{end}}') || return
  while read -r name mark; do
    [ -z "$name" ] || [ "$mark" = "$1" ] || kube --namespace "$namespace" delete raycluster "$name"
  done <<<"$clusters"
}

# The context that kuberay/gke/cluster.sh made, after the settings.
site_context() (
  # shellcheck source=/dev/null
  source "$root/kuberay/gke/common.sh"
  settings
  # shellcheck disable=SC2153 # which settings gave a value
  echo "$CONTEXT"
)

# The overlay and the cluster go together.
check_context() {
  local there else="or, if you mean it: kuberay/deploy.sh --context $context $overlay"
  if [ "$google" != google ]; then
    [[ $context != gke_* ]] ||
      refuse "$overlay is not for GKE, and kubectl is at $context, where it would replace what runs." \
        "Choose another: kubectl config use-context NAME; $else"
    return
  fi
  there=$(site_context) ||
    refuse "$overlay is for GKE, and which cluster is meant is not known (above). Say it there; $else"
  [ "$context" = "$there" ] ||
    refuse "kubectl is at $context; for $overlay, kuberay/gke/site.env and the environment mean $there." \
      "Run: kubectl config use-context $there; $else"
}

# `NAME KEY` of every Secret in validate's report.
secrets() {
  "$python" - "$1" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as file:
    reports = json.load(file)["manifests"]
for name, keys in reports[0]["secrets"].items():
    for key in keys:
        print(name, key)
PYTHON
}

# The command that makes a Secret with a key, or adds the key to those it has.
remedy() {
  local name=$1 key=$2 keys=$3 make="$typed --namespace $namespace create secret generic $1"
  if [ -n "$keys" ]; then
    echo "$typed --namespace $namespace edit secret $name"
    return
  fi
  case $name in
    # Random, because both ends read it from there.
    imagen-ray-token | imagen-redis) echo "$make --from-literal=$key=\"\$(openssl rand -hex 32)\"" ;;
    *) echo "$make --from-file=$key=FILE" ;;
  esac
}

dry_run='' context=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --context)
      [ -n "${2:-}" ] || usage "Which context?"
      context=$2
      shift
      ;;
    *) break ;;
  esac
  shift
done
overlay=${1:-}
if [ $# -ne 1 ] || [ -z "$overlay" ]; then usage "Which overlay?"; fi
[ -f "$root/kuberay/overlays/$overlay/kustomization.yaml" ] || usage "There is no overlay '$overlay'."

command -v kubectl >/dev/null ||
  refuse "kubectl is not on the PATH. Install it: kubernetes.io/docs/tasks/tools"
imagen=$(command -v imagen) || refuse "imagen is not on the PATH. Run: make setup"
python=$(dirname "$imagen")/python
named=$context
typed="kubectl${named:+ --context $named}" # for commands that we only show
[ -n "$context" ] || context=$(kubectl config current-context 2>/dev/null) ||
  refuse "kubectl knows no cluster. Run: gcloud container clusters get-credentials NAME --location REGION"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
manifests=$scratch/manifests.yaml
echo "Overlay $overlay, to the cluster of the context $context."

imagen kuberay render --check --source "$root/configs/gke.yaml" --folder "$root/kuberay" ||
  refuse "the manifests are not what configs/gke.yaml says (above). Run: make manifests"
kubectl kustomize "$root/kuberay/overlays/$overlay" >"$manifests" ||
  refuse "kustomize refuses the overlay (above)."
about=$(objects "$manifests")
read -r namespace service google strategy local_images <<<"$about"
[ -n "$named" ] || check_context

if [ -n "$local_images" ]; then
  # shellcheck disable=SC2086 # several
  ids=$(docker image inspect --format '{{.Id}}' $local_images) ||
    refuse "$overlay runs images of this machine, and they are not here (above). Run: make image-dev"
  made_of=$(mark "$manifests" "$ids")
fi

# The fields are checked against the cluster's own definitions, those of them that it has.
mkdir "$scratch/crds"
kube get crd --ignore-not-found --output yaml \
  rayservices.ray.io rayclusters.ray.io \
  gateways.gateway.networking.k8s.io httproutes.gateway.networking.k8s.io \
  gcpbackendpolicies.networking.gke.io healthcheckpolicies.networking.gke.io \
  podmonitorings.monitoring.googleapis.com computeclasses.cloud.google.com \
  >"$scratch/crds/cluster.yaml" || refuse "the cluster of $context does not answer (above)."
grep -q 'name: rayservices\.ray\.io$' "$scratch/crds/cluster.yaml" ||
  refuse "the cluster has no KubeRay. Install the operator first: kuberay/README.md says how."

validate=(imagen kuberay validate --crds "$scratch/crds" "$manifests")
if [ "$google" != google ]; then # GKE's nodes come when they are needed
  nodes=$(kube get nodes --output go-template='{{range .items -}}
    cpu={{.status.allocatable.cpu}},memory={{.status.allocatable.memory}}{{"\n"}}{{end}}') ||
    refuse "the nodes cannot be looked up (above)."
  for node in $nodes; do validate+=(--node "$node"); done
fi
if ! "${validate[@]}" --json >"$scratch/report.json" 2>/dev/null; then
  "${validate[@]}" || true
  refuse "$overlay is not ready (above), and nothing was applied. Fill in configs/gke.yaml, run" \
    "make image-lock for images and imagen models resolve for models; then make manifests"
fi

exists=$(kube get namespace "$namespace" --ignore-not-found --output name)
missing=
wanted=$(secrets "$scratch/report.json")
while read -r name key; do
  [ -n "$name" ] || continue
  # Names of keys, never what they hold.
  # shellcheck disable=SC2016 # the dollars are the template's
  keys=$(kube --namespace "$namespace" get secret "$name" --ignore-not-found \
    --output go-template='{{range $key, $_ := .data}}{{$key}} {{end}}') ||
    refuse "Secrets cannot be looked up (above)."
  [[ " $keys" == *" $key "* ]] && continue
  [ -n "$exists$missing" ] || echo "  $typed create namespace $namespace" >&2
  echo "  $(remedy "$name" "$key" "$keys")" >&2
  missing+="${missing:+, }$name (key $key)"
done <<<"$wanted"
[ -z "$missing" ] || refuse "the namespace $namespace lacks Secrets, and nothing was applied: $missing." \
  "Make them as above, or with kuberay/gke/secrets.sh."

if [ -z "$exists" ]; then
  echo "It makes:"
  sed '1d; s/^/  /' <<<"$about"
else
  echo "It changes:"
  code=0
  # A dry run on the server, too: admission and its own rules are asked.
  kube diff --server-side --filename "$manifests" || code=$?
  [ "$code" -ne 0 ] || echo "  nothing"
  [ "$code" -le 1 ] || refuse "the cluster refuses the manifests (above), and nothing was applied."
fi
if [ -n "$dry_run" ]; then
  echo "Dry run: nothing was applied."
  exit 0
fi
if [[ -n $local_images && $context = kind-* ]]; then
  # shellcheck disable=SC2086 # several
  kind load docker-image $local_images --name "${context#kind-}" || refuse "kind stopped (above)."
elif [ -n "$local_images" ]; then
  echo "Its nodes must have $local_images already, as built last."
fi
kube apply --server-side --filename "$manifests" ||
  refuse "kubectl stopped (above); what stands before that was applied. Correct it, and run this again"
if [[ -n $local_images && $strategy = None ]]; then replace_clusters "$made_of"; fi
echo "Applied. To wait until it serves:"
echo "  $typed --namespace $namespace wait rayservice/$service --for=condition=Ready --timeout=30m"
