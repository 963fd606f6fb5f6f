"""The race of samplers: a difference is caught, figures are what they say, and transformers continues prompts as we do."""

import functools
import importlib.util
import json
import os
import sys

import jax
import numpy as np
import pytest

from dpo_jax.bench import our_sampler, race, sampling_race
from dpo_jax.bench.gates import GateFailed
from dpo_jax.bench.work import SamplingWork, read_prompts, read_sampling, write_sampling
from dpo_jax.cli.main import main
from dpo_jax.data.layout import completion_rows
from dpo_jax.logps import sequence_logps
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.sampling import left_pad

NEW, EOS = 6, 31


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model with clear preferences that likes to end."""
    folder = tmp_path_factory.mktemp("samplers")
    sizes = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "max_positions": 64, "eos_token_id": EOS}
    model = make_model(decoder_config(hf_config("gpt_neox", **sizes)))
    save_hf(folder / "model", model, jax.tree.map(lambda x: 4 * x, jax.jit(model.init)(jax.random.key(1))))
    work = SamplingWork(str(folder), new_tokens=NEW, batches=2, precision="float32", seed=3, completions=2, ends=(5, EOS))
    write_sampling(work, *left_pad(sampling_race.random_prompts(8, 20, vocab_size=61, seed=0)))
    return work


@pytest.fixture(scope="module")
def ours(work):
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {option: getattr(jax.config, option) for option in options}
    try:
        yield our_sampler.run(work)
    finally:
        for option, value in before.items():
            jax.config.update(option, value)


def test_prompts_survive_the_disk(work):
    assert read_sampling(work.folder) == work
    prompts, lengths = read_prompts(work)
    assert lengths.max() == lengths[0] == 20
    assert lengths.min() >= 10
    assert prompts.shape == (8, 24)
    for row, length in zip(prompts, lengths, strict=True):
        assert (row[:-length] == 0).all()
        assert (row[-length:] > 0).all()


def test_our_greedy_continuations_are_the_likeliest(work, ours):
    """Of the sequences that differ in their last token, ours has the largest log-probability; and none is shorter."""
    model, variables = load_hf(work.model)
    assert np.shape(ours["greedy"]) == (16, NEW)
    assert ours["greedy"][::2] == ours["greedy"][1::2]
    prompts, lengths = read_prompts(work)
    prompt, greedy = prompts[0, -lengths[0] :], np.array(ours["greedy"][0])
    ends = [(prompt, np.append(greedy[:-1], token)) for token in range(61)]
    logps = jax.jit(functools.partial(sequence_logps, model))(variables, completion_rows(ends, length=32))
    assert int(np.argmax(logps)) == greedy[-1]
    assert len(ours["batch_seconds"]) == len(ours["batch_tokens"]) == work.batches
    assert all(16 <= tokens < 16 * NEW for tokens in ours["batch_tokens"])  # some ended early
    assert ours["compile_seconds"] > 0


def result(greedy, *, nats=(-4.0, -4.2), seconds=(2.0, 1.0), **changes):
    return {
        "greedy": greedy,
        "nats": list(nats),
        "batch_seconds": list(seconds),
        "batch_tokens": [12, 12],
        "variant": "the only one",
        "first_seconds": 3.0,
        "peak_bytes": 2**30,
        "device": "cpu",
        "versions": {},
        "neighbors": 0.0,
        **changes,
    }


def theirs(**changes):
    return result([[1, 2, 3], [4, 5, 6]], runner_up=[[9, 8, 7], [9, 8, 7]], gap=[[1.0, 1e-4, 1.0], [1.0] * 3], **changes)


def test_gates_let_near_ties_pass_and_nothing_else():
    found = sampling_race.check(result([[1, 8, 0], [4, 5, 6]]), theirs(), precision="float32")
    assert (found["rows"], found["parted"], found["gap"]) == (2, 1, 1e-4)
    with pytest.raises(GateFailed, match=r"prompt 1 part at token 2: jax-generate takes 7, torch-generate 6 by 1 before"):
        sampling_race.check(result([[1, 2, 3], [4, 5, 7]]), theirs(), precision="float32")
    with pytest.raises(GateFailed, match=r"prompt 0 part at token 1: jax-generate takes 7, .* second choice 8"):
        sampling_race.check(result([[1, 7, 3], [4, 5, 6]]), theirs(), precision="float32")
    with pytest.raises(GateFailed, match=r"jax-generate made \(2, 2\) tokens"):
        sampling_race.check(result([[1, 2], [4, 5]]), theirs(), precision="float32")
    assert sampling_race.check(result([[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]]), theirs(), precision="float32")["rows"] == 4
    with pytest.raises(GateFailed, match=r"prompt 1 part at token 2: jax-generate takes 7"):  # the second of its completions
        sampling_race.check(result([[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 7]]), theirs(), precision="float32")
    broken = theirs() | {"gap": [[float("nan")] * 3] * 2}
    with pytest.raises(GateFailed, match="prompt 0 part"):
        sampling_race.check(result([[1, 8, 3], [4, 5, 6]]), broken, precision="float32")


def test_a_sampler_that_cuts_the_distribution_is_caught():
    equal = [[1, 2, 3], [4, 5, 6]]
    for nats in ((-2.0, -2.2), (float("nan"), -4.0)):
        with pytest.raises(GateFailed, match="the distributions differ"):
            sampling_race.check(result(equal, nats=nats), theirs(), precision="float32")


def test_tokens_that_end_a_completion_end_the_share_that_is_asked_for():
    ends = sampling_race.end_tokens(1 / 6, new_tokens=32, vocab_size=8000)
    assert 1 - (1 - len(ends) / 8000) ** 31 == pytest.approx(1 / 6, abs=0.01)
    assert 0 not in ends  # padding
    assert sampling_race.end_tokens(0.0, new_tokens=32, vocab_size=8000) == ()


def test_report_arithmetic(work):
    """Two rows of six tokens in 2 s and 1 s: 6 and 12 tokens/s, at the median batch 9."""
    fast = {"seconds": (0.5, 0.5), "neighbors": 0.3}
    rounds = {
        "torch-generate": [theirs(), theirs(seconds=(1.0, 1.0))],
        "jax-generate": [result([[0]] * 2, compile_seconds=s, **fast) for s in (4.0, 1.0)],
    }
    gates = {"rows": 2, "parted": 1, "gap": 1e-4, "nats": 0.0, "nats_error": 0.1}
    summary = sampling_race.summarize(work, rounds, gates)
    literal, mine = summary["samplers"].values()
    assert literal["tokens_per_second"] == {"median": 10.5, "min": 9.0, "max": 12.0}
    assert mine["tokens_per_second"]["median"] == 24
    assert mine["compile_seconds"] == {"cold": 4.0, "warm": 1.0}
    assert literal["compile_seconds"] == {"cold": None, "warm": None}
    assert summary["ratio"] == pytest.approx({"tokens_per_second": 24 / 10.5, "at_least": 2, "at_most": 24 / 9})
    shown = sampling_race.table(summary)
    assert "| `jax-generate` | 24 (24 to 24) | 4.0 s / 1.0 s |" in shown
    assert "1 of 2 equal, the others diverge between logits at most 1.0e-04 apart" in shown
    assert "2.29x the tokens/s (2.00 to 2.67)" in shown
    assert "30% of the cores: TOO BUSY" in shown


CONFIG = """\
run: {{dir: {folder}}}
data: {{max_length: 32, max_prompt_length: 16}}
tokenizer: {{vocab_size: 300}}
model: {{family: llama, width: 32, layers: 2, heads: 4, kv_heads: 2, max_positions: 32}}
bench: {{rounds: 2, steps: 1}}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / "run"))
    return str(path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bench.sampling", "4/8"], "bench.sampling: must be a number of prompts, the longest prompt"),
        (["--bench.sampling", "4/8/0"], "bench.sampling: must be a number of prompts, the longest prompt"),
        (["--bench.sampling", "4/8/8", "--bench.lengths", "1/2/3"], "bench.lengths: belongs to the training benchmark"),
        (["--bench.completions", "4"], "bench.completions: belongs to the sampling benchmark"),
        (["--bench.sampling", "4/8/8", "--bench.ending", "1"], "bench.ending: must be a share, at least 0 and less than 1"),
        (["--bench.sampling", "4/8/8", "--profile"], "bench.profile: belongs to the training benchmark"),
        (["--bench.sampling", "4/8/8", "--bench.torch-python", "false"], "bench.sampling: false has no torch"),
    ],
)
def test_wrong_options_are_told(config, capsys, flags, expected):
    assert main(["bench", config, *flags]) == 2
    assert expected in capsys.readouterr().err


@pytest.fixture
def torch_python():
    """Set DPO_JAX_TORCH_PYTHON to a Python with torch if this one has none."""
    python = os.environ.get("DPO_JAX_TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)
    return python or pytest.skip("no torch here and DPO_JAX_TORCH_PYTHON is not set")


@pytest.mark.parity
def test_transformers_continues_as_we_do(work, ours, torch_python):
    """Token for token, past the EOS that the model likes."""
    other = race.run_one(work, "torch-generate", steps=0, python=torch_python)
    assert other["greedy"] == ours["greedy"][::2]
    assert all(16 <= tokens < 16 * NEW for tokens in other["batch_tokens"])
    assert any(EOS in row[:-1] for row in ours["greedy"]), "an EOS must not end a completion"
    assert sampling_race.check(ours, other, precision="float32")["parted"] == 0


@pytest.mark.parity
def test_the_command_leaves_table_and_figures(config, tmp_path, capsys, torch_python):
    python = ["--bench.ending", "0.3", "--bench.torch-python", torch_python]
    assert main(["bench", config, "--bench.sampling", "5/8/6", "--bench.completions", "2", *python]) == 0
    assert "jax-generate against torch-generate" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "bench" / "sampling.json").read_text())
    assert results["work"]["prompts"] == 5
    assert results["gates"]["rows"] == 10
    assert 1 <= results["work"]["mean_tokens"] <= 6
    assert results["ratio"]["tokens_per_second"] > 0
    assert main(["bench", config, "--bench.sampling", "5/30/6", "--bench.torch-python", torch_python]) == 2
    assert "bench.sampling: 5/30/6 makes rows of 36 tokens, but the model has 32" in capsys.readouterr().err
