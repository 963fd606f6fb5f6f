"""Twenty steps on one device, four, and a mesh of them: the same losses, gradient norms and parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_sampling import equations
from test_step import random_pairs

from dpo_jax.data.layout import Layout
from dpo_jax.dpo import dpo_step
from dpo_jax.evals.completions import Completer, map_completions
from dpo_jax.logps import sequence_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.checkpoint_stream import Piece, assemble
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, weights_digest
from dpo_jax.models.families import FAMILIES, decoder_config, hf_config
from dpo_jax.models.hf import read_weights, save_hf, variable_shapes
from dpo_jax.models.logical_axes import RULES, axis_lengths
from dpo_jax.reference import reference_logps
from dpo_jax.runtime import hosts
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.mesh import MeshError, make_mesh, mesh_shape
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.sampling import generate, left_pad, loop
from dpo_jax.step import init_state
from dpo_jax.types import HEAD_AXIS, Model

SIZES = {"vocab_size": 64, "width": 64, "layers": 2, "heads": 8, "max_positions": 64, "eos_token_id": 0}
MODEL = make_model(decoder_config(hf_config("llama", kv_heads=4, **SIZES)))
UNITS = {"heads": 8, "kv_heads": 8}
LOSS = functools.partial(dpo_loss, beta=0.1)
TX = make_optimizer(linear_warmup(1e-4, warmup_steps=3), max_grad_norm=1.0)
STEPS = 20


def on_mesh(data=1, fsdp=1, tensor=1, *, reverse=False, model=MODEL, units=UNITS):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices[::-1] if reverse else devices)
    return mesh_partitioner(mesh, model, units=units)


WAYS = {
    "pmap 4": pmap_partitioner,
    "data 4": lambda: on_mesh(data=4),
    "fsdp 4": lambda: on_mesh(fsdp=4),
    "fsdp 2 x tensor 2": lambda: on_mesh(fsdp=2, tensor=2),
    "a model without axes": lambda: on_mesh(data=2, fsdp=2, model=MODEL._replace(axes=None)),
    "data 2 x fsdp 2 reversed": lambda: on_mesh(data=2, fsdp=2, reverse=True),
}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batches(variables):
    """Seven pairs in eight rows, so that one is a padding example; the reference is the policy at step 0."""
    layout = Layout("shared", length=32, scored=32, rows_multiple=8)
    reference = jax.jit(functools.partial(reference_logps, MODEL))
    every = [layout.rows(random_pairs(7, seed)) for seed in range(5)]
    return [rows.replace(ref_logps=np.asarray(reference(variables, rows))) for rows in every]


def dpo(partitioner_axis, microbatches=1):
    return functools.partial(dpo_step, model=MODEL, tx=TX, loss=LOSS, microbatches=microbatches, axis_name=partitioner_axis)


def run(step, state, batches, steps=STEPS):
    """(losses and gradient norms of every step, final state)."""
    seen = []
    for number in range(steps):
        state, metrics = step(state, batches[number % len(batches)])
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(seen), state


def start(partitioner, variables):
    return partitioner.init_state(functools.partial(init_state, tx=TX), partitioner.put_variables(variables))


@pytest.fixture(scope="module")
def expected(variables, batches):
    partitioner = single_device()
    seen, state = run(partitioner.compile_step(dpo(None)), start(partitioner, variables), batches)
    return seen, partitioner.to_host(state)


def assert_same_run(seen, state, expected):
    np.testing.assert_allclose(seen, expected[0], atol=1e-5, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=0), state.params, expected[1].params)
    assert int(state.step) == STEPS


def test_the_run_that_is_repeated_learns_something(variables, expected):
    seen, state = expected
    assert seen[0, 0] == pytest.approx(np.log(2), abs=1e-6)
    assert seen[-1, 0] < 0.6
    moved = jax.tree.map(lambda after, before: float(np.abs(after - np.asarray(before)).max()), state.params, variables)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_microbatches(variables, batches, expected):
    partitioner = single_device()
    seen, state = run(partitioner.compile_step(dpo(None, microbatches=4)), start(partitioner, variables), batches)
    assert_same_run(seen, partitioner.to_host(state), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run(way, variables, batches, expected):
    partitioner = WAYS[way]()
    step = partitioner.compile_step(dpo(partitioner.axis_name))
    seen, state = run(step, start(partitioner, variables), batches)
    assert_same_run(seen, partitioner.to_host(state), expected)


def test_microbatches_on_a_mesh(variables, batches, expected):
    partitioner = on_mesh(data=2, fsdp=2)
    step = partitioner.compile_step(dpo(None, microbatches=2))
    seen, state = run(step, start(partitioner, variables), batches)
    assert_same_run(seen, partitioner.to_host(state), expected)


@pytest.mark.parametrize(("family", "microbatches"), [("olmo2", 1), ("mixtral", 2)])
def test_what_a_mesh_cuts_apart_is_computed_as_a_whole(family, microbatches, batches):
    """OLMo 2 norms the queries of all heads together, and a mesh cuts them by head. Mixtral sorts all tokens by expert."""
    model = make_model(decoder_config(hf_config(family, kv_heads=4, **SIZES)))
    seen, variables = [], jax.jit(model.init)(jax.random.key(0))
    for partitioner, parts in ((single_device(), 1), (on_mesh(fsdp=2, tensor=2, model=model), microbatches)):
        dpo = functools.partial(dpo_step, model=model, tx=TX, loss=LOSS, microbatches=parts)
        step = partitioner.compile_step(dpo)
        seen.append(run(step, start(partitioner, variables), batches, steps=3)[0])
    np.testing.assert_allclose(*seen, atol=1e-5, rtol=1e-5)


def test_shard_map(variables, batches, expected):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(dpo("data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    seen, state = run(jax.jit(mapped), init_state(variables, TX), batches)
    assert_same_run(seen, jax.device_get(state), expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_pass_keeps_the_order(way, variables, batches):
    partitioner = WAYS[way]()
    compiled = partitioner.compile_map(functools.partial(reference_logps, MODEL))
    logps = compiled(partitioner.put_variables(variables), batches[0])
    assert isinstance(logps, np.ndarray)
    np.testing.assert_allclose(logps, batches[0].ref_logps, rtol=1e-6, atol=1e-5)


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("model") / "export", MODEL, variables)


@pytest.mark.parametrize("way", ["one", *WAYS])
def test_weights_go_from_their_file_to_their_place(way, folder, variables):
    partitioner = single_device() if way == "one" else WAYS[way]()
    digest = WeightsDigest()
    loaded = partitioner.load_variables(variable_shapes(MODEL), digest.watch(read_weights(folder, MODEL)))
    assert digest.hexdigest() == weights_digest(variables)
    made = partitioner.make_variables(lambda: MODEL.init(jax.random.key(0)))
    for there in (loaded, made):
        jax.tree.map(np.testing.assert_array_equal, partitioner.to_host(there), jax.device_get(variables))
        placed = partitioner.put_variables(variables)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a.sharding} {b.sharding}"), there, placed)


@pytest.mark.parametrize("way", ["pmap 4", "fsdp 2 x tensor 2"])
def test_a_model_is_exported_from_where_it_lies(way, folder, variables, tmp_path):
    partitioner = WAYS[way]()
    state = partitioner.get_state(start(partitioner, variables))
    again = save_hf(tmp_path / "export", MODEL, state.variables, fetch=hosts.whole)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    elsewhere = save_hf(tmp_path / "other", MODEL, state.variables, fetch=hosts.whole, write=False)
    assert not elsewhere.exists()


def test_pieces_that_do_not_make_a_model_are_refused(variables):
    shapes = {"params": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
    of_layers = [Piece(("params", "kernel"), layer, np.full(3, layer)) for layer in range(2)]
    np.testing.assert_array_equal(assemble(shapes, of_layers, put=np.asarray)["params"]["kernel"], [[0] * 3, [1] * 3])
    with pytest.raises(ValueError, match="params.kernel: 1 parameters are incomplete"):
        assemble(shapes, of_layers[:1], put=np.asarray)
    with pytest.raises(ValueError, match=r"params.kernel: a piece of shape \(2,\) does not belong to \(2, 3\)"):
        assemble(shapes, [Piece(("params", "kernel"), 0, np.zeros(2))], put=np.asarray)


class Words:
    def decode(self, ids, **_):
        return str(ids)


PROMPTS = [np.arange(1, 2 + number // 2 % 3, dtype=np.int32) for number in range(24)]  # two of each


def completed(partitioner, variables, batch):
    complete = Completer(partitioner, MODEL, Words(), stop_ids=[0], max_new_tokens=8, batch=batch)
    return complete(variables, PROMPTS, jax.random.key(3))


@pytest.fixture(scope="module")
def completions_of_one_device(variables):
    return completed(single_device(), single_device().put_variables(variables), 64)


@pytest.mark.parametrize("way", WAYS)
def test_completions_do_not_depend_on_devices_and_batches(way, variables, completions_of_one_device):
    """On four devices and in small batches some wait until others have ended."""
    partitioner, expected = WAYS[way](), completions_of_one_device
    placed = partitioner.put_variables(variables)
    found = completed(partitioner, placed, 4)
    assert found.texts == expected.texts
    assert len(set(found.texts)) > 20
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5, atol=1e-5)
    score = partitioner.compile_map(functools.partial(sequence_logps, MODEL))
    again = map_completions(partitioner, score, placed, PROMPTS, found.ids, batch=4)
    np.testing.assert_allclose(again, found.logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [True, False])
def test_weights_are_gathered_before_the_loop_over_tokens_if_there_is_room(room, variables, monkeypatch):
    """Sharded in the loop, they would be gathered for each token: GPUs and TPUs do not move that out of it."""
    monkeypatch.setattr(loop, "_has_room", lambda *of, whole=False: room or not whole)

    def draw(variables, prompts):
        return generate(MODEL, variables, *prompts, jax.random.key(0), max_new_tokens=8, eos_id=0)

    placed = on_mesh(fsdp=4).put_variables(variables)
    with jax.set_mesh(make_mesh(fsdp=4)):
        traced = jax.jit(draw).trace(placed, left_pad(PROMPTS))
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(variables) if leaf.ndim > 1}
    of_weights = [
        (one.params["sharding"].spec, inside)
        for one, inside in equations(traced.jaxpr.jaxpr)
        if one.primitive.name == "sharding_constraint" and one.invars[0].aval.shape in kernels
    ]
    in_loop = [spec for spec, inside in of_weights if inside]
    assert len(in_loop) >= 2 * 7 + 2  # the kernels of two layers, embedding and head
    assert any("fsdp" in str(spec) for spec in in_loop) != room
    assert (sum(spec == P() for spec, inside in of_weights if not inside) >= 2 * 7 + 2) == room


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_fsdp_holds_a_quarter_and_donates_all_of_it(variables, batches):
    rows = batches[0]
    analyses, programs = {}, {}
    for name, partitioner in (("one", on_mesh()), ("four", on_mesh(fsdp=4))):
        state = start(partitioner, variables)
        compiled = partitioner.compile_step(dpo(None)).lower(state, rows).compile()
        analyses[name], programs[name] = compiled.memory_analysis(), compiled.as_text()
    state_bytes = nbytes(init_state(variables, TX))
    read = nbytes(rows) - nbytes(rows.index)  # which no step reads
    held = {
        "one": analyses["one"].argument_size_in_bytes - read,
        "four": analyses["four"].argument_size_in_bytes - read / 4,
    }
    assert held["one"] == state_bytes
    assert held["four"] <= 0.26 * held["one"]
    for name, analysis in analyses.items():  # the new state is written over the old one
        assert analysis.alias_size_in_bytes == held[name], name
    assert "f32[8,32,64]" in programs["one"]  # the activations of all rows,
    assert "f32[8,32,64]" not in programs["four"]  # which no device of four ever gathers: it gathers weights


@pytest.fixture(scope="module")
def saved(variables, tmp_path_factory):
    """A checkpoint written from a mesh of 2 x 2, and the state in it."""
    partitioner = on_mesh(fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    filled = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf, init_state(variables, TX)
    )
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(7, partitioner.get_state(partitioner.put_state(filled)), {})
    return directory, filled


@pytest.mark.parametrize(
    "make",
    [single_device, lambda: on_mesh(fsdp=4), lambda: on_mesh(tensor=4), lambda: on_mesh(data=4), pmap_partitioner],
    ids=["1", "fsdp 4", "1 x 4", "data 4", "pmap 4"],
)
def test_a_state_saved_on_2_x_2_is_restored_anywhere(make, saved, variables):
    directory, expected = saved
    partitioner = make()
    with Checkpoints(directory, read_only=True) as checkpoints:
        found = checkpoints.restore_latest(partitioner.saved_shapes(start(partitioner, variables)))
    placed = partitioner.put_state(found[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found[0]) if isinstance(leaf, jax.Array)), "held twice"
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(b.sharding)), placed, start(partitioner, variables))
    jax.tree.map(np.testing.assert_array_equal, partitioner.to_host(placed), expected)


def test_what_was_placed_survives_when_a_step_donates_it(variables, batches):
    for partitioner in (on_mesh(), on_mesh(data=4), single_device()):
        step = partitioner.compile_step(lambda state, rows: (jax.tree.map(lambda x: x + x.dtype.type(1), state), {}))
        state = partitioner.put_state(init_state(variables, TX))
        step(state, batches[0])
        step(start(partitioner, variables), batches[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 4, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, (2, 2, 1, 1, 1)),
        ({"fsdp": 2, "expert": -1}, (1, 2, 2, 1, 1)),
        ({"fsdp": 2, "context": 2}, (1, 2, 1, 2, 1)),
    ],
)
def test_a_size_of_minus_one_takes_what_is_left(sizes, shape):
    assert mesh_shape(4, **sizes) == make_mesh(**sizes).devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor": 3},
            "fsdp -1 x tensor 3: 3 does not divide the 4 devices; the nearest mesh is .* x tensor 4",
        ),
        (
            {"fsdp": 2},
            "fsdp 2 x tensor 1: 2 does not equal the 4 devices; the nearest mesh is data 2 x fsdp 2 x tensor 1",
        ),
        ({"data": -1}, "one of them may be -1"),
        ({"fsdp": 0}, "sizes are at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class DeviceOfASlice:
    """What `make_mesh` asks of a device of a pod of several slices, of which there are none here."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_only_data_goes_across_slices(sizes):
    devices = [DeviceOfASlice(number, slice_index=number % 2, process_index=number % 2) for number in range(8)]
    grid = make_mesh(**sizes, devices=devices).devices
    assert sorted(device.id for device in grid.ravel()) == list(range(8))
    for part in range(sizes["data"]):
        assert {device.slice_index for device in grid[part].ravel()} == {part * 2 // sizes["data"]}
    with pytest.raises(MeshError, match="mesh data 1: must be a multiple of the 2 slices; only data can span slices"):
        make_mesh(fsdp=8, devices=devices)


def toy(axes, shape=(8, 6)):
    return Model(
        init=lambda key: {"params": {"kernel": jax.numpy.zeros(shape)}},
        forward=None,
        unembed=None,
        axes=None if axes is None else lambda: {"params": {"kernel": P(*axes)}},
    )


@pytest.mark.parametrize(
    ("model", "units", "message"),
    [
        (
            toy(("embed", "mlp")),
            {},
            r"params.kernel \(8, 6\): axis 'mlp' of 6 cannot be split over tensor 4; the nearest .* is 2",
        ),
        (toy(("embed", "heads"), (8, 16)), {"heads": 8}, r"axis 'heads' of 2 x 8 cannot be split over tensor 4; .* is 2"),
        (toy(("mlp", "vocab")), {}, r"params.kernel \(8, 6\): its axes 'mlp' and 'vocab' would both be sharded over tensor"),
        (toy(("embed", "time")), {}, r"params.kernel: no rule places its axis 'time' \(length 6\)"),
        (toy(("embed",)), {}, r"params.kernel: 1 axes \('embed',\) are named, but its shape is \(8, 6\)"),
    ],
)
def test_a_parameter_that_does_not_fit_the_mesh_is_refused_by_name(model, units, message):
    with pytest.raises(MeshError, match=message):
        on_mesh(tensor=4, model=model, units=units)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lengths_of_axes_are_known_without_the_model(family):
    """What `--check` divides among devices is what the parameters have."""
    sizes = {"width": 48, "layers": 2, "heads": 6, "max_positions": 32}
    kv_heads = {} if family in ("gpt2", "gptj", "gpt_neox") else {"kv_heads": 3}
    config = decoder_config(hf_config(family, vocab_size=77, eos_token_id=0, **sizes, **kv_heads))
    model = make_model(config)
    specs = jax.tree.leaves(model.axes(), is_leaf=lambda x: isinstance(x, P))
    leaves = jax.tree.leaves(variable_shapes(model))
    named = {(axis, n) for s, leaf in zip(specs, leaves, strict=True) for axis, n in zip(s, leaf.shape, strict=True) if axis}
    assert named == set(axis_lengths(config).items())
    assert RULES["heads"] == RULES["kv_heads"] == HEAD_AXIS


def test_a_batch_that_does_not_fit_the_mesh_is_refused(variables, batches):
    partitioner = on_mesh(fsdp=4)
    rows = jax.tree.map(lambda x: x[:6], batches[0])
    with pytest.raises(ValueError, match=r"rows.tokens has length 6, which cannot be split equally over 4 devices"):
        partitioner.compile_map(functools.partial(reference_logps, MODEL))(variables, rows)


def test_a_state_with_something_unknown_in_it_is_refused(variables):
    state = init_state(variables, TX).replace(opt_state={"history": np.zeros((30, 20))})
    with pytest.raises(MeshError, match=r"opt_state.history \(30, 20\): belongs to no parameter"):
        on_mesh(fsdp=4).put_state(state)


def test_a_state_may_hold_an_array_twice():
    """For example an average of parameters that starts as the parameters."""
    partitioner = on_mesh(fsdp=4)
    state = start(partitioner, MODEL.init(jax.random.key(0)))
    twice = state.replace(opt_state=state.params)
    placed = partitioner.put_state(twice)
    jax.tree.map(np.testing.assert_array_equal, placed.opt_state, placed.params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(twice))


def test_under_pmap_a_step_needs_its_axis():
    """Without it, each device would train on rows of its own."""
    step = functools.partial(dpo_step, model=MODEL, tx=TX, loss=LOSS)
    with pytest.raises(ValueError, match="a step needs axis_name"):
        pmap_partitioner().compile_step(step)


@pytest.mark.parametrize("way", ["single device", "pmap 4", "data 4"])
def test_arrays_that_another_partitioner_placed_are_told(way):
    ways = {"single device": single_device, "pmap 4": pmap_partitioner}
    ways["data 4"] = lambda: mesh_partitioner(make_mesh(data=4, fsdp=1))
    value, rows = {"w": np.ones((3, 2), np.float32)}, np.ones((4, 3), np.float32)
    mine, others = ways[way](), [make() for name, make in ways.items() if name != way]

    def product(variables, rows):
        return jnp.einsum("rk,ko->ro", rows, variables["w"])

    step = mine.compile_step(lambda state, rows: (state, {"sum": product(state, rows).sum()}))
    compiled = mine.compile_map(product)
    for other in others:
        placed = other.put_variables(value)
        with pytest.raises(ValueError, match=r"^state: expected partitioner\.init_state\(.*got arrays placed in another way"):
            step(placed, rows)
        with pytest.raises(ValueError, match=r"^variables: expected partitioner\.put_variables\(variables\), got arrays"):
            compiled(placed, rows)
    right = mine.put_variables(value)
    assert compiled(right, rows).shape == (4, 2)
    with pytest.raises(ValueError, match="(?i)einsum|dot|size") as raised:  # an error of another cause stays what it is
        compiled(right, np.ones((4, 5), np.float32))
    assert "placed" not in str(raised.value)
    step(right, rows)
