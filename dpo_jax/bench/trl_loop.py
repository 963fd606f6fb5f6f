"""TRL's DPOTrainer on the frozen pairs: with its defaults, and at its best.

We change only what the comparison needs: token ids instead of texts, the frozen order, the optimizer, and clocks. Speed
settings are TRL's defaults (`trl`), or the best we know of (`trl-best`): reference log-probabilities precomputed, batches
divided into microbatches of similar length, no recomputation of activations, and the fastest attention installed. TRL's
`padding_free` only warns and does nothing since TRL 1.0; its fused head is always on (on a CPU it scores every position).
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

from dpo_jax.bench.torch_loop import describe, gradient_norm, load, make_optimizer, save
from dpo_jax.bench.work import Work, by_length, pairs_of_step, read_pairs


class Trainer(trl.DPOTrainer):
    """DPOTrainer on token ids that records microbatch losses, gradient norms and the time of the reference pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[float] = []
        self.paused: list[float] = []  # seconds of each step that our measurement took
        self.reference_seconds: float | None = None
        super().__init__(*args, **kwargs)
        clip = self.accelerator.clip_grad_norm_

        def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the backward pass is not ours
            start = time.perf_counter()
            self.norms.append(gradient_norm(self.model))
            self.paused.append(time.perf_counter() - start)
            return clip(*args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_and_keep

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # the original would tokenize

    def _precompute_ref_logps(self, *args: Any) -> Any:
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds = time.perf_counter() - start
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Collator:
    """TRL's own collator, with a count of positions."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.sizes: list[tuple[int, int]] = []  # (positions, those without padding) of each microbatch

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.inner(examples)
        self.sizes.append((batch["input_ids"].numel(), int(batch["attention_mask"].sum())))
        return batch


class Clock(transformers.TrainerCallback):
    """Records the time at which each optimizer step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.first_step_at = 0.0

    def tick(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()
        self.first_step_at = self.first_step_at or time.time()

    on_train_begin = tick


def run(work: Work, name: str, *, steps: int, trace: str | None, weights: Path | None) -> dict[str, Any]:
    """As `torch_loop.run`."""
    best = name == "trl-best"
    parts = work.groups if best else work.torch_microbatches
    pairs, order, place = read_pairs(work), [], []
    for step in range(steps):
        batch = pairs_of_step(work, pairs, step)
        numbers = [n for group in by_length(work, batch) for n in group] if best else list(range(len(batch)))
        order += [batch[number] for number in numbers]
        place.append(numbers)
    rows = [{f"{side}_ids": getattr(pair, side).tolist() for side in ("prompt", "chosen", "rejected")} for pair in order]
    model = load(work, "cpu", **({"attn_implementation": best_attention()} if best else {}))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=settings(work, folder, steps=steps, parts=parts, best=best),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(model.config.vocab_size),
            optimizers=make_optimizer(work, model),
            callbacks=[clock],
        )
        first = _first_logps(trainer, place[0], work.batch // parts)
        trainer.data_collator = collator = Collator(trainer.data_collator)
        trainer.train()
    # The loader may have fetched a microbatch beyond the last step.
    timed = collator.sizes[parts : (work.steps + 1) * parts]
    losses = torch.stack(trainer.losses).reshape(steps, parts).mean(dim=1).tolist()
    reference = trainer.reference_seconds
    described = describe("cuda" if torch.cuda.is_available() else "cpu")
    described["versions"] |= {"trl": trl.__version__}
    if weights is not None:
        save(trainer.accelerator.unwrap_model(trainer.model), weights)
    return {
        "losses": losses,
        "grad_norms": trainer.norms,
        "step_seconds": [
            late - early - paused for early, late, paused in zip(clock.times, clock.times[1:], trainer.paused, strict=False)
        ],
        "first_step_at": clock.first_step_at,
        "first_logps": first,
        "reference_seconds": None if reference is None else [reference / steps] * steps,
        "positions": sum(positions for positions, _ in timed),
        "real_positions": sum(real for _, real in timed),
        "attention": model.config._attn_implementation,
        **described,
    }


def settings(work: Work, folder: str, *, steps: int, parts: int, best: bool) -> trl.DPOConfig:
    speed: dict[str, Any] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if best else {}
    return trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.batch // parts,
        gradient_accumulation_steps=parts,
        max_steps=steps,
        train_sampling_strategy="sequential",  # the pairs are in their frozen order
        max_length=None,  # they are truncated already
        beta=work.beta,
        max_grad_norm=work.max_grad_norm,
        bf16=work.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # without a GPU, bf16 is refused unless the CPU is requested
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **speed,
    )


def best_attention() -> str:
    """FlashAttention if it is installed, else PyTorch's own fused attention."""
    if torch.cuda.is_available():
        for package, choice in (("flash_attn_interface", "flash_attention_3"), ("flash_attn", "flash_attention_2")):
            if importlib.util.find_spec(package) is not None:
                return choice
    return "sdpa"


def _first_logps(trainer: Trainer, place: list[int], size: int) -> list[list[float]]:
    """Log-probabilities of the first optimizer step's pairs under the trainer's policy, in their frozen order."""
    found: list[list[float]] = [[]] * len(place)
    dataset, collate = trainer.train_dataset, trainer.data_collator
    for start in range(0, len(place), size):
        batch = trainer._prepare_inputs(collate([dataset[n] for n in range(start, start + size)]))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        for number, pair in zip(place[start : start + size], zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True):
            found[number] = list(pair)
    return found


def _tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer, which the trainer requires if only to pad with its EOS, token 0."""
    words = {f"<{number}>": number for number in range(vocab_size)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), eos_token="<0>", pad_token="<0>"
    )
