#!/usr/bin/env bash
# The whole method in one command: check the data, fine-tune a small policy, cache its log-probabilities as the reference,
# train it with DPO, and measure on held-out pairs what that changed.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/quickstart.sh [--dry-run] [CONFIG.yaml [--section.option VALUE ...]]

Without arguments: configs/quickstart.yaml, at most five minutes on two CPU cores after the packages are
installed, no network. Results go to runs/quickstart; run it again to continue or to see them again.
--dry-run prints the commands, and installs and runs nothing.

  ./launch/quickstart.sh configs/quickstart.yaml --run.dir runs/second --run.seed 1
  ./launch/quickstart.sh configs/hh_small.yaml --data.path DIR

Options are given to every step, so they must be ones that every step reads: --run.*, --data.*,
--tokenizer.* and --model.*. Options of one step are set in the file, or by calling dpo-jax yourself.
All steps are checked before the first (dpo-jax COMMAND CONFIG --check).
TEXT
}

. launch/common.bash
steps=(audit sft refs dpo eval)
titles=(
  "1/5  Is the data fit for training?"
  "2/5  A policy to start from: supervised fine-tuning"
  "3/5  The reference: log-probabilities of that policy, once"
  "4/5  Direct Preference Optimization"
  "5/5  What changed, on pairs never seen in training"
)

check_steps() {
  local step after=''
  for step in "${steps[@]}"; do
    check_first ${after:+--check-after="$after"} -- "$dpo_jax" "$step" "$@"
    after=${after:+$after,}$step
  done
}

case ${1:-} in -h | --help) usage && exit 0 ;; esac
[ "${1:-}" != --dry-run ] || { dry_run=yes && shift; }
case ${1:-} in
  '') set -- configs/quickstart.yaml ;;
  -*) die "a CONFIG.yaml comes first, such as configs/quickstart.yaml; then options (--help explains)" ;;
esac
refuse_late "$@"
[ "$dry_run" = yes ] || quiet=yes

check_steps "$@"
run ./launch/env.sh
[ "$dry_run" = yes ] || [ "$checked" = yes ] || check_steps "$@"
for number in "${!steps[@]}"; do
  [ "$dry_run" = yes ] || printf '\n== %s ==\n' "${titles[$number]}"
  run "$dpo_jax" "${steps[$number]}" "$@"
done
