"""The launch scripts, run for real on an imitation of a fresh machine: stub Pythons that write down what they are asked."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
TOOLS = ("bash", "cat", "cksum", "cp", "date", "dirname", "env", "mkdir", "rm", "sed", "chmod", "tee")
PYTHON = """#!/usr/bin/env bash
# $0 is $VERSION; as `-m venv DIR` it copies itself to DIR/bin, beside a dpo-jax and a stub of pip.
echo "$(basename "$(dirname "$(dirname "$0")")")/${0##*/} $*" >> "$CALLS"
case "$*" in
  *"import torch"*) exit 1 ;;
  *version_info*) [ VERSION_MINOR -ge 11 ] ;;
  -V) echo "Python 3.VERSION_MINOR.0" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/dpo-jax"; echo home > "$3/pyvenv.cfg" ;;
  "-m pip install "*) [ ! -e "$CALLS.offline" ] || { echo "no network" >&2; exit 1; } ;;
esac
"""


class Machine:
    """A clone of the repository's scripts, a PATH with nothing but `TOOLS` and the stubs, and a home without pyenv."""

    def __init__(self, path):
        self.repository, self.bin, self.calls = path / "clone", path / "tools" / "bin", path / "calls"
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        shutil.copytree(ROOT / "configs", self.repository / "configs", ignore=shutil.ignore_patterns("*.png"))
        shutil.copy(ROOT / "pyproject.toml", self.repository)
        (path / "home").mkdir()
        self.bin.mkdir(parents=True)
        for tool in (*TOOLS, "basename"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment = {"PATH": str(self.bin), "HOME": str(path / "home"), "CALLS": str(self.calls)}
        self.environment["DPO_JAX_SYS"] = str(path / "sys")

    def add_python(self, name, minor, *, folder=None):
        file = (folder or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PYTHON.replace("VERSION_MINOR", str(minor)))
        file.chmod(0o755)

    def add_smi(self, cuda):
        smi = self.bin / "nvidia-smi"
        smi.write_text(f"#!/usr/bin/env bash\necho '| NVIDIA-SMI 580.1    Driver Version: 580.1    CUDA Version: {cuda}   |'\n")
        smi.chmod(0o755)

    def run(self, script, *args, **environment):
        self.calls.write_text("")
        command = [self.repository / script, *args]
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, cwd="/")

    def called(self, text):
        return [line for line in self.calls.read_text().splitlines() if text in line and "--check" not in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_explains_and_touches_nothing(script, machine):
    done = machine.run(f"launch/{script.name}", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: ./launch/{script.name}")
    assert done.stderr == ""
    assert not (machine.repository / ".venv").exists()


def test_env_installs_once(machine):
    machine.add_python("python3", 12)
    done = machine.run("launch/env.sh")
    assert done.returncode == 0, done.stderr
    assert "creating .venv with Python 3.12.0" in done.stderr
    assert "installing dpo_jax[cpu,test] with pip" in done.stderr
    assert len(machine.called("-m pip install")) == 1
    again = machine.run("launch/env.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not machine.called("-m")


def test_env_follows_pyproject_and_adds_extras(machine):
    machine.add_python("python3", 12)
    machine.run("launch/env.sh")
    machine.run("launch/env.sh", DPO_JAX_EXTRAS="test,lint")
    assert machine.called("--editable .[cpu,test,lint]")
    machine.run("launch/env.sh", DPO_JAX_EXTRAS="lint")
    assert not machine.called("-m pip")
    with open(machine.repository / "pyproject.toml", "a") as file:
        file.write("\n# changed\n")
    machine.run("launch/env.sh")
    assert machine.called("--editable .[cpu,test,lint]")
    assert not machine.called("-m venv")


def test_env_starts_over_after_a_failed_install(machine):
    machine.add_python("python3", 12)
    offline = Path(f"{machine.calls}.offline")
    offline.touch()
    assert machine.run("launch/env.sh").returncode != 0
    offline.unlink()
    assert machine.run("launch/env.sh").returncode == 0
    assert machine.called("-m pip install")


def test_env_touches_no_environment_of_others(machine):
    machine.add_python("python3", 12)
    other = machine.repository / "mine"
    (other / "lib").mkdir(parents=True)
    (other / "pyvenv.cfg").write_text("home")
    done = machine.run("launch/env.sh", DPO_JAX_VENV="mine")
    assert (done.returncode, (other / "lib").is_dir()) == (1, True)
    assert "mine was not made by this script: remove it, or name another place in DPO_JAX_VENV" in done.stderr


def test_env_keeps_what_works_if_an_update_fails(machine):
    """Without a network a changed pyproject.toml cannot be followed; the environment may be in use by a run."""
    machine.add_python("python3", 12)
    assert machine.run("launch/env.sh").returncode == 0
    with open(machine.repository / "pyproject.toml", "a") as file:
        file.write("\n# changed\n")
    Path(f"{machine.calls}.offline").touch()
    for _ in range(2):
        assert machine.run("launch/env.sh").returncode != 0
        assert not machine.called("-m venv")
        assert (machine.repository / ".venv" / "bin" / "dpo-jax").is_file()
    Path(f"{machine.calls}.offline").unlink()
    assert machine.run("launch/env.sh").returncode == 0
    assert machine.called("--editable .[cpu,test]")


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        ({"python3": 9, "python3.12": 12, "python3.13": 13}, "3.13.0"),
        ({"python3": 11, "python3.13": 13}, "3.11.0"),
        ({"python3": 10, "~/.pyenv/versions/3.10.1/bin/python3": 10, "~/.pyenv/versions/3.12.1/bin/python3": 12}, "3.12.0"),
    ],
)
def test_env_finds_a_python_that_runs(machine, pythons, expected):
    for name, minor in pythons.items():
        path = Path(name.replace("~", machine.environment["HOME"]))
        machine.add_python(path.name, minor, folder=path.parent if path.is_absolute() else None)
    broken = machine.bin / "python3.14"  # as a pyenv shim of a version that is not chosen
    broken.write_text("#!/usr/bin/env bash\nexit 127\n")
    broken.chmod(0o755)
    done = machine.run("launch/env.sh")
    assert f"with Python {expected}" in done.stderr, done.stderr


def test_env_says_what_is_missing(machine):
    machine.add_python("python3", 10)
    done = machine.run("launch/env.sh")
    assert done.returncode == 1
    assert "no Python 3.11 or newer with the venv module found" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    done = machine.run("launch/env.sh", DPO_JAX_PYTHON="python3")
    assert "DPO_JAX_PYTHON=python3 does not run, is older than 3.11" in done.stderr
    assert machine.run("launch/env.sh", DPO_JAX_INSTALLER="conda").returncode == 1
    assert machine.run("launch/env.sh", "extra").returncode == 2


def test_env_makes_the_environment_anew_for_another_python(machine):
    machine.add_python("python3", 11)
    machine.add_python("python3.13", 13)
    machine.run("launch/env.sh")
    done = machine.run("launch/env.sh", DPO_JAX_PYTHON="python3.13")
    assert "recreating it" in done.stderr
    assert machine.called("-m pip install")
    assert machine.run("launch/env.sh", DPO_JAX_PYTHON="python3.13").stderr == ""


@pytest.mark.parametrize(("version", "extra"), [("13.1", "cuda13"), ("12.8", "cuda12")])
def test_env_sees_a_gpu(machine, version, extra):
    machine.add_python("python3", 12)
    machine.add_smi(version)
    assert f"dpo_jax[{extra},test]" in machine.run("launch/env.sh").stderr


def test_env_leaves_an_environment_of_another_machine_alone(machine):
    """Two machines may share a checkout, and a run on the other one may be using .venv."""
    machine.add_python("python3", 12)
    machine.add_smi("12.8")
    assert machine.run("launch/env.sh").returncode == 0
    machine.add_smi("13.1")
    done = machine.run("launch/env.sh")
    assert done.returncode == 1
    assert ".venv has JAX for another CUDA version, but cuda13 is needed here" in done.stderr
    assert not machine.called("-m pip")
    assert machine.run("launch/env.sh", DPO_JAX_EXTRAS="cuda12,test").stderr == ""
    python = machine.repository / ".venv" / "bin" / "python"
    python.write_text("not for this machine")
    done = machine.run("launch/env.sh")
    assert done.returncode == 1
    assert "the Python of .venv does not run here: it was made on another machine, or its Python is gone" in done.stderr
    assert python.read_text() == "not for this machine"
    assert machine.run("launch/env.sh", DPO_JAX_VENV="mine").returncode == 0


@pytest.mark.parametrize(("device", "extra"), [("0x0063", "tpu"), ("0x0042", "cpu")], ids=["v5e", "network card"])
def test_env_sees_a_tpu(machine, tmp_path, device, extra):
    machine.add_python("python3", 12)
    card = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text(f"{device}\n")
    assert f"dpo_jax[{extra},test]" in machine.run("launch/env.sh").stderr


def test_env_uses_uv_where_it_is(machine):
    uv = machine.bin / "uv"
    uv.write_text(
        '#!/usr/bin/env bash\necho "uv $*" >> "$CALLS"\n'
        'if [ "$1" = venv ]; then mkdir -p .venv/bin; echo "exit 0" > .venv/bin/python; chmod +x .venv/bin/python; fi\n'
    )
    uv.chmod(0o755)
    assert machine.run("launch/env.sh").returncode == 0
    assert machine.called("uv venv --quiet --python >=3.11 .venv")
    assert machine.called("uv pip install --quiet --python .venv/bin/python --editable .[cpu,test]")


def test_quickstart_takes_the_steps_in_order(machine):
    machine.add_python("python3", 12)
    done = machine.run("launch/quickstart.sh")
    assert done.returncode == 0, done.stderr
    steps = [line.split(" ", 1)[1] for line in machine.called("dpo-jax")]
    assert steps == [f"{step} configs/quickstart.yaml" for step in ("audit", "sft", "refs", "dpo", "eval")]
    machine.run("launch/quickstart.sh", "configs/hh_small.yaml", "--data.path", "a b")
    assert [line.split(" ", 1)[1] for line in machine.called("dpo-jax")][4] == "eval configs/hh_small.yaml --data.path a b"


def test_a_dry_run_of_the_quickstart_installs_nothing(machine):
    machine.add_python("python3", 12)
    done = machine.run("launch/quickstart.sh", "--dry-run", "configs/hh_small.yaml", "--data.path", "a b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "./launch/env.sh"
    assert lines[5] == ".venv/bin/dpo-jax eval configs/hh_small.yaml --data.path 'a b'"
    assert machine.calls.read_text() == ""
    assert not (machine.repository / ".venv").exists()
    assert "not options, data and models: dpo-jax is missing" in done.stderr
    for words, message in ((["configs/nope.yaml"], "configs/nope.yaml: no such file"), (["--run.seed", "1"], "comes first")):
        refused = machine.run("launch/quickstart.sh", "--dry-run", *words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr


@pytest.mark.parametrize("late", ["--dry-run", "--help", "--check"])
@pytest.mark.parametrize("script", ["quickstart.sh", "bench.sh", "gpu_node.sh start dpo", "slurm.sbatch dpo"])
def test_what_asks_to_run_nothing_is_not_handed_on(machine, script, late):
    machine.add_python("python3", 12)
    name, *before = script.split()
    smi = machine.bin / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\necho 'GPU 0: some'\n")
    smi.chmod(0o755)
    done = machine.run(f"launch/{name}", *before, "configs/hh_small.yaml", "--run.seed", "1", late)
    assert (done.returncode, done.stdout, machine.calls.read_text()) == (2, "", "")
    assert f"{late} must come first" in done.stderr or f"{late}: the command is checked anyway" in done.stderr


def test_a_dry_run_of_the_benchmarks_writes_and_installs_nothing(machine):
    machine.add_python("python3", 12)
    race = machine.run("launch/bench.sh", "--dry-run", "--data.path", "a b", DPO_JAX_TORCH="torch==2.13.0")
    assert race.returncode == 0, race.stderr
    assert machine.calls.read_text() == ""
    assert race.stdout.splitlines() == [
        "env DPO_JAX_VENV=.venv-bench ./launch/env.sh",
        ".venv-bench/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0",
        "env DPO_JAX_VENV=.venv-bench DPO_JAX_EXTRAS=bench ./launch/env.sh",
        ".venv-bench/bin/dpo-jax bench configs/bench_hh_cpu.yaml --data.path 'a b'",
    ]
    first = machine.run("launch/first_gpu.sh", "--dry-run", "out")
    assert first.returncode == 0, first.stderr
    assert not machine.called("dpo_jax")
    check, bench, race = first.stdout.splitlines()
    assert check == "python3 -m dpo_jax.check --json out/check.json"
    assert "--bench --seconds 240 --json out/bench.json" in bench
    assert "bench configs/bench_first_gpu.yaml" in race
    assert not (machine.repository / "out").exists()


def test_quickstart_stops_at_the_first_failure(machine):
    machine.add_python("python3", 12)
    machine.run("launch/env.sh")
    command = machine.repository / ".venv" / "bin" / "dpo-jax"
    command.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[ "$1" != sft ] || [[ "$*" == *--check* ]] || exit 65\n')
    assert machine.run("launch/quickstart.sh").returncode == 65
    assert machine.calls.read_text().split()[-2:] == ["sft", "configs/quickstart.yaml"]
    command.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[[ "$*" != eval*--check* ]] || exit 2\n')
    assert machine.run("launch/quickstart.sh").returncode == 2  # found before the audit
    assert not machine.called("configs")


def test_test_script_runs_pytest(machine):
    machine.add_python("python3", 12)
    assert machine.run("launch/test.sh", "-m", "soak").returncode == 0
    last = machine.calls.read_text().splitlines()[-1]
    assert last.endswith("python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m soak")


def test_bench_has_an_environment_of_its_own_with_the_torch_it_is_told(machine):
    machine.add_python("python3", 12)
    done = machine.run("launch/bench.sh", "--data.path", "a b", DPO_JAX_TORCH="torch==2.13.0")
    assert done.returncode == 0, done.stderr
    installed = [line.rsplit(" ", 1)[1] for line in machine.called("-m pip install")]
    assert installed == [".[cpu,test]", "torch==2.13.0", ".[cpu,test,bench]"]
    assert (machine.repository / ".venv-bench" / ".dpo_jax").is_file()
    (line,) = machine.called("dpo-jax bench")
    assert line.endswith("bench configs/bench_hh_cpu.yaml --data.path a b")
    (machine.repository / "configs" / "other.yaml").touch()
    machine.run("launch/bench.sh", "configs/other.yaml")
    assert machine.called("dpo-jax bench")[0].endswith("bench configs/other.yaml")
    assert not machine.called("torch==2.13.0")


def test_first_gpu_takes_every_step_also_after_a_failure(machine):
    machine.add_python("python3", 12)
    done = machine.run("launch/first_gpu.sh", "out")
    assert done.returncode == 0, done.stderr
    check, bench, _, _, race = machine.called("python3 ")
    assert check.endswith("-m dpo_jax.check --json out/check.json")
    assert "-m dpo_jax.check --only bench --bench --seconds 240 --json out/bench.json --profile out/trace-" in bench
    assert race.endswith("bench configs/bench_first_gpu.yaml --bench.contenders torch-live,torch-cached,trl-best,jax-attention")
    failing = machine.bin / "failing"
    failing.write_text('#!/usr/bin/env bash\necho "failing $*" >> "$CALLS"\nexit 1\n')
    failing.chmod(0o755)
    done = machine.run("launch/first_gpu.sh", DPO_JAX_PYTHON="failing")
    assert done.returncode == 1
    assert len(machine.called("dpo_jax.check")) == 2
    assert "race: left out, failing has no torch or no transformers" in done.stderr


def test_scripts_can_be_run_and_name_no_index():
    for script in (*SCRIPTS, ROOT / ".ci" / "run"):
        assert os.access(script, os.X_OK), script
        subprocess.run(["bash", "-n", script], check=True)
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert not list(ROOT.glob("*.lock")) + list(ROOT.glob("requirements*.txt"))


def test_this_python_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
    assert {"cpu", "cuda12", "cuda13", "tpu", "test", "parity", "bench", "lint", "writers"} <= set(
        project["optional-dependencies"]
    )


@pytest.fixture
def clone(machine):
    """The machine with a committed repository of a few modules and tests."""
    for tool in ("git", "grep", "sort", "uniq", "cut"):
        (machine.bin / tool).symlink_to(shutil.which(tool))
    files = {
        "dpo_jax/models/rope.py": "",
        "dpo_jax/models/decoder.py": "from dpo_jax.models.rope import Rope\n",
        "dpo_jax/data/pairs.py": "",
        "tests/helper.py": "",
        "tests/test_layers.py": "",
        "tests/test_pairs.py": "",
        "tests/test_files.py": "import helper\n\nfrom dpo_jax.data import loader, pairs\n",
        "tests/test_models.py": "from dpo_jax.models.decoder import make_model\n",
    }
    for name, text in files.items():
        (machine.repository / name).parent.mkdir(parents=True, exist_ok=True)
        (machine.repository / name).write_text(text)
    machine.environment |= {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=machine.repository, env=machine.environment, check=True)
    return machine


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        (["dpo_jax/data/pairs.py"], ["layers", "pairs", "files"]),
        (["dpo_jax/models/rope.py"], ["layers", "models"]),  # through the decoder
        (["dpo_jax/models/decoder.py", "tests/test_new.py"], ["layers", "new", "models"]),
        (["tests/helper.py"], ["files"]),
        (["configs/README.md"], ["readmes"]),
        (["launch/env.sh", "launch/notebook.ipynb"], ["launch", "notebook"]),
        (["LICENSE"], []),
    ],
    ids=" ".join,
)
def test_before_a_commit_the_tests_of_what_changed_are_run(clone, changed, tests):
    for name in changed:
        with (clone.repository / name).open("a") as file:
            file.write("\n")
    done = clone.run("launch/precommit.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert clone.calls.read_text() == ""
    environment, *commands = done.stdout.splitlines()
    assert environment == "env DPO_JAX_EXTRAS=cpu,test,lint ./launch/env.sh"
    chosen = [f"tests/test_{name}.py" for name in tests]
    start = ".venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --as-given --within 25 "
    assert [line.removeprefix(start).split() for line in commands if "pytest" in line] == ([chosen] if chosen else [])
    python = [name for name in changed if name.endswith(".py")]
    assert [line.split()[2:] for line in commands if "ruff check" in line] == ([python] if python else [])
    assert any("pyright" in line for line in commands) == any(name.startswith("dpo_jax/") for name in python)
    assert any("shellcheck" in line for line in commands) == ("launch/env.sh" in changed)


def test_no_test_begins_after_the_time_that_is_given():
    options = ("-p", "no:cacheprovider", "--within", "-1", "-k", "front_door", "tests/test_layers.py")
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "s"), done.stdout


def test_a_commit_can_be_compared_with_an_earlier_one(clone):
    (clone.repository / "tests" / "test_pairs.py").write_text("x = 1\n")
    subprocess.run(["git", "commit", "-qam", "second"], cwd=clone.repository, env=clone.environment, check=True)
    assert "pytest" not in clone.run("launch/precommit.sh", "--dry-run").stdout
    assert "tests/test_pairs.py" in clone.run("launch/precommit.sh", "--dry-run", "HEAD~1").stdout
    assert clone.run("launch/precommit.sh", "--fast").returncode == 2
