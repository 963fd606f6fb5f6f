#!/usr/bin/env bash
# First run on a GPU not tested before: self-test, timings, and a profile of where the time goes.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/first_gpu.sh [--dry-run] [FOLDER] [--race CONFIG.yaml]

  1  python -m dpo_jax.check                        every attention path, DPO steps, several devices, checkpoints
  2  python -m dpo_jax.check --only bench --bench --profile FOLDER/trace
                                                    Pythia-2.8B: pairs/s, MFU and memory of each path; a trace of the fastest
  3  dpo-jax bench CONFIG                           the race against a literal PyTorch loop, and TRL where it is installed

All figures go to FOLDER (default: runs/first_gpu). Each step runs even if the one before it failed; the exit code is 1 if one
did. Nothing is installed: steps 1 and 2 need jax, flax, optax, orbax-checkpoint and numpy, step 3 torch and transformers, too.
--dry-run prints the commands and writes nothing.

Environment:
  DPO_JAX_PYTHON   the Python to use   (default: .venv/bin/python if it is there, else python3)
  DPO_JAX_SECONDS  time for step 2     (default: 240)
TEXT
}

. launch/common.bash
out=runs/first_gpu race=configs/bench_first_gpu.yaml
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift ;;
    --race) race=${2:?--race needs a configuration} && shift 2 ;;
    -*) usage >&2 && exit 2 ;;
    *) out=$1 && shift ;;
  esac
done
python=${DPO_JAX_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -f "$race" ] || die "$race: no such file"
[ "$dry_run" = yes ] || mkdir -p "$out"
failed=0

# Runs a step, shows and keeps what it prints.
step() {
  local name=$1
  shift
  if [ "$dry_run" = yes ]; then
    run "$@"
    return
  fi
  say "$name: $*"
  "$@" 2>&1 | tee "$out/$name.log" || failed=1
}

has() { "$python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' "$@"; }

step check "$python" -m dpo_jax.check --json "$out/check.json"
step bench "$python" -m dpo_jax.check --only bench --bench --seconds "${DPO_JAX_SECONDS:-240}" --json "$out/bench.json" \
  --profile "$out/trace-$(date +%s)"
if has torch transformers; then
  contenders=()
  has trl datasets tyro && contenders=(--bench.contenders "torch-live,torch-cached,trl-best,jax-attention")
  step race "$python" -c 'import sys; from dpo_jax.cli.main import main; sys.exit(main(sys.argv[1:]))' bench "$race" ${contenders[@]+"${contenders[@]}"}
else
  say "race: left out, $python has no torch or no transformers"
fi
[ "$dry_run" = yes ] || say "figures: $out"
exit $failed
