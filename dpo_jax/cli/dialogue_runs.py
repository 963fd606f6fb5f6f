"""The runs of `dpo-jax dialogue`, and checks before any of them starts. Needs no JAX."""

from __future__ import annotations

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.lab import numbers
from dpo_jax.lab.sweep import Run

REFERENCE = "reference"


def runs_of(config: Config) -> list[Run]:
    """The runs: the reference itself, and every setting of every method. Raises `ConfigError` for inconsistent options."""
    if config.data.source != "question_game":
        raise ConfigError(f"data.source: dialogue plays the question game; set it to question_game, not {config.data.source}")
    if config.data.bos == "always":
        raise ConfigError("data.bos: conversations of the question game begin without BOS; set it to auto")
    section, first = config.dialogue, config.run.seed
    seeds, betas = range(first, first + section.seeds), numbers(section.betas)
    settings = {
        "dpo": [{"beta": beta} for beta in betas],
        "online": [{"beta": beta, "rounds": section.rounds} for beta in betas],
        "preferred-ft": [{"alpha": 0.0}],
        "myopic": [{"beta": beta} for beta in betas],
        "dpo-limit": [{"beta": beta} for beta in betas],
    }
    return [
        Run(REFERENCE, "", {}, first),
        *(
            Run(method, f"beta {of['beta']:g}" if "beta" in of else "", of, seed)
            for method in section.chosen()
            for of in settings[method]
            for seed in (seeds if method != "dpo-limit" else [first])  # it is computed from all possible conversations
        ),
    ]
