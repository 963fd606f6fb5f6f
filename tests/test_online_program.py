"""`dpo-jax online` as a program, and its labels by a judge behind an endpoint and by people on a page."""

import dataclasses
import json

import numpy as np
import pytest
from fake_judge import Fail, Say, fake_judge
from safetensors.numpy import load_file
from test_judge import KEY, A, B
from tiny_run import _compilation_cache, _plots_once, bytes_of, call, copy, done, refused  # noqa: F401  fixtures

from dpo_jax.cli.config import Config, ConfigError, JudgeConfig, OnlineConfig
from dpo_jax.cli.config.lab import FrontierConfig
from dpo_jax.cli.online_labels import by_judge, by_people, label_settings
from dpo_jax.cli.preflight.online import refuse_unfit
from dpo_jax.data.sources import load_preferences
from dpo_jax.judge.asking import Unfinished
from dpo_jax.models.hf import load_hf
from dpo_jax.online.labels import Asked
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

COMPARISONS = [Asked(f"post {n}", (f" first {n}", f" second {n}")) for n in range(6)]
SMALL = ("--online.rounds", 2, "--online.prompts", 8, "--frontier.prompts", 24, "--frontier.test-prompts", 6)
SMALL += ("--frontier.max-new-tokens", 8, "--frontier.sample-batch", 16, "--dpo.batch", 8)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def prefers(word):
    def script(asked, number):
        first = asked[-1]["content"].split("Summary A:")[1].split("Summary B:")[0]
        return Say(A if word in first else B)

    return script


def judged_by(url, **options):
    return Config(judge=JudgeConfig(prompt="summary-simple", model="m", base_url=url, **options))


def test_a_judge_is_paid_once_and_its_caps_hold_over_all_rounds(tmp_path):
    log = tmp_path / "verdicts.jsonl"
    with fake_judge(prefers("first")) as judge:
        with pytest.raises(Unfinished, match="the next question could exceed 5 requests: raise the cap"):
            by_judge(judged_by(judge.url, max_requests=5), log, KEY, 0, COMPARISONS)
        assert sum(judge.asked.values()) == 5
        assert by_judge(judged_by(judge.url, max_requests=12), log, KEY, 0, COMPARISONS) == [1.0] * 6
        assert (len(judge.asked), set(judge.asked.values())) == (12, {1})
        with pytest.raises(Unfinished, match="exceed 12 requests"):  # those of the round before count
            by_judge(judged_by(judge.url, max_requests=12), log, KEY, 1, [Asked("new", (" first", " other"))])
        # Asked again, it has all answers.
        assert by_judge(judged_by(judge.url, max_requests=12), log, KEY, 2, COMPARISONS[::-1]) == [1.0] * 6
        assert sum(judge.asked.values()) == 12


def test_answers_become_labels(tmp_path):
    says = {"post 0": A, "post 1": "I do not know."}

    def script(asked, number):
        return Say(next((text for post, text in says.items() if post in asked[-1]["content"]), B))

    with fake_judge(script) as judge:
        found = by_judge(judged_by(judge.url), tmp_path / "verdicts.jsonl", KEY, 0, COMPARISONS[:3])
        # In both orders the same letter: it says nothing of the texts.
        assert found == [0.5, None, 0.5]
        swapped = [Asked(prompt, (second, first)) for prompt, (first, second) in COMPARISONS[:1]]
        assert by_judge(judged_by(judge.url), tmp_path / "verdicts.jsonl", KEY, 0, swapped) == [0.5]
        assert sum(judge.asked.values()) == 6  # the same two questions, in the other order


def test_a_comparison_that_the_endpoint_refuses_stays_undecided(tmp_path, capsys):
    """A filter refuses it each time: the run would never get past it."""

    def script(asked, number):
        return Fail(400) if "post 1" in asked[-1]["content"] else prefers("first")(asked, number)

    with fake_judge(script) as judge:
        found = by_judge(judged_by(judge.url), tmp_path / "verdicts.jsonl", KEY, 0, COMPARISONS[:3])
    assert found == [1.0, None, 1.0]
    assert "round 0: 2 questions are refused by the endpoint" in capsys.readouterr().out
    with fake_judge(lambda asked, number: Fail(400)) as judge, pytest.raises(Unfinished):  # of wrong options
        by_judge(judged_by(judge.url), tmp_path / "other.jsonl", KEY, 0, COMPARISONS[:3])


def ratings_of(key, prefers_first, *, rater="ann", items=None):
    """What the page saves when `rater` likes the texts of the first (or the second) completion better."""
    ratings = []
    texts = {item["id"]: item["texts"] for item in key["items"]}
    for item, first in key["raters"][0][:items]:
        leading = "first" in texts[item][first]
        ratings.append({"item": item, "first": first, "choice": "A" if leading == prefers_first else "B"})
    head = {
        "kind": "dpo_jax ratings",
        "study": key["study"],
        "rater": rater,
        "session": rater,
        "saved": "2026-01-01",
        "number": 1,
    }
    return json.dumps(head | {"ratings": ratings})


def test_people_are_given_a_page_and_the_round_waits_for_their_ratings(tmp_path):
    config, folder = Config(), tmp_path / "round-003" / "study"
    with pytest.raises(Unfinished, match="round 3: 6 of 6 comparisons have no rating yet. Give people .*study.html") as stopped:
        by_people(config, tmp_path, 3, COMPARISONS)
    assert f"put the files they save into {folder / 'ratings'}; then run the same command again" in str(stopped.value)
    page, key = (folder / "study.html").read_bytes(), json.loads((folder / "key.json").read_text())
    assert b"first 2" in page
    (folder / "ratings" / "ann.json").write_text(ratings_of(key, True, items=4))
    with pytest.raises(Unfinished, match="2 of 6 comparisons have no rating yet"):
        by_people(config, tmp_path, 3, COMPARISONS)
    (folder / "ratings" / "ann.json").write_text(ratings_of(key, True))
    assert by_people(config, tmp_path, 3, COMPARISONS) == [1.0] * 6
    (folder / "ratings" / "bob.json").write_text(ratings_of(key, False, rater="bob"))
    assert by_people(config, tmp_path, 3, COMPARISONS) == [0.5] * 6
    again = Asked(COMPARISONS[0].prompt, (" other", " texts"))  # of a prompt that was cut to the same text
    assert by_people(config, tmp_path, 3, [*COMPARISONS, again]) == [0.5] * 6 + [None]
    assert (folder / "study.html").read_bytes() == page
    with pytest.raises(ConfigError, match="holds ratings of a different study, not of this round"):
        by_people(config, tmp_path, 3, COMPARISONS[:5])


def test_rounds_by_an_exact_reward(copy):  # noqa: F811
    flags = (*SMALL, "--online.prompts", 16, "--online.label-budget", 128)
    told = call("online", copy.config, *flags, "--check")
    assert (told.code, "at most 128: 32 prompts x 4 rewards, by known" in told.out) == (0, True), told
    assert not (copy / "online").exists()
    result = call("online", copy.config, *flags)
    assert result.code == 0, result
    folder = copy / "online"
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [(row["round"], row["step"]) for row in rows] == [(0, 0), (1, 2)]
    assert f"round 1: {rows[1]['labels']} labels ({rows[1]['labels_so_far']} so far), {rows[1]['pairs']} pairs" in result.out
    assert rows[1]["labels_so_far"] <= 128
    assert all(
        len(load_preferences(folder / f"round-00{n}" / "pairs.jsonl", "train")) == row["pairs"] for n, row in enumerate(rows)
    )
    metrics = read_metrics(folder / "metrics.jsonl")
    judged = [row for row in metrics if is_evaluation(row)]
    assert [row["step"] for row in judged] == [2, 4]
    points = json.loads((folder / "result.json").read_text())["points"]
    assert (points[0]["kl"], points[-1]["kl"]) == (0, judged[-1]["eval/kl"])
    assert judged[-1]["eval/kl"] > 0
    assert "| round | labels so far |" in (folder / "export" / "README.md").read_text()
    load_hf(folder / "export")
    # The same command has nothing to do; other settings are refused, more rounds are not.
    before = bytes_of(folder / "export")
    again = call("online", copy.config, *flags)
    assert (again.code, "continuing" in again.out, bytes_of(folder / "export")) == (0, True, before), again
    assert "online.completions: was 4, is 3" in refused(2, "online", copy.config, *flags, "--online.completions", 3)
    assert "online.replay: was 1, is 2" in refused(2, "online", copy.config, *flags, "--online.replay", 2)
    assert "test prompts: was " in refused(2, "online", copy.config, *flags, "--frontier.test-prompts", 5)
    told = call("export", copy.config, "--export.checkpoint", folder / "checkpoints", "--export.step", 2)
    assert (told.code, "step 2 of" in told.out) == (0, True), told
    assert "On held-out prompts, after 2 steps:" in (folder / "export-2" / "README.md").read_text()
    more = call("online", copy.config, *flags[:-2], "--online.rounds", 3)
    assert (more.code, "the length of the run is now 6 steps; it was 4 steps" in more.out) == (0, True), more
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 3


def test_the_reference_of_a_round_is_the_policy_with_its_adapter(copy):  # noqa: F811
    """Merged into a base of two bytes a number, most of an adapter would be rounded away."""
    adapter = ("--lora.rank", 2, "--lora.base-dtype", "bfloat16", "--dpo.lr", 1e-3, "--online.refresh-reference-rounds", 1)
    adapter += ("--run.devices", "pmap")
    result = call("online", copy.config, *SMALL, *adapter)
    assert result.code == 0, result
    (kept,) = (path for path in (copy / "online" / "references").iterdir() if path.is_dir())
    saved = load_file(kept / "adapter_model.safetensors")
    assert any(np.abs(part).max() > 0 for name, part in saved.items() if "lora_B" in name)
    rows = [json.loads(line) for line in (copy / "online" / "rounds.jsonl").read_text().splitlines()]
    assert rows[1]["kl"] != 0  # to the first reference
    before = bytes_of(copy / "online" / "export")
    assert call("online", copy.config, *SMALL, *adapter).code == 0
    assert bytes_of(copy / "online" / "export") == before


def test_rounds_by_a_judge_that_stops_at_its_cap(copy, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def script(asked, number):
        a, b = (asked[-1]["content"].split(f"Summary {side}:")[1] for side in "AB")
        return Say(A if a.split("Summary B:")[0] > b.split("FIRST")[0] else B)

    flags = (
        *SMALL,
        "--online.reward",
        "judge",
        "--online.completions",
        2,
        "--judge.prompt",
        "summary-simple",
        "--judge.model",
        "m",
    )
    with fake_judge(script) as judge:
        flags = (*flags, "--judge.base-url", judge.url)
        err = refused(75, "online", copy.config, *flags, "--judge.max-requests", 20)
        assert "could exceed 20 requests" in err
        assert sum(judge.asked.values()) == 20
        result = call("online", copy.config, *flags)
        assert result.code == 0, result
        assert set(judge.asked.values()) == {1}
    rows = [json.loads(line) for line in (copy / "online" / "rounds.jsonl").read_text().splitlines()]
    assert [row["labels"] for row in rows] == [8, 8]
    assert [row["reward"] for row in rows] == [None, None]
    assert len(judge.asked) == 2 * rows[-1]["labels_so_far"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reward": "people"}, "completions: people compare one pair a prompt, so they need 2 completions, got 4"),
        (
            {"reward": "judge", "pairs": "bradley_terry"},
            "pairs: a judge label says who won, and gives no reward to draw by",
        ),
        ({"reward": "reward-model"}, "reward_model: names the folder of online.reward reward-model"),
        ({"reward_model": "x"}, "reward_model: is read with online.reward reward-model or online.elicitation disagreement"),
        ({"completions": 1}, "completions: must be at least 2"),
        (
            {"reward": "judge", "pairs": "soft"},
            "pairs: a judge label says who won, and gives no reward to draw by",
        ),
        ({"reward_scale": 0.5}, "reward_scale: changes nothing with pairs best_worst"),
        ({"beta_last": 0.0}, "beta_last: must be greater than 0, got 0.0"),
        (
            {"label_budget": 100},
            "label_budget: 8 rounds x 256 prompts x 4 labels are 8,192, more than 100; lower online.prompts to 3",
        ),
        ({"refresh_reference_rounds": 8}, "refresh_reference_rounds: there are 8 rounds, so the reference would never move"),
    ],
)
def test_options_that_do_not_go_together_are_refused(section, message):
    assert message in [f"{name}: {words}"[: len(message)] for name, words in OnlineConfig(**section).check()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo": {"loss": "kto"}}, "dpo.loss: kto learns from completions, but rounds make pairs"),
        ({"dpo": {"ld_alpha": 0.5}}, "dpo.ld_alpha: depends on both completions of a pair"),
        ({"dpo": {"refresh_reference_steps": 5}}, "dpo.refresh_reference_steps: is counted in rounds here"),
        ({"online": {"prompts": 3000}}, "online.prompts: 3000 are more than the 2000 of frontier.prompts"),
        (
            {"online": {"elicitation": "uncertainty", "prompts": 600}},
            "online.prompts: 600 x 4 candidates are more than the 2000",
        ),
        (
            {"dpo": {"loss": "ipo"}, "online": {"pairs": "soft"}},
            "online.pairs: soft labels are dpo's label_smoothing per pair, but dpo.loss is ipo",
        ),
        (
            {"dpo": {"label_smoothing": 0.1}, "online": {"pairs": "soft"}},
            "dpo.label_smoothing: is set per pair by soft labels",
        ),
        (
            {"dpo": {"loss": "dpo + 0.1 * sft"}, "online": {"beta_last": 0.1}},
            "online.beta_last: loss dpo + 0.1 * sft takes no beta",
        ),
        ({"online": {"reward": "judge"}}, "judge.prompt: choose one, for example dialogue\njudge.model: name the judge"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_it_computes(changes, message):
    sections = {name: dataclasses.replace(getattr(Config(), name), **options) for name, options in changes.items()}
    with pytest.raises(ConfigError) as error:
        refuse_unfit(dataclasses.replace(Config(), **sections))
    assert str(error.value).startswith(message)


def test_labels_name_a_classifier_by_its_content(tmp_path):
    """A moved folder holds the same reward, a changed one another."""
    settings = []
    for name, content in (("first", "{}"), ("moved", "{}"), ("changed", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        settings.append(label_settings(Config(frontier=FrontierConfig(reward="hf", classifier=str(tmp_path / name)))))
    first, moved, changed = settings
    assert first == moved != changed
