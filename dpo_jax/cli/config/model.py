"""Options of the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, positive

Family = Literal[
    "gpt2",
    "gptj",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "phi3",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The language model. Without a path, the sizes define a new model; with a path, the model is checked against them."""

    path: str | None = None
    """Hugging Face folder with .safetensors, or Hub id such as EleutherAI/pythia-2.8b; none: new random weights."""
    family: Family | None = None
    """Architecture, by its Hugging Face name."""
    width: int | None = None
    """Hidden size (width of the residual stream)."""
    layers: int | None = None
    """Number of transformer layers."""
    heads: int | None = None
    """Number of attention heads."""
    kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); none: the family's default."""
    head_size: int | None = None
    """Size of one attention head; none: width / heads."""
    mlp_width: int | None = None
    """Hidden size of the feed-forward layers; none: the family's default."""
    max_positions: int | None = None
    """Longest sequence the model can read, in tokens."""
    tie: bool | None = None
    """Tie the output head to the input embeddings; none: the family's default."""
    vocab_size: int | None = None
    """Rows of the embedding table; none: the size of the tokenizer's vocabulary."""
    remat: Literal["none", "save_attention", "full"] = "none"
    """What the backward pass recomputes: no matrix product (none), all but attention (save_attention), or whole layers
    (full; a third more time)."""
    attention: Literal["auto", "dense", "blocks", "chunked", "splash", "flash", "cudnn"] = "auto"
    """Attention implementation. auto: splash on TPUs, flash on GPUs, blocks on CPUs."""

    def check(self) -> Iterator[Problem]:
        sizes = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions", "vocab_size")
        yield from positive(self, *sizes)
        if self.width and self.heads and not self.head_size and self.width % self.heads:
            yield "heads", f"must divide width ({self.width}) unless head_size is given, got {self.heads}"
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            yield "kv_heads", f"must divide heads ({self.heads}), got {self.kv_heads}"

    def missing(self) -> Iterator[Problem]:
        for field in ("family", "width", "layers", "heads", "max_positions"):
            if self.path is None and getattr(self, field) is None:
                yield field, f"a new model needs it: set model.{field}, or model.path to start from an existing model"
