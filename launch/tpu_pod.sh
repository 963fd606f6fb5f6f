#!/usr/bin/env bash
# One Cloud TPU slice and one run on all its workers: asks for the slice, sets it up, starts the run, and when the slice is
# preempted asks for another and continues.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/tpu_pod.sh [--dry-run] VERB NAME --zone ZONE [OPTION ...] [-- COMMAND CONFIG.yaml [--section.option VALUE ...]]

  run      all steps: check, create, wait, install, start, follow. After a preemption it begins again, until the run has ended.
           After the loss of a host on a slice that stays it installs and starts again, at most 5 times.
           The same command continues at any point; if the run is active, it follows it
  create   asks for the slice (a queued resource). --accelerator-type and --runtime-version say which, --spot or --reserved
           how (neither: on demand). These and other options go to `gcloud compute tpus queued-resources create`
  wait     until the slice is there
  install  sends the committed files of this repository, mounts --nfs HOST:/EXPORT, sets up .venv; on all workers
  start    checks the command on the first worker, then starts `dpo-jax COMMAND ... --distributed auto` on all workers; it
           outlives the connection
  follow   prints the log of the first worker; Ctrl-C ends only the printing
  status   one line a worker: running, or how it ended
  stop     asks the run to save and end (exit code 143)
  delete   deletes the slice and its queued resource. Nothing else does: a slice costs until then

  ./launch/tpu_pod.sh run hh --zone us-west4-a --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot \
    --nfs 10.0.0.2:/vol1 -- dpo configs/hh_pythia28_dpo.yaml --run.dir /mnt/dpo_jax/hh --run.devices mesh --data.path /mnt/dpo_jax/data

COMMAND is sft, refs, dpo, eval, sample, label, reward-model, ppo, online, optimum or frontier, or hh_pipeline.sh with its options.
--run.dir must lie in /mnt/dpo_jax, where every worker mounts the NFS export (Filestore, for example): what is on a worker's own
disk is gone with the worker, and a checkpoint is written by all of them. dpo-jax writes to folders, so gs:// is refused. The export
must be writable for you.

run checks the command (dpo-jax COMMAND ... --check) on this machine before the slice is asked for, --dry-run too: options, batch and
mesh for the chips of the slice, and whether the configuration is committed as it is. Without dpo-jax here only the file is looked for. The
first worker checks again, now with the data and models on the shared disk.

WANDB_API_KEY and HF_TOKEN are taken from the environment and go to each worker through the connection, into a file that the
start deletes; that takes some seconds a worker. Other keys are not sent, so a judge that needs one cannot label here. ssh to several workers needs your key in the agent: ssh-add ~/.ssh/google_compute_engine

JAX_COMPILATION_CACHE_DIR and HF_HOME, if they are on the shared disk (the first also in a gs:// bucket), LIBTPU_INIT_ARGS, DPO_JAX_TRACEBACK,
WANDB_ENTITY, WANDB_NAME and TRACKIO_SPACE_ID are set on the workers as here.

Environment:
  DPO_JAX_EXTRAS        extras to install on the workers         (default: tpu; for Weights & Biases: tpu,writers)
  DPO_JAX_MOUNT         where workers mount the export           (default: /mnt/dpo_jax)
  DPO_JAX_POLL_SECONDS  between two looks at the queued resource, and two tries of a step; ten tries for a locked run directory (default: 30)

Exit codes of run: that of the run (see dpo-jax --help); 1 when the slice could not be had or reached.
TEXT
}

read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      -h | --help) usage && exit 0 ;;
      --) command=("${@:2}") && return ;;
      --zone | --nfs)
        [ $# -gt 1 ] || die "$1 needs a value"
        [ "$1" = --zone ] && zone=$2 || nfs=$2
        shift
        ;;
      --zone=*) zone=${1#*=} ;;
      --nfs=*) nfs=${1#*=} ;;
      *)
        if [ -z "$verb" ]; then
          verb=$1
        elif [ -z "$name" ]; then
          name=$1
        else
          create_options+=("$1")
        fi
        ;;
    esac
    shift
  done
}

check_arguments() {
  [ -n "$verb" ] || { usage >&2 && exit 2; }
  case $verb in
    run | create | wait | install | start | follow | status | stop | delete) ;;
    *) die "$verb: unknown verb (run, create, wait, install, start, follow, status, stop, delete)" ;;
  esac
  case $name in '' | -*) die "$verb: a NAME for the slice comes next" ;; esac
  [ -n "$zone" ] || die "--zone is missing"
  case $verb in
    run | create)
      [ -n "$(option --accelerator-type ${create_options[@]+"${create_options[@]}"})" ] || die "--accelerator-type is missing, such as v5litepod-16"
      [ -n "$(option --runtime-version ${create_options[@]+"${create_options[@]}"})" ] || die "--runtime-version is missing, such as v2-alpha-tpuv5-lite"
      ;;
    *) [ ${#create_options[@]} = 0 ] || die "$verb does not know ${create_options[0]}" ;;
  esac
  case $verb in
    run | install)
      case $nfs in
        '') die "--nfs HOST:/EXPORT is missing: the disk that the workers share" ;;
        /* | :*) die "--nfs $nfs: the host is missing; give HOST:/EXPORT, such as 10.0.0.2:/vol1" ;;
        *:/*) ;;
        *) die "--nfs $nfs: must be HOST:/EXPORT, such as 10.0.0.2:/vol1" ;;
      esac
      ;;
  esac
  case $verb in
    run | start)
      program_on_many_hosts ${command[@]+"${command[@]}"}
      check_run_dir "$mount" "${program[@]}"
      add_settings "$mount"
      check_here
      ;;
    install) check_sent ;;
  esac
  [ "$dry_run" = yes ] || command -v gcloud >/dev/null || die "gcloud is missing: install the Google Cloud CLI" 1
}

# Before anything costs. What lies on the shared disk only the workers can see.
check_here() {
  local devices config configs=()
  configs_of_program
  for config in "${configs[@]}"; do
    if lies_in "$mount" "$config"; then
      say "$config is on the disk of the workers: the first of them checks it"
      return
    fi
    [[ $config != /* ]] || die "$config is not on a worker: only committed files of this repository are sent, and $mount is mounted"
  done
  devices=$(devices_of "$(option --accelerator-type ${create_options[@]+"${create_options[@]}"})")
  check_first --check-elsewhere="$mount" ${devices:+--check-devices="$devices"} -- "${program[@]}"
  check_sent
  for config in "${configs[@]}"; do check_committed "$config"; done
}

# Workers get HEAD: what was checked here must be what they read.
check_committed() {
  git cat-file -e "HEAD:./$1" 2>/dev/null || die "$1 is not committed, but only committed files are sent: git add $1, then git commit"
  git diff --quiet HEAD -- "$1" || die "$1 has changes that are not committed, but only committed files are sent: git commit $1"
}

check_sent() {
  local changed
  git rev-parse --quiet --verify HEAD >/dev/null 2>&1 || die "only committed files are sent to the workers, but this is not a git repository with a commit"
  changed=$(git diff --name-only HEAD)
  [ -z "$changed" ] || say "uncommitted changes are not sent: ${changed//$'\n'/, }"
}

# Now with the data and models that the workers see. A second start on the same disk would find the same.
check_there() {
  local found=0
  again_if_locked on 0 "$(in_repository ${settings[@]+"${settings[@]}"} "${program[@]}" --check)" || found=$?
  case $found in
    2 | 65 | 73 | 74) die "the run could not start, as the first worker says; $costs" "$found" ;;
  esac
  return "$found"
}

queued_resources() { run gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }

create() { queued_resources create --node-id="$name" "${create_options[@]}"; }

delete() { queued_resources delete --force --quiet; }

# Sets `state` to that of the queued resource: ABSENT, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...
look() {
  local tries
  for tries in 1 2 3 4 5 6 7 8 9 10; do
    if state=$(queued_resources describe --format='value(state.state)' 2>"$errors"); then
      return
    fi
    state=ABSENT
    ! grep -q NOT_FOUND "$errors" || return 0
    say "could not ask for the state of $name (try $tries): $(<"$errors")"
    sleep "$poll"
  done
  die "gcloud does not answer; the run, if there is one, continues. Run the same command again to follow it" 1
}

wait_for_slice() {
  local seen=''
  if [ "$dry_run" = yes ]; then
    queued_resources describe --format='value(state.state)'
    return
  fi
  while look && [ "$state" != ACTIVE ]; do
    case $state in
      ABSENT | FAILED | SUSPENDED | SUSPENDING) return 1 ;;
    esac
    [ "$state" = "$seen" ] || say "$name is $state"
    seen=$state
    sleep "$poll"
  done
}

# What has failed or was preempted is deleted and asked for again; but what fails after it was asked for, or is deleted by
# someone, stays as it is.
have_slice() {
  local asked=no
  [ "$dry_run" = yes ] || look
  until [ "$state" = ACTIVE ]; do
    case $state:$asked in
      SUSPENDED:* | FAILED:no)
        say "$name is $state: asking for another"
        delete || die "could not delete it" 1
        ask
        ;;
      ABSENT:no) ask ;;
      ABSENT:yes) die "$name was deleted" 1 ;;
      FAILED:yes) die "$name has FAILED: gcloud compute tpus queued-resources describe says why" 1 ;;
      SUSPENDING:*) sleep "$poll" ;;
    esac
    wait_for_slice || true
    [ "$dry_run" = no ] || state=ACTIVE
  done
}

ask() {
  create || die "could not ask for $name" 1
  asked=yes
}

# on WORKERS COMMAND: runs a shell command on the workers (all, or a number). Its exit code is that of the command. A machine that
# was switched off closes no connection: ssh asks it every 30 s, or it would wait for hours.
on() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" "${alive[@]/#/--ssh-flag=-o }" --command="$2"
}

in_repository() { printf 'cd dpo_jax && %s' "$(quoted "$@")"; }

install() {
  local archive=$scratch/dpo_jax.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone="$zone" --worker=all "${alive[@]/#/--scp-flag=-o }" &&
    on all "$(setup)"
}

# On a slice that has just come, the system's own updates may be running, and ssh may not yet answer.
set_up() {
  local try
  for try in 1 2 3; do
    ! install || return 0
    ! preempted || return 1
    say "could not set up $name (try $try of 3)"
  done
  return 1
}

# What a worker does to become ready. The system's Python may be older than 3.11: uv brings another.
setup() {
  local served=${nfs%/}
  case $served in *:) served=$nfs ;; esac # the root of a server
  cat <<TEXT
set -e
mkdir -p dpo_jax && tar -xzf dpo_jax.tar.gz -C dpo_jax
[ -x /sbin/mount.nfs ] || { sudo apt-get -qq update && sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common; }
sudo mkdir -p $(quoted "$mount")
mountpoint -q $(quoted "$mount") || sudo mount -t nfs $(quoted "$nfs" "$mount")
[ "\$(findmnt -no SOURCE $(quoted "$mount"))" = $(quoted "$served") ] || { echo $(quoted "$mount has another disk than $nfs: unmount it first") >&2; exit 1; }
[ -w $(quoted "$mount") ] || { echo $(quoted "$nfs is not writable for you") >&2; exit 1; }
export PATH="\$HOME/.local/bin:\$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
cd dpo_jax && DPO_JAX_EXTRAS=$(quoted "${DPO_JAX_EXTRAS:-tpu}") ./launch/env.sh
TEXT
}

start() { check_there && send_keys && on all "$(in_repository ./launch/detached.sh start ${settings[@]+"${settings[@]}"} "${program[@]}")"; }

count_workers() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(networkEndpoints.len())'; }

# Through the connection, one worker after the other: gcloud gives its standard input to one of several.
send_keys() {
  local key lines='' worker workers=1
  for key in HF_TOKEN WANDB_API_KEY; do
    [ -z "${!key:-}" ] || lines+="$key=${!key}"$'\n'
  done
  [ -n "$lines" ] || return 0
  if [ "$dry_run" = no ]; then workers=$(count_workers) || return; fi
  for ((worker = 0; worker < workers; worker++)); do
    on "$worker" "$(in_repository ./launch/detached.sh keys)" <<<"${lines}end" || return
  done
}

follow() { on 0 "$(in_repository ./launch/detached.sh follow)"; }

status() { on "${1:-all}" "$(in_repository ./launch/detached.sh status)"; }

# Follows the run to its end and sets `code` to its exit code. Fails when the slice is gone. A run has ended when every worker
# says so: the one that does not answer may be the one that failed.
see_it_end() {
  local lines one first=' running ' of=0 rounds=0
  while :; do
    [[ $first != *' running '* ]] || follow || true # it fails also when only the connection breaks: the workers know better
    [ "$dry_run" = no ] || { status all && return; }
    lines=$(status all || true)
    [ "$of" != 0 ] || of=$(count_workers) || of=0
    of=${of:-0}
    case $lines in
      *' running '*) # the others notice after run.heartbeat_seconds that one has ended
        first=$(status 0 || true) rounds=0
        ;;
      *)
        if [ "$of" = 0 ] || [ "$(grep -cE ' (ended [0-9]+|lost)$' <<<"$lines")" -lt "$of" ]; then
          ! preempted || return 1
          rounds=$((rounds + 1)) first=''
          [ "$rounds" -lt "$patience" ] ||
            die "not all of the $of workers say how the run ended (${lines//$'\n'/, }): the same command asks again; $costs" 1
          sleep "$poll"
          continue
        fi
        # The first cause has the smallest code above 1: those whose partner is gone end with 1, 134 (SIGABRT) or 137.
        code=0
        while read -r one; do
          [ "$code" -gt 1 ] || code=$one
        done < <(sed -n 's/^[^ ]* ended //p; s/^[^ ]* lost$/137/p' <<<"$lines" | sort -n)
        [ "$code" != 0 ] || return 0
        say "the workers say: ${lines//$'\n'/, }"
        ! preempted || return 1
        return 0
        ;;
    esac
    sleep "$poll"
  done
}

# The state of a queued resource changes a little after its workers are gone.
preempted() {
  local tries
  for tries in 1 2 3 4; do
    look
    case $state in
      ACTIVE) ;;
      ABSENT | DELETING) die "$name was deleted" 1 ;;
      *) return 0 ;;
    esac
    [ "$tries" = 4 ] || sleep "$poll"
  done
  return 1
}

# Whether to start again on a slice that stays, because a host was lost: 134 and 137 say so, and 1 where the connection broke at
# once. An error of the program is 1, too: so only five times.
start_again() {
  case $code in 1 | 134 | 137) ;; *) return 1 ;; esac
  [ "$restarts" -lt 5 ] || return 1
  restarts=$((restarts + 1))
  say "exit code $code, as after the loss of a host, and $name is still there: starting again ($restarts of 5)"
}

story() {
  local restarts=0
  while :; do
    have_slice
    if [ "$dry_run" = yes ] || ! [[ "$(status all 2>/dev/null || true)" == *' running '* ]]; then
      if ! { set_up && start; }; then
        preempted || die "could not set up or start; the messages above say why; $costs" 1
        continue
      fi
    fi
    if see_it_end; then
      start_again || break
    else
      say "$name was preempted: another slice will continue the run from its last checkpoint"
    fi
  done
  [ "$dry_run" = yes ] || say "the run has ended with exit code $code; ./launch/tpu_pod.sh delete $name --zone $zone ends the costs"
  return "$code"
}

. launch/common.bash
verb='' name='' zone='' nfs='' create_options=() command=() program=() settings=()
dpo_jax=.venv/bin/dpo-jax # of a worker, whatever DPO_JAX_VENV is here
mount=${DPO_JAX_MOUNT:-/mnt/dpo_jax} state=ABSENT code=0
read_arguments "$@"
check_arguments
alive=(ServerAliveInterval=30 ServerAliveCountMax=4)
patience=20 # rounds in which workers do not answer
costs="the slice costs until: $0 delete $name --zone $zone"
scratch=/tmp/dpo_jax
if [ "$dry_run" = no ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  # A request goes on without this program: it may be granted, and cost, hours later.
  trap 'say "stopped here; $costs"; exit 130' INT TERM HUP
fi
errors=$scratch/errors
case $verb in
  run) story ;;
  wait) wait_for_slice || die "$name is $state" 1 ;;
  install | start) "$verb" || die "$verb failed; the messages above say why; $costs" ;;
  stop) on all "$(in_repository ./launch/detached.sh stop)" ;;
  *) "$verb" ;;
esac
