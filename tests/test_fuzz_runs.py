"""Run directories whose files are damaged, foreign, or no files: what reads them again names them and goes on, or stops."""

import contextlib
import io
import json
import os
import shutil

import pytest
from conftest import GOLDEN
from mutate import mutants, mutations, outcome
from test_report import JUDGED, PIXEL, json_to, make_run

from dpo_jax.cli.commands.agree import plain
from dpo_jax.cli.config import Config, ConfigError, dump_config, load_config
from dpo_jax.cli.finished import RECORD, recorded
from dpo_jax.cli.fixed import check
from dpo_jax.cli.main import main
from dpo_jax.lab.sweep import RESULT, Run, sweep
from dpo_jax.runtime.metrics import MetricsLog, read_metrics
from dpo_jax.study.agreement import table_2
from dpo_jax.study.ratings import Judgment

SHARE = {"accuracy": 0.75, "low": 0.5, "high": 0.9}
SUBSET = SHARE | {"subset": "chat", "pairs": 12, "margin": 0.3}
RANK = {"spearman": 0.2, "spearman_low": 0.1, "spearman_high": 0.3}
REWARDS = {
    "pairs": 40,
    "settings": {"data": "x.jsonl", "split": "test", "beta": 0.1},
    "weights": {"policy": "a" * 64, "reference": "b" * 64},
    "rewards": {
        "implicit": SHARE
        | {"pairs": 40, "margin": 0.4, "length": RANK, "subsets": [SUBSET], "macro": SHARE}
        | {"rewardbench": {"sections": [SHARE | {"section": "Chat", "pairs": 9}], "score": SHARE, "missing": ["Safety"]}},
        "per_token": SHARE | {"margin": 0.4, "length": RANK},
    },
    "calibration": {
        **{"ece": 0.1, "ece_interval": [0.05, 0.2], "expected_ece": 0.02, "expected_ece_high": 0.08},
        **{"overconfidence": 0.01, "overconfidence_interval": [-0.1, 0.2]},
    },
    "length": {"mean_tokens": [12.0, 10.5], "accuracy": [SUBSET]},
}
FINDING = {"pairs": 2, "share": 0.1, "examples": ["a:1 with a:2"]}
PART = {"ids": [1, 2], "tokens": ["a", "b"], "scored": True}
SEVERAL_TURNS = PART | {"scored": [True, False]}
AUDITED = {
    **{"source": "x.jsonl", "format": "trl", "rows": 12, "read": 12, "kept": 10, "dropped": {"empty": 1, "tie": 1}},
    **{"truncated": {"prompt": 3}, "notes": ["a note"], "files": [{"path": "x", "bytes": 3, "sha256": "c" * 64}]},
    "verdict": [{"about": "overlap", "found": "4 pairs", "remedy": "Leave them out."}],
    "repeats": {"duplicates": FINDING, "contradictions": FINDING, "both_sides": FINDING},
    "overlap": {"pairs": FINDING, "swapped": FINDING, "prompts": FINDING},
    "longer_wins": {"chosen_longer": 0.6, "equal": 0.1, "accuracy": 0.6, "low": 0.5, "high": 0.7},
    "lengths": {name: {"mean": 3.0, "p50": 3.0, "max": 9.0} for name in ("prompt", "chosen", "rejected")},
    "cut": {name: {"pairs": 1, "tokens": 2, "share": 0.1} for name in ("prompt", "chosen", "rejected", "completions")},
    "example": {"uid": "x:1", "prompt": PART, "chosen": PART, "rejected": SEVERAL_TURNS},
}
AT_KL = [{"method": "dpo", "kl": kl, "reward": 0.5, "share_of_gain": 0.9} for kl in (1.0, 4.0)]
GAIN = {f"{name}{end}": 0.5 for name in ("gain", "second_gain") for end in ("", "_low", "_high")}
GAIN |= {"method": "dpo", "label": "beta 1", "kl": 1.0, "reading": "both rise", "turned": ""}
RESULTS = (
    "method,label,seed,step,kl,reward,reward_low,reward_high,kl_low,kl_high,tokens,tokens_low,tokens_high,cut,"
    "learned_reward,learned_reward_low,learned_reward_high\n"
) + "".join(
    f"{run},0,{kl},{kl},{reward},{reward - 0.2},{reward + 0.2},{kl},{kl},20,19,21,0.1,{reward},{reward},{reward}\n"
    for run, kl, reward in (("reference,", 0, 1), ("dpo,beta 1", 1, 3), ("dpo,beta 1", 4, 5), ("dpo,beta 1", 9, 4))
)

ROBUST = {"tables": [{"caption": "gain at KL 1", "columns": ["10% flipped"], "rows": [["DPO", "4.00"]], "note": "n"}]}
ROBUST |= {"falls": [{"what": "ppo", "words": "after KL 3.00"}]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run directory with every file that a report reads. No weights: their reader is another one."""
    root = make_run(tmp_path_factory.mktemp("fuzz") / "first")
    for stage in ("sft", "dpo"):
        shutil.rmtree(root / stage / "export")
        (root / stage / "export").mkdir()
        shutil.copy(GOLDEN / "gpt2" / "init" / "config.json", root / stage / "export")
        rows = read_metrics(root / stage / "metrics.jsonl")
        (root / stage / "metrics.jsonl").unlink()
        with MetricsLog(root / stage / "metrics.jsonl") as log:
            for row in rows:
                log.write(row)
    judgments = [Judgment(str(item), rater, "b" if item % 3 == 0 else "a") for item in range(9) for rater in ("ann", "bob")]
    table = plain(table_2(judgments, {"GPT-4": {str(item): "a" for item in range(9)}}, seed=0))
    written = {
        "rewards": {"report.json": REWARDS},
        "judge": {"report.json": JUDGED | {"outcomes": {"won": 18, "failed": 2, "unanswered": 0}}},
        "agree": {"agreement.json": {"study": "1", "names": {"a": "dpo", "b": "ppo"}, **table}},
        "audit": {"data_report.json": {"train": AUDITED, "test": AUDITED}},
        "frontier": {"summary.json": {"at_equal_kl": AT_KL, "second_reward": {"name": "vader", "words": "", "gains": [GAIN]}}},
        "robust-noise": {"summary.json": ROBUST},
        "dpo": {"bad_batch.json": {"step": 3, "uids": ["a:1", "a:2"], "metrics": {"loss": "nan", "grad_norm": 3.5}}},
    }
    for stage, files in written.items():
        for name, content in files.items():
            json_to(root / stage / name, content)
        (root / stage / "config.yaml").write_text("dpo: {beta: 0.1}\n")  # a whole one takes PyYAML a tenth of a second
    for stage in ("sft", "eval"):
        (root / stage / "config.yaml").write_text("dpo: {beta: 0.1}\n")
    (root / "dpo" / "config.yaml").write_text("dpo: {beta: 0.2, batch: 8}\nrun: {seed: 3}\n")
    (root / "frontier" / "results.csv").write_text(RESULTS)
    (root / "dpo" / "resumes.jsonl").write_text('{"step": 3, "time": "2026-01-02"}\n{"step": 4, "time": "2026-01-03"}\n')
    for image in ("frontier/frontier.png", "judge/win_rates.png", "rewards/reliability.png"):
        (root / image).write_bytes(PIXEL)
    return root


FILES = (
    *("dpo/metrics.jsonl", "sft/metrics.jsonl", "dpo/config.yaml", "dpo/env.json", "dpo/data_report.json"),
    *("dpo/bad_batch.json", "dpo/resumes.jsonl", "eval/report.json", "eval/samples.jsonl", "rewards/report.json"),
    *("judge/report.json", "agree/agreement.json", "audit/data_report.json", "frontier/summary.json", "frontier/results.csv"),
    "robust-noise/summary.json",
)


def reported(root, out):
    """(exit code, what was printed, the page) of a report on `root`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        code = main(["report", str(root), "--report.out", str(out), "--report.no-digests"])
    return code, printed.getvalue(), (out / "report.html").read_text() if code == 0 else ""


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without curves, which take a second each."""

    def drawn(*shown, **options):
        path = shown[-1]
        path.write_bytes(PIXEL)
        return path

    monkeypatch.setattr("dpo_jax.plotting.training_curves.plot_training", lambda rows, folder, **options: [])
    for name in ("plot_trajectories", "plot_lengths", "plot_learned"):
        monkeypatch.setattr(f"dpo_jax.report.experiments.{name}", drawn)


def test_a_whole_run_has_a_page_without_a_complaint(whole, tmp_path):
    code, printed, page = reported(whole, tmp_path / "out")
    assert code == 0
    assert "cannot be" not in printed + page
    assert "could not be shown" not in page
    for words in (
        "beta 1",
        "RewardBench",
        "H-H agree",
        "4 pairs: Leave them out.",
        "Methods at equal KL",
        "Over-optimized",
        "10% flipped",
    ):
        assert words in page


def test_a_report_always_writes_its_page_and_names_what_it_cannot_read(whole, tmp_path, undrawn):
    run, out = shutil.copytree(whole, tmp_path / "first"), tmp_path / "out"
    each, told = -(-mutants(45) // len(FILES)), 0
    for name in FILES:
        file, good = run / name, (run / name).read_bytes()
        for mutant in mutations(good, count=each, seed=len(name)):
            file.write_bytes(mutant)
            code, printed, page = outcome(lambda: reported(run, out))
            assert code == 0, (name, mutant, printed)
            assert "Read this first" in page
            assert "could not be shown" not in page, (name, mutant, page)  # every shape was checked where it was read
            told += file.name in printed
        file.write_bytes(good)
    assert told > 10


def in_place_of(file, kind, elsewhere):
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "broken link":
            file.symlink_to(file.parent / "nothing")
        case "link to itself":
            file.symlink_to(file)
        case "link to another kind":
            file.symlink_to(elsewhere)


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "link to itself", "link to another kind"])
def test_what_is_no_file_is_named_and_nothing_is_waited_for(whole, tmp_path, undrawn, kind):
    run = shutil.copytree(whole, tmp_path / "first")
    elsewhere = tmp_path / "a.png"
    elsewhere.write_bytes(PIXEL)
    for name in FILES:
        in_place_of(run / name, kind, elsewhere)
    code, printed, _ = outcome(lambda: reported(run, tmp_path / "out"))
    assert code == 0
    for name in FILES:
        stage, file = name.split("/")
        assert f"note: {stage}: {file}" in printed, printed
    assert elsewhere.read_bytes() == PIXEL


def test_damaged_metrics_cost_no_other_row_of_a_resumed_run(tmp_path):
    path, written = tmp_path / "metrics.jsonl", [{"step": step, "loss": 0.5 / (step + 1), "kl": None} for step in range(8)]
    with MetricsLog(path) as log:
        for row in written:
            log.write(row | {"kl": float("nan")})
        log.write({"step": 8, "eval/loss": 0.125})
    good, accepted = path.read_bytes(), 0
    lines = good.splitlines(keepends=True)
    for mutant in mutations(good, count=mutants(150)):
        path.write_bytes(mutant)
        rows = outcome(lambda: read_metrics(path))
        assert all(row in [*written, {"step": 8, "eval/loss": 0.125}] for row in rows)
        present = sum(line in mutant.splitlines(keepends=True) for line in lines)
        assert len(rows) >= present
        with MetricsLog(path) as log:
            outcome(lambda: log.resume(8))
            log.write({"step": 8, "loss": 0.25})
        assert read_metrics(path) == [*rows, {"step": 8, "loss": 0.25}]
        accepted += present
    assert accepted > 500


def test_absurd_numbers_cost_their_curves_at_most(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "first")
    with MetricsLog(run / "dpo" / "metrics.jsonl") as log:
        for step, value in ((2**53, 1e308), (0, -1e308), (7, 5e-324), (8, 10**299)):
            log.write({"step": step, "loss": value, "rewards/margins": value, "eval/loss": value, "lr": value})
    huge = [line.replace(",9,9,", ",1e308,1e308,") for line in RESULTS.splitlines()]
    (run / "frontier" / "results.csv").write_text("\n".join(huge) + "\ndpo,beta 2,0,1,-1e308,1e308,-1e308,1e308\n" * 2)
    code, printed, page = outcome(lambda: reported(run, tmp_path / "out"))
    assert code == 0
    assert "Read this first" in page


POINTS = [{"step": 1.0, **{f"{name}{end}": 0.5 for name in ("reward", "kl") for end in ("", "_low", "_high")}}]


def test_of_a_damaged_result_of_a_sweep_nothing_is_taken(tmp_path):
    run, performed, said = Run("dpo", "beta 1", {"beta": 1.0}, 0), [], []

    def perform(run, folder):
        performed.append(folder)
        return POINTS

    def again():
        (result,) = sweep([run], tmp_path, shared={"a": 1}, perform=perform, say=said.append, clock=lambda: 0.0)
        return result

    again()
    file = tmp_path / run.name / RESULT
    good = file.read_bytes()
    assert again().points == POINTS
    assert len(performed) == 1
    for mutant in mutations(good, count=mutants(150)):
        file.write_bytes(mutant)
        assert outcome(again).points == POINTS
    assert len(performed) > 50
    assert any("is run again, as its result is damaged" in words and RESULT in words for words in said)


def test_a_result_of_a_sweep_of_an_earlier_version_is_taken(tmp_path):
    run = Run("dpo", "beta 1", {"beta": 1.0}, 0)
    old = {"run": {**vars(run)}, "shared": {}, "points": POINTS, "seconds": 3.0}
    json_to(tmp_path / run.name / RESULT, old)
    (result,) = sweep([run], tmp_path, shared={}, perform=lambda *_: pytest.fail("made anew"), say=lambda _: None)
    assert (result.points, result.seconds) == (POINTS, 3.0)


def test_what_a_run_directory_fixes_is_read_or_refused(tmp_path):
    config = Config()
    config = type(config)(run=type(config.run)(dir=str(tmp_path)))
    good = json.dumps({"date": "2026-11-27", "revisions": {"org/name": "0f1e2d3c"}}, indent=1).encode()
    refused = 0
    for mutant in mutations(good, count=mutants(150)):
        (tmp_path / "fixed.json").write_bytes(mutant)
        refused += isinstance(outcome(lambda: check(config), names="fixed.json"), ConfigError)
    assert refused > 50


def test_a_damaged_record_of_a_finished_run_is_none(tmp_path):
    config = Config()
    config = type(config)(run=type(config.run)(dir=str(tmp_path)))
    good = json.dumps({"version": 1, "settings": {"dpo.beta": 0.1}, "outputs": {"a": "b"}}).encode()
    (tmp_path / "dpo").mkdir()
    for mutant in mutations(good, count=mutants(100)):
        (tmp_path / "dpo" / RECORD).write_bytes(mutant)
        assert outcome(lambda: recorded("dpo", config, ("dpo",))) is False
    (tmp_path / "dpo" / RECORD).unlink()
    os.mkfifo(tmp_path / "dpo" / RECORD)
    assert outcome(lambda: recorded("dpo", config, ("dpo",))) is False


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))  # noqa: B905


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "a: unknown option"),
        ("run: &a {dir: *a}\n", "run.dir: expected text"),
        ("run: {<<: *a}\n", "not valid YAML"),
        ("run: {dir: " + "[" * 50_000, "nested too deeply"),
        ("#" * 2**20, "more than 262,144 bytes"),
        ('run: {dir: "\\ud800"}\n', "half a surrogate pair"),
        ('run: {dir: "\\UFFFFFFFF"}\n', "c.yaml"),
        ("!!python/object/apply:os.system [id]\n", "the configuration must be"),
        ("run: {seed: " + "9" * 6000 + "}\n", "run.seed: expected a whole number"),
    ],
)
def test_a_configuration_cannot_do_harm(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    error = outcome(lambda: load_config(file), names="c.yaml")
    assert isinstance(error, ConfigError)
    assert expected in str(error)


def test_a_configuration_is_read_or_refused_by_name(tmp_path):
    file, good = tmp_path / "c.yaml", dump_config(Config()).encode()
    for mutant in mutations(good, count=mutants(60)):
        file.write_bytes(mutant)
        found = outcome(lambda: load_config(file), names="c.yaml")
        assert isinstance(found, Config | ConfigError)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="expected a file, got a pipe"):
        load_config(file)
