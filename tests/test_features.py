"""Cached features of images: computed once, and never those of another encoder, processing or image."""

import gc
import io
import os
import resource

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import Processing, open_image
from dpo_jax.models.digest import weights_digest
from dpo_jax.reference import ForeignCache
from dpo_jax.training.features import Encoder, FeatureCache, feature_identity, image_features

PROCESSING = Processing(height=4, width=4, tokens=2)
ENCODER = {"params": {"w": np.ones((3,), np.float32)}}


def image(seed):
    values = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return open_image(file.getvalue())


IMAGES = [image(seed) for seed in (0, 1, 2, 1)]


class Mean:
    """Mean colors of the upper and the lower half; counts the images that it was given."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixels):
        self.seen += int((pixels != 0).any(axis=(1, 2, 3)).sum())
        return pixels.reshape(len(pixels), 2, 8, 3).mean(axis=2)


def cached(folder, encoder, *, weights=ENCODER, processing=PROCESSING, images=IMAGES, say=lambda words: None):
    cache = FeatureCache(folder, feature_identity(weights_digest(weights), "toy", processing), shape=(2, 3))
    return image_features(images, cache=cache, encoder=lambda: Encoder(encoder, 2), processing=processing, say=say)


def test_each_image_is_computed_once(tmp_path):
    encoder = Mean()
    found = cached(tmp_path, encoder)
    assert (encoder.seen, len(found)) == (3, 3)
    first = {digest: features.copy() for digest, features in found.items()}
    told = []
    again = cached(tmp_path, encoder, images=[*IMAGES, image(7)], say=told.append)
    assert encoder.seen == 4
    assert "3 of 4 images are already cached" in told[0]
    for digest, features in first.items():
        np.testing.assert_array_equal(again[digest], features)
    assert len(cached(tmp_path / "none", encoder, images=[], say=told.append)) == 0
    assert "0 of 0 images are already cached; all take 0 bytes, 24 bytes each" in told[1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weights": {"params": {"w": np.zeros((3,), np.float32)}}}, "encoder"),
        ({"processing": PROCESSING._replace(resample=3)}, "processing"),
    ],
)
def test_those_of_something_else_are_refused(tmp_path, changed, named):
    cached(tmp_path, Mean())
    with pytest.raises(ForeignCache, match=f"{named}: cached with"):
        cached(tmp_path, Mean(), **changed)


@pytest.mark.parametrize("damage", ["values", "name", "cut"])
def test_damage_is_computed_again(tmp_path, damage):
    encoder = Mean()
    found = {digest: features.copy() for digest, features in cached(tmp_path, encoder).items()}
    path = max(tmp_path.glob("*.features"), key=lambda path: path.stat().st_size)  # of two images
    content = bytearray(path.read_bytes())
    content[{"values": -1, "name": 0, "cut": 0}[damage]] ^= 1 if damage != "cut" else 0
    path.write_bytes(content[:-4] if damage == "cut" else content)
    told = []
    again = cached(tmp_path, encoder, say=told.append)
    assert encoder.seen == 4
    assert ("1 features are damaged" in told[0]) == (damage == "values")
    for digest, features in found.items():
        np.testing.assert_array_equal(again[digest], features)
    assert cached(tmp_path, encoder).missing(list(found)) == []
    assert encoder.seen == 4


def test_a_cache_without_its_identity_takes_only_its_own(tmp_path):
    encoder = Mean()
    cached(tmp_path, encoder)
    (tmp_path / "identity.json").unlink()
    assert cached(tmp_path, encoder, weights={"params": {"w": np.zeros((3,), np.float32)}}).damaged == 3
    assert encoder.seen == 6


def test_what_is_not_finite_is_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        cached(tmp_path, lambda pixels: np.full((len(pixels), 2, 3), np.nan))


def test_a_cache_of_many_files_keeps_none_open(tmp_path):
    identity, digests = {"encoder": "toy"}, [f"{number:064x}" for number in range(40)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, before[1]))
    try:
        cache = FeatureCache(tmp_path, identity, shape=(2, 3))
        for number, digest in enumerate(digests):
            cache.add([digest], np.full((1, 2, 3), number))
        again = FeatureCache(tmp_path, identity, shape=(2, 3))
        for number, digest in enumerate(digests):
            np.testing.assert_array_equal(again[digest], np.full((2, 3), number, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_another_process_that_opens_a_cache_leaves_what_is_being_written(tmp_path, monkeypatch):
    """A file that a killed process left is removed, once nobody writes."""
    identity, sync = {"encoder": "toy"}, os.fsync
    cache = FeatureCache(tmp_path, identity, shape=(2, 3))

    def sync_while_another_opens(descriptor):
        sync(descriptor)
        FeatureCache(tmp_path, identity, shape=(2, 3))

    monkeypatch.setattr(os, "fsync", sync_while_another_opens)
    cache.add(["00" * 32], np.ones((1, 2, 3)))
    monkeypatch.undo()
    left = tmp_path / ".01234567-killed.features"
    left.touch()
    assert len(FeatureCache(tmp_path, identity, shape=(2, 3))) == 1
    assert left.exists()
    del cache
    gc.collect()
    assert len(FeatureCache(tmp_path, identity, shape=(2, 3))) == 1
    assert not left.exists()


def test_a_cache_that_can_only_be_read_is_read(tmp_path):
    FeatureCache(tmp_path, {"encoder": "toy"}, shape=(2, 3)).add(["00" * 32], np.ones((1, 2, 3)))
    (tmp_path / "cache.lock").unlink()
    tmp_path.chmod(0o555)
    try:
        assert FeatureCache(tmp_path, {"encoder": "toy"}, shape=(2, 3)).missing(["00" * 32]) == []
    finally:
        tmp_path.chmod(0o755)
