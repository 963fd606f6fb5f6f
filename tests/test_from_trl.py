"""The page for users of TRL (`configs/FROM_TRL.md`) and the table of metrics are true of this code."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.cli import words
from dpo_jax.cli.config import Config, every_option, load_config
from dpo_jax.cli.flags import parse
from dpo_jax.cli.word_table import VALUES, WORDS, markdown
from dpo_jax.dpo import preference_metrics
from dpo_jax.evals.preference import preference_summary
from dpo_jax.losses.unpaired import unpaired_metrics

CONFIGS = Path(__file__).parent.parent / "configs"
PAGE = (CONFIGS / "FROM_TRL.md").read_text()


def test_the_table_of_options_is_that_of_the_code():
    written = PAGE.partition("<!-- table -->\n")[2]
    assert written == markdown(), "python -c 'from dpo_jax.cli.word_table import markdown; print(markdown(), end=\"\")'"
    assert all(f"`{word}`" in written for word in (*WORDS, *(value for values in VALUES.values() for value in values)))
    assert "*." not in written


def test_the_defaults_are_those_of_the_code():
    told = re.findall(r"`([a-z]+)\.([a-z_]+): (\S+)`", PAGE)
    assert len(told) >= 18
    for section, option, value in told:
        if "`" not in value and option != "dir":
            assert str(getattr(getattr(Config(), section), option)) == value


def test_the_translated_command_is_a_valid_configuration(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    load_config(path)
    config = parse("dpo", [str(path)])
    (command,) = re.findall(r"```sh\n(trl dpo .*?)```", PAGE, re.DOTALL)
    flags = shlex.split(command.replace("\\\n", " "))[2:]
    asked = dict(zip(flags[::2], flags[1::2], strict=True))
    for flag in asked:
        assert words.instead(flag, every_option())
    pairs = int(asked["--per_device_train_batch_size"]) * int(asked["--gradient_accumulation_steps"])
    assert config.dpo.batch == pairs
    assert config.run.eval_every_examples == pairs * int(asked["--eval_steps"])
    assert (config.dpo.lr, config.dpo.steps) == (float(asked["--learning_rate"]), int(asked["--max_steps"]))


def test_the_table_of_metrics_names_every_column():
    """Names of losses and evaluations; those of a whole run are tested by `test_cli_runs`."""
    text = (CONFIGS / "README.md").read_text()
    table = text.partition("## The columns of metrics.jsonl")[2].partition("## ")[0]
    logps, labels = np.zeros((2, 2)), {"desirable": np.array([1.0, 0.0]), "share": np.array(0.5)}
    steps = [
        jax.eval_shape(lambda: preference_metrics(jnp.asarray(logps), logps, rewards=jnp.asarray(logps))),
        jax.eval_shape(lambda: unpaired_metrics(jnp.asarray(logps), logps, rewards=jnp.asarray(logps), **labels)),
    ]
    evaluation = preference_summary(logps, logps, loss=lambda policy, reference: (policy[:, 0], policy - reference))
    for name in {name for metrics in (*steps, evaluation) for name in metrics}:
        assert f"{name}`" in table
