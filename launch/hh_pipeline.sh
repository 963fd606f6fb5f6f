#!/usr/bin/env bash
# The paper's experiment on Anthropic HH from raw pairs to an exported model, as one resumable chain: rerun it to
# continue. Finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/hh_pipeline.sh [--dry-run | --check] [--steps STEP,STEP,...] --data.path DIR [--section.option VALUE ...]

The steps: audit, sft, refs, dpo, eval, export. The first two read configs/hh_pythia28_sft.yaml, the others
configs/hh_pythia28_dpo.yaml; DPO_JAX_SFT_CONFIG and DPO_JAX_DPO_CONFIG name others. The exported model, in
bfloat16, is RUN.DIR/export.

Options are given to every step, so they must be ones that every step reads: --run.*, --data.*, --tokenizer.* and
--model.*; export gets --run.dir only. A finished step leaves RUN.DIR/pipeline/STEP.done. It is taken again when its
command or its configuration file has changed, and so are the steps that use what it makes.

With --distributed auto (and --coordinator, --num-processes, --process-id) start the same chain on every host, with a
run.dir that all hosts share. It then has the steps that run on many hosts: sft, refs, dpo, eval. On one host:
--steps audit before, --steps export after.

Before the first step all of them are checked (dpo-jax COMMAND CONFIG --check): data, models, run directory. --check does
only this, --dry-run this and printing the commands. What an earlier step makes is taken for granted.

Exit codes: that of the step that failed; 143 when it was asked to stop (SIGTERM or Ctrl-C) and has saved.
TEXT
}

# Splits the command line into what the chain is told and what every step is told.
read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      --check) check_only=yes ;;
      --check-*) check_options+=("$1") ;;
      -h | --help) usage && exit 0 ;;
      --steps=*) steps=${1#*=} ;;
      --run.dir=*) run_dir=${1#*=} ;;
      --steps | --run.dir)
        [ $# -gt 1 ] || die "$1 needs a value"
        [ "$1" = --steps ] && steps=$2 || run_dir=$2
        shift
        ;;
      --distributed | --distributed=* | --run.distributed | --run.distributed=*) many_hosts=yes && options+=("$1") ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  if [ -z "$run_dir" ]; then
    run_dir=$(sed -n '/^run:/,/^[a-z]/s/^  dir: *//p' "$dpo_config" | sed 's/[[:space:]]#.*//; s/^#.*//; s/[[:space:]]*$//')
    [ -n "$run_dir" ] || die "$dpo_config has no run.dir: give --run.dir DIR"
    case $run_dir in *[\"\'\&\*\|\>\{\[]*) die "run.dir in $dpo_config is quoted: give --run.dir DIR" ;; esac
  fi
  if [ -z "$steps" ]; then
    [ "$many_hosts" = yes ] && steps=sft,refs,dpo,eval || steps=audit,sft,refs,dpo,eval,export
  fi
  steps=${steps//,/ }
}

# Fills `program` with the command of a step.
command_of() {
  local config=$dpo_config
  case $1 in
    audit | sft) config=$sft_config ;;
    refs | dpo | eval) ;;
    export)
      program=("$dpo_jax" export "$config" --run.dir "$run_dir" --export.out "$run_dir/export" --export.dtype bfloat16)
      return
      ;;
    *) die "$1: no such step (audit, sft, refs, dpo, eval, export)" ;;
  esac
  program=("$dpo_jax" "$1" "$config" --run.dir "$run_dir" ${options[@]+"${options[@]}"})
}

done_before() { [ -f "$run_dir/pipeline/$1.done" ] && [ "$(<"$run_dir/pipeline/$1.done")" = "$(asked)" ] && made_by "$1"; }

# Whether what a step makes is still there.
made_by() {
  case $1 in
    sft | dpo) [ -f "$run_dir/$1/export/config.json" ] || [ -f "$run_dir/$1/export/adapter_config.json" ] ;;
    eval) [ -f "$run_dir/eval/report.json" ] ;;
    export) [ -f "$run_dir/export/config.json" ] || [ -f "$run_dir/export/adapter_config.json" ] ;;
  esac
}

# All steps before the first is taken: an error in the last one would else be found after days.
check_steps() {
  local step after=''
  for step in $steps; do
    command_of "$step"
    if [ -f "${program[2]}" ] && done_before "$step"; then continue; fi
    check_first ${check_options[@]+"${check_options[@]}"} ${after:+--check-after="$after"} -- "${program[@]}"
    after=${after:+$after,}$step
  done
}

# What a step was asked to do: its command, less what tells hosts apart, and the content of its configuration.
asked() {
  local of_host='(run\.)?(coordinator|num[-_]processes|process[-_]id)'
  { quoted "${program[@]}" | sed -E "s/ --${of_host}[ =][^ ]*//g" && cat "${program[2]}"; } | cksum
}

# The steps that use what a step makes.
users_of() {
  case $1 in
    sft) echo refs dpo eval export ;;
    refs) echo dpo eval export ;;
    dpo) echo eval export ;;
  esac
}

take() {
  local step=$1 later code=0 mark
  command_of "$step"
  if [ "$dry_run" = yes ]; then
    run "${program[@]}"
    return
  fi
  if done_before "$step"; then
    say "$step: done before"
    return
  fi
  for later in "$step" $(users_of "$step"); do rm -f "$run_dir/pipeline/$later.done"; done
  say "$step: $(quoted "${program[@]}")"
  supervised "${program[@]}" || code=$?
  case $code in
    0) ;;
    143) say "$step has saved and stopped; rerun the command to continue" && exit 143 ;;
    *) die "$step ended with exit code $code" "$code" ;;
  esac
  # Every host writes the same mark: a step ends on all of them together, and in containers with the same process id.
  mkdir -p "$run_dir/pipeline"
  mark=$(mktemp "$run_dir/pipeline/.$step.XXXXXX")
  asked >"$mark"
  chmod 644 "$mark"
  mv -f "$mark" "$run_dir/pipeline/$step.done"
}

. launch/common.bash
steps='' run_dir='' many_hosts=no check_only=no check_options=() options=() program=()
read_arguments "$@"
[ "$dry_run" = yes ] || [ "$check_only" = yes ] || [ -x "$dpo_jax" ] || die "$dpo_jax is missing: run ./launch/env.sh first" 1
[ "$check_only" = no ] || [ -n "$(dpo_jax_here)" ] || die "there is no dpo-jax here to check with: run ./launch/env.sh first" 1
for step in $steps; do command_of "$step"; done # a wrong name is refused before any work
[ "$dry_run" = yes ] || [ "$check_only" = yes ] || quiet=yes
check_steps
[ "$check_only" = no ] || exit 0
for step in $steps; do take "$step"; done
