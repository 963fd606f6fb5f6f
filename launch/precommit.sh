#!/usr/bin/env bash
# What a developer runs before each commit: lint, types, and the tests of what changed.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.bash
source launch/common.bash

usage() {
  cat <<'TEXT'
Usage: ./launch/precommit.sh [--dry-run] [COMMIT]

Checks the files that differ from COMMIT (default: HEAD), new ones included: ruff, pyright, shellcheck, and tests, which are
  1. tests/test_layers.py, for a change of the package
  2. the test files that changed, and those named like a changed module: test_NAME.py, test_NAME_*.py
  3. those that import a changed module, or, if none does, a module that imports it: first those that import most
The first 12 files are taken, and no test begins after DPO_JAX_SECONDS (default: 25): pytest counts the rest as skipped.
How many are left out is said; .ci/run takes all.

  --dry-run   print the commands, and run none
TEXT
}

commit=HEAD
for word in "$@"; do
  case $word in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=yes ;;
    -*) die "$word: unknown option (--help lists them)" ;;
    *) commit=$word ;;
  esac
done

named=() importing=() python=() typed=() shell=() tests=()

# importers DOTTED FILE...: the files that import a module.
importers() {
  local dotted=${1//./\\.} parent=${1%.*} name=${1##*.}
  grep -lE "^ *(from|import) $dotted( |\$)|^ *from ${parent//./\\.} import (.*[ ,(])?$name\\b" "${@:2}" || true
}

dotted_name() {
  local name=${1%.py}
  name=${name%/__init__}
  printf '%s\n' "${name//\//.}"
}

# Adds the tests of a module of the package.
add_tests_of_module() {
  local file=$1 dotted stem found test
  dotted=$(dotted_name "$file")
  stem=${dotted##*.}
  for test in "tests/test_$stem.py" tests/test_"$stem"_*.py; do [ ! -e "$test" ] || named+=("$test"); done
  found=$(importers "$dotted" tests/test_*.py)
  if [ -z "$found" ]; then
    while read -r file; do
      found+=$'\n'$(importers "$(dotted_name "$file")" tests/test_*.py)
    done < <(grep -rlE "^ *from ${dotted//./\\.} import|^ *from ${dotted%.*} import .*$stem" dpo_jax --include='*.py' || true)
  fi
  while read -r test; do [ -z "$test" ] || importing+=("$test"); done <<<"$found"
}

while read -r file; do
  stem=${file##*/}
  stem=${stem%.*}
  case $file in *.py) python+=("$file") ;; *.sh | .ci/run) shell+=("$file") ;; esac
  case $file in
    dpo_jax/*.py) named=(tests/test_layers.py "${named[@]}") typed+=("$file") && add_tests_of_module "$file" ;;
    tests/test_*.py) named+=("$file") ;;
    tests/golden/*) mapfile -t -O "${#importing[@]}" importing < <(grep -lE "GOLDEN.*\b$(cut -d/ -f3 <<<"$file")\b" tests/test_*.py || true) ;;
    tests/*.py) mapfile -t -O "${#importing[@]}" importing < <(grep -lE "^(from|import) $stem( |\$)" tests/test_*.py || true) ;;
    *.ipynb) named+=(tests/test_notebook.py) ;;
    launch/*.md | *README.md | configs/*) named+=(tests/test_readmes.py) ;;
    launch/* | .ci/*) named+=(tests/test_launch.py) ;;
  esac
done < <(git diff --name-only --diff-filter=d "$commit" && git ls-files --others --exclude-standard)

declare -A seen=()
while read -r test; do
  [ -z "$test" ] || [ -n "${seen[$test]:-}" ] || tests+=("$test")
  [ -z "$test" ] || seen[$test]=yes
done < <(printf '%s\n' "${named[@]}" && printf '%s\n' "${importing[@]}" | sort | uniq -c | sort -k1,1rn -k2 | sed 's/^ *[0-9]* //')
[ ${#tests[@]} -le 12 ] || say "$((${#tests[@]} - 12)) more test files import what changed: left to .ci/run"
tests=("${tests[@]:0:12}")

bin=${DPO_JAX_VENV:-.venv}/bin types=''
run env DPO_JAX_EXTRAS="${DPO_JAX_EXTRAS:-cpu,test,lint}" ./launch/env.sh
[ ${#shell[@]} = 0 ] || run "$bin/shellcheck" --external-sources "${shell[@]}"
if [ ${#python[@]} != 0 ]; then
  run "$bin/ruff" check "${python[@]}"
  run "$bin/ruff" format --check "${python[@]}"
fi
if [ ${#typed[@]} != 0 ]; then # beside the tests, which use the other core
  if [ "$dry_run" = yes ]; then
    run "$bin/pyright" --pythonpath "$bin/python" "${typed[@]}"
  else
    "$bin/pyright" --pythonpath "$bin/python" "${typed[@]}" &
    types=$!
  fi
fi
code=0
if [ ${#tests[@]} != 0 ]; then
  run "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --as-given --within "${DPO_JAX_SECONDS:-25}" "${tests[@]}" || code=$?
else
  say "no test is named after a changed file or imports it"
fi
[ -z "$types" ] || wait "$types" || code=$?
exit "$code"
