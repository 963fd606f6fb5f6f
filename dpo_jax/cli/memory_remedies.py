"""Suggestions after a device ran out of memory: options that need less, with the values to set."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config
from dpo_jax.cli.config.training import divisors
from dpo_jax.cli.preflight.devices import row_shards
from dpo_jax.runtime.out_of_memory import is_out_of_memory

_HALVED = ("refs.batch", "eval.batch", "frontier.sample_batch")


class OutOfMemory(RuntimeError):
    """A device ran out of memory. The message lists options that need less."""


def out_of_memory(name: str, config: Config, error: BaseException) -> OutOfMemory | None:
    """The error of command `name` with its remedies; None if `error` is another one. First come those with which an unfinished
    run continues."""
    if not is_out_of_memory(error):
        return None
    first = next(iter(str(error).strip().splitlines()), "")
    same, other = [*_of_the_same_run(name, config)], [*_of_another_run(name, config)]
    lines = [f"a device ran out of memory: {first[:300]}"]
    if same:
        lines += ["These options need less memory, and an unfinished run continues with them:", *_aligned(same)]
    if other:
        lines += ["These also need less memory, but start a new run (set another --run.dir):", *_aligned(other)]
    if name in ("sft", "dpo", "refs"):
        lines.append("`dpo-jax plan CONFIG` computes the memory of a training step before it runs.")
    return OutOfMemory("\n".join(lines))


def _of_the_same_run(name: str, config: Config) -> Iterator[tuple[str, str]]:
    section = "sft" if name == "sft" else "dpo"
    training = getattr(config, section)
    if _reads(name, f"{section}.microbatches"):
        now = training.microbatches
        shards = row_shards(config, jax.device_count()) or 1
        fitting = (count for count in divisors(training.batch) if count > now and training.batch % (shards * count) == 0)
        more = next(fitting, None)
        if more is not None:
            yield f"--{section}.microbatches {more}", f"a batch of {training.batch} in {more} parts (now {now})"
    if _reads(name, "model.remat") and config.model.remat != "full":
        yield "--model.remat full", f"activations are computed again in the backward pass (now {config.model.remat})"
    if _reads(name, "run.devices") and config.run.devices != "mesh":
        yield "--run.devices mesh", f"with several devices: each holds a part of the parameters (now {config.run.devices})"
    for option in _HALVED:
        size = getattr(getattr(config, option.partition(".")[0]), option.partition(".")[2])
        if _reads(name, option) and size > 1:
            yield f"--{option.replace('_', '-')} {size // 2}", f"now {size}"


def _of_another_run(name: str, config: Config) -> Iterator[tuple[str, str]]:
    section = "sft" if name == "sft" else "dpo"
    if _reads(name, "run.precision") and config.run.precision != "bfloat16":
        yield "--run.precision bfloat16", f"activations of 2 bytes (now {config.run.precision})"
    training = getattr(config, section)
    if config.lora.rank is not None and config.lora.base_dtype != "bfloat16":
        yield "--lora.base-dtype bfloat16", "frozen parameters of 2 bytes"
    if config.lora.rank is not None or training.trainable is not None:
        return
    if _reads(name, f"{section}.param_dtype") and training.param_dtype != "bfloat16":
        yield f"--{section}.param-dtype bfloat16", "trained parameters of 2 bytes"
    if _reads(name, "lora.rank"):
        yield "--lora.rank 16", "only an adapter is trained, with gradients and optimizer state of its size"


def _reads(name: str, option: str) -> bool:
    reads = COMMANDS[name].reads
    return option in reads or option.partition(".")[0] in reads


def _aligned(options: list[tuple[str, str]]) -> list[str]:
    width = max(len(option) for option, _ in options)
    return [f"  {option:{width}}  {words}" for option, words in options]
