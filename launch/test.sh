#!/usr/bin/env bash
# Runs the tests on a fresh machine: sets up .venv if needed, then pytest. Twelve minutes on two slow CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'TEXT'
Usage: ./launch/test.sh [PYTEST OPTIONS]

  ./launch/test.sh                          all tests but the long ones; needs no network once .venv is there
  ./launch/test.sh tests/test_losses.py     one file
  ./launch/test.sh -m long                  whole processes, kills, and further combinations, which .ci/run adds
  ./launch/test.sh -m soak                  longer still: fault and stress tests
  XLA_FLAGS=--xla_backend_optimization_level=3 ./launch/test.sh    compile as a run does: slower (the default is 0)
  DPO_JAX_EXTRAS=cpu,test,parity ./launch/test.sh -m parity      compare with PyTorch afresh
  DPO_JAX_EXTRAS=cpu,test,browser ./launch/test.sh -m browser    the raters' page in a Chromium that is installed

The environment is made by launch/env.sh (see ./launch/env.sh --help for the settings).
TEXT
  exit 0
fi

./launch/env.sh
# Where PYTHONDONTWRITEBYTECODE is set (as in many container images), every process recompiles its modules in every run.
# Both processes of pytest collect the tests: 22 s of CPU each, and 13 s from the second run on if it is kept.
unset PYTHONDONTWRITEBYTECODE
# Two processes, and each file in one of them: what a file compiles is shared by its tests. Long files first (tests/conftest.py).
exec "${DPO_JAX_VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
