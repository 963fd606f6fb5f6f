"""Scenes: images that show what captions name, and an exact count of what a caption makes up."""

import numpy as np
import pytest

from dpo_jax.data.scenes import (
    COLORS,
    GROUND,
    SIZE,
    THINGS,
    Count,
    Thing,
    absent,
    caption,
    caption_ids,
    caption_text,
    careless,
    companion,
    count,
    mentioned,
    prompt_ids,
    scenes,
    spoilt,
)
from dpo_jax.lab.scenes import point_of
from dpo_jax.lab.scenes_report import at_equal_recall

RED, BLUE, GREEN = Thing("red", "circle"), Thing("blue", "square"), Thing("green", "cross")


def test_scenes_are_a_function_of_seed_and_split():
    first, again = scenes(5, 3), scenes(7, 3)[:5]
    assert [scene.things for scene in first] == [scene.things for scene in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [scene.things for scene in first] != [scene.things for scene in scenes(5, 3, split="test")]
    assert [scene.things for scene in first] != [scene.things for scene in scenes(5, 4)]


def test_an_image_shows_exactly_its_objects():
    for scene in scenes(200, 0):
        assert len(set(scene.things)) == len(scene.things)
        assert scene.image.shape == (SIZE, SIZE, 3)
        lit = np.abs(scene.image - GROUND).max(axis=-1) > 0.3  # far above the noise
        palette = np.array(list(COLORS.values()))
        seen = np.argmin(np.abs(scene.image[lit][:, None] - palette).sum(-1), axis=1)
        assert {[*COLORS][n] for n in np.unique(seen)} == {thing.color for thing in scene.things}


def test_companions_lie_together_more_often_than_chance():
    found = scenes(2000, 0)
    together = np.mean([any(companion(thing) in scene.things for thing in scene.things) for scene in found])
    assert together > 0.4  # three kinds at random: 3 x 2 / 15 at most
    assert all(companion(thing) in THINGS and companion(thing) != thing for thing in THINGS)


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("a red circle and a blue square.", Count(2, 0, 2, 2)),
        ("a blue square, a red circle and a green cross.", Count(3, 1, 2, 2)),
        ("a green cross.", Count(1, 1, 0, 2)),
        ("a red circle, a red circle and a red circle.", Count(1, 0, 1, 2)),
        ("a red and blue square circle", Count(1, 0, 1, 2)),
        ("", Count(0, 0, 0, 2)),
        ("red red circle square ? blue", Count(1, 0, 1, 2)),
    ],
)
def test_objects_are_counted(text, counted):
    assert count(text, (RED, BLUE)) == counted


def test_captions_survive_their_tokens():
    assert caption([RED, BLUE, GREEN]) == "a red circle, a blue square and a green cross."
    for scene in scenes(50, 1):
        text = caption(scene.things)
        assert mentioned(text) == scene.things
        assert caption_text(caption_ids(text)) == text
    with pytest.raises(ValueError, match="'purple' is not a word"):
        caption_ids("a purple circle.")
    assert caption_text([99, *caption_ids("a red circle.")]) == "? a red circle."
    assert len(prompt_ids(9)) == 11


def test_a_spoilt_caption_has_one_more_mistake():
    rng = np.random.default_rng(0)
    kinds = set()
    for scene in scenes(300, 2):
        named = careless(scene.things, rng, adds=0.5, omits=0.2)
        worse = spoilt(named, scene.things, rng, omits=0.4)
        before, after = (count(caption(one), scene.things) for one in (named, worse))
        change = (after.hallucinated - before.hallucinated, after.recalled - before.recalled)
        assert change in ((1, 0), (0, -1))
        kinds.add(change)
        assert absent(scene.things, rng, named=named) not in {*scene.things, *named}
    assert len(kinds) == 2
    assert careless((RED, BLUE), rng, adds=0.0, omits=0.0) in ((RED, BLUE), (BLUE, RED))


def test_shares_are_ratios_of_sums_with_intervals():
    shown = scenes(100, 0)
    texts = [caption(careless(scene.things, np.random.default_rng(n), adds=0.5, omits=0.3)) for n, scene in enumerate(shown)]
    counts = np.array([count(text, scene.things) for text, scene in zip(texts, shown, strict=True)]).sum(axis=0)
    point = point_of(texts, shown, seed=0)
    assert point["hallucinated"] == pytest.approx(counts[1] / counts[0])
    assert point["recalled"] == pytest.approx(counts[2] / counts[3])
    assert point["hallucinated_low"] < point["hallucinated"] < point["hallucinated_high"]
    assert point_of([""] * 100, shown, seed=0)["hallucinated"] == 0
    flawless = point_of([caption(scene.things) for scene in shown], shown, seed=0)
    assert flawless["hallucinated"] == flawless["hallucinated_low"] == 0 < flawless["hallucinated_high"] < 0.04
    assert flawless["recalled_low"] < flawless["recalled"] == flawless["recalled_high"] == 1


def test_equal_recall_leaves_out_what_recalls_less():
    def setting(method, label, hallucinated, recalled):
        values = {"hallucinated": {"": hallucinated}, "recalled": {"": recalled, "_low": recalled - 0.05}}
        return {"method": method, "chosen": "" if method == "sft" else "true", "label": label, **values}

    settings = [setting("sft", "", 0.2, 0.8), setting("dpo", "a", 0.01, 0.7), setting("dpo", "b", 0.08, 0.76)]
    found = at_equal_recall([*settings, setting("preferred-ft", "c", 0.1, 0.5)])
    assert (found[0]["best"]["label"], found[0]["share"]) == ("b", pytest.approx(0.4))
    assert found[1]["best"] is None
