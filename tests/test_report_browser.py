"""The report in a real browser, at the width of a desk and of a phone: nothing sticks out, nothing is asked of any network.

`pytest -m browser tests/test_report_browser.py` needs the `browser` extra and a Chromium (Debian: apt-get install chromium).
"""

import json
import shutil

import pytest
from test_report import JUDGED, PIXEL, POINT, json_to, make_run
from tiny_run import call

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory):
    root = make_run(tmp_path_factory.mktemp("report") / "first")
    json_to(root / "judge" / "report.json", JUDGED | {"points": [POINT | {"at": 0.25, "series": "a-long-name-" * 4}] * 3})
    shutil.copy(root / "dpo" / "config.yaml", root / "judge")
    (root / "judge" / "win_rates.png").write_bytes(PIXEL)
    with open(root / "eval" / "samples.jsonl", "w") as file:
        long = {"prompt": "q" * 2000, "reference": "r", "policy": "w" * 3000, "policy_finished": False}
        file.write(json.dumps(long) + "\n")
    assert call("report", root).code == 0
    return root / "report" / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_fits_its_screen_and_stays_by_itself(chromium, page_of_a_run, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 500)
    asked, complaints = [], []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(page_of_a_run.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A table that is wider than the screen is moved sideways; on a phone its first column stays.
    (table,) = [box for box in page.locator(".table").all() if "a-long-name" in box.inner_text() and "lost" in box.inner_text()]
    wider = table.evaluate("box => { box.scrollLeft = 1e6; return box.scrollLeft; }") > 0
    assert wider == (width < 500)
    assert table.locator("tbody th").first.bounding_box()["x"] >= 0
    assert all(image.evaluate("image => image.naturalWidth") for image in page.locator("img").all())
    page.get_by_role("link", name="Win rates and ratings").click()
    assert page.get_by_role("heading", name="Win rates and ratings").bounding_box()["y"] < 100
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_figure_is_enlarged_by_a_tap_and_a_cut_sample_unfolded(chromium, page_of_a_run, width):
    context = chromium.new_context(viewport={"width": width, "height": 844}, is_mobile=width < 500, has_touch=width < 500)
    page = context.new_page()
    page.goto(page_of_a_run.as_uri())
    figure = page.get_by_role("link", name="Enlarge: Implicit rewards")
    before = figure.bounding_box()
    (figure.tap if width < 500 else figure.click)()
    assert figure.bounding_box()["width"] > 1.9 * before["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # the figure is moved, not the page
    close = page.get_by_role("link", name="Close")
    assert close.bounding_box()["y"] >= 0
    close.click()
    assert figure.bounding_box()["width"] == before["width"]
    assert 0 <= figure.bounding_box()["y"] < 844  # back where the reader was
    sample = page.locator(".sample").first
    folded = sample.bounding_box()["height"]
    for summary in sample.locator("summary").all():
        summary.click()
    assert sample.bounding_box()["height"] > folded
    assert sample.evaluate("element => element.scrollWidth <= element.clientWidth")
    assert "w" * 3000 in sample.inner_text().replace("\n", "").replace("… 2,400 more characters", "")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
