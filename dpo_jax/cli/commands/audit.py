"""`dpo-jax audit`: counts and checks the data before any training, as a printed page. The report page shows it, too."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build, splits
from dpo_jax.cli.audit.notes import verdict
from dpo_jax.cli.audit.page import page
from dpo_jax.cli.config import Config
from dpo_jax.cli.fixed import pin_revisions
from dpo_jax.cli.images import encoder_for
from dpo_jax.cli.repeats import look_for_repeats, refuse_repeats
from dpo_jax.data.encode import Encoded, adds_bos, prompt_key
from dpo_jax.data.image_prompts import ImageTokens
from dpo_jax.data.layout import Text
from dpo_jax.data.lengths import cut_table, length_differences, length_table, parts_of, source_table
from dpo_jax.data.loader import plan_layout, train_batches
from dpo_jax.data.pairs import PreferenceSet
from dpo_jax.data.prepare import EncodedSet
from dpo_jax.data.repeats import Overlap, Repeats
from dpo_jax.data.template import template_parts
from dpo_jax.data.token_text import token_strings
from dpo_jax.evals.intervals import by_prompt, score_interval
from dpo_jax.runtime.rundir import write_json

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def run(config: Config) -> int:
    """Prints and writes the report. Whatever `data.on_bad` and the limits refuse is counted first, and refused afterwards."""
    with build.open_run(config, "audit") as run_dir:
        tolerant = splits.with_data(config, on_bad="drop", max_dropped_share=1.0)
        tokenizer = build.tokenizer_of(tolerant, model_path=config.model.path)
        rows = loss_table.rows_of(config.dpo.loss)
        rows = "any" if rows == "pairs" else rows  # files of single completions can be audited, too
        preferences = splits.load_splits(tolerant, tokenizer, rows=rows, images=True)
        images = _image_tokens(config, tokenizer, preferences)
        pin_revisions(config)  # later training uses the audited data
        train, test = (splits.encode_split(tolerant, loaded, tokenizer, images) for loaded in preferences)
        found = look_for_repeats(train, test)
        reports = {
            split.report.split: split_report(config, loaded, split, tokenizer, repeats=repeats)
            for loaded, split, repeats in zip(preferences, (train, test), (found.train, found.test), strict=True)
        }
        reports[train.report.split] |= {
            "template": parts._asdict() if (parts := template_parts(tokenizer)) else None,
            "example": example(train, tokenizer),
        }
        reports[test.report.split]["overlap"] = plain(found.overlap)
        for name, notes in verdict(config, reports).items():
            reports[name]["verdict"] = notes
        build.describe(run_dir, config)
        write_json(run_dir.data_report, reports)
        print(page(config, reports))
        print(f"full report: {run_dir.data_report}")
        # The same checks as a training command makes, with the configured strictness.
        for name, split in zip(SPLITS, (train, test), strict=True):
            if split.report.bad_share:
                again = splits.load_split(config, name, tokenizer, rows=rows, images=True)
                splits.encode_split(config, again, tokenizer, images)
        refuse_repeats(config, found)
    return 0


def _image_tokens(config: Config, tokenizer: Any, preferences: Sequence[PreferenceSet]) -> ImageTokens | None:
    """How images become tokens for the model of `model.path`, without computing features. None if there are no images.

    Raises `ConfigError` if prompts show images and that model has no encoder.
    """
    encoder = encoder_for(config, config.model.path, tokenizer, *preferences, name="model.path")
    if encoder is None:
        return None
    nothing = np.zeros((encoder.tokens, 1), np.float32)
    return ImageTokens(encoder.tokens, collections.defaultdict(lambda: nothing))


def split_report(
    config: Config, preferences: PreferenceSet, encoded: EncodedSet, tokenizer: Any, *, repeats: Repeats
) -> dict[str, Any]:
    """All counts of one split, as JSON values."""
    bos: int | None = tokenizer.bos_token_id
    counted = encoded.report.to_json()
    for name, found in source_table(encoded).items() if "sources" in counted else ():
        counted["sources"][name] |= found
    labels, texts = label_counts(encoded), any(preference.demonstration for preference in preferences)
    return {
        **counted,
        "conversations": sum(preference.chat for preference in splits.only_kept(preferences, encoded)),
        "repeats": plain(repeats),
        "lengths": length_table(encoded),
        "cut": cut_table(encoded),
        "longer_wins": None
        if labels or texts
        else longer_wins(length_differences(encoded), [prompt_key(pair) for pair in encoded]),
        **({"demonstrations": len(encoded)} if texts else {"labels": labels} if labels else {}),
        "packing": row_statistics(config, [(pair.prompt, pair.chosen) for pair in encoded] if texts else encoded),
        "bos": {
            "option": config.data.bos,
            "token": tokenizer.bos_token,
            "tokenizer_adds_it": adds_bos(tokenizer),
            "pairs": 0 if bos is None else sum(pair.prompt[:1].tolist() == [bos] for pair in encoded),
        },
    }


def plain(found: Repeats | Overlap) -> dict[str, Any]:
    """A report as JSON values."""
    return {name: finding._asdict() for name, finding in found._asdict().items()}


def longer_wins(differences: np.ndarray, prompts: Sequence[bytes] | None = None) -> dict[str, float]:
    """How often chosen has more tokens, and the accuracy of "the longer one wins" (ties count half; 95 % interval).

    `prompts` identify the prompts, as in `evals.intervals.by_prompt`: the interval counts a prompt once.
    """
    longer, equal = int((differences > 0).sum()), int((differences == 0).sum())
    scores, pairs = (1 + np.sign(differences)) / 2, len(differences)
    low, high = score_interval(*by_prompt(scores, prompts))
    accuracy = float(scores.mean())
    return {"chosen_longer": longer / pairs, "equal": equal / pairs, "accuracy": accuracy, "low": low, "high": high}


def example(encoded: Sequence[Any], tokenizer: Any) -> dict[str, Any]:
    """The first pair as the model reads it: ids and strings of its tokens, and which of them the loss counts.

    "scored" is true, false, or a list with a value for each token. For a ranking, only the first
    completion between best and worst is shown.
    """
    pair = encoded[0]
    label = {} if pair.desirable is None else {"desirable": pair.desirable}
    marks = {"chosen": pair.chosen_scored, "completion": pair.chosen_scored, "rejected": pair.rejected_scored}
    return {"uid": pair.uid, **label} | {
        name: {
            "ids": ids.tolist(),
            "tokens": token_strings(ids, tokenizer),
            "scored": name != "prompt" and (True if (scored := marks.get(name)) is None else scored.tolist()),
        }
        for name, ((ids, *_), _) in parts_of(pair).items()
    }


def label_counts(encoded: Sequence[Any]) -> dict[str, int] | None:
    """Numbers of desirable and undesirable single completions; None for pairs and rankings."""
    if encoded[0].desirable is None:
        return None
    desirable = sum(pair.desirable for pair in encoded)
    return {"desirable": desirable, "undesirable": len(encoded) - desirable}


def row_statistics(config: Config, encoded: Sequence[Encoded] | Sequence[Text]) -> dict[str, Any]:
    """How full the rows of the configured layout are, over the first eight batches of `dpo`, or of its size with texts."""
    batch = config.dpo.batch
    layout = plan_layout(encoded, kind=config.data.layout, batch=batch, length=config.data.row_length)
    at = train_batches(encoded, layout=layout, batch=min(batch, len(encoded)), seed=config.run.seed)
    filled = [at(step).stats["padding"] for step in range(min(8, max(1, len(encoded) // batch)))]
    return {"layout": layout.kind, "length": layout.length, "batch": batch, "padding": float(np.mean(filled))}
