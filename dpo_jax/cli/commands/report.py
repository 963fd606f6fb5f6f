"""`dpo-jax report RUN...`: one page about one or several run directories."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dpo_jax.report.sections as sections
from dpo_jax.cli.config import Config, ConfigError, load_config
from dpo_jax.cli.report_files import HTML, IMAGES, MARKDOWN, earlier_images
from dpo_jax.data.terminal import printable
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest
from dpo_jax.models.families import decoder_config, reads_images
from dpo_jax.models.folder import config_folder
from dpo_jax.models.hf import load_config as load_model_config
from dpo_jax.models.hf import read_weights
from dpo_jax.plotting import training_curves
from dpo_jax.plotting.curves import PANELS
from dpo_jax.report.audit import audited
from dpo_jax.report.experiments import dialogue, frontier, robustness
from dpo_jax.report.first import first_things, moment
from dpo_jax.report.judged import judged
from dpo_jax.report.page import Block, Figures, Notice, Page, Section, Table, render_html, render_markdown
from dpo_jax.report.run_record import TRAINING, RunRecord, of, one_or_more, read_run, shown_path
from dpo_jax.report.weights import SHOWN, scored_weights
from dpo_jax.runtime.progress import reported
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.untrusted import Unreadable, read_bytes, reading
from dpo_jax.writing import write_whole, writing

EXPORTS = tuple(f"{stage}/export" for stage in TRAINING)
BASES = ("dpo", "frontier", "ppo", "sft")  # stages whose configuration is the run's
OWN = ("eval", "judge", "study", "agree", "report")  # sections about evaluation of a run; its commands list them


def run(config: Config) -> int:
    section = config.report
    runs = _read(section.folders())
    out = Path(section.out) if section.out else runs[0].path / "report"
    earlier_images(out)  # refused before anything is written
    with RunDir(out, writes=()), tempfile.TemporaryDirectory() as drawn, reported("drawing the page"):
        page = _page(runs, Path(drawn), samples=section.samples, digests=section.digests)
        write_page(out, page)
    told = [block for block in page.sections[0].blocks if isinstance(block, Notice) and block.level != "fine"]
    for notice in told:
        name = f"{notice.title}: " if notice.title else ""
        print(terminal(f"{'careful' if notice.level == 'alarm' else 'note'}: {name}{notice.words}"))
    print(f"{shown_path(out / 'report.html')}\n{shown_path(out / 'report.md')}")
    return 0


def terminal(words: str) -> str:
    """Text that quotes a file, made safe for the screen: a lone surrogate is escaped, too."""
    return printable(words).encode("utf-8", "backslashreplace").decode()


def write_page(out: Path, page: Page) -> None:
    """The page as HTML and as Markdown with its images, replacing those of an earlier report.

    Images named in an earlier report's Markdown are deleted before the Markdown is replaced, and new ones written after it. If
    this is killed at any point, `report.md` names all images that are there, so that the next report recognizes them.
    """
    images = {path: f"{number:02d}-{path.name}" for number, path in enumerate(page.images, start=1)}
    contents = {path: path.read_bytes() for path in images}
    for name in sorted(earlier_images(out) - set(images.values())):
        (out / IMAGES / name).unlink()
    with writing(out / MARKDOWN, errors="backslashreplace") as file:  # a JSON text may contain half a surrogate pair
        file.write(render_markdown(page, link=lambda path: f"{IMAGES}/{images[path]}"))
    (out / IMAGES).mkdir(exist_ok=True)
    for path, name in images.items():
        write_whole(out / IMAGES / name, contents[path])
    with writing(out / HTML, errors="backslashreplace") as file:
        file.write(render_html(page))


def _read(folders: Sequence[str]) -> list[RunRecord]:
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError(f"report.runs: a run directory is named twice: {', '.join(names)}")
    try:
        return [read_run(path, name=shown_path(name)) for path, name in zip(paths, names, strict=True)]
    except ValueError as error:
        raise ConfigError(f"report.runs: {error}") from error


def _page(runs: Sequence[RunRecord], drawn: Path, *, samples: int, digests: bool) -> Page:
    alarms, weights = _weights(runs, digests=digests)
    images, together = _curves(runs, drawn)
    built = [
        _section("Held-out evaluation", lambda: sections.evaluation(runs)),
        _section("Implicit reward", lambda: sections.implicit_rewards(runs)),
        _section("Win rates and ratings", lambda: judged(runs)),
        _section("Frontier", lambda: frontier(runs, drawn)),
        _section("Robustness", lambda: robustness(runs)),
        _section("Several turns", lambda: dialogue(runs)),
        _section("Samples", lambda: sections.samples(runs, samples)),
        _section("Samples during training", lambda: sections.samples_of_training(runs, samples)),
        _section("Training", lambda: sections.training(runs, images, together)),
        weights,
        _section("Data", lambda: sections.data(runs)),
        _section("Data audit", lambda: audited(runs)),
        _configuration(runs),
        _section("Made with", lambda: _made_with(runs)),
    ]
    # Last, because files that the other sections could not read are problems of their stage.
    scored = [stage for run in runs for stage in run.stages.values() if "weights" in stage.report]
    first = first_things(runs, alarms, weights_checked=digests and bool(scored))
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    subtitle = " · ".join(shown_path(run.path.resolve()) for run in runs)
    return Page(title, subtitle, [first, *map(_with_readable_images, filter(None, built))])


def _section(title: str, build: Callable[[], Section | None]) -> Section | None:
    """The section, or the reason why there is none: a bad file must not hide the other sections."""
    try:
        with reading("this part could not be shown"):
            return build()
    except (Unreadable, OSError) as error:
        return Section(title, [Notice(f"{error}: was it written by another version?")])


def _with_readable_images(section: Section) -> Section:
    """The section with a notice in place of each image that cannot be read."""
    blocks: list[Block] = []
    for block in section.blocks:
        if isinstance(block, Figures):
            sound = []
            for path, caption in block.images:
                try:
                    read_bytes(path)
                    sound.append((path, caption))
                except (Unreadable, OSError) as error:
                    blocks.append(Notice(f"{caption}: the image cannot be read: {error}"))
            block = dataclasses.replace(block, images=sound)
        blocks.append(block)
    return dataclasses.replace(section, blocks=blocks)


def _weights(runs: Sequence[RunRecord], *, digests: bool) -> tuple[list[str], Section | None]:
    alarms, rows = [], []
    for run in runs:
        lying: dict[str, str] = {}
        for folder in EXPORTS if digests else ():
            if config_folder(run.path / folder) is not None:
                try:
                    with reading(run.path / folder):
                        lying[folder] = weights_digest_of(run.path / folder)
                except (ValueError, OSError) as error:
                    alarms.append(of(run, runs, f"{folder} cannot be read: {error}"))
        found, table = scored_weights(run, lying)
        alarms += [of(run, runs, words) for words in found]
        rows += [[of(run, runs, what), *cells] for what, *cells in table]
    if not rows:
        return alarms, None
    note = f"The first {SHOWN} digits of a SHA-256 over names, shapes and values of all weights: equal where the weights are."
    columns = ["what", "digest", "the same weights lie in"]
    return alarms, Section("Weights", [*(Notice(words, "alarm") for words in alarms), Table(columns, rows, note=note)])


def weights_digest_of(folder: Path) -> str:
    """The digest of a model folder, as recorded by `eval`. Only one tensor at a time is in memory."""
    hf, digest = load_model_config(folder), WeightsDigest()
    model = make_model(decoder_config(hf, where=folder / "config.json", images=reads_images(hf)))
    for _ in read_weights(folder, model, digest=digest):
        pass
    return digest.hexdigest()


def _curves(runs: Sequence[RunRecord], drawn: Path) -> tuple[dict[tuple[str, str], list[Path]], dict[str, list[Path]]]:
    """Training curves of each stage, and by the stage's name those that show all runs.

    They are redrawn as SVG, sharp at any size. A run without its metrics shows its PNG files.
    """
    images: dict[tuple[str, str], list[Path]] = {}
    together: dict[str, list[Path]] = {}
    for name in TRAINING:
        found = one_or_more(runs, name)
        rows = {run.name: stage.metrics for run, stage in found if stage.metrics}
        for number, (run, stage) in enumerate(found):
            present = [stage.path / "plots" / f"{panel.file}.png" for panel in PANELS]
            new: list[Path] = []
            with stage.showing("metrics.jsonl"):
                new = training_curves.plot_training(stage.metrics, drawn / f"{name}-{number}", format="svg")
            images[run.name, name] = new or list(filter(os.path.isfile, present))
        if len(rows) > 1:
            with found[0][1].showing("metrics.jsonl"):
                together[name] = training_curves.plot_runs(rows, drawn / f"{name}-all", format="svg")
    return images, together


def _configuration(runs: Sequence[RunRecord]) -> Section | None:
    """Options that differ between the runs, those that all set to the same non-default value, and those of a stage."""
    blocks: list[Block] = []
    bases: dict[str, dict[str, Any]] = {}
    default = _flat(Config())
    for run in runs:
        stages: dict[str, dict[str, Any]] = {}
        for stage in run.stages.values():
            try:
                stages[stage.name] = _flat(load_config(stage.path / "config.yaml"))
            except ConfigError as error:
                stage.problems.append(f"config.yaml cannot be read: {error}")
        if not stages:
            continue
        base = next((name for name in BASES if name in stages), next(iter(stages)))
        bases[run.name] = stages[base]
        rows = [
            [option, name, str(value), str(stages[base][option])]
            for name, options in stages.items()
            for option, value in options.items()
            if value != stages[base][option] and option.partition(".")[0] not in OWN
        ]
        if rows:
            title = of(run, runs, f"Stages with different options from {base}")
            blocks.append(Table(["option", "stage", "its value", f"in {base}"], rows, caption=title))
    if not bases:
        return None
    differing = [option for option in default if len({str(options[option]) for options in bases.values()}) > 1]
    rows = [[option, *(str(options[option]) for options in bases.values()), str(default[option])] for option in differing]
    if rows:
        blocks.insert(0, Table(["option", *bases, "default"], rows, caption="What differs between the runs"))
    common = next(iter(bases.values()))
    rows = [[option, str(value), str(default[option])] for option, value in common.items() if value != default[option]]
    rows = [row for row in rows if row[0] not in differing]
    caption = "Set, and the same in all runs" if len(bases) > 1 else "Options that are not the default"
    return Section("Configuration", [*blocks, Table(["option", "value", "default"], rows, caption=caption)])


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{option}": "null" if value is None else value
        for section, options in dataclasses.asdict(config).items()
        for option, value in options.items()
    }


def _made_with(runs: Sequence[RunRecord]) -> Section | None:
    """Versions, devices and the command of each stage."""
    rows = []
    for run in runs:
        for stage in run.stages.values():
            env: Mapping[str, Any] = stage.env
            if env:
                versions = {name: env.get("packages", {}).get(name) for name in ("dpo_jax", "jax", "flax")}
                packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
                if git := env.get("git"):
                    packages += f", commit {git['commit'][:12]}{' (changed)' if git['dirty'] else ''}"
                hosts = f", {env['processes']} hosts" if env.get("processes", 1) > 1 else ""
                of_kind = env.get("devices", [])
                devices = f"{len(of_kind)} x {of_kind[0]}{hosts}" if of_kind else "-"
                began, command = moment(env.get("started", "-")), shlex.join(env.get("argv", [])[1:])
                rows.append([of(run, runs, stage.name), command, devices, packages, began])
    return Section("Made with", [Table(["stage", "command", "devices", "packages", "begun"], rows)]) if rows else None
