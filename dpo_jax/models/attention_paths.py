"""Choose the attention implementation for a device.

| name | runs on | what it is |
|---|---|---|
| dense | any | all scores at once, (N x L x L) float32 per row: the reference implementation, and for short rows |
| blocks | any | plain XLA, only blocks with visible keys: the default on CPUs |
| chunked | any | plain XLA, a chunk of queries at a time; also used with key/value caches |
| splash | TPU | JAX's Pallas kernel, which skips masked blocks: the default on TPUs |
| flash | GPU | our Pallas kernels, which skip masked blocks, forward and backward: the default on GPUs since Ampere |
| cudnn | GPU | cuDNN's fused kernel with the mask as a bias: it skips no block |

Unsupported combinations raise an error that explains why; no path falls back to another because rows are long. The kernels are
for rows that attend to themselves: with a kernel's name, a pass against a key/value cache (sampling) uses chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import DENSE, AttentionPath
from dpo_jax.models.attention_blocks import PARTIAL, blocked
from dpo_jax.models.attention_chunked import chunked
from dpo_jax.models.config import DecoderConfig

CHUNKED = AttentionPath("chunked", chunked)
BLOCKS = AttentionPath("blocks", blocked, partial=PARTIAL)
AUTOMATIC = {"tpu": "splash", "gpu": "flash", "cpu": "blocks"}
Refusals = Callable[[DecoderConfig, Any], Iterator[str]]


def path_name(asked: str, platform: str) -> str:
    """The path that "auto" stands for on `platform` ("cpu", "gpu", "tpu"); other names are returned unchanged."""
    if asked == "auto" and platform == "gpu" and _is_old_gpu(jax.devices()[0]):
        return CHUNKED.name
    return AUTOMATIC.get(platform, CHUNKED.name) if asked == "auto" else asked


def _is_old_gpu(device: Any) -> bool:
    """Whether it is an NVIDIA GPU before Ampere (such as a T4), for which Triton, and so Pallas, does not compile."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.replace(".", "", 1).isdigit() and float(capability) < 8


def attention_path(asked: str, *, platform: str, config: DecoderConfig, dtype: Any, pieces: int = 1) -> AttentionPath:
    """The path named `asked`, or the default of `platform`. Raises ValueError if a model cannot use it there, with the reason.

    `pieces`: number of pieces into which the mesh will split each row (its context axis).
    """
    name = path_name(asked, platform)
    if name not in PATHS:
        raise ValueError(f"attention {asked!r} is unknown: choose auto, {', '.join(PATHS)}")
    path = PATHS[name]
    if path.platform not in (None, platform):
        raise ValueError(
            f"attention {name} runs on a {path.platform.upper()}, but this is a {platform.upper()}; auto fits here"
        )
    reasons = "; ".join(path.refusals(config, jnp.dtype(dtype)))
    if reasons:
        automatic = AUTOMATIC.get(platform, CHUNKED.name)
        raise ValueError(f"attention {name}: {reasons}; use {CHUNKED.name if name == automatic else automatic}")
    made = path.make()
    if pieces > 1 and made.partial is None:
        raise ValueError(f"attention {name} reads whole rows, but mesh.context splits them in {pieces}: use auto")
    return made


def _none(config: DecoderConfig, dtype: Any) -> Iterator[str]:
    yield from ()


def _cudnn_refusals(config: DecoderConfig, dtype: Any) -> Iterator[str]:
    if config.attention_softcap is not None:
        yield f"it has no soft cap on scores, which {config.family} needs"
    if config.head_size % 8 or config.head_size > 256:
        yield f"it takes heads of at most 256 entries, in multiples of 8, but these have {config.head_size}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        yield f"it computes in bfloat16, not {dtype}: set run.precision"


def _flash_refusals(config: DecoderConfig, dtype: Any) -> Iterator[str]:
    if config.head_size > 256:
        yield f"it takes heads of at most 256 entries, but these have {config.head_size}"
    if dtype == jnp.float64:
        yield "it computes in float32 or less, not float64"


# The kernels, and Pallas with them, are imported only where they run, to keep start-up on a CPU fast.
def _splash() -> AttentionPath:
    from dpo_jax.models.attention_tpu import splash_path

    return splash_path()


def _flash() -> AttentionPath:
    from dpo_jax.models.attention_gpu import flash_path

    return flash_path()


def _cudnn() -> AttentionPath:
    from dpo_jax.models.attention_gpu import cudnn_path

    return cudnn_path()


class _Path(NamedTuple):
    make: Callable[[], AttentionPath]
    platform: str | None = None  # None: any
    refusals: Refusals = _none


PATHS: dict[str, _Path] = {
    "dense": _Path(lambda: DENSE),
    "blocks": _Path(lambda: BLOCKS),
    "chunked": _Path(lambda: CHUNKED),
    "splash": _Path(_splash, "tpu"),
    "flash": _Path(_flash, "gpu", _flash_refusals),
    "cudnn": _Path(_cudnn, "gpu", _cudnn_refusals),
}
