"""`dpo-jax plan`: operations by formula and from programs, collectives, memory, errors; and every pod of configs/.

`pytest -m plan tests/test_plan.py` compiles the pods (needs the `tpu` extra, no TPU, and several minutes each). GPUs: see
test_plan_gpu.py.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dpo_jax.cli import main as program
from dpo_jax.cli.commands import plan as planning
from dpo_jax.cli.config import Config, ConfigError, ModelConfig, TokenizerConfig, load_config
from dpo_jax.cli.model_folders import planned_hf_config
from dpo_jax.cli.plan import search
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import shared_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.extras import install_command
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.flops import layer_weights, pair_flops
from dpo_jax.runtime.chips import CHIPS, TopologyError, slice_devices, slice_of
from dpo_jax.runtime.hlo import summarize
from dpo_jax.runtime.mesh import host_part, make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.plan import Work, out_of_memory, plan_map, plan_step
from dpo_jax.step import init_state

ROOT = Path(__file__).parent.parent
PODS = sorted((ROOT / "configs").glob("pod_*.yaml"))
SIZES = {"width": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp_width": 160, "max_positions": 128}
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `tpu`)")


def config_of(family="llama", layers=2):
    return decoder_config(hf_config(family, vocab_size=384, layers=layers, eos_token_id=0, **SIZES))


def pairs_of(count, prompt=20, chosen=14, rejected=30):
    return [Encoded(*(np.zeros(n, np.int32) for n in (prompt, chosen, rejected)), uid=str(i)) for i in range(count)]


def compiled(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile()


# Operations


def forward_program(layers):
    config = config_of(layers=layers)
    model, rows = make_model(config), shared_rows(pairs_of(1), length=64)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    return config, compiled(lambda v, r: completion_logps(model, v, r), variables, jax.tree.map(jnp.asarray, rows))


def all_scores(config, length):
    """The dense path computes scores that nobody sees, too."""
    return 4 * config.layers * config.heads * config.head_size * length**2


@pytest.mark.parametrize("layers", [1, 3])
def test_formula_is_what_the_program_multiplies(layers):
    config, forward = forward_program(layers)
    flops = pair_flops(config, prompt=20, chosen=14, rejected=30)
    head = flops.head * 64 / 44  # the row has 64 places to score
    found = summarize(forward.as_text())
    assert found.matmul_flops == flops.trunk + head + all_scores(config, 64)
    assert found.unknown_loops == 0


def test_formula_against_xlas_own_count():
    config, forward = forward_program(1)  # a loop over one layer is no loop; XLA would count longer ones once
    flops = pair_flops(config, prompt=20, chosen=14, rejected=30)
    expected = flops.trunk + flops.head * 64 / 44 + all_scores(config, 64)
    assert forward.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)  # which includes norms and softmax


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_term_counts_the_visible_keys(family):
    settings = hf_config(family, vocab_size=384, layers=2, eos_token_id=0, **SIZES) | {"sliding_window": 16}
    config = decoder_config(settings)
    rows = shared_rows(pairs_of(1), length=64)
    seen = (rows.k_start[0][:, None] <= np.arange(64)) & (np.arange(64) < rows.k_end[0][:, None])
    if config.windows:
        seen &= rows.positions[0][:, None] - rows.positions[0][None] < 16
    flops = pair_flops(config, prompt=20, chosen=14, rejected=30)
    assert flops.attention == 2 * 4 * config.heads * config.head_size * seen.sum()
    assert flops.training == 3 * (flops.trunk + flops.attention + flops.head)


def test_layer_weights_are_those_of_the_model():
    config = config_of()
    shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))["params"]["layers"]
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in jax.tree_util.keystr(path)]
    assert config.layers * layer_weights(config) == sum(leaf.size for leaf in kernels)


CONVOLUTIONS = """HloModule m

ENTRY %main (a: f32[3,8,5], b: f32[8,7,2]) -> f32[3,7,6] {
  %a = f32[3,8,5]{2,1,0} parameter(0)
  %b = f32[8,7,2]{2,1,0} parameter(1)
  ROOT %c = f32[3,7,6]{2,1,0:T(8,128)} convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_io0->bf0
}
"""


def test_padding_of_a_convolution_is_no_work():
    # TPUs write their matrix products as convolutions, some of them mostly padding. 6 places see 2 inputs each, less the two
    # that lie outside at the ends.
    assert summarize(CONVOLUTIONS).matmul_flops == 2 * 3 * 7 * 8 * (6 * 2 - 2)


# Collectives


def over_devices(fn):
    return jax.shard_map(fn, mesh=make_mesh(), in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)


def talking(x):
    """On each of 4 devices, of f32[8, 32]: 5 times a sum and 15 times a shift in a loop, one gathering outside of it."""
    gathered = jax.lax.all_gather(x, "fsdp")

    def shift(_, y):
        return jax.lax.ppermute(y * 2.0, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    def body(y, _):
        y = jax.lax.fori_loop(0, 3, shift, y)
        return jnp.sin(jax.lax.psum(y, "fsdp")), None

    y, _ = jax.lax.scan(body, x, length=5)
    return y + gathered.sum(0)


@pytest.mark.parametrize("annotated", [True, False], ids=["trip counts as XLA notes them", "read from the conditions"])
def test_collectives_count_as_often_as_their_loops_run(annotated):
    lowered = jax.jit(over_devices(talking)).lower(jax.ShapeDtypeStruct((32, 32), jnp.float32))
    text = lowered.compile().as_text() if annotated else lowered.as_text(dialect="hlo")
    assert ("known_trip_count" in text) == annotated  # programs for TPUs do not note them
    found = summarize(text)
    size = 8 * 32 * 4
    assert found.unknown_loops == 0
    assert {kind: (one.count, one.operand_bytes, one.moved_bytes) for kind, one in found.collectives.items()} == {
        "all-gather": (1, size, 3 * size),
        "all-reduce": (5, 5 * size, 5 * size * 2 * 3 / 4),
        "collective-permute": (15, 15 * size, 15 * size),
    }


def test_a_loop_without_an_end_counts_once_and_is_reported():
    def until_small(x):
        return jax.lax.while_loop(lambda y: y.sum() > 1.0, lambda y: jax.lax.psum(y, "fsdp") * 0.1, x)

    found = summarize(compiled(over_devices(until_small), jax.ShapeDtypeStruct((32, 32), jnp.float32)).as_text())
    assert found.unknown_loops == 1
    assert found.collectives["all-reduce"].count == 1


def test_a_reduce_scatter_as_tpus_write_it():
    text = """%all-reduce-scatter.1 (input: bf16[512,64]) -> bf16[64,64] {
  %input = bf16[512,64]{1,0} parameter(0)
  %all-reduce.9 = bf16[512,64]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[64,64]{1,0} dynamic-slice(%all-reduce.9, %at, %zero), dynamic_slice_sizes={64,64}
}

ENTRY %main (a: bf16[512,64]) -> bf16[64,64] {
  %a = bf16[512,64]{1,0} parameter(0)
  ROOT %fusion = bf16[64,64]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}"""
    found = summarize(text).collectives
    assert set(found) == {"reduce-scatter"}
    assert found["reduce-scatter"].moved_bytes == 7 * 64 * 64 * 2


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": 4,
    "replica_groups=[2,4]<=[8]": 4,
    "replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}": 4,
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}": 4,
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_in_every_notation(groups):
    text = f"""ENTRY %main (a: bf16[10]) -> bf16[40] {{
  %a = bf16[10]{{0}} parameter(0)
  ROOT %g = bf16[40]{{0}} all-gather(%a), channel_id=1, {groups}, dimensions={{0}}, use_global_device_ids=true
}}"""
    assert summarize(text).collectives["all-gather"].moved_bytes == (GROUPS[groups] - 1) * 20


# Programs


@functools.cache
def planned(chip="v5e", *, prompt=20, chosen=14, rejected=30, rows=8, microbatches=1, **sizes):
    config = config_of()
    model, tx = make_model(config), make_optimizer(1e-3)
    rows_ = shared_rows(
        pairs_of(rows, prompt, chosen, rejected), length=prompt + chosen + rejected, ref_logps=np.zeros((rows, 2), np.float32)
    )
    work = Work(rows_, rows, pair_flops(config, prompt=prompt, chosen=chosen, rejected=rejected), microbatches, item_bytes=4)
    step = functools.partial(
        dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), microbatches=microbatches
    )
    where = {"model": model, "mesh": make_mesh(**sizes), "chip": CHIPS[chip], "work": work}
    return plan_step(step, functools.partial(init_state, tx=tx), **where), where


def test_a_step_planned_on_a_mesh():
    whole, _ = planned(data=4, fsdp=1)
    cut, where = planned(data=1, fsdp=4)
    shapes = jax.eval_shape(where["model"].init, jax.random.key(0))
    assert whole.parameter_bytes == 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert whole.parameter_bytes / 4 < cut.parameter_bytes < whole.parameter_bytes / 3.5  # norms are not cut
    assert cut.optimizer_bytes == pytest.approx(cut.parameter_bytes, abs=100)  # RMSprop: one moment
    assert cut.fits
    assert cut.peak_bytes > cut.parameter_bytes + cut.optimizer_bytes
    assert set(whole.collectives) == {"all-reduce"}  # gradients and metrics
    assert whole.collectives["all-reduce"]["operand_bytes"] == pytest.approx(whole.parameter_bytes, rel=0.02)
    assert "all-gather" in cut.collectives
    assert 0 < cut.fastest < cut.slowest == pytest.approx(sum(cut.seconds.values()))


def test_the_reference_pass_takes_less():
    step, where = planned()
    forward = plan_map(lambda v, rows: completion_logps(where["model"], v, rows), **where)
    assert forward.optimizer_bytes == 0
    assert forward.matmul_flops < step.matmul_flops / 2.9
    assert forward.peak_bytes < step.peak_bytes


def test_logits_of_all_tokens_are_noticed():
    few, _ = planned()
    assert few.logits_tokens >= few.scored_tokens  # 512 tokens are one chunk of the head
    many, _ = planned(prompt=16, chosen=512, rejected=512)
    assert few.scored_tokens == 2 * 64
    assert many.scored_tokens == 2 * 1040
    assert many.logits_tokens < many.scored_tokens


def test_microbatches_take_less_memory_and_as_many_operations():
    one, _ = planned(prompt=64, chosen=64, rejected=64, rows=64)
    four, _ = planned(prompt=64, chosen=64, rejected=64, rows=64, microbatches=4)
    assert four.temporary_bytes < one.temporary_bytes / 2
    # A device's 16 rows x 192 tokens are three chunks of the head, whose logits are computed again; 4 rows are one chunk.
    assert one.matmul_flops - four.matmul_flops == 2 * 64 * 384 * 192 * 64 / 4


# Errors


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "'v9:2x2' is neither a TPU slice nor a set of GPUs; there are v4: 2x2x1, .*v5e: 1x1, 2x2, .*tpu7x: "),
        ("v5e", "'v5e' is neither a TPU slice nor a set of GPUs"),
        ("v5e:2x2x2", "'v5e:2x2x2': slices of v5e are 1x1, 2x2, "),
        ("v5p:4x4", "'v5p:4x4': slices of v5p are 2x2x1, "),
        ("v5e:3x5", "'v5e:3x5': slices of v5e are 1x1, 2x2, "),
        ("v5p:3x4x4", "'v5p:3x4x4': slices of v5p are 2x2x1, "),
    ],
)
def test_unknown_slices_are_refused_with_those_there_are(topology, message):
    with pytest.raises(TopologyError, match=message):
        slice_devices(topology)


def test_a_slice_and_its_chips():
    assert slice_of("v5e:16x16") == (CHIPS["v5e"], 256)
    assert slice_of("v5p:4x4x8") == (CHIPS["v5p"], 128)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_the_extra_is_named(capsys):
    assert program.main(["plan", str(PODS[0])]) == 2
    assert install_command("tpu") in capsys.readouterr().err


OUT_OF_MEMORY = {
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity.": 20.5,
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(24.85G) exceeds available HBM (15.75G). HLO module: jit_dpo_step.": 24.85,
}


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_out_of_memory_is_read_from_the_compilers_error(message):
    needed, sentence = out_of_memory(message)
    assert needed == OUT_OF_MEMORY[message] * 2**30
    assert sentence == f"needs {needed / 1e9:.1f} GB, but the device has 16.9 GB"


def test_another_error_of_the_compiler_is_none():
    assert out_of_memory("INTERNAL: Mosaic failed to compile") is None


def plan_file(tmp_path, **sections):
    text = {
        "run": {"dir": str(tmp_path), "devices": "mesh"},
        "data": {"max_length": 32, "max_prompt_length": 16, "layout": "shared"},
        "model": {"family": "llama", "layers": 2, "vocab_size": 384, **SIZES},
        "dpo": {"batch": 8},
        "refs": {"batch": 8},
        "plan": {"topology": "v5e:2x2"},
    }
    for name, section in sections.items():
        text[name] = text.get(name, {}) | section
    path = tmp_path / "plan.yaml"
    path.write_text(
        "\n".join([f"{name}:\n" + "".join(f"  {k}: {v}\n" for k, v in part.items()) for name, part in text.items()])
    )
    return str(path)


def test_plan_needs_a_slice(tmp_path, capsys):
    assert program.main(["plan", plan_file(tmp_path, plan={"topology": "null"})]) == 2
    assert (
        "plan.topology: name a slice of TPUs or a set of GPUs, for example --topology v5e:4x4 or --topology h100:8"
        in capsys.readouterr().err
    )


def test_plan_needs_sizes_where_no_model_is(tmp_path, capsys):
    assert program.main(["plan", plan_file(tmp_path, model={"path": "nobody/nothing", "vocab_size": "null"})]) == 2
    assert "model.vocab_size: there is no model folder here" in capsys.readouterr().err


def test_a_tokenizer_that_will_be_trained_has_the_size_that_is_asked_for():
    sizes = ModelConfig(family="llama", width=8, layers=1, heads=1, max_positions=512)
    config = Config(model=sizes, tokenizer=TokenizerConfig(vocab_size=300))
    hf, source = planned_hf_config(config)
    assert (hf["vocab_size"], source) == (300, "the sizes in section model, and tokenizer.vocab_size")


def test_a_row_that_is_too_short_for_a_pair_is_refused(tmp_path):
    data = {"max_length": 32, "max_prompt_length": 16, "layout": "packed", "row_length": 40}
    config = load_config(plan_file(tmp_path, data=data))
    message = r"data.row_length: a row of 40 tokens cannot hold an example of 48 \(a prompt of 16, completions of 16\); set it"
    with pytest.raises(ConfigError, match=message):
        planning.plan(config, "v5e:2x2")


@pytest.mark.parametrize(
    ("family", "expert", "ways"), [("llama", 1, {1}), ("mixtral", 1, {1, 4, 8}), ("mixtral", 2, {1, 2, 4, 8})]
)
def test_a_sweep_varies_the_ways_along_expert_of_a_mixture(family, expert, ways, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_tried", lambda config, topology: tried.append(dataclasses.asdict(config.mesh)))
    tried = []
    config = load_config(plan_file(tmp_path, model={"family": family}, mesh={"expert": expert}, dpo={"batch": 64}))
    with pytest.raises(ConfigError, match="cannot be split over any mesh"):  # as nothing was compiled
        search.sweep(config, "h100:8")
    assert {mesh["expert"] for mesh in tried} == ways
    for mesh in tried:
        assert np.prod(list(mesh.values())) == 8


@pytest.mark.parametrize(
    ("mesh", "first"), [({"data": 8, "fsdp": 1}, (1, 8)), ({"data": -1, "fsdp": 1}, (1, 8)), ({"data": 1, "fsdp": 8}, (1, 4))]
)
def test_nearby_settings_shard_more_and_leave_every_device_a_pair(tmp_path, mesh, first):
    config = load_config(plan_file(tmp_path, mesh=mesh, dpo={"batch": 64}))
    found = list(itertools.islice(search._nearby(config, slice_of("h100:8")), search.TRIES))
    unchanged = [one for one in found if (one.mesh.fsdp, one.mesh.tensor) == (mesh["fsdp"], 1)]
    micro = [one.dpo.microbatches for one in unchanged]
    assert micro == [1, 1, 2, 4, 8], "more microbatches than pairs of a device are of no use"
    sharded = next(one for one in found if one not in unchanged)
    assert (sharded.mesh.data, sharded.mesh.fsdp) == first
    assert (sharded.dpo.microbatches, sharded.mesh.tensor) == (8, 1) if first == (1, 8) else (16, 2)
    for one in found:
        shards = 8 // one.mesh.tensor
        assert one.dpo.batch % (shards * one.dpo.microbatches) == 0


def test_as_many_microbatches_are_tried_as_a_batch_can_have(tmp_path):
    config = load_config(plan_file(tmp_path, dpo={"batch": 16}))
    assert search._fitting(config, 8, {"context": 1, "tensor": 2}, 16) == [4]
    assert search._fitting(config, 8, {"context": 1, "tensor": 1}, 1) == [1]
    assert search._fitting(config, 32, {"context": 1, "tensor": 1}, 4) == []


# With libtpu


@needs_libtpu
def test_a_plan_from_the_command_line(tmp_path, capsys):
    assert program.main(["plan", plan_file(tmp_path), "--topology", "v5e:2x2"]) == 0
    printed = capsys.readouterr().out
    assert "fits        yes" in printed
    assert "all-gather" in printed
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())["plans"][0]
    assert record["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert record["step"]["kernels"] == 3 * 2  # one forward and two backward kernels of attention a layer
    assert record["label"] == "predicted, not measured"


@needs_libtpu
def test_a_mesh_that_is_not_the_slice_is_refused(tmp_path, capsys):
    assert program.main(["plan", plan_file(tmp_path), "--mesh.fsdp", "3"]) == 2
    assert "mesh data 1 x fsdp 3 x tensor 1: 3 does not equal the 4 devices; the nearest mesh is" in capsys.readouterr().err


@needs_libtpu
def test_libtpu_prints_nothing_about_a_machine_that_is_not_there():
    code = "import sys; from dpo_jax.runtime.chips import slice_devices; sys.exit(len(slice_devices('v5e:2x2')) != 4)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_libtpu
def test_a_mesh_may_share_an_axis_of_the_torus():
    sizes = make_mesh(fsdp=8, tensor=2, devices=slice_devices("v6e:4x4")).shape
    assert dict(sizes) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 2}


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "sizes", "parts"),
    [
        ("v5e:4x4", {"fsdp": 16}, 1),
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, 2),
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, 1),
        ("v5p:2x2x4", {"fsdp": 16}, 1),
        ("v6e:4x4", {"fsdp": 4, "tensor": 4}, 2),
    ],
)
def test_all_hosts_of_a_slice_agree_which_rows_they_supply(topology, sizes, parts, monkeypatch):
    """The mesh follows the links of the torus, so a host's devices may be apart in it. Then each supplies the whole batch."""
    mesh = make_mesh(**sizes, devices=slice_devices(topology))
    found = []
    for process in sorted({device.process_index for device in mesh.devices.flat}):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(host_part(mesh))
    assert {count for _, count in found} == {parts}
    assert {index for index, _ in found} == set(range(parts))


@pytest.mark.plan
@needs_libtpu
def test_what_does_not_fit_is_a_finding_and_something_near_is_found(tmp_path, capsys):
    wide = {"width": 4096, "heads": 32, "kv_heads": 8, "head_size": 128, "mlp_width": 14336, "vocab_size": 32000, "layers": 4}
    data = {"max_length": 4096, "max_prompt_length": 2048, "layout": "shared"}
    path = plan_file(tmp_path, model=wide | {"max_positions": 4096}, data=data, dpo={"batch": 16})
    assert program.main(["plan", path]) == 2
    printed = capsys.readouterr().out
    assert "fits        NO: needs " in printed
    assert "trying nearby settings" in printed
    assert "\nfits: --mesh.data 1 " in printed


def in_products(flops):
    """Operations of a pair outside of the attention kernels, which do not show theirs."""
    return flops.training - 3 * flops.attention


@pytest.mark.plan
@needs_libtpu
@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_pod(path):
    config = load_config(path)
    one = planning.plan(config, config.plan.topology, refs=True)
    print(planning.report(one, slice_of(one.topology)[0]))
    assert one.step.fits
    assert one.refs.fits
    assert one.step.unknown_loops == 0
    assert one.step.logits_tokens <= one.step.head_chunk
    forward_kernels = 2 if config.model.remat == "full" else 1
    turns = config.mesh.context * config.model.layers * one.microbatches  # of the ring in which rows in pieces are read
    assert one.step.kernels == (forward_kernels + 2) * turns
    # Weights gathered and gradients summed in the notations that XLA has for it; nothing that only another mesh would need.
    kinds = set(one.step.collectives)
    assert "all-reduce" in kinds  # metrics, and along data what was summed along fsdp
    assert kinds & {"all-gather", "collective-permute"}
    if one.mesh["tensor"] == 1:
        # Whole gradients (at least 2 bytes a parameter) are summed into the parts in which parameters lie; only those parts,
        # of the head once for each of its chunks, go along data.
        assert one.step.collectives["all-reduce"]["operand_bytes"] < 2 * one.parameters / 4
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"}
    # The program multiplies what the formula says, each layer's forward pass twice but for what nobody reads again.
    needed = one.pairs * in_products(one.flops_per_pair) / (one.chips * slice_of(one.topology)[0].cores)
    assert 1.0 < one.step.matmul_flops / needed < 1.6
