"""Several processes of two CPU devices each, on loopback: the numbers of one device, and one will when they are stopped."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import test_multidevice as table
from conftest import GOLDEN, xla_flags

from dpo_jax.cli.main import main
from dpo_jax.data.layout import Layout
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_hf, read_weights, save_hf, variable_shapes
from dpo_jax.models.weights import Checkpoint
from dpo_jax.reference import reference_logps
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner
from dpo_jax.step import init_state

ROOT = Path(__file__).parent.parent
LIMIT = 240  # seconds; a test takes a tenth of it
CONFIG = """\
run: {{dir: {dir}, save_every_steps: 100, devices: mesh, distributed: auto, heartbeat_seconds: 20}}
mesh: {{fsdp: 2, tensor: 2}}
data: {{source: reviews, reviews_train: 16, reviews_test: 4, max_length: 128, max_prompt_length: 96, layout: shared}}
tokenizer: {{path: {golden}/tokenizer}}
dpo: {{policy: {golden}/gpt_neox/init, batch: 8, epochs: 15, lr: 1.0e-5, refresh_reference_steps: 3}}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin(command, *, process, port, by_environment=False, count=2):
    """One of `count` processes, which flags or JAX's variables tell apart."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(2),
        "HF_HUB_OFFLINE": "1",
    }
    names = ("coordinator", "num-processes", "process-id")
    values = dict(zip(names, (f"127.0.0.1:{port}", str(count), str(process)), strict=True))
    if by_environment:
        variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        environment |= dict(zip(variables, values.values(), strict=True))
    else:
        command = [*command, *(word for name, value in values.items() for word in (f"--{name}", value))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, cwd=ROOT, **pipes)


def end(processes):
    """[(exit code, output)] of processes; none of them outlives the test."""
    try:
        return [(process.wait(), output) for process in processes for output in [process.communicate(timeout=LIMIT)[0]]]
    finally:
        for process in processes:
            process.kill()


def batch_of(number, part=(0, 1)):
    layout = Layout("shared", length=32, scored=32, rows_multiple=8)
    pairs = table.random_pairs(7, number % 5)
    return layout.place(pairs, part=part)


def twenty_steps(directory):
    """What each process runs: the twenty steps of `test_multidevice`, on a mesh and with pmap over all hosts, each saved."""
    tensor = 2 if jax.process_count() == 4 else 1
    seen = {
        "mesh": steps_and_save(mesh_partitioner(make_mesh(tensor=tensor), table.MODEL, units=table.UNITS), directory, "mesh"),
        "torus": steps_and_save(torus(table.MODEL, tensor=tensor), directory, "torus"),
        "pmap": steps_and_save(pmap_partitioner(), directory, "pmap"),
    }
    answers = {"any": hosts.anywhere(not hosts.is_first()), "none": hosts.anywhere(False)}
    told = hosts.from_first(np.array([-0.0, np.nan, 1 / 3], np.float32) if hosts.is_first() else np.zeros(3, np.float32))
    assert told.tobytes() == np.array([-0.0, np.nan, 1 / 3], np.float32).tobytes()
    everywhere = jax.sharding.NamedSharding(make_mesh(fsdp=-1), jax.sharding.PartitionSpec(None, "fsdp"))
    whole = np.arange(7 * 16, dtype=np.float32).reshape(7, 16)
    cut = jax.make_array_from_callback(whole.shape, everywhere, lambda index: whole[index])
    runs = list(hosts.gathered_chunks(cut, max_bytes=3 * 16 * 4))
    assert [len(run) for run in runs] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(runs), whole)
    agree = hosts.agreement()
    answers["agreed"] = [agree(signal.SIGTERM if step == 1 and not hosts.is_first() else 0) for step in range(4)]
    restore_what_a_mesh_of_2_x_2_saved(directory)
    if hosts.is_first():
        (directory / "seen.json").write_text(json.dumps(seen | answers))
    load_within_bounds(directory)


def torus(model, **sizes):
    """A mesh in which the two devices of a process are no neighbors, as on a TPU slice."""
    devices = jax.devices()
    return mesh_partitioner(make_mesh(**sizes, devices=[*devices[::2], *devices[1::2]]), model, units=table.UNITS)


def steps_and_save(partitioner, directory, way):
    assert jax.local_device_count() == 2
    part, parts = partitioner.host_part
    assert (part, parts) == ((0, 1) if way == "torus" else (jax.process_index(), jax.process_count()))
    folder = directory / "model"
    variables = partitioner.load_variables(variable_shapes(table.MODEL), read_weights(folder, table.MODEL))
    reference = partitioner.compile_map(functools.partial(reference_logps, table.MODEL))
    batches = []
    for number in range(5):
        rows, index = batch_of(number, part=partitioner.host_part)
        logps = reference(variables, rows)
        mine = logps[part * len(logps) // parts : (part + 1) * len(logps) // parts]
        assert mine.shape == rows.index.shape + (2,)
        batches.append(rows.replace(ref_logps=np.where(rows.weight[:, None] > 0, mine, np.float32(0))))
    step = partitioner.compile_step(table.dpo(partitioner.axis_name))
    seen, state = table.run(step, partitioner.init_state(functools.partial(init_state, tx=table.TX), variables), batches)
    saved = partitioner.get_state(state)
    with Checkpoints(directory / way) as checkpoints:
        checkpoints.save(table.STEPS, saved, {})
    save_hf(directory / f"{way}-export", table.MODEL, saved.variables, fetch=hosts.whole, write=hosts.is_first())
    return seen.tolist()


def restore_what_a_mesh_of_2_x_2_saved(directory):
    for partitioner in (mesh_partitioner(make_mesh(), table.MODEL, units=table.UNITS), pmap_partitioner()):
        form = partitioner.get_state(table.start(partitioner, jax.jit(table.MODEL.init)(jax.random.key(1))))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), form)
        with Checkpoints(directory / "2x2", read_only=True) as checkpoints:
            found, _ = checkpoints.restore_latest(abstract)
        whole = partitioner.to_host(partitioner.put_state(found))
        expected = np.load(directory / "2x2.npz")
        for number, leaf in enumerate(jax.tree.leaves(whole)):
            np.testing.assert_array_equal(leaf, expected[str(number)])


def load_within_bounds(directory):
    """A host holds its part of one parameter and one tensor of the file, and never a whole parameter of all layers."""
    wide = make_model(decoder_config(hf_config("llama", **WIDE)))
    local = mesh_partitioner(make_mesh(), wide, units={"heads": 64, "kv_heads": 64})
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        read = counted_reads(patch)
        loaded = local.load_variables(variable_shapes(wide), read_weights(directory / "wide", wide))
    kept, peak = tracemalloc.get_traced_memory()  # on CPU some of what is on the devices is counted
    tracemalloc.stop()
    read_by_parts(loaded, local, wide, directory / "wide", sum(read))
    shapes = jax.tree.leaves(loaded["params"])
    part = max(sum(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in shapes)
    tensor = WIDE["mlp_width"] * WIDE["width"] * 4
    assert part * jax.process_count() == max(leaf.nbytes for leaf in shapes)
    # On its way to a device a part is there twice, and so is a tensor on its way out of its file. Of both there is only one.
    assert peak - kept < 2 * part + 2 * tensor < sum(leaf.nbytes for leaf in shapes) / 3, (peak, kept, part, tensor)
    save_and_restore_in_parts(loaded, directory / "wide-saved")
    apart = torus(wide).load_variables(variable_shapes(wide), read_weights(directory / "wide", wide))
    save_and_restore_in_parts(apart, directory / "wide-torus")


def counted_reads(patch):
    """The bytes of each tensor, or part of one, that is read from a model's files from now on."""
    read, original = [], Checkpoint.read

    def counting(checkpoint, name, box=None):
        read.append((found := original(checkpoint, name, box)).nbytes)
        return found

    patch.setattr(Checkpoint, "read", counting)
    return read


def read_by_parts(loaded, local, model, folder, read):
    """A host reads its own part of the files, and for the digest its share of the rest. The weights are those of the files."""
    whole = load_hf(folder)[1]
    pairs = list(zip(jax.tree.leaves(loaded), jax.tree.leaves(whole), strict=True))
    for leaf, expected in pairs:
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    mine = sum(sum({str(s.index): s.data.nbytes for s in leaf.addressable_shards}.values()) for leaf, _ in pairs)
    total = sum(leaf.nbytes for leaf, _ in pairs)
    assert mine <= read < 1.1 * mine < 0.6 * total, (read, mine, total)
    digest = hosts.shared_digest()
    with pytest.MonkeyPatch.context() as patch:
        again = counted_reads(patch)
        local.load_variables(variable_shapes(model), read_weights(folder, model, digest=digest))
    assert digest.hexdigest() == weights_digest(whole)
    assert sum(again) < 0.85 * total, (sum(again), total)


SMALL = 600_000  # bytes of an array whose part on a host, or shards, may be parts of tiles


def save_and_restore_in_parts(state, directory):
    """No large array is gathered to save a state and to verify it, and a host reads its own part of the files, once."""
    form = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    mine = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    with pytest.MonkeyPatch.context() as patch, Checkpoints(directory) as checkpoints:
        for gather in (hosts.whole, hosts.gathered_chunks):

            def only_small(leaf, gather=gather, **options):
                assert leaf.nbytes <= SMALL, f"an array of {leaf.nbytes} bytes is gathered"
                return gather(leaf, **options)

            patch.setattr(hosts, gather.__name__, only_small)
        patch.setattr("dpo_jax.runtime.seal.HASHED_BYTES", 100_000)  # of smaller files the first host reads all
        checkpoints.save(1, state, {})
        checkpoints.wait()
        hosts.barrier("sealed")
        before = bytes_read()
        found, _ = checkpoints.restore_latest(form)
        read = bytes_read() - before
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*([x.data for x in y.addressable_shards] for y in (a, b))), found, state
    )
    assert read < 1.1 * mine + 500_000 < sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * 0.6, (read, mine)


def bytes_read():
    """What this process has read from files since it began."""
    return int(Path("/proc/self/io").read_text().split()[1])


WIDE = {"vocab_size": 512, "width": 256, "layers": 8, "heads": 4, "mlp_width": 1024, "max_positions": 64, "eos_token_id": 0}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_several_processes_take_the_steps_of_one_device_and_save_for_it(tmp_path, count):
    variables = jax.jit(table.MODEL.init)(jax.random.key(0))
    save_hf(tmp_path / "model", table.MODEL, variables)
    wide = make_model(decoder_config(hf_config("llama", **WIDE)))
    save_hf(tmp_path / "wide", wide, jax.jit(wide.init)(jax.random.key(0)), max_shard_bytes=9_000_000)
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) > 2
    four = table.on_mesh(fsdp=2, tensor=2)
    state = table.start(four, jax.tree.map(lambda x: x + 1, variables))
    with Checkpoints(tmp_path / "2x2") as checkpoints:
        checkpoints.save(7, four.get_state(state), {})
    np.savez(tmp_path / "2x2.npz", **{str(n): leaf for n, leaf in enumerate(jax.tree.leaves(four.to_host(state)))})

    port = free_port()
    for code, output in end([begin([__file__, tmp_path], process=i, port=port, count=count) for i in range(count)]):
        assert code == 0, output
    result = json.loads((tmp_path / "seen.json").read_text())
    assert (result["any"], result["none"], result["agreed"]) == (True, False, [0, 0, signal.SIGTERM, 0])

    reference = jax.jit(functools.partial(reference_logps, table.MODEL))
    batches = [batch_of(number)[0] for number in range(5)]
    batches = [rows.replace(ref_logps=np.asarray(reference(variables, rows))) for rows in batches]
    one = table.single_device()
    seen, state = table.run(one.compile_step(table.dpo(None)), table.start(one, variables), batches)
    for way in ("mesh", "torus", "pmap"):
        with Checkpoints(tmp_path / way, read_only=True) as checkpoints:
            saved, _ = checkpoints.restore_latest(jax.eval_shape(functools.partial(init_state, tx=table.TX), variables))
        table.assert_same_run(np.array(result[way]), saved, (seen, one.to_host(state)))
        _, exported = load_hf(tmp_path / f"{way}-export")
        jax.tree.map(np.testing.assert_array_equal, exported, saved.variables)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN))
    command, port = ["-m", "dpo_jax.cli.main", "dpo", config], free_port()
    both = [begin(command, process=i, port=port, by_environment=bool(i)) for i in range(2)]
    metrics, deadline = tmp_path / "run" / "dpo" / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < deadline and all(process.poll() is None for process in both):
        if metrics.is_file() and metrics.read_text().count("\n") >= 5:
            both[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    (first, said), (second, heard) = end(both)
    assert (first, second) == (143, 143), f"{said}\n{heard}"
    steps = int(said.rpartition("stopped by SIGTERM after ")[2].split()[0])
    assert f"stopped by SIGTERM after {steps} steps; the state is saved" in heard
    assert "data 1 x fsdp 2 x tensor 2" in said
    assert "16 pairs to train on" in said
    assert "reference from step 3: log-probabilities of the 16 pairs" in said
    assert "16 pairs to train on" not in heard  # the first speaks for all
    assert str(steps) in {path.name for path in (tmp_path / "run" / "dpo" / "checkpoints").iterdir()}
    assert [row["step"] for row in read_metrics(metrics)] == list(range(steps))

    assert main(["dpo", str(config), "--distributed", "off", "--run.devices", "single"]) == 0
    assert f"continuing {tmp_path / 'run' / 'dpo'} after {steps} steps" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(metrics) if not is_evaluation(row)] == list(range(30))
    at_reference = [row["step"] for row in read_metrics(metrics) if abs(row.get("loss", 0) - np.log(2)) < 1e-5]
    assert {*range(0, 30, 3)} <= {*at_reference}


FULL_DISK = """
import errno, sys
from dpo_jax.cli.main import main
from dpo_jax.runtime import hosts
from dpo_jax.runtime.metrics import MetricsLog

write = MetricsLog.write

def full(log, row):
    if row["step"] == 3:
        raise OSError(errno.ENOSPC, "No space left on device", str(log.path))
    write(log, row)

MetricsLog.write = full
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_of_one_host_is_told_at_once_and_ends_both(tmp_path):
    """Only the first host writes metrics, so only it meets the full disk, while the other is in a step."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN))
    port = free_port()
    both = [begin(["-c", FULL_DISK, "dpo", config], process=i, port=port) for i in range(2)]
    (first, said), (second, _) = end(both)
    assert first == 74, said
    assert "metrics.jsonl: No space left on device; free some space" in said
    assert second != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "process_id not given, but"),
        ((None, None, 0), "coordinator, num_processes not given, but process_id"),
        (("127.0.0.1:1", 2, 2), "process_id 2 is not one of the 2 processes 0 to 1"),
    ],
)
def test_half_of_an_address_is_refused(arguments, message):
    with pytest.raises(hosts.HostsError, match=message):
        hosts.start(*arguments)


def test_a_variable_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(hosts.HostsError, match="JAX_PROCESS_ID must be a number, got 'one'"):
        hosts.start("127.0.0.1:1", 2)


def test_hosts_wait_for_each_other_as_long_as_they_are_told(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: asked.append(options["initialization_timeout"]))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.start("127.0.0.1:1", 2, 0)
    monkeypatch.setenv("DPO_JAX_JOIN_SECONDS", "300")
    hosts.start("127.0.0.1:1", 2, 0)
    assert asked == [1800, 300]


def test_a_machine_without_others_is_told(monkeypatch):
    """Otherwise each of several machines that JAX cannot join would train alone, unnoticed."""
    for name in [name for name in os.environ if name.startswith(("JAX_", "SLURM_", "OMPI_", "PMI_", "TPU_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    program = "from dpo_jax.runtime import hosts; hosts.start(); print(hosts.is_first())"
    alone = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (alone.stdout, alone.stderr) == ("True\n", "no other hosts found: running as a single process\n")


def test_one_process_needs_no_one():
    assert (hosts.is_first(), hosts.anywhere(True), hosts.anywhere(False)) == (True, True, False)
    assert [hosts.agreement()(number) for number in (0, 15)] == [0, 15]
    hosts.barrier("nobody")
    with hosts.first_goes_first("nobody"):
        np.testing.assert_array_equal(hosts.from_first(np.arange(3)), np.arange(3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("dpo", "--coordinator", "127.0.0.1:1"), "run.coordinator: needs run.distributed auto, which is off"),
        (
            ("audit", "--distributed", "auto"),
            "audit runs on one host; only sft, refs, dpo, eval, sample, label, reward-model, ppo, online, optimum, frontier",
        ),
        (("refs", "--distributed", "auto", "--process-id", "0"), "run.distributed: coordinator, num_processes not given"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags, message, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN).replace("distributed: auto", "distributed: off"))
    assert main([flags[0], str(config), *flags[1:]]) == 2
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    directory, _, address, _, count, _, number = sys.argv[1:]
    hosts.start(address, int(count), int(number), heartbeat_seconds=20)
    twenty_steps(Path(directory))
