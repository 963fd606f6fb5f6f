"""`dpo-jax dialogue` from end to end in a small world: sampled and enumerated values agree, and nothing is done twice."""

import csv
import json

import pytest
from tiny_run import _compilation_cache, call  # noqa: F401  the second is a fixture

from dpo_jax.report.experiments import dialogue as report_of
from dpo_jax.report.run_record import read_run

CONFIG = """\
run: {{dir: {dir}}}
data: {{source: question_game, reviews_train: 600, reviews_test: 24, max_length: 96, max_prompt_length: 32}}
tokenizer: {{vocab_size: 400}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 96}}
sft: {{batch: 16, lr: 1.0e-2, optimizer: adamw, warmup_steps: 2, epochs: 2}}
dpo: {{batch: 24, lr: 5.0e-4, warmup_steps: 2, epochs: 2}}
dialogue:
  {{methods: "dpo,online,myopic", betas: "1", starts: 2, rounds: 2, seeds: 1, test: 240, sample_batch: 96, evaluations: 1}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("dialogue")
    (root / "toy.yaml").write_text(CONFIG.format(dir=root / "run"))
    return root


def dialogue(place, *flags):
    code, out, err = call("dialogue", place / "toy.yaml", *flags)
    assert code == 0, err
    folder = place / "run" / "dialogue"
    with open(folder / "results.csv", newline="") as file:
        rows = [
            {k: v if k in ("method", "label") else float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)
        ]
    return out, rows, json.loads((folder / "summary.json").read_text())


def test_dialogue(place):
    out, rows, summary = dialogue(place)
    assert [row["method"] for row in rows] == ["reference", "dpo", "online", "online", "myopic"]
    for row in rows:  # what is enumerated is what comes of conversations
        half = row["reward_sampled_high"] - row["reward_sampled_low"]
        assert abs(row["reward"] - row["reward_sampled"]) < half
        assert row["kl"] < row["kl_sampled_high"] + 0.05
        assert row["nonsense"] < 0.9  # SFT has taught the game
    assert rows[1]["reward"] > rows[0]["reward"]
    assert rows[1]["kl"] > 0.01
    names = dict.fromkeys(row["name"] for row in summary["gains"])
    assert list(names)[:1] == ["the optimum"]
    assert all(name in out for name in names)
    gains = {(row["name"], row["kl"]): row["gain"] for row in summary["gains"]}
    best, greedy, tilted = (gains[name, 1.0][""] for name in list(names)[:3])
    assert greedy < best < tilted
    folder = place / "run" / "dialogue"
    assert (folder / "dialogue.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "pairs" / "seed0.jsonl").read_text().splitlines()]
    assert len(lines) > 20
    assert all(line["chosen"][0] == line["rejected"][0] for line in lines)
    kept = {path: path.read_bytes() for path in (folder / "runs").rglob("result.json")}
    lost = folder / "runs" / "dpo-beta-1-seed0" / "result.json"
    lost.unlink()  # as a kill leaves it
    out, again, _ = dialogue(place)
    assert "3 of 4 runs are finished already" in out
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    assert {path: path.read_bytes() for path in kept if path != lost} == {p: c for p, c in kept.items() if p != lost}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.source", "reviews"), "data.source: dialogue plays the question game; set it to question_game, not reviews"),
        (("--data.bos", "always"), "data.bos: conversations of the question game begin without BOS"),
        (("--dialogue.methods", "dpo,ppo"), "dialogue.methods: must be some of dpo, online, preferred-ft, myopic, dpo-limit"),
        (
            ("--dialogue.methods", "dpo,dpo"),
            "dialogue.methods: must be some of dpo, online, preferred-ft, myopic, dpo-limit",
        ),
        (("--dialogue.betas", "1,1"), "dialogue.betas: must be different numbers above 0"),
        (("--dialogue.completions", "1"), "dialogue.completions: must be at least 2"),
        (("--dialogue.rounds", "9"), "dialogue.rounds: cannot divide 2 starts"),
    ],
)
@pytest.mark.parametrize("check", [(), ("--check",)], ids=["run", "check"])
def test_what_does_not_go_together_is_refused(place, flags, words, check):
    code, out, err = call("dialogue", place / "toy.yaml", *flags, *check)
    assert (code, words in err) == (2, True), (out, err)


def test_the_report_shows_it(place):
    folder = place / "shown" / "dialogue"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    table = {"caption": "gain at equal KL", "columns": ["KL 1"], "rows": [["the optimum", "3.44 100%"]], "note": ""}
    (folder / "summary.json").write_text(json.dumps({"tables": [table]}))
    section = report_of([read_run(place / "shown", name="r")])
    assert [(block.columns, block.rows) for block in section.blocks] == [(["gain at equal KL", "KL 1"], table["rows"])]


def test_check_counts_the_runs(place):
    code, out, err = call("dialogue", place / "toy.yaml", "--check")
    assert code == 0, err
    assert "generated question game: train 600 pairs" in out
