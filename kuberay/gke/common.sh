# shellcheck shell=bash
# What the scripts beside it share; it runs nothing by itself. Bash 3.2 will do, as macOS has it.
#
# Settings come from the environment, else from site.env, else from site.env.example; whatever the
# manifests say too comes from configs/gke.yaml alone.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
SITE=${IMAGEN_SITE:-$HERE/site.env}
SOURCE=${IMAGEN_SOURCE:-$ROOT/configs/gke.yaml}
PYTHON=${IMAGEN_PYTHON:-$ROOT/.venv/bin/python}
DRY_RUN=
YES=

fail() { # what is wrong with the command line or the settings
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*"; }

usage() { # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

common_option() {
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --yes) YES=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown option: $1 (see --help)" ;;
  esac
}

# --- settings ---

settings() { # NAME...: read all; project, region and each of NAME must have a value
  local file name lacking=
  set -- IMAGEN_PROJECT IMAGEN_REGION "$@"
  for file in "$SITE" "$HERE/site.env.example"; do
    [ ! -e "$file" ] || read_settings "$file"
  done
  for name in "$@"; do
    [ -n "${!name:-}" ] || lacking="$lacking
  $name: $(grep -B1 "^$name=" "$HERE/site.env.example" | sed -n '1s/^# //p')"
  done
  [ -z "$lacking" ] || fail "set in $SITE (copy site.env.example), or in the environment:$lacking"
  CONTEXT="gke_${IMAGEN_PROJECT}_${IMAGEN_REGION}_${IMAGEN_CLUSTER}"
}

read_settings() { # FILE: what has no value yet takes it from there
  local line name
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in '' | '#'*) continue ;; esac
    name=${line%%=*}
    grep -q "^$name=" "$HERE/site.env.example" || fail "$1: no such setting: $line"
    [ -n "${!name:-}" ] || printf -v "$name" '%s' "${line#*=}"
  done <"$1"
}

configured() { # GROUP...: what configs/gke.yaml says; values.py has the groups and their variables
  local values name value
  command -v "$PYTHON" >/dev/null || fail "no $PYTHON: run \`make setup\` first"
  values=$("$PYTHON" "$HERE/values.py" --source "$SOURCE" --overlay "$IMAGEN_OVERLAY" "$@") || exit 2
  while IFS='=' read -r name value; do printf -v "$name" '%s' "$value"; done <<<"$values"
}

# --- commands ---

show() { # COMMAND...: as it can be typed
  local word line=+ quote="'" quoted="'\\''" text=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_.,:/=@%+-]*) word="'${word//$quote/$quoted}'" ;;
    esac
    if [ $((${#line} + ${#word})) -gt 96 ]; then
      text="$text$line \\"$'\n'
      line='   '
    fi
    line="$line $word"
  done
  say "$text$line"
}

run() { # COMMAND...: show it, then run it
  show "$@"
  [ -n "$DRY_RUN" ] || "$@"
}

kube() { # ARGUMENT...: kubectl, on our cluster whatever the current context is
  run kubectl --context="$CONTEXT" "$@"
}

missing() { # COMMAND...: whether what it describes is not there; a dry run takes it so
  say '# unless this finds it:'
  show "$@"
  [ -n "$DRY_RUN" ] || ! "$@" >/dev/null 2>&1
}

present() { # COMMAND...: whether what it describes is there; a dry run takes it so
  say '# if this finds it:'
  show "$@"
  [ -n "$DRY_RUN" ] || "$@" >/dev/null 2>&1
}

ensure() { # gcloud ... VERB ... -- OPTION...: describe it; create it, with the options, if it is missing
  local word created='' describe=() create=()
  for word in "$@"; do
    case $word in
      VERB)
        describe+=(describe)
        create+=(create)
        ;;
      --) created=1 ;;
      *)
        create+=("$word")
        [ -n "$created" ] || describe+=("$word")
        ;;
    esac
  done
  if missing "${describe[@]}"; then run "${create[@]}"; fi
}

look() { # NAME COMMAND...: what the command prints, as variable NAME; in a dry run <NAME>
  local name=$1 value="<$1>"
  shift
  show "$@"
  [ -n "$DRY_RUN" ] || value=$("$@")
  printf -v "$name" '%s' "$value"
}

confirm() { # WORD: go on only if somebody types it
  local answer=
  if [ -z "$DRY_RUN$YES" ]; then
    printf 'Type %s to go on: ' "$1"
    read -r answer || true
    [ "$answer" = "$1" ] || { say 'Nothing was done.' && exit 1; }
  fi
}

# --- what several scripts do ---

# shellcheck disable=SC2034 # for the script that sources this
cpu_nodes() { # CPU_NODES: options of the pool for the head, the ingress pods, Redis and the jobs
  CPU_NODES=(
    --machine-type="$IMAGEN_CPU_MACHINE"
    --image-type=COS_CONTAINERD
    --disk-type=pd-balanced
    --disk-size="$IMAGEN_CPU_DISK_GB"
    --num-nodes=1 # in each zone, to begin with
    --enable-autoscaling
    --total-min-nodes=2 # one node's loss leaves one
    --total-max-nodes="$IMAGEN_CPU_NODES_MAX"
    --node-labels=imagen.dev/pool=cpu # what configs/gke.yaml selects
  )
}

# shellcheck disable=SC2034 # as above
node_account() { # NODE_ACCOUNT: whom the nodes are to Google, also those that GKE makes by itself
  local PROJECT_NUMBER
  look PROJECT_NUMBER gcloud projects describe "$IMAGEN_PROJECT" --format='value(projectNumber)'
  NODE_ACCOUNT="serviceAccount:$PROJECT_NUMBER-compute@developer.gserviceaccount.com"
}
