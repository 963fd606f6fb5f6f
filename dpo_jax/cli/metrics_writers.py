"""The metrics writers that the configuration names: TensorBoard, wandb, Trackio."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.cli import identity
from dpo_jax.cli.config import Config
from dpo_jax.runtime.metrics import Writer
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.runtime.writers import AsTrl, Delivery, Place, TensorBoard, Trackio, Wandb


def metrics_writers(config: Config, run: RunDir, facts: Mapping[str, Any]) -> list[Writer]:
    """Additional metrics writers of the configuration, which get its sections and `facts`, the fingerprint of the run."""
    section, shown = config.run, {**identity.settings_shown(config, run.path.name), **facts}
    options = {"directory": run.path, "config": shown}
    places: dict[str, Callable[[], Place]] = {}
    if section.tensorboard:
        places["TensorBoard"] = lambda: TensorBoard(run.path / "tensorboard")
    if section.wandb is not None:
        places["wandb"] = functools.partial(Wandb, section.wandb, **options)
    if section.trackio is not None:
        places["Trackio"] = functools.partial(Trackio, section.trackio, **options)
    if section.metric_names == "trl":
        places = {name: lambda make=make: AsTrl(make()) for name, make in places.items()}
    folder = run.path / "writers"
    return [
        Delivery(
            name, make, record=folder / f"{name.lower()}.json", forgets=name == "TensorBoard", samples=run.path / "samples"
        )
        for name, make in places.items()
    ]
