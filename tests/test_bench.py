"""The race against PyTorch: all contenders compute the same, figures are what they say, and a difference is caught."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax.bench import gates, ladder, race, report, scaling, updates
from dpo_jax.bench.flops import device_peak, step_flops
from dpo_jax.bench.profile import own_times, slowest_operations
from dpo_jax.bench.work import (
    CONTENDERS,
    MEASUREMENTS,
    SAMPLERS,
    Work,
    by_length,
    library,
    random_pairs,
    read_pairs,
    read_work,
    write_work,
)
from dpo_jax.cli.main import main
from dpo_jax.data.layout import Layout
from dpo_jax.data.loader import plan_layout
from dpo_jax.logps import completion_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.writing import empty_folder

SIZES = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "max_positions": 64, "eos_token_id": 0}


def make_work(folder, *, family="gpt_neox", sizes=SIZES, **changes):
    """A random model, and eight pairs of many lengths in each of four steps: the same twelve again and again, to be learned."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(12):
        prompt, chosen, rejected = (int(n) for n in rng.integers([4, 2, 2], [20, 14, 14]))
        pairs += random_pairs(1, lengths=(prompt, chosen, rejected), vocab_size=61, seed=number)
    pairs = [pairs[number % 12] for number in range(32)]
    folder.mkdir(exist_ok=True)
    model = make_model(decoder_config(hf_config(family, **sizes)))
    save_hf(folder / "model", model, jax.jit(model.init)(jax.random.key(1)))
    settings = {
        "folder": str(folder),
        "batch": 8,
        "steps": 2,
        "gate_steps": 4,
        "groups": 2,
        "torch_microbatches": 2,
        "microbatches": 1,
        "beta": 0.1,
        "lr": 1e-3,
        "warmup_steps": 2,
        "max_grad_norm": 10.0,
        "precision": "float32",
        "remat": "none",
        "layouts": {
            name: dataclasses.asdict(plan_layout(pairs, kind=kind, batch=8))
            for name, kind in (("plain", "plain"), ("packed", "packed"), ("reference", "packed"))
        },
        "matmuls": [(8, 32, 32)],
    }
    work = Work(**settings | changes)
    write_work(work, pairs)
    return work, pairs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def rungs(work):
    """What each rung of our ladder measures, and the folder of a profile of the last one.

    The profile is that of a new process, as in a race: names of operations depend on what a process has traced before.
    """
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {option: getattr(jax.config, option) for option in options}
    trace = os.path.join(work[0].folder, "trace")
    try:
        empty_folder(trace)  # as the command does
        profiled = ("jax-attention", "4", repr(time.time()), os.path.join(work[0].folder, "profiled.json"), "--trace", trace)
        subprocess.run([sys.executable, "-m", "dpo_jax.bench.contender", work[0].folder, *profiled], check=True)
        yield {name: ladder.run(work[0], name, steps=4, weights=work[0].weights(name)) for name in ladder.RUNGS}, trace
    finally:
        for option, value in before.items():
            jax.config.update(option, value)


def test_random_lengths_are_spread_around_their_means_where_they_may():
    even, spread = (random_pairs(500, lengths=(40, 20, 10), vocab_size=9, seed=0, vary=vary) for vary in (False, True))
    assert {(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in even} == {(40, 20, 10)}
    for side, mean in (("prompt", 40), ("chosen", 20), ("rejected", 10)):
        lengths = np.array([len(getattr(pair, side)) for pair in spread])
        assert abs(lengths.mean() / mean - 1) < 0.1
        assert lengths.min() >= 1
        assert 2 * mean < lengths.max() <= 4 * mean
    assert all(pair.chosen[-1] == 0 and (pair.chosen[:-1] > 0).all() for pair in spread)


def test_work_survives_the_disk(work):
    again = read_work(work[0].folder)
    assert again == work[0]
    for pair, original in zip(read_pairs(again), work[1], strict=True):
        for side in ("prompt", "chosen", "rejected"):
            np.testing.assert_array_equal(getattr(pair, side), getattr(original, side))


def test_groups_are_a_partition_by_length(work):
    pairs = work[1][:8]
    groups = by_length(work[0], pairs)
    assert sorted(number for group in groups for number in group) == list(range(8))
    lengths = [[len(pairs[n].prompt) + max(len(pairs[n].chosen), len(pairs[n].rejected)) for n in group] for group in groups]
    assert min(lengths[0]) >= max(lengths[1])


def test_all_rungs_take_the_same_steps(work, rungs):
    """Live, cached, grouped, shared, packed and with either head: one trajectory. This is also what the gates say of it."""
    results = rungs[0]
    weights = updates.compare(work[0].model, {name: work[0].weights(name) for name in results})
    found = gates.check(results, precision="float32", updates=weights)
    assert found["grad_norm"] < 1e-5
    assert found["update"] < 1e-4
    assert found["yardstick"] == "jax-attention"
    assert weights.norms.min() > 0.1
    assert found["steps"] == 4
    assert found["first_logps"] < 1e-6
    assert found["loss_curve"] < 1e-5
    curve = results["jax-attention"]["losses"]
    assert abs(curve[3] - math.log(2)) > 0.01, "the comparison means nothing if nothing is learned"
    assert set(results) == {name for name in CONTENDERS if name.startswith("jax")}


def test_rungs_remove_positions_one_kind_after_the_other(work, rungs):
    positions = {name: result["positions"] for name, result in rungs[0].items()}
    assert positions["jax-live"] == positions["jax-cached"] == 2 * 16 * work[0].layouts["plain"]["length"]
    assert positions["jax-packed"] == positions["jax-head"] == positions["jax-attention"] < positions["jax-live"]
    timed = [pair for pair in work[1][8:24]]
    shared = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in timed)
    assert rungs[0]["jax-attention"]["real_positions"] == rungs[0]["jax-shared"]["real_positions"] == shared
    assert rungs[0]["jax-live"]["real_positions"] == shared + sum(len(pair.prompt) for pair in timed)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_head_over_all_positions_changes_no_log_probability(work, kind):
    model, variables = load_hf(work[0].model)
    rows = Layout(kind, length=64, scored=64, per_row=2 if kind == "packed" else 1).rows(work[1][:8])
    every = ladder.score_all_positions(rows, pairs_per_row=2 if kind == "packed" else 1)
    assert all(set(source) == set(range(64)) for source in every.source), "each position reaches the head"
    logps = jax.jit(functools.partial(completion_logps, model))
    expected, found = logps(variables, rows), logps(variables, every)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_gates_catch_another_beta_other_pairs_and_nan(tmp_path, work, rungs):
    honest = rungs[0]["jax-attention"]
    other, _ = make_work(tmp_path / "other", beta=0.2)
    result = ladder.run(other, "jax-attention", steps=4)
    with pytest.raises(gates.GateFailed, match=r"honest and cheat|cheat and honest.* loss differ .* step [123]"):
        gates.check({"honest": honest, "cheat": result}, precision="float32")
    swapped = honest | {"first_logps": honest["first_logps"][::-1]}
    with pytest.raises(gates.GateFailed, match="log-probabilities at step 0 differ"):
        gates.check({"honest": honest, "cheat": swapped}, precision="float32")
    broken = honest | {"losses": [*honest["losses"][:2], math.nan, 0.5]}
    with pytest.raises(gates.GateFailed, match="at step 2"):
        gates.check({"honest": honest, "cheat": broken}, precision="float32")
    clipped = honest | {"grad_norms": [*honest["grad_norms"][:3], honest["grad_norms"][3] * 1.001]}
    with pytest.raises(gates.GateFailed, match=r"norms of gradients \(relative\) differ by 0\.00\d+ at step 3"):
        gates.check({"honest": honest, "cheat": clipped}, precision="float32")
    elsewhere = honest | {"losses": [0.7, *honest["losses"][1:]]}
    with pytest.raises(gates.GateFailed, match=r"cheat: the loss of step 0 is 0\.7"):
        gates.check({"honest": honest, "cheat": elsewhere}, precision="float32")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_flops_are_those_counted_by_hand(family):
    """Every matrix product of a forward pass over [chosen | prompt | rejected], term by term."""
    grouped = {"kv_heads": 2, "mlp_width": 24} if family == "llama" else {}
    config = decoder_config(hf_config(family, **SIZES, **grouped))
    p, c, r = 3, 2, 4
    forward = 0
    for _ in range(config.layers):
        for _ in range(p + c + r):
            forward += 2 * 32 * 32 * 2  # query and output
            forward += 2 * 32 * (16 if grouped else 32) * 2  # key and value
            forward += 2 * 32 * 24 * 3 if grouped else 2 * 32 * 128 * 2
        keys = [1, 2, 3] + [3 + 1, 3 + 2] + [3 + 1, 3 + 2, 3 + 3, 3 + 4]
        forward += sum(2 * 2 * 4 * 8 * seen for seen in keys)  # scores and mixing, 4 heads of 8
    forward += 2 * 32 * 61 * (c + r)
    assert step_flops(config, np.array([p]), np.array([c]), np.array([r])).tolist() == [3.0 * forward]


def test_peaks_of_the_data_sheets():
    assert device_peak("NVIDIA H200") == 989e12
    assert device_peak("NVIDIA H100 PCIe") == 756e12
    assert device_peak("TPU v5p") == 459e12
    assert device_peak("NVIDIA L40S") == 362e12
    assert device_peak("a chip from the future") is None


GATE = {"first_logps": 0.0, "first_loss": 0.0, "loss_curve": 2e-7, "grad_norm": 1e-6, "steps": 3.0}


def measured(seconds, *, peak, **changes):
    """A contender that took `seconds` in each timed step."""
    return {
        "losses": [math.log(2), 0.6, 0.5],
        "grad_norms": [3.0, 2.0, 1.0],
        "step_seconds": [99.0, seconds, seconds],
        "seconds_to_first_step": 3.0,
        "first_logps": [[-1.0, -2.0]],
        "reference_seconds": None,
        "positions": 400,
        "real_positions": 100,
        "peak_bytes": peak,
        "device": "cpu",
        "versions": {},
        "cores": 2,
        "neighbors": 0.01,
        **changes,
    }


def test_report_arithmetic(work):
    """Steps of eight pairs at 2 s and 0.5 s: 4 and 16 pairs/s; a reference pass of 0.4 s a batch costs 0.05 s a pair."""
    config = decoder_config(hf_config("gpt_neox", **SIZES))
    ours = measured(0.5, peak=100, reference_seconds=[0.4], loader_seconds=0.02, compile_seconds=7.0, shapes=2)
    rounds = {
        "matmul-torch": [{"flops_per_second": 1e6, "neighbors": 0.0}] * 2,
        "matmul-jax": [{"flops_per_second": 2e6, "neighbors": 0.0}] * 2,
        "torch-live": [measured(2.0, peak=400), measured(2.5, peak=300)],
        "trl": [measured(4.0, peak=200)] * 2,
        "trl-best": [measured(1.0, peak=90, reference_seconds=[0.08])] * 2,
        "jax-attention": [ours, ours | {"compile_seconds": 1.0, "seconds_to_first_step": 2.0}],
    }
    off = {"torch-live": 0.0, "trl": 2e-5, "trl-best": 3e-5, "jax-attention": 4e-5}
    gate = GATE | {"update": 5e-5, "yardstick": "torch-live", "updates": off}
    summary = report.summarize(work[0], config, work[1], rounds, gate)
    literal, mine = (summary["contenders"][name] for name in ("torch-live", "jax-attention"))
    assert literal["pairs_per_second"] == pytest.approx({"median": 3.6, "min": 3.2, "max": 4.0})
    assert mine["pairs_per_second"]["median"] == pytest.approx(16)
    assert mine["pairs_per_second_with_reference_pass"] == pytest.approx(
        {"1 epochs": 1 / (1 / 16 + 0.05), "3 epochs": 1 / (1 / 16 + 0.05 / 3)}
    )
    assert literal["pairs_per_second_with_reference_pass"]["1 epochs"] == pytest.approx(3.6), "the step contains its reference"
    timed = work[1][8:24]
    useful = np.mean([2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in timed])
    assert mine["useful_tokens_per_second"] == pytest.approx(16 * useful)
    flops = np.mean([step_flops(config, *(np.array([len(x)]) for x in (q.prompt, q.chosen, q.rejected))) for q in timed])
    assert mine["mfu"] == pytest.approx(16 * flops / 2e6), "against the faster of the two libraries' products"
    assert (mine["padding"], mine["loader_share"]) == pytest.approx((0.75, 0.04))
    assert (literal["peak_bytes"], mine["compile_seconds"]) == (400, {"cold": 7.0, "warm": 1.0})

    ratio = summary["ratios"]["literal loop"]
    assert ratio["pairs_per_second"] == pytest.approx(16 / 3.6)
    assert (ratio["at_least"], ratio["at_most"]) == pytest.approx((4, 5))
    assert ratio["over_matmul"] == pytest.approx(16 / 3.6 / 2)
    assert ratio["peak_bytes"] == 0.25
    assert summary["ratios"]["better of TRL"]["contender"] == "trl-best"
    assert summary["ratios"]["better of TRL"]["pairs_per_second"] == pytest.approx(2)
    assert [line.split(":")[0] for line in summary["lost"]] == ["reference pass", "peak memory"]
    shown = report.table(summary)
    assert "4.44x the pairs/s (4.00 to 5.00), 2.22x over equal matrix products" in shown
    assert "TOO BUSY" not in shown
    assert "over 3 steps loss 2.0e-07, gradient norms 1.0e-06 (relative), then the update of all weights 5.0e-05 (L2)" in shown
    head, _, *lines = (line.strip("| ").split(" | ") for line in shown.split("\n\n")[0].splitlines())
    assert head[-1] == "update off torch-live"
    assert {line[0].strip("`"): float(line[-1]) for line in lines} == off
    assert mine["grad_norms"] == [3.0, 2.0, 1.0]


def test_a_busy_machine_or_a_slow_loader_is_told(work):
    config = decoder_config(hf_config("gpt_neox", **SIZES))
    rounds = {
        "matmul-jax": [{"flops_per_second": 2e6, "neighbors": 0.3}],
        "jax-attention": [measured(0.5, peak=1, reference_seconds=[0.1], loader_seconds=0.1)],
    }
    shown = report.table(report.summarize(work[0], config, work[1], rounds, GATE))
    assert "the update of all weights not compared: there is only one" in shown
    assert "up to 30% of the cores: TOO BUSY" in shown
    assert "20.00% of a step: MORE THAN 10%" in shown


def test_a_profile_says_where_the_time_went(rungs, tmp_path):
    shown = slowest_operations(race.Path(rungs[1]))
    twice = shutil.copytree(rungs[1], tmp_path / "twice")
    (last,) = (twice / "plugins" / "profile").iterdir()
    shutil.copytree(last, last.with_name("2020_01_01_00_00_00"))
    assert slowest_operations(twice) == shown, "an earlier profile in the same folder is not added"
    for part in ("backward   layers/attention", "forward    layers/mlp", "head", "optimizer"):
        assert part in shown
    event = {"pid": 1, "tid": 1, "ph": "X"}
    inner = [event | {"ts": ts, "dur": 3.0, "args": {"hlo_op": "dot"}} for ts in (1.0, 5.0)]
    outer = event | {"ts": 0.0, "dur": 10.0, "args": {"hlo_op": "while"}}
    beside = event | {"ts": 10.0, "dur": 2.0, "args": {"hlo_op": "dot"}}
    elsewhere = event | {"tid": 2, "ts": 1.0, "dur": 1.0, "args": {"hlo_op": "copy"}}
    assert own_times([*inner, outer, beside, elsewhere]) == {"while": 4.0, "dot": 8.0, "copy": 1.0}


CONFIG = """\
run: {{dir: {folder}}}
data: {{source: reviews, reviews_train: 40, reviews_test: 4, max_length: 96, max_prompt_length: 48}}
tokenizer: {{vocab_size: 300}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 128}}
dpo: {{batch: 4, lr: 1e-4, warmup_steps: 2}}
bench: {{rounds: 1, steps: 1, gate_steps: 2, groups: 2, contenders: "jax-attention"}}
"""


def test_exponents_of_the_step_time(work):
    points = [{"tokens": t, "seconds": 3 * t**1.5, "flops": 7.0 * t} for t in (10, 20, 40)]
    assert scaling.exponents(points) == pytest.approx({"seconds": 1.5, "flops": 1.0})
    found = scaling.run(work[0], "scaling", factors=(2,))
    assert [found[kind][0]["tokens"] for kind in ("batch", "length")] == [4 * 32, 2 * 16]
    (point,) = found["batch"]
    config = decoder_config(hf_config("gpt_neox", **SIZES))
    assert point["flops"] == step_flops(config, *(np.full(4, n) for n in (16, 8, 8))).sum()
    assert point["seconds"] > 0


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / "run"))
    return str(path)


def test_the_command_leaves_table_figures_and_plot(config, tmp_path, capsys):
    assert main(["bench", config, "--bench.lengths", "20/8/12"]) == 0
    shown = capsys.readouterr().out
    assert "| `jax-attention` |" in shown
    results = json.loads((tmp_path / "run" / "bench" / "results.json").read_text())
    assert list(results["contenders"]) == ["jax-attention"]
    assert results["work"]["mean_tokens"] == {"prompt": 20, "chosen": 8, "rejected": 12}
    assert len(results["contenders"]["jax-attention"]["losses"]) == 2
    assert (tmp_path / "run" / "bench" / "race.png").read_bytes().startswith(b"\x89PNG")
    assert "lengths: 20/8/12" in (tmp_path / "run" / "bench" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bench.contenders", "jax-hed"], "bench.contenders: 'jax-hed' is not one of torch-live"),
        (["--bench.groups", "3"], "bench.groups: dpo.batch, 4 pairs, cannot be split into 3 equal parts"),
        (["--bench.lengths", "100/50/50"], "bench.lengths: 100/50/50 makes rows of 150 tokens, but the model has 128"),
        (["--bench.lengths", "1/2"], "bench.lengths: must be three lengths in tokens"),
        (["--bench.torch-python", "no-such-python"], "bench.torch_python: no-such-python cannot be run as a program"),
        (["--bench.contenders", "trl", "--bench.torch-python", "false"], "bench.contenders: false has no torch or no trl"),
        (["--dpo.epochs", "2"], "--dpo.epochs: bench does not read this option"),
        (["--lora.rank", "8"], "--lora.rank: bench does not read this option"),
        (["--dpo.trainable", "head"], "--dpo.trainable: bench does not read this option"),
    ],
)
def test_wrong_options_are_told(config, capsys, flags, expected):
    assert main(["bench", config, *flags]) == 2
    assert expected in capsys.readouterr().err


def test_a_contender_that_fails_says_how(work):
    with pytest.raises(race.ContenderFailed, match="torch-live ended with exit code 1; all of its output is in .*torch-live-0"):
        race.run_one(work[0], "torch-live", steps=1, python="false")


def torch_python():
    python = os.environ.get("DPO_JAX_TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)
    return python or pytest.skip("no torch here and DPO_JAX_TORCH_PYTHON is not set")


@pytest.mark.parity
def test_a_padding_token_within_a_text_is_trained(tmp_path):
    """Grouped queries and a tied head, as in SmolLM2, whose turns end in its padding token."""
    sizes = SIZES | {"kv_heads": 2, "mlp_width": 48, "tie": True, "pad_token_id": 5}
    work, pairs = make_work(tmp_path, family="llama", sizes=sizes)
    assert any(5 in pair.prompt for pair in pairs)
    assert json.loads((work.model / "config.json").read_text())["pad_token_id"] == 5
    names = {"torch-cached": torch_python(), "jax-attention": sys.executable}
    results = {
        name: race.run_one(work, name, steps=work.longest_run, python=python, weights=True) for name, python in names.items()
    }
    weights = updates.compare(work.model, {name: work.weights(name) for name in names})
    found = gates.check(results, precision="float32", updates=weights)
    assert found["grad_norm"] < 1e-5
    assert found["update"] < 1e-4


@pytest.mark.parity
def test_pytorch_contenders_take_our_steps(work, rungs):
    """Set DPO_JAX_TORCH_PYTHON to a Python with torch (and trl) if this one has none."""
    python = torch_python()
    names = ["torch-live", "torch-cached"] + (["trl", "trl-best"] if race.installed(["trl"], python=python) else [])
    results = {name: race.run_one(work[0], name, steps=4, python=python, weights=True) for name in names}
    found = gates.check({"jax-attention": rungs[0]["jax-attention"], **results}, precision="float32")
    assert found["first_logps"] < 1e-5
    assert found["loss_curve"] < 1e-5
    assert found["grad_norm"] < 1e-5
    ours = {"jax-attention": work[0].weights("jax-attention")}
    weights = updates.compare(work[0].model, ours | {name: work[0].weights(name) for name in names})
    found = gates.check({"jax-attention": rungs[0]["jax-attention"], **results}, precision="float32", updates=weights)
    assert found["yardstick"] == "torch-live"
    assert found["update"] < 1e-4
    real = {result["real_positions"] for result in (*results.values(), rungs[0]["jax-live"])}
    assert len(real) == 1, "all see the same pairs"


def test_each_name_runs_in_the_python_of_its_library():
    assert {name for name in (*CONTENDERS, *MEASUREMENTS, *SAMPLERS) if library(name) == "torch"} == {
        *("torch-live", "torch-cached", "trl", "trl-best", "matmul-torch", "torch-generate")
    }
