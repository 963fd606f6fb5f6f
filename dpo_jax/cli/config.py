"""Every option of every command, once: its default, its unit and one line of help, which `--help` prints.

One YAML file has these sections and may serve all commands; what it leaves out keeps the default written here. Relative paths
count from the folder in which the command is started. "none" is `null` in YAML and `None` in a flag. Nothing here imports JAX,
so `--help` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import inspect
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dpo_jax.cli import config_file, config_judge, config_lab, config_limits, config_lora, config_report, config_study, words
from dpo_jax.cli.config_file import ConfigError as ConfigError
from dpo_jax.cli.config_file import is_count, types_of
from dpo_jax.cli.config_judge import JudgeConfig
from dpo_jax.cli.config_lab import FrontierConfig, PpoConfig
from dpo_jax.cli.config_limits import LimitsConfig
from dpo_jax.cli.config_lora import LoraConfig
from dpo_jax.cli.config_report import ReportConfig
from dpo_jax.cli.config_study import AgreeConfig, StudyConfig

Optimizer = Literal["rmsprop", "adamw"]
Family = Literal["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
BASELINES = ("unlikelihood", "preferred_ft")  # losses of the paper's baselines, which compare with no reference
Problem = tuple[str, str]  # field, what is wrong with it and what to do


def _positive(section: object, *fields: str) -> Iterator[Problem]:
    for field in fields:
        value = getattr(section, field)
        if value is not None and value <= 0:
            yield field, f"must be greater than 0, got {value}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _not_negative(section: object, *fields: str) -> Iterator[Problem]:
    for field in fields:
        value = getattr(section, field)
        if value is not None and value < 0:
            yield field, f"must not be negative, got {value}"


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
    """Type of activations. Parameters, optimizer state, log-softmax and sums are float32 either way."""
    save_every_steps: int = 200
    """Save a checkpoint every this many optimizer steps, and at the end; 0: only at the end."""
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
    resume: bool = True
    """Continue from the newest good checkpoint of the run directory; otherwise refuse a directory that has one."""

    def check(self) -> Iterator[Problem]:
        if not self.dir.strip():
            yield "dir", "must name a folder, for example runs/hh"
        if "://" in self.dir:
            yield "dir", f"must be on a disk, which all hosts share; only run.checkpoints can be in a bucket, got {self.dir}"
        if not 0 <= self.seed < 2**32:
            yield "seed", f"must be between 0 and 4294967295, got {self.seed}"
        yield from _positive(self, "max_to_keep", "num_processes", "heartbeat_seconds")
        yield from _not_negative(self, "process_id")
        for field in ("coordinator", "num_processes", "process_id"):
            if self.distributed == "off" and getattr(self, field) is not None:
                yield field, "needs run.distributed auto, which is off"
        yield from _not_negative(self, "save_every_steps", "save_every_minutes", "eval_every_examples")
        if self.checkpoints is not None and not self.checkpoints.strip():
            yield "checkpoints", "must name a folder, or be null for the one in run.dir"
        if self.wandb is not None and not self.wandb.strip():
            yield "wandb", "must name a project, or be null to leave wandb out"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How run.devices mesh lays out all devices of all hosts. The product is their number; -1 takes what is left."""

    data: int = 1
    """Copies of the parameters, each for its part of the batch."""
    fsdp: int = -1
    """Parts into which every matrix and its optimizer state are cut, each also for its part of the batch."""
    tensor: int = 1
    """Parts into which heads, MLP and vocabulary are divided; devices along it work on the same rows."""

    def check(self) -> Iterator[Problem]:
        sizes = dataclasses.asdict(self)
        for field, size in sizes.items():
            if size < 1 and size != -1:
                yield field, f"must be at least 1, or -1 for what is left, got {size}"
        free = [field for field, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield free[1], f"only one size can be -1, and {free[0]} is; set one of them"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which preference pairs, and how they become rows of tokens."""

    source: Literal["reviews", "files", "tfds", "snippets", "imdb", "cnn_dailymail"] = "files"
    """Generated reviews, files of preferences, a TFDS folder of ours; texts only: rt-polarity, TFDS's IMDb, CNN/DailyMail."""
    path: str | None = None
    """File or folder with the data, for all sources but reviews."""
    format: Literal["auto", "hh", "trl", "shp", "stack_exchange", "tldr", "rewardbench"] = "auto"
    """Layout of the files. auto tells it from folder and column names, and the audit report says what was found."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    max_train: int | None = None
    """Use only the first this many training pairs; none: all."""
    max_test: int | None = None
    """Use only the first this many held-out pairs; none: all."""
    reviews_train: int = 8_000
    """Training pairs to generate (source reviews)."""
    reviews_test: int = 500
    """Held-out pairs to generate (source reviews)."""
    on_bad: Literal["refuse", "drop"] = "refuse"
    """A bad row stops the command with its file, line and cause, or is dropped and counted by cause."""
    max_dropped_share: float = 0.05
    """With on_bad drop, stop all the same if more than this share of a split is dropped (0 to 1)."""
    max_length: int = 512
    """Longest prompt plus completion, in tokens; what is longer is cut and counted."""
    max_prompt_length: int = 256
    """Length, in tokens, to which the prompt is cut when prompt plus completion exceed max_length."""
    truncation: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of an over-long prompt is kept."""
    date: str | None = None
    """Day that a chat template takes for today, such as 2026-11-27; none: the day on which the run directory was begun."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin prompts with BOS, once. auto: a text if the tokenizer does so itself, a conversation if its template does."""
    max_duplicates: float | None = None
    """Refuse a split of which a larger share repeats an earlier pair (0 to 1); none: only say so."""
    max_contradictions: float | None = None
    """Refuse a split of which a larger share is an earlier pair with its sides swapped (0 to 1); none: only say so."""
    max_overlap: float | None = None
    """Refuse held-out data of which a larger share has a prompt of the train split (0 to 1); none: only say so."""
    layout: Literal["packed", "shared", "plain"] = "packed"
    """Several pairs a row, one pair a row with its prompt read once, or one completion a row. Same numbers, less padding."""
    row_length: int | None = None
    """Length of a row, in tokens; none: the shortest that fits the data in this layout."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "max_train", "max_test", "reviews_train", "reviews_test", "max_length", "max_prompt_length")
        if self.max_prompt_length >= self.max_length:
            yield "max_prompt_length", f"must be less than max_length ({self.max_length}), got {self.max_prompt_length}"
        if not 0 <= self.max_dropped_share <= 1:
            yield "max_dropped_share", f"must be a share between 0 and 1, got {self.max_dropped_share}"
        for field in ("max_duplicates", "max_contradictions", "max_overlap"):
            if (share := getattr(self, field)) is not None and not 0 <= share <= 1:
                yield field, f"must be a share between 0 and 1, or null for no limit, got {share}"
        if self.row_length is not None and self.row_length < self.max_length:
            yield "row_length", f"must be at least max_length ({self.max_length}), got {self.row_length}"
        if self.date is not None:
            try:
                datetime.datetime.fromisoformat(self.date)
            except ValueError:
                yield "date", f"must be a day, such as 2026-11-27, with or without a time (2026-11-27T09:30), got {self.date!r}"
        for field in ("train_split", "test_split"):
            if not getattr(self, field).strip():
                yield field, "must name a split"
        if max(self.reviews_train, self.reviews_test) > 10_000_000:
            yield "reviews_train", "at most 10 million reviews are generated, for either split"
        if self.train_split == self.test_split:
            yield "test_split", f"must be another than train_split, got {self.test_split!r} for both"
        if self.source == "reviews" and self.path is not None:
            yield "path", "reviews are generated: leave path out, or set source to files or tfds"

    def missing(self) -> Iterator[Problem]:
        if self.source != "reviews" and self.path is None:
            yield "path", f"source {self.source} needs a file or folder: pass --data.path"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer. Without a path: that of the model; for a new model one is trained on the train split."""

    path: str | None = None
    """Hugging Face folder or Hub id to load it from."""
    vocab_size: int = 8_000
    """Entries of a trained byte-level BPE vocabulary."""

    def check(self) -> Iterator[Problem]:
        if self.vocab_size < 257:
            yield "vocab_size", f"must be at least 257 (256 bytes and the end token), got {self.vocab_size}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The language model. Without a path the sizes describe a new one; with a path they are what is expected of it."""

    path: str | None = None
    """Hugging Face folder with .safetensors, or Hub id such as EleutherAI/pythia-2.8b; none: new random weights."""
    family: Family | None = None
    """Architecture, as Hugging Face names it."""
    width: int | None = None
    """Width of the residual stream."""
    layers: int | None = None
    """Transformer layers."""
    heads: int | None = None
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads (grouped-query attention); none: the family's default."""
    head_size: int | None = None
    """Width of one head; none: width / heads."""
    mlp_width: int | None = None
    """Hidden width of the feed-forward layers; none: the family's default."""
    max_positions: int | None = None
    """Longest text the model can read, in tokens."""
    tie: bool | None = None
    """Use the input embeddings as output head; none: the family's default."""
    vocab_size: int | None = None
    """Rows of the embedding table; none: as many as the tokenizer has entries."""
    remat: Literal["none", "save_attention", "full"] = "none"
    """What the backward pass computes again: no matrix product, all but attention, or whole layers (a third more time)."""
    attention: Literal["auto", "dense", "blocks", "chunked", "splash", "flash", "cudnn"] = "auto"
    """auto: splash on TPUs, flash on GPUs, blocks on CPUs. No GPU path has been run on a GPU yet."""

    def check(self) -> Iterator[Problem]:
        sizes = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions", "vocab_size")
        yield from _positive(self, *sizes)
        if self.width and self.heads and not self.head_size and self.width % self.heads:
            yield "heads", f"must divide width ({self.width}) unless head_size is given, got {self.heads}"
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            yield "kv_heads", f"must divide heads ({self.heads}), got {self.kv_heads}"

    def missing(self) -> Iterator[Problem]:
        for field in ("family", "width", "layers", "heads", "max_positions"):
            if self.path is None and getattr(self, field) is None:
                yield field, f"a new model needs it: set model.{field}, or model.path to start from an existing model"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every training command has. Defaults are the paper's."""

    batch: int = 64
    """Texts (sft) or pairs (dpo) an optimizer step."""
    epochs: int = 1
    """Passes over the train split."""
    lr: float = 1e-6
    """Learning rate after warm-up."""
    optimizer: Optimizer = "rmsprop"
    """RMSprop as in the original (decay 0.99, eps 1e-8), or AdamW."""
    warmup_steps: int = 150
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up the learning rate stays, as in the original, or falls on a line to 0 at the end of the run."""
    max_grad_norm: float = 10.0
    """Gradients are scaled down to this global L2 norm."""
    microbatches: int = 1
    """Parts into which a batch is split to save memory; the result is the same. On one device parts of padding cost nothing."""
    trainable: str | None = None
    """Train only these: last_layer, last_layers:N, or patterns of parameter names (final_norm.*, *.bias), with commas between;
    none: all of them."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "batch", "epochs", "lr", "max_grad_norm", "microbatches")
        yield from _not_negative(self, "warmup_steps")
        if self.trainable is not None and not all(term.strip() for term in self.trainable.split(",")):
            yield "trainable", f"must be names with commas between, such as last_layer,final_norm.*, got {self.trainable!r}"
        if self.batch > 0 and self.microbatches > 0 and self.batch % self.microbatches:
            nearest = min(_divisors(self.batch), key=lambda size: abs(size - self.microbatches))
            yield (
                "microbatches",
                f"must divide batch: {self.batch} do not split into {self.microbatches} equal parts; the nearest is {nearest}",
            )


@dataclasses.dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning: the policy, and the reference of DPO."""

    scored: Literal["completion", "all"] = "completion"
    """Tokens the loss counts: those of the completion, or all (plain language modelling)."""


@dataclasses.dataclass(frozen=True)
class RefsConfig:
    """The reference pass: log-probabilities of the frozen starting policy, computed once and cached."""

    batch: int = 64
    """Pairs a forward pass."""
    cache: str | None = None
    """Folder of the cache; none: refs/ in the run directory."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "batch")


@dataclasses.dataclass(frozen=True)
class DpoConfig(TrainingConfig):
    """Direct Preference Optimization (Rafailov et al. 2023). Defaults are the paper's."""

    policy: str | None = None
    """Folder or Hub id of the starting policy; none: sft/export in the run directory."""
    reference: str | None = None
    """Folder or Hub id of the reference; none: the starting policy. A second round may keep the reference of the first."""
    loss: Literal["dpo", "ipo", "unlikelihood", "preferred_ft"] = "dpo"
    """The paper's loss, IPO (Azar et al. 2023), or one of the paper's baselines, which know no reference."""
    beta: float = 0.1
    """Strength of the pull towards the reference; the paper uses 0.1, and 0.5 for TL;DR. Losses dpo and ipo only."""
    alpha: float | None = None
    """Weight of the rejected completion, 0 to 1; loss unlikelihood only, which needs it."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels (conservative DPO), 0 to below 0.5; loss dpo only."""
    reference_free: bool = False
    """Take a uniform reference instead of the starting policy; loss dpo only."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        yield from _positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            yield "label_smoothing", f"must be at least 0 and below 0.5, got {self.label_smoothing}"
        if self.loss == "ipo" and self.label_smoothing:
            yield "label_smoothing", "IPO has no label smoothing: leave it at 0, or use loss dpo"
        if self.loss == "ipo" and self.reference_free:
            yield "reference_free", "IPO compares with the reference: leave it false, or use loss dpo"
        if self.loss in BASELINES:
            for field in ("beta", "label_smoothing", "reference_free"):
                default = getattr(DpoConfig, field)
                if getattr(self, field) != default:
                    yield field, f"loss {self.loss} has no such term: leave it at {str(default).lower()}, or use loss dpo"
        if self.loss == "unlikelihood" and self.alpha is None:
            yield "alpha", "loss unlikelihood needs it: a weight of the rejected completion between 0 and 1"
        if self.loss != "unlikelihood" and self.alpha is not None:
            yield "alpha", f"loss {self.loss} has no such weight: leave it out, or use loss unlikelihood"
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            yield "alpha", f"must be between 0 and 1, got {self.alpha}"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: loss, preference accuracy with its interval, margin, displacement, and KL from samples."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    reference: str | None = None
    """Folder or Hub id of the reference; none: that of dpo."""
    batch: int = 64
    """Pairs a forward pass."""
    samples: int = 64
    """Held-out prompts to sample from for the KL to the reference; 0: leave it out."""
    max_new_tokens: int = 128
    """Longest sample, in tokens."""
    rewards: bool = False
    """Instead judge the implicit reward on the test split: by subset, calibration, length (short: --rewards)."""
    rewards_out: str | None = None
    """Folder of --rewards; none: rewards/ in the run directory. `report` shows each whose name begins with rewards-."""

    def check(self) -> Iterator[Problem]:
        if self.rewards_out is not None and not self.rewards:
            yield "rewards_out", "is the folder of --rewards: set that too, or leave it out"
        yield from _positive(self, "batch", "max_new_tokens")
        yield from _not_negative(self, "samples")


def _temperature(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Completions of held-out prompts, or of your own."""

    policy: str | None = None
    """Folder or Hub id of the policy; none: dpo/export in the run directory."""
    prompts: int = 8
    """Held-out prompts to complete."""
    prompts_file: str | None = None
    """Complete these prompts instead: a text file with one a line, or .jsonl with a field "prompt" (a text, or messages) or
    "messages"."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether the chat template renders a text of prompts_file as a user's turn; auto: if there is a template, and the policy
    does not lie in a run that was trained on plain texts. Messages are always rendered."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    temperatures: str | None = None
    """Several instead, separated by commas, such as 0,0.25,0.5,0.75,1: one after the other into one file."""
    best_of: str | None = None
    """Keep the best of so many completions by a reward; several, such as 1,4,16: draw the most, and keep one for each."""
    reward_model: str | None = None
    """The reward of best_of: a folder that reward-model wrote; none: the true one (source reviews)."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1: all."""
    out: str | None = None
    """Write JSON Lines here instead of printing."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "prompts", "max_new_tokens")
        yield from _not_negative(self, "temperature", "top_k")
        for field, what, good in (
            ("temperatures", "numbers of at least 0", _temperature),
            ("best_of", "whole numbers", is_count),
        ):
            if (text := getattr(self, field)) is not None and not all(good(part.strip()) for part in text.split(",")):
                yield field, f"must be {what}, separated by commas, got {text!r}"
        if self.reward_model is not None and self.best_of is None:
            yield "reward_model", "chooses among the completions of best_of: set that, or leave it out"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, got {self.top_p}"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Checked preferences as a TFDS folder, which `data.source: tfds` reads."""

    out: str | None = None
    """Folder to write; none: tfds/ in the run directory. It must not hold the data set yet."""

    def check(self) -> Iterator[Problem]:
        yield from ()


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder (config.json, safetensors, tokenizer)."""

    checkpoint: str | None = None
    """Checkpoints of a training run, such as runs/hh/sft/checkpoints; none: those of dpo."""
    step: int | None = None
    """The step to take (run.max_to_keep says how many are kept); none: the newest good one."""
    out: str | None = None
    """Folder to write, new or of an export; none: export/ beside the checkpoints, or export-STEP/ for a step."""
    merge: bool = False
    """Of an adapter (lora), write the whole model with the adapter added in, by default to export-merged/."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that export, dpo and ppo write; none: that of the model that training began with, float32 for a new
    one. sft writes float32: dpo starts from exactly these weights."""

    def check(self) -> Iterator[Problem]:
        yield from _not_negative(self, "step")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """The race against PyTorch: same weights, same pairs in every step, contenders in turns (needs the `bench` extra)."""

    contenders: str | None = None
    """Only these, separated by commas: torch-live, torch-cached, trl, trl-best, jax-live ... jax-attention; none: all."""
    lengths: str | None = None
    """Random tokens of exactly PROMPT/CHOSEN/REJECTED length, such as 400/500/500, instead of data; none: the train split."""
    rounds: int = 3
    """How often all contenders run. The first round also gives the loss curves and fills the compilation caches."""
    steps: int = 4
    """Timed optimizer steps (or batches of completions) of a contender in a round, after one that is not timed."""
    gate_steps: int = 20
    """Steps over which all loss curves must agree before anything is compared."""
    groups: int = 4
    """Microbatches of similar length into which contenders that group by length (trl-best among them) divide a batch."""
    torch_microbatches: int = 1
    """Equal parts into which the other contenders in PyTorch divide a batch, if it does not fit into memory."""
    torch_python: str | None = None
    """Python that has torch and trl, if they cannot live in one environment with JAX; none: the one that runs this."""
    sampling: str | None = None
    """Race samplers instead: 32/64/128 completes 32 prompts of up to 64 tokens by 128, ours against transformers.generate."""
    scaling: bool = False
    """Afterwards time our step at 1, 2, 4 and 8 times the tokens, by batch and by length, and fit the exponents."""
    profile: bool = False
    """Afterwards record one more run of ours, print its slowest operations, and keep the trace (short: --profile)."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "rounds", "steps", "gate_steps", "groups", "torch_microbatches")
        if self.lengths is not None:
            parts = self.lengths.split("/")
            if len(parts) != 3 or not all(is_count(part) for part in parts):
                yield (
                    "lengths",
                    f"must be three lengths in tokens, prompt/chosen/rejected such as 400/500/500, got {self.lengths!r}",
                )
        if self.sampling is not None:
            parts = self.sampling.split("/")
            if len(parts) != 3 or not all(is_count(part) for part in parts):
                yield (
                    "sampling",
                    "must be a number of prompts, the longest prompt and the new tokens of each, such as 32/64/128, got "
                    f"{self.sampling!r}",
                )
            for field in ("contenders", "lengths", "scaling", "profile"):
                if getattr(self, field):
                    yield field, "belongs to the race of trainers; leave it out, or bench.sampling"


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What training would take on TPUs or GPUs that are not here, without weights or data: the real step is compiled."""

    topology: str | None = None
    """TPU slice as GENERATION:SHAPE in chips (v5e:4x4, v5p:4x4x8), or GPUs as CHIP:GPUS or CHIP:HOSTSxGPUS (h100:8, h100:4x8;
    a100, h100, h200, b200) (short: --topology)."""
    prompt: int | None = None
    """Tokens in the prompt of every pair; none: data.max_prompt_length."""
    completion: int | None = None
    """Tokens in each of its completions; none: data.max_length less the prompt."""
    sweep: bool = False
    """Try meshes and remat policies and rank them (short: --sweep)."""
    scale: bool = False
    """Also plan 4, 16, 64 and 256 chips (GPUs: 8, 16, 32 and 64) with as many pairs per chip (short: --scale)."""
    json: str | None = None
    """File to write the figures to; none: plan/plan.json in the run directory."""

    def check(self) -> Iterator[Problem]:
        yield from _positive(self, "prompt", "completion")

    def missing(self) -> Iterator[Problem]:
        if self.topology is None:
            yield "topology", "name a slice of TPUs or a set of GPUs, for example --topology v5e:4x4 or --topology h100:8"


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections. `None` paths have defaults inside the run directory: read them through the methods below."""

    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    sft: SftConfig = SftConfig()
    refs: RefsConfig = RefsConfig()
    dpo: DpoConfig = DpoConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    export: ExportConfig = ExportConfig()
    prepare: PrepareConfig = PrepareConfig()
    bench: BenchConfig = BenchConfig()
    plan: PlanConfig = PlanConfig()
    frontier: FrontierConfig = FrontierConfig()
    ppo: PpoConfig = PpoConfig()
    judge: JudgeConfig = JudgeConfig()
    study: StudyConfig = StudyConfig()
    agree: AgreeConfig = AgreeConfig()
    report: ReportConfig = ReportConfig()
    limits: LimitsConfig = LimitsConfig()
    lora: LoraConfig = LoraConfig()

    def checkpoints_of(self, task: str) -> str:
        """Where the training of `sft` or `dpo` saves to: a folder, or `gs://...`, exactly as it was given."""
        return f"{self.run.checkpoints}/{task}" if self.run.checkpoints else f"{self.run.dir}/{task}/checkpoints"

    def dpo_policy(self) -> str:
        """The starting policy of DPO, which is the reference too, unless another one is named."""
        return self.dpo.policy or f"{self.run.dir}/sft/export"

    def dpo_reference(self) -> str:
        return self.dpo.reference or self.dpo_policy()

    def refs_cache(self) -> str:
        return self.refs.cache or f"{self.run.dir}/refs"

    def eval_policy(self) -> str:
        return self.eval.policy or f"{self.run.dir}/dpo/export"

    def eval_reference(self) -> str:
        return self.eval.reference or self.dpo_reference()

    def judge_out(self) -> str:
        return self.judge.out or f"{self.run.dir}/judge"

    def sample_policy(self) -> str:
        return self.sample.policy or f"{self.run.dir}/dpo/export"


_HOME = re.compile(r"~[\w.-]*(/|\Z)")


def at_home(config: Config) -> Config:
    """`config` with the home folder in the place of each `~` or `~user` that a path begins with, as a shell does it."""

    def expanded(section: Any) -> Any:
        texts = {field: value for field, value in vars(section).items() if isinstance(value, str) and _HOME.match(value)}
        return dataclasses.replace(section, **{field: os.path.expanduser(value) for field, value in texts.items()})

    return dataclasses.replace(config, **{name: expanded(section) for name, section in vars(config).items()})


def problems(config: Config) -> list[Problem]:
    """Every value out of range, as (dotted field, what is wrong)."""
    found = []
    for section, name in ((getattr(config, field.name), field.name) for field in dataclasses.fields(config)):
        for field, value in vars(section).items():
            if isinstance(value, str) and _HOME.match(value) and os.path.expanduser(value) == value:
                found.append((f"{name}.{field}", f"{value}: no such home folder is known here; write the whole path"))
        numbers = [field for field in types_of(type(section)) if isinstance(getattr(section, field), float)]
        bad = [(field, "must be a finite number") for field in numbers if not math.isfinite(getattr(section, field))]
        found += [(f"{name}.{field}", message) for field, message in bad or section.check()]
    for name in ("sft", "dpo"):
        if config.lora.rank is not None and getattr(config, name).trainable is not None:
            found.append((f"{name}.trainable", "an adapter is trained (lora.rank) and no other weights; leave one of them out"))
    positions, longest = config.model.max_positions, config.data.max_length
    if positions and longest > positions:
        found.append(("data.max_length", f"{longest} tokens do not fit model.max_positions ({positions}); lower it"))
    return found


def check(
    config: Config, *, lines: Mapping[str, int] | None = None, path: str | Path = "", needs: tuple[str, ...] = ()
) -> None:
    """Raises `ConfigError` with every problem, and every value that is missing in the sections that a command `needs`.

    `lines` (of `load_config_with_lines`) and `path` let a message point into the file.
    """
    found = problems(config)
    for name in needs:
        found += [(f"{name}.{field}", message) for field, message in getattr(config, name).missing()]
    if found:
        places = {field: f"{path}:{line}: " for field, line in (lines or {}).items()}
        raise ConfigError("\n".join(f"{places.get(field, '')}{field}: {message}" for field, message in found))


def load_config_with_lines(path: str | Path) -> tuple[Config, dict[str, int]]:
    """The config in a YAML file and the line of each dotted field that it sets. Raises `ConfigError`; ranges are checked."""
    config, lines = config_file.read(path, Config, instead=lambda key: words.instead(key, every_option()))
    check(config, lines=lines, path=path)
    return config, lines


def load_config(path: str | Path) -> Config:
    """The config in a YAML file. Raises `ConfigError` with file, line, field and remedy."""
    return load_config_with_lines(path)[0]


@functools.cache
def every_option() -> tuple[str, ...]:
    """The dotted name of each option, such as "dpo.beta"."""
    return tuple(f"{section}.{field}" for section, cls in types_of(Config).items() for field in types_of(cls))


def dump_config(config: Config) -> str:
    """YAML text of every option; `load_config` of it gives an equal config."""
    return config_file.text(config)


def help_text(section: type, option: str) -> str:
    """The text written under an option in this file, also where a section inherits it."""
    texts = _texts()
    return next(texts[cls.__name__, option] for cls in section.__mro__ if (cls.__name__, option) in texts)


@functools.cache
def _texts() -> dict[tuple[str, str], str]:
    texts = {}
    modules = (sys.modules[__name__], config_judge, config_lab, config_limits, config_lora, config_report, config_study)
    sources = (inspect.getsource(module) for module in modules)
    for node in (node for source in sources for node in ast.parse(source).body):
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[typing.cast(ast.ClassDef, node).name, name] = inspect.cleandoc(words)
    return texts
