"""Our contender in the sampling race."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.bench.ladder import Compiled, describe
from dpo_jax.bench.work import SamplingWork, read_prompts
from dpo_jax.models.hf import load_hf
from dpo_jax.sampling import generate

SHARES = (1, 2, 4)  # all, half or a quarter of the completions are drawn at a time
NEVER = -1  # no token has this id, so none ends a completion


def run(work: SamplingWork) -> dict[str, Any]:
    """Completes the prompts greedily (for the gate), and `1 + work.batches` times by sampling. Returns

    `greedy` [B * K][T] token ids, `nats` [B * K] mean log-probability of the tokens sampled in each row, `batch_seconds` of the
    timed batches, `batch_tokens` drawn in each, `first_seconds` of the batch before them, `compile_seconds` of sampling,
    `variant` (how many completions at a time were the fastest in one batch), and the fields of `ladder.describe`.
    """
    jax.config.update("jax_compilation_cache_dir", str(work.compiled("jax-generate").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    dtype = jnp.dtype(work.precision)
    model, variables = load_hf(work.model, dtype=dtype, param_dtype=dtype)
    prompts, lengths = (jnp.asarray(array) for array in read_prompts(work))
    options = {"max_new_tokens": work.new_tokens, "completions": work.completions}
    every = len(prompts) * work.completions
    key = jax.random.key(work.seed)
    best = functools.partial(generate, model, **options, eos_id=NEVER, temperature=0.0)
    greedy = Compiled(best)(variables, prompts, lengths, key)
    samplers = {}
    for share in SHARES if work.ends else SHARES[:1]:  # without early ends no completion frees its lane before the others
        lanes = max(1, every // share)
        samplers[lanes] = Compiled(functools.partial(generate, model, **options, eos_id=work.ends or NEVER, lanes=lanes))
        samplers[lanes].prepare(variables, prompts, lengths, key)
    lanes = min(samplers, key=lambda lanes: _seconds(samplers[lanes], variables, prompts, lengths, key))
    sampler, seconds, drawn = samplers[lanes], [], []
    for number in range(1 + work.batches):
        batch_key = jax.random.fold_in(key, number)
        start = time.perf_counter()
        samples = jax.block_until_ready(sampler(variables, prompts, lengths, batch_key))
        seconds.append(time.perf_counter() - start)
        drawn.append(int(samples.lengths.sum()))
    return {
        "greedy": np.asarray(greedy.tokens).tolist(),
        "nats": (np.asarray(samples.logps) / np.asarray(samples.lengths)).tolist(),
        "batch_seconds": seconds[1:],
        "batch_tokens": drawn[1:],
        "variant": f"{lanes} lanes",
        "first_seconds": seconds[0],
        "compile_seconds": sampler.seconds,
        **describe(),
    }


def _seconds(sampler: Compiled, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(sampler(*arguments))
    return time.perf_counter() - start
