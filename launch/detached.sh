#!/usr/bin/env bash
# Runs one program on this machine so that it outlives the terminal or the connection that started it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/detached.sh [--dry-run] start PROGRAM [ARGUMENT ...]
       ./launch/detached.sh follow | status | stop | keys

  start   starts PROGRAM in a session of its own, its output in a log; refused while one is running
  follow  prints the log until the program ends, and ends with its exit code
  status  one line: this machine's name, and nothing, running PID, ended CODE, or lost (the machine went down)
  stop    asks the program to end (SIGTERM: dpo-jax saves and ends with 143) and waits until it has
  keys    reads lines NAME=VALUE, and "end" as the last, from standard input: environment of the next start. They lie in
          a file that only you can read, and the start deletes it

Environment:
  DPO_JAX_DETACHED  folder for logs, process id and exit code (default: runs/detached); another one, another program
TEXT
}

# The process that records a program holds an exclusive lock, which the kernel releases when it exits. A query takes a shared
# lock, so that two concurrent queries do not mistake each other for a program.
running() { [ -d "$folder" ] && ! flock --shared --nonblock 8 8<>"$folder/lock"; }

start() {
  [ $# -gt 0 ] || die "start: which program? (--help explains)"
  if [ "$dry_run" = yes ]; then
    run setsid ./launch/detached.sh record "$@"
    return
  fi
  mkdir -p "$folder"
  exec 9>>"$folder/lock"
  flock --timeout 1 9 || die "a program is running (process $(<"$folder/pid")): follow it, or stop it"
  rm -f "$folder/pid" "$folder/exit"
  load_keys
  local log
  log=$(date +log-%Y%m%dT%H%M%S)
  ln -sfn "$log" "$folder/log"
  export PYTHONUNBUFFERED=1
  setsid ./launch/detached.sh record "$@" </dev/null >>"$folder/$log" 2>&1 &
  until [ -s "$folder/pid" ]; do
    kill -0 $! 2>/dev/null || [ -s "$folder/pid" ] || die "could not start; see $folder/log" 1
    sleep 0.05
  done
  say "started: process $(<"$folder/pid"), log $folder/$log"
}

# In the new session. When a machine shuts down, every process gets SIGTERM: the program too, so it is not passed on. A second
# one would stop dpo-jax before it has saved.
record() {
  local child code
  trap : TERM INT HUP
  "$@" 9>&- &
  child=$!
  echo "$child" >"$folder/pid"
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # otherwise it was the signal that ended `wait`
  done
  echo "$code" >"$folder/exit.new"
  mv "$folder/exit.new" "$folder/exit"
}

follow() {
  [ -f "$folder/pid" ] || die "nothing was started here" 1
  tail --pid="$(<"$folder/pid")" --sleep-interval=0.2 --lines=+1 --follow=name "$folder/log"
  while running; do sleep 0.1; done
  [ -f "$folder/exit" ] || die "the machine went down while the program ran" 1
  say "ended with exit code $(<"$folder/exit")"
  exit "$(<"$folder/exit")"
}

status() {
  local what=nothing
  if running; then
    what="running $(cat "$folder/pid" 2>/dev/null || true)"
  elif [ -f "$folder/exit" ]; then
    what="ended $(<"$folder/exit")"
  elif [ -f "$folder/pid" ]; then
    what=lost
  fi
  printf '%s %s\n' "${HOSTNAME:-this}" "$what"
}

stop() {
  if running; then
    kill -TERM "$(<"$folder/pid")"
    while running; do sleep 0.1; done
  fi
  status
}

keys() {
  local line
  umask 077
  mkdir -p "$folder"
  : >"$folder/keys.new"
  while IFS= read -r line; do
    if [ "$line" = end ]; then
      mv "$folder/keys.new" "$folder/keys"
      return
    fi
    printf '%s\n' "$line" >>"$folder/keys.new"
  done
  rm -f "$folder/keys.new"
  die "keys: the last line was not \"end\"; nothing is kept" 1
}

load_keys() {
  local line
  [ -f "$folder/keys" ] || return 0
  while IFS= read -r line; do export "${line?}"; done <"$folder/keys"
  rm -f "$folder/keys"
}

. launch/common.bash
folder=${DPO_JAX_DETACHED:-runs/detached}
[ "${1:-}" != --dry-run ] || { dry_run=yes && shift; }
case ${1:-} in
  -h | --help) usage ;;
  start | record) "$@" ;;
  follow | status | stop | keys)
    [ "$dry_run" = no ] || die "--dry-run is for start only"
    [ $# = 1 ] || die "$1 takes no arguments, but got $2 (--help explains)"
    "$1"
    ;;
  *) usage >&2 && exit 2 ;;
esac
