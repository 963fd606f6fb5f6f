#!/usr/bin/env bash
# Sets up everything dpo_jax needs, in .venv at the top of the repository. Safe to run again: it does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: ./launch/env.sh

Creates .venv and installs dpo_jax into it, with uv if it is there, else with venv and pip.
It needs Python 3.11 or newer (or uv, which brings one). The first time takes a few minutes.

Environment:
  DPO_JAX_EXTRAS     extras to install   (default: test, and one of cpu, cuda12, cuda13, tpu as this machine
                     has it; others: lint, parity, bench, judge, lab, control, classifier,
                     gcs, browser, writers). What is installed already stays
  DPO_JAX_PYTHON     the Python to use             (default: the first of python3, python3.13, python3.12,
                     python3.11, python3.14 and pyenv's that runs and is 3.11 or newer)
  DPO_JAX_VENV       where the environment goes    (default: .venv). Machines that share a disk but differ in Python
                     or CUDA version need one each
  DPO_JAX_INSTALLER  uv or pip                     (default: uv if it is there)
TEXT
}

say() { printf '[env] %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# A name on PATH proves nothing: pyenv leaves shims that fail, and Debian a Python that cannot make environments.
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local python
  if [ -n "${DPO_JAX_PYTHON:-}" ]; then
    usable "$DPO_JAX_PYTHON" || die "DPO_JAX_PYTHON=$DPO_JAX_PYTHON does not run, is older than 3.11, or lacks the venv module"
    printf '%s\n' "$DPO_JAX_PYTHON"
    return
  fi
  for python in python3 python3.13 python3.12 python3.11 python3.14 "$HOME"/.pyenv/versions/3.1[1-9]*/bin/python3; do
    if usable "$python"; then
      command -v "$python"
      return
    fi
  done
  die "no Python 3.11 or newer with the venv module found.
      Debian, Ubuntu: apt-get install python3 python3-venv     macOS: brew install python@3.13
      or install uv, or name one: DPO_JAX_PYTHON=/path/to/python3 $0"
}

# DPO_JAX_SYS is for the tests, which imitate other machines.
accelerator() {
  local vendor device cuda
  for vendor in "${DPO_JAX_SYS:-/sys}"/bus/pci/devices/*/vendor; do
    [ -r "$vendor" ] && [ "$(<"$vendor")" = 0x1ae0 ] || continue # Google: TPUs, but network cards too
    device=$(<"${vendor%vendor}device")
    case $device in 0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) echo tpu && return ;; esac
  done
  if cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p') && [ -n "$cuda" ]; then
    [ "$cuda" -ge 13 ] && echo cuda13 || echo cuda12
    return
  fi
  echo cpu
}

make_venv() {
  if [ -f "$venv/pyvenv.cfg" ]; then
    [ -f "$made" ] || [ -f "$stamp" ] || die "$venv was not made by this script: remove it, or name another place in DPO_JAX_VENV"
    rm -rf "$venv"
  fi
  if [ "$installer" = uv ]; then
    uv venv --quiet --python "${DPO_JAX_PYTHON:->=3.11}" "$venv"
  else
    local python
    python=$(find_python)
    say "creating $venv with $("$python" -V) ($python)"
    "$python" -m venv "$venv"
  fi
  : >"$made"
}

install() {
  say "installing dpo_jax[$1] with $installer; the first time takes a few minutes"
  if [ "$installer" = uv ]; then
    uv pip install --quiet --python "$venv/bin/python" --editable ".[$1]" ||
      die "uv could not install; DPO_JAX_INSTALLER=pip $0 tries with pip"
  else
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".[$1]"
  fi
}

case ${1:-} in
  '') ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac

venv=${DPO_JAX_VENV:-.venv}
extras=${DPO_JAX_EXTRAS:-$(accelerator),test}
installer=${DPO_JAX_INSTALLER:-$(command -v uv >/dev/null 2>&1 && echo uv || echo pip)}
case $installer in uv | pip) ;; *) die "DPO_JAX_INSTALLER must be uv or pip, not $installer" ;; esac

# The stamp says what is installed: a checksum of pyproject.toml and the extras. It is written last: a first install that was killed
# starts over, and a later one, of which the packages may be in use, is repeated in place.
stamp=$venv/.dpo_jax made=$venv/.made_by_dpo_jax
project=$(cksum <pyproject.toml)
had_project='' had_extras=''
# Two starts at once must not make the same environment. (macOS has no flock, and some disks have no locks. NFS locks only what
# is open for writing, so not the folder.)
if command -v flock >/dev/null && mkdir -p "$(dirname "$venv")" && { exec 9>>"${venv%/}.starting"; } 2>/dev/null; then
  flock -n 9 || { say "waiting for another start, which is making $venv" && flock 9; } || say "this disk has no locks: going on"
fi
runs() { "$venv/bin/python" -c '' 2>/dev/null || { sleep 2 && "$venv/bin/python" -c '' 2>/dev/null; }; } # a disk may be slow
if [ -f "$stamp" ]; then
  # Shared checkouts: a run elsewhere may be using what does not run here.
  runs || [ -n "${DPO_JAX_PYTHON:-}" ] || die "the Python of $venv does not run here: it was made on another machine, or its Python is gone.
      Set DPO_JAX_VENV to another place, or remove $venv if nothing uses it"
  if runs; then { read -r had_project && read -r had_extras; } <"$stamp" || true; else make_venv; fi
else
  make_venv
fi
if command -v "${DPO_JAX_PYTHON:-}" >/dev/null && [ "$("$venv/bin/python" -V)" != "$("$DPO_JAX_PYTHON" -V)" ]; then
  say "$venv has $("$venv/bin/python" -V), asked for $("$DPO_JAX_PYTHON" -V): recreating it"
  make_venv
  had_extras=''
fi

missing=''
for extra in ${extras//,/ }; do
  case ",$had_extras," in *",$extra,"*) continue ;; esac
  case $extra:,$had_extras, in # one environment cannot have both
    cuda12:*,cuda13,* | cuda13:*,cuda12,*)
      die "$venv has JAX for another CUDA version, but $extra is needed here: it was made on another machine, or the driver is new.
      Set DPO_JAX_VENV to another place; or name the extras that it has: DPO_JAX_EXTRAS=$had_extras"
      ;;
  esac
  missing="$missing,$extra"
done
if [ -n "$missing" ] || [ "$project" != "$had_project" ]; then
  all=$had_extras$missing
  all=${all#,}
  [ -z "$had_extras" ] || printf 'unfinished\n%s\n' "$had_extras" >"$stamp"
  install "$all"
  printf '%s\n%s\n' "$project" "$all" >"$stamp"
  say "ready: $venv"
fi
