"""Whatever a policy or a file name can hold comes back from files as it was, and is obeyed by nothing that shows it."""

import contextlib
import csv
import functools
import html.parser
import io
import json
import os
import re
import shutil
import unicodedata
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from conftest import GOLDEN
from fake_judge import Say, fake_judge
from huggingface_hub import ModelCard
from test_card import REPORT, configured, folder_with
from tiny_run import call

from dpo_jax.cli.card import dpo_card, sft_card, yaml_value
from dpo_jax.cli.exit_codes import message
from dpo_jax.cli.experiment import _write
from dpo_jax.cli.main import main
from dpo_jax.data.completion_files import read_completions
from dpo_jax.data.display import shown_prompt
from dpo_jax.data.label import label
from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.terminal import _SUSPECT, HIDDEN, csv_cell, json_text, one_line, printable, printable_output
from dpo_jax.judge.questions import Pair, question_of
from dpo_jax.judge.win_rates import win_rates
from dpo_jax.judge.win_rates_plot import plot_win_rates
from dpo_jax.plotting.palette import STYLES
from dpo_jax.report.page import (
    Figures,
    Notice,
    Page,
    Sample,
    Section,
    Side,
    Table,
    Text,
    Tiles,
    markdown_code,
    markdown_text,
    render_html,
    render_markdown,
)
from dpo_jax.report.result_table import result_table
from dpo_jax.runtime.progress import Board, reported
from dpo_jax.runtime.rundir import RunDir, write_json
from dpo_jax.study.page import WORDINGS, Comparison, make_study, render
from dpo_jax.study.ratings import read_key, read_verdicts
from dpo_jax.untrusted import Unreadable

EVIL = {
    "NUL": "a\0b",
    "C0": "".join(map(chr, range(32))),
    "DEL and C1": "".join(map(chr, range(127, 160))),
    "screen": "\x1b[2J\x1b]0;owned\x07\x9b31m\r\b\b",
    "lone surrogates": "\ud800 \udcff",
    "override": "safe\u202egnp.exe",
    "directions": "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u2066\u2067\u2068\u2069",
    "no width": "p\u200bay\u200cp\u200dal\u2060\u00ad\u180e\U000e0041\U000e0101",
    "fillers": "a\u3164b\u115fc\u1160d\uffa0e\u034ff\u17b4g\u17b5h\U0001bca0i\U0001d173j\ufff0k\U000e0080l\U000e0fff",
    "variants of nothing": "a\ufe00b\ufe0fc\u180bd\u180f1\ufe0f\u2028\ufe0f\u3164\ufe0f\u200dz❤\ufe0f\ufe0f\ufe0f",
    "byte order mark": "\ufeffa",
    "separators": "a\u2028b\u2029c\x85d\ve\ff\x1cg",
    "no characters": "\ufffe\uffff\ufff9\U0001ffff",
    "script": "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "markup": "<!-- <script> --> ]]> <![CDATA[ &amp; &#0; &lt; <bdi dir=rtl>",
    "attribute": '" onmouseover="alert(1)" \' onload=\'',
    "formula": "=1+cmd|' /C calc'!A0",
    "formulas": " @SUM(1)",
    "mathematics": "$\\frac{ $ x^2 \\$ __ _",
    "hidden label": "_nolegend_",
    "markdown": "| a ` ``` ](http://e.x) ![i](j) [k](javascript:l) **b** ~~c~~ www.x.y @me\n# h\n- l\n1. m\n---\n\n    code",
    "code": "`",
    "yaml": "a: b # c\n---\n...\n\"'{[]}&*!|>%@ yes",
    "template": "{{ 7 * 7 }} {% raw %} {{POLICY}} {{STUDY}} {0} %s \\1 \\g<0>",
    "right to left": "שלום עולם (abc) مرحبا",
    "glyphs": "漢字 🙂 é",
    "long": "x" * 100_000,
    "empty": "",
    "spaces": " \t \u3000\xa0 ",
}
TEXTS = list(EVIL.values())
FRIENDLY = ["naïve ✓ 漢字", "می‌خواهم", "क्‍ष", "שלום", "مرحبا", "a\xa0b", "\ufffd"]
FRIENDLY += ["👨‍👩‍👧", "👍🏽", "❤️‍🔥", "©️", "∩︀", "ᠠ᠋", "漢︀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "葛󠄀"]
CAN_BE_EMITTED = [text for text in TEXTS if not re.search("[\ud800-\udfff]", text)]  # UTF-8 has no halves of a character


def test_the_list_is_evil():
    seen = {unicodedata.category(character) for text in TEXTS for character in text}
    assert {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp", "Zs"} <= seen


IGNORABLE = (  # Default_Ignorable_Code_Point, but for joiners and variants of ideographs
    "\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b\u200e-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
BIDI = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_plain(text, *, keep="\n\t"):
    """Nothing that a terminal or a browser obeys and nothing that nobody sees, said in other words than the code says it."""
    kinds = {unicodedata.category(c) for c in {*text} - {*keep}} & {"Cc", "Cs", "Zl", "Zp"}
    bidi = {unicodedata.bidirectional(c) for c in {*text}} & BIDI
    foreign = re.sub("(?<=❤)\ufe0f", "", functools.reduce(lambda left, word: left.replace(word, ""), FRIENDLY, text))
    ignored = re.search(f"[{IGNORABLE}]", foreign)
    return not kinds and not bidi and not ignored and not re.search("[\u200b\u200e\u200f\u061c\u2060\ufeff\ufffe\uffff]", text)


# Terminals


def test_what_passes_at_first_sight_has_nothing_hidden():
    every = "a".join(map(chr, range(0x110000)))
    hidden = {found[0] for found in HIDDEN.finditer(every)}
    assert len(hidden) > 2048 + 65
    joiners = "\u200c\u200d\U000e0100-\U000e01ef"  # also what may follow a letter is hidden after an "a"
    assert set(re.findall(f"[{IGNORABLE}{joiners}]", every)) <= hidden
    assert not [character for character in hidden if not _SUSPECT.search(character)]


@pytest.mark.parametrize("name", EVIL)
def test_a_terminal_is_shown_the_text_and_obeys_none_of_it(name):
    text = EVIL[name]
    assert is_plain(printable(text))
    assert is_plain(one_line(text), keep="")
    assert printable(printable(text)) == printable(text)
    if text.isascii() and text.isprintable():
        assert one_line(text) == text
    for shown in (message(DataError(f"a: {text}", causes=[])), message(OSError(5, "I/O", text)), message(Unreadable(text))):
        assert is_plain(shown)
    report = {"pairs": 1, "reference": {}, "policy": {}, "samples": [{"prompt": text, "reference": text, "policy": text}]}
    assert is_plain(result_table(report))
    assert is_plain(shown_prompt({"turns": [{"role": text, "content": text}]}))


@pytest.mark.parametrize("text", FRIENDLY)
def test_ordinary_texts_of_the_world_stay_as_they_are(text):
    assert printable(text) == one_line(text) == text
    assert markdown_text(text) in (text, f"<bdi>{text}</bdi>")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_is_printed_is_plain_and_fails_in_no_locale(encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out), printable_output(), printable_output():
        for text in [*TEXTS, *FRIENDLY]:
            print(text, flush=True)
    shown = out.buffer.getvalue().decode(encoding)
    assert is_plain(shown)
    assert "\n漢字 🙂 é\n" in shown or encoding != "utf-8"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_line_is_one_line():
    for text in TEXTS:
        board = Board(Terminal(), columns=60, alone=True)
        with reported(text, board=board) as task:
            board.draw()
            Board(log := io.StringIO(), alone=True).say(task.line())
        drawn = board._file.getvalue()
        assert len(drawn) < 80
        assert is_plain(drawn.replace("\x1b[K", "").replace("\r", ""), keep="")
        assert is_plain(log.getvalue())


def test_the_help_keeps_its_colors(monkeypatch):
    """What the parser of flags writes itself is no text of others."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        assert main(["audit", "--help"]) == 0
    assert "\x1b[1m" in terminal.getvalue()


# Files


@pytest.mark.parametrize("name", EVIL)
def test_json_gives_a_text_back_and_shows_none_of_it(name, tmp_path):
    text = EVIL[name]
    content = {text: [text, {"x": text}], "number": 0.1}
    assert json.loads(json_text(content)) == content
    assert is_plain(json_text(content), keep="")
    write_json(tmp_path / "report.json", content)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == content
    assert yaml.safe_load(f"a: {yaml_value(text)}\nb: {yaml_value([text])}") == {"a": text, "b": [text]}
    assert is_plain(yaml_value(text), keep="")


def completions(path, texts, *, prompt="Asked: "):
    rows = [{"prompt": f"{prompt}{number} {text}", "completion": text} for number, text in enumerate(texts)]
    path.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_completions_come_back_as_they_were(tmp_path):
    rows = completions(tmp_path / "a.jsonl", CAN_BE_EMITTED)
    found = read_completions(tmp_path / "a.jsonl")
    assert [(one.prompt, one.text) for one in found] == [tuple(row.values()) for row in rows]
    completions(tmp_path / "b.jsonl", ["fine", "\ud800"])
    with pytest.raises(DataError, match="b.jsonl:2: prompt: invalid_utf8: lone surrogate"):
        read_completions(tmp_path / "b.jsonl")


def test_labeled_samples_are_data_to_train_on(tmp_path):
    eos = "<|endoftext|>"
    texts = [*CAN_BE_EMITTED, f"spells {eos}", "plain"]
    sides = [[text, f"not {text}"] for text in texts]
    prompts = [f"Asked: {text}" for text in texts]
    pairs, counts = label(prompts, sides, np.array([[0.0, 1.0]] * len(texts)), how="argmax", seed=0, eos=eos)
    assert (counts.empty, counts.eos, counts.labeled) == (2, 1, len(texts) - 3)
    _write(pairs, tmp_path / "train.jsonl")
    loaded = load_preferences(tmp_path, "train")
    assert [(one.prompt, one.chosen, one.rejected) for one in loaded] == [(p.prompt, p.chosen, p.rejected) for p in pairs]
    assert "a\0b" in {pair.rejected for pair in loaded}


def test_bytes_of_value_0_are_still_damage(tmp_path):
    for name, content in (("a.jsonl", b'{"prompt": "a", "completion": "b\0"}\n'), ("b.jsonl", b"\0" * 512 + b"\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}:1: nul: NUL at byte"):
            read_completions(tmp_path / name)


def test_a_spreadsheet_computes_nothing():
    cells = [csv_cell(text) for text in TEXTS]
    file = io.StringIO(newline="")
    csv.writer(file).writerow([*cells, csv_cell(-0.5)])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert row == [*cells, "-0.5"]
    assert all(is_plain(cell, keep="") for cell in cells)
    assert not [cell for cell in cells if cell.lstrip()[:1] in tuple("=+-@")]
    assert csv_cell("dpo beta 0.1") == "dpo beta 0.1"


# Pages


class Parsed(html.parser.HTMLParser):
    """Text by the element it stands in, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.isolated, self.inside = [], [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "bdi":
            self.isolated.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "bdi"

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside:
            self.isolated[-1] += data

    @property
    def text(self):
        return "".join(self.texts)


def page_of(text, image):
    blocks = [
        Text(text),
        *(Notice(text, level, text, f"{text} --a.b {text}") for level in ("alarm", "fine")),
        Tiles([(text, text, text)]),
        Table([text, text], [[text, text], ["a", f"1 ({text})"]], caption=text, note=text),
        Figures([(image, text)], caption=text, size="wide"),
        Sample(text, [Side(text, text, text)]),
    ]
    return Page(text, text, [Section(text, blocks)])


@pytest.fixture
def image(tmp_path):
    (tmp_path / "i.svg").write_text("<svg/>")
    return tmp_path / "i.svg"


# What is there, or not, by the length of a text or whether it is blank.
VARYING = ("bdi", "details", "summary", "em", "small", "span", "caption", "h3", "p")


@pytest.mark.parametrize("name", EVIL)
def test_a_page_shows_the_text_and_obeys_none_of_it(name, image):
    text, harmless = EVIL[name], Parsed(render_html(page_of("harmless", image)))
    rendered = render_html(page_of(text, image))
    seen = Parsed(rendered)
    assert is_plain(rendered)
    assert [tag for tag in seen.tags if tag not in VARYING] == [tag for tag in harmless.tags if tag not in VARYING]
    assert [name for name, _ in seen.attributes if name.startswith("on")] == []
    assert {value for name, value in seen.attributes if name == "alt"} == {one_line(text)}
    if 0 < len(text) < 400:
        assert seen.text.count(printable(text)) >= 15
    if name in ("override", "directions", "right to left"):  # all but the title, which stands outside of the page
        isolated = sum(part.count(printable(text)) for part in seen.isolated)
        assert isolated == seen.text.count(printable(text)) - 1
    else:
        assert seen.isolated == []


@pytest.mark.parametrize("name", EVIL)
def test_markdown_shows_the_text_and_obeys_none_of_it(name, image):
    text = EVIL[name]
    rendered, harmless = (render_markdown(page_of(one, image), link=lambda path: path.name) for one in (text, "harmless"))
    assert is_plain(rendered)
    if text.strip():
        # As many lines, with the same marks before and after the text.
        shown = markdown_text(text)
        marks = [[line.replace("harmless", "") for line in harmless.split("\n")]]
        marks.append(
            [line.replace(shown, "").replace(markdown_text(f"{text} --a.b {text}"), " --a.b ") for line in rendered.split("\n")]
        )
        assert len(marks[0]) == len(marks[1])
        assert [line for line, other in zip(*marks, strict=True) if line == other]
        bare = re.sub(r"\\.", "", shown.replace("<br>", " ").removeprefix("<bdi>").removesuffix("</bdi>"))
        assert not re.search(r"[<>`*_\[\]|~$&\n]|://|www\.", bare)
    code = markdown_code(text)
    assert "\n" not in code
    fences = re.fullmatch(r"(`+) ?(.*?) ?\1", code)
    assert not text.strip() or (fences and fences[1] not in re.findall("`+", fences[2]))


def test_a_model_card_quotes_what_others_wrote(tmp_path):
    run = RunDir(tmp_path / "run" / "dpo", lock=False)
    run.metrics.write_text("")
    base_model, license = "x](javascript:alert(1))", 'a: b # "c'
    base = folder_with(tmp_path / "base", README_md=f"---\nbase_model: {base_model}\nlicense: {license}\n---\n")
    data = tmp_path / "`| ![i](j)\u202e\n# h"
    report = {**REPORT, "samples": [{"prompt": text, "reference": text, "policy": text} for text in TEXTS[:3]]}
    for card in (
        sft_card(configured(run, model=str(base), data=str(data)), run),
        dpo_card(configured(run), run, report=report),
    ):
        assert is_plain(card)
        body = re.sub(r"\\.|`` .* ``", "", card.partition("\n---\n")[2])
        assert "](j" not in body
        assert "\n# h" not in body
    header = ModelCard(sft_card(configured(run, model=str(base)), run)).data.to_dict()
    assert (header.get("base_model"), header["license"]) == (None, license)  # what is no id of the Hub is no link to it


def test_people_see_what_a_judge_sees_and_the_key_has_the_texts(tmp_path):
    comparisons = [Comparison(f"{number} {text}", (text, text[::-1] + "!")) for number, text in enumerate(CAN_BE_EMITTED)]
    options = {"title": EVIL["script"], "wording": WORDINGS["dialogue"], "raters": 2, "twice": 0.5, "seed": 0}
    study = make_study(comparisons, names=("x", "y"), **options)
    page = render(study.page)
    assert is_plain(page)
    seen = Parsed(page)
    assert seen.tags.count("script") == 2
    embedded = next(text for text in seen.texts if text.startswith('{"study"'))
    assert json.loads(embedded) == study.page
    assert all(is_plain(text) for item in study.page["items"] for text in (item["prompt"], *item["texts"]))
    assert {(item["prompt"], *sorted(item["texts"])) for item in study.key["items"]} == {
        (one.prompt, *sorted(one.completions)) for one in comparisons
    }
    write_json(tmp_path / "key.json", study.key)
    key = read_key(tmp_path / "key.json")
    assert key.texts.keys() == {one.prompt for one in comparisons}
    nul = Pair("u", "s", None, "0 a\0b", "a\0b", "b")
    for asked in (
        question_of(nul, prompt="dialogue", a="policy", fence=fence).messages[-1]["content"] for fence in (True, False)
    ):
        assert "a\\x00b" in asked
        assert "\0" not in asked


def test_figures_show_names_and_set_no_formulas(tmp_path):
    names = [text for text in TEXTS if text]
    for start in range(0, len(names), len(STYLES)):
        some = names[start : start + len(STYLES)]
        pairs = [Pair(f"{name}:1", name, None, "p", "a", "b") for name in some]
        points = win_rates(pairs, ["won"] * len(pairs))
        file = plot_win_rates(points, tmp_path / "win_rates.svg", x=some[0], baseline=some[-1])
        assert ElementTree.parse(file).getroot().tag.endswith("}svg")


# The real path: a policy that writes any byte, judged and studied


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Two files of completions of a byte-level policy of random weights, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("emitted")
    policy = shutil.copytree(GOLDEN / "gpt2" / "init", folder / "policy")
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, policy)
    (folder / "prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(64)))
    files = [folder / "policy.jsonl", folder / "baseline.jsonl"]
    flags = ("--sample.policy", policy, "--sample.prompts-file", folder / "prompts.txt", "--sample.out", files[0])
    flags += ("--sample.temperature", 2, "--sample.max-new-tokens", 60, "--run.dir", folder / "run")
    result = call("sample", "configs/quickstart.yaml", *flags)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n") if line]
    others = [{**row, "completion": other["completion"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    files[1].write_text("".join(json_text(row) + "\n" for row in others), encoding="utf-8")
    return folder, files


def test_what_a_policy_samples_is_judged_and_studied(sampled, monkeypatch):
    folder, files = sampled
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n") if line]
    emitted = "".join(row["completion"] for row in rows)
    assert len(rows) == 64
    assert {"\0", "\x1b", "\x7f", "\ufffd"} <= set(emitted)  # a test of what it says
    assert [one.text for one in read_completions(files[0])] == [row["completion"] for row in rows]
    say = Say("Comparison: the first.\nMore helpful: A")
    with fake_judge(lambda asked, number: say) as judge:
        flags = ("--judge.a", files[0], "--judge.b", files[1], "--judge.prompt", "dialogue", "--judge.base-url", judge.url)
        judged = call("judge", "configs/quickstart.yaml", *flags, "--judge.model", "m", "--run.dir", folder / "run")
    assert judged.code == 0, judged.err
    assert "64 pairs, 128 questions" in judged.out
    studied = call(
        "study", "configs/quickstart.yaml", "--study.a", files[0], "--study.b", files[1], "--run.dir", folder / "run"
    )
    assert studied.code == 0, studied.err
    assert is_plain((folder / "run" / "study" / "study.html").read_text(encoding="utf-8"))
    verdicts = read_verdicts(folder / "run" / "judge" / "pairs.jsonl", key=read_key(folder / "run" / "study" / "key.json"))
    assert (len(verdicts.winners), verdicts.foreign) == (64, 0)  # every text was found again
    for result in (judged, studied):
        assert is_plain(result.out + result.err)


def test_names_that_are_not_utf_8_and_names_that_move_the_cursor(sampled, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \x1b[2J \xe2\x80\xae$x_<b>")
    folder.mkdir()
    file = shutil.copy(sampled[1][0], folder / "=1+1.jsonl")
    studied = call(
        "study", "configs/quickstart.yaml", "--study.a", file, "--study.b", sampled[1][1], "--run.dir", folder / "run"
    )
    assert studied.code == 0, studied.err
    assert "caf\\udce9 \\x1b[2J \\u202e$x_<b>" in studied.out
    report = json.loads((folder / "run" / "study" / "data_report.json").read_text(encoding="utf-8"))
    assert os.fspath(file) in report["study"]["source"]
    shown = call("report", folder / "run")
    assert shown.code == 0, shown.err
    page, markdown = ((folder / "run" / "report" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "caf\\udce9" in Parsed(page).text
    assert "b" not in Parsed(page).tags
    assert all(map(is_plain, (studied.out + studied.err, shown.out + shown.err, page, markdown)))
    missing = call("study", "configs/quickstart.yaml", "--study.a", folder / "none", "--study.b", file)
    assert missing.code == 65
    assert is_plain(missing.err)
