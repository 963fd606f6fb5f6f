"""What all contenders of a race work on: the same model folder, the same pairs in every optimizer step, the same settings.

The PyTorch contenders read this file too, in processes of their own: nothing here may import JAX, which would count as their
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
    module: str  # of dpo_jax.bench; its `run(work, name, *, steps, trace, weights)` does the work
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
"""The other race (`sampling_race`), which is about completing prompts. `run(work)` of each takes a `SamplingWork`."""
OURS = "jax-attention"
"""The last rung of the ladder is the product; the others exist to show what each idea is worth."""
LIBRARIES = {"torch": "matmul-torch", "jax": "matmul-jax"}
MEASUREMENTS = {"matmul-torch": "matmul", "matmul-jax": "matmul", "scaling": "scaling"}
"""What else runs in a process of its own, and its module: `run(work, name)`."""


def library(name: str) -> str:
    """Which library a contender, a sampler or a measurement runs in, and so which Python."""
    return "torch" if "torch" in name or name.startswith("trl") else "jax"


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything a contender is told. It is written to `<folder>/work.json`, beside `model/` and `pairs.npz`."""

    folder: str
    batch: int  # pairs per optimizer step
    steps: int  # timed optimizer steps per round, after one that is not
    gate_steps: int  # after which loss curves and weights are compared, unless `steps` are more
    groups: int  # microbatches of similar length, for contenders that group by length
    torch_microbatches: int  # equal parts into which the other PyTorch contenders divide a batch
    microbatches: int  # the same for ours (except those that group)
    beta: float
    lr: float
    warmup_steps: int
    max_grad_norm: float
    precision: Literal["float32", "bfloat16"]
    remat: str
    layouts: dict[str, dict[str, Any]]  # fields of `data.layout.Layout` per kind
    matmuls: list[tuple[int, int, int]]  # (m, k, n): products that are typical for the model at this batch

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
        """The model with which a contender ends the first round, until it has been compared."""
        return self.all_weights / name

    @property
    def longest_run(self) -> int:
        """Optimizer steps of the first round: it also gives the loss curves and the weights."""
        return max(self.gate_steps, self.steps + 1)


def write_work(work: Work, pairs: Sequence[Encoded]) -> None:
    """`pairs` in the order in which they are trained on: pairs `[s * batch, (s + 1) * batch)` are optimizer step `s`."""
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
    """What both samplers are told: `<folder>/sampling.json`, beside `model/` and `prompts.npz`."""

    folder: str
    new_tokens: int  # of every completion that no token ends
    batches: int  # timed in a round, all of the same prompts, after one that is not
    precision: Literal["float32", "bfloat16"]
    seed: int
    completions: int = 1  # of each prompt
    ends: tuple[int, ...] = ()  # tokens that end a completion, except in the greedy ones that are compared

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    def compiled(self, name: str) -> Path:
        return Path(self.folder) / "compiled" / name


def write_sampling(work: SamplingWork, prompts: np.ndarray, lengths: np.ndarray) -> None:
    """`prompts` int32[B, Lp] end in the last column, `lengths` int32[B]: what `sampling.left_pad` gives."""
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
    """The pairs of one step, by number, in `work.groups` equal parts of similar length, longest first."""
    order = sorted(range(len(pairs)), key=lambda number: -longer_side(pairs[number]))
    size = len(pairs) // work.groups
    return [order[start : start + size] for start in range(0, len(pairs), size)]


LONGEST = 4  # times the mean: of lengths that vary


def spread_lengths(rng: Any, count: int, *, means: Sequence[int], most: Sequence[int] | np.ndarray) -> np.ndarray:
    """Lengths (prompt, chosen, rejected), spread roughly as those of Anthropic HH are: gamma of shape 2. int[count, 3].

    `rng` is any of numpy's generators.
    """
    return np.clip(rng.gamma(2.0, np.array(means) / 2, (count, 3)), 2, most).astype(int)


def random_pairs(count: int, *, lengths: tuple[int, int, int], vocab_size: int, seed: int, vary: bool = False) -> list[Encoded]:
    """Pairs of random tokens of the given (prompt, chosen, rejected) lengths. Completions end in EOS, which is token 0.

    `vary`: the lengths are means of `spread_lengths`, which are at most `LONGEST` times as long.
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
    """Bytes: the largest resident set that this process ever had, interpreter and libraries included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
