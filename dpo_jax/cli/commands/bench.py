"""`dpo-jax bench`: benchmarks our training against PyTorch, on the same weights and the same pairs in every optimizer step.

It prints a table and writes to `<run.dir>/bench`: `results.json` (all figures), `race.png`, `work/` (the model, the frozen
pairs, each contender's measurements in each round, and its output), and with `--profile` `trace/`. `--bench.sampling` instead
compares our sampler with `transformers.generate`; its figures are in `sampling.json`.

HOW_TO_READ explains the profile, and is printed with it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.bench import race, report, sampling_race
from dpo_jax.bench.flops import typical_matmuls
from dpo_jax.bench.profile import slowest_operations
from dpo_jax.bench.work import (
    LONGEST,
    OURS,
    SamplingWork,
    Work,
    random_pairs,
    read_pairs,
    write_sampling,
    write_work,
)
from dpo_jax.cli import build, splits
from dpo_jax.cli.bench_contenders import contenders, need, not_raced, torch_python
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.model_folders import sized_hf_config
from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import batch_indices, plan_layout
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config, save_hf
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.rundir import RunDir, environment, write_json
from dpo_jax.sampling import left_pad
from dpo_jax.types import Model
from dpo_jax.writing import empty_folder

HOW_TO_READ = """\
How to read it. The first table sums the time of the operations of the compiled step, by part of the model: `forward`,
`backward`, `recomputed` (remat), `update` (optimizer). The second one has single operations and where they
come from; a fusion is named after its last one. The whole picture: open perfetto_trace.json.gz (below plugins/profile/) at
https://ui.perfetto.dev, or the folder in XProf or TensorBoard. There a gap on the device's line is time spent waiting for the
host, and the first step in the trace may still fill caches."""
RACED = "All contenders train all weights, of model.path or random ones, by RMSprop on the loss of the paper."
MATMUL_TOKENS = 16_384  # most rows of the timed matrix products


def run(config: Config) -> int:
    if config.bench.sampling is not None:
        return _sampling(config)
    names = contenders(config)
    jax.config.update("jax_platforms", "cpu")  # an accelerator belongs to one process at a time: the contender's
    with build.open_run(config, "bench") as run_dir:
        if ignored := not_raced(config):
            print(f"not read: {', '.join(ignored)}. {RACED}", flush=True)
        work = freeze(config, run_dir)
        print(f"{len(names)} contenders in {config.bench.rounds} rounds; logs and loss curves are in {work.folder}", flush=True)
        results, differences = race.race(
            work,
            names,
            rounds=config.bench.rounds,
            python=torch_python(config),
            say=functools.partial(print, flush=True),
        )
        decoder = decoder_config(load_config(work.model))
        summary = report.summarize(work, decoder, read_pairs(work), results, differences)
        if config.bench.scaling:
            summary["scaling"] = report.scaling(race.run_one(work, "scaling", steps=0))
        build.describe(run_dir, config)
        write_json(run_dir.path / "results.json", {"machine": machine(), **summary})
        _plot(summary, run_dir.path / "race.png")
        print(f"\n{report.table(summary)}\n\nall figures: {run_dir.path / 'results.json'}")
        if config.bench.profile:
            _profile(work, run_dir)
    return 0


def _plot(summary: dict[str, Any], path: Path) -> None:
    """The benchmark as a figure, unless the plotting package is missing, as in an image for GPU machines."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path}: left out, the package matplotlib is missing")
        return
    from dpo_jax.bench.plots import plot_race

    plot_race(summary, path)


def freeze(config: Config, run_dir: RunDir) -> Work:
    """Writes the shared inputs of the contenders: new weights, the pairs of every optimizer step, the settings."""
    bench, section = config.bench, config.dpo
    if section.max_grad_norm is None:
        raise ConfigError("dpo.max_grad_norm: every contender of bench clips its gradients; set a number")
    folder = _work_folder(run_dir)
    longest_run = max(bench.gate_steps, bench.steps + 1)
    if bench.lengths is None:
        data, model = _from_data(config)
        steps = (batch_indices(len(data), batch=section.batch, seed=config.run.seed, step=s) for s in range(longest_run))
        pairs = [data[int(i)] for i in np.concatenate(list(steps))]
        _check_scored(pairs)
    else:
        pairs, model = _random(config, longest_run * section.batch)
        data = pairs
    variables, _ = build.start_weights(config, model, single_device())
    save_hf(folder / "model", model, variables)
    build.free(variables)
    shared = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs) / longest_run
    work = Work(
        folder=str(folder),
        batch=section.batch,
        steps=bench.steps,
        gate_steps=bench.gate_steps,
        groups=bench.groups,
        torch_microbatches=bench.torch_microbatches,
        microbatches=section.microbatches,
        beta=section.beta,
        lr=section.lr,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        precision=config.run.precision,
        remat=config.model.remat,
        layouts=_layouts(config, data),
        matmuls=typical_matmuls(model.config, tokens=min(MATMUL_TOKENS, round(shared))),
    )
    write_work(work, pairs)
    return work


def _work_folder(run_dir: RunDir) -> Path:
    return empty_folder(run_dir.path / "work", ours=("work.json", "sampling.json"))


def _from_data(config: Config) -> tuple[list[Encoded], Model]:
    """The train split, and the model to train on it."""
    tokenizer = build.tokenizer_of(config, model_path=config.model.path)
    encoded = splits.encode_split(config, splits.load_split(config, "train", tokenizer), tokenizer)
    return list(encoded), build.start_model(config, tokenizer)


def _check_scored(pairs: list[Encoded]) -> None:
    """Raises `ConfigError` for a completion with unscored tokens: the other contenders would score them all."""
    partly = [pair.uid for pair in pairs if any(scored is not None and not scored.all() for _, scored in pair.sides)]
    if partly:
        raise ConfigError(
            f"data.path: {partly[0]} and {len(partly) - 1} other pairs of the benchmark have unscored turns in their "
            "completions, but PyTorch contenders score whole completions: use rows whose completions have one turn"
        )


def _random(config: Config, count: int) -> tuple[list[Encoded], Model]:
    """Random pairs of `bench.lengths`, and a model for them."""
    assert config.bench.lengths is not None
    prompt, chosen, rejected = (int(part) for part in config.bench.lengths.split("/"))
    vary = config.bench.lengths_vary
    longest = (LONGEST if vary else 1) * (prompt + max(chosen, rejected))
    model = _model_for_random(config, option="bench.lengths", longest=longest)
    lengths, vocab_size = (prompt, chosen, rejected), model.config.vocab_size
    return random_pairs(count, lengths=lengths, vocab_size=vocab_size, seed=config.run.seed, vary=vary), model


def _model_for_random(config: Config, *, option: str, longest: int) -> Model:
    """The configured model, without a tokenizer. It must read rows of `longest` tokens, as `option` requires."""
    if config.model.path is not None:
        with build.naming_option("model.path", config.model.path):
            decoder = decoder_config(load_config(config.model.path), where=f"{config.model.path}/config.json")
    else:
        vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
        decoder = decoder_config(sized_hf_config(config, vocab_size=vocab_size, eos=0))
    if longest > decoder.max_positions:
        asked = getattr(config.bench, option.removeprefix("bench."))
        raise ConfigError(
            f"{option}: {asked} makes rows of {longest} tokens, but the model has {decoder.max_positions} positions; raise "
            "model.max_positions"
        )
    return make_model(decoder, dtype=build.PRECISIONS[config.run.precision], remat=config.model.remat)


def _layouts(config: Config, pairs: list[Encoded]) -> dict[str, dict[str, Any]]:
    """Row layouts of each kind, as a `dpo` run plans them for all its data; with packing, also those of its reference pass."""
    section, layouts = config.dpo, {}
    for kind in ("plain", "packed"):
        multiple = section.microbatches * (2 if kind == "plain" else 1)
        length = None if kind == "plain" else config.data.row_length
        parts = {"multiple": multiple, "microbatches": section.microbatches}
        layout = plan_layout(pairs, kind=kind, batch=section.batch, length=length, **parts)
        layouts[kind] = dataclasses.asdict(layout)
    reference = plan_layout(pairs, kind="packed", batch=section.batch, length=config.data.row_length)
    return {**layouts, "reference": dataclasses.asdict(reference)}


def _sampling(config: Config) -> int:
    """The sampling benchmark."""
    assert config.bench.sampling is not None
    count, longest, new_tokens = (int(part) for part in config.bench.sampling.split("/"))
    need(config, ["torch"], option="bench.sampling")
    jax.config.update("jax_platforms", "cpu")
    with build.open_run(config, "bench") as run_dir:
        model = _model_for_random(config, option="bench.sampling", longest=longest + new_tokens)
        folder, seed = _work_folder(run_dir), config.run.seed
        variables, _ = build.start_weights(config, model, single_device())
        save_hf(folder / "model", model, variables)
        build.free(variables)
        bench = config.bench
        ends = sampling_race.end_tokens(bench.ending, new_tokens=new_tokens, vocab_size=model.config.vocab_size)
        work = SamplingWork(
            str(folder), new_tokens, bench.steps, config.run.precision, seed, completions=bench.completions, ends=ends
        )
        prompts = sampling_race.random_prompts(count, longest, vocab_size=model.config.vocab_size, seed=seed)
        write_sampling(work, *left_pad(prompts))
        results, differences = sampling_race.race(
            work, rounds=bench.rounds, python=torch_python(config), say=functools.partial(print, flush=True)
        )
        summary = sampling_race.summarize(work, results, differences)
        build.describe(run_dir, config)
        write_json(run_dir.path / "sampling.json", {"machine": machine(), **summary})
        print(f"\n{sampling_race.table(summary)}\n\nall figures: {run_dir.path / 'sampling.json'}")
    return 0


def machine() -> dict[str, Any]:
    """Facts of the machine on which the figures depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"processor": processor, **environment()}


def _profile(work: Work, run_dir: RunDir) -> None:
    trace = empty_folder(run_dir.path / "trace", ours=("plugins",))
    race.run_one(work, OURS, steps=work.steps + 1, round_number=-1, trace=str(trace))
    print(f"\n{slowest_operations(trace)}\n\n{HOW_TO_READ}\ntrace: {trace}")
