"""Answers to the option names and values of TRL and its relatives, in flags and in files."""

import re

import pytest

from dpo_jax.cli import main as program
from dpo_jax.cli import words
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config, ConfigError, every_option, load_config
from dpo_jax.cli.config.file import types_of
from dpo_jax.cli.flags import parse
from dpo_jax.cli.word_table import VALUES, WORDS

SMALL = "run: {dir: runs/test}\ndata: {source: reviews}\nmodel: {family: gpt_neox, width: 64, layers: 2, heads: 4}\n"
TYPED = re.findall(
    r"\S+",
    """
    model_revision f_divergence_type ld_alpha chat_template_path eos_token adam_beta1 max_new_tokens reference_model
    load_best_model_at_end metric_for_best_model shuffle_dataset num_epochs config rpo_alpha
    learning_rate gradient_accumulation_steps per_device_train_batch_size bf16 fp16 loss_type lr_scheduler_type
    num_train_epochs push_to_hub lora_r lora_alpha use_peft max_length max_prompt_length beta output_dir model_name_or_path
    dataset_name logging_steps save_steps save_total_limit eval_steps eval_strategy report_to gradient_checkpointing
    warmup_ratio warmup_steps optim weight_decay max_grad_norm max_steps seed precompute_ref_log_probs attn_implementation
    torch_dtype label_smoothing dataset_train_split truncation_mode deepspeed fsdp load_in_4bit resume_from_checkpoint
    ref_model trust_remote_code hub_model_id model.name_or_path loss.beta n_epochs exp_name eval_every
    router_aux_loss_coef precompute_ref_batch_size completion_only_loss assistant_only_loss neftune_noise_alpha
    gradient_checkpointing_kwargs model_init_kwargs logging_first_step logging_strategy hub_private_repo hub_strategy
    hub_revision greater_is_better save_only_model torch_compile use_cpu fsdp_config full_determinism dataloader_drop_last
    dataset_streaming streaming gamma_beta_ratio wandb_entity lora_modules_to_save generate_during_eval eval_on_start
    auto_find_batch_size activation_offloading run_name load_in_8bit
    accelerate_config config_file num_machines dataset_kwargs use_logits_to_keep label_pad_token_id padding_side
    max_target_length is_encoder_decoder kl_coef num_ppo_epochs missing_eos_penalty reward_model_name_or_path reward_funcs
    reward_weights num_iterations use_vllm vllm_mode vllm_gpu_memory_utilization split name data.split data.name
    """,
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    return "small.yaml"


@pytest.mark.parametrize("word", TYPED)
def test_what_users_of_trl_type_has_an_answer(word):
    """The same in any spelling."""
    spellings = {word, f"--{word}", f"--{word.replace('_', '-')}", word.upper()}
    (answer,) = {words.instead(spelling, every_option()) for spelling in spellings}
    assert answer


def test_answers_name_options_that_there_are():
    every, values = set(every_option()), [answer for of in VALUES.values() for answer in of.values()]
    assert set(VALUES) <= every
    for text in (*WORDS.values(), *values):
        named = set(re.findall(r"(?<![\w*])[a-z]+\.[a-z_]+\b", text.replace("metrics.jsonl", "")))
        assert not named - every, text
        for option in re.findall(r"\*(\.[a-z_]+)", text):
            assert {f"{section}{option}" for section in words.TRAINED} <= every, text
        flags = words.as_flags(text, every)
        assert all(f"--{option.replace('_', '-')}" in flags for option in named)
    assert all(word == word.lower() for word in WORDS)


@pytest.mark.parametrize("command", ["sft", "dpo", "eval", "sample"])
def test_answers_for_a_command_name_its_own_section(command):
    """`dpo` refuses the options of `sft`, so its answers must not name them."""
    read = [entry.partition(".")[0] for entry in COMMANDS[command].reads]
    options = [option for option in every_option() if option.partition(".")[0] in read]
    for word in ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "num_train_epochs"):
        answer = words.instead(word, options)
        assert answer is not None
        assert "*" not in answer
        if command in words.TRAINED:
            (other,) = set(words.TRAINED) - {command}
            assert f"{command}." in answer
            assert f"{other}." not in answer


def told(args, capsys):
    assert program.main(args) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (
            ["--gradient_accumulation_steps", "8"],
            "--dpo.microbatches: into how many parts a batch is split; --dpo.batch = ",
        ),
        (["--truncation-mode", "keep_start"], "--data.truncation, where completions is TRL's keep_start"),
        (["--load-in-4bit"], "--lora.base-dtype bfloat16 halves the frozen weights; --model.remat full"),
        (["--lora.r", "8"], "--lora.rank"),
        (["--lora.modules-to-save", "lm_head"], "not offered: with --lora.rank only the adapter is trained"),
        (["--dpo.schedule", "constant_with_warmup"], "constant, with --dpo.warmup-steps or --dpo.warmup-ratio"),
        (["--dpo.schedule=cosine_with_restarts"], "not offered; cosine, without restarts"),
        (["--dpo.optimizer", "adamw_torch_fused"], "unknown value; instead: adamw\n"),
        (["--dpo.optimizer", "paged_adamw_8bit"], "optimizer states are not offered. --dpo.param-dtype bfloat16"),
        (["--lora.rank", "8", "--lora.targets", "all-linear"], "--lora.targets all-linear: unknown value; instead: all\n"),
        (["--dpo.loss", "kto_pair"], "instead: kto, "),
        (["--dpo.warmup-steps", "0.1"], "instead: --dpo.warmup-ratio 0.1, which is a share of the run"),
        (["--dpo.loss", "sigmoid", "sft"], "a sum, written as one text: sigmoid + sft"),
        (["--dpo.loss", "[sigmoid,sft]"], "a sum, written as one text: sigmoid + sft"),
        (["--run.precision", "bf16"], "instead: bfloat16\n"),
        (["--dpo-reference", "x"], "--dpo-reference: unknown option; instead: --dpo.reference\n"),
    ],
)
def test_flags_are_answered(small, capsys, args, answer):
    assert answer in told(["dpo", small, *args], capsys)


@pytest.mark.parametrize("typed", ["--lora.rnak", "--lora.target"])
def test_a_slip_in_our_own_section_is_no_foreign_word(small, capsys, typed):
    assert words.instead(typed, every_option()) is None
    err = told(["dpo", small, typed, "8"], capsys)
    assert "--lora." in err
    assert "set lora.rank to train an adapter" not in err


def test_words_of_data_are_answered_where_they_are_typed(tmp_path):
    """`split` is near to test_split, and means the train split."""
    path = tmp_path / "trl.yaml"
    path.write_text("data:\n  mix:\n  - path: a\n    split: train\n  - path: b\n    name: c\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, second = str(caught.value).splitlines()
    assert first.endswith("data.mix[1].split: unknown key; instead: train_split")
    assert second.endswith("data.mix[2].name: unknown key; instead: config")
    assert words.instead("--data.split", every_option()) == "data.train_split"
    assert words.instead("model.name", every_option()) is None


def test_unknown_flags_are_all_listed_beside_an_answered_one(small, capsys):
    flags = ["--num_processes", "8", "--nothing-of-the-kind", "--dpo.betta", "3", "--run.no-resume"]
    first, *others = told(["dpo", small, *flags], capsys).splitlines()
    assert first.startswith("dpo-jax: --num_processes: unknown option; instead: --run.devices mesh takes all devices")
    assert others == ["--nothing-of-the-kind: unknown option", '--dpo.betta: unknown option; did you mean "--dpo.beta"?']


@pytest.mark.parametrize(
    ("in_file", "flags", "given"),
    [
        ({"warmup_steps": 10}, ["--dpo.warmup-ratio", "0.1"], (150, 0.1, 1, None)),
        ({"warmup_steps": 10}, ["--dpo.warmup-ratio=0.1", "--dpo.warmup_steps=0"], (0, 0.1, 1, None)),
        ({"warmup_ratio": 0.1}, ["--dpo.warmup-steps", "0"], (0, None, 1, None)),
        ({"epochs": 2}, ["--dpo.steps", "3"], (150, None, 1, 3)),
        ({"steps": 3}, ["--dpo.epochs", "1"], (150, None, 1, None)),
        ({"steps": 3}, ["--dpo.lr", "1"], (150, None, 1, 3)),
        ({"epochs": 2}, ["--dpo.steps", "None"], (150, None, 2, None)),
    ],
)
def test_a_flag_displaces_its_alternative_in_the_file(small, tmp_path, capsys, in_file, flags, given):
    (tmp_path / small).write_text(f"{SMALL}dpo: {in_file}\n")
    section = parse("dpo", [small, *flags]).dpo
    assert (section.warmup_steps, section.warmup_ratio, section.epochs, section.steps) == given
    (other,) = in_file
    replaced = getattr(section, other) == getattr(Config().dpo, other)
    assert (f"replaces dpo.{other}" in capsys.readouterr().err) == replaced


def test_alternatives_beside_each_other_are_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"set warmup_ratio or warmup_steps, not both \(warmup_steps is 7\)"):
        parse("dpo", [small, "--dpo.warmup-ratio", "0.1", "--dpo.warmup-steps", "7"])
    (tmp_path / small).write_text(f"{SMALL}dpo: {{steps: 3, epochs: 2}}\n")
    with pytest.raises(ConfigError, match="set steps or epochs, not both"):
        parse("dpo", [small, "--dpo.lr", "1"])


def test_what_is_near_to_an_option_is_still_suggested(small, capsys):
    assert "--dpo.beta FLOAT" in told(["dpo", small, "--dpo.betta", "3"], capsys)
    assert words.instead("--nothing-of-the-kind", every_option()) is None


def test_a_whole_command_of_trl_is_answered_at_once(small, capsys):
    """`trl dpo` takes flags only; without a configuration the answers are the same."""
    flags = ["--model_name_or_path", "org/name", "--dataset_name", "org/pairs", "--learning_rate", "5.0e-7", "--use_peft"]
    first, *lines = told(["dpo", *flags], capsys).splitlines()
    assert first.startswith("dpo-jax: dpo needs a configuration file as its first argument; `dpo-jax init my.yaml` writes one")
    assert [line.partition(":")[0] for line in lines] == flags[::2]
    assert lines == told(["dpo", small, *flags], capsys).removeprefix("dpo-jax: ").splitlines()


def test_a_file_of_trl_is_answered_at_once(tmp_path):
    path = tmp_path / "trl.yaml"
    text = "learning_rate: 1e-6\nmodel_name_or_path: a/b\nrunn: {}\nbeat: 3\ndpo:\n  learning_rate: 1\n  lr: x\n  beat: 1\n"
    path.write_text(text + "  loss: [sigmoid, sft]\n  optimizer: adamw_torch\nlora: {targets: all-linear}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).replace(str(path), "f").splitlines()
    assert lines[0] == "f:1: learning_rate: unknown option; instead: sft.lr or dpo.lr or frontier.ppo_lr"
    assert lines[1].startswith("f:2: model_name_or_path: unknown option; instead: model.path")
    assert lines[2].startswith('f:3: runn: unknown section; did you mean "run"? (the configuration has: run, mesh, ')
    assert lines[3] == "f:4: beat: unknown section"
    assert lines[4] == "f:6: dpo.learning_rate: unknown key; instead: dpo.lr"
    assert lines[5] == "f:7: dpo.lr: expected a number, got the text 'x'"
    assert lines[6].startswith('f:8: dpo.beat: unknown key; did you mean "beta"? (section dpo has: ')
    assert lines[7].startswith(
        "f:9: dpo.loss: unknown value 'sigmoid, sft'; instead: a sum, written as one text: sigmoid + sft"
    )
    assert lines[8] == "f:10: dpo.optimizer: unknown value 'adamw_torch'; instead: adamw"
    assert lines[9:] == ["f:11: lora.targets: unknown value 'all-linear'; instead: all"]


def test_many_problems_are_counted(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text("".join(f"a{number}: 1\n" for number in range(5_000)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines()[20:] == [f"{path}: and 4,980 more"]


def test_no_value_of_ours_is_taken_for_a_foreign_one():
    for option, values in VALUES.items():
        section, _, field = option.partition(".")
        ours = getattr(types_of(types_of(Config)[section])[field], "__args__", ())
        assert not set(ours) & set(values)
    for loss in ("sigmoid", "dpo + 0.1*sft", "0.8*sigmoid + sft"):
        assert words.instead_of_value("dpo.loss", loss, every_option()) is None


@pytest.mark.parametrize(("command", "here"), [("kto", "--dpo.loss kto"), ("reward", "reward-model"), ("grpo", "not offered")])
def test_commands_of_trl_are_answered(command, here, capsys):
    assert program.main([command, "my.yaml"]) == 2
    assert here in capsys.readouterr().err


def test_options_that_no_section_of_a_command_has_are_said_to_be_unread():
    assert words.instead("--f_divergence_type", {"sft.lr"}) == "dpo.f_divergence, which this command does not read"
    assert words.instead("--loss_type", {"sft.lr", "sft.loss"}) == "sft.loss"
    assert words.instead("--num_train_epochs", {"frontier.reward_model_epochs"}) == "frontier.reward_model_epochs"


@pytest.mark.parametrize(
    "flags",
    [
        ["--dpo.beta", "0.2"],
        ["--dpo.beta=0.2", "--run.seed", "3"],
        ["--dpo.warmup-steps", "5", "--dpo.warmup_steps", "7"],
        ["--data.max-train", "None"],
        ["--run.no-resume"],
        ["--lora.rank", "4"],
    ],
    ids=" ".join,
)
def test_a_parser_of_the_named_options_gives_what_that_of_all_gives(flags, small, monkeypatch):
    """It is built ten times faster."""
    few = parse("dpo", [str(small), *flags])
    monkeypatch.setattr("dpo_jax.cli.flags._only_named", lambda flags, shown: shown)
    assert parse("dpo", [str(small), *flags]) == few
