"""The table of commands: what each does, and which options it reads.

Command `NAME` is the function `run(config) -> exit code` in `dpo_jax.cli.commands.NAME` (a hyphen becomes an underscore).
"""

from __future__ import annotations

from typing import NamedTuple

from dpo_jax import loss_table, optimizer_table
from dpo_jax.cli import config as options
from dpo_jax.cli.config.file import types_of


class Command(NamedTuple):
    help: str
    reads: tuple[str, ...]  # sections, or single options "section.option"
    needs: tuple[str, ...] = ()  # sections that must be complete


def module_of(name: str) -> str:
    """The dotted module of a command."""
    return f"dpo_jax.cli.commands.{name.replace('-', '_')}"


# Every stage of a run takes the sections that describe it, so that one set of flags serves all stages.
_RUN = ("run", "mesh", "data", "tokenizer", "model")
_LOGGED = ("eval_every_examples", "eval_at_start", "tensorboard", "wandb", "trackio", "metric_names")


def _run_without(*fields: str) -> tuple[str, ...]:
    """`_RUN` without these options of `run`."""
    return (*(f"run.{field}" for field in types_of(options.RunConfig) if field not in fields), *_RUN[1:])


_LOSS = ("dpo.policy", "dpo.reference", "dpo.ld_alpha", "dpo.param_dtype", *(f"dpo.{option}" for option in loss_table.HELP))
# The contenders decide on device and layout.
_BENCH = (
    *("run.dir", "run.seed", "run.precision", "tokenizer", "model", "bench"),
    *(f"data.{field}" for field in types_of(options.DataConfig) if field != "layout"),
    *(f"dpo.{field}" for field in ("beta", "batch", "lr", "warmup_steps", "max_grad_norm", "microbatches")),
)
_PPO = tuple(f"frontier.{field}" for field in types_of(options.FrontierConfig) if field.startswith("ppo_"))
_SCHEDULE = tuple(
    f"dpo.{field}" for field in ("warmup_steps", "warmup_ratio", "schedule", *optimizer_table.SCHEDULE_OPTIONS, "microbatches")
)
_TRAINING = (
    *(f"dpo.{field}" for field in ("batch", "epochs", "lr", "optimizer", *optimizer_table.OPTIONS, "max_grad_norm")),
    *_SCHEDULE,
)
_REWARD_MODEL = (
    *(option for option in _TRAINING if option != "dpo.epochs"),
    *("frontier.reward_model_epochs", "frontier.evaluations"),
)


# What `online` does not read of section dpo: its rounds set the length, and each round is evaluated.
_UNREAD = (
    *("reference", "epochs", "steps", "patience", "stop_on", "keep_best", "ld_alpha", "param_dtype", "refresh_reference_steps"),
    "eval_samples",
)
_ONLINE = (
    *(f"dpo.{name}" for name in types_of(types_of(options.Config)["dpo"]) if name not in _UNREAD),
    *(f"frontier.{name}" for name in ("reward", "classifier", "prompts", "test_prompts", "max_new_tokens", "sample_batch")),
    *(f"judge.{name}" for name in types_of(options.JudgeConfig) if name not in ("a", "b", "by", "limit", "injections", "out")),
    *("study.task", "study.question", "study.title"),
)

_OF_ROUNDS = tuple(
    f"online.{name}" for name in ("rounds", "prompts", "completions", "pairs", "steps", "candidates", "reward_scale", "replay")
)


def _experiment(*fields: str) -> tuple[str, ...]:
    """The options of `frontier` that a part of it reads: those of sampling and of the true reward, and `fields`."""
    return tuple(f"frontier.{field}" for field in ("reward", "classifier", "max_new_tokens", "sample_batch", "fast", *fields))


_SWEPT = (
    *_experiment("prompts", "test_prompts", "optimum_prompts", "optimum_samples", "completions", "labels", "evaluations"),
    *(f"frontier.{field}" for field in ("dpo_betas", "best_of", "seeds", "reward_model_epochs", "jobs")),
)

COMMANDS = {
    "audit": Command(
        "check the data before training: one page of counts and notes",
        (*_RUN, "dpo.loss", "dpo.desirable_weight", "dpo.undesirable_weight"),
        ("data",),
    ),
    "prepare": Command(
        "write the checked preferences as a TFDS folder (array_record)",
        (*_RUN, "prepare"),
        ("data",),
    ),
    "sft": Command(
        "fine-tune on the chosen completions: the starting policy",
        (*_RUN, "lora", "sft"),
        ("data", "model"),
    ),
    "refs": Command(
        "cache the reference log-probabilities",
        (*_RUN, "lora", "dpo.policy", "dpo.reference", "dpo.loss", "dpo.ld_alpha", "dpo.param_dtype", "refs"),
        ("data",),
    ),
    "dpo": Command(
        "train the policy on preferences",
        (*_RUN, "lora", "refs", "dpo", "eval.max_new_tokens", "export.dtype"),
        ("data",),
    ),
    "eval": Command("measure a policy on held-out pairs", (*_RUN, *_LOSS, "lora", "refs", "eval"), ("data",)),
    "sample": Command("complete prompts with a policy", (*_RUN, "sample"), ("data",)),
    "judge": Command(
        "win rates of completions by a judge behind an OpenAI-compatible endpoint (needs the `judge` extra)",
        ("run.dir", "run.seed", "data", "tokenizer.path", "tokenizer.chat_template", "judge"),
        ("judge", "data"),
    ),
    "plan": Command(
        "predict memory, collectives and time of training on TPUs or GPUs, without the hardware",
        (
            *("run.dir", "run.devices", "run.precision", "mesh", "data", "model", "tokenizer.vocab_size"),
            *("lora", "dpo", "refs.batch", "plan"),
        ),
        ("plan",),
    ),
    "export": Command(
        "write a checkpoint as a Hugging Face folder",
        ("run.dir", "run.checkpoints", "export"),
    ),
    "label": Command(
        "make preferences by labeling the policy's samples with a known reward",
        (*_RUN, "dpo.policy", *_experiment("prompts", "test_prompts", "completions", "labels")),
        ("data",),
    ),
    "reward-model": Command(
        "learn a reward from preferences",
        (*_run_without(*_LOGGED), "lora", "dpo.policy", "dpo.trainable", "dpo.param_dtype", *_REWARD_MODEL, "export.dtype"),
        ("data",),
    ),
    "ppo": Command(
        "train the policy with PPO on the true reward or a learned one",
        (
            *_run_without(*_LOGGED),
            "dpo.policy",
            "lora",
            *_SCHEDULE,
            "dpo.trainable",
            *_experiment("prompts", "test_prompts", "evaluations", "second_reward"),
            *(option for option in _PPO if option != "frontier.ppo_kls"),  # of the sweep
            "ppo",
            "export.dtype",
        ),
        ("data",),
    ),
    "online": Command(
        "online DPO: rounds of sampling, labels from a reward, a judge or people, and training",
        (*_run_without("eval_every_examples", "eval_at_start"), "lora", *_ONLINE, "online", "export.dtype"),
        ("data",),
    ),
    "optimum": Command(
        "the optimal reward at every KL, and Best-of-N",
        (*_RUN, "dpo.policy", *_experiment("optimum_prompts", "optimum_samples", "best_of", "second_reward")),
        ("data",),
    ),
    "frontier": Command(
        "every method of the paper, by reward and KL, against the optimum",
        (*_RUN, "sft", "dpo.policy", "lora", "dpo.trainable", *_TRAINING, "frontier", *_OF_ROUNDS),
        ("data", "model"),
    ),
    "robust": Command(
        "effect of flipped labels, prompt shift and over-optimization on true reward at equal KL",
        (*_RUN, "sft", "dpo.policy", "lora", "dpo.trainable", *_TRAINING, *_SWEPT, *_PPO, "robust"),
        ("data", "model"),
    ),
    "control": Command(
        "control from preferences between segments: SFT, CPL, P-IQL and percent-BC, with a known optimum or in a simulator",
        ("run.dir", "run.seed", "run.devices", "mesh", "control"),
    ),
    "diffusion": Command(
        "Diffusion-DPO on real digits (reward against path KL), or against a closed-form optimum",
        ("run.dir", "run.seed", "diffusion"),
    ),
    "scenes": Command(
        "hallucination in captions of rendered scenes: DPO and Preferred-FT on a tiny model that reads images",
        ("run.dir", "run.seed", "scenes"),
    ),
    "dialogue": Command(
        "preferences between whole conversations in a question game, against the enumerated optimum",
        (*_RUN, "sft", "dpo.policy", "lora", "dpo.trainable", *_TRAINING, "dialogue"),
        ("data", "model"),
    ),
    "study": Command(
        "make a page where people compare two sets of completions",
        ("run.dir", "run.seed", "study"),
        ("study",),
    ),
    "agree": Command(
        "win rates by people and judges, and how far they agree (Table 2 of the DPO paper)",
        ("run.dir", "run.seed", "agree"),
    ),
    "report": Command(
        "one page about one or several runs: dpo-jax report RUN... (no configuration needed)",
        ("report",),
        ("report",),
    ),
    "bench": Command("benchmark our training against PyTorch", _BENCH, ("data", "model")),
}

# Every command reads files that may come from elsewhere.
COMMANDS = {name: command._replace(reads=(*command.reads, "limits")) for name, command in COMMANDS.items()}

# Commands with their own flags: "module:function", called with the arguments and the name of the program.
WITHOUT_CONFIG = {
    "init": ("write a configuration to fill in, for data of your own: dpo-jax init my.yaml", "dpo_jax.cli.commands.init:main"),
    "check": ("test this machine's accelerator: dpo-jax check (no configuration needed)", "dpo_jax.check:main"),
}

TRAINING = ("sft", "dpo")  # commands whose finished runs are detected
# They sample, or read rewards from whole rows; neither works with rows split over devices.
WHOLE_ROWS = ("sample", "label", "reward-model", "ppo", "online", "optimum", "frontier", "robust", "control", "dialogue")
NO_DEVICES = ("audit", "prepare", "plan")  # commands that read section mesh, and run on no mesh
ON_MANY_HOSTS = ("sft", "refs", "dpo", "eval", "sample", "label", "reward-model", "ppo", "online", "optimum", "frontier")
SHORT = {f"--{name}": f"--run.{name}" for name in ("distributed", "coordinator", "num-processes", "process-id")}
SHORT |= {
    "--profile": "--bench.profile",
    "--fast": "--frontier.fast",
    "--rewards": "--eval.rewards",
    "--push": "--export.push",
} | {f"--{name}": f"--plan.{name}" for name in ("topology", "sweep", "scale")}
SHORT |= {f"--{name}": f"--judge.{name}" for name in ("base-url", "one-order")}
