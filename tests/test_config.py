"""The configuration file, the flags, the program's help, errors and exit codes, and every file in configs/."""

import ast
import dataclasses
import errno
import functools
import importlib
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from dpo_jax.cli import build
from dpo_jax.cli import main as program
from dpo_jax.cli.command_table import COMMANDS, module_of
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, dump_config, every_option, help_text, load_config, problems
from dpo_jax.cli.config.file import TextList, types_of
from dpo_jax.cli.exit_codes import EXIT_CODES, exit_code
from dpo_jax.cli.fixed import fix
from dpo_jax.cli.flags import parse
from dpo_jax.cli.preflight.scope import scope_of
from dpo_jax.loss_table import LOSSES

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OPTIONS = [
    (section.name, option.name) for section in dataclasses.fields(Config) for option in dataclasses.fields(section.default)
]
SMALL = """\
run: {dir: runs/test}
data: {source: reviews}
model:
  family: gpt_neox
  width: 64
  layers: 2
  heads: 4
  max_positions: 512
dpo:
  lr: 1e-6
  beta: 0.5
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Replaces what commands do by recording their config."""
    seen = []
    monkeypatch.chdir(tmp_path)  # relative run directories are made here

    class Stub:
        @staticmethod
        def run(config):
            seen.append(config)
            return 0

    monkeypatch.setattr(program.importlib, "import_module", lambda name: Stub)
    return seen


def error_of(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).replace(f"{path}", "bad.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "dpo:\n  beat: 1",
            r'bad.yaml:2: dpo.beat: unknown key; did you mean "beta"\? \(section dpo has: optimizer,',
        ),
        ("dop: {}", r'bad.yaml:1: dop: unknown section; did you mean "dpo"\?'),
        ("dpo:\n  learning_rate: 1", "bad.yaml:2: dpo.learning_rate: unknown key; instead: dpo.lr"),
        ("beta: 0.1", "bad.yaml:1: beta: unknown option; instead: dpo.beta or control.beta$"),
        ("peft: {r: 8}", "bad.yaml:1: peft: unknown section; instead: set lora.rank to train an adapter"),
        ("run: {bf16: true}", "run.bf16: unknown key; instead: run.precision bfloat16"),
        ("dpo: {1: 2}", "bad.yaml:1: dpo.1: unknown key"),
        ("dpo: {[1]: 2}", "bad.yaml:1: dpo.a list: unknown key"),
        ("dpo:\n  beta: 1\n  beta: 2", "bad.yaml:3: dpo.beta: set twice, first on line 2; keep one of them"),
        ("dpo: {}\ndpo: {}", "bad.yaml:2: dpo: set twice, first on line 1"),
        ("dpo: {beta: hi}", "dpo.beta: expected a number, got the text 'hi'"),
        ("dpo: {beta: '1'}", "dpo.beta: expected a number, got the text '1'"),
        ("dpo: {beta: true}", "dpo.beta: expected a number, got the truth value 'true'"),
        ("dpo: {beta: [1]}", "dpo.beta: expected a number, got a list"),
        ("dpo: {beta: null}", "dpo.beta: expected a number, got nothing"),
        ("dpo: {batch: 1.5}", "dpo.batch: expected a whole number, got the number '1.5'"),
        ("dpo: {batch: 1:30}", "dpo.batch: expected a whole number"),
        (
            "dpo: {loss: dpoo}",
            r"bad.yaml:1: dpo.loss: expected one of dpo, .*, or a sum .*, got the text 'dpoo'; did you mean \"dpo\"\?",
        ),
        ("model: {family: gptneo}", r"model.family: expected one of gpt2, .* or null, .* did you mean \"gpt_neox\"\?"),
        ("run: {dir: 12}", "run.dir: expected text, got the number '12'; put it in quotes: \"12\""),
        ("run: {dir: no}", "run.dir: expected text, got the truth value 'no'; put it in quotes"),
        ("run: {resume: 1}", "run.resume: expected true or false, got the number '1'"),
        ("run: {dir: !!python/object/apply:os.system [x]}", "run.dir: expected text, got a list"),
        ("run: {dir: !!python/name:os.system x}", "run.dir: expected text, got a value tagged"),
        ("model: {path: None}", "model.path: YAML writes none as null"),
        ("dpo: [1]", "bad.yaml:1: section dpo must be `key: value` lines, not a list"),
        ("- a", "bad.yaml:1: the configuration must be"),
        ("dpo:\n\tbeta: 1", "bad.yaml:2: not valid YAML"),
        ("dpo: {}\n---\nrun: {}", "bad.yaml:2: not valid YAML: but found another document"),
        (b"run: {dir: \xff}", "bad.yaml: not UTF-8 text"),
        ("run: {dir: a\0b}", "bad.yaml: not valid YAML"),
        ('run: {dir: "a\\0b"}', "bad.yaml:1: run.dir: the text holds a NUL, which no path can; write it in valid UTF-8"),
        ('run:\n  dir: "\\ud800"', "bad.yaml:2: run.dir: the text holds half a surrogate pair, which no path can"),
        ('judge: {model: "m\\udc80"}', "bad.yaml:1: judge.model: the text holds a byte that is not UTF-8, which no name can"),
        ("run: " + 5000 * "[", "bad.yaml: nested too deeply"),
        ("data: {test_split: train}", "bad.yaml:1: data.test_split: must differ from train_split, got 'train' for both"),
        ("dpo:\n\n  beta: -3", "bad.yaml:3: dpo.beta: must be greater than 0, got -3"),
        ("dpo: {lr: nan}", "bad.yaml:1: dpo.lr: must be a finite number"),
        ("dpo: {batch: 10, microbatches: 4}", r"dpo.microbatches: must divide batch \(10\), got 4"),
        ("data: {reviews_test: 1000000000}", "data.reviews_train: at most 10 million reviews"),
        ("dpo: {label_smoothing: 0.5}", "dpo.label_smoothing: must be at least 0 and below 0.5"),
        (
            "dpo: {loss: ipo, label_smoothing: 0.1}",
            "dpo.label_smoothing: loss ipo does not read it: leave it at 0.0, or use one that does .dpo, ",
        ),
        ("dpo: {loss: ipo, reference_free: true}", "dpo.reference_free: loss ipo does not read it: leave it at false"),
        ("dpo: {loss: unlikelihood}", "dpo.alpha: loss unlikelihood needs it"),
        ("dpo: {loss: unlikelihood, alpha: 1.5}", "dpo.alpha: must be between 0 and 1, got 1.5"),
        ("dpo: {alpha: 0.0}", "dpo.alpha: loss dpo does not read it: leave it at null, or use one that does .unlikelihood."),
        ("dpo: {loss: preferred_ft, alpha: 0}", "dpo.alpha: loss preferred_ft does not read it"),
        ("dpo: {loss: preferred_ft, beta: 0.5}", "dpo.beta: loss preferred_ft does not read it: leave it at 0.1"),
        (
            "dpo: {loss: unlikelihood, alpha: 1, reference_free: on}",
            "dpo.reference_free: loss unlikelihood .* leave it at false",
        ),
        ("dpo: {loss: unlikelihood, alpha: 1, label_smoothing: 0.1}", "dpo.label_smoothing: loss unlikelihood .* at 0.0"),
        ("dpo: {loss: exo_pair}", "dpo.label_smoothing: loss exo_pair needs it: assumed share of swapped labels"),
        ("dpo: {loss: dpo + 0.1*sfd}", r"dpo.loss: expected one of .*, got the text 'sfd'; did you mean \"sft\"\?"),
        ("dpo: {loss: dpo + -1*sft}", "dpo.loss: the weight of sft must be a number above 0, as in dpo . 0.1.sft, got '-1'"),
        ("dpo: {loss: dpo + 0.1*sft, gamma: 1}", "dpo.gamma: loss dpo . 0.1.sft does not read it: .* .simpo."),
        ("dpo: {ld_alpha: 1.5}", "dpo.ld_alpha: must be between 0 and 1, got 1.5"),
        ("dpo: {ld_alpha: 0.5, loss: dpo + 0.1*sft}", "dpo.ld_alpha: would weigh the tokens of the likelihood in sft as well"),
        ("dpo: {f_divergence: kl}", "dpo.f_divergence: expected one of reverse_kl, forward_kl"),
        ("dpo: {f_alpha: 0.3}", "dpo.f_alpha: belongs to f_divergence alpha_divergence"),
        ("dpo: {rpo_alpha: 1}", "dpo.rpo_alpha: unknown key; instead: dpo.loss as a weighted sum, such as dpo . 0.1.sft"),
        ("data: {max_length: 256}", "data.max_prompt_length: must be less than max_length .256., got 256"),
        ("data: {row_length: 64}", "data.row_length: must be at least max_length .512., got 64"),
        ("data: {max_dropped_share: 5}", "data.max_dropped_share: must be a share between 0 and 1"),
        ("data: {source: reviews, path: x}", "data.path: reviews are generated"),
        ("data: {test_split: ' '}", "data.test_split: must name a split"),
        ("model: {max_positions: 64}", "data.max_length: 512 tokens do not fit model.max_positions .64."),
        ("model: {width: 10, heads: 3}", "model.heads: must divide width .10."),
        ("model: {heads: 4, kv_heads: 3}", "model.kv_heads: must divide heads .4."),
        ("tokenizer: {vocab_size: 256}", "tokenizer.vocab_size: must be at least 257"),
        ("run: {seed: -1}", "run.seed: must be between 0 and"),
        ("run: {wandb: ''}", "run.wandb: must name a project"),
        ("sample: {top_p: 0}", "sample.top_p: must be above 0 and at most 1"),
    ],
)
def test_mistakes_name_file_line_field_and_remedy(tmp_path, text, expected):
    assert re.search(expected, error_of(tmp_path, text))


def test_no_text_holds_half_a_character_and_only_names_of_files_hold_bytes(tmp_path):
    """From YAML or from a flag. A file name that is not UTF-8 is one nevertheless, and its YAML gives it back."""
    names = []
    for section, option in OPTIONS:
        hint = types_of(types_of(Config)[section])[option]
        if not {str, TextList} & {hint, *typing.get_args(hint)}:
            continue
        for value in ("\ud800", "a\0", "a\udc80"):
            changed = dataclasses.replace(getattr(Config(), section), **{option: value})
            config = dataclasses.replace(Config(), **{section: changed})
            found = [message for name, message in problems(config) if name == f"{section}.{option}"]
            if any("the text holds" in message for message in found):
                continue
            assert value == "a\udc80", option
            names.append(f"{section}.{option}")
            assert yaml.safe_load(dump_config(config))[section][option] == value
    assert {"data.path", "run.dir", "judge.a", "study.b"} <= set(names)
    assert not {"judge.model", "judge.base_url", "data.train_split", "plan.topology", "bench.lengths"} & set(names)


def test_only_checkpoints_can_be_in_a_bucket():
    """A Path makes a local folder of gs://bucket, gs:/bucket."""
    written = [name for name in every_option() if re.search(r"\.(dir|out|rewards_out|cache|json|checkpoints)$", name)]
    assert len(written) >= 10
    for section, field in (name.split(".") for name in written):
        changed = dataclasses.replace(getattr(Config(), section), **{field: "gs://bucket/x"})
        found = [words for name, words in problems(dataclasses.replace(Config(), **{section: changed})) if name.endswith(field)]
        refused = "must be on a disk, which all hosts share; only run.checkpoints can be in a bucket, got gs://bucket/x"
        assert [words for words in found if "bucket" in words] == ([refused] if field != "checkpoints" else [])


def test_all_problems_are_told_at_once(tmp_path):
    message = error_of(tmp_path, "dpo:\n  batch: 0\n  warmup_steps: -1\nsft:\n  lr: 0\n")
    assert [line.split(":")[1] for line in message.splitlines()] == ["5", "2", "3"]


def test_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="nothing.yaml: cannot read the configuration: No such file"):
        load_config(tmp_path / "nothing.yaml")


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("dpo: {lr: 1e-6, beta: 1, batch: 1_024, max_grad_norm: +1e1}\nsft:\nrun: {resume: off, dir: 'no'}\n")
    config = load_config(path)
    assert (config.dpo.lr, config.dpo.beta, config.dpo.batch, config.dpo.max_grad_norm) == (1e-6, 1.0, 1024, 10.0)
    assert isinstance(config.dpo.beta, float)
    assert (config.run.resume, config.run.dir) == (False, "no")
    path.write_text("")
    assert load_config(path) == Config()


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.5, 1.0, 1.0, 1.0]), ("linear", [0.5, 0.75, 0.5, 0.25])])
def test_schedule_of_a_run(schedule, rates):
    rate = build.make_schedule(DpoConfig(lr=2.0, warmup_steps=1, schedule=schedule), steps=4)
    assert [float(rate(step)) for step in range(4)] == pytest.approx([2 * rate for rate in rates])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dump_loads_equal(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert yaml.safe_load(again.read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))  # a tuple is a list


def test_dump_keeps_awkward_texts(tmp_path):
    for text in ("null", "None", "no", "1e-6", "12", "a: b #c", "naïve ✓", "line\nbreak", "'\"", "~"):
        config = dataclasses.replace(Config(), dpo=DpoConfig(policy=text, lr=1e-7))
        path = tmp_path / "again.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


@functools.cache
def names_read():
    """Attributes and quoted names in the sources that may read an option. Where options are defined, checks do not count."""
    texts = []
    for file in (ROOT / "dpo_jax").rglob("*.py"):
        if file.parent != ROOT / "dpo_jax" / "cli" / "config":
            if file.name != "main.py":
                texts.append(file.read_text())
        elif file.name not in ("file.py", "loading.py", "sections.py"):
            tree = ast.parse(file.read_text())
            for section in ast.walk(tree):
                if isinstance(section, ast.ClassDef):
                    section.body = [node for node in section.body if getattr(node, "name", "") not in ("check", "missing")]
            texts.append(ast.unparse(tree))
    return {name for text in texts for pattern in (r"\.(\w+)", r"['\"](\w+)(?=['\"])") for name in re.findall(pattern, text)}


@pytest.mark.parametrize(("section", "option"), OPTIONS)
def test_every_option_is_explained_and_read(section, option):
    config_class = type(getattr(Config(), section))
    assert len(help_text(config_class, option)) > 10
    assert option in names_read(), f"nothing reads {section}.{option}"


def test_the_help_of_microbatches_names_all_losses_for_which_they_cost_time():
    names = [name for name, loss in LOSSES.items() if loss.whole_batch]
    assert f"({', '.join(sorted(names, key=lambda name: name != 'kto'))})" in help_text(DpoConfig, "microbatches")


def test_defaults_are_the_papers():
    assert problems(Config()) == []
    dpo, data = Config().dpo, Config().data
    assert (dpo.beta, dpo.batch, dpo.lr, dpo.optimizer, dpo.warmup_steps, dpo.max_grad_norm) == (
        0.1,
        64,
        1e-6,
        "rmsprop",
        150,
        10.0,
    )
    assert (data.max_length, data.max_prompt_length, data.truncation) == (512, 256, "keep_end")


# The program


def test_flags_override_the_file(small, ran):
    assert (
        program.main(["dpo", small, "--dpo.beta", "0.2", "--run.no-resume", "--data.max-train", "7", "--dpo.policy", "x"]) == 0
    )
    (config,) = ran
    assert (config.dpo.beta, config.run.resume, config.data.max_train, config.dpo.policy) == (0.2, False, 7, "x")
    assert (config.dpo.lr, config.run.dir) == (1e-6, "runs/test")
    assert program.main(["refs", small, "--data.max-train", "None"]) == 0
    assert ran[1] == fix(load_config(small))


def test_the_policy_may_be_the_model_itself(small, ran, capsys):
    started = ["--dpo.policy", "model"]
    assert program.main(["dpo", small, *started, "--model.path", "some/model"]) == 0
    assert (ran[0].dpo.policy, ran[0].dpo_policy()) == ("some/model", "some/model")
    assert program.main(["eval", small, *started, "--model.path", "some/model"]) == 0
    assert ran[1].eval_reference() == "some/model"
    assert program.main(["refs", small, *started]) != 0
    assert "dpo.policy: model stands for the model of model.path, which is not set" in capsys.readouterr().err
    Path(small).write_text(SMALL.replace("dpo:", "dpo:\n  policy: model"))
    assert program.main(["dpo", small]) != 0
    assert f"{small}:10: dpo.policy: model stands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["dop", "SMALL"], 'dop: unknown command; did you mean "dpo"?'),
        (["dpo"], "dpo needs a configuration file as its first argument; `dpo-jax init my.yaml` writes one"),
        (["dpo", "--dpo.beta", "1"], "dpo needs a configuration file as its first argument"),
        (["dpo", "SMALL", "--dpo.beat", "0.3"], "--dpo.beta"),
        (["dpo", "SMALL", "--dpo.beta", "x"], "could not convert string to float"),
        (["dpo", "SMALL", "--dpo.beta", "-1"], "dpo.beta: must be greater than 0, got -1.0"),
        (["dpo", "SMALL", "--dpo.lr", "nan"], "dpo.lr: must be a finite number"),
        (["dpo", "SMALL", "--data.max-length", "1024"], "data.max_length: 1024 tokens do not fit model.max_positions (512)"),
        (["dpo", "SMALL", "--data.source", "files"], "data.path: source files needs a file or folder: pass --data.path"),
        (["sft", "SMALL", "--model.family", "None"], "model.family: a new model needs it"),
        (
            ["audit", "SMALL", "--dpo.beta", "1"],
            "--dpo.beta: audit does not read this option (dpo, eval, plan, online, bench would)",
        ),
        (
            ["refs", "SMALL", "--dpo.microbatches=2"],
            "--dpo.microbatches=2: refs does not read this option "
            "(dpo, plan, reward-model, ppo, online, frontier, robust, dialogue, bench would)",
        ),
        (["reward-model", "SMALL", "--run.wandb", "x"], "--run.wandb: reward-model does not read this option ("),
        (["ppo", "SMALL", "--run.wandb", "x"], "--run.wandb: ppo does not read this option ("),
        (["dpo", "SMALL", "--ref-model-sync-steps", "5"], "--ref-model-sync-steps: unknown option; instead: --dpo.refresh-ref"),
        (["sample", "SMALL", "--data.source", "tfds"], "data.path: source tfds needs"),
        (["dpo", "SMALL", "--learning-rate", "1e-6"], "--learning-rate: unknown option; instead: --dpo.lr\n"),
        (["sft", "SMALL", "--learning_rate=1e-6"], "--learning_rate: unknown option; instead: --sft.lr\n"),
        (["dpo", "SMALL", "--training.learning-rate", "1"], "instead: --dpo.lr\n"),
        (["eval", "SMALL", "--eval-policy", "x"], "--eval-policy: unknown option; instead: --eval.policy\n"),
        (["eval", "SMALL", "--dpo_reference=x"], "--dpo_reference: unknown option; instead: --dpo.reference\n"),
        (["online", "SMALL", "--online.batch", "3"], "--online.batch: unknown option; instead: --dpo.batch\n"),
        (["dpo", "SMALL", "--beta", "1"], "--beta: unknown option; instead: --dpo.beta\n"),
        (["frontier", "SMALL", "--frontier.methods", "dpo,ipo,dpo"], "online-uncertainty, each once, got dpo"),
        (["frontier", "SMALL", "--frontier.best-of", "4,04"], "frontier.best_of: must be different numbers above 0"),
        (["dpo", "SMALL", "--max-grad-norm", "1"], "--max-grad-norm: unknown option; instead: --dpo.max-grad-norm\n"),
        (["dpo", "SMALL", "--lora-r", "8"], "--lora-r: unknown option; instead: --lora.rank"),
        (["dpo", "SMALL", "--bf16", "--use-peft"], "--bf16: unknown option; instead: --run.precision bfloat16\n--use-peft: "),
        (["refs", "SMALL", "--output-dir", "x"], "--output-dir: unknown option; instead: --run.dir\n"),
    ],
)
def test_wrong_use_is_told_and_exits_2(small, ran, capsys, args, expected):
    assert program.main([small if arg == "SMALL" else arg for arg in args]) == 2
    assert expected in capsys.readouterr().err
    assert not ran


def test_a_problem_in_the_file_is_placed_there_even_if_found_later(small, ran, capsys):
    assert program.main(["dpo", small, "--dpo.batch", "10", "--dpo.microbatches", "4"]) == 2
    assert capsys.readouterr().err.startswith("dpo-jax: dpo.microbatches: must divide batch")
    assert program.main(["dpo", small, "--data.max-length", "600"]) == 2
    assert program.main(["sample", small, "--data.source", "files", "--sample.prompts-file", "p.txt"]) == 0


def test_help_needs_nothing_heavy(small):
    code = """
import sys
from dpo_jax.cli.main import main
for args in (["--help"], ["--version"], ["dpo", "--help"], ["dpo", sys.argv[1], "--help"]):
    assert main(args) == 0
assert main(["dop"]) == 2
heavy = {"jax", "flax", "transformers", "tensorflow", "torch", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, small], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--dpo.label-smoothing FLOAT" in done.stdout
    assert "(default: 0.5)" in done.stdout  # beta of the file, in the last of the four


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    assert program.main([name, "--help"]) == 0
    shown = set(re.findall(r"--([a-z_]+\.[a-z_0-9-]+)", capsys.readouterr().out))
    for entry in COMMANDS[name].reads:
        section, _, option = entry.partition(".")
        for field in [option] if option else types_of(type(getattr(Config(), section))):
            assert f"{section}.{field}".replace("_", "-") in shown
    hints = typing.get_type_hints(importlib.import_module(module_of(name)).run)
    assert hints == {"config": Config, "return": int}


def test_help_with_a_command_is_that_commands_help(capsys):
    assert program.main(["help", "dpo"]) == 0
    first = capsys.readouterr().out
    assert program.main(["dpo", "--help"]) == 0
    assert first == capsys.readouterr().out
    assert program.main(["help", "dop"]) == 2
    assert program.main(["help"]) == 0
    assert "--check-after=CMD,CMD" in capsys.readouterr().out


def test_overview_lists_commands_and_exit_codes(capsys):
    assert program.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert all(f"\n  {code} " in shown for _, _, code in EXIT_CODES)


@pytest.mark.parametrize(("module", "name", "code"), EXIT_CODES)
def test_exit_codes_of_exceptions(module, name, code):
    kind = getattr(importlib.import_module(module), name)
    assert exit_code(kind.__new__(kind)) == code


def test_errors_are_one_message_and_bugs_a_traceback(small, ran, monkeypatch, capsys):
    def raising(error):
        def run(config):
            raise error

        stub = type("Stub", (), {"run": staticmethod(run)})
        monkeypatch.setattr(program.importlib, "import_module", lambda name: stub)

    raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "pairs.jsonl"))
    assert program.main(["dpo", small]) == 74
    assert capsys.readouterr().err == "dpo-jax: pairs.jsonl: No such file or directory\n"
    wrapped = ValueError("while saving")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    raising(wrapped)
    assert program.main(["dpo", small]) == 74
    assert "No space left on device; free some space" in capsys.readouterr().err
    raising(KeyboardInterrupt())
    assert program.main(["dpo", small]) == 130
    raising(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        program.main(["dpo", small])
    raising(ConfigError("x"))
    monkeypatch.setenv("DPO_JAX_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        program.main(["dpo", small])


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """A shell expands ~ in a flag, and nothing in a file: it must not become a folder of that name."""
    monkeypatch.setenv("HOME", "/home/ada")
    file = tmp_path / "a.yaml"
    file.write_text("run: {dir: ~/runs/a}\ndata: {source: reviews}\n")
    config = parse("sft", [str(file), "--model.path=~/models/b"])
    assert (config.run.dir, config.model.path) == ("/home/ada/runs/a", "/home/ada/models/b")
    file.write_text("run: {dir: ~nobody-here/a}\ndata: {source: reviews}\n")
    with pytest.raises(ConfigError, match=r"a.yaml:1: run.dir: ~nobody-here/a: unknown home folder"):
        parse("sft", [str(file)])


def test_a_number_in_a_text_has_nine_digits_at_most():
    """Python itself raises where one has thousands."""
    long = "9" * 5000
    for option, value in (("sample.best_of", long), ("bench.lengths", f"{long}/1/1"), ("bench.sampling", f"1/{long}/1")):
        section, _, field = option.partition(".")
        wrong = dataclasses.replace(getattr(Config(), section), **{field: value})
        assert [name for name, _ in problems(dataclasses.replace(Config(), **{section: wrong}))] == [option]
    with pytest.raises(ConfigError, match="must be a number of devices"):
        scope_of([f"--check-devices={long}"])


def test_several_values_are_a_text_with_commas_or_a_list(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "frontier: {methods: [dpo, ipo], dpo_betas: [0.1, 1e-2], ppo_kls: 4}\nlora: {rank: 8, targets: [query, v_proj]}\n"
    )
    config = load_config(path)
    assert (config.frontier.methods, config.frontier.dpo_betas, config.frontier.ppo_kls) == ("dpo,ipo", "0.1,1e-2", "4")
    assert config.lora.targets == "query,v_proj"
    path.write_text(
        "judge: {a: [one.jsonl, B=two.jsonl]}\nreport: {runs: [runs/a, runs/b]}\nrobust: {topics: [acting, plot]}\n"
    )
    config = load_config(path)
    assert (config.judge.a, config.report.runs) == ("one.jsonl,B=two.jsonl", "runs/a,runs/b")
    assert config.robust.topics == "acting,plot"
    for text, words in {
        "[]": "an empty list; name at least one value, or leave the option out",
        "[dpo, [x]]": "expected a text or a number in the list, got a list",
        "[dpo, true]": "expected a text or a number in the list, got the truth value 'true'",
        "['dpo,x']": "a comma separates values, so 'dpo,x' cannot be one of the list",
        "{a: 1}": r"expected a text with commas \(or a list\), got a mapping",
    }.items():
        path.write_text(f"frontier:\n  methods: {text}\n")
        with pytest.raises(ConfigError, match=f"c.yaml:2: frontier.methods: {words}"):
            load_config(path)
