"""Option names of TRL, transformers, PEFT and the original DPO code, and their equivalents here.

An unknown flag or key of a file is looked up in `WORDS`, in any spelling: `--learning-rate`, `learning_rate:`,
`--training.learning_rate`. An option of ours without its section (`--beta`) or its dot (`--eval-policy`) is found as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

_LORA = "an adapter is trained where lora.rank is given"
_QUANTIZED = "weights are not quantized; run.precision bfloat16, run.devices mesh and model.remat save memory"
_SHARDED = "parameters are sharded with run.devices mesh and mesh.fsdp"
_SAVES = "checkpoints are saved by run.save_every_steps or run.save_every_minutes, and at the end"
_EVALS = "evaluation runs by run.eval_every_examples, and at the end"
_HUB = "training uploads nothing; afterwards: dpo-jax export CONFIG --push NAME"
_DATA = "data.path, a local file or folder, or a data set of the Hub by its name; data.mix for several"
_HALF = "float16 is not offered; run.precision bfloat16"
_LENGTH = "data.max_length (prompt and completion) and data.max_prompt_length"
_KERNEL = "model.attention; auto takes the fastest for the device"
_STEPS = "sft.steps, dpo.steps, sft.epochs, dpo.epochs, data.max_train"
_NOTHING = "nothing needs to be set for that here"

# Other programs' names -> our options, separated by commas, or a sentence. Answers for a command name only options it reads.
WORDS: Mapping[str, str] = {
    "learning_rate": "sft.lr, dpo.lr, frontier.ppo_lr",
    "lr_scheduler_type": "sft.schedule, dpo.schedule",
    "lr_scheduler": "sft.schedule, dpo.schedule",
    "warmup_ratio": "sft.warmup_ratio, dpo.warmup_ratio",
    "optim": "sft.optimizer, dpo.optimizer",
    "weight_decay": "sft.weight_decay, dpo.weight_decay",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), "b1, b2 and eps of section sft or dpo, with optimizer adamw"),
    "lr_scheduler_kwargs": "min_lr_ratio and decay_ratio of section sft or dpo, with schedule cosine or wsd",
    "early_stopping_patience": "sft.patience, dpo.patience",
    "metric_for_best_model": "sft.stop_on, dpo.stop_on",
    "load_best_model_at_end": "sft.patience, dpo.patience: the weights of the best evaluation are then exported",
    "gradient_clipping": "sft.max_grad_norm, dpo.max_grad_norm",
    "per_device_train_batch_size": "the batch of a step over all devices is sft.batch or dpo.batch; microbatches splits it",
    "train_batch_size": "sft.batch, dpo.batch",
    "batch_size": "sft.batch, dpo.batch",
    "per_device_eval_batch_size": "eval.batch",
    "eval_batch_size": "eval.batch",
    "gradient_accumulation_steps": "sft.microbatches, dpo.microbatches: parts of a batch; sft.batch is of a whole step",
    "num_train_epochs": "sft.epochs, dpo.epochs",
    "n_epochs": "sft.epochs, dpo.epochs",
    "max_steps": "sft.steps, dpo.steps",
    "n_examples": _STEPS,
    "bf16": "run.precision bfloat16",
    "fp16": _HALF,
    "tf32": "run.precision float32 is float32 on every chip, never TF32; run.precision bfloat16 is faster",
    "dtype": "run.precision",
    "torch_dtype": "run.precision",
    "mixed_precision": "run.precision bfloat16; parameters and optimizer state stay float32",
    "gradient_checkpointing": "model.remat full, or save_attention",
    "attn_implementation": _KERNEL,
    "use_flash_attention_2": _KERNEL,
    "use_liger_kernel": "the head is computed in chunks in any case; " + _KERNEL,
    "loss_type": "dpo.loss",
    "label_smoothing_factor": "dpo.label_smoothing",
    "ref_model": "dpo.reference; without it the reference is the starting policy, dpo.policy",
    "ref_model_name_or_path": "dpo.reference; without it the reference is the starting policy, dpo.policy",
    "precompute_ref_log_probs": "always so: the reference pass is cached (dpo-jax refs)",
    "sync_ref_model": "dpo.refresh_reference_steps, which replaces the reference by the policy; weights are not mixed",
    "ref_model_sync_steps": "dpo.refresh_reference_steps",
    "ref_model_mixup_alpha": "dpo.refresh_reference_steps replaces the reference by the policy: an alpha of 1",
    "model_name_or_path": "model.path (the start of sft), dpo.policy (the start of dpo), eval.policy, sample.policy",
    "name_or_path": "model.path (the start of sft), dpo.policy (the start of dpo)",
    "archive": "dpo.policy, a Hugging Face folder",
    "tokenizer_name_or_path": "tokenizer.path",
    "trust_remote_code": "code of a model is never run",
    "dataset_name": _DATA,
    "datasets": _DATA,
    **dict.fromkeys(("prompt_column", "chosen_column", "rejected_column", "system_column", "column_mapping"), "data.columns"),
    **dict.fromkeys(
        ("prompt_key", "input_key", "chosen_key", "rejected_key", "columns_mapping", "rename_columns"), "data.columns"
    ),
    "dataset_config": "data.config",
    "dataset_revision": "data.revision",
    "dataset_mixture": "data.mix",
    "test_split_size": "data.test_share",
    "dataset_train_split": "data.train_split",
    "dataset_test_split": "data.test_split",
    "max_completion_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "truncation_mode": "data.truncation",
    "packing": "data.layout packed, which is the default",
    "padding_free": "data.layout packed, which is the default",
    "group_by_length": "data.layout packed, which is the default",
    "output_dir": "run.dir",
    "logging_dir": "run.dir",
    "local_run_dir": "run.dir",
    "run_name": "run.dir, one for each run",
    "exp_name": "run.dir, one for each run",
    "overwrite_output_dir": "another run.dir",
    "data_seed": "run.seed",
    "logging_steps": "every step is in metrics.jsonl of the run directory",
    "save_steps": "run.save_every_steps",
    "save_strategy": _SAVES,
    "save_total_limit": "run.max_to_keep",
    "eval_steps": "run.eval_every_examples, in training examples",
    "eval_every": "run.eval_every_examples",
    "eval_strategy": _EVALS,
    "evaluation_strategy": _EVALS,
    "do_eval": _EVALS,
    "do_train": "the commands sft and dpo train",
    "report_to": "run.tensorboard, run.wandb, run.trackio",
    "project": "run.wandb",
    "resume_from_checkpoint": "run.resume, which is on: the same command continues",
    "fsdp": _SHARDED,
    "deepspeed": _SHARDED,
    "tensor_parallel_size": "mesh.tensor, with run.devices mesh",
    **dict.fromkeys(("context_parallel_size", "cp_size", "sequence_parallel_size"), "mesh.context, with run.devices mesh"),
    "fsdp_policy_mp": "run.precision bfloat16",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    **dict.fromkeys(("lora", "use_peft", "peft", "peft_config", "lora_task_type"), _LORA),
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    **dict.fromkeys(("lora_target_modules", "target_modules"), "lora.targets"),
    "use_rslora": "lora.rslora",
    "lora_dropout": "adapters have no dropout here: at step 0 the policy must be its reference",
    "use_dora": "DoRA is not offered; lora.rank trains a plain adapter",
    **dict.fromkeys(("freeze", "unfrozen_parameters", "freeze_layers"), "sft.trainable, dpo.trainable"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"), _QUANTIZED),
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers", "remove_unused_columns", "disable_dropout"), _NOTHING),
    **dict.fromkeys(("ddp_find_unused_parameters", "dataloader_pin_memory", "padding_value"), _NOTHING),
    **dict.fromkeys(("num_generations", "num_samples"), "sample.prompts, eval.samples"),
    "max_new_tokens": "sample.max_new_tokens, eval.max_new_tokens",
    "num_epochs": "sft.epochs, dpo.epochs",
    "reference_model": "dpo.reference; without it the reference is the starting policy, dpo.policy",
    "model_revision": "org/name@revision in model.path or dpo.policy",
    "config": "the YAML file is the first word after the command",
    "shuffle_dataset": "every epoch is shuffled, by run.seed",
    **dict.fromkeys(("rpo_alpha", "loss_weights"), "dpo.loss as a weighted sum, such as dpo + 0.1*sft"),
    "f_divergence_type": "dpo.f_divergence",
    "f_alpha_divergence_coef": "dpo.f_alpha",
    "simpo_gamma": "dpo.gamma",
    "use_weighting": "dpo.wpo",
    **dict.fromkeys(("chat_template", "chat_template_path", "eos_token"), "the tokenizer's own; change it in its folder"),
}


def instead(word: str, options: Collection[str]) -> str | None:
    """The equivalent of an unknown flag or key `word`, or None if there is none.

    `options` are the dotted options to choose from, such as "dpo.lr": those that a command reads, or all.
    """
    name = word.lstrip("-").replace("-", "_").lower()
    last = name.rpartition(".")[2]
    for key in (name.replace(".", "_"), name.partition(".")[0] if "." in name else name, last, last.removeprefix("no_")):
        if key in WORDS:
            return _told(WORDS[key], options, section=name.partition(".")[0])
    own = [option for option in options if last in (option.partition(".")[2], option.replace(".", "_"))]
    return " or ".join(own) if own else None


def as_flags(answer: str, options: Collection[str]) -> str:
    """An answer with its options as flags, ready to be typed: "dpo.max_grad_norm" becomes "--dpo.max-grad-norm"."""
    known = set(options)

    def flag(match: re.Match[str]) -> str:
        return f"--{match[0].replace('_', '-')}" if match[0] in known else match[0]

    return re.sub(r"\b[a-z_]+\.[a-z_]+\b", flag, answer)


def _told(answer: str, options: Iterable[str], *, section: str) -> str:
    """The options in an answer that are among `options`; of these, those of `section`, if any."""
    listed, _, rest = answer.partition(":")
    named = listed.split(", ")
    if not all(part.replace(".", "").replace("_", "").isalnum() and part.count(".") == 1 for part in named):
        return answer
    known = set(options)
    chosen = [part for part in named if part in known] or named
    chosen = [part for part in chosen if part.startswith(f"{section}.")] or chosen
    return " or ".join(chosen) + (f":{rest}" if rest else "")
