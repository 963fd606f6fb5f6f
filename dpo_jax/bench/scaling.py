"""Scaling of our step time with batch size and row length, as fitted exponents."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.bench.flops import step_flops
from dpo_jax.bench.ladder import Compiled
from dpo_jax.bench.work import Work, random_pairs
from dpo_jax.data.loader import make_batch, plan_layout
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.hf import load_hf
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.step import init_state

FACTORS = (1, 2, 4, 8)
TIMED = 3  # steps per point, after a warm-up step


def run(work: Work, name: str, *, factors: Sequence[int] = FACTORS) -> dict[str, Any]:
    """Points of two sweeps over random pairs: over multiples of a quarter of the batch, and over multiples of an eighth of the
    longest text. Half of a text's tokens are its prompt, a quarter each its completions.
    """
    model, variables = load_hf(work.model, dtype=jnp.dtype(work.precision), remat=work.remat)
    tx = make_optimizer(linear_warmup(work.lr, warmup_steps=work.warmup_steps), max_grad_norm=work.max_grad_norm)
    loss = functools.partial(dpo_loss, beta=work.beta)
    step = Compiled(functools.partial(dpo_step, model=model, tx=tx, loss=loss), donate=(0,))
    batch, eighth = max(1, work.batch // 4), model.config.max_positions // max(FACTORS)

    def point(pairs_per_step: int, length: int) -> dict[str, float]:
        lengths = (length // 2, length // 4, length // 4)
        pairs = random_pairs(pairs_per_step, lengths=lengths, vocab_size=model.config.vocab_size, seed=0)
        layout = plan_layout(pairs, kind="packed", batch=pairs_per_step)
        refs = np.zeros((pairs_per_step, 2), np.float32)
        rows = make_batch(pairs, np.arange(pairs_per_step), layout=layout, batch=pairs_per_step, ref_logps=refs).rows
        state, seconds = init_state(jax.tree.map(jnp.copy, variables), tx), []
        step.prepare(state, rows)
        for _ in range(1 + TIMED):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, rows))
            seconds.append(time.perf_counter() - start)
        flops = step_flops(model.config, *(np.full(pairs_per_step, n) for n in lengths)).sum()
        return {
            "pairs": pairs_per_step,
            "tokens": pairs_per_step * sum(lengths),
            "row_length": layout.length,
            "flops": float(flops),
            "seconds": statistics.median(seconds[1:]),
        }

    return {
        "batch": [point(batch * factor, eighth * max(FACTORS) // 2) for factor in factors],
        "length": [point(batch, eighth * factor) for factor in factors],
    }


def exponents(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Exponents x of time = constant * tokens^x, fitted to the points, and of FLOPs: the growth due to attention alone."""
    tokens, seconds, flops = (np.log([point[key] for point in points]) for key in ("tokens", "seconds", "flops"))
    return {"seconds": float(np.polyfit(tokens, seconds, 1)[0]), "flops": float(np.polyfit(tokens, flops, 1)[0])}
