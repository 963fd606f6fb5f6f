"""Options of every run: run directory, devices, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Literal

from dpo_jax.cli.config.ranges import Problem, not_negative, positive


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run directory, devices, precision, checkpoints and logs."""

    dir: str = "runs/default"
    """Run directory. Each command has its own folder in it, and continues what it finds there."""
    seed: int = 0
    """Random seed: new weights, order of the examples, samples."""
    devices: Literal["single", "pmap", "mesh"] = "single"
    """single: one device; pmap: all devices, with the batch split among them; mesh: all devices, as section mesh lays them
    out."""
    distributed: Literal["off", "auto"] = "off"
    """auto: join the processes of a TPU pod, SLURM or Kubernetes job, or those given by the next three options (short:
    --distributed)."""
    coordinator: str | None = None
    """HOST:PORT of the first process (short: --coordinator); none: JAX_COORDINATOR_ADDRESS, or detected by JAX."""
    num_processes: int | None = None
    """Number of processes (short: --num-processes); none: JAX_NUM_PROCESSES, or detected by JAX."""
    process_id: int | None = None
    """Index of this process, from 0 (short: --process-id); none: JAX_PROCESS_ID, or detected by JAX."""
    heartbeat_seconds: int = 100
    """A process that is silent for this long counts as dead, and the others exit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of activations. bfloat16: TRL's bf16 (mixed precision). Parameters stay float32 unless dpo.param_dtype is set;
    optimizer state, log-softmax and sums always do."""
    save_every_steps: int = 200
    """Save a checkpoint every N optimizer steps (ppo: rollouts), and at the end; 0: only at the end."""
    save_every_minutes: float = 0.0
    """Also save when the last checkpoint is this many minutes old; 0: off."""
    max_to_keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    checkpoints: str | None = None
    """Folder for the checkpoints of this run alone, possibly in a bucket: gs://bucket/hh (needs the `gcs` extra); none: in
    run.dir."""
    eval_every_examples: int = 0
    """Evaluate on the test split every N training examples, and at the end; 0: only at the end."""
    eval_at_start: bool = False
    """Also evaluate before the first step: the starting point of the held-out curves."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the `writers` extra)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project; the run is named after run.dir (needs the `writers` extra)."""
    trackio: str | None = None
    """Also log to this Trackio project; the run is named after run.dir (needs the `writers` extra)."""
    metric_names: Literal["own", "trl"] = "own"
    """Metric names for TensorBoard, wandb and Trackio: own, as in metrics.jsonl; trl, as in TRL (train/loss, ...)."""
    resume: bool = True
    """Continue from the newest good checkpoint in the run directory; otherwise refuse a directory that has one."""

    def half_given(self) -> str | None:
        """What is wrong with the options of `distributed: auto` on this machine; None if all three are set, or none.

        Those left out are read from the environment, as the run does.
        """
        variables = {
            "coordinator": "JAX_COORDINATOR_ADDRESS",
            "num_processes": "JAX_NUM_PROCESSES",
            "process_id": "JAX_PROCESS_ID",
        }
        given = {field for field, name in variables.items() if getattr(self, field) is not None or os.environ.get(name)}
        missing = [f"run.{field}" for field in variables if field not in given]
        if self.distributed == "off" or len(missing) in (0, 3):
            return None
        return f"{', '.join(missing)} not given, but {', '.join(f'run.{field}' for field in variables if field in given)}"

    def check(self) -> Iterator[Problem]:
        if not self.dir.strip():
            yield "dir", "must name a folder, for example runs/hh"
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
        if self.metric_names != "own" and not (self.tensorboard or self.wandb or self.trackio):
            yield "metric_names", "is read with tensorboard, wandb or trackio only: set one of them, or leave this out"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh of run.devices mesh, over all devices of all hosts. Its sizes multiply to the number of devices; -1 takes
    the rest."""

    data: int = 1
    """Data parallelism: copies of the parameters, each with its own part of the batch."""
    fsdp: int = -1
    """FSDP: parts into which every matrix and its optimizer state are split, each with its own part of the batch."""
    context: int = 1
    """Context parallelism: parts into which the positions of each row are split, for rows of 32k tokens and more. These
    devices share rows."""
    expert: int = 1
    """Expert parallelism: parts into which the experts of a mixture are split, each with its own part of the batch. Other
    parameters are copied."""
    tensor: int = 1
    """Tensor parallelism: parts into which heads, MLP and vocabulary are split. These devices work on the same rows."""

    def check(self) -> Iterator[Problem]:
        sizes = dataclasses.asdict(self)
        for field, size in sizes.items():
            if size < 1 and size != -1:
                yield field, f"must be at least 1, or -1 for the rest, got {size}"
        if self.context == -1:
            yield "context", "must be a number (row lengths become multiples of it); only other sizes can be -1"
        free = [field for field, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield free[1], f"only one size can be -1, and {free[0]} is already; set one of them"
