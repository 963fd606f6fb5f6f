"""`dpo-jax label`: preferences from samples (appendix C.1). The reference completes prompts; a known reward labels all pairs.

Writes to `<run.dir>/label`: a file for each split, such as `train.jsonl` and `test.jsonl`, which `data.source: files` reads
with `data.path` set to the folder; and `data_report.json`, in which kept + dropped = read for each split.
"""

from __future__ import annotations

from pathlib import Path

import jax

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.experiment import labeled_samples, make_world, of_training, sized
from dpo_jax.data.label import LabelCounts
from dpo_jax.data.pairs import Cause, DataError, DataReport
from dpo_jax.data.template import is_rendered
from dpo_jax.runtime.hosts import is_first
from dpo_jax.writing import same_place


def run(config: Config) -> int:
    config = sized(config)
    if config.data.path is not None and same_place(config.data.path, Path(config.run.dir, "label")):
        raise ConfigError(f"data.path: {config.data.path} is where label writes; choose another --run.dir")
    with build.open_run(config, "label") as run_dir:
        world, _ = make_world(config, train="prompts", test="test_prompts")
        build.describe(run_dir, config)
        if is_first():  # a kill must not leave pairs of an earlier run beside those of this one
            for old in (
                *(f"{split}.jsonl" for split in (config.data.train_split, config.data.test_split)),
                run_dir.data_report.name,
            ):
                (run_dir.path / old).unlink(missing_ok=True)
        key, reports = of_training(config), []
        splits = (
            (config.data.train_split, world.train, key),
            (config.data.test_split, world.test, jax.random.fold_in(key, 1)),
        )
        for split, prompts, its_key in splits:
            print(f"{split}: {config.frontier.completions} completions of each of {len(prompts.ids):,} prompts", flush=True)
            pairs, counts = labeled_samples(config, world, prompts, run_dir.path / f"{split}.jsonl", key=its_key)
            if not counts.labeled:
                raise DataError(f"{split}: no pair is left, of {counts.pairs}: {_dropped(counts)}", causes=[Cause.NO_ROWS])
            reports.append(_report(split, counts))
        rendered = any(is_rendered(pair.prompt, world.tokenizer) for pair in pairs)
        build.describe(run_dir, config, *reports)
        print(f"read them with --data.source files --data.path {run_dir.path}" + " --data.rendered" * rendered)
    return 0


def _report(split: str, counts: LabelCounts) -> DataReport:
    report = DataReport(source="samples", split=split, format="samples", rows=counts.pairs, read=counts.pairs)
    report.kept, report.dropped = counts.labeled, _dropped(counts)
    report.notes.append(f"{counts.against} labeled against the reward")
    report.check()
    return report


def _dropped(counts: LabelCounts) -> dict[str, int]:
    dropped = {Cause.TIE: counts.ties, Cause.IDENTICAL: counts.identical, Cause.EMPTY: counts.empty}
    return {cause.value: count for cause, count in (dropped | ({Cause.EOS_IN_TEXT: counts.eos} if counts.eos else {})).items()}
