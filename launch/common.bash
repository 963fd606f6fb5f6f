# What the launch scripts have in common; they source it from the top of the repository.
# shellcheck shell=bash

bash_version=$((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1]))
dry_run=no
quiet=no # of checks that find nothing
told=no # that nothing can be checked
# shellcheck disable=SC2034 # read by the scripts
checked=no
dpo_jax=${DPO_JAX_VENV:-.venv}/bin/dpo-jax
poll=${DPO_JAX_POLL_SECONDS:-30}
# The configurations that hh_pipeline.sh reads.
sft_config=${DPO_JAX_SFT_CONFIG:-configs/hh_pythia28_sft.yaml} dpo_config=${DPO_JAX_DPO_CONFIG:-configs/hh_pythia28_dpo.yaml}

say() { printf '[%s] %s\n' "${0##*/}" "$1" >&2; }

# die MESSAGE [EXIT CODE]
die() {
  say "error: $1"
  exit "${2:-2}"
}

# Words as a shell reads them back: what is printed can be pasted, and what goes through ssh arrives as it was.
quoted() {
  local word whole quote="'" escaped="'\\''" between=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        whole='' # not ${word//...}: versions of bash differ in how they quote there
        while [ "$word" != "${word#*"$quote"}" ]; do
          whole+=${word%%"$quote"*}$escaped
          word=${word#*"$quote"}
        done
        printf "%s'%s'" "$between" "$whole$word"
        ;;
      *) printf '%s%s' "$between" "$word" ;;
    esac
    between=' '
  done
}

# Runs a command; under --dry-run prints it and runs nothing.
run() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Runs a command to its end and returns its exit code. SIGTERM and Ctrl-C reach it as one SIGTERM: it saves and ends with 143.
supervised() {
  local code=0 child='' asked='' never
  trap 'asked=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
  set -m # in a process group of its own: Ctrl-C goes to a whole group, and a second signal would stop it before it has saved
  "$@" &
  child=$!
  set +m
  [ -z "$asked" ] || kill -TERM "$child" 2>/dev/null || true
  # Not `wait` alone: a signal that comes just before it blocks would be heard only when the command has ended. Nor `sleep`:
  # bash can lose a Ctrl-C that comes just when a program in the foreground ends. What is read here never comes.
  if [ "$bash_version" -ge 401 ]; then
    exec {never}<> <(:)
    while kill -0 "$child" 2>/dev/null; do read -rt 0.2 -u "$never" || true; done
    exec {never}>&-
  else # macOS has bash 3.2
    while kill -0 "$child" 2>/dev/null; do sleep 0.2; done
  fi
  wait "$child" || code=$?
  trap - TERM INT
  return "$code"
}

# option NAME WORD...: the value of an option among the words, as `--name value` or `--name=value`; nothing where it is not. The
# last one counts, as it does for the programs that read them.
option() {
  local name=$1 value=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$name") value=${2:-} ;;
      "$name"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# refuse_late WORD...: refuses words for the program that ask to run nothing: it would read them only once a machine is rented
# or set up.
refuse_late() {
  local word
  for word in "$@"; do
    case $word in
      --dry-run | -h | --help) die "$word must come first: $0 $word ... (here it would go to the program)" ;;
      --check | --check-*) die "$word: the command is checked anyway; $0 --dry-run ... does only this, and prints what would run" ;;
    esac
  done
}

# Fills `program` with what a command line asks for: a command of dpo-jax, or the whole chain of hh_pipeline.sh. `settings` is what
# the chain needs in front of it on another machine.
program_of() {
  local name
  refuse_late "$@"
  settings=()
  case ${1:-} in
    '' | -*) die "a COMMAND is missing, such as: dpo configs/hh_pythia28_dpo.yaml (--help explains)" ;;
    hh_pipeline.sh)
      program=(./launch/hh_pipeline.sh "${@:2}")
      for name in DPO_JAX_SFT_CONFIG DPO_JAX_DPO_CONFIG; do
        [ -z "${!name:-}" ] || settings+=("$name=${!name}")
      done
      [ ${#settings[@]} = 0 ] || settings=(env "${settings[@]}")
      ;;
    *) program=("$dpo_jax" "$@") ;;
  esac
}

# The same for several hosts, which join each other. The commands are ON_MANY_HOSTS of dpo_jax/cli/command_table.py.
program_on_many_hosts() {
  local commands='sft, refs, dpo, eval, sample, label, reward-model, ppo, online, optimum, frontier, hh_pipeline.sh'
  case ${1:-} in
    '' | -*) ;;
    *) [[ ", $commands," == *", $1,"* ]] || die "$1: not a command that runs on many hosts ($commands)" ;;
  esac
  program_of "$@"
  case " ${*%%=*} " in *' --distributed '* | *' --run.distributed '*) ;; *) program+=(--distributed auto) ;; esac
}

# add_settings FOLDER: adds to `settings` what is set here and holds for the hosts, too; a folder only if it is on FOLDER, the disk
# that they share, and the cache of programs also if it is in a bucket. Keys are sent in other ways.
add_settings() {
  local name found=()
  for name in JAX_COMPILATION_CACHE_DIR HF_HOME LIBTPU_INIT_ARGS DPO_JAX_TRACEBACK WANDB_ENTITY WANDB_NAME TRACKIO_SPACE_ID; do
    [ -n "${!name:-}" ] || continue
    case $name:${!name} in
      JAX_COMPILATION_CACHE_DIR:gs://*) ;;
      JAX_COMPILATION_CACHE_DIR:* | HF_HOME:*)
        [ "${!name%/}" = "$1" ] || lies_in "$1" "${!name}" ||
          { say "$name=${!name} is not set on the hosts: it is not on $1" && continue; }
        ;;
    esac
    found+=("$name=${!name}")
  done
  [ ${#found[@]} = 0 ] || settings=(${settings[@]+"${settings[@]}"} env "${found[@]}")
}

# Fills `configs` with the configuration files that `program` reads.
configs_of_program() {
  configs=("${program[2]:-}")
  # shellcheck disable=SC2034 # read by the scripts
  [[ ${program[0]} != */hh_pipeline.sh ]] || configs=("$sft_config" "$dpo_config")
}

# The dpo-jax of this machine; nothing where there is none.
dpo_jax_here() {
  local here=${DPO_JAX_VENV:-.venv}/bin/dpo-jax
  if [ -x "$here" ]; then echo "$here"; else command -v dpo-jax || true; fi
}

# check_first [--check-OPTION ...] -- PROGRAM...: whether a command of dpo-jax, or hh_pipeline.sh, could run, before anything is
# rented or installed. Ends with the message and the exit code of `dpo-jax COMMAND CONFIG.yaml --check`. Where there is no dpo-jax
# only the files are looked for: then `checked` stays "no".
check_first() {
  local options=(--check) with
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  with=$(dpo_jax_here)
  if [ -z "$with" ]; then
    look_for_files "$@"
    return
  fi
  # shellcheck disable=SC2034 # read by the scripts
  checked=yes
  [[ $1 != */hh_pipeline.sh ]] || with=$1 # which finds the same dpo-jax
  if [ "$quiet" = yes ]; then
    "$with" "${@:2}" "${options[@]}" >/dev/null || exit $?
  else
    "$with" "${@:2}" "${options[@]}" >&2 || exit $?
  fi
}

# again_if_locked COMMAND...: runs a check, up to ten times if it ends with 73, $poll seconds apart. A file server may keep the run
# lock of a lost host until it notices the loss.
again_if_locked() {
  local try code=0
  for try in 1 2 3 4 5 6 7 8 9 10; do
    code=0
    ("$@") || code=$? # check_first exits
    [ "$code" = 73 ] && [ "$dry_run" = no ] && [ "$try" -lt 10 ] || break
    say "the run directory is locked, perhaps still by a host that is lost: checking again (try $try of 10)"
    sleep "$poll"
  done
  return "$code"
}

look_for_files() {
  if [[ $1 == */hh_pipeline.sh ]]; then
    "$@" --dry-run >/dev/null || exit $? # which looks for them, and says that this is all
    return
  fi
  [ -f "${3:-}" ] || die "${3:-no configuration given}: no such file"
  [ "$told" = yes ] || say "only the presence of the configuration is checked, not options, data and models: dpo-jax is missing (./launch/env.sh installs it)"
  told=yes
}

# devices_of TYPE: the devices of a TPU slice, as JAX counts them; nothing for a type that is not known. v2 to v4 and v5p are named
# after their cores: of v2 and v3 each is a device, of the others two are.
devices_of() {
  local number=${1##*-}
  case $1 in
    v5litepod-*[0-9] | v6e-*[0-9] | v2-*[0-9] | v3-*[0-9]) echo "$number" ;;
    v4-*[0-9] | v5p-*[0-9]) echo $((number / 2)) ;;
  esac
}

# lies_in FOLDER PATH: as the names say. What ".." means only the machine knows that has the folder: no path with it does.
lies_in() {
  case $2 in
    */../* | */..) return 1 ;;
    "$1"/?*) return 0 ;;
    *) return 1 ;;
  esac
}

# check_run_dir FOLDER WORD...: a run that is to continue on another machine must lie on the disk that all of them share.
check_run_dir() {
  local run_dir
  run_dir=$(option --run.dir "${@:2}")
  ! lies_in "$1" "$run_dir" || return 0
  case $run_dir in
    '') die "no --run.dir: give one in $1, the disk that the hosts share and that is still there after a preemption" ;;
    gs://*) die "--run.dir $run_dir: dpo-jax writes to folders, not to buckets; give one in $1, which the hosts share" ;;
    "$1"/*) die "--run.dir $run_dir: write it without \"..\", as a folder in $1, the disk that the hosts share" ;;
    *) die "--run.dir $run_dir is not in $1, the disk that the hosts share and that is still there after a preemption" ;;
  esac
}
