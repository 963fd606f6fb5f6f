"""`dpo-jax plan` for GPUs: topologies, what is read from their programs, and every gpu_*.yaml of configs/.

`pytest -m plan tests/test_plan_gpu.py` compiles those (needs the `cuda13` extra, no GPU, under a minute each).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.cli import main as program
from dpo_jax.cli.commands import plan as planning
from dpo_jax.cli.config import load_config
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import shared_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.extras import install_command
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention import DENSE, AttentionPath, VisibleKeys, dense
from dpo_jax.models.attention_common import key_spans, of_window, on_each_device
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.flops import pair_flops
from dpo_jax.runtime.chips import CHIPS, TopologyError, host_devices, slice_devices, slice_of
from dpo_jax.runtime.gpu_target import plugin_is_here
from dpo_jax.runtime.hlo import products, summarize
from dpo_jax.runtime.hlo_collectives import device_groups
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.runtime.plan import HEADROOM, Work, plan_map, plan_step
from dpo_jax.step import init_state

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("gpu_*.yaml"))
GPUS = [name for name, chip in CHIPS.items() if chip.gpu]
SIZES = {"width": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp_width": 160, "max_positions": 128}
needs_plugin = pytest.mark.skipif(not plugin_is_here(), reason="needs JAX's CUDA plugin (extra `cuda13`)")


# Topologies


def test_gpus_and_their_hosts():
    assert slice_of("h100:8") == (CHIPS["h100"], 8)
    assert host_devices("h100:8") == 8
    assert slice_of("h100:4x8") == (CHIPS["h100"], 32)
    assert host_devices("h100:4x8") == 8
    assert host_devices("h200:1") == 1
    assert host_devices("v5e:4x4") is None


@pytest.mark.parametrize("shape", ["16", "0", "0x8", "2x16", "2x2x2"])
def test_hosts_that_do_not_exist_are_refused(shape):
    with pytest.raises(TopologyError, match=f"'h100:{shape}': h100 is 1 to 8 GPUs of a host, or HOSTSxGPUS: 1, 2, 4, 8, 2x8, "):
        slice_devices(f"h100:{shape}")


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(
        TopologyError, match=r"^'h900:8' is neither a TPU slice nor a set of GPUs; there are v4: .*; h100: 1, 2, 4"
    ):
        slice_devices("h900:8")


def test_a_wrong_topology_is_all_that_is_printed(capfd):
    assert program.main(["plan", str(CONFIGS[0]), "--topology", "h900:8"]) == 2
    out, error = capfd.readouterr()
    assert not out
    assert error.startswith("dpo-jax: 'h900:8' is neither a TPU slice nor a set of GPUs; there are ")


@pytest.mark.skipif(plugin_is_here(), reason="JAX's CUDA plugin is here")
def test_without_the_plugin_the_extra_is_named(capsys):
    assert program.main(["plan", str(CONFIGS[0])]) == 2
    assert f"compiling for h100 needs JAX's CUDA plugin: {install_command('cuda13')} (Linux, x86-64" in capsys.readouterr().err


@pytest.mark.parametrize("name", GPUS)
def test_rates_of_a_gpu_are_those_that_xla_is_told(name):
    chip = CHIPS[name]
    text = chip.gpu.textproto()
    assert f"device_memory_size: {chip.hbm_bytes:.0f}\n" in text
    assert f"memory_bandwidth: {chip.hbm_bandwidth:.0f}\n" in text
    assert chip.network < chip.link_bandwidth < chip.hbm_bandwidth


# Programs as text

PROGRAM = """HloModule step

%fused_slice (stack: bf16[32,64,128], at: s32[]) -> bf16[64,128] {
  %stack = bf16[32,64,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %weights = bf16[64,128]{1,0} bitcast(%slice)
}

%fused_update (stack: f32[32,16,128], at: s32[], new: bf16[16,128]) -> f32[32,16,128] {
  %stack = f32[32,16,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %new = bf16[16,128]{1,0} parameter(2)
  %wide = f32[16,128]{1,0} convert(%new)
  %one = f32[1,16,128]{2,1,0} bitcast(%wide)
  %zero = s32[] constant(0)
  ROOT %update = f32[32,16,128]{2,1,0} dynamic-update-slice(%stack, %one, %at, %zero, %zero)
}

%body (loop: (s32[], bf16[16,64], bf16[32,64,128], f32[32,16,128])) -> (s32[], bf16[16,64], bf16[32,64,128], f32[32,16,128]) {
  %loop = (s32[], bf16[16,64]{1,0}, bf16[32,64,128]{2,1,0}, f32[32,16,128]{2,1,0}) parameter(0)
  %at = s32[] get-tuple-element(%loop), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%loop), index=1
  %stack = bf16[32,64,128]{2,1,0} get-tuple-element(%loop), index=2
  %kept = f32[32,16,128]{2,1,0} get-tuple-element(%loop), index=3
  %slice-start = ((bf16[32,64,128]{2,1,0}, s32[]), bf16[64,128]{1,0}, u32[]) fusion-start(%stack, %at), calls=%fused_slice
  %weights = bf16[64,128]{1,0} fusion-done(%slice-start)
  %call = (bf16[16,128]{1,0}, s8[33554432]{0}) custom-call(%x, %weights), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/mlp/up/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %y = bf16[16,128]{1,0} get-tuple-element(%call), index=0
  %flash = bf16[16,64]{1,0} custom-call(%y), custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "dot(%x)"}
  %update = f32[32,16,128]{2,1,0} fusion(%kept, %at, %y), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], bf16[16,64]{1,0}, bf16[32,64,128]{2,1,0}, f32[32,16,128]{2,1,0}) tuple(%at, %flash, %stack, %update)
}

%condition (loop: (s32[], bf16[16,64], bf16[32,64,128], f32[32,16,128])) -> pred[] {
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: (s32[], bf16[16,64], bf16[32,64,128], f32[32,16,128])) -> (s32[], bf16[16,64]) {
  %a = (s32[], bf16[16,64]{1,0}, bf16[32,64,128]{2,1,0}, f32[32,16,128]{2,1,0}) parameter(0)
  ROOT %w = (s32[], bf16[16,64]{1,0}, bf16[32,64,128]{2,1,0}, f32[32,16,128]{2,1,0}) while(%a), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"32"}}
}
"""


def test_a_product_by_cublas_counts_as_often_as_its_loop_runs():
    (found,) = products(PROGRAM)
    assert (found.how, found.operands, found.result, found.shape) == ("__cublas$lt$matmul", ("bf16", "bf16"), "bf16", (16, 128))
    assert (found.flops, found.times, found.source) == (2 * 16 * 64 * 128, 32, "jit(step)/mlp/up/dot_general")
    assert summarize(PROGRAM).matmul_flops == 32 * found.flops


def test_triton_kernels_are_counted():
    assert summarize(PROGRAM).kernels == 32


def test_memory_traffic_is_what_operations_touch():
    weights, x, y = 64 * 128 * 2, 16 * 64 * 2, 16 * 128 * 2
    index, kept = 4, 16 * 128 * 4  # of a slice, and what an update writes: never the whole stack
    slicing, product = weights + index + weights, x + weights + y  # without cuBLAS's scratch memory
    assert summarize(PROGRAM).traffic_bytes == 32 * (slicing + product + (y + x) + (index + y + kept))


def test_products_of_a_program_with_their_types():
    def mixed(x, w):
        return (x @ w).astype(jnp.float32) @ w.astype(jnp.float32).T

    x, w = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
    found = products(jax.jit(mixed).lower(x, w).as_text(dialect="hlo"))
    assert [(one.operands, one.result, one.flops) for one in found] == [
        (("bf16", "bf16"), "bf16", 2 * 8 * 16 * 32),
        (("f32", "f32"), "f32", 2 * 8 * 16 * 32),
    ]


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[2,4]<=[8]": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['data'=2,'fsdp'=4] {'data'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['fsdp'=8] {'fsdp':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
}


@pytest.mark.parametrize("groups", GROUPS)
def test_devices_of_groups_in_every_notation(groups):
    assert device_groups(f"{groups}, dimensions={{0}}").tolist() == GROUPS[groups]


@pytest.mark.parametrize(
    ("groups", "crossing", "cards"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", False, 1),  # NVLink only
        ("{{0,4},{1,5},{2,6},{3,7}}", True, 1),  # four rings between the hosts at the same time, each through its own card
        ("{{0,1,2,3,4,5,6,7}}", True, 4),  # one group, whose bytes four cards of a host share
    ],
)
def test_collectives_across_hosts_are_told_from_those_within(groups, crossing, cards):
    text = f"""ENTRY %main (a: f32[1000]) -> f32[1000] {{
  %a = f32[1000]{{0}} parameter(0)
  %s = ((f32[1000]{{0}}), f32[1000]{{0}}) all-reduce-start(%a), channel_id=1, replica_groups={groups}, to_apply=%add
  ROOT %d = f32[1000]{{0}} all-reduce-done(%s)
}}"""
    found = summarize(text, host_devices=4).collectives["all-reduce"]
    size = len(groups.split("}")[0].split(","))
    assert found.moved_bytes == 2 * (size - 1) / size * 4000
    assert found.crossing_bytes == crossing * found.moved_bytes
    assert found.network_bytes == found.crossing_bytes / cards
    assert summarize(text).collectives["all-reduce"].crossing_bytes == 0


@pytest.mark.parametrize(("pair", "crossing"), [("{2,3}", False), ("{3,4}", True)])
def test_a_permutation_across_hosts(pair, crossing):
    text = f"""ENTRY %main (a: f32[1000]) -> f32[1000] {{
  %a = f32[1000]{{0}} parameter(0)
  ROOT %p = f32[1000]{{0}} collective-permute(%a), channel_id=1, source_target_pairs={{{{0,1}},{pair}}}
}}"""
    found = summarize(text, host_devices=4).collectives["collective-permute"]
    assert (found.moved_bytes, found.network_bytes) == (4000, 4000 * crossing)


# Programs compiled for GPUs that are not here


def config_of(layers=2):
    return decoder_config(hf_config("llama", vocab_size=384, layers=layers, eos_token_id=0, **SIZES))


def pairs_of(count):
    return [Encoded(*(np.zeros(n, np.int32) for n in (20, 14, 30)), uid=str(i)) for i in range(count)]


FLOPS = pair_flops(config_of(), prompt=20, chosen=14, rejected=30)
# A row of 64 scores all places, and the dense path computes what nobody sees.
SCORES = 2 * 2 * SIZES["heads"] * SIZES["head_size"] * 64**2  # of both layers
PRODUCTS = FLOPS.trunk + FLOPS.head * 64 / 44 + 2 * SCORES


@functools.cache
def planned(topology, *, forward=False, dtype=jnp.bfloat16, pairs=8, remat="none", attention=DENSE, **sizes):
    model, tx = make_model(config_of(), dtype=dtype, remat=remat, attention=attention), make_optimizer(1e-3)
    rows = shared_rows(pairs_of(pairs), length=64, ref_logps=np.zeros((pairs, 2), np.float32))
    mesh = make_mesh(devices=slice_devices(topology), **sizes)
    where = {"model": model, "mesh": mesh, "chip": slice_of(topology)[0], "work": Work(rows, pairs, FLOPS)}
    where["host_devices"] = host_devices(topology)
    if forward:
        return plan_map(lambda v, rows: completion_logps(model, v, rows), **where)
    step = functools.partial(dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), microbatches=1)
    return plan_step(step, functools.partial(init_state, tx=tx), **where)


@needs_plugin
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_multiplies_what_the_formula_says(name, dtype):
    assert planned(f"{name}:1", forward=True, dtype=dtype).matmul_flops == 8 * PRODUCTS


@needs_plugin
def test_a_step_on_a_gpu_multiplies_three_times_as_much():
    # Forward, and two products backward for each one. Nobody wants the gradient of the tokens' embeddings by a product.
    one, eight = planned("h100:1"), planned("h100:8")
    for found, devices in ((one, 1), (eight, 8)):
        repeated = found.matmul_flops - 3 * 8 * PRODUCTS / devices
        # Some versions of XLA compute the scores of the dense path again in the backward pass: whole products, at most thrice.
        assert repeated in [times * 8 * SCORES / devices for times in range(4)]
    assert one.collectives == {}
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= set(eight.collectives)
    assert one.unknown_loops == eight.unknown_loops == 0


@needs_plugin
def test_memory_of_a_step_on_a_gpu():
    one = planned("h100:1")
    assert one.fits
    assert one.peak_bytes == pytest.approx(one.parameter_bytes + one.optimizer_bytes + one.temporary_bytes, rel=0.02)


@needs_plugin
def test_the_network_is_slower_than_nvlink():
    # The same program on as many GPUs, whose parameters are cut within a host, or across both.
    host, within, across = planned("h100:8"), planned("h100:2x4", data=2, fsdp=4), planned("h100:2x4")
    assert across.collectives["all-gather"]["moved_bytes"] == host.collectives["all-gather"]["moved_bytes"]
    chip = CHIPS["h100"]
    assert across.seconds["links"] / host.seconds["links"] == pytest.approx(chip.link_bandwidth / (4 * chip.network))
    assert within.collectives["all-gather"]["crossing_bytes"] == 0
    assert within.collectives["all-reduce"]["crossing_bytes"] > 0


@jax.custom_vjp
def twice(x):
    """2 x, by a Triton kernel."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def double(x, y):
        y[...] = 2 * x[...]

    how = triton.CompilerParams(num_warps=4)
    return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=how)(x)


twice.defvjp(lambda x: (twice(x), None), lambda _, cotangent: (twice(cotangent),))


def attention_with_a_kernel(q, k, v, prepared, number, scoring):
    def on_device(q, k, v, span):
        return dense(twice(q), k, v, VisibleKeys(*span), scoring)

    return on_each_device(on_device)(q, k, v, of_window((prepared.k_start, prepared.k_end), number))


@needs_plugin
@pytest.mark.parametrize("topology", ["h100:1", "h100:8", "b200:8"])
def test_a_step_with_triton_kernels_compiles_without_a_gpu(topology):
    # Each layer runs its kernel forward, once more for the backward pass, and backward.
    path = AttentionPath("twice", attention_with_a_kernel, key_spans)
    assert planned(topology, remat="full", attention=path).kernels == 2 * 3


def plan_file(tmp_path, topology, **sizes):
    text = {
        "run": {"dir": str(tmp_path), "devices": "mesh", "precision": "bfloat16"},
        "data": {"max_length": 32, "max_prompt_length": 16, "layout": "shared"},
        "model": {"family": "llama", "layers": 2, "vocab_size": 384} | SIZES | sizes,
        "dpo": {"batch": 8},
        "refs": {"batch": 8},
        "plan": {"topology": topology},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(
        "\n".join([f"{name}:\n" + "".join(f"  {k}: {v}\n" for k, v in part.items()) for name, part in text.items()])
    )
    return str(path)


@needs_plugin
def test_a_plan_for_gpus_from_the_command_line(tmp_path, capfd):
    assert program.main(["plan", plan_file(tmp_path, "h100:2x4")]) == 0
    printed, errors = capfd.readouterr()
    noise = [line for line in errors.splitlines() if not line.startswith("compiling the step for h100:2x4: ")]
    assert not noise  # of XLA; the progress of a slow compilation is ours
    assert printed.startswith("h100:2x4: 8 chips of 85 GB; model: the sizes in section model\n")
    assert "fits        yes" in printed
    assert "of it between hosts" in printed
    assert "at peak     989 TFLOP/s dense bfloat16, 3.35 TB/s memory, 450 GB/s links, 50 GB/s network a GPU\n" in printed
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())["plans"][0]
    assert record["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert record["label"] == "predicted, not measured"


@needs_plugin
def test_what_does_not_fit_a_gpu_says_how_much_it_needs(tmp_path):
    wide = {"width": 8192, "heads": 64, "kv_heads": 8, "head_size": 128, "mlp_width": 28672, "layers": 16}
    config = load_config(plan_file(tmp_path, "h100:1", **wide))
    one = planning.plan(config, "h100:1")
    assert not one.step.fits
    assert one.step.problem == f"needs {one.step.peak_bytes / 1e9:.1f} GB, but the device has 84.9 GB"
    assert one.step.peak_bytes > 3 * 4 * one.parameters  # parameters, one moment, gradients


@needs_plugin
def test_weak_scaling_over_hosts(tmp_path, capsys):
    path = plan_file(tmp_path, "h100:8")
    assert program.main(["plan", path, "--scale"]) == 0
    printed = capsys.readouterr().out
    assert [f"{count} chips, {count} pairs a step" in printed for count in (8, 16, 32, 64)] == [True] * 4


@pytest.mark.plan
@needs_plugin
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_gpu_configuration(path):
    config = load_config(path)
    one = planning.plan(config, config.plan.topology, refs=True)
    chip, chips = slice_of(one.topology)
    print(planning.report(one, chip))
    assert one.step.fits
    assert one.step.peak_bytes <= HEADROOM * chip.hbm_bytes
    assert one.refs.fits
    assert one.step.unknown_loops == 0
    assert one.step.logits_tokens <= one.step.head_chunk
    assert bool(one.step.collectives) == (chips > 1)
    # What the formula says; on top a forward pass more, scores that nobody sees, and rows that are not full.
    linear = one.flops_per_pair.passes * one.pairs * (one.flops_per_pair.trunk + one.flops_per_pair.head)
    assert 1.0 <= one.step.matmul_flops * chips / linear < 1.7
    if config.lora.rank is not None:  # room for longer texts: base and adapter, and no gradients of the base
        assert chip.hbm_bytes - one.step.peak_bytes > 20e9
    assert one.microbatches == 1  # each further one is a pass over all gradients
