"""The runs of each robustness experiment, and checks before any of them starts. Needs no JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.lab import FrontierConfig, numbers
from dpo_jax.data.reviews import TOPICS
from dpo_jax.lab.sweep import Run

REFERENCE = "reference"  # the method of the run that evaluates the reference itself
FAMILIES = ("first", "second")


def runs_of(config: Config) -> list[Run]:
    """Every run of `robust.experiment`. Raises `ConfigError` for inconsistent options."""
    experiments = {"noise": noise, "shift": shift, "overoptimization": overoptimization}
    return experiments[config.robust.experiment](config)


def noise(config: Config) -> list[Run]:
    """Every loss at every beta and flip rate. Without flips cdpo and robust equal dpo, and are not run again."""
    section = config.robust
    if config.frontier.labels != "bradley_terry":
        raise ConfigError("frontier.labels: the theory of label noise is that of bradley_terry labels; leave it out")
    losses = {rate: section.chosen() if rate else dict.fromkeys(map(unflipped, section.chosen())) for rate in section.rates()}
    return [
        Run(REFERENCE, "", _sampled(config), config.run.seed),
        *(
            Run(loss, f"flipped {rate:g} beta {beta:g}", {"rate": rate, "beta": beta}, seed)
            for rate, of_rate in losses.items()
            for loss in of_rate
            for beta in numbers(config.frontier.dpo_betas)
            for seed in _seeds(config)
        ),
    ]


def unflipped(loss: str) -> str:
    """The loss that this one equals if no label is flipped."""
    return loss if loss == "ipo" else "dpo"


def families(config: Config) -> dict[str, list[str]]:
    """The topics of the two families of prompts."""
    first = config.robust.family()
    second = [topic for topic in TOPICS if topic not in first]
    if not first or not second or set(first) - set(TOPICS):
        raise ConfigError(f"robust.topics: must be some but not all of {', '.join(TOPICS)}, got {config.robust.topics!r}")
    return dict(zip(FAMILIES, (first, second), strict=True))


def shift(config: Config) -> list[Run]:
    """DPO at every beta, and PPO with a learned reward at every target KL, trained on each family."""
    if config.data.source != "reviews":
        raise ConfigError("data.source: a shift of prompts needs reviews, whose topics are known")
    betas, kls = numbers(config.frontier.dpo_betas), numbers(config.frontier.ppo_kls)
    return [
        Run(REFERENCE, "", {}, config.run.seed),
        *(
            Run(method, f"trained on {family} {name} {value:g}", {"family": family, name: value, **others}, seed)
            for family in families(config)
            for method, name, values, others in (("dpo", "beta", betas, {}), ("ppo", "KL", kls, _ppo(config)))
            for value in values
            for seed in _seeds(config)
        ),
    ]


def overoptimization(config: Config) -> list[Run]:
    """For each model and data size: Best-of-N, and the runs that go furthest (DPO's smallest beta, PPO's largest KL)."""
    if config.dpo.policy is not None or config.model.path is not None:
        name = "dpo.policy" if config.dpo.policy is not None else "model.path"
        raise ConfigError(f"{name}: models of several widths are trained from section model; leave it out")
    section = config.robust
    for width in section.counts("widths"):
        if config.model.heads and not config.model.head_size and width % config.model.heads:
            raise ConfigError(f"robust.widths: {width} is not divisible by model.heads ({config.model.heads})")
    if max(section.counts("train_prompts")) > config.frontier.prompts:
        raise ConfigError(
            f"robust.train_prompts: {max(section.counts('train_prompts'))} are more than frontier.prompts "
            f"({config.frontier.prompts}); raise that, or lower this"
        )
    _check_points(config.frontier)
    beta, kl = min(numbers(config.frontier.dpo_betas)), max(numbers(config.frontier.ppo_kls))
    widths, sizes = section.counts("widths"), section.counts("train_prompts")
    return [
        *(
            Run("best-of-n", f"width {width} prompts {n}", {"width": width, "prompts": n, **_sampled(config)}, config.run.seed)
            for width in widths
            for n in sizes
        ),
        *(
            Run(
                method,
                f"width {width} prompts {n} {name} {value:g}",
                {"width": width, "prompts": n, name: value, **others},
                seed,
            )
            for width in widths
            for n in sizes
            for method, name, value, others in (("dpo", "beta", beta, {}), ("ppo", "KL", kl, _ppo(config)))
            for seed in _seeds(config)
        ),
    ]


def _check_points(section: FrontierConfig) -> None:
    """Raises `ConfigError` if a curve would have fewer points than the two constants that are fitted to it."""
    if section.evaluations * section.seeds < 2:
        raise ConfigError(
            "frontier.evaluations: 1, with one seed, gives a curve of one point; the fit needs two: raise it, or frontier.seeds"
        )
    if sum(1 < n <= section.optimum_samples for n in numbers(section.best_of)) < 2:
        raise ConfigError(
            "frontier.best_of: the fit needs two values above 1 and up to frontier.optimum_samples "
            f"({section.optimum_samples}), got {section.best_of!r}"
        )


def at_width(config: Config, width: int) -> Config:
    """`config` with a model of another width, and its own run directory inside the run directory."""
    model, run = (
        dataclasses.replace(config.model, width=width),
        dataclasses.replace(config.run, dir=f"{config.run.dir}/width-{width}"),
    )
    return dataclasses.replace(config, model=model, run=run)


def _seeds(config: Config) -> range:
    return range(config.run.seed, config.run.seed + config.frontier.seeds)


def _sampled(config: Config) -> dict[str, Any]:
    """Settings on which results from the reference's own samples depend."""
    section = config.frontier
    best_of = {"best_of": section.best_of} if config.robust.experiment == "overoptimization" else {}
    return {"samples": section.optimum_samples, "sampled_prompts": section.optimum_prompts, **best_of}


def _ppo(config: Config) -> dict[str, Any]:
    """The options of PPO, which affect no other run."""
    section = dataclasses.asdict(config.frontier)
    return {name: value for name, value in section.items() if name.startswith("ppo_") and name != "ppo_kls"}
