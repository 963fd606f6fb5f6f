"""A module imports only from lower floors, and the heavy or restricted packages have one door each."""

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpo_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


# First match wins. Modules of one floor may import each other, as far as Python itself allows.
FLOORS = [
    (1, ["types.py", "extras.py", "untrusted.py", "shapes.py", "writing.py", "locks.py"]),
    (1, ["loss_table.py", "own_loss.py", "optimizer_table.py", "option.py"]),
    (2, ["losses/", "head.py", "logps.py", "routing.py", "step.py", "microbatches.py", "whole_batch.py", "rounding.py"]),
    (2, ["sampling/", "models/", "data/"]),
    (3, ["diffusion/", "dpo.py", "cpl.py", "sft.py", "reward_model.py", "ppo.py", "reference.py", "dataset_logps.py"]),
    (4, ["runtime/"]),
    (5, ["training/"]),
    (6, ["plotting/", "evals/", "judge/", "study/", "report/", "bench/", "lab/", "online/", "control/", "checks/", "check.py"]),
    (7, ["cli/"]),
]
ONLY_IN = {
    "flax": [
        *("models/decoder.py", "models/experts.py", "models/layers.py"),
        *("control/policies.py", "diffusion/network.py"),
    ],
    "gymnasium": ["control/pendulum.py"],
    "PIL": ["data/images.py"],
    "orbax": ["runtime/checkpoint.py"],
    "yaml": ["cli/config/file.py"],
    "tyro": ["cli/flags.py"],
    "tensorflow_datasets": ["data/tfds.py"],
    "huggingface_hub": ["models/hub.py", "models/origin.py", "data/hub_files.py"],
    # Curves of a run, the frontier, reliability, win rates, the race.
    "matplotlib": [
        "evals/frontier_panels.py",
        *("plotting/drawing.py", "plotting/training_curves.py", "evals/frontier_plot.py", "evals/calibration_plot.py"),
        *("lab/robust_plot.py", "lab/digits_plot.py", "lab/scenes_report.py", "control/figure.py"),
        "judge/win_rates_plot.py",
        "bench/plots.py",
    ],
    "tensorboardX": ["runtime/writers.py"],
    "wandb": ["runtime/writers.py"],
    "trackio": ["runtime/writers.py"],
    "torch": [
        *("bench/torch_loop.py", "bench/torch_sampler.py", "bench/trl_loop.py", "bench/matmul.py"),
        "evals/reward_functions.py",  # other people's classifiers
    ],
    "sklearn": ["evals/reward_functions.py", "lab/digits.py"],
    "vaderSentiment": ["evals/reward_functions.py"],
    "httpx2": ["judge/endpoint.py"],
    "trl": ["bench/trl_loop.py"],
    "datasets": ["bench/trl_loop.py"],
}
NOWHERE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tensorflow"}
# --help answers at once
LIGHT = [
    *sorted(name_of(path) for path in (PACKAGE / "cli" / "config").glob("*.py")),
    *(f"cli/{name}.py" for name in ("command_table", "exit_codes", "fixed", "flags", "main", "preflight/scope")),
    *("cli/words.py", "cli/word_table.py"),
    *(
        "runtime/signals.py",
        "runtime/progress.py",
        "data/terminal.py",
        "data/format_table.py",
        "untrusted.py",
        "shapes.py",
        "writing.py",
        "loss_table.py",
        "own_loss.py",
        "optimizer_table.py",
        "option.py",
    ),
]
# What runs in the processes of the PyTorch contenders, where JAX would count as their memory.
WITHOUT_JAX = [f"bench/{name}.py" for name in ("contender", "matmul", "torch_loop", "torch_sampler", "trl_loop", "work")]


def floor_of(name):
    return next((floor for floor, places in FLOORS for place in places if name == place or name.startswith(place)), None)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(), str(path))


@functools.cache
def imported(path, *, at_import_only=False):
    """(line, dotted module) of each import; `from package import module` counts as both."""
    found, todo = [], list(tree_of(path).body)
    while todo:
        node = todo.pop()
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            found += [(node.lineno, node.module)] + [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        todo.extend(ast.iter_child_nodes(node))
    return found


def imports(names=None, *, at_import_only=False):
    """(module, "module:line", dotted) of each import in the modules `names`, or in all."""
    for path in MODULES if names is None else [PACKAGE / name for name in names]:
        for line, dotted in imported(path, at_import_only=at_import_only):
            yield name_of(path), f"{name_of(path)}:{line}", dotted


def own_module(dotted):
    """`dpo_jax.data.pairs.DataError` -> `data/pairs.py`; None for what is not a module of this package."""
    first, *parts = dotted.split(".")
    path = PACKAGE.joinpath(*parts)
    if first != "dpo_jax" or not parts:
        return None
    if path.with_suffix(".py").is_file():
        return name_of(path.with_suffix(".py"))
    return f"{'/'.join(parts)}/" if path.is_dir() else None


def test_imports_only_from_lower_floors():
    front = "__init__.py"  # the front door names everything, lazily
    assert not [dotted for _, dotted in imported(PACKAGE / front, at_import_only=True) if own_module(dotted)]
    assert not [name_of(path) for path in MODULES if not floor_of(name_of(path)) and name_of(path) != front], "add to FLOORS"
    upwards = [
        f"{place} imports {dotted}"
        for name, place, dotted in imports()
        if name != front and (other := own_module(dotted)) and floor_of(other) > floor_of(name)
    ]
    assert not upwards, "imports from a higher floor"


def test_commands_are_no_library():
    """What several need lies beside them. Only `starting_policy` runs another command: it trains a missing reference."""
    borrowed = [
        f"{place} imports {dotted}"
        for name, place, dotted in imports()
        if dotted.startswith("dpo_jax.cli.commands.") and name != "cli/starting_policy.py"
    ]
    assert not borrowed


def test_packages_with_one_door():
    for name, place, dotted in imports():
        package = dotted.split(".")[0]
        assert package not in NOWHERE, f"{place} imports {package}"
        assert name in ONLY_IN.get(package, [name]), f"{place} imports {package}; only {ONLY_IN[package]} may"


def test_nothing_runs_what_it_reads():
    running = ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.load")
    calls = [(path, node) for path in MODULES for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert calls
    for path, node in calls:
        called = ast.unparse(node.func)
        if name_of(path) == "own_loss.py" and called in ("exec", "compile"):  # the code that dpo.loss names
            continue
        assert called not in running, f"{name_of(path)}:{node.lineno} calls {called}"
        for keyword in node.keywords:
            trusting = keyword.arg == "trust_remote_code" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            assert not trusting, f"{name_of(path)}:{node.lineno} trusts remote code"


# A log that names itself line by line, an object in a bucket, the output of contenders' processes.
UNNAMED = {"open(self.path, 'ab')", "path.write_text(text)", "open(log, 'wb')"}
UNNAMED |= {"open(os.devnull, 'w')"}
WRITERS = ("open", "write_text", "write_bytes", "savefig", "save_file", "save_pretrained")


def unnamed_writes(node):
    """Calls that write a file and do not stand in `with naming(...)`."""
    if isinstance(node, ast.With) and any(
        ast.unparse(item.context_expr).startswith(("naming(", "placing(")) for item in node.items
    ):
        return
    if isinstance(node, ast.Call):
        *owner, called = ast.unparse(node.func).split(".")
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        opened = called != "open" or any(re.fullmatch(r"[wax]b?", mode) for mode in modes)
        if called in WRITERS and (owner or called in ("open", "save_file")) and opened:
            yield node.lineno, ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from unnamed_writes(child)


def test_what_fails_to_be_written_is_named():
    unnamed = [
        f"{name_of(path)}:{line}: {call[:60]}"
        for path in MODULES
        for line, call in unnamed_writes(tree_of(path))
        if call not in UNNAMED
    ]
    assert not unnamed, "write with dpo_jax.writing, or in `with naming`"


def test_help_imports_nothing_heavy():
    allowed = {name for name in LIGHT if name != "cli/main.py"} | {"cli/", "cli/config/", "cli/preflight/", "data/"}
    heavy = {"jax", "numpy", "flax", "transformers", "orbax", "optax", "tyro"}
    for _, place, dotted in imports(LIGHT, at_import_only=True):
        assert dotted.split(".")[0] not in heavy, f"{place} imports {dotted}"
        other = own_module(dotted)
        assert other is None or other in allowed, f"{place} imports {dotted}"


def test_optional_packages_wait_until_they_are_needed():
    for name, place, dotted in imports(at_import_only=True):
        optional = {"sklearn", "vaderSentiment", "httpx2", "gymnasium"} | (set() if name.startswith("bench/") else {"torch"})
        assert dotted.split(".")[0] not in optional, f"{place} imports {dotted} for everyone"


def test_pytorch_contenders_import_no_jax():
    allowed = {*WITHOUT_JAX, "bench/", "data/", "data/encode.py", "writing.py"}
    for _, place, dotted in imports(WITHOUT_JAX, at_import_only=True):
        assert dotted.split(".")[0] not in {"jax", "flax", "optax"}, f"{place} imports {dotted}"
        other = own_module(dotted)
        assert other is None or other in allowed, f"{place} imports {dotted}"


def test_the_front_door_shows_type_checkers_what_it_opens():
    import dpo_jax

    shown = {
        dotted for _, dotted in imported(PACKAGE / "__init__.py") if dotted.startswith("dpo_jax.") and not own_module(dotted)
    }
    assert shown == {f"dpo_jax.{module}.{name}" for name, module in dpo_jax._HOME.items()}
    assert all(getattr(dpo_jax, name) for name in dpo_jax.__all__)


def test_no_layer_is_a_drawer():
    assert not [name_of(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "common", "misc")]


@pytest.mark.parametrize("room", ["evals", "judge", "study", "report"])
def test_rooms_are_small(room):
    files = [name_of(path) for path in (PACKAGE / room).rglob("*.py")]
    assert 0 < len(files) <= 12, f"{len(files)} files in {room}/: split it by what knows what"


def test_the_reading_order_is_short():
    """What `dpo_jax/README.md` names first: the method."""
    files = [(PACKAGE / name).read_text() for name in ("dpo.py", "logps.py", "step.py")]
    margin = (PACKAGE / "losses" / "margin.py").read_text()
    loss = next(one for one in ast.parse(margin).body if getattr(one, "name", "") == "dpo_loss")
    assert sum(len(text.splitlines()) for text in [*files, ast.get_source_segment(margin, loss)]) <= 500


@pytest.mark.parametrize(("folder", "most"), [(PACKAGE, 400), (Path(__file__).parent, 500)], ids=["package", "tests"])
def test_files_are_short(folder, most):
    lines = {path.relative_to(folder).as_posix(): len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert len(lines) > 50
    assert not {name: count for name, count in lines.items() if count > most}, "split it by what it knows"
