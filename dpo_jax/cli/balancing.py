"""Mixture-of-experts options of training commands: the load-balancing coefficient, and the effect of rounding on routing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError, TrainingConfig
from dpo_jax.models.families import router_coefficient
from dpo_jax.models.lora import LORA
from dpo_jax.routing import switch_rate
from dpo_jax.runtime.hosts import is_first
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.types import Model, Partitioner, Rows, Variables


def router_aux_loss(section: TrainingConfig, model: Model) -> float:
    """The coefficient in `section`, or else in the config.json of `model`. Raises `ConfigError` for a model without experts."""
    asked = section.router_aux_loss
    if asked and model.route is None:
        raise ConfigError(f"{section.name}.router_aux_loss: a {model.config.family} has no experts to balance; leave it out")
    return router_coefficient(model.config) if asked is None else asked


def tell_switches(
    config: Config, run: RunDir, model: Model, variables: Variables, rows: Rows, *, partitioner: Partitioner
) -> None:
    """Prints the share of (token, layer, expert) choices of `rows` that differ between float32 and a `model` in bfloat16, and
    writes it to `routing.json`. Policy and reference both run in bfloat16 and route alike; this shows how far that is from
    float32.

    Does nothing for a model without experts, in float32, or when the training of an adapter continues.
    """
    if model.route is None or config.run.precision == "float32" or LORA in variables:
        return
    # Plain XLA obeys the precision given below. A TPU kernel in float32 needs a setting of the whole process, which
    # `decoder_of` makes unless a platform is given, and no bfloat16 program may be compiled with it.
    plain = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, precision="float32"),
        model=dataclasses.replace(config.model, attention="blocks"),
    )
    exact = build.decoder_of(plain, model.config.hf, platform=jax.default_backend())

    def of_rows(variables: Variables, rows: Rows) -> jax.Array:
        assert model.route is not None
        assert exact.route is not None
        with jax.default_matmul_precision("highest"):
            expected = exact.route(variables, rows)[1]
        share = switch_rate(expected, model.route(variables, rows)[1])
        return jnp.broadcast_to(share, rows.weight.shape)  # one value per example, as `compile_map` requires

    with reported("comparing routes with float32", brief=True):
        share = float(np.mean(partitioner.compile_map(of_rows)(variables, rows)))
    if is_first():
        print(f"routing: {share:.2%} of the expert choices differ between float32 and {config.run.precision}", flush=True)
        write_json(run.path / "routing.json", {"switched": share, "precision": config.run.precision})
