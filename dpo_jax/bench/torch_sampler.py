"""`transformers.generate` in the sampling race: the fastest attention and cache on this machine, not compiled."""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from dpo_jax.bench.torch_loop import describe
from dpo_jax.bench.work import SamplingWork, read_prompts

VARIANTS = ("sdpa", "sdpa static", "eager")  # attention, and the cache if it is not the default, growing one


def run(work: SamplingWork) -> dict[str, Any]:
    """As `our_sampler.run`, but nothing is compiled, and there is one greedy completion of each prompt. For the gate it also
    returns the second likeliest token of each greedy step, `runner_up` [B][T], and how far its logit is below that of the
    token taken, `gap` [B][T]. `variant` is the attention and the cache: each is tried on one batch, and the fastest is used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(work.seed)
    models: dict[str, Any] = {}
    for attention in ("sdpa", "eager"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            work.model, dtype=getattr(torch, work.precision), attn_implementation=attention
        )
        models[attention] = model.to(device).eval()
        models[attention].generation_config.eos_token_id = None  # completions have full length, unless `work.ends` ends them
    prompts, lengths = (torch.from_numpy(array).to(device) for array in read_prompts(work))
    columns = torch.arange(prompts.shape[1], device=device)
    inputs = {"inputs": prompts.long(), "attention_mask": (columns >= prompts.shape[1] - lengths[:, None]).long()}

    def generate(variant: str, **options: Any) -> Any:
        attention, _, cache = variant.partition(" ")
        options |= {"cache_implementation": "static", "disable_compile": True} if cache else {}
        return models[attention].generate(**inputs, max_new_tokens=work.new_tokens, pad_token_id=0, **options)

    def timed(variant: str) -> tuple[float, int]:
        start = time.perf_counter()
        sequences = generate(variant, **sampling)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, int(drawn(sequences[:, prompts.shape[1] :], work.ends).sum())

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": work.completions}
    sampling |= {"eos_token_id": list(work.ends)} if work.ends else {}
    with_logits = {"output_logits": True, "return_dict_in_generate": True}
    first_seconds, _ = timed(VARIANTS[0])
    variant = min(VARIANTS, key=lambda variant: timed(variant)[0])
    batches = [timed(variant) for _ in range(work.batches)]
    measured = describe(device)  # before the gates, which keep all logits
    greedy = generate(variant, do_sample=False, **with_logits)
    best = [logits.topk(2) for logits in greedy.logits]
    nats = mean_logps(generate(variant, **sampling, **with_logits), prompts.shape[1], work.ends)
    return {
        "variant": variant,
        "greedy": greedy.sequences[:, prompts.shape[1] :].tolist(),
        "runner_up": torch.stack([step.indices[:, 1] for step in best], dim=1).tolist(),
        "gap": torch.stack([step.values[:, 0] - step.values[:, 1] for step in best], dim=1).tolist(),
        "nats": nats.tolist(),
        "batch_seconds": [seconds for seconds, _ in batches],
        "batch_tokens": [tokens for _, tokens in batches],
        "first_seconds": first_seconds,
        **measured,
    }


def drawn(tokens: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """bool[B, T]: which tokens were drawn, including the one that ended the row."""
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return ended.cumsum(1) - ended.long() == 0


def mean_logps(output: Any, prompt: int, ends: Sequence[int]) -> torch.Tensor:
    """Mean log-probability of the tokens drawn in each row: float32[B], in nats."""
    tokens = output.sequences[:, prompt:]
    counted = drawn(tokens, ends)
    total = torch.zeros(len(tokens), device=tokens.device)
    for step, logits in enumerate(output.logits):
        logps = logits.float().log_softmax(-1).gather(1, tokens[:, step : step + 1])[:, 0]
        total += torch.where(counted[:, step], logps, 0)
    return total / counted.sum(1)
