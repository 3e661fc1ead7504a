#!/usr/bin/env bash
# Applies an overlay to the cluster of kubectl's current context: `make deploy OVERLAY=prod`.
#
#   kuberay/deploy.sh [--dry-run] [--context NAME] OVERLAY
#
# Everything is checked before anything is applied; --dry-run stops after the checks, and without a cluster makes
# those that need none. An overlay for GKE
# goes to the cluster of kuberay/gke/site.env, and no other overlay goes to GKE, unless --context names
# the cluster.
# Exit codes: 0 applied, or ready to be; 1 the manifests or the cluster are not ready; 2 usage.
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

# Always one context, even if the current one changes meanwhile.
kube() { kubectl --context "$context" "$@"; }

# Prints `NAMESPACE SERVICE google|any STRATEGY IMAGE…` of the manifests: whether they have kinds of GKE,
# how an upgrade replaces pods, and the images that no node pulls. Then `KIND/NAME` of every object.
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

# Marks the pods with a hash of their definition and of the images' ids, because a new build keeps its
# tag. Prints the mark.
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

# Deletes the Ray clusters whose pods have another mark; KubeRay then starts a new one. Only for local
# images: elsewhere, with upgradeStrategy None, the operator of the service chooses the moment.
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

# The context of the cluster that kuberay/gke/cluster.sh created.
site_context() (
  # shellcheck source=/dev/null
  source "$root/kuberay/gke/common.sh"
  settings
  # shellcheck disable=SC2153 # `settings` assigns it
  echo "$CONTEXT"
)

# Refuses an overlay on a cluster that it is not for.
check_context() {
  local there else="or, if you mean it: kuberay/deploy.sh --context $context $overlay"
  if [ "$google" != google ]; then
    [[ $context != gke_* ]] ||
      refuse "$overlay is not for GKE, and kubectl is at $context, where it would replace the running service." \
        "Choose another cluster: kubectl config use-context NAME; $else"
    return
  fi
  there=$(site_context) ||
    refuse "$overlay is for GKE, and site.env does not name the cluster (above). Fill it in; $else"
  [ "$context" = "$there" ] ||
    refuse "kubectl is at $context; for $overlay, kuberay/gke/site.env and the environment name $there." \
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

# Prints the command that creates a Secret with a key, or adds the key to an existing one.
remedy() {
  local name=$1 key=$2 keys=$3 make="$typed --namespace $namespace create secret generic $1"
  if [ -n "$keys" ]; then
    echo "$typed --namespace $namespace edit secret $name"
    return
  fi
  case $name in
    # The last two take any random value: all readers take it from the Secret.
    imagen-keys) echo "imagen keys create NAME --keys $key && $make --from-file=$key" ;;
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
typed="kubectl${named:+ --context $named}" # for commands that are only printed
[ -n "$context" ] || context=$(kubectl config current-context 2>/dev/null) || [ -n "$dry_run" ] ||
  refuse "kubectl knows no cluster. Run: kubectl config use-context NAME (on GKE, gcloud container clusters \
get-credentials NAME --location REGION adds one)"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
manifests=$scratch/manifests.yaml
if [ -n "$context" ]; then
  echo "Overlay $overlay, to the cluster of the context $context."
else
  echo "Overlay $overlay. kubectl knows no cluster: only what needs none is checked."
fi

kubectl kustomize "$root/kuberay/overlays/$overlay" >"$manifests" ||
  refuse "kustomize refuses the overlay (above)."
about=$(objects "$manifests")
read -r namespace service google strategy local_images <<<"$about"
[ -n "$named" ] || [ -z "$context" ] || check_context
imagen kuberay render --check --source "$root/configs/gke.yaml" --folder "$root/kuberay" ||
  refuse "the manifests are out of date (above). Run: make manifests"

not_ready="$overlay is not ready (above), and nothing was applied. Fill in configs/gke.yaml, run \
make image-lock for images and imagen models resolve for models; then make manifests"
if [ -z "$context" ]; then
  imagen kuberay validate "$manifests" || refuse "$not_ready"
  echo "It would create or change:"
  sed '1d; s/^/  /' <<<"$about"
  echo "Dry run without a cluster: KubeRay, images, Secrets, nodes and the API server were not asked."
  exit 0
fi

if [ -n "$local_images" ]; then
  # shellcheck disable=SC2086 # several
  ids=$(docker image inspect --format '{{.Id}}' $local_images) ||
    refuse "$overlay runs images built on this machine, and they are missing (above). Run: make image-dev"
  made_of=$(mark "$manifests" "$ids")
fi

crd=$(kube get crd rayservices.ray.io --ignore-not-found --output name) ||
  refuse "the cluster of $context does not answer (above)."
[ -n "$crd" ] ||
  refuse "the cluster has no KubeRay. Install the operator first: see kuberay/README.md."

validate=(imagen kuberay validate "$manifests")
if [ -n "$local_images" ]; then # other clusters may add nodes as they are needed
  nodes=$(kube get nodes --output go-template='{{range .items -}}
    cpu={{.status.allocatable.cpu}},memory={{.status.allocatable.memory}}{{"\n"}}{{end}}') ||
    refuse "the nodes cannot be listed (above)."
  for node in $nodes; do validate+=(--node "$node"); done
fi
"${validate[@]}" --json >"$scratch/report.json" ||
  refuse "$not_ready"

exists=$(kube get namespace "$namespace" --ignore-not-found --output name)
missing=
needed=$(secrets "$scratch/report.json")
while read -r name key; do
  [ -n "$name" ] || continue
  # The names of the keys, never their values.
  # shellcheck disable=SC2016 # the dollars are the template's
  keys=$(kube --namespace "$namespace" get secret "$name" --ignore-not-found \
    --output go-template='{{range $key, $_ := .data}}{{$key}} {{end}}') ||
    refuse "the Secrets cannot be read (above)."
  [[ " $keys" == *" $key "* ]] && continue
  [ -n "$exists$missing" ] || echo "  $typed create namespace $namespace" >&2
  echo "  $(remedy "$name" "$key" "$keys")" >&2
  missing+="${missing:+, }$name (key $key)"
done <<<"$needed"
[ -z "$missing" ] || refuse "the namespace $namespace lacks Secrets, and nothing was applied: $missing." \
  "Create them with the commands above, or with kuberay/gke/secrets.sh."

if [ -z "$exists" ]; then
  echo "It creates:"
  sed '1d; s/^/  /' <<<"$about"
fi
if [ -z "$exists$dry_run" ]; then
  # The API server checks nothing in a namespace that does not exist. Its labels come with the rest.
  kube create namespace "$namespace" || refuse "kubectl stopped (above), and nothing was applied."
fi
if [ -z "$exists" ] && [ -n "$dry_run" ]; then
  echo "The API server was not asked, because the namespace $namespace does not exist yet."
else
  # Strict: an unknown field is an error. `kubectl diff` would only warn.
  kube apply --server-side --dry-run=server --validate=strict --filename "$manifests" >/dev/null ||
    refuse "the API server refuses the manifests (above), and nothing was applied."
fi
if [ -n "$exists" ]; then
  echo "It changes:"
  code=0
  kube diff --server-side --filename "$manifests" || code=$?
  [ "$code" -ne 0 ] || echo "  nothing"
  [ "$code" -le 1 ] || refuse "kubectl cannot compare (above), and nothing was applied."
fi
if [ -n "$dry_run" ]; then
  echo "Dry run: nothing was applied."
  exit 0
fi
if [[ -n $local_images && $context = kind-* ]]; then
  # shellcheck disable=SC2086 # several
  kind load docker-image $local_images --name "${context#kind-}" || refuse "kind stopped (above)."
elif [[ -n $local_images && $context = k3d-* ]]; then
  # shellcheck disable=SC2086 # several
  k3d image import $local_images --cluster "${context#k3d-}" || refuse "k3d stopped (above)."
elif [ -n "$local_images" ]; then
  echo "Its nodes must already have $local_images, as last built."
fi
kube apply --server-side --filename "$manifests" ||
  refuse "kubectl stopped (above), and what it lists before that was applied. Correct it, and run again."
# The operator has rules of its own, which it checks after the API server has accepted the RayService.
generation=$(kube --namespace "$namespace" get rayservice "$service" \
  --output jsonpath='{.metadata.generation}')
if ! kube --namespace "$namespace" wait "rayservice/$service" --timeout=3m \
  --for=jsonpath='{.status.observedGeneration}'="$generation"; then
  kube --namespace "$namespace" get rayservice "$service" \
    --output jsonpath='{range .status.conditions[?(@.type=="Ready")]}{.reason}: {.message}{"\n"}{end}' >&2
  refuse "the KubeRay operator did not accept the RayService (above); what ran before still runs."
fi
if [[ -n $local_images && $strategy = None ]]; then replace_clusters "$made_of"; fi
echo "Applied. To wait until it serves:"
echo "  $typed --namespace $namespace wait rayservice/$service --for=condition=Ready --timeout=30m"
