"""The table of option names and values of TRL, transformers, PEFT and the original DPO code, with their equivalents here.

`words` looks them up, and `configs/FROM_TRL.md` prints them (`markdown`). To add a name, add a line to `WORDS`.
"""

from __future__ import annotations

from collections.abc import Mapping

_LORA = "set lora.rank to train an adapter"
_QUANTIZED = (
    "4- and 8-bit weights are not offered. lora.base_dtype bfloat16 halves the frozen weights; model.remat full saves "
    "activations"
)
_EIGHT_BITS = (
    "adamw; 8-bit and paged optimizer states are not offered. *.param_dtype bfloat16, model.remat full and *.microbatches save "
    "memory"
)
_SHARDED = "parameters are sharded with run.devices mesh and mesh.fsdp"
_SAVES = "checkpoints are saved by run.save_every_steps or run.save_every_minutes, and at the end"
_EVALS = "evaluation runs by run.eval_every_examples, and at the end"
_LOGGED = "every step is in metrics.jsonl of the run directory"
_HUB = "training uploads nothing; afterwards: dpo-jax export CONFIG --push NAME"
_DATA = "data.path, a local file or folder, or a data set of the Hub by its name; data.mix for several"
_STREAMED = "not offered: data are read whole; data.max_train takes the first rows only"
_HALF = "float16 is not offered; run.precision bfloat16"
_LENGTH = "data.max_length (prompt and completion) and data.max_prompt_length"
_KERNEL = "model.attention; auto takes the fastest for the device"
_STEPS = "sft.steps, dpo.steps, sft.epochs, dpo.epochs, data.max_train"
_SAMPLED = "nothing to set: completions are sampled in JAX, by the devices that train"
_HOSTS = "run.distributed auto joins the processes of several hosts; run.heartbeat_seconds is the timeout"
_SHUFFLED = "every epoch is shuffled, by run.seed"
_COMPILED = "every step is compiled; nothing needs to be set"
_SCORED = "sft.scored: completion, or all tokens"
_CALLBACKS = "metrics and callbacks of your own are arguments of dpo_jax.train, in Python"
_NOTHING = "nothing needs to be set for that here"
_SCHEDULE = "*.schedule; TRL's linear with warm-up is wsd, with *.decay_ratio 1 - the share of warm-up"

# Other programs' names -> our options, separated by commas, or a sentence. "*.lr" is lr of section sft and of section dpo.
# Answers for a command name only options it reads.
OF_TRL: Mapping[str, str] = {
    "kto": "dpo-jax dpo CONFIG --dpo.loss kto",
    "reward": "dpo-jax reward-model CONFIG",
    "rloo": "not offered; dpo-jax ppo and dpo-jax online sample from the policy as well",
    "grpo": "not offered; dpo-jax ppo and dpo-jax online sample from the policy as well",
}
"""Commands of TRL that have another name here."""
WORDS: Mapping[str, str] = {
    "learning_rate": "*.lr, frontier.ppo_lr",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), _SCHEDULE),
    "warmup_ratio": "*.warmup_ratio",
    "optim": "*.optimizer",
    "weight_decay": "*.weight_decay",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), "b1, b2 and eps of section sft or dpo, with optimizer adamw"),
    "optim_args": "b1, b2, eps and momentum of section sft or dpo",
    "lr_scheduler_kwargs": "min_lr_ratio and decay_ratio of section sft or dpo, with schedule cosine or wsd",
    "early_stopping_patience": "*.patience",
    "metric_for_best_model": "*.stop_on, with *.keep_best or *.patience",
    "greater_is_better": "follows from *.stop_on: rewards/accuracies and rewards/margins are better when higher, losses when "
    "lower",
    "load_best_model_at_end": "*.keep_best",
    "gradient_clipping": "*.max_grad_norm",
    "per_device_train_batch_size": "*.batch: examples per optimizer step, TRL's per-device batch x accumulation x devices; "
    "*.microbatches splits it",
    **dict.fromkeys(("train_batch_size", "batch_size"), "*.batch"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "*.batch during training; eval.batch in dpo-jax eval"),
    "precompute_ref_batch_size": "refs.batch",
    "gradient_accumulation_steps": "*.microbatches: into how many parts a batch is split; *.batch = TRL's per-device batch x "
    "accumulation x devices",
    "auto_find_batch_size": "*.microbatches splits a batch; an out-of-memory error lists options that need less, and "
    "dpo-jax plan CONFIG computes the memory of a step",
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "*.epochs, frontier.reward_model_epochs"),
    "max_steps": "*.steps",
    "n_examples": _STEPS,
    **dict.fromkeys(("bf16", "bf16_full_eval"), "run.precision bfloat16"),
    **dict.fromkeys(("fp16", "fp16_full_eval"), _HALF),
    "tf32": "run.precision float32 is float32 on every chip, never TF32; run.precision bfloat16 is faster",
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        "run.precision (activations), *.param_dtype (trained parameters), lora.base_dtype (frozen parameters)",
    ),
    "mixed_precision": "run.precision bfloat16; parameters and optimizer state stay float32",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "model.remat full, or save_attention"),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), "model.remat, which has no further options"
    ),
    "activation_offloading": "not offered; model.remat full recomputes activations instead of keeping them",
    **dict.fromkeys(("attn_implementation", "use_flash_attention_2"), _KERNEL),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "the head is computed in chunks in any case; " + _KERNEL),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    "neftune_noise_alpha": "noise on embeddings (NEFTune) is not offered",
    "loss_type": "*.loss",
    "label_smoothing_factor": "smoothing of tokens is not offered; dpo.label_smoothing is the share of swapped labels",
    **dict.fromkeys(
        ("ref_model", "ref_model_name_or_path", "reference_model"),
        "dpo.reference; without it the reference is the starting policy, dpo.policy",
    ),
    "precompute_ref_log_probs": "always on: the reference pass is cached (dpo-jax refs)",
    "sync_ref_model": "dpo.refresh_reference_steps, which replaces the reference by the policy; weights are not mixed",
    "ref_model_sync_steps": "dpo.refresh_reference_steps",
    "ref_model_mixup_alpha": "dpo.refresh_reference_steps replaces the reference by the policy: an alpha of 1",
    "router_aux_loss_coef": "*.router_aux_loss",
    "model_name_or_path": "model.path (the start of sft), dpo.policy (the start of dpo; model means model.path), eval.policy, "
    "sample.policy",
    "name_or_path": "model.path (the start of sft), dpo.policy (the start of dpo)",
    "archive": "dpo.policy, a Hugging Face folder",
    "model_revision": "org/name@revision in model.path or dpo.policy",
    "model_init_kwargs": "each has an option of its own: org/name@revision in model.path or dpo.policy, run.precision and "
    "*.param_dtype, model.attention",
    "tokenizer_name_or_path": "tokenizer.path",
    "trust_remote_code": "custom model code never runs",
    **dict.fromkeys(("dataset_name", "datasets", "data_files", "data_dir"), _DATA),
    **dict.fromkeys(
        ("prompt_column", "chosen_column", "rejected_column", "system_column", "column_mapping", "dataset_text_field"),
        "data.columns",
    ),
    **dict.fromkeys(
        ("prompt_key", "input_key", "chosen_key", "rejected_key", "columns_mapping", "rename_columns"), "data.columns"
    ),
    **dict.fromkeys(("dataset_config", "name"), "data.config"),
    "dataset_revision": "data.revision",
    "dataset_mixture": "data.mix",
    "fraction": "weight of an entry of data.mix: 0.5 takes half of its rows, where TRL's shares add up to the mixture",
    "test_split_size": "data.test_share",
    **dict.fromkeys(("dataset_train_split", "split"), "data.train_split"),
    "dataset_test_split": "data.test_split",
    **dict.fromkeys(("streaming", "dataset_streaming"), _STREAMED),
    **dict.fromkeys(("max_completion_length", "max_seq_length", "max_target_length"), _LENGTH),
    "truncation_mode": "data.truncation, where completions is TRL's keep_start, its default; its keep_end is not offered",
    **dict.fromkeys(("padding_free", "group_by_length"), "data.layout packed, which is the default"),
    **dict.fromkeys(
        ("packing", "packing_strategy", "eval_packing"),
        "data.layout packed, which is the default. A batch counts examples, where TRL's counts packed rows; a text beyond "
        "data.max_length is cut, as by TRL's bfd (bfd_split and wrapped are not offered)",
    ),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), _SCORED),
    **dict.fromkeys(("output_dir", "logging_dir", "local_run_dir"), "run.dir"),
    **dict.fromkeys(
        ("run_name", "exp_name"),
        "run.dir, one for each run; the run in Weights & Biases or Trackio is named after it (or by WANDB_NAME)",
    ),
    "overwrite_output_dir": "another run.dir",
    "data_seed": "run.seed",
    "full_determinism": "a run is determined by run.seed; on GPUs XLA_FLAGS=--xla_gpu_deterministic_ops=true also fixes the "
    "order of sums",
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step", "log_on_each_node"), _LOGGED),
    "save_steps": "run.save_every_steps",
    "save_strategy": _SAVES,
    "save_total_limit": "run.max_to_keep",
    "save_only_model": "checkpoints always hold the optimizer state, and run.max_to_keep of them are kept; exports hold the "
    "model alone",
    "eval_steps": "run.eval_every_examples, in training examples",
    "eval_every": "run.eval_every_examples",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "do_eval"), _EVALS),
    "eval_on_start": "run.eval_at_start",
    "do_first_eval": "run.eval_at_start",
    "eval_delay": _EVALS,
    "generate_during_eval": "dpo.eval_samples: the number of held-out prompts to complete at each evaluation",
    "sample_during_eval": "dpo.eval_samples: the number of held-out prompts to complete at each evaluation",
    "n_eval_model_samples": "dpo.eval_samples",
    "do_train": "the commands sft and dpo train",
    "do_predict": "dpo-jax sample CONFIG",
    "report_to": "run.tensorboard, run.wandb, run.trackio; others (mlflow, comet, swanlab, clearml) are not offered",
    **dict.fromkeys(("project", "wandb_project"), "run.wandb, run.trackio"),
    "wandb_entity": "WANDB_ENTITY in the environment (wandb reads WANDB_TAGS and its other variables as well)",
    "trackio_space_id": "TRACKIO_SPACE_ID in the environment",
    "resume_from_checkpoint": "run.resume, on by default: rerun the command to continue from the newest checkpoint",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config"), _SHARDED),
    **dict.fromkeys(("accelerate_config", "config_file"), _SHARDED),
    "num_processes": "run.devices mesh takes all devices of a machine (run.num_processes is the number of machines)",
    "num_machines": "run.num_processes, with run.distributed auto",
    "machine_rank": "run.process_id, with run.distributed auto",
    **dict.fromkeys(("main_process_ip", "main_process_port"), "run.coordinator HOST:PORT, with run.distributed auto"),
    "tensor_parallel_size": "mesh.tensor, with run.devices mesh",
    **dict.fromkeys(("context_parallel_size", "cp_size", "sequence_parallel_size"), "mesh.context, with run.devices mesh"),
    "fsdp_policy_mp": "run.precision bfloat16",
    "use_cpu": "JAX_PLATFORMS=cpu in the environment",
    **dict.fromkeys(("local_rank", "ddp_backend", "ddp_timeout"), _HOSTS),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_always_push"), _HUB),
    "hub_private_repo": "repositories are private unless export.public is set; " + _HUB,
    "hub_revision": "uploads go to the main branch; " + _HUB,
    **dict.fromkeys(("lora", "use_peft", "peft", "peft_config", "lora_config", "lora_task_type"), _LORA),
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    **dict.fromkeys(("lora_target_modules", "target_modules"), "lora.targets"),
    **dict.fromkeys(
        ("lora_modules_to_save", "modules_to_save"), "not offered: with lora.rank only the adapter is trained; lora.targets"
    ),
    "lora_target_parameters": "lora.targets, which names linear layers; experts have no adapters",
    "use_rslora": "lora.rslora",
    "lora_dropout": "adapters have no dropout here: at step 0 the policy must be its reference",
    "use_dora": "DoRA is not offered; lora.rank trains a plain adapter",
    **dict.fromkeys(("freeze", "unfrozen_parameters", "freeze_layers"), "*.trainable"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"), _QUANTIZED),
    "bnb_4bit_quant_storage": _QUANTIZED,
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers", "remove_unused_columns", "disable_dropout"), _NOTHING),
    **dict.fromkeys(("ddp_find_unused_parameters", "dataloader_pin_memory", "padding_value", "pad_token"), _NOTHING),
    **dict.fromkeys(("pad_to_multiple_of", "disable_tqdm", "skip_memory_metrics", "use_cache"), _NOTHING),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps"), _NOTHING),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ignore_bias_buffers"), _NOTHING),
    **dict.fromkeys(("dataloader_in_order", "dataloader_multiprocessing_context", "save_on_each_node"), _NOTHING),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _NOTHING),
    **dict.fromkeys(("ignore_data_skip", "average_tokens_across_devices", "dataset_kwargs"), _NOTHING),
    **dict.fromkeys(("label_pad_token_id", "padding_side", "use_logits_to_keep"), _NOTHING),
    "is_encoder_decoder": "not offered; models are decoders only",
    **dict.fromkeys(("label_names", "prediction_loss_only", "log_level", "log_level_replica", "debug"), _NOTHING),
    **dict.fromkeys(("batch_eval_metrics", "include_for_metrics", "restore_callback_states_from_checkpoint"), _CALLBACKS),
    "logging_nan_inf_filter": "a loss that is NaN or infinite ends the run with exit code 76; the last good checkpoint is kept",
    "include_num_input_tokens_seen": _LOGGED,
    "optim_target_modules": "*.trainable",
    "center_rewards_coefficient": "not offered; dpo-jax reward-model minimizes eq. 2",
    **dict.fromkeys(("trackio_bucket_id", "trackio_static_space_id"), "TRACKIO_SPACE_ID in the environment"),
    "dataloader_drop_last": "no example is dropped: the last batch of a run is padded, and padding has weight 0",
    "num_generations": "online.completions, frontier.completions: completions of a prompt",
    **dict.fromkeys(("use_vllm", "vllm_*"), _SAMPLED),
    **dict.fromkeys(("reward_model_name_or_path", "reward_model_path"), "ppo.reward_model, online.reward_model"),
    "reward_funcs": "frontier.reward, or a learned one: ppo.reward_model or online.reward_model; functions of your own are not "
    "offered",
    "reward_weights": "not offered; there is one reward",
    "kl_coef": "ppo.target_kl: the KL that the coefficient adapts to",
    **dict.fromkeys(("num_ppo_epochs", "num_iterations"), "frontier.ppo_epochs"),
    "num_mini_batches": "frontier.ppo_minibatches",
    "total_episodes": "frontier.ppo_iterations x frontier.ppo_batch",
    "response_length": "frontier.max_new_tokens",
    "missing_eos_penalty": "not offered",
    "num_samples": "sample.prompts, eval.samples",
    "max_new_tokens": "sample.max_new_tokens, eval.max_new_tokens",
    "config": "the YAML file is the first argument",
    **dict.fromkeys(("shuffle_dataset", "train_sampling_strategy"), _SHUFFLED),
    **dict.fromkeys(("rpo_alpha", "loss_weights"), "dpo.loss as a weighted sum, such as dpo + 0.1*sft"),
    "f_divergence_type": "dpo.f_divergence",
    "f_alpha_divergence_coef": "dpo.f_alpha",
    "simpo_gamma": "dpo.gamma",
    "gamma_beta_ratio": "dpo.gamma, which is this ratio x dpo.beta",
    "use_weighting": "dpo.wpo",
    "chat_template_path": "tokenizer.chat_template, a Jinja file; of another model, copy its chat_template.jinja",
    "eos_token": "the tokenizer's own: change it in tokenizer_config.json of its folder, and add its id to eos_token_id of the "
    "model's generation_config.json",
}

_WARM_UP = "constant, with *.warmup_steps or *.warmup_ratio"
_NO_SCHEDULE = "not offered; linear, cosine or wsd"
_SCHEDULES: Mapping[str, str] = {
    "constant_with_warmup": _WARM_UP,
    "cosine_with_restarts": "not offered; cosine, without restarts",
    "cosine_with_min_lr": "cosine, with *.min_lr_ratio",
    "warmup_stable_decay": "wsd, with *.decay_ratio",
    **dict.fromkeys(("polynomial", "inverse_sqrt", "reduce_lr_on_plateau"), _NO_SCHEDULE),
}
_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw", "paged_adamw_32bit"), _EIGHT_BITS),
}
_PRECISIONS: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp32": "float32",
    **dict.fromkeys(("fp16", "float16", "half"), "bfloat16; float16 is not offered"),
}

# Options -> other programs' values -> ours, or a sentence.
VALUES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("sft.schedule", "dpo.schedule"), _SCHEDULES),
    **dict.fromkeys(("sft.optimizer", "dpo.optimizer"), _OPTIMIZERS),
    "sft.loss": {**dict.fromkeys(("nll", "chunked_nll"), "mean"), "dft": "not offered; mean or sum"},
    "dpo.loss": {"kto_pair": "kto, on single completions; each pair is split"},
    "lora.targets": {"all-linear": "all"},
    "run.precision": _PRECISIONS,
    "model.attention": dict.fromkeys(
        ("flash_attention_2", "flash_attention_3", "sdpa", "eager"), "auto, which takes the fastest for the device"
    ),
}


def markdown() -> str:
    """The table as Markdown, for the documentation: names with the same answer share a row."""
    rows: dict[str, list[str]] = {}
    for word, answer in WORDS.items():
        rows.setdefault(answer.replace("*.", "dpo."), []).append(f"`{word}`")
    lines = ["| there | here |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {answer} |" for answer, names in rows.items()]
    lines += ["", "| option | value there | value here |", "|---|---|---|"]
    for option, values in VALUES.items():
        if option.startswith("sft.") and f"dpo.{option[4:]}" in VALUES and VALUES[f"dpo.{option[4:]}"] is values:
            continue  # the same for both
        told: dict[str, list[str]] = {}
        for value, answer in values.items():
            told.setdefault(answer.replace("*.", "dpo."), []).append(f"`{value}`")
        lines += [f"| `{option}` | {', '.join(names)} | {answer} |" for answer, names in told.items()]
    return "\n".join(lines) + "\n"
