"""The model card of a training run: a header for the Hub, and how the model was made and how good it is."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax import loss_table, optimizer_table
from dpo_jax.cli.config import Config, DpoConfig, MixConfig, SftConfig
from dpo_jax.cli.data_sources import read_commit
from dpo_jax.data.hub_files import is_dataset_id
from dpo_jax.data.terminal import one_line
from dpo_jax.models.digest import files_digest
from dpo_jax.models.folder import is_hub_id
from dpo_jax.models.origin import Origin, hub_id_of_folder, model_origin
from dpo_jax.report.health import examine_run
from dpo_jax.report.page import markdown_code, markdown_text
from dpo_jax.report.record_shapes import DATA, ENV
from dpo_jax.report.result_table import MEASURES, result_table
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.shapes import Shape, check_shape
from dpo_jax.untrusted import Unreadable, read_lines, read_object

logger = logging.getLogger(__name__)

PAPER = "[Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)"
TRAINING = ("epochs", "batch", "microbatches", "optimizer", "lr", "warmup_steps", "schedule", "max_grad_norm")
OTHERS = (
    "steps",
    "warmup_ratio",
    *optimizer_table.OPTIONS,
    *optimizer_table.SCHEDULE_OPTIONS,
    "patience",
    "stop_on",
    "keep_best",
)
"""Options that are shown if they are set."""


def sft_card(config: Config, run: RunDir, *, step: int | None = None) -> str:
    """The card of an SFT run, for its final weights or those after `step`."""
    scored = "prompts and completions" if config.sft.scored == "all" else "completions"
    return _card(
        config,
        run,
        title="after supervised fine-tuning",
        how=f"Supervised fine-tuning ({scored} are scored).{_trained(config, config.sft)}",
        start=config.model.path,
        section=config.sft,
        results=_held_out(run, step, chosen=config.sft.keeps_best()),
        tag="sft",
    )


def dpo_card(config: Config, run: RunDir, *, report: Mapping[str, Any] | None = None, step: int | None = None) -> str:
    """The card of a DPO run, for its final weights or those after `step`, with `dpo-jax eval`'s table once there is one."""
    section = config.dpo
    is_dpo = loss_table.uses_reference(section.loss) and loss_table.rows_of(section.loss) != "unpaired"
    is_dpo = is_dpo and not loss_table.own_files(section.loss)
    tag = "dpo" if is_dpo else loss_table.terms(section.loss)[0].name.rpartition(":")[2]
    return _card(
        config,
        run,
        title=f"trained on preferences{' with DPO' if tag == 'dpo' else ''}",
        how=f"{_objective(section)}{_trained(config, section)}",
        start=config.dpo_policy(),
        section=section,
        results=_fenced(result_table(report)) if report else _held_out(run, step, chosen=section.keeps_best()),
        notes=_notes(report or {}, run),
        tag=tag,
    )


def online_card(config: Config, run: RunDir, *, step: int | None = None) -> str:
    """The card of an online run, with one line per round."""
    section, columns = config.online, ("round", "labels_so_far", "pairs", "reward", "kl", "accuracy")
    heads = ["round", "labels so far", "pairs", "reward of labeled samples", "KL (nats)", "agreement before training"]
    rows = read_lines(rounds).rows if (rounds := run.path / "rounds.jsonl").is_file() else []
    shown = [[f"{row[name]:.4g}" if row.get(name) is not None else "-" for name in columns] for row in rows]
    known = {"known": f"the reward {config.frontier.reward}", "reward-model": "a reward model", "judge": "a judge"}
    who = known.get(section.reward, section.reward)
    how = (
        f"{_objective(config.dpo)} Online: {section.rounds} rounds, each with {section.completions} completions of each of "
        f"{section.prompts} prompts, sampled from the current policy and labeled by {who}."
    )
    return _card(
        config,
        run,
        title="trained by online preference optimization",
        how=f"{how}{_trained(config, config.dpo)}",
        start=config.dpo_policy(),
        section=section.training(config.dpo),
        results=f"{_table(heads, shown)}\n\n{_held_out_points(run, step)}",
        tag="online-dpo",
    )


def _held_out_points(run: RunDir, step: int | None) -> str:
    """Reward and KL at the last evaluation, or at the one after `step`."""
    judged = _evaluations(run, step)
    names = {"eval/reward": "reward", "eval/kl": "KL to the reference (nats)"}
    rows = [[label, f"{judged[-1][name]:.3f}"] for name, label in names.items() if judged and name in judged[-1]]
    return f"On held-out prompts, after {judged[-1]['step']:,} steps:\n\n{_table(['measure', 'value'], rows)}" if rows else ""


def _evaluations(run: RunDir, step: int | None) -> list[dict[str, Any]]:
    """The evaluations during training, or those after `step`."""
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    return [row for row in rows if is_evaluation(row) and step in (None, row["step"])]


def _objective(section: DpoConfig) -> str:
    if section.loss == "unlikelihood":
        return f"Unlikelihood training, a baseline of {PAPER}."
    if section.loss == "preferred_ft":
        return f"Fine-tuning on preferred completions, a baseline of {PAPER}."
    if section.loss in ("dpo", "ipo"):
        return f"Direct Preference Optimization ({PAPER}), loss `{section.loss}`."
    papers = [
        term.loss.title + (f" ([{term.loss.paper}](https://arxiv.org/abs/{term.loss.paper}))" if term.loss.paper else "")
        for term in loss_table.terms(section.loss)
    ]
    return f"Preference optimization, loss `{section.loss}`: {'; '.join(papers)}."


def _card(
    config: Config,
    run: RunDir,
    *,
    title: str,
    how: str,
    start: str | None,
    section: SftConfig | DpoConfig,
    results: str,
    tag: str,
    notes: str = "",
) -> str:
    origin, adapter = model_origin(start), config.lora.rank is not None
    images = any(report.get("images") for report in _read(run.data_report, DATA).values())
    name = markdown_text(origin.hub_id.rpartition("/")[2]) if origin.hub_id else "A language model"
    parts = [
        _header(origin, datasets=_datasets(config), tag=tag, adapter=adapter, images=images),
        f"# {name} {title}",
        how,
        "\n".join(f"- {name}: {words}" for name, words in _made_of(config, run, start, origin, section)),
        f"## Use\n\n{USE_ADAPTER if adapter else USE_IMAGES if images else USE}",
        f"## Results\n\n{results}",
        f"## Health notes\n\n{notes}" if notes else "",
        f"## Training\n\n{_options(config, section)}",
        f"## Data\n\n{table}" if (table := _data_table(run)) else "",
        "Everything needed to repeat the run is in its directory: `config.yaml`, `env.json`, `data_report.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its id on the Hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
```"""


USE_IMAGES = """```python
from transformers import AutoModelForImageTextToText, AutoTokenizer

path = "."  # this folder, or its id on the Hub
model, tokenizer = AutoModelForImageTextToText.from_pretrained(path), AutoTokenizer.from_pretrained(path)
```

Images are processed as by the base model; its vision encoder is included unchanged."""


USE_ADAPTER = """This folder holds an adapter, which `peft` loads with its base model.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

path = "."  # this folder, or its id on the Hub
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
```

`dpo-jax export --export.merge` writes the whole model."""


def merged_card(card: str) -> str:
    """The card of an adapter's run, for a folder into whose weights the adapter is merged."""
    use = USE_IMAGES if '\npipeline_tag: "image-text-to-text"\n' in card else USE
    return card.replace('\nlibrary_name: "peft"\n', '\nlibrary_name: "transformers"\n', 1).replace(USE_ADAPTER, use, 1)


def _trained(config: Config, section: SftConfig | DpoConfig) -> str:
    """A sentence on the trained parameters, unless all are trained in float32."""
    lora = config.lora
    if lora.rank is not None:
        scale = ", rank-stabilized" if lora.rslora else ""
        return f" LoRA of rank {lora.rank}, alpha {lora.alpha:g}{scale}, on {markdown_text(lora.targets)} of the frozen model."
    if section.trainable is not None:
        return f" Only {markdown_code(section.trainable)} were trained."
    if section.param_dtype != "float32":
        return f" Parameters were kept in {section.param_dtype}, and rounded stochastically."
    return ""


def _header(origin: Origin, *, datasets: list[str], tag: str, adapter: bool, images: bool) -> str:
    """The YAML header. Unknown values are left out: a wrong license is worse than none."""
    library = "peft" if adapter else "transformers"
    pipeline = "image-text-to-text" if images else "text-generation"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline}
    if origin.hub_id:
        fields["base_model"] = origin.hub_id
    if datasets:
        fields["datasets"] = datasets
    if origin.license:
        named = {"license_name": origin.license.name, "license_link": origin.license.link}
        fields |= {"license": origin.license.id, **{field: value for field, value in named.items() if value}}
    lines = [f"{field}: {yaml_value(value)}" for field, value in fields.items()]
    return "\n".join(["---", *lines, f"tags: [dpo_jax, {tag}]", "---"])


def _made_of(
    config: Config, run: RunDir, start: str | None, origin: Origin, section: SftConfig | DpoConfig
) -> Iterator[tuple[str, str]]:
    yield "start", _start(config, start, origin)
    if isinstance(section, DpoConfig) and section.reference is not None:
        yield "reference", _start(config, section.reference, model_origin(section.reference))
    if isinstance(section, DpoConfig) and section.refresh_reference_steps is not None:
        every = f"after every {section.refresh_reference_steps:,} steps"
        yield "refreshed reference", f"the policy itself {every} ([TR-DPO](https://arxiv.org/abs/2404.09656))"
    yield "data", _data_name(config)
    yield "made with", _made_with(run)


def _start(config: Config, path: str | None, origin: Origin) -> str:
    """The starting model: a Hub id, or the last parts of a local path, which reveal nothing about this machine."""
    if path is None:
        return f"new weights ({config.model.family}), seed {config.run.seed}"
    name, _, revision = path.partition("@")
    if name == origin.hub_id:
        return _hub_link(name) + (f", revision {markdown_code(revision)}" if revision else "")
    own = Path(path).resolve() == Path(config.run.dir, "sft", "export").resolve()
    what = "the SFT model of this run, `sft/export`" if own else markdown_code("/".join(Path(path).parts[-2:]))
    return f"{what}, from {_hub_link(origin.hub_id)}" if origin.hub_id else what


def _hub_link(name: str, *, kind: str = "") -> str:
    """A link to `name` on the Hub; plain text if it is not an id, which the header of another card may contain."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else markdown_text(name)


def _datasets(config: Config) -> list[str]:
    """The Hub ids of the data."""
    found = (_hub_id(part) for part in config.data.parts() if part.path)
    return list(dict.fromkeys(name for name in found if name))


def _hub_id(part: MixConfig) -> str | None:
    return part.path if is_dataset_id(part.path) else hub_id_of_folder(part.path, "datasets")


def _data_name(config: Config) -> str:
    data = config.data
    if data.path or data.mix:
        named = ", ".join(_part_name(part, data.source) for part in data.parts())
        if data.test_share is None:
            return named
        return (
            f"{named}; {data.test_share:.1%} of the prompts of sources without a {data.test_split} split are held out, by hash"
        )
    made = "conversations of a question game" if data.source == "question_game" else "film reviews"
    pairs = data.reviews_train if data.max_train is None else min(data.reviews_train, data.max_train)
    return f"generated {made} ({pairs:,} training pairs)"


def _part_name(part: MixConfig, source: str) -> str:
    found, last = _hub_id(part), Path(part.path).name
    name = _hub_link(found, kind="datasets/") if found else f"{markdown_code(last)} ({source})"
    config = f", {markdown_code(part.config)}" if part.config else ""
    revision = (read_commit(part.path, part.revision) or part.revision) if found else None
    at = f", revision {markdown_code(revision)}" if revision else ""
    return f"{name}{config}{at}{f', weight {part.weight:g}' if part.weight != 1 else ''}"


def with_digest(card: str, folder: Path) -> str:
    """`card` with the digest of the weights in the model folder that it lies in."""
    digest, what = files_digest(folder)
    line = f"- weights: SHA-256 `{digest}` of `{what}`"
    card, found = re.subn(r"^- weights: SHA-256 .*$", line, card, count=1, flags=re.M)
    return card if found else re.sub(r"^(- made with: .*)$", rf"\1\n{line}", card, count=1, flags=re.M)


def _made_with(run: RunDir) -> str:
    env = _read(run.env, ENV)
    packages = ", ".join(f"{name} {version}" for name in ("dpo_jax", "jax") if (version := env.get("packages", {}).get(name)))
    git = env.get("git")
    commit = f" (commit {git['commit'][:12]}{', changed' if git['dirty'] else ''})" if git else ""
    devices = env.get("devices", [])
    return f"{packages}{commit}" + (f", on {len(devices)} x {devices[0]}" if devices else "")


def _loss_options(section: DpoConfig) -> list[str]:
    """The loss, its beta if it has one, and all options that differ from their defaults."""
    beta = ["beta"] if "beta" in loss_table.reads(section.loss) else []
    others = [name for name in (*loss_table.OPTIONS, "ld_alpha") if getattr(section, name) != getattr(DpoConfig, name)]
    return ["loss", *beta, *(name for name in others if name not in beta)]


def _options(config: Config, section: SftConfig | DpoConfig) -> str:
    data = config.data
    others = [name for name in OTHERS if getattr(section, name) != getattr(type(section), name)]
    unread = {"epochs"} if section.steps is not None else set()
    unread |= {"warmup_steps"} if section.warmup_ratio is not None else set()
    training = [name for name in TRAINING if name not in unread]
    names = [*(_loss_options(section) if isinstance(section, DpoConfig) else ()), *training, *others]
    values = {name: getattr(section, name) for name in names}
    values |= {
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "truncation": data.truncation,
        "precision": config.run.precision,
        "seed": config.run.seed,
    }
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return _table(["option", "value"], [[name, value] for name, value in shown.items() if value != "None"])


def _data_table(run: RunDir) -> str:
    """Counts of rows read, kept and dropped."""
    rows = []
    for split, report in _read(run.data_report, DATA).items():
        dropped = ", ".join(f"{count:,} {cause}" for cause, count in report.get("dropped", {}).items()) or "none"
        cut = ", ".join(f"{count:,} {what}" for what, count in report.get("truncated", {}).items()) or "none"
        rows.append([split, f"{report['read']:,}", f"{report['kept']:,}", dropped, cut])
    return _table(["split", "read", "kept", "left out, by cause", "cut to length"], rows) if rows else ""


def yaml_value(value: str | list[str]) -> str:
    """A text, or list of texts, as a one-line YAML value that reads back exactly."""
    return one_line(json.dumps(value, ensure_ascii=False))  # JSON is YAML, and so are Python's escapes


def _fenced(text: str) -> str:
    """A code block that its text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _held_out(run: RunDir, step: int | None, *, chosen: bool) -> str:
    """The last evaluation during training, or the one after `step`, which was `chosen` by it or not."""
    judged = _evaluations(run, step)
    if not judged:
        return f"Held out, after {step} steps: not measured."
    final = judged[-1]
    values = {name.removeprefix("eval/"): value for name, value in final.items() if name != "step"}
    if "nll_per_token" in values:
        loss, per_token = (math.nan if values.get(name) is None else values[name] for name in ("loss", "nll_per_token"))
        rows = [["loss (nats per text)", f"{loss:.2f}"], ["loss per token (nats)", f"{per_token:.4f}"]]
        rows.append(["perplexity per token", f"{math.exp(min(per_token, 700.0)):.2f}"])
    else:
        rows = [[label, format(values[key], f"z{form}")] for label, key, form in MEASURES if values.get(key) is not None]
    note = "\n\nThese weights were chosen by this evaluation (`keep_best`, `patience`): it is optimistic." if chosen else ""
    return f"Held out, after {final['step']:,} steps:\n\n{_table(['measure', 'value'], rows)}{note}"


def _notes(report: Mapping[str, Any], run: RunDir) -> str:
    """Unusual results of the evaluation; before `dpo-jax eval`, of training's own measurements."""
    health = examine_run(report, read_metrics(run.metrics))
    lines = [f"- **{note.name}**: {markdown_text(note.words)}" for note in health.notes]
    return "\n".join(lines) + ("\n\n" if lines else "") + markdown_text(health.summary)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([markdown_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read(path: Path, shape: Shape) -> dict[str, Any]:
    """A record of the run; empty, with a warning, if it is damaged."""
    try:
        return check_shape(read_object(path), shape, str(path))
    except FileNotFoundError:
        return {}
    except (OSError, Unreadable) as error:
        logger.warning("the model card omits the contents of %s: %s", path.name, error)
        return {}
