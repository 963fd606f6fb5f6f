"""Shared input of all contenders of a race: model folder, pairs of every optimizer step, settings.

The PyTorch contenders import this module too, in their own processes. It must not import JAX, which would count as their
memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.writing import write_text

SIDES = ("prompt", "chosen", "rejected")


class Contender(NamedTuple):
    module: str  # of dpo_jax.bench, with `run(work, name, *, steps, trace, weights)`
    what: str


CONTENDERS = {
    "torch-live": Contender("torch_loop", "literal PyTorch loop, live reference, batch padded to its longest row"),
    "torch-cached": Contender("torch_loop", "the same with cached reference log-probabilities"),
    "trl": Contender("trl_loop", "TRL DPOTrainer as it comes"),
    "trl-best": Contender("trl_loop", "TRL at its best: cached reference, length-grouped, no recomputation"),
    "jax-live": Contender("ladder", "literal JAX step, live reference, rows as long as the longest of the data"),
    "jax-cached": Contender("ladder", "+ cached reference log-probabilities"),
    "jax-buckets": Contender("ladder", "+ microbatches of similar length"),
    "jax-shared": Contender("ladder", "+ the prompt read once for both completions"),
    "jax-packed": Contender("ladder", "+ whole pairs packed into rows"),
    "jax-head": Contender("ladder", "+ output head for completions only"),
    "jax-attention": Contender("ladder", "+ the attention of this platform: what `dpo-jax dpo` runs"),
}
SAMPLERS = {
    "torch-generate": Contender(
        "torch_sampler", "transformers.generate with the attention and the cache that are fastest here"
    ),
    "jax-generate": Contender("our_sampler", "dpo_jax.sampling.generate: what `dpo-jax sample` runs"),
}
"""Contenders of the sampling race (`sampling_race`). `run(work)` of each takes a `SamplingWork`."""
OURS = "jax-attention"
"""The last rung of the ladder is the product; the others show the gain of each optimization."""
LIBRARIES = {"torch": "matmul-torch", "jax": "matmul-jax"}
MEASUREMENTS = {"matmul-torch": "matmul", "matmul-jax": "matmul", "scaling": "scaling"}
"""Other measurements that run in their own process, and their modules: `run(work, name)`."""


def library(name: str) -> str:
    """The library that a contender, sampler or measurement runs in; it decides the Python interpreter."""
    return "torch" if "torch" in name or name.startswith("trl") else "jax"


@dataclasses.dataclass(frozen=True)
class Work:
    """All settings of a contender, written to `<folder>/work.json` beside `model/` and `pairs.npz`."""

    folder: str
    batch: int  # pairs per optimizer step
    steps: int  # timed optimizer steps per round, after an untimed one
    gate_steps: int  # steps after which loss curves and weights are compared, or `steps` if larger
    groups: int  # microbatches of similar length, for contenders that group by length
    torch_microbatches: int  # equal parts of a batch, for the other PyTorch contenders
    microbatches: int  # equal parts of a batch, for ours (except those that group)
    beta: float
    lr: float
    warmup_steps: int
    max_grad_norm: float
    precision: Literal["float32", "bfloat16"]
    remat: str
    layouts: dict[str, dict[str, Any]]  # fields of `data.layout.Layout` per kind
    matmuls: list[tuple[int, int, int]]  # (m, k, n) of matrix products typical of the model at this batch size

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    def compiled(self, name: str) -> Path:
        """The compilation cache of a contender."""
        return Path(self.folder) / "compiled" / name

    @property
    def all_weights(self) -> Path:
        return Path(self.folder) / "weights"

    def weights(self, name: str) -> Path:
        """Folder of a contender's model after the first round, kept until it has been compared."""
        return self.all_weights / name

    @property
    def longest_run(self) -> int:
        """Optimizer steps of the first round, which also gives the loss curves and the weights."""
        return max(self.gate_steps, self.steps + 1)


def write_work(work: Work, pairs: Sequence[Encoded]) -> None:
    """Writes work and `pairs`, in training order: pairs `[s * batch, (s + 1) * batch)` are optimizer step `s`."""
    arrays = {}
    for side in SIDES:
        ids = [getattr(pair, side) for pair in pairs]
        arrays[side] = np.concatenate(ids)
        arrays[f"{side}_length"] = np.array([len(i) for i in ids], np.int64)
    np.savez(Path(work.folder) / "pairs.npz", **arrays)
    write_text(Path(work.folder) / "work.json", json.dumps(dataclasses.asdict(work), indent=2))


def read_work(folder: str | Path) -> Work:
    fields = json.loads((Path(folder) / "work.json").read_text())
    layouts = {
        kind: {name: tuple(value) if isinstance(value, list) else value for name, value in layout.items()}
        for kind, layout in fields["layouts"].items()
    }
    return Work(**fields | {"matmuls": [tuple(shape) for shape in fields["matmuls"]], "layouts": layouts})


@dataclasses.dataclass(frozen=True)
class SamplingWork:
    """All settings of both samplers, written to `<folder>/sampling.json` beside `model/` and `prompts.npz`."""

    folder: str
    new_tokens: int  # of every completion without an end token
    batches: int  # timed batches in a round, all of the same prompts, after an untimed one
    precision: Literal["float32", "bfloat16"]
    seed: int
    completions: int = 1  # of each prompt
    ends: tuple[int, ...] = ()  # tokens that end a completion; ignored by the greedy ones of the gate

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    def compiled(self, name: str) -> Path:
        return Path(self.folder) / "compiled" / name


def write_sampling(work: SamplingWork, prompts: np.ndarray, lengths: np.ndarray) -> None:
    """Writes work and prompts: `prompts` int32[B, Lp], left-padded (`sampling.left_pad`), and `lengths` int32[B]."""
    np.savez(Path(work.folder) / "prompts.npz", prompts=prompts, lengths=lengths)
    write_text(Path(work.folder) / "sampling.json", json.dumps(dataclasses.asdict(work), indent=2))


def read_sampling(folder: str | Path) -> SamplingWork:
    fields = json.loads((Path(folder) / "sampling.json").read_text())
    return SamplingWork(**fields | {"ends": tuple(fields["ends"])})


def read_prompts(work: SamplingWork) -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(work.folder) / "prompts.npz") as file:
        return file["prompts"], file["lengths"]


def read_pairs(work: Work) -> list[Encoded]:
    with np.load(Path(work.folder) / "pairs.npz") as file:
        sides = [np.split(file[side], np.cumsum(file[f"{side}_length"])[:-1]) for side in SIDES]
    return [Encoded(*ids, uid=f"pair {number}") for number, ids in enumerate(zip(*sides, strict=True))]


def pairs_of_step(work: Work, pairs: Sequence[Encoded], step: int) -> Sequence[Encoded]:
    return pairs[step * work.batch : (step + 1) * work.batch]


def longer_side(pair: Encoded) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def by_length(work: Work, pairs: Sequence[Encoded]) -> list[list[int]]:
    """Numbers of the pairs of one step, in `work.groups` equal parts of similar length, longest first."""
    order = sorted(range(len(pairs)), key=lambda number: -longer_side(pairs[number]))
    size = len(pairs) // work.groups
    return [order[start : start + size] for start in range(0, len(pairs), size)]


LONGEST = 4  # times the mean: the limit of varying lengths


def spread_lengths(rng: Any, count: int, *, means: Sequence[int], most: Sequence[int] | np.ndarray) -> np.ndarray:
    """Lengths (prompt, chosen, rejected) spread roughly like those of Anthropic HH: gamma of shape 2. int[count, 3].

    `rng` is any numpy generator.
    """
    return np.clip(rng.gamma(2.0, np.array(means) / 2, (count, 3)), 2, most).astype(int)


def random_pairs(count: int, *, lengths: tuple[int, int, int], vocab_size: int, seed: int, vary: bool = False) -> list[Encoded]:
    """Pairs of random tokens of the given (prompt, chosen, rejected) lengths. Completions end in EOS, which is token 0.

    `vary`: the given lengths are means for `spread_lengths`, limited to `LONGEST` times the mean.
    """
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(1, vocab_size, length).astype(np.int32)

    def completion(length: int) -> np.ndarray:
        return np.append(tokens(length - 1), np.int32(0))

    means = np.array(lengths)
    sizes = spread_lengths(rng, count, means=lengths, most=LONGEST * means) if vary else np.tile(means, (count, 1))
    return [
        Encoded(tokens(prompt), completion(chosen), completion(rejected), uid=f"random {i}")
        for i, (prompt, chosen, rejected) in enumerate(sizes.tolist())
    ]


def peak_memory() -> int:
    """Peak resident set of this process in bytes, interpreter and libraries included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
