"""`dpo-jax diffusion`: Diffusion-DPO on real digits (reward against path KL), or against a closed-form optimum.

Writes to `<run.dir>/diffusion-<experiment>`: `results.csv` and `.jsonl` (every measured point), `summary.json` (the printed
figures); for the digits also `digits.png` (samples before and after), `diffusion.png` (reward against KL), `pretrained/` (the
reference), `reference_errors/` and `runs/`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.lab import numbers
from dpo_jax.diffusion.gaussian import Normal, Reward, bound_optimum, sampled, tilted, train_gaussian
from dpo_jax.diffusion.network import DitConfig
from dpo_jax.diffusion.schedule import SCHEDULES, Schedule
from dpo_jax.lab import report
from dpo_jax.lab.digits import DigitsWorld, Sizes
from dpo_jax.lab.digits_plot import plot_points, plot_samples
from dpo_jax.lab.robust import Grid, by_seed, cell, difference, gain_at_kl
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result, Run, sweep
from dpo_jax.losses import named_loss
from dpo_jax.runtime.optim import make_optimizer, make_schedule
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.writing import writing

EQUAL_KL = (2.0, 5.0, 10.0, 20.0)  # path KL in nats per image
SHOWN = 30  # samples of each kind in the figure
REFERENCE, DPO, FT = "reference", "diffusion-dpo", "preferred-ft"
COLUMNS = (
    *("method", "label", "seed", "step", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high"),
    *("accuracy", "accuracy_low", "accuracy_high", "seconds"),
)
# gaussian: the data, and a reward on both their mean and their spread.
DATA = Normal(0.5, 0.8)
REWARDS = {"a shift": Reward(1.0), "a shift, narrower": Reward(1.0, -0.8)}
BETA = 1.0
GAUSSIAN_STEPS, GAUSSIAN_ERRORS = 2000, 8192


def run(config: Config) -> int:
    with build.open_run(config, "diffusion", out=config.diffusion_out()) as run_dir:
        work = gaussian if config.diffusion.experiment == "gaussian" else digits
        tables = work(config, run_dir)
        print("\n".join(["", *(f"{table.text()}\n" for table in tables)]))
    return 0


def runs_of(config: Config) -> list[Run]:
    """The runs of the digits: the reference, Diffusion-DPO at every beta, Preferred-FT at every rate."""
    section, seeds = config.diffusion, range(config.run.seed, config.run.seed + config.diffusion.seeds)
    return [
        *(Run(REFERENCE, "", {}, seed) for seed in seeds),
        *(Run(DPO, f"beta {beta:g}", {"beta": beta}, seed) for beta in numbers(section.betas) for seed in seeds),
        *(Run(FT, f"rate {lr:g}", {"lr": lr}, seed) for lr in numbers(section.ft_lrs) for seed in seeds),
    ]


def digits(config: Config, run_dir: RunDir) -> list[Grid]:
    section, folder = config.diffusion, run_dir.path
    loss = named_loss(section.loss)  # beta is traced, and passed by keyword
    world = make_world(config)
    shared = shared_settings(config)
    with identity.refusing_mismatch():
        world.pretrain(folder / "pretrained", {f"diffusion.{name}": shared[name] for name in PRETRAINED})
    build.describe(run_dir, config)

    def perform(run: Run, here: Path) -> list[dict[str, float]]:
        if run.method == REFERENCE:
            point, images = world.measure(world.reference, seed=run.seed)
            points = [{"step": 0.0, **point}]
        elif run.method == DPO:
            points, images = world.run(
                "dpo",
                here,
                seed=run.seed,
                lr=section.lr,
                loss=loss,
                beta=run.settings["beta"],
                weighting=section.weighting,
                refs=folder / "reference_errors" / f"draws{section.draws}-seed{run.seed}",
            )
        else:
            points, images = world.run("preferred-ft", here, seed=run.seed, lr=run.settings["lr"])
        with writing(here / "samples.npy", "wb") as file:
            np.save(file, images[:SHOWN])
        return points

    results = sweep(
        runs_of(config),
        folder / "runs",
        shared=shared | {"reference": world.digest},
        perform=perform,
        say=functools.partial(print, flush=True),
    )
    rows = [
        {"method": r.run.method, "label": r.run.label, "seed": r.run.seed, "seconds": r.seconds, **point}
        for r in results
        for point in r.points
    ]
    report.write(folder, rows, COLUMNS)
    reference = over(results, REFERENCE)
    kept = {name: reference[name][""] for name in ("reward", "accuracy")}
    methods = {"Diffusion-DPO": DPO, "Preferred-FT": FT}
    plot_points(
        {n: [r for r in results if r.run.method == m] for n, m in methods.items()}, folder / "diffusion.png", reference=kept
    )
    best = shown(results, kept["accuracy"])
    plot_samples(
        {name: np.load(folder / "runs" / run.name / "samples.npy", allow_pickle=False) for name, run in best.items()},
        folder / "digits.png",
    )
    tables = tables_of(results, kept["reward"], judge=world.judge.accuracy)
    print(f"figures: {folder / 'digits.png'}, {folder / 'diffusion.png'}")
    write_json(folder / "summary.json", {"reference": reference, "tables": [table._asdict() for table in tables]})
    return tables


PRETRAINED = (
    "schedule",
    "steps",
    "width",
    "layers",
    "heads",
    "pretrain_steps",
    "pretrain_batch",
    "pretrain_lr",
    "label_dropout",
    "seed",
)
SHARED = (
    *PRETRAINED[:-1],
    *("guidance", "pairs", "strength", "loss", "weighting", "draws", "batch", "epochs", "lr", "evaluations", "samples"),
)


def shared_settings(config: Config) -> dict[str, Any]:
    """Settings on which all runs depend."""
    return {name: getattr(config.diffusion, name) for name in SHARED} | {"seed": config.run.seed}


def make_world(config: Config) -> DigitsWorld:
    section = config.diffusion
    names = ("batch", "pretrain_batch", "pretrain_steps", "pretrain_lr", "guidance", "pairs", "strength", "samples", "epochs")
    sizes = Sizes(
        dropout=section.label_dropout,
        evaluations=section.evaluations,
        draws=section.draws,
        sample_batch=section.samples,
        **{name: getattr(section, name) for name in names},
    )
    network = DitConfig(width=section.width, layers=section.layers, heads=section.heads)
    try:
        return DigitsWorld(network, SCHEDULES[section.schedule](section.steps), sizes, seed=config.run.seed)
    except ImportError as error:
        raise ConfigError(f"diffusion: {error}") from error


def over(results: Sequence[Result], method: str, label: str = "") -> dict[str, dict[str, float]]:
    """Means over seeds of the final reward, KL and accuracy of each setting, with intervals over samples and seeds."""
    last = [r.points[-1] for r in results if (r.run.method, r.run.label) == (method, label)]
    return {name: over_seeds(last, name) for name in ("reward", "kl", "accuracy")}


def shown(results: Sequence[Result], accuracy: float) -> dict[str, Run]:
    """The policies whose samples are shown, of the first seed: the reference, and of each method the setting with the
    highest reward among those whose samples are recognized nearly as well as the reference's."""
    found = {"the reference": next(r.run for r in results if r.run.method == REFERENCE)}
    for method, name in ((DPO, "Diffusion-DPO"), (FT, "Preferred-FT")):
        labels = dict.fromkeys(r.run.label for r in results if r.run.method == method)
        ended = {label: over(results, method, label) for label in labels}
        legible = {label: e for label, e in ended.items() if e["accuracy"][""] >= accuracy - 0.05} or ended
        best = max(legible, key=lambda label: legible[label]["reward"][""])
        kl = f"{legible[best]['kl']['']:.2g}"
        found[f"{name}, {best}, path KL {kl}"] = next(r.run for r in results if (r.run.method, r.run.label) == (method, best))
    return found


def tables_of(results: Sequence[Result], reference: float, *, judge: float) -> list[Grid]:
    """Tables of the gain at equal path KL, and of the final point of each setting."""
    methods = {"Diffusion-DPO": DPO, "Preferred-FT": FT}
    found: dict[str, list[Any]] = {}
    for name, method in methods.items():
        mine = by_seed(r for r in results if r.run.method == method)
        found[name] = [gain_at_kl(mine, at, reference=reference) for at in EQUAL_KL]
    rows = [[name, *(cell(value) for value in values)] for name, values in found.items()]
    apart = [difference(a, b) if a and b else None for a, b in zip(found["Diffusion-DPO"], found["Preferred-FT"], strict=True)]
    rows.append(["difference", *(cell(value) for value in apart)])
    note = "gain in reward (standard deviations of ink) over the reference; 95 % intervals over samples and seeds"
    equal = Grid("gain at path KL", [f"{at:g} nats" for at in EQUAL_KL], rows, note)
    settings = list(dict.fromkeys((r.run.method, r.run.label) for r in results))
    ends = []
    for method, label in settings:
        values = over(results, method, label)
        ends.append([f"{method} {label}".strip(), *(cell(values[name]) for name in ("kl", "reward", "accuracy"))])
    words = f"accuracy: samples that a classifier reads as their class; it reads {judge:.3f} of held-out real digits"
    return [equal, Grid("where runs ended", ["path KL", "reward", "accuracy"], ends, words)]


def gaussian(config: Config, run_dir: RunDir) -> list[Grid]:
    """Compares the trained policy with the optimum of its bound, and with the tilted optimum that DPO aims at."""
    section, folder, found = config.diffusion, run_dir.path, []
    build.describe(run_dir, config)
    schedule = SCHEDULES[section.schedule](section.gaussian_steps)
    options = {"beta": BETA, "schedule": schedule, "weighting": "elbo"}
    for name, reward in REWARDS.items():
        aim = tilted(DATA, reward, beta=BETA)
        rows = [("the data", DATA), ("tilted optimum, N exp(r / beta)", aim)]
        for draws in map(int, numbers(section.gaussian_draws)):
            words = f"{draws} draw{'s' * (draws > 1)}"
            expected = bound_optimum(DATA, reward, draws=draws, nodes=16, **options)
            print(f"reward of {name}: optimum of the bound of {words} found", flush=True)
            end = _trained(reward, draws, seed=config.run.seed, **options)
            rows += [(f"optimum of the bound, {words}", expected), (f"trained, {words}", end)]
            print(f"reward of {name}: trained with {words} to mean {end.mean:.4f}, variance {end.std**2:.4f}", flush=True)
        limit = bound_optimum(DATA, reward, draws=2 * schedule.steps, nodes=16, **options)
        rows.append(("optimum of the bound, all draws", limit))
        found += [
            {"reward": name, "what": what, "mean": n.mean, "variance": n.std**2, **_apart(n, aim, schedule)} for what, n in rows
        ]
    report.write(folder, found, tuple(found[0]))
    note = f"the last column: samples of DDPM in {schedule.steps} steps, whose distribution is known as well"
    tables = [
        Grid(
            f"reward of {name}",
            ["mean", "variance", "off the tilted mean", "off its variance", "variance of samples"],
            [
                [r["what"], f"{r['mean']:.4f}", f"{r['variance']:.4f}"]
                + [f"{r[part]:+.1%}" for part in ("mean_off", "variance_off", "sampled_variance_off")]
                for r in found
                if r["reward"] == name
            ],
            note,
        )
        for name in REWARDS
    ]
    write_json(folder / "summary.json", {"found": found, "tables": [table._asdict() for table in tables]})
    return tables


def _trained(reward: Reward, draws: int, *, seed: int, **options: Any) -> Normal:
    """The policy after GAUSSIAN_STEPS steps, each with GAUSSIAN_ERRORS errors: the more draws, the fewer pairs."""
    rate = make_schedule("cosine", 0.02, warmup_steps=0, total_steps=GAUSSIAN_STEPS)
    tx = make_optimizer(rate, name="adamw", max_grad_norm=None, b2=0.99)
    batch = max(64, GAUSSIAN_ERRORS // draws)
    return train_gaussian(DATA, reward, tx=tx, draws=draws, steps=GAUSSIAN_STEPS, batch=batch, seed=seed, **options)


def _apart(found: Normal, aim: Normal, schedule: Schedule) -> Mapping[str, float]:
    parts = {"": found, "sampled_": sampled(schedule, found)}
    means = {f"{name}mean_off": n.mean / aim.mean - 1 for name, n in parts.items()}
    return means | {f"{name}variance_off": (n.std / aim.std) ** 2 - 1 for name, n in parts.items()}
