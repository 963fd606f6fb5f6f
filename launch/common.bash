# What the launch scripts have in common; they source it from the top of the repository.
# shellcheck shell=bash

dry_run=no
quiet=no # of checks that find nothing
# shellcheck disable=SC2034 # read by the scripts
checked=no
dpo_jax=${DPO_JAX_VENV:-.venv}/bin/dpo-jax

say() { printf '[%s] %s\n' "${0##*/}" "$1" >&2; }

# die MESSAGE [EXIT CODE]
die() {
  say "error: $1"
  exit "${2:-2}"
}

# Words as a shell reads them back: what is printed can be pasted, and what goes through ssh arrives as it was.
quoted() {
  local word quote="'" escaped="'\\''" between=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "%s'%s'" "$between" "${word//"$quote"/"$escaped"}" ;;
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
  exec {never}<> <(:)
  while kill -0 "$child" 2>/dev/null; do read -rt 0.2 -u "$never" || true; done
  exec {never}>&-
  wait "$child" || code=$?
  trap - TERM INT
  return "$code"
}

# option NAME WORD...: the value of an option among the words, as `--name value` or `--name=value`; nothing where it is not.
option() {
  local name=$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$name") printf '%s' "${2:-}" && return ;;
      "$name"=*) printf '%s' "${1#*=}" && return ;;
    esac
    shift
  done
}

# Fills `program` with what a command line asks for: a command of dpo-jax, or the whole chain of hh_pipeline.sh.
program_of() {
  case ${1:-} in
    '' | -*) die "a COMMAND is missing, such as: dpo configs/hh_pythia28_dpo.yaml (--help explains)" ;;
    hh_pipeline.sh) program=(./launch/hh_pipeline.sh "${@:2}") ;;
    *) program=("$dpo_jax" "$@") ;;
  esac
}

# The same for several hosts, which join each other.
program_on_many_hosts() {
  case ${1:-} in
    '' | -* | sft | refs | dpo | eval | hh_pipeline.sh) ;;
    *) die "$1: not a command that runs on many hosts (sft, refs, dpo, eval, hh_pipeline.sh)" ;;
  esac
  program_of "$@"
  case " ${*%%=*} " in *' --distributed '* | *' --run.distributed '*) ;; *) program+=(--distributed auto) ;; esac
}

# check_first [--check-OPTION ...] -- PROGRAM...: whether a command of dpo-jax, or hh_pipeline.sh, could run, before anything is
# rented or installed. Ends with the message and the exit code of `dpo-jax COMMAND CONFIG.yaml --check`. Where there is no dpo-jax
# only the file is looked for: then `checked` stays "no".
check_first() {
  local options=(--check) with=${DPO_JAX_VENV:-.venv}/bin/dpo-jax
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  if [[ $1 == */hh_pipeline.sh ]]; then
    "$@" "${options[@]}" >&2 || exit $?
    return
  fi
  [ -x "$with" ] || with=$(command -v dpo-jax) || with=''
  if [ -n "$with" ]; then
    if [ "$quiet" = yes ]; then
      "$with" "${@:2}" "${options[@]}" >/dev/null || exit $?
    else
      "$with" "${@:2}" "${options[@]}" >&2 || exit $?
    fi
    # shellcheck disable=SC2034 # read by the scripts
    checked=yes
  else
    [ -f "${3:-}" ] || die "${3:-no configuration given}: no such file"
    say "$2 $3: the file is there; its options, data and models are not checked, for want of dpo-jax (./launch/env.sh brings it)"
  fi
}

# check_run_dir FOLDER WORD...: a run that is to continue on another machine must lie on the disk that all of them share.
check_run_dir() {
  local run_dir
  run_dir=$(option --run.dir "${@:2}")
  case $run_dir in
    "$1"/?*) ;;
    '') die "no --run.dir: give one in $1, the disk that the hosts share and that is still there after a preemption" ;;
    gs://*) die "--run.dir $run_dir: dpo-jax writes to folders, not to buckets; give one in $1, which the hosts share" ;;
    *) die "--run.dir $run_dir is not in $1, the disk that the hosts share and that is still there after a preemption" ;;
  esac
}
