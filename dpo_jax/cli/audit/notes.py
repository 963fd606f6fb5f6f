"""Audit notes: findings to look into before training, each with a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax import loss_table
from dpo_jax.cli.config import Config
from dpo_jax.data.pairs import FILTERED
from dpo_jax.data.terminal import one_line

Note = dict[str, str]  # {"about", "found", "remedy"}, printable
MANY_DUPLICATES = 0.01  # of a split
MANY_CUT = 0.05  # pairs with a truncated prompt, or a truncated completion
LENGTH_DECIDES = 0.6  # lower bound of the accuracy of "the longer one wins", or "the shorter one wins"
FEW_HELD_OUT = 100  # pairs; with fewer, the interval of an accuracy is wider than 0.2


def verdict(config: Config, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Note]]:
    """The notes on each split. `reports` are those of `dpo-jax audit`."""
    train, test = config.data.train_split, config.data.test_split
    found = {
        split: [*_rows(config, report, split), *_repeats(report, split), *_lengths(config, report, split)]
        for split, report in reports.items()
    }
    found[train] += _labels(config, reports[train])
    found[train] += [*_bos(reports[train]), *_template(config, reports[train])]
    found[test] += [*_overlap(reports[test], train, test), *_size(reports[test], test)]
    return found


def _note(about: str, found: str, remedy: str) -> Note:
    return {"about": about, "found": one_line(found), "remedy": one_line(remedy)}


def _rows(config: Config, report: Mapping[str, Any], split: str) -> Iterator[Note]:
    bad = sum(count for cause, count in report["dropped"].items() if cause not in FILTERED)
    if bad:
        remedy = "repair them, or train without them" if config.data.on_bad == "drop" else "repair them, or --data.on-bad drop"
        yield _note("bad rows", f"{bad:,} of {report['read']:,} {split} rows cannot be used", remedy)


def _overlap(report: Mapping[str, Any], train: str, test: str) -> Iterator[Note]:
    found = report["overlap"]
    if prompts := found["prompts"]["pairs"]:
        words = f"{prompts:,} of {found['prompts']['of']:,} {test} pairs have a prompt that is also in {train}"
        same, swapped = found["pairs"]["pairs"], found["swapped"]["pairs"]
        words += f", {same:,} with the same answers" if same else ""
        words += f", {swapped:,} with the answers swapped" if swapped else ""
        yield _note("overlap", words, "held-out accuracy is partly memory; split by prompt (limit: --data.max-overlap)")


def _repeats(report: Mapping[str, Any], split: str) -> Iterator[Note]:
    contradictions, duplicates = report["repeats"]["contradictions"], report["repeats"]["duplicates"]
    if count := contradictions["pairs"]:
        yield _note(
            "contradictions",
            f"{count:,} of {contradictions['of']:,} {split} pairs repeat an earlier one with chosen and rejected swapped",
            "keep the right pair of the two, or allow for noise with --dpo.label-smoothing (limit: --data.max-contradictions)",
        )
    if duplicates["share"] >= MANY_DUPLICATES:
        yield _note(
            "duplicates",
            f"{duplicates['pairs']:,} of {duplicates['of']:,} {split} pairs repeat an earlier one and count more than once",
            "keep each pair once (limit: --data.max-duplicates)",
        )


def _lengths(config: Config, report: Mapping[str, Any], split: str) -> Iterator[Note]:
    if (rule := report["longer_wins"]) is None:
        yield from _cut(config, report, split)
        return
    longer = rule["accuracy"] >= 0.5
    accuracy, bound = (rule["accuracy"], rule["low"]) if longer else (1 - rule["accuracy"], 1 - rule["high"])
    if bound >= LENGTH_DECIDES:
        yield _note(
            "length",
            f'the rule "the {"longer" if longer else "shorter"} one wins" alone has accuracy {accuracy:.2f} on {split}',
            "the policy may learn only that; watch the tokens per sample in eval, and the accuracy by length of eval --rewards",
        )
    yield from _cut(config, report, split)


def _cut(config: Config, report: Mapping[str, Any], split: str) -> Iterator[Note]:
    data, cut = config.data, report["cut"]["prompt"]["pairs"]
    if cut / report["kept"] >= MANY_CUT:
        lost = "end" if data.truncation == "keep_start" else "beginning"
        found = f"{cut:,} of {report['kept']:,} {split} prompts lost their {lost}, cut to {data.max_prompt_length} tokens"
        remedy = "raise --data.max-prompt-length with --data.max-length, or keep prompts whole: --data.truncation completions"
        yield _note("cut prompts", found, remedy)
    cut = report["cut"]["completions"]["pairs"]
    if cut / report["kept"] >= MANY_CUT:
        found = f"{cut:,} of {report['kept']:,} {split} pairs lost the end of a completion, and its EOS"
        yield _note("cut", found, "raise --data.max-length")


def _labels(config: Config, report: Mapping[str, Any]) -> Iterator[Note]:
    """Notes on single completions: whether the loss reads them, and whether both sides have about the same total weight."""
    labels = report.get("labels")
    if "demonstrations" in report:
        yield _note("task", "the rows are texts for supervised fine-tuning, without preferences", "train with dpo-jax sft")
    if labels is None:
        return
    if loss_table.rows_of(config.dpo.loss) != "unpaired":
        found = f"the rows are single completions with a label, which loss {config.dpo.loss} does not read"
        yield _note("loss", found, f"train with --dpo.loss {loss_table.names_of('unpaired')}")
    weights = config.dpo.desirable_weight, config.dpo.undesirable_weight
    good, bad = (weight * labels[name] for weight, name in zip(weights, ("desirable", "undesirable"), strict=True))
    if not bad <= good <= 4 / 3 * bad:
        found = f"desirable completions weigh {good:,.6g} (weight times number) and undesirable ones {bad:,.6g}"
        advice = "the KTO paper recommends a ratio of 1 to 4/3: set --dpo.desirable-weight or --dpo.undesirable-weight"
        yield _note("labels", found, advice)


def _size(report: Mapping[str, Any], test: str) -> Iterator[Note]:
    if report["kept"] < FEW_HELD_OUT:
        found = f"{report['kept']:,} {test} pairs are too few to tell policies apart by their accuracy"
        yield _note("held-out size", found, "hold out a few hundred")


def _bos(report: Mapping[str, Any]) -> Iterator[Note]:
    bos, kept = report["bos"], report["kept"]
    if bos["pairs"] not in (0, kept):
        found = f"{bos['pairs']:,} of {kept:,} prompts begin with BOS, and the others do not"
        yield _note("bos", found, "set --data.bos to always or never")
    elif not report["conversations"] and bos["tokenizer_adds_it"] != (bos["pairs"] > 0):
        own, here = ("begins", "do not") if bos["tokenizer_adds_it"] else ("does not begin", "do")
        found = f"the tokenizer {own} a text with BOS, but prompts {here} (--data.bos {bos['option']})"
        yield _note("bos", found, "when you serve the policy, encode prompts the same way")


def _template(config: Config, report: Mapping[str, Any]) -> Iterator[Note]:
    template = report["template"]
    if template is None:
        return
    if not report["conversations"]:
        found = "the tokenizer has a chat template, which is not used, as the data are plain texts"
        yield _note("template", found, "a chat model needs turns: --data.format chat_texts, or rows of messages")
        return
    if template["date"] is not None:
        found = f"the template writes a date, {template['date']!r}, into every prompt"
        yield _note("date", found, "this run keeps it (--data.date sets another); a server will write its current date")
    if template["generation_prompt"] == "":
        found = "the template has no generation prompt"
        yield _note("generation prompt", found, "completions begin with the assistant's header, and sampling must generate it")
    if template["reasoning"] == "dropped":
        found = "the template drops <think>...</think> from completions"
        yield _note("reasoning", found, "reasoning is not trained on; to train on it, use a template that keeps it")
    if template["earlier_turns"] == "dropped":
        yield _note("earlier turns", "the template drops earlier turns", "the policy never sees them; use another template")
