#!/usr/bin/env bash
# One machine with one or more GPUs: sets it up, and runs a command that goes on when you log out.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/gpu_node.sh [--dry-run] start COMMAND CONFIG.yaml [--section.option VALUE ...]
       ./launch/gpu_node.sh follow | status | stop

  start   checks the command (dpo-jax COMMAND ... --check), installs what is missing (launch/env.sh, which finds the CUDA
          version), then starts `dpo-jax COMMAND ...`
  follow  prints its log until it ends, and ends with its exit code; Ctrl-C ends only the printing
  status  running, or how it ended
  stop    asks it to save and end (exit code 143); the same start continues it

  ./launch/gpu_node.sh start dpo configs/hh_pythia28_dpo.yaml --data.path DIR --run.devices mesh

COMMAND is one of dpo-jax's, or hh_pipeline.sh with its options. --run.devices mesh or pmap uses all GPUs, single the first;
CUDA_VISIBLE_DEVICES hides some. Compiled programs are kept in RUN.DIR/compiled, so that a restart does not compile again.
WANDB_API_KEY and HF_TOKEN are taken from the environment.

Environment: that of launch/env.sh, and DPO_JAX_DETACHED (see launch/detached.sh) for a second run beside the first.
TEXT
}

# The GPUs that the program will see.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    local commas=${CUDA_VISIBLE_DEVICES//[^,]/}
    echo $((${#commas} + 1))
  else
    nvidia-smi --list-gpus | grep -c '^GPU '
  fi
}

start() {
  program_of "$@"
  # Without this a broken driver would end in a quiet installation for the CPU.
  [ "$dry_run" = yes ] || [[ $(nvidia-smi --list-gpus 2>/dev/null) == 'GPU '* ]] || die "nvidia-smi finds no GPU on this machine" 1
  [ "$dry_run" = yes ] || gpus=--check-devices=$(count_gpus)
  check_first ${gpus:+"$gpus"} -- "${program[@]}"
  run ./launch/env.sh
  [ "$dry_run" = yes ] || [ "$checked" = yes ] || check_first ${gpus:+"$gpus"} -- "${program[@]}"
  run ./launch/detached.sh start "${program[@]}"
}

. launch/common.bash
program=() gpus=''
[ "${1:-}" != --dry-run ] || { dry_run=yes && shift; }
case ${1:-} in
  -h | --help) usage ;;
  start) start "${@:2}" ;;
  follow | status | stop)
    [ $# = 1 ] || die "$1 takes no arguments, but got $2 (--help explains)"
    run ./launch/detached.sh "$1"
    ;;
  *) usage >&2 && exit 2 ;;
esac
