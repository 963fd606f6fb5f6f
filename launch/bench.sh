#!/usr/bin/env bash
# Our training against PyTorch on this machine, in an environment of its own: sets it up if needed, then runs dpo-jax bench.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/bench.sh [--dry-run] [CONFIG.yaml] [--section.option VALUE ...]

  ./launch/bench.sh configs/bench_hh_cpu.yaml --data.path DIR     Anthropic HH on a CPU (the default configuration)
  ./launch/bench.sh --bench.lengths 350/40/40                     random tokens of fixed lengths; needs no data
  ./launch/bench.sh configs/bench_pythia28_gpu.yaml --data.path DIR
  ./launch/bench.sh --data.path DIR --profile                     and a profile of our step

Let nothing else run: other processes slow PyTorch down more than they do us. The head of each configuration says
how long it takes; results go to RUN.DIR/bench. --dry-run prints the commands, and installs and runs nothing.

The environment is made by launch/env.sh (see there for the other settings):
  DPO_JAX_VENV     where it goes    (default: .venv-bench)
  DPO_JAX_TORCH    what to install as PyTorch, such as torch==2.13.0, where the newest does not fit this machine
TEXT
}

. launch/common.bash
case ${1:-} in -h | --help) usage && exit 0 ;; esac
[ "${1:-}" != --dry-run ] || { dry_run=yes && shift; }
config=configs/bench_hh_cpu.yaml
case ${1:---} in -*) ;; *) config=$1 && shift ;; esac
refuse_late "$@"
export DPO_JAX_VENV=${DPO_JAX_VENV:-.venv-bench}
python=$DPO_JAX_VENV/bin/python

check_first -- "$DPO_JAX_VENV/bin/dpo-jax" bench "$config" "$@"
run env DPO_JAX_VENV="$DPO_JAX_VENV" ./launch/env.sh
if [ -n "${DPO_JAX_TORCH:-}" ] && ! "$python" -c 'import torch' 2>/dev/null; then
  say "installing $DPO_JAX_TORCH"
  if [ "$dry_run" = yes ] || "$python" -m pip --version >/dev/null 2>&1; then
    run "$python" -m pip install -qq --disable-pip-version-check "$DPO_JAX_TORCH"
  else # uv makes environments without pip
    uv pip install --quiet --python "$python" "$DPO_JAX_TORCH"
  fi
fi
run env DPO_JAX_VENV="$DPO_JAX_VENV" DPO_JAX_EXTRAS=bench ./launch/env.sh
program=("$DPO_JAX_VENV/bin/dpo-jax" bench "$config" "$@")
[ "$dry_run" = no ] || { run "${program[@]}" && exit; }
exec "${program[@]}"
