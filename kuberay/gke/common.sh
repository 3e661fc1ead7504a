# shellcheck shell=bash
# Functions of the scripts in this folder; it runs nothing by itself. It needs Bash 3.2, as on macOS.
#
# A setting comes from the environment, otherwise from site.env, otherwise from site.env.example. Values
# that the manifests use come only from configs/gke.yaml.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
SITE=${IMAGEN_SITE:-$HERE/site.env}
SOURCE=${IMAGEN_SOURCE:-$ROOT/configs/gke.yaml}
PYTHON=${IMAGEN_PYTHON:-$ROOT/.venv/bin/python}
DRY_RUN=
YES=

fail() { # MESSAGE...: about the command line or the settings
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*"; }

usage() { # prints the comment at the head of the script
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

settings() { # NAME...: reads all settings; project, region and each NAME must have a value
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
  check_settings
  CONTEXT="gke_${IMAGEN_PROJECT}_${IMAGEN_REGION}_${IMAGEN_CLUSTER}"
}

read_settings() { # FILE: sets the variables that have no value yet
  local line name value number=0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=$(trimmed "$line") # including a carriage return
    case $line in '' | '#'*) continue ;; esac
    name=${line%%=*}
    [[ $line = *=* && $name =~ ^IMAGEN_[A-Z_]+$ ]] ||
      fail "$1, line $number: not NAME=value: $line"
    grep -q "^$name=" "$HERE/site.env.example" || fail "$1, line $number: no such setting: $name"
    value=$(plain "${line#*=}") || fail "$1, line $number: what follows the quotes? $line"
    [ -n "${!name:-}" ] || printf -v "$name" '%s' "$value"
  done <"$1"
}

trimmed() { # TEXT: prints it without surrounding spaces
  local text=$1
  text=${text#"${text%%[![:space:]]*}"}
  printf '%s' "${text%"${text##*[![:space:]]}"}"
}

plain() { # VALUE: prints it without quotes and without a comment, as a shell reads it
  local value quote rest
  value=$(trimmed "$1")
  quote=${value:0:1}
  case $value in
    "'"*"'"* | '"'*'"'*)
      value=${value:1}
      rest=$(trimmed "${value#*"$quote"}")
      case $rest in '' | '#'*) ;; *) return 1 ;; esac
      printf '%s' "${value%%"$quote"*}"
      ;;
    '#'*) ;;
    *) trimmed "${value%%[[:space:]]#*}" ;;
  esac
}

check_settings() { # refuses values that cannot be right
  local name pattern words wrong='' region='[a-z]+-[a-z]+[0-9]+' LC_ALL=C # the same a-z in every language
  [[ ! ${IMAGEN_REGION:-} =~ ^$region$ ]] || region=$IMAGEN_REGION
  while read -r name pattern words; do
    [[ -z ${!name:-} || ${!name} =~ ^($pattern)$ ]] || wrong="$wrong
  $name='${!name}': $words"
  done <<PATTERNS
IMAGEN_PROJECT ([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9] the project's id, not its name or number, such as my-project
IMAGEN_REGION [a-z]+-[a-z]+[0-9]+ a region, such as europe-west4
IMAGEN_ZONES $region-[a-z](,$region-[a-z])* zones of IMAGEN_REGION, with commas and no spaces, such as europe-west4-a,europe-west4-b
IMAGEN_CLUSTER [a-z]([a-z0-9-]{0,38}[a-z0-9])? small letters, digits and hyphens, at most 40
IMAGEN_OVERLAY [a-z0-9][a-z0-9-]* a folder of kuberay/overlays, such as prod
IMAGEN_CPU_MACHINE [a-z][a-z0-9]*(-[a-z0-9]+)+ a machine type, such as e2-standard-8
IMAGEN_CPU_DISK_GB [1-9][0-9]* a whole number
IMAGEN_CPU_NODES_MAX [2-9]|[1-9][0-9]+ a whole number from 2, as one node may be lost
PATTERNS
  [ -z "$wrong" ] || fail "settings (of $SITE, or of the environment) that cannot be right:$wrong"
}

configured() { # GROUP...: sets variables from configs/gke.yaml; see values.py
  local values name value
  command -v "$PYTHON" >/dev/null || fail "no $PYTHON: run \`make setup\` first"
  values=$("$PYTHON" "$HERE/values.py" "$SOURCE" "$IMAGEN_OVERLAY" "$@") || exit 2
  while IFS='=' read -r name value; do printf -v "$name" '%s' "$value"; done <<<"$values"
}

# --- commands ---

show() { # COMMAND...: prints it as you would type it
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

run() { # COMMAND...: prints it, then runs it
  show "$@"
  [ -n "$DRY_RUN" ] || "$@"
}

kube() { # ARGUMENT...: runs kubectl on our cluster, whatever the current context is
  run kubectl --context="$CONTEXT" "$@"
}

missing() { # COMMAND...: whether the thing that it describes is missing; true in a dry run
  say '# unless this finds it:'
  show "$@"
  [ -n "$DRY_RUN" ] || ! "$@" >/dev/null 2>&1
}

present() { # COMMAND...: whether the thing that it describes exists; true in a dry run
  say '# if this finds it:'
  show "$@"
  [ -n "$DRY_RUN" ] || "$@" >/dev/null 2>&1
}

ensure() { # gcloud ... VERB ... -- OPTION...: creates the thing, with the options, if it is missing
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

look() { # NAME COMMAND...: sets NAME to the output of the command; to <NAME> in a dry run
  local name=$1 value="<$1>"
  shift
  show "$@"
  [ -n "$DRY_RUN" ] || value=$("$@")
  printf -v "$name" '%s' "$value"
}

confirm() { # WORD: goes on only if the user types it
  local answer=
  if [ -z "$DRY_RUN$YES" ]; then
    printf 'Type %s to go on: ' "$1"
    read -r answer || true
    [ "$answer" = "$1" ] || { say 'Nothing was done.' && exit 1; }
  fi
}

# --- shared steps ---

# shellcheck disable=SC2034 # used by the script that sources this
cpu_nodes() { # sets CPU_NODES: options of the pool for the head, the ingress pods, Redis and the jobs
  CPU_NODES=(
    --machine-type="$IMAGEN_CPU_MACHINE"
    --image-type=COS_CONTAINERD
    --disk-type=pd-balanced
    --disk-size="$IMAGEN_CPU_DISK_GB"
    --num-nodes=1 # at first, in each zone
    --enable-autoscaling
    --total-min-nodes=2 # one is left if a node is lost
    --total-max-nodes="$IMAGEN_CPU_NODES_MAX"
    --node-labels=imagen.dev/pool=cpu # the nodeSelector in configs/gke.yaml
  )
}

# shellcheck disable=SC2034 # as above
node_account() { # sets NODE_ACCOUNT: the service account of all nodes, including those that GKE adds
  local PROJECT_NUMBER
  look PROJECT_NUMBER gcloud projects describe "$IMAGEN_PROJECT" --format='value(projectNumber)'
  NODE_ACCOUNT="serviceAccount:$PROJECT_NUMBER-compute@developer.gserviceaccount.com"
}
