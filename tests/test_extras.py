"""The command that installs an extra works where it is printed."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from dpo_jax import extras

ROOT = Path(__file__).parent.parent


def extras_of(folder):
    return set(tomllib.loads(Path(folder, "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("here", [True, False], ids=["in the clone", "elsewhere"])
def test_an_extra_comes_from_the_clone(here, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if here else tmp_path)
    words = shlex.split(extras.install_command("writers"))
    assert words[-4:-1] == ["pip", "install", "-e"]
    folder, extra = re.fullmatch(r"(.*)\[(.*)\]", words[-1]).groups()
    assert (folder == ".") == here
    assert extra in extras_of(folder)


def test_an_environment_of_uv_has_no_pip_of_its_own(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    assert extras.install_command("gcs").startswith("uv pip install -e ")


def test_no_message_names_a_package_that_no_index_has():
    named = set()
    for file in (ROOT / "dpo_jax").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"install ['\"]?dpo_jax\[", text), file
        named |= set(re.findall(r"install_command\([\"'](\w+)", text))
    assert named <= extras_of(ROOT)
    assert len(named) >= 5
