"""Control check: CPL steps of a linear policy must reproduce CPU results.

`python -m dpo_jax.checks.control` prints those numbers again, for `EXPECTED`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.checks.attention import float32_is_float32
from dpo_jax.checks.report import Result, Row
from dpo_jax.cpl import SegmentPairs, cpl_step
from dpo_jax.step import init_state
from dpo_jax.types import Array, Variables

STEPS, LAM = 4, 0.5
WATCHED = ("loss", "margin", "grad_norm")
EXPECTED = (  # WATCHED of each step, float32 on a CPU
    (1.33927798, 0.34545356, 0.45310101),
    (1.26949811, 0.46390578, 0.19746707),
    (1.25387800, 0.51415288, 0.12139606),
    (1.24783969, 0.54579127, 0.07789627),
)
BAR = 1e-5


def rows() -> Iterator[Row]:
    yield Row(
        "control.cpl",
        "CPL differs here from a CPU's: do not trust a policy for control; report this file",
        _steps,
    )


def steps() -> list[list[float]]:
    """`WATCHED` of each step."""
    rng = np.random.RandomState(0)  # its numbers are the same in all versions of numpy
    states, actions = (rng.standard_normal((15, 2, 8, size)).astype(np.float32) for size in (4, 2))
    pairs = SegmentPairs(states, actions, np.array([1] * 14 + [0], np.float32))  # the last is a padding example

    def log_prob(variables: Variables, states: Array, actions: Array) -> jax.Array:
        means = jnp.matmul(states, variables["gain"], precision="highest")
        return -jnp.square(actions - means).sum(axis=-1) / 2

    tx = optax.sgd(0.5)
    options = {"alpha": 0.5, "gamma": 0.9, "lam": LAM}
    step = jax.jit(functools.partial(cpl_step, log_prob=log_prob, tx=tx, **options))
    state, found = init_state({"gain": jnp.zeros((4, 2))}, tx), []
    with float32_is_float32("float32"):
        for _ in range(STEPS):
            state, metrics = step(state, pairs)
            found.append([float(metrics[name]) for name in WATCHED])
    return found


def _steps() -> Result:
    found = np.array(steps())
    worst = float(np.abs(found - EXPECTED).max())
    losses = ", ".join(f"{loss:.4f}" for loss in found[:, 0])
    return Result(f"losses {losses}; apart {worst:.1e}", worst <= BAR, bar=f"{BAR:g}", values={"error": worst})


if __name__ == "__main__":
    for numbers in steps():
        print(f"    ({', '.join(f'{number:.8f}' for number in numbers)}),")
