"""The literal PyTorch loop: DPO as in appendix B of the paper, on Hugging Face transformers.

As in the original code, the chosen and rejected rows of a batch form one tensor, padded to the longest row of the whole batch,
and all its logits are computed in float32. The reference model runs in every step, unless its log-probabilities are cached.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers

from dpo_jax.bench.work import Work, pairs_of_step, peak_memory, read_pairs
from dpo_jax.data.encode import Encoded
from dpo_jax.writing import naming

IGNORED = -100


class Batch(NamedTuple):
    """All chosen rows, then all rejected rows: [2 x pairs, length] each. `labels` are IGNORED at unscored positions."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def part(self, number: int, parts: int) -> Batch:
        """Microbatch `number`: the same share of the chosen and of the rejected rows, as wide as the whole batch."""
        pairs = len(self.ids) // 2
        size = pairs // parts
        rows = torch.arange(number * size, (number + 1) * size)
        return Batch(*(x[torch.cat([rows, pairs + rows])] for x in self))


def run(work: Work, name: str, *, steps: int, trace: str | None, weights: Path | None) -> dict[str, Any]:
    """Takes `steps` optimizer steps. Returns losses, gradient norms before clipping, times, log-probabilities of the first
    batch, and their cost. After all measurements it saves the policy to the model folder `weights`, if given.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = read_pairs(work)
    batches = [collate(pairs_of_step(work, pairs, step), device) for step in range(steps)]
    policy = load(work, device)
    reference = load(work, device) if name == "torch-live" else None
    optimizer, schedule = make_optimizer(work, policy)
    scorer = policy if reference is None else reference
    cached, reference_seconds = [], []
    for batch in batches if reference is None else batches[:1]:
        start = time.perf_counter()
        cached.append(reference_logps(work, scorer, batch))
        reference_seconds.append(_clock(device) - start)

    losses, norms, seconds, first_step_at = [], [], [], 0.0
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        ref_logps = reference_logps(work, reference, batch) if reference is not None else cached[step]
        total = torch.zeros((), device=device)
        for number in range(work.torch_microbatches):
            part = batch.part(number, work.torch_microbatches)
            refs = ref_logps.view(2, work.torch_microbatches, -1)[:, number].reshape(-1)
            with autocast(work, device):
                loss = dpo_loss(sequence_logps(policy, part), refs, beta=work.beta) / work.torch_microbatches
            loss.backward()
            total += loss.detach()
        paused = _clock(device)
        norms.append(gradient_norm(policy))
        start += _clock(device) - paused
        torch.nn.utils.clip_grad_norm_(policy.parameters(), work.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(_clock(device) - start)
        losses.append(total.item())
        first_step_at = first_step_at or time.time()
    timed = batches[1 : work.steps + 1]
    described = describe(device)
    if weights is not None:
        save(policy, weights)
    return {
        "losses": losses,
        "grad_norms": norms,
        "step_seconds": seconds,
        "first_step_at": first_step_at,
        "first_logps": cached[0].view(2, -1).T.tolist(),
        "reference_seconds": reference_seconds if reference is None else None,
        "positions": sum(batch.ids.numel() for batch in timed),
        "real_positions": sum(int(batch.mask.sum()) for batch in timed),
        **described,
    }


def load(work: Work, device: str, **options: Any) -> Any:
    """The model in evaluation mode, which only turns dropout off: gradients still flow."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, **options)
    # nn.Embedding drops the gradient of token `pad_token_id`, even where it is not padding: chat models end turns with it.
    model.get_input_embeddings().padding_idx = None
    return model.to(device).eval()


def gradient_norm(model: Any) -> float:
    """Global L2 norm of the gradients, for the comparison. PyTorch's own is a running float32 sum on a CPU: for an embedding of
    28 million entries it is 1.6e-3 too small. Small pieces also need little memory beside the gradients."""
    pieces = (piece for p in model.parameters() if p.grad is not None for piece in p.grad.flatten().split(1 << 20))
    return math.sqrt(sum(piece.double().square().sum().item() for piece in pieces))


def save(model: Any, folder: Path) -> None:
    with naming(folder):
        model.save_pretrained(folder)


def make_optimizer(work: Work, model: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The original code's optimizer: RMSprop with torch's defaults, and linear warm-up."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=work.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (work.warmup_steps + 1)))
    return optimizer, schedule


def autocast(work: Work, device: str) -> Any:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=work.precision == "bfloat16")


def collate(pairs: Sequence[Encoded], device: str) -> Batch:
    """`concatenated_inputs` of the original: every row as long as the longest of the batch, padded on the right."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, : len(prompt)] = torch.from_numpy(prompt)
        ids[row, len(prompt) : end] = torch.from_numpy(completion)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        mask[row, :end] = 1
    return Batch(*(x.to(device) for x in (ids, mask, labels)))


def sequence_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Summed log-probability of each row's completion: float32[rows]. `_get_batch_logps` of the original."""
    logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    scored = labels != IGNORED
    # The original's log_softmax, computed more exactly. Where one logit dominates, PyTorch's own loses up to 2e-5 nats a token
    # on a CPU, always to one side: on SmolLM2 6e-6 of a log-probability, 7e-5 of the gradient and 1.4e-3 of RMSprop's first
    # step.
    picked = logits.gather(2, labels.masked_fill(~scored, 0).unsqueeze(2)).squeeze(2) - logits.logsumexp(-1)
    return (picked * scored).sum(-1)


def reference_logps(work: Work, model: Any, batch: Batch) -> torch.Tensor:
    """`sequence_logps` without gradient, microbatch by microbatch."""
    parts = []
    with torch.no_grad(), autocast(work, batch.ids.device.type):
        for number in range(work.torch_microbatches):
            part = sequence_logps(model, batch.part(number, work.torch_microbatches))
            parts.append(part.view(2, -1))
    return torch.cat(parts, dim=1).reshape(-1)


def dpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Appendix B of Rafailov et al. 2023, mean over pairs."""
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    return -F.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def describe(device: str) -> dict[str, Any]:
    """Peak memory (of the process on a CPU, of the device on a GPU), device, threads and versions."""
    gpu = device == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else peak_memory(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
