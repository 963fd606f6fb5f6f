#!/usr/bin/env bash
# A run on the TPU slices of a GKE cluster, through Cluster Toolkit's `gcluster job` (which has replaced XPK).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/gcluster.sh [--dry-run] submit NAME OPTION ... -- COMMAND CONFIG.yaml [--section.option VALUE ...]
       ./launch/gcluster.sh [--dry-run] follow | status | delete NAME [OPTION ...]

  submit   starts `dpo-jax COMMAND ... --distributed auto` on every host of the slices
  follow   prints the logs;  status  says how it stands;  delete  stops it: it saves first, as after a preemption

  ./launch/gcluster.sh submit hh --cluster C --location L --project P --compute-type v6e-16 --image IMAGE \
    --mount filestore://INSTANCE/SHARE:/mnt/dpo_jax:rw -- dpo configs/hh_pythia28_dpo.yaml --run.dir /mnt/dpo_jax/hh --run.devices mesh

COMMAND is sft, refs, dpo, eval, sample, label, reward-model, ppo, online, optimum or frontier, or hh_pipeline.sh with its options.
Before anything is submitted, the command is checked with the dpo-jax of this machine, if there is one (dpo-jax COMMAND ... --check),
for the chips that --compute-type, --topology and --num-slices tell.
OPTIONs go to `gcluster job` as they are (gcluster job submit --help). IMAGE is that of launch/kubernetes/Dockerfile. --run.dir
must lie in /mnt/dpo_jax, a disk that all hosts share; dpo-jax writes to folders, so gs:// is refused.

A run that was preempted or lost a host (exit codes 143, 137, 134 and 1), or finds the run lock of a lost host (73), is started
again and continues, up to 20 times; any other exit code ends the job. A host has 5 minutes to save: --grace-period 10m gives it more.

gcluster hands no secrets to a job. If --env-file FILE is given (before the --), the hosts read WANDB_API_KEY and HF_TOKEN from
it, as lines NAME=VALUE: a file on the shared disk, such as /mnt/dpo_jax/keys.env, that only you can read.
JAX_COMPILATION_CACHE_DIR and HF_HOME, if they are on the shared disk (the first also in a gs:// bucket), LIBTPU_INIT_ARGS, DPO_JAX_TRACEBACK,
WANDB_ENTITY, WANDB_NAME and TRACKIO_SPACE_ID are set on the hosts as here.

Tested against the command line of Cluster Toolkit 1.95, where `gcluster job` is called experimental.
TEXT
}

read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      -h | --help) usage && exit 0 ;;
      --) command=("${@:2}") && return ;;
      --env-file=*) env_file=${1#*=} ;;
      --env-file)
        [ $# -gt 1 ] || die "--env-file needs a value"
        env_file=$2
        shift
        ;;
      *)
        if [ -z "$verb" ]; then
          verb=$1
        elif [ -z "$name" ]; then
          name=$1
        else
          options+=("$1")
        fi
        ;;
    esac
    shift
  done
}

gcluster_job() { run gcluster job "$@" ${options[@]+"${options[@]}"}; }

check_here() {
  local config configs=() devices
  configs_of_program
  for config in "${configs[@]}"; do
    if lies_in /mnt/dpo_jax "$config"; then
      say "$config is on the disk of the hosts: it is checked there"
      return
    fi
  done
  devices=$(devices_of_slices)
  check_first --check-elsewhere=/mnt/dpo_jax ${devices:+--check-devices="$devices"} -- "${program[@]}"
}

# The devices of all slices, where the options tell: --topology, if it is given, else the name of the slice.
devices_of_slices() {
  local slices topology devices
  slices=$(option --num-slices ${options[@]+"${options[@]}"})
  [[ ${slices:=1} =~ ^[1-9][0-9]*$ ]] || return 0 # gcluster says so
  topology=$(option --topology ${options[@]+"${options[@]}"})
  if [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]]; then
    devices=$((${topology//x/*}))
    case $(option --compute-type ${options[@]+"${options[@]}"}) in tpu7x*) devices=$((2 * devices)) ;; esac # two of JAX a chip
  else
    devices=$(devices_of "$(option --compute-type ${options[@]+"${options[@]}"})")
  fi
  [ -z "$devices" ] || echo $((devices * slices))
}

submit() {
  local line=''
  dpo_jax=dpo-jax
  program_on_many_hosts ${command[@]+"${command[@]}"}
  check_run_dir /mnt/dpo_jax "${program[@]}"
  add_settings /mnt/dpo_jax
  check_here
  [ -z "$env_file" ] || line="set -a && . $(quoted "$env_file") && set +a && "
  # exec: the signal that ends a container goes to its first process.
  line+="exec $(quoted ${settings[@]+"${settings[@]}"} "${program[@]}")"
  [ -n "$(option --grace-period ${options[@]+"${options[@]}"})" ] || options+=(--grace-period 5m)
  gcluster_job submit --name "$name" --command "$line" --restarts 20 --restart-on-exit-codes 1,73,134,137,143
}

. launch/common.bash
verb='' name='' env_file='' options=() command=() program=() settings=()
read_arguments "$@"
case $verb in
  submit | follow | status | delete) ;;
  *) usage >&2 && exit 2 ;;
esac
case $name in '' | -*) die "$verb: a NAME for the job comes next" ;; esac
case $verb in
  submit) submit ;;
  follow) gcluster_job logs "$name" --follow ;;
  status) gcluster_job list --name-contains "$name" ;;
  delete) gcluster_job cancel "$name" ;;
esac
