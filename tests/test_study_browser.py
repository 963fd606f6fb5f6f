"""The raters' page in a real browser, at the width of a desk and of a phone: rated, left, continued, saved, and read back.

`pytest -m browser tests/test_study_browser.py` needs the `browser` extra and a Chromium (Debian: apt-get install chromium).
DPO_JAX_SHOTS=FOLDER leaves a picture of each view there.
"""

import http.server
import json
import os
import re
import threading
from pathlib import Path

import pytest

from dpo_jax.study.page import WORDINGS, Comparison, make_study, render
from dpo_jax.study.ratings import read_key, read_raters

pytestmark = pytest.mark.browser
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
PAUSE = 400  # ms: the page ignores a second click or key for a moment
LONG = "\n\n".join(f"Paragraph {n}. " + "There is more to read here than any screen can show at once. " * 6 for n in range(9))
WIDE = "https://example.org/" + "a-very-long-address-without-a-single-space/" * 9
HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script><b>bold</b> &amp;"
TEXTS = [
    (LONG, " A short one.", LONG),
    (WIDE, WIDE, "Short."),
    (HOSTILE, HOSTILE, " fine"),
    ("An empty completion", "", "Not empty."),
    *((f"Prompt {n}", f"One of {n}.", f"The other of {n}.") for n in range(5, 9)),
]


@pytest.fixture
def study(tmp_path):
    return written(tmp_path)


def written(folder, **changes):
    comparisons = [Comparison(prompt, (a, b)) for prompt, a, b in TEXTS]
    options = {"raters": 1, "twice": 0.0, "seed": 1, **changes}
    study = make_study(comparisons, names=("x", "y"), title="Which one is better?", wording=WORDINGS["summary"], **options)
    (folder / "study.html").write_text(render(study.page), encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(study.key))
    return study


class Rater:
    """A browser of one person, who sees the page at `url`. Whatever it asks of a network or complains about is kept."""

    def __init__(self, chromium, url, *, size="desktop", scheme="light", **options):
        width, height = SIZES[size]
        self.size, self.url, self.asked, self.complaints = size, url, [], []
        self.context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=size == "phone",
            is_mobile=size == "phone",
            **options,
        )
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page = self.open()

    def open(self):
        page = self.context.new_page()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(self.url)
        return page

    def start(self, name="Ann", number=None):
        self.page.get_by_label("Your name").fill(name)
        if number is not None:
            self.page.get_by_label("Your number").select_option(str(number))
        self.press("Start")

    def press(self, name):
        button = self.page.get_by_role("button", name=name)
        button.tap() if self.size == "phone" else button.click()

    def wait(self):
        self.page.wait_for_timeout(PAUSE)

    def choose(self, name):
        self.wait()
        self.press(name)

    def key(self, key):
        self.wait()
        self.page.keyboard.press(key)

    def place(self):
        return self.page.locator("#count").inner_text()

    def comes_to(self, place):
        """A tab that asks the others where they are has to wait for an answer."""
        from playwright.sync_api import expect  # only where these tests run

        expect(self.page.locator("#count")).to_have_text(place)

    def chosen(self):
        return self.page.locator("[data-choice][aria-pressed=true] span").all_inner_texts()

    def save(self, folder):
        with self.page.expect_download() as download:
            self.press("Save the file")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def stays_inside(self, view):
        """No view is wider than the screen, and every control is on it from left to right."""
        widest = self.page.evaluate("document.documentElement.scrollWidth")
        assert widest <= SIZES[self.size][0], f"{view} is {widest} pixels wide"
        for box in filter(None, (button.bounding_box() for button in self.page.get_by_role("button").all())):
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= SIZES[self.size][0]
            assert box["height"] >= 40  # a finger's width
        if folder := os.environ.get("DPO_JAX_SHOTS"):
            scheme = "dark" if self.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
            self.page.screenshot(path=Path(folder, f"{self.size}_{scheme}_{view}.png"))

    def kept_to_itself(self):
        """Nothing was asked of any network, and nothing was complained about."""
        assert [url for url in self.asked if not url.startswith(("file:", "blob:", "data:"))] == []
        assert self.complaints == []
        self.context.close()


@pytest.fixture
def rater(chromium, study, tmp_path):
    return lambda **options: Rater(chromium, (tmp_path / "study.html").as_uri(), **options)


def test_what_nobody_could_see_is_written_out(chromium, tmp_path):
    comparison = Comparison("Say\0", ("\u202eabc\x1b", "\ufeff\udce9 שלום"))
    study = make_study([comparison], names=("x", "y"), title="t", wording=WORDINGS["dialogue"], raters=1, twice=0.0, seed=1)
    (tmp_path / "study.html").write_text(render(study.page), encoding="utf-8")
    ann = Rater(chromium, (tmp_path / "study.html").as_uri())
    ann.start()
    shown = [ann.page.locator(place).inner_text() for place in ("#prompt", "#text-A", "#text-B")]
    assert shown[0] == "Say\\x00"
    assert sorted(shown[1:]) == ["\\u202eabc\\x1b", "\\ufeff\\udce9 שלום"]
    ann.kept_to_itself()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rated_by_hand_and_keys_left_continued_saved_and_read(rater, study, tmp_path, size, scheme):
    ann = rater(size=size, scheme=scheme)
    ann.stays_inside("welcome")
    ann.start("Ann Ö")
    assert ann.place() == "1 of 8"
    assert ann.page.locator("#back").is_disabled()
    for number, (how, what) in enumerate(
        [(ann.choose, "Summary A"), (ann.key, "n"), (ann.choose, "Summary B"), (ann.key, "1")], 2
    ):
        assert ann.chosen() == []
        ann.stays_inside(f"compare_{number - 1}")
        how(what)
        assert ann.place() == f"{number} of 8"
    assert ann.page.get_by_role("status").first.inner_text() == "Summary A. Comparison 5 of 8."
    # Back by key and by hand; an answer is changed.
    ann.key("Backspace")
    ann.press("Back")
    assert (ann.place(), ann.chosen()) == ("3 of 8", ["Summary B"])
    ann.choose("Nearly identical")
    ann.page.reload()
    assert (ann.place(), ann.chosen()) == ("4 of 8", ["Summary A"])
    ann.press("Next")
    ann.press("Skip")
    assert ann.place() == "6 of 8"
    for key in ("b", "A", "3"):
        ann.key(key)
    assert ann.page.get_by_role("heading", level=1).inner_text() == "7 of 8 answered"
    ann.stays_inside("review")
    ann.press("Comparison 5: not answered")
    ann.choose("Summary B")
    ann.press("Review and save")
    assert ann.page.get_by_role("heading", level=1).inner_text() == "Thank you, that was all"
    first = ann.save(tmp_path)
    assert first.name == "ratings-ann-o.json"
    assert ann.page.locator("#saved").inner_text() == "Saved as ratings-ann-o.json."
    ann.stays_inside("finish")

    (file,) = read_raters([first], key=read_key(tmp_path / "key.json"))
    wanted = ["A", "same", "same", "A", "B", "B", "A", "B"]
    methods = {item["id"]: item["methods"] for item in study.key["items"]}
    winners = [
        "tie" if choice == "same" else methods[item][first if choice == "A" else 1 - first]
        for (item, first), choice in zip(study.page["raters"][0], wanted, strict=True)
    ]
    assert (file.rater, len(file.judgments), file.assigned) == ("Ann Ö", 8, 8)
    assert [(j.item, j.winner) for j in file.judgments] == [
        (item, winner) for (item, _), winner in zip(study.page["raters"][0], winners, strict=True)
    ]
    ratings = json.loads(first.read_text())["ratings"]
    assert all(0.3 < rating["seconds"] < 60 for rating in ratings)
    ann.kept_to_itself()


def test_texts_are_shown_as_text(rater, study):
    ann = rater()
    ann.start()
    seen = {}
    for _ in TEXTS:
        prompt, a, b = (
            ann.page.locator(f"#{place}").evaluate("node => node.textContent") for place in ("prompt", "text-A", "text-B")
        )
        seen[prompt] = {a, b}
        ann.press("Skip")
    for prompt, *texts in TEXTS:
        assert seen[prompt.strip()] == {text.strip() or "(empty)" for text in texts}
    assert ann.page.title() == "Which one is better?"
    assert ann.page.locator("img, .body *").count() == 0
    ann.kept_to_itself()


@pytest.mark.parametrize("size", SIZES)
def test_long_texts_scroll_and_the_answers_stay_in_reach(rater, size):
    ann = rater(size=size)
    ann.start()
    while not ann.page.locator("#prompt").inner_text().startswith("Paragraph 0"):
        ann.press("Skip")
    body = ann.page.locator("#prompt")
    assert body.evaluate("node => node.scrollHeight > node.clientHeight + 200")
    assert body.evaluate("node => { node.scrollTop = 1e6; return node.scrollTop; }") > 200
    visible = "node => { const box = node.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight; }"
    assert all(button.evaluate(visible) for button in ann.page.locator("[data-choice]").all())
    if size == "desktop":
        assert ann.page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    place = ann.place().split()[0]
    ann.press("Review and save")
    ann.press(f"Comparison {place}: not answered")
    assert body.evaluate("node => node.scrollTop") == 0
    ann.kept_to_itself()


def test_a_double_click_or_a_held_key_rates_once(rater):
    ann = rater()
    ann.start()
    ann.wait()
    ann.page.locator("[data-choice=A]").dblclick()
    assert ann.place() == "2 of 8"
    ann.wait()
    for _ in range(5):
        ann.page.keyboard.down("b")
    ann.page.keyboard.up("b")
    assert ann.place() == "3 of 8"
    ann.page.keyboard.press("Control+a")  # a shortcut of the browser, and no answer
    assert ann.place() == "3 of 8"
    ann.kept_to_itself()


def test_without_a_mouse_and_without_the_keys_of_the_page(rater):
    ann = rater(reduced_motion="reduce")
    ann.page.keyboard.press("Tab")
    ann.page.keyboard.type("Ann")
    ann.page.keyboard.press("Enter")
    assert ann.page.evaluate("document.activeElement.id") == "question"
    stops = []
    for _ in range(7):
        ann.page.keyboard.press("Tab")
        stops.append(ann.page.evaluate("document.activeElement.id || document.activeElement.dataset.choice"))
    assert stops == ["prompt", "text-A", "text-B", "A", "same", "B", "next"]
    assert ann.page.locator("#bar").evaluate(
        "node => getComputedStyle(node, '::-webkit-progress-value').transitionDuration"
    ) in (
        "0s",
        "",
    )
    ann.page.keyboard.press("Shift+Tab")
    ann.wait()
    ann.page.keyboard.press("Enter")
    assert ann.place() == "2 of 8"
    ann.press("Review and save")
    ann.page.get_by_label("Keyboard keys").uncheck()
    ann.press("Continue")
    ann.key("a")
    assert ann.place() == "2 of 8"
    ann.kept_to_itself()


def test_two_people_and_two_tabs_in_one_browser(chromium, tmp_path):
    study = written(tmp_path, raters=3, twice=1.0)
    ann = Rater(chromium, (tmp_path / "study.html").as_uri() + "#2")
    assert ann.page.get_by_label("Your number").input_value() == "2"
    ann.start("Ann")
    ann.choose("Summary A")
    first, ann.page = ann.page, ann.open()  # a second tab: goes on where the first is, and both answers count
    ann.comes_to(f"2 of {len(study.page['raters'][1])}")
    ann.choose("Summary B")
    ann.page = first
    ann.page.bring_to_front()
    ann.choose("Nearly identical")
    ann.press("Review and save")
    assert [re.sub(r"\s+", " ", entry) for entry in ann.page.locator("#list li").all_inner_texts()][:3] == [
        "1 A",
        "2 identical",
        "3 open",
    ]
    ann.press("Start as another person")
    ann.start("ann", 1)
    assert ann.page.get_by_role("alert").inner_text() == "Ann has begun with number 2 in this browser."
    ann.start("Bob", 1)
    assert ann.place() == f"1 of {len(study.page['raters'][0])}"
    ann.choose("Summary A")
    ann.press("Review and save")
    files = [ann.save(tmp_path)]
    ann.press("Start as another person")
    ann.start("Ann", 2)
    assert ann.place().startswith("3 of")
    ann.press("Review and save")
    files.append(ann.save(tmp_path))
    bobs, anns = read_raters(files, key=read_key(tmp_path / "key.json"))
    assert (bobs.rater, bobs.number, len(bobs.judgments)) == ("Bob", 1, 1)
    assert (anns.rater, anns.number, len(anns.judgments)) == ("Ann", 2, 2)
    ann.kept_to_itself()


def test_answers_outlive_a_browser_that_loses_its_local_storage(rater):
    """Chromium on a busy machine sometimes shows a reloaded page an empty localStorage; the tab keeps a copy of its own."""
    ann = rater()
    ann.start()
    ann.choose("Summary A")
    earlier = ann.page.evaluate("Object.entries(localStorage)")
    ann.choose("Summary B")
    ann.page.evaluate("localStorage.clear()")
    ann.page.reload()
    assert ann.place() == "3 of 8"
    ann.press("Back")
    assert ann.chosen() == ["Summary B"]
    # It is written to localStorage again, and of two copies the later one is read.
    ann.page.evaluate("earlier => earlier.forEach(([key, value]) => localStorage.setItem(key, value))", earlier)
    ann.page.reload()
    assert (ann.place(), ann.chosen()) == ("2 of 8", ["Summary B"])
    ann.page = ann.open()
    ann.comes_to("2 of 8")
    assert ann.chosen() == ["Summary B"]
    # A new tab that is shown nothing at all hears it from the others.
    ann.context.add_init_script(
        "const empty = Object.create({ getItem: () => null, setItem() {}, removeItem() {} });"
        "Object.defineProperty(window, 'localStorage', { value: empty });"
    )
    ann.page = ann.open()
    ann.comes_to("2 of 8")
    assert ann.chosen() == ["Summary B"]
    ann.kept_to_itself()


def test_a_browser_that_keeps_nothing_says_so_and_saves_all_the_same(rater, tmp_path, chromium):
    ann = rater()
    ann.context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } });")
    ann.page = ann.open()
    assert ann.page.get_by_text("cannot store your answers").first.is_visible()
    ann.start()
    assert "Not kept" in ann.page.locator("#kept").inner_text()
    ann.choose("Summary A")
    ann.press("Review and save")
    (file,) = read_raters([ann.save(tmp_path)], key=read_key(tmp_path / "key.json"))
    assert len(file.judgments) == 1
    ann.choose("Continue")
    ann.choose("Summary A")
    ann.press("Review and save")
    assert "You have changed answers since" in ann.page.locator("#saved").inner_text()
    ann.kept_to_itself()


def test_from_a_server_the_page_is_all_that_is_asked_for_and_its_policy_holds(chromium, study, tmp_path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *arguments):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ann = Rater(chromium, f"http://127.0.0.1:{server.server_port}/study.html")
        ann.start()
        ann.choose("Summary A")
        # Whatever might run here could not get anything out.
        for attempt in (
            "fetch('/leak')",
            "new Promise((yes, no) => Object.assign(new Image(), {onload: yes, onerror: no, src: '/leak'}))",
        ):
            assert ann.page.evaluate(f"{attempt}.then(() => 'sent', () => 'refused')") == "refused"
        ann.page.evaluate("navigator.sendBeacon('/leak', 'x')")
        ann.page.evaluate(
            "document.head.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
        )
        assert ann.page.title() == "Which one is better?"
        ann.wait()
        server.shutdown()
    assert asked == ["/study.html"]
    ann.context.close()


CONTRAST = """() => {
  const channel = (c) => (c /= 255, c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => parts(color).slice(0, 3).map(channel).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const under = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (parts(color)[3] !== 0) return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(":disabled, script, style, kbd, .unseen")) continue;
    const [one, other] = [light(getComputedStyle(node).color), light(under(node))].sort((a, b) => b - a);
    found.push([node.textContent.trim().slice(0, 30), (one + .05) / (other + .05)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(rater, scheme):
    ann = rater(scheme=scheme)
    seen = [*ann.page.evaluate(CONTRAST)]
    ann.start()
    ann.choose("Summary A")
    ann.press("Back")
    seen += ann.page.evaluate(CONTRAST)
    ann.press("Review and save")
    seen += ann.page.evaluate(CONTRAST)
    assert len(seen) > 30
    assert [(text, ratio) for text, ratio in seen if ratio < 4.5] == []  # WCAG 2, level AA
    ann.kept_to_itself()
