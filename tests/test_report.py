"""The page about a run: what it shows, warns of and names as missing, and that no text of a model becomes markup."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil

import pytest
from conftest import GOLDEN
from tiny_run import call, refused

from dpo_jax.cli.commands.agree import plain
from dpo_jax.cli.commands.report import weights_digest_of
from dpo_jax.cli.config import Config, DpoConfig, RunConfig, dump_config
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.hf import load_hf
from dpo_jax.plotting.training_curves import plot_runs
from dpo_jax.report.page import (
    Page,
    Sample,
    Section,
    Side,
    Table,
    Text,
    markdown_text,
    render_html,
    render_markdown,
)
from dpo_jax.report.run_record import RunRecord
from dpo_jax.report.weights import scored_weights
from dpo_jax.study.agreement import table_2
from dpo_jax.study.ratings import Judgment

HOSTILE = (
    "</dd></article><script>alert(1)</script> <img src=http://evil.example/x onerror=alert(2)> & &amp;\n"
    "# Heading\n\n- item\n1. one\n| a | b |\n|---|---|\n```\ncode\n``` `tick` **bold** _it_ ~~no~~ $x$ "
    "[link](javascript:alert(3)) "
    "![image](http://evil.example/y.png) https://evil.example www.evil.example <!-- {{ 7 * 7 }} {% raw %}\u2028===\n---"
)


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


class Seen(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def json_to(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_run(root, *, beta=0.1, steps=6):
    """A run directory such as sft, dpo, eval and eval --rewards leave it, with the golden models as exports."""
    config = dataclasses.replace(Config(), run=RunConfig(dir=str(root)), dpo=DpoConfig(beta=beta))
    counts = {"read": 12, "kept": 10, "dropped": {"empty": 1, "tie": 1}, "truncated": {"prompt": 3}, "notes": []}
    env = {"packages": {"dpo_jax": "0.1", "jax": "0.1", "flax": "0.1"}, "devices": ["cpu"], "processes": 1}
    for stage in ("sft", "dpo", "eval"):
        (root / stage).mkdir(parents=True)
        (root / stage / "config.yaml").write_text(dump_config(config))
        json_to(root / stage / "env.json", env | {"argv": ["dpo-jax", stage], "started": "2026-01-01T00:00:00+00:00"})
    json_to(root / "dpo" / "data_report.json", {"train": {"source": "x.jsonl", "format": "trl", **counts}})
    for stage, weights in (("sft", "init"), ("dpo", "dpo_final")):
        shutil.copytree(GOLDEN / "gpt2" / weights, root / stage / "export")
        margins = [{"rewards/margins": 0.1 * step} if stage == "dpo" else {} for step in range(steps)]
        rows = [{"step": step, "loss": 1.0 / (step + 1), **margins[step]} for step in range(steps)]
        rows += [{"step": steps, "eval/loss": 0.2, "eval/rewards/accuracies": 0.7}] if stage == "dpo" else []
        (root / stage / "plots").mkdir()
        (root / stage / "plots" / "loss.png").write_bytes(PIXEL)
        (root / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measures = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/accuracies_low": 0.6, "rewards/accuracies_high": 0.86}
    report = {
        "pairs": 40,
        "weights": {},
        "sampling": {"prompts": 9},
        "reference": {"loss": 0.6931},
        "policy": {**measures, "kl": 2.0, "kl_error": 0.25},
    }
    for role, stage in (("reference", "sft"), ("policy", "dpo")):
        report["weights"][role] = weights_digest_of(root / stage / "export")
    json_to(root / "eval" / "report.json", report)
    samples = [{"prompt": f"Prompt {i}?", "reference": "plain", "policy": HOSTILE if i == 0 else "fine"} for i in range(9)]
    (root / "eval" / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "first")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "first", ignore=shutil.ignore_patterns("report"))


def change(path, **values):
    json_to(path, json.loads(path.read_text()) | values)


@pytest.fixture
def curves():
    """Asked for by the tests that look at the curves of training, which take most of the time of a report to draw."""


@pytest.fixture(autouse=True)
def _one_small_curve(request, monkeypatch):
    def stand_in(rows, directory, *, format):
        directory.mkdir(parents=True)
        (directory / f"loss.{format}").write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
        return [directory / f"loss.{format}"] if rows else []

    if "curves" not in request.fixturenames:
        monkeypatch.setattr("dpo_jax.plotting.training_curves.plot_training", stand_in)


def report(*arguments, out):
    result = call("report", *arguments, "--report.out", out)
    assert result.code == 0, result.err
    return result.out, (out / "report.html").read_text(), (out / "report.md").read_text()


# What the page shows.


@pytest.mark.usefixtures("curves")
def test_a_finished_run_is_shown_without_a_warning_but_that_pairs_were_dropped(finished, tmp_path):
    out, page, markdown = report(finished, out=tmp_path)
    assert [line for line in out.splitlines() if not line.startswith("/")] == [
        "note: dpo: 1 of 12 pairs of train were dropped as bad: 1 empty"
    ]
    seen = Seen(page)
    shown = re.sub(r"[\\*]", "", markdown)
    for text in (
        "done, 6 steps",
        "0.750 (0.600 to 0.860)",
        "2.00 ± 0.25",
        "implicit-reward tables (dpo-jax eval --rewards)",
        "win rates by a judge (dpo-jax judge)",
        "1 empty, 1 tie",
        "Prompt 0?",
        "unknown: no true reward was measured",
        weights_digest_of(finished / "dpo" / "export")[:12],
    ):
        assert text in seen.text
        assert text in shown
    titles = re.findall(r"^## (.*)$", markdown, re.M)
    assert titles == [
        "Read this first",
        "Held-out evaluation",
        "Over-optimization",
        "Samples",
        "Training",
        "Weights",
        "Data",
        "Configuration",
        "Made with",
    ]
    assert [seen.text.count(f"Prompt {i}?") for i in range(9)] == [1] * 6 + [0] * 3


@pytest.mark.usefixtures("curves")
def test_the_page_is_self_contained_and_has_no_script(finished, tmp_path):
    _, page, markdown = report(finished, out=tmp_path)
    seen = Seen(page)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    for name, value in seen.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,", "#"))
    anchors = [value for name, value in seen.attributes if name == "href"]
    ids = [f"#{value}" for name, value in seen.attributes if name == "id"]
    assert sorted(anchors) == sorted(ids)  # each section has a link, each figure one to enlarge it and one back
    assert "default-src 'none'" in page
    linked = re.findall(r"^!\[.*\]\((.*?)\)$", markdown, re.M)
    assert len(linked) == seen.tags.count("img") == len(list((tmp_path / "images").iterdir()))
    assert all((tmp_path / link).read_bytes().startswith((b"\x89PNG", b"<?xml")) for link in linked)


def test_text_of_a_model_is_data(finished, tmp_path):
    _, page, markdown = report(finished, out=tmp_path)
    seen = Seen(page)
    assert HOSTILE.replace("\u2028", r"\u2028") in seen.text
    assert "onerror" not in [name for name, _ in seen.attributes]
    (line,) = [line for line in markdown.splitlines() if "alert" in line]
    assert line.startswith("> **policy:** ")
    # Nothing but our own breaks, labels and the first marks of a line is left unescaped.
    bare = re.sub(r"\\.", "", line.removeprefix("> **policy:** ").replace("<br>", " "))
    assert not re.search(r"[<>`*_\[\]|~$&]|://|www\.", bare)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.962 (0.941 to 0.976)", "0.962 (0.941 to 0.976)"),
        ("-0.05", "-0.05"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("12. a", r"12\. a"),
        ("1) a", r"1\) a"),
        ("---", r"\---"),
        ("a|b\nc", r"a\|b<br>c"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        (r"\*", r"\\\*"),
        ("see https://x.y and @me", r"see https\://x.y and \@me"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text, expected):
    assert markdown_text(text) == expected


def test_a_page_by_hand():
    table = Table(["what", "a", "b"], [["x", "1.5 (1 to 2)", "yes"], ["<y>", "-", "2"]], caption="A & B", note="n|m")
    page = Page("T", "s", [Section("Two words", [Text("p"), table, Sample("q", [Side("who", "w")])])])
    assert page.sections[0].anchor == "two-words"
    assert table.right == [False, True, False]
    html_, markdown = render_html(page), render_markdown(page, link=str)
    assert "<caption><span>A &amp; B</span></caption>" in html_
    assert '<tr><th scope="row">&lt;y&gt;</th><td class="number">-</td><td>2</td></tr>' in html_
    assert "**A & B**".replace("&", r"\&") in markdown
    assert '<td class="number">1.5 <span class="whole">(1 to 2)</span></td><td>yes</td>' in html_
    assert "| what | a | b |\n| --- | ---: | --- |\n| x | 1.5 (1 to 2) | yes |\n| \\<y\\> | \\- | 2 |\n" in markdown
    assert "> **Prompt:** q\n>\n> **who:** w\n" in markdown


@pytest.mark.usefixtures("curves")
def test_several_runs_stand_side_by_side(finished, tmp_path):
    second = make_run(tmp_path / "second", beta=0.5, steps=3)
    shutil.rmtree(second / "eval")
    _, page, markdown = report(finished, second, out=tmp_path / "out")
    shown = markdown.replace("\\", "")
    assert "# 2 runs: first, second" in shown
    assert "| dpo | done, 6 steps | done, 3 steps |" in shown
    assert "| eval | done | - |" in shown
    assert "| dpo.beta | 0.1 | 0.5 | 0.1 |" in shown
    assert "| measure | first: reference | first: policy |" in shown
    assert "dpo: all runs" in Seen(page).text
    assert "Nothing unusual in: weights (the scored ones are in this run); first: accuracy, KL." in Seen(page).text
    assert "second: accuracy, displacement of the chosen" in Seen(page).text  # not measured there
    twins = tmp_path / "elsewhere" / "first"
    shutil.copytree(finished, twins)
    for stage in ("sft", "dpo"):
        (twins / stage / "metrics.jsonl").unlink()
    _, _, markdown = report(finished, twins, "--report.no-digests", out=tmp_path / "out")
    assert f"| stage | {finished} | {twins} |" in markdown.replace("\\", "")
    assert "**policy of" in markdown
    assert "reference of" in markdown
    assert markdown.count("alert(1)") == 1  # both runs wrote the same text


# What the page warns of.


def test_the_base_model_scored_by_mistake_is_told(copy, tmp_path):
    start, policy = (weights_digest_of(copy / stage / "export") for stage in ("sft", "dpo"))
    file = copy / "eval" / "report.json"
    for weights, words in (
        ({"reference": start, "policy": start}, "policy and reference are the same weights"),
        ({"reference": policy, "policy": start}, "is sft/export, the starting policy"),
        ({"reference": start, "policy": "f" * 64}, "is not dpo/export as it is now"),
        ({"reference": "e" * 64, "policy": policy}, "the reference (eeeeeeeeeeee) is not sft/export as it is now"),
    ):
        change(file, weights=weights)
        out, page, _ = report(copy, out=tmp_path / "out")
        assert "careful: eval: " in out
        assert words in out
        assert words in Seen(page).text
        assert 'class="notice alarm"' in page
    out, _, _ = report(copy, "--report.no-digests", out=tmp_path / "out")
    assert "careful" not in out


def test_an_export_that_was_written_anew_is_told(copy, tmp_path):
    shutil.rmtree(copy / "dpo" / "export")
    shutil.copytree(copy / "sft" / "export", copy / "dpo" / "export")
    out, _, _ = report(copy, out=tmp_path / "out")
    assert "careful: dpo/export holds the same weights as sft/export" in out
    assert "is not dpo/export as it is now" in out
    (copy / "dpo" / "export" / "model.safetensors").write_bytes(b"short")
    out, _, _ = report(copy, out=tmp_path / "out")
    assert "careful: dpo/export cannot be read" in out


def test_the_digest_is_that_which_eval_writes_down():
    folder = GOLDEN / "gpt_neox" / "init"
    assert weights_digest_of(folder) == weights_digest(load_hf(folder)[1])
    alarms, rows = scored_weights(RunRecord("r", GOLDEN, {}), {"sft/export": "a" * 64})
    assert (alarms, rows) == ([], [["sft/export, as it is now", "a" * 12, "-"]])


@pytest.mark.usefixtures("curves")
def test_what_failed_is_told(copy, tmp_path):
    folder = copy / "dpo"
    for name in ("export", "plots"):  # a run that has not come to them
        shutil.rmtree(folder / name)
    json_to(folder / "bad_batch.json", {"step": 6, "uids": ["a:1", "a:2"], "metrics": {"loss": "nan", "grad_norm": "inf"}})
    (folder / "resumes.jsonl").write_text('{"step": 3, "time": "2026-01-02"}\n')
    (folder / "checkpoints" / "quarantine" / "4").mkdir(parents=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.1, "kl": null}\n')
    (copy / "eval" / "report.json").write_text('{"torn')
    (copy / "sft" / "config.yaml").write_text("nonsense: 1\n")
    out, page, _ = report(copy, out=tmp_path / "out")
    for words in (
        "dpo: not finished, 7 steps so far: export/config.json is missing; run the same command again to continue it",
        "dpo: stopped at step 6 because of loss nan, grad_norm inf, in a batch of 2: a:1, a:2.",
        "dpo: was interrupted, and continued after 3 steps (2026-01-02)",
        "dpo: checkpoints/quarantine/ holds what was found damaged: 4",
        "dpo: 1 values in metrics.jsonl are not finite, the first kl at step 6",
        "eval: report.json cannot be read",
        "sft: config.yaml cannot be read",
    ):
        assert f"note: {words}" in out
        assert words in Seen(page).text
    assert "passed that step" not in out
    assert {path.name[3:] for path in (tmp_path / "out" / "images").iterdir()} >= {"rewards.svg", "accuracies.svg"}
    assert "Held-out evaluation" not in page


def test_a_report_of_another_version_does_not_hide_the_rest(copy, tmp_path):
    change(copy / "eval" / "report.json", policy={"rewards/accuracies_low": "x"})
    json_to(copy / "rewards" / "report.json", {"rewards": {"other": 1}})
    shutil.copy(copy / "dpo" / "config.yaml", copy / "rewards")
    _, page, _ = report(copy, out=tmp_path / "out")
    for words in (
        "report.json: 'policy', 'rewards/accuracies_low': expected a number, got a string",
        "rewards/report.json: has no 'pairs'",
    ):
        assert words in Seen(page).text
    assert "Prompt 0?" in page


def test_what_is_no_run_is_refused(finished, tmp_path):
    assert "no such folder" in refused(2, "report", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "not a run directory" in refused(2, "report", tmp_path / "empty")
    assert f"one stage of a run; give its run directory, {finished}" in refused(2, "report", finished / "dpo")
    assert "is named twice" in refused(2, "report", finished, finished)
    assert "report needs run directories first" in refused(2, "report", "--report.samples", 1)
    assert "a comma" in refused(2, "report", "a,b")
    assert "report.samples: must not be negative" in refused(2, "report", finished, "--report.samples", -1)
    assert not (finished / "report").exists()


def test_runs_may_be_named_in_a_file(finished, tmp_path):
    (tmp_path / "report.yaml").write_text(f"report: {{runs: {finished}, samples: 0, out: {tmp_path / 'out'}}}\n")
    assert call("report", tmp_path / "report.yaml").code == 0
    assert "## Samples" not in (tmp_path / "out" / "report.md").read_text()


# Pieces.


POINT = {"series": "dpo", "pairs": 9, "won": 4, "lost": 2, "flipped": 2, "failed": 1, "unanswered": 0}
POINT |= {
    "policy_length": 81.4,
    "baseline_length": 60.0,
    "pairs_at_equal_length": 0,
    "extrapolated": True,
    "win_rate_at_equal_length": None,
}
for name, values in (
    ("win_rate", (0.625, 0.4, 0.8)),
    ("win_rate_length_controlled", (0.5, 0.25, 0.75)),
    ("win_rate_at_equal_length", (None,) * 3),
):
    POINT |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
JUDGED = {
    "settings": {"model": "gpt-4", "prompt": "summary-simple", "one_order": False, "fence": True},
    "baseline": "runs/sft.jsonl",
    "by": "temperature",
    "questions": 36,
    "answers": 30,
    "models": {"gpt-4-0314": 30},
    "failures": {"format": 1},
    "faults": {"429": 3},
    "first_preferred": {"value": 0.6, "low": 0.4, "high": 0.8, "pairs": 29},
    "requests": 33,
    "tokens": {"read": 3000, "written": 600},
    "cost": 0.0,
    "outcomes": {"unanswered": 0},
    "books": {"runs/sft.jsonl": {"dropped": {}}, "dpo": {"dropped": {"the baseline lacks this prompt": ["a:1", "a:2"]}}},
    "injections": [{"injection": "a letter", "lost": 1, "flipped": 2, "won": 0, "failed": 0, "unanswered": 0}],
    "points": [POINT | {"at": 0.0}, POINT | {"at": 0.25}],
}


def test_every_folder_of_a_judge_is_shown_and_an_unfinished_one_told(copy, tmp_path):
    for name, changes in (
        ("judge", {"outcomes": {"won": 18, "failed": 2, "unanswered": 0}}),
        ("judge-steps", {"by": "step", "outcomes": {"unanswered": 7}, "points": [POINT | {"at": 200.0}]}),
        ("judge-once", {"settings": JUDGED["settings"] | {"one_order": True}, "points": [POINT | {"at": None}]}),
    ):
        json_to(copy / name / "report.json", JUDGED | changes)
        shutil.copy(copy / "dpo" / "config.yaml", copy / name)
        (copy / name / "win_rates.png").write_bytes(PIXEL)
    out, page, markdown = report(copy, out=tmp_path / "out")
    shown = markdown.replace("\\", "")
    assert "note: judge-steps: not finished: 7 pairs have no verdict yet; run the same command again to continue it" in out
    assert "note: judge: the judge gave no answer in the format on 2 of 20 pairs: its win rates are over the others" in out
    assert "win rates by a judge (dpo-jax judge)" not in shown
    for words in (
        "**judge: against sft.jsonl, by gpt-4 (summary-simple)**",
        "| policy | temperature | pairs | win rate | won | lost | flipped | failed |",
        "| dpo | 0.25 | 9 | 0.625 (0.400 to 0.800) | 4 | 2 | 2 | 1 |",
        "| dpo | 0.25 | 81 / 60 | 0 | - | 0.500 (0.250 to 0.750), extrapolated |",
        "36 questions, in both orders, texts fenced as data; 30 answered by gpt-4-0314. Answers without a verdict: 1 not in "
        "the format that was asked for. Faults of the endpoint, asked again: 3 429. The text shown first was preferred in "
        "60.0% (40.0% to 80.0%). 2 completions of dpo were left out. 33 requests, 3,600 tokens.",
        "| policy | step | pairs |",
        "| dpo | 200 |",
        "| a letter | 1 | 2 | 0 | 0 | 0 |",
        "| policy | pairs | win rate | won | lost | failed |",
    ):
        assert words in shown
    assert page.count("<img") == markdown.count("](images/")


def test_table_2_of_people_is_shown(copy, tmp_path):
    judgments = [Judgment(str(item), rater, "ab"[item % 3 == 0]) for item in range(30) for rater in ("ann", "bob")]
    table = table_2(judgments, {"GPT-4": {str(item): "a" for item in range(30)}}, seed=0)
    json_to(copy / "agree" / "agreement.json", {"study": "1", "names": {"a": "dpo", "b": "ppo"}, **plain(table)})
    shutil.copy(copy / "dpo" / "config.yaml", copy / "agree")
    _, _, markdown = report(copy, out=tmp_path / "out")
    shown = markdown.replace("\\", "")
    assert "|  | dpo / ppo |" in shown
    assert "| raters | 2 |" in shown
    assert "| H-H agree % | 100.0 (88.6 to 100.0) |" in shown
    assert re.search(r"\| GPT-4-H agree % \| 66.7 \(", shown)


def test_runs_share_axes(tmp_path):
    rows = [{"step": step, "loss": 1.0, "kl": None} for step in range(90)]
    (path,) = plot_runs({f"run {i}": rows for i in range(7)}, tmp_path / "runs")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_fine_is_said_of_what_was_looked_at_and_not_above_a_sick_policy(copy, tmp_path):
    out, page, _ = report(copy, out=tmp_path / "out")
    assert "Nothing unusual in: weights (the scored ones are in this run), accuracy, KL." in Seen(page).text
    assert "Not measured: displacement of the chosen, samples cut, length" in Seen(page).text
    assert not re.search(r"\bFine\b", page)
    values = json.loads((copy / "eval" / "report.json").read_text())["policy"] | {"kl": 16.7, "displacement/chosen": -8.2}
    change(copy / "eval" / "report.json", policy=values)
    out, page, markdown = report(copy, out=tmp_path / "out")
    assert "note: KL: KL(policy || reference) is 16.7 nats" in out
    assert 'class="notice health"' in page
    assert "The chosen completions became less likely, by 8.2 nats each" in Seen(page).text
    assert "Nothing unusual in: weights (the scored ones are in this run), accuracy." in Seen(page).text
    assert "Try a larger beta" in markdown


def test_the_report_shows_sft_per_token_and_the_commit(copy, tmp_path):
    with open(copy / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "eval/loss": 34.9, "eval/nll_per_token": 1.25}\n')
    change(copy / "dpo" / "env.json", git={"commit": "c0ffee" * 6, "dirty": True})
    _, _, markdown = report(copy, out=tmp_path / "out")
    shown = markdown.replace("\\", "")
    assert "| sft | 34.90 | 1.2500 | 3.49 | 6 |" in shown
    assert "commit c0ffeec0ffee (changed)" in shown


def test_all_rows_that_stages_read_are_shown_once(copy, tmp_path):
    account = json.loads((copy / "dpo" / "data_report.json").read_text())["train"]
    json_to(copy / "sft" / "data_report.json", {"train": account | {"source": "demonstrations.jsonl", "read": 7, "kept": 5}})
    json_to(copy / "eval" / "data_report.json", {"train": account})
    _, _, markdown = report(copy, out=tmp_path / "out")
    rows = [
        line
        for line in markdown.replace("\\", "").splitlines()
        if "jsonl" in line and "| 10" in line or "demonstrations" in line
    ]
    assert len(rows) == 2, rows
    assert any("sft, train" in row or "dpo, train" in row for row in rows)


def test_what_was_evaluated_is_named(copy, tmp_path):
    change(copy / "eval" / "report.json", examples="completions")
    assert "40 held-out completions" in report(copy, out=tmp_path / "out")[2]
