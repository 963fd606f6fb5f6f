"""Options of every run: where it lives, on which devices it runs, what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, not_negative, positive


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run lives, on what it runs, and what it writes."""

    dir: str = "runs/default"
    """Run directory. Every command has a folder of its own in it, and continues what it finds there."""
    seed: int = 0
    """Seed of everything random: new weights, order of the examples, samples."""
    devices: Literal["single", "pmap", "mesh"] = "single"
    """One device; all devices with the batch split among them (pmap); or all devices as the section mesh lays them out."""
    distributed: Literal["off", "auto"] = "off"
    """auto joins the processes of a TPU pod, SLURM or Kubernetes job, or those of the next three (short: --distributed)."""
    coordinator: str | None = None
    """HOST:PORT of the first process (short: --coordinator); none: JAX_COORDINATOR_ADDRESS, or found by JAX."""
    num_processes: int | None = None
    """How many processes there are (short: --num-processes); none: JAX_NUM_PROCESSES, or found by JAX."""
    process_id: int | None = None
    """Which of them this one is, from 0 (short: --process-id); none: JAX_PROCESS_ID, or found by JAX."""
    heartbeat_seconds: int = 100
    """A process that is silent for this long is taken for dead, and the others end."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of activations. Optimizer state, log-softmax and sums are float32 either way, and parameters, unless
    param_dtype says otherwise."""
    save_every_steps: int = 200
    """Save a checkpoint every this many optimizer steps (in ppo: rollouts), and at the end; 0: only at the end."""
    save_every_minutes: float = 0.0
    """Save also when the last checkpoint is this many minutes old; 0: never for that."""
    max_to_keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    checkpoints: str | None = None
    """Folder for checkpoints, of this run alone, also in a bucket: gs://bucket/hh (needs the `gcs` extra); none: in run.dir."""
    eval_every_examples: int = 0
    """Evaluate on the test split after this many training examples, and at the end; 0: only at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the `writers` extra)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the `writers` extra)."""
    trackio: str | None = None
    """Also log to this Trackio project (needs the `writers` extra)."""
    resume: bool = True
    """Continue from the newest good checkpoint of the run directory; otherwise refuse a directory that has one."""

    def check(self) -> Iterator[Problem]:
        if not self.dir.strip():
            yield "dir", "must name a folder, for example runs/hh"
        if "://" in self.dir:
            yield "dir", f"must be on a disk, which all hosts share; only run.checkpoints can be in a bucket, got {self.dir}"
        if not 0 <= self.seed < 2**32:
            yield "seed", f"must be between 0 and 4294967295, got {self.seed}"
        yield from positive(self, "max_to_keep", "num_processes", "heartbeat_seconds")
        yield from not_negative(self, "process_id")
        for field in ("coordinator", "num_processes", "process_id"):
            if self.distributed == "off" and getattr(self, field) is not None:
                yield field, "needs run.distributed auto, which is off"
        yield from not_negative(self, "save_every_steps", "save_every_minutes", "eval_every_examples")
        if self.checkpoints is not None and not self.checkpoints.strip():
            yield "checkpoints", "must name a folder, or be null for the one in run.dir"
        for field in ("wandb", "trackio"):
            if (project := getattr(self, field)) is not None and not project.strip():
                yield field, f"must name a project, or be null to leave {field} out"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How run.devices mesh lays out all devices of all hosts. The product is their number; -1 takes what is left."""

    data: int = 1
    """Copies of the parameters, each for its part of the batch."""
    fsdp: int = -1
    """Parts into which every matrix and its optimizer state are cut, each also for its part of the batch."""
    context: int = 1
    """Parts into which the positions of each row are cut, for rows of 32k tokens and more; devices along it share rows."""
    expert: int = 1
    """Parts into which the experts of a mixture are divided, each also for its part of the batch; the rest is copied."""
    tensor: int = 1
    """Parts into which heads, MLP and vocabulary are divided; devices along it work on the same rows."""

    def check(self) -> Iterator[Problem]:
        sizes = dataclasses.asdict(self)
        for field, size in sizes.items():
            if size < 1 and size != -1:
                yield field, f"must be at least 1, or -1 for what is left, got {size}"
        if self.context == -1:
            yield "context", "must be a number, which row lengths are rounded up to; only other sizes can be -1"
        free = [field for field, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield free[1], f"only one size can be -1, and {free[0]} is; set one of them"
