# What the launch scripts have in common; they source it from the top of the repository.
# shellcheck shell=bash

dry_run=no

say() { printf '[%s] %s\n' "${0##*/}" "$1" >&2; }

# die MESSAGE [EXIT CODE]
die() {
  say "error: $1"
  exit "${2:-2}"
}

# Words as a shell reads them back: what is printed can be pasted, and what goes through ssh arrives as it was.
quoted() {
  local word quote="'" escaped="'\\''" between=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "%s'%s'" "$between" "${word//"$quote"/"$escaped"}" ;;
      *) printf '%s%s' "$between" "$word" ;;
    esac
    between=' '
  done
}

# Runs a command; under --dry-run prints it and runs nothing.
run() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Runs a command to its end and returns its exit code. SIGTERM and Ctrl-C reach it as SIGTERM: it saves and ends with 143.
supervised() {
  local code signals=0 seen child
  "$@" &
  child=$!
  trap 'signals=$((signals + 1)); kill -TERM "$child" 2>/dev/null || true' TERM INT
  while :; do
    seen=$signals code=0
    wait "$child" || code=$?
    [ "$signals" -gt "$seen" ] || break # otherwise it was the signal that ended `wait`
  done
  trap - TERM INT
  return "$code"
}
