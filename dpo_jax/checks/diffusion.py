"""Diffusion check: Diffusion-DPO steps of a linear denoiser must reproduce CPU results.

`python -m dpo_jax.checks.diffusion` prints those numbers again, for `EXPECTED`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.checks.report import Result, Row
from dpo_jax.diffusion.gaussian import Normal, denoise
from dpo_jax.diffusion.reference import image_uids
from dpo_jax.diffusion.schedule import cosine_schedule
from dpo_jax.diffusion.step import ImagePairs, diffusion_dpo_step, pair_errors
from dpo_jax.losses import dpo_loss
from dpo_jax.step import init_state

STEPS, PAIRS = 4, 64
EXPECTED = (0.69314748, 0.66362429, 0.63694298, 0.61306965)  # float32 on a CPU
BAR = 1e-5  # of losses in float32


def rows() -> Iterator[Row]:
    yield Row(
        "diffusion",
        "noise, errors or gradients of Diffusion-DPO differ from a CPU's: do not trust dpo-jax diffusion here; report it",
        _steps,
    )


def losses() -> list[float]:
    """The loss of each step. Before the first, the policy equals its reference: ln 2."""
    rng, schedule = np.random.RandomState(0), cosine_schedule(20)
    predict, reference, tx = functools.partial(denoise, schedule), Normal(0.3, 0.7).variables(), optax.sgd(0.05)
    images, label = rng.standard_normal((PAIRS, 2, 1)).astype(np.float32), np.zeros(PAIRS, np.int32)
    images = np.sort(images, axis=1)[:, ::-1]  # larger numbers are preferred
    pairs = ImagePairs(images, label, image_uids(images, label), label, np.ones(PAIRS, np.float32))
    options = {"predict": predict, "schedule": schedule}
    errors = jax.jit(functools.partial(pair_errors, draws=2, **options))(reference, pairs)
    loss = functools.partial(dpo_loss, beta=0.1)
    step = jax.jit(functools.partial(diffusion_dpo_step, tx=tx, loss=loss, **options))
    state, found = init_state(jax.tree.map(jnp.asarray, reference), tx), []
    for _ in range(STEPS):
        state, metrics = step(state, pairs.replace(ref_errors=errors))
        found.append(float(metrics["loss"]))
    return found


def _steps() -> Result:
    found = losses()
    start, difference = abs(found[0] - math.log(2)), float(np.abs(np.array(found) - EXPECTED).max())
    figure = f"losses {' '.join(f'{loss:.5f}' for loss in found)}, at most {difference:.1e} from a CPU's"
    values = {"losses": found, "start": start, "difference": difference}
    return Result(figure, max(start, difference) <= BAR, bar=f"{BAR:g}", values=values)


if __name__ == "__main__":
    print(tuple(round(loss, 8) for loss in losses()))
