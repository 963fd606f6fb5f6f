#!/usr/bin/env bash
# The whole method in one command: check the data, fine-tune a small policy, cache its log-probabilities as the reference,
# train it with DPO, and measure on held-out pairs what that changed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'TEXT'
Usage: ./launch/quickstart.sh [CONFIG.yaml [--section.option VALUE ...]]

Without arguments: configs/quickstart.yaml, at most five minutes on two CPU cores after the packages are
installed, no network. Results go to runs/quickstart; run it again to continue or to see them again.

  ./launch/quickstart.sh configs/quickstart.yaml --run.dir runs/second --run.seed 1
  ./launch/quickstart.sh configs/hh_small.yaml --data.path DIR

Options are given to every step, so they must be ones that every step reads: --run.*, --data.*,
--tokenizer.* and --model.*. Options of one step are set in the file, or by calling dpo-jax yourself.
TEXT
  exit 0
fi

config=${1:-configs/quickstart.yaml}
[ $# -gt 0 ] && shift
step() {
  printf '\n== %s ==\n' "$1"
  "${DPO_JAX_VENV:-.venv}/bin/dpo-jax" "$2" "$config" "${@:3}"
}

./launch/env.sh

step "1/5  Is the data fit for training?" audit "$@"
step "2/5  A policy to start from: supervised fine-tuning" sft "$@"
step "3/5  The reference: log-probabilities of that policy, once" refs "$@"
step "4/5  Direct Preference Optimization" dpo "$@"
step "5/5  What changed, on pairs never seen in training" eval "$@"
