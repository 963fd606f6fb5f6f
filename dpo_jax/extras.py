"""The optional dependencies (extras) of pyproject.toml, and the command that installs them."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

_CLONE = Path(__file__).resolve().parent.parent


def install_command(extra: str) -> str:
    """The command that installs an extra of dpo_jax. dpo_jax is on no package index, so extras are installed from a clone."""
    pip = "pip" if importlib.util.find_spec("pip") else "uv pip"  # environments made by uv have no pip
    if not (_CLONE / "pyproject.toml").is_file():  # copied into site-packages
        return f"{pip} install -e '.[{extra}]' in a clone of dpo_jax"
    folder = "." if Path.cwd() == _CLONE else str(_CLONE)
    return f"{pip} install -e {shlex.quote(f'{folder}[{extra}]')}"
