"""Commands and links of the READMEs, and every file in configs/."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import pytest

from dpo_jax.cli.build import make_loss
from dpo_jax.cli.config import ConfigError, DpoConfig, load_config
from dpo_jax.cli.flags import parse

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


FROM_TRL = ROOT / "configs" / "FROM_TRL.md"
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "dpo_jax").glob("*/README.md"))]


def commands_of_the_readmes():
    """Each `dpo-jax COMMAND CONFIG --flags` in a README as its words, with the dots that stand for what was said before."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in READMES).replace("\\\n", " ")
    found = re.findall(r"dpo-jax +([a-z-]+) +((?:CONFIG|configs/|RUN\b)[^`#\n]*)", text)
    return list(dict.fromkeys((name, *shlex.split(words)) for name, words in found))


@pytest.mark.parametrize("words", commands_of_the_readmes(), ids=" ".join)
def test_the_commands_of_the_readmes_are_understood(words, tmp_path):
    """Every flag is there, takes the value that is written, and nothing that the command needs is missing."""
    name, config, *flags = words
    values = {"STEP": "200", "DIR": str(tmp_path), "RUN": str(tmp_path), "NAME": "m"}
    if "--dpo.loss" in flags:  # the file of the README's example
        block = re.search(
            r"`my_losses.py` is\n\n```python\n(.*?)```", (ROOT / "dpo_jax/losses/README.md").read_text(), re.DOTALL
        )
        (tmp_path / "my_losses.py").write_text(block[1])
        values["my_losses.py"] = str(tmp_path / "my_losses.py")
    flags = [re.sub(r"\b(STEP|DIR|RUN|NAME|my_losses.py)\b", lambda mark: values[mark[1]], flag) for flag in flags]
    if "..." in flags:
        flags = [*(flag for flag in flags if flag != "..."), "--judge.model", "m"]
        flags += [] if "--judge.prompt" in flags else ["--judge.prompt", "dialogue"]
    if name == "report":
        assert parse(name, [str(tmp_path), *flags]).report.folders() == [str(tmp_path)]
        return
    path = [] if {"--data.path", "--data.source"} & set(flags) else ["--data.path", str(tmp_path)]
    any_of = {"CONFIG": ("hh_small", "quickstart", "tldr_gptj_dpo"), "configs/pod_NAME.yaml": ("pod_llama3_8b_v5p",)}
    files = [f"configs/{name}.yaml" for name in any_of[config]] if config in any_of else [config]
    problems = []
    for args in ([file, *flags, *more] for file in files for more in ((), path)):
        try:
            config = parse(name, args)
            if "my_losses.py" in values:
                make_loss(config.dpo)
            return
        except (ConfigError, SystemExit) as problem:
            problems.append(str(problem))
    raise AssertionError(problems)


@pytest.mark.parametrize("path", [*READMES, FROM_TRL], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_links_of_the_readmes_lead_somewhere(path):
    """Files are there, and so are headings, as GitHub names them; what the table of configurations names is there as well."""
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        if "://" in name:
            continue
        target = path.parent / name if name else path
        assert target.exists(), link
        titles = (
            [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in target.read_text().splitlines()
                if line.startswith("#")
            ]
            if heading
            else [heading]
        )
        assert heading in titles, link
    for name in re.findall(r"`(?:configs/)?([\w{},]+\.yaml)`", text):
        start, options = re.split(r"[{}]|NAME", name)[0], re.findall(r"\{(.*)\}", name)
        for option in options[0].split(",") if options else [""]:
            assert any(
                file.name.startswith(start + option)
                for file in [*(ROOT / "configs").iterdir(), *(ROOT / "launch").rglob("*.yaml")]
            ), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_papers_experiments_are_there():
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "hh_small"} <= names
    for task in ("hh_pythia28", "tldr_gptj", "imdb_gpt2_large"):
        sft, dpo = (load_config(ROOT / "configs" / f"{task}_{step}.yaml") for step in ("sft", "dpo"))
        assert (sft.run, sft.data, sft.tokenizer, sft.model) == (dpo.run, dpo.data, dpo.tokenizer, dpo.model)
        default = DpoConfig(beta=0.5 if task == "tldr_gptj" else 0.1)
        assert dataclasses.replace(dpo.dpo, microbatches=1) == default


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_states_its_command_hardware_cost_and_result(path):
    header = path.read_text().split("\n\n")[0]
    assert all(f"# {word} " in header for word in ("Command", "Hardware", "Cost", "Expected"))
    assert f"configs/{path.name}" in header or path.stem == "quickstart"


PARAMETERS = {"hh_pythia28": 2_775_208_960, "tldr_gptj": 6_050_882_784, "imdb_gpt2_large": 774_030_080}


WITH_MODEL = [path for path in CONFIGS if load_config(path).model.family is not None]  # the others have no language model


@pytest.mark.parametrize("path", WITH_MODEL, ids=lambda path: path.stem)
def test_config_describes_a_model(path):
    from dpo_jax.models.decoder import make_model
    from dpo_jax.models.families import decoder_config, hf_config

    model = load_config(path).model
    sizes = {name: getattr(model, name) for name in ("width", "layers", "heads", "max_positions")}
    options = {name: getattr(model, name) for name in ("kv_heads", "head_size", "mlp_width", "tie")}
    settings = hf_config(model.family, vocab_size=model.vocab_size or 1000, eos_token_id=0, **sizes, **options)
    shapes = jax.eval_shape(make_model(decoder_config(settings)).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == PARAMETERS.get(path.stem.rpartition("_")[0], count)
