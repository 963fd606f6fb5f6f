"""Checkpoints come back bit for bit on any layout, and damage to any of their files is found."""

import errno
import hashlib
import json
import logging
import os
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import FAULTS, damage
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.cli.model_folders import saved_steps
from dpo_jax.runtime import hosts, optim, parallel, seal
from dpo_jax.runtime.checkpoint import CheckpointDamaged, Checkpoints, StateMismatch, has_steps, newest_meta
from dpo_jax.runtime.checkpoint_record import named
from dpo_jax.runtime.fit import fit
from dpo_jax.runtime.metrics import MetricsLog, read_metrics
from dpo_jax.types import TrainState
from dpo_jax.untrusted import Unreadable

# When one of several reads fails, the callbacks of the others find orbax's event loop closed, and Python prints that: noise.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TX = optim.make_optimizer(optim.linear_warmup(0.01, warmup_steps=4), max_grad_norm=1.0)


class Batch:
    def __init__(self, index):
        self.rows = np.random.default_rng(index).normal(size=(4, 16)).astype(np.float32)
        self.uids, self.stats = [f"row {index}"], {"pairs": 2}


def make_state(seed=0, width=16):
    weights = np.random.default_rng(seed).normal(size=(3, width, width)).astype(np.float32)
    params = {
        "params": {
            "layers": {"kernel": jnp.asarray(weights), "scale": jnp.ones((1, width), jnp.bfloat16)},
            "bias": jnp.zeros(()),
        }
    }
    return TrainState(jnp.int32(0), params, TX.init(params))


def train_step(state, rows):
    def objective(params):
        hidden = rows
        for layer in range(3):
            hidden = jnp.tanh(hidden @ params["params"]["layers"]["kernel"][layer])
        scaled = hidden * params["params"]["layers"]["scale"].astype(jnp.float32) + params["params"]["bias"]
        return (scaled**2).mean()

    loss, grads = jax.value_and_grad(objective)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {
        "loss": loss,
        "grad_norm": jnp.abs(grads["params"]["bias"]),
    }


def abstract():
    return jax.eval_shape(make_state)


def digest(state):
    """SHA-256 over all leaves."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        sha.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).tobytes())
    return sha.hexdigest()


def numbered(step):
    return make_state(seed=step).replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 10 and 20. Tests damage a copy of it."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (10, 20):
            state = numbered(step)
            checkpoints.save(state.step, state, {"config": {"beta": 0.1}, "step": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restored(directory):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_latest(abstract())


def quarantined(directory):
    return sorted(path.name for path in (directory / "quarantine").iterdir()) if (directory / "quarantine").exists() else []


def test_what_is_saved_comes_back_bit_for_bit(saved):
    state, meta = restored(saved)
    assert digest(state) == digest(numbered(20))
    assert meta == {"config": {"beta": 0.1}, "step": 20}
    assert jax.tree.structure(state) == jax.tree.structure(numbered(20))
    assert state.params["params"]["layers"]["scale"].dtype == jnp.bfloat16
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))


def test_an_empty_directory_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_only_the_newest_are_kept_and_the_deleted_are_gone(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, numbered(step), {})
        assert checkpoints.latest_step() == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["4", "5"]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((512, 1024)), "n": jnp.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        for index in range(1, 4):
            checkpoints.save(index, state, {})
            for _ in range(20):
                state = step(state)
        checkpoints.wait()
        back, _ = checkpoints.restore_latest(state)
    assert int(back["n"]) == 40
    assert (np.asarray(back["w"]) == 40).all()


def test_saved_on_one_layout_restored_on_another(tmp_path):
    one, four = (Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor")) for shape in ((1, 4), (4, 1)))
    across = NamedSharding(one, PartitionSpec("data", "tensor"))
    down = NamedSharding(four, PartitionSpec("data", "tensor"))
    values = np.arange(32.0, dtype=np.float32).reshape(4, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(values, across)}, {})
        back, _ = checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=down)})
    assert back["w"].sharding == down
    np.testing.assert_array_equal(back["w"], values)


def biggest(directory, step="20", under="state"):
    return max((path for path in (directory / step / under).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("under", ["state", "record"])
def test_a_damaged_file_is_found_and_the_older_step_used(copy, fault, under, caplog):
    damage(biggest(copy, under=under), fault)
    with caplog.at_level(logging.WARNING, "dpo_jax"):
        state, meta = restored(copy)
    assert digest(state) == digest(numbered(10))
    assert meta["step"] == 10
    assert quarantined(copy) == ["20-0"]
    assert not (copy / "20").exists()
    assert "checkpoint of step 20 does not verify" in caplog.text
    with Checkpoints(copy) as checkpoints:  # the step is free again
        checkpoints.restore_latest(abstract())
        checkpoints.save(20, numbered(20), {})
    assert digest(restored(copy)[0]) == digest(numbered(20))


def test_a_reader_changes_nothing(copy):
    damage(biggest(copy), "bit")
    shutil.copytree(copy / "10", copy / "30.orbax-checkpoint-tmp")  # another process is saving
    before = sorted(copy.rglob("*"))
    with Checkpoints(copy, read_only=True) as checkpoints:
        state, _ = checkpoints.restore_latest(abstract())
        with pytest.raises(ValueError, match="step 30 was not saved"):
            checkpoints.save(30, numbered(30), {})
    assert digest(state) == digest(numbered(10))
    assert sorted(copy.rglob("*")) == before
    with Checkpoints(copy / "absent", read_only=True) as checkpoints:
        assert checkpoints.restore_latest(abstract()) is None


def test_a_half_deleted_step_is_set_aside(copy):
    shutil.rmtree(copy / "20" / "state" / "d")
    assert digest(restored(copy)[0]) == digest(numbered(10))
    assert quarantined(copy) == ["20-0"]


@pytest.mark.parametrize("part", ["_read_record", "_read_leaves"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        ValueError("RESOURCE_EXHAUSTED: Error opening file [os_error_code='24']"),
        ValueError("UNAVAILABLE: 503"),
        ValueError("CANCELLED: the request"),
        MemoryError(),
        jax.errors.JaxRuntimeError("INTERNAL"),
    ],
    ids=repr,
)
def test_an_error_of_the_storage_moves_nothing(copy, monkeypatch, part, error):
    def failing(*arguments, **options):
        try:
            raise error
        except Exception as first:
            raise ValueError("wrapped by a library") from first

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, part, failing)
        with pytest.raises(ValueError, match="wrapped by a library"):
            restored(copy)
    assert quarantined(copy) == []
    assert digest(restored(copy)[0]) == digest(numbered(20))


def test_too_many_open_files_move_nothing(copy):
    """The same with the real error, as orbax and TensorStore raise it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpoints(copy) as checkpoints:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises((OSError, ValueError), match="Too many open files"):
                checkpoints.restore_latest(abstract())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert quarantined(copy) == []
        assert digest(checkpoints.restore_latest(abstract())[0]) == digest(numbered(20))


def test_the_storage_of_another_host_moves_nothing_here(copy, monkeypatch):
    """Host 0 reads well, or finds damage at the same time: nothing moves as long as another host could not read."""
    damage(biggest(copy), "bit")
    answers = iter([True])
    monkeypatch.setattr(hosts, "anywhere", lambda flag: next(answers))
    with pytest.raises(OSError, match="another host could not read the checkpoint; nothing was moved"):
        restored(copy)
    assert quarantined(copy) == []


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("NOT_FOUND: gone [os_error_code='2']")], ids=repr)
def test_a_file_that_the_first_host_sees_and_this_one_does_not_is_no_damage(copy, monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_read_leaves", failing)
        patch.setattr(hosts, "run_on_first", lambda make: True if make() in (True, False) else make())  # the first one reads it
        with pytest.raises(type(error), match="gone"):
            restored(copy)
    assert quarantined(copy) == []
    assert digest(restored(copy)[0]) == digest(numbered(20))


def test_a_stray_empty_folder_is_not_the_latest_step(copy, tmp_path):
    (copy / "30").mkdir()
    assert digest(restored(copy)[0]) == digest(numbered(20))
    assert not (copy / "30").exists()
    (tmp_path / "other" / "8").mkdir(parents=True)
    assert restored(tmp_path / "other") is None
    assert restored(tmp_path / "other") is None  # nothing was lost, so the next start is none after a loss
    for step in ("10", "20"):
        damage(biggest(copy, step=step), "bit")
    (copy / "40").mkdir()
    for told in ("no checkpoint verifies", "there are only steps"):
        with pytest.raises(CheckpointDamaged, match=told):
            restored(copy)
        (copy / "40").mkdir()  # it hides no loss


def test_a_step_under_another_number_is_set_aside(copy):
    (copy / "20").rename(copy / "25")
    assert digest(restored(copy)[0]) == digest(numbered(10))
    assert quarantined(copy) == ["25-0"]


def test_a_record_with_another_meta_is_set_aside(copy):
    path = biggest(copy, under="record")
    path.write_text(path.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    assert restored(copy)[1]["step"] == 10


def test_leftovers_of_a_kill_are_cleaned_up(copy):
    (copy / "deleting").mkdir(exist_ok=True)
    (copy / "10").rename(copy / "deleting" / "10")
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    with Checkpoints(copy) as checkpoints:
        assert digest(checkpoints.restore_latest(abstract())[0]) == digest(numbered(20))
        checkpoints.save(30, numbered(30), {})
    assert sorted(path.name for path in copy.iterdir() if path.is_dir()) == ["20", "30"]


def test_no_step_that_verifies_is_an_error_and_not_a_fresh_start(copy):
    for step in ("10", "20"):
        damage(biggest(copy, step), "bit")
    with pytest.raises(CheckpointDamaged, match=r"steps \[20, 10\], now in .*quarantine"):
        restored(copy)
    assert quarantined(copy) == ["10-0", "20-0"]
    with pytest.raises(
        CheckpointDamaged, match=r"only steps \[10, 20\] in .*quarantine.*or delete them to train from the beginning"
    ):
        restored(copy)  # as by an automatic restart
    shutil.rmtree(copy / "quarantine")
    assert restored(copy) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.replace(step=jax.ShapeDtypeStruct((), jnp.float32)), r"step: int32\[\] there, float32\[\] here"),
        (
            lambda state: jax.eval_shape(lambda: make_state(width=8)),
            r"params.params.layers.kernel: float32\[3, 16, 16\] there, float32\[3, 8, 8\] here",
        ),
        (lambda state: state.replace(opt_state=()), r"opt_state.*: float32\[\] there, absent here"),
        (lambda state: state.replace(frozen={"new": state.step}), r"frozen.new: absent there, int32\[\] here"),
    ],
)
def test_another_model_or_optimizer_is_refused_and_nothing_is_moved(copy, change, message):
    with Checkpoints(copy) as checkpoints, pytest.raises(StateMismatch, match=message):
        checkpoints.restore_latest(change(abstract()))
    assert quarantined(copy) == []
    assert digest(restored(copy)[0]) == digest(numbered(20))


def test_an_older_step_is_not_saved_over_a_newer_one(copy):
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(ValueError, match="step 15 was not saved: .* or already holds step 20"),
    ):
        checkpoints.save(15, numbered(15), {})


@pytest.mark.parametrize("make", [parallel.single_device, parallel.pmap_partitioner])
def test_twenty_steps_are_ten_and_ten(tmp_path, make):
    """Bit for bit, over all leaves, from another process's point of view: nothing but the directory is handed over."""
    partitioner = make()
    step = partitioner.compile_step(train_step) if partitioner.row_shards == 1 else replicated(partitioner)

    def run(name, total):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints, MetricsLog(tmp_path / name / "metrics.jsonl") as log:
            found = checkpoints.restore_latest(abstract())
            state = partitioner.put_state(make_state() if found is None else found[0])
            options = {"checkpoints": checkpoints, "log": log, "save_every": 4, "get_state": partitioner.get_state}
            return partitioner.get_state(fit(step, state, Batch, total_steps=total, **options))

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run("whole", 20)
    run("parts", 10)
    parts = run("parts", 20)
    assert int(parts.step) == 20
    assert digest(parts) == digest(whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 20


def replicated(partitioner):
    mapped = jax.pmap(train_step, axis_name=partitioner.axis_name)

    def run(state, rows):
        state, metrics = mapped(state, np.broadcast_to(rows, (partitioner.row_shards, *rows.shape)))
        return state, jax.tree.map(lambda leaf: leaf[0], metrics)

    return run


def losses(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows))), "each step once, in order"
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("tries", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_damage_to_any_file_of_a_step_is_found(saved, tmp_path, tries):
    """Each file, each fault, several places: always the older step, never a crash, a hang or a wrong number."""
    generator = random.Random(0)
    names = sorted(path.relative_to(saved / "20") for path in (saved / "20").rglob("*") if path.is_file())
    assert {name.name for name in names} > {"files.json", "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}
    count = 0
    for name in names:
        for fault in FAULTS:
            for _ in range(tries if fault in ("bit", "zeros") else 1):
                directory = Path(shutil.copytree(saved, tmp_path / "copy"))
                damage(directory / "20" / name, fault, generator)
                state, meta = restored(directory)
                assert (meta["step"], quarantined(directory)) == (10, ["20-0"]), (name, fault)
                assert digest(state) == digest(numbered(10))
                shutil.rmtree(directory)
                count += 1
    print(f"{len(names)} files of a step: {count} tries, {count} found")


def test_a_file_too_many_is_found(copy):
    (copy / "20" / "state" / "d" / "stray").write_bytes(b"")
    assert restored(copy)[1]["step"] == 10
    assert quarantined(copy) == ["20-0"]


def test_a_big_file_is_not_read_again_and_a_flipped_bit_in_an_array_is_found_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.runtime.seal.HASHED_BYTES", 1000)
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, numbered(step), {"step": step})
    path = biggest(tmp_path / "saved")
    files = json.loads((tmp_path / "saved" / "20" / "files.json").read_text())["files"]
    assert set(files[path.relative_to(tmp_path / "saved" / "20").as_posix()]) == {"bytes"}
    places = np.linspace(0, path.stat().st_size - 1, 40).astype(int)
    found = 0
    for place in places:
        directory = Path(shutil.copytree(tmp_path / "saved", tmp_path / "copy"))
        content = bytearray(biggest(directory).read_bytes())
        content[place] ^= 1
        biggest(directory).write_bytes(content)
        state, meta = restored(directory)
        assert digest(state) == digest(numbered(meta["step"]))  # what is not found lies where nobody reads
        found += meta["step"] == 10
        shutil.rmtree(directory)
    assert found > 30
    print(f"bits of a file above the limit: {len(places)} tries, {found} found, the others harmless")


def test_a_kill_between_commit_and_seal_does_not_lose_the_step(copy):
    (copy / "20" / "files.json").unlink()
    (copy / "unsealed").write_text("20")
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.restore_latest(abstract())[1]["step"] == 20
        assert not (copy / "20" / "files.json").exists()
    assert restored(copy)[1]["step"] == 20
    assert (copy / "20" / "files.json").is_file()
    assert not (copy / "unsealed").exists()
    (copy / "20" / "files.json").unlink()
    assert restored(copy)[1]["step"] == 10


def test_a_step_of_another_format_is_refused_and_stays(copy):
    path = copy / "20" / "record" / "metadata"
    record = json.loads(path.read_text()) | {"format": 1}
    del record["digest"]
    path.write_text(json.dumps(record | {"digest": seal.digest(record)}))
    with Checkpoints(copy) as checkpoints, pytest.raises(StateMismatch, match="is in format 1, but this version reads 3 and 4"):
        checkpoints.restore_latest(abstract())
    assert quarantined(copy) == []


def test_a_step_of_the_format_before_is_read_and_verified(copy):
    """Format 3 had a SHA-256 of each whole array."""
    path = copy / "20" / "record" / "metadata"
    record = json.loads(path.read_text()) | {"format": 3}
    for name, leaf in named(numbered(20)).items():
        del record["leaves"][name]["tiles"]
        record["leaves"][name]["sha256"] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()

    def put(record):
        content = {name: value for name, value in record.items() if name != "digest"}
        path.write_text(json.dumps(content | {"digest": seal.digest(content)}))
        (copy / "20" / "files.json").unlink()
        seal.write_seal(epath.Path(copy / "20"))

    put(record)
    assert digest(restored(copy)[0]) == digest(numbered(20))
    record["leaves"]["step"]["sha256"] = "0" * 64
    put(record)
    assert restored(copy)[1]["step"] == 10


def test_meta_must_be_json(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, {"w": np.zeros(1)}, {"path": Path("x")})
    assert json.loads("[]") == os.listdir(tmp_path)


def test_a_folder_that_orbax_cannot_open_is_refused_and_its_steps_are_not_set_aside(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "3").mkdir(parents=True)
    for options in ({}, {"read_only": True}):
        with pytest.raises(Unreadable, match=r"caf\\xe9: the name is not UTF-8.*rename the folder"):
            Checkpoints(folder, **options)
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_a_folder_whose_name_only_looks_like_a_number_is_no_step(tmp_path):
    for name in ("\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}", "3a", "-1"):
        (tmp_path / name).mkdir()
    assert not has_steps(tmp_path)
    assert newest_meta(tmp_path) is None
    assert saved_steps(str(tmp_path)) == []
    assert restored(tmp_path) is None
