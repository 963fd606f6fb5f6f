"""`transformers.generate` in the race of samplers, as it comes: its own cache, its own attention, no compilation."""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from dpo_jax.bench.torch_loop import describe
from dpo_jax.bench.work import SamplingWork, read_prompts


def run(work: SamplingWork) -> dict[str, Any]:
    """As `our_sampler.run`; nothing is compiled. For the gate also the second likeliest token of each greedy step, `runner_up`
    [B][T], and how far its logit is below that of the token taken, `gap` [B][T].
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(work.seed)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.precision))
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # all completions are as long as asked
    prompts, lengths = (torch.from_numpy(array).to(device) for array in read_prompts(work))
    columns = torch.arange(prompts.shape[1], device=device)
    inputs = {"inputs": prompts.long(), "attention_mask": (columns >= prompts.shape[1] - lengths[:, None]).long()}

    def generate(**options: Any) -> Any:
        return model.generate(**inputs, max_new_tokens=work.new_tokens, pad_token_id=0, **options)

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with_logits = {"output_logits": True, "return_dict_in_generate": True}
    seconds = []
    for _ in range(1 + work.batches):
        start = time.perf_counter()
        generate(**sampling)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    measured = describe(device)  # before the gates, which keep all logits
    greedy = generate(do_sample=False, **with_logits)
    best = [logits.topk(2) for logits in greedy.logits]
    nats = mean_logps(generate(**sampling, **with_logits), prompts.shape[1])
    return {
        "greedy": greedy.sequences[:, prompts.shape[1] :].tolist(),
        "runner_up": torch.stack([step.indices[:, 1] for step in best], dim=1).tolist(),
        "gap": torch.stack([step.values[:, 0] - step.values[:, 1] for step in best], dim=1).tolist(),
        "nats": nats.tolist(),
        "batch_seconds": seconds[1:],
        "first_seconds": seconds[0],
        **measured,
    }


def mean_logps(output: Any, prompt: int) -> torch.Tensor:
    """Mean log-probability of the new tokens of each row: float32[B], in nats."""
    tokens = output.sequences[:, prompt:]
    total = torch.zeros(len(tokens), device=tokens.device)
    for step, logits in enumerate(output.logits):
        total += logits.float().log_softmax(-1).gather(1, tokens[:, step : step + 1])[:, 0]
    return total / tokens.shape[1]
