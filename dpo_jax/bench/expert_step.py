"""Times a DPO step of a toy mixture of experts against a dense model of equal FLOPs: `python -m dpo_jax.bench.expert_step`.

The MLP of the dense model (Llama) is as wide as all experts of one token together. FLOPs come from `models.flops`, which counts
neither routing nor padding. The two models take turns; the fastest step of each counts, by wall clock and by processor time.
On a machine that others use, processor time is the one to trust.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import shared_rows
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.flops import pair_flops
from dpo_jax.runtime.optim import make_optimizer
from dpo_jax.step import init_state

MIXTURES = {"8 experts, 2 taken": (8, 2), "32 experts, 4 taken": (32, 4)}
WIDTH, LAYERS, HEADS, EXPERT, VOCABULARY = 256, 4, 4, 256, 1024
PAIRS, PROMPT, COMPLETION = 16, 64, 64
ROUNDS = 15


class Rate(NamedTuple):
    """FLOP/s of the fastest step."""

    by_clock: float
    by_processor: float


def main() -> int:
    print(f"width {WIDTH}, {LAYERS} layers, experts of {EXPERT}, {PAIRS} pairs of {PROMPT} + 2 x {COMPLETION} tokens, float32")
    for name, (experts, taken) in MIXTURES.items():
        mixture, dense = rates(_config(experts, taken), _config(0, taken))
        print(
            f"{name}: {mixture.by_clock / dense.by_clock:.2f} of a dense model's FLOP/s by the clock, "
            f"{mixture.by_processor / dense.by_processor:.2f} by processor time "
            f"(the dense one: {dense.by_clock / 1e9:.1f} and {dense.by_processor / 1e9:.1f} GFLOP/s)",
            flush=True,
        )
    return 0


def rates(*configs: DecoderConfig) -> list[Rate]:
    """FLOP/s of a step of each model. The models take turns."""
    steps, flops = [_stepper(config) for config in configs], [_flops(config) for config in configs]
    least = np.full((len(configs), 2), np.inf)
    for _ in range(ROUNDS):
        for number, step in enumerate(steps):
            clock, processor = time.perf_counter(), time.process_time()
            step()
            took = time.perf_counter() - clock, time.process_time() - processor
            least[number] = np.minimum(least[number], took)
    return [Rate(*(count / seconds for seconds in its)) for count, its in zip(flops, least.tolist(), strict=True)]


def _config(experts: int, taken: int) -> DecoderConfig:
    family, mlp = ("mixtral", EXPERT) if experts else ("llama", EXPERT * taken)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": mlp}
    settings = hf_config(family, **sizes, max_positions=512, eos_token_id=0)
    return decoder_config(settings | ({"num_local_experts": experts, "num_experts_per_tok": taken} if experts else {}))


def _flops(config: DecoderConfig) -> float:
    return PAIRS * pair_flops(config, prompt=PROMPT, chosen=COMPLETION, rejected=COMPLETION).training


def _stepper(config: DecoderConfig) -> Callable[[], Any]:
    """Returns a function that takes one compiled step on random tokens and waits for it. The state stays on the device."""
    model, tx, rng = make_model(config), make_optimizer(1e-6), np.random.default_rng(0)
    texts = [rng.integers(1, VOCABULARY, PROMPT + 2 * COMPLETION).astype(np.int32) for _ in range(PAIRS)]
    pairs = [Encoded(*np.split(text, [PROMPT, PROMPT + COMPLETION]), uid=str(n)) for n, text in enumerate(texts)]
    rows = shared_rows(pairs, length=PROMPT + 2 * COMPLETION, ref_logps=np.zeros((PAIRS, 2), np.float32))
    loss = functools.partial(dpo_loss, beta=0.1)
    step = jax.jit(functools.partial(dpo_step, model=model, tx=tx, loss=loss), donate_argnums=0)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), tx)

    def take() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, rows))

    take()
    return take


if __name__ == "__main__":
    sys.exit(main())
