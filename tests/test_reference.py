"""The reference cache gives back what was computed, or says why it cannot, whatever happened to its files."""

import dataclasses
import errno
import functools
import json
import os
import random
import shutil

import jax
import numpy as np
import pytest
from damage import FAULTS, damage
from test_step import MODEL, random_pairs

from dpo_jax import reference
from dpo_jax.data.loader import eval_batches, plan_layout, train_batches
from dpo_jax.models.digest import weights_digest
from dpo_jax.reference import (
    RECORD,
    BrokenReference,
    ForeignCache,
    ReferenceCache,
    fill_cache,
    pair_key,
    reference_logps,
)

IDENTITY = {
    "weights": "0a" * 32,
    "tokenizer": "1b" * 32,
    "max_length": 64,
    "max_prompt_length": 32,
    "truncation": "keep_end",
    "dtype": "float32",
    "kernel": "dense",
}
PAIRS = random_pairs(13)
VALUES = np.random.default_rng(2).normal(-20, 4, size=(13, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def compiled():
    """rows -> log-probabilities of a fixed model."""
    variables = jax.jit(MODEL.init)(jax.random.key(3))
    run = jax.jit(functools.partial(reference_logps, MODEL))
    return lambda rows: np.asarray(run(variables, rows))


@pytest.fixture
def filled(tmp_path):
    """The folder of a cache that holds VALUES for PAIRS."""
    ReferenceCache(tmp_path / "refs", IDENTITY).add(PAIRS, VALUES)
    return tmp_path / "refs"


def opened(folder, **changes):
    return ReferenceCache(folder, {**IDENTITY, **changes})


def batches_of(kind, batch):
    return functools.partial(eval_batches, layout=plan_layout(PAIRS, kind=kind, batch=batch), batch=batch)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_may_only_be_read_is_enough_if_it_is_complete(filled, monkeypatch, compiled, number):
    """The cache of another user, or on a read-only mount."""

    def refused(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(reference, "open_lock", refused)
    with open(filled / "logps-00001.bin", "wb") as file:
        file.write(bytes(RECORD.itemsize))  # damaged
    before = {path: path.read_bytes() for path in filled.iterdir()}
    cache = opened(filled)
    assert np.array_equal(cache.lookup(PAIRS), VALUES)
    assert fill_cache(cache, PAIRS, batches=batches_of("plain", 4), logps=compiled) == 0
    with pytest.raises(ForeignCache, match="kernel: cached with 'dense'"):
        opened(filled, kernel="flash")
    more = [*PAIRS, *random_pairs(3, seed=9)]
    lacking = rf"{os.strerror(number)}; the cache lacks 3 pairs: choose another refs.cache: '{filled}'"
    with pytest.raises(PermissionError, match=lacking):
        fill_cache(cache, more, batches=None, logps=None)  # before anything is computed
    assert {path: path.read_bytes() for path in filled.iterdir()} == before
    (filled / "identity.json").unlink()
    with pytest.raises(OSError, match="cache.lock"):
        opened(filled)


@pytest.fixture(scope="module")
def live(compiled):
    """Log-probabilities computed without any cache, a pair at a time."""
    return np.concatenate([compiled(batch.rows) for batch in batches_of("plain", 1)(PAIRS)])


def test_cached_equals_live_after_shuffling_and_in_other_rows(tmp_path, compiled, live):
    first = np.random.default_rng(0).permutation(13)
    cache = opened(tmp_path)
    assert fill_cache(cache, [PAIRS[i] for i in first[:8]], batches=batches_of("packed", 8), logps=compiled) == 8
    # Another process, another order, layout and batch: only what is lacking is computed.
    cache = opened(tmp_path)
    assert fill_cache(cache, PAIRS, batches=batches_of("shared", 4), logps=compiled) == 5
    for order in (first, np.arange(13)):
        np.testing.assert_allclose(opened(tmp_path).lookup([PAIRS[i] for i in order]), live[order], atol=1e-5)
    assert fill_cache(cache, PAIRS, batches=batches_of("plain", 4), logps=lambda rows: pytest.fail("nothing is lacking")) == 0


@pytest.mark.parametrize("field", IDENTITY)
def test_a_foreign_cache_is_refused_by_the_field_that_differs(filled, field):
    other = 63 if isinstance(IDENTITY[field], int) else "other"
    with pytest.raises(ForeignCache) as caught:
        opened(filled, **{field: other})
    named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert named == [field]
    assert f"{IDENTITY[field]!r}, now {other!r}" in str(caught.value)
    assert "--refs.cache" in str(caught.value)


def test_a_new_field_of_the_identity_makes_old_caches_foreign(filled):
    with pytest.raises(ForeignCache, match="rope: cached with None, now 2"):
        opened(filled, rope=2)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"identity": ', b"\xff\xfe", None])
def test_without_its_identity_the_records_say_themselves_where_they_belong(filled, content):
    path = filled / "identity.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    cache = opened(filled)
    assert "is damaged; it is now" in cache.damage[0] if content is not None else "is gone" in cache.damage[0]
    assert set_aside(filled) == ([] if content is None else ["identity.json-0"])
    np.testing.assert_array_equal(cache.lookup(PAIRS), VALUES)
    path.unlink()
    other = opened(filled, weights="ff" * 32)  # what they belong to, nobody can be asked: nothing is believed
    assert (len(other), other.damaged) == (0, 13)


def set_aside(folder):
    return sorted(path.name for path in (folder / "quarantine").glob("*"))


def test_what_was_added_survives_a_tear_in_the_middle_of_a_record(filled):
    path = filled / "logps-00000.bin"
    path.write_bytes(path.read_bytes()[: 9 * RECORD.itemsize + 11])
    cache = opened(filled)
    assert (len(cache), cache.damaged) == (9, 4)
    assert cache.missing(PAIRS) == [9, 10, 11, 12]
    cache.add(PAIRS[9:], VALUES[9:])
    again = opened(filled)
    assert (len(again), again.damaged) == (13, 0)
    np.testing.assert_array_equal(again.lookup(PAIRS), VALUES)


def test_a_tear_that_another_process_left_does_not_spoil_what_follows(filled):
    cache = opened(filled)
    path = filled / "logps-00000.bin"
    with open(path, "ab") as file:  # it shares the file, and was killed while it appended
        file.write(b"torn record")
    more = [dataclasses.replace(pair, prompt=np.append(pair.prompt, 7).astype(np.int32)) for pair in PAIRS[:4]]
    cache.add(more, VALUES[:4])
    again = opened(filled)
    assert (len(again), again.damaged) == (17, 0)
    np.testing.assert_array_equal(again.lookup(more), VALUES[:4])


@pytest.mark.parametrize("kept", [0, 9, None])
def test_records_that_are_gone_without_a_trace_are_missed(filled, kept):
    """Cut between two records, or deleted: every record that is left is sound, but they are not all."""
    path = filled / "logps-00000.bin"
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: kept * RECORD.itemsize])
    cache = opened(filled)
    assert (len(cache), cache.damaged) == (kept or 0, 13 - (kept or 0))
    assert set_aside(filled) == ([] if kept is None else ["logps-00000.bin-0"])
    assert [what.split(";")[0] for what in cache.damage] == [
        "logps-00000.bin with 13 records is gone"
        if kept is None
        else f"{13 - kept} records of logps-00000.bin are damaged or lost, {kept} are good"
    ]
    again = opened(filled)
    assert (again.damaged, again.damage) == (0, [])


def test_a_kill_between_records_and_their_count_loses_nothing(filled):
    counted = (filled / "identity.json").read_bytes()
    more = random_pairs(3, seed=98)
    opened(filled).add(more, VALUES[:3])
    (filled / "identity.json").write_bytes(counted)
    (filled / ".0123abcd-identity.json").write_bytes(b"{")
    (filled / "notes.tmp").write_bytes(b"somebody's own")
    cache = opened(filled)
    assert (len(cache), cache.damaged) == (16, 0)
    assert json.loads((filled / "identity.json").read_bytes())["records"] == {"logps-00000.bin": 16}
    assert sorted(path.name for path in filled.iterdir()) == ["cache.lock", "identity.json", "logps-00000.bin", "notes.tmp"]


def test_two_numbers_for_one_pair_the_first_is_believed_and_the_second_reported(filled, tmp_path):
    ReferenceCache(tmp_path / "other", IDENTITY).add(PAIRS[:4], VALUES[:4] + np.float32([[1], [0], [0], [0]]))
    shutil.copy(tmp_path / "other" / "logps-00000.bin", filled / "logps-00001.bin")
    cache = opened(filled)
    assert cache.damaged == 1
    assert set_aside(filled) == ["logps-00001.bin-0"]
    np.testing.assert_array_equal(cache.lookup(PAIRS), VALUES)
    assert opened(filled).damaged == 0


def test_two_processes_that_compute_the_same_pairs_use_the_same_numbers(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    one.add(PAIRS, VALUES)
    two.add(PAIRS, VALUES + np.float32(1e-5))  # other rows, another order of sums
    for cache in (one, two, opened(tmp_path)):
        np.testing.assert_array_equal(cache.lookup(PAIRS), VALUES)
    assert (tmp_path / "logps-00000.bin").stat().st_size == 13 * RECORD.itemsize


def test_every_flipped_bit_is_found(filled):
    path = filled / "logps-00000.bin"
    sound = path.read_bytes()
    for bit in range(8 * RECORD.itemsize):
        broken = bytearray(sound)
        broken[5 * RECORD.itemsize + bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        cache = opened(filled)
        assert cache.damaged == 1
        assert cache.missing(PAIRS) == [5]
        assert opened(filled).damaged == 0  # the bad record is gone, the others are kept
        assert len(opened(filled)) == 12
    assert (filled / "quarantine" / f"logps-00000.bin-{8 * RECORD.itemsize - 1}").read_bytes() == bytes(broken)


@pytest.mark.parametrize("shard", ["logps-00000.bin", "logps-00001.bin"])
def test_records_copied_from_another_cache_are_not_believed(filled, tmp_path, shard):
    other = opened(tmp_path / "other", weights="ff" * 32)
    other.add(PAIRS[:3], VALUES[:3] + 1)
    shutil.copy(tmp_path / "other" / "logps-00000.bin", filled / shard)
    cache = opened(filled)
    assert cache.damaged == (3 if shard.endswith("1.bin") else 13)  # three that came and, in place of ours, ten that went
    assert cache.missing(PAIRS) == ([] if shard.endswith("1.bin") else list(range(13)))
    if not cache.missing(PAIRS):
        np.testing.assert_array_equal(cache.lookup(PAIRS), VALUES)


@pytest.mark.parametrize("name", ["identity.json", "logps-00000.bin"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_any_file_of_the_cache_is_found(filled, tmp_path, name, fault):
    """Several places of each: reported, set aside unless gone, and after computing what is lacking all is as it was."""
    generator = random.Random(0)
    tries = 40 if fault in ("bit", "zeros") else 1
    for number in range(tries):
        folder = shutil.copytree(filled, tmp_path / f"{number}")
        damage(folder / name, fault, generator)
        cache = opened(folder)
        assert cache.damage
        assert set_aside(folder) == ([] if fault == "deleted" else [f"{name}-0"])
        lacking = cache.missing(PAIRS)
        assert cache.damaged == len(lacking)
        cache.add([PAIRS[i] for i in lacking], VALUES[lacking])
        again = opened(folder)
        assert again.damage == []
        np.testing.assert_array_equal(again.lookup(PAIRS), VALUES)
    print(f"{name}, {fault}: {tries} tries, {tries} found")


def test_hosts_write_files_of_their_own_and_read_all(tmp_path):
    for shard in range(2):
        ReferenceCache(tmp_path, IDENTITY, shard=shard).add(PAIRS[shard::2], VALUES[shard::2])
    np.testing.assert_array_equal(opened(tmp_path).lookup(PAIRS), VALUES)


def test_two_processes_that_append_and_one_that_opens_lose_nothing(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    for number, pair in enumerate(PAIRS):
        (one, two)[number % 2].add([pair], VALUES[number : number + 1])
        assert len(opened(tmp_path)) == number + 1
    np.testing.assert_array_equal(opened(tmp_path).lookup(PAIRS), VALUES)


def test_equal_pairs_are_computed_once(tmp_path):
    cache = opened(tmp_path)
    assert cache.missing([*PAIRS, *PAIRS[:4]]) == list(range(13))
    cache.add(PAIRS[:2], VALUES[:2])
    assert cache.missing([PAIRS[0], PAIRS[5], PAIRS[5], PAIRS[1]]) == [1]
    np.testing.assert_array_equal(cache.lookup([PAIRS[1], PAIRS[0], PAIRS[1]]), VALUES[[1, 0, 1]])


def test_keys_tell_where_one_text_ends_and_the_next_begins():
    pair = PAIRS[0]
    text = np.concatenate([pair.prompt, pair.chosen])
    moved = type(pair)(text[:-1], text[-1:], pair.rejected)
    swapped = type(pair)(pair.prompt, pair.rejected, pair.chosen)
    assert len({pair_key(p) for p in (pair, moved, swapped)}) == 3
    assert pair_key(type(pair)(pair.prompt, pair.chosen, pair.rejected, uid="another name")) == pair_key(pair)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers_never_reach_the_cache(tmp_path, value):
    cache = opened(tmp_path)
    values = VALUES.copy()
    values[4, 1] = value
    with pytest.raises(BrokenReference, match=f"4: the reference model gives .*{value}"):
        cache.add(PAIRS, values)
    assert len(cache) == len(opened(tmp_path)) == 0


def test_a_pair_without_an_entry_is_named(filled):
    stranger = random_pairs(1, seed=99)[0]
    with pytest.raises(KeyError, match="no reference log-probabilities of"):
        opened(filled).lookup([*PAIRS, stranger])


@pytest.mark.parametrize("kind", ["shared", "packed"])
def test_the_cache_does_not_touch_the_order_of_training(filled, kind):
    layout = plan_layout(PAIRS, kind=kind, batch=4)
    cached = train_batches(PAIRS, layout=layout, batch=4, seed=5, epochs=2, ref_logps=opened(filled).lookup(PAIRS))
    bare = train_batches(PAIRS, layout=layout, batch=4, seed=5, epochs=2)
    for step in range(7):
        assert cached(step).uids == bare(step).uids
        np.testing.assert_array_equal(cached(step).rows.tokens, bare(step).rows.tokens)
        for place, index in enumerate(cached(step).rows.index):
            if index >= 0:
                uid = cached(step).uids[index]
                np.testing.assert_array_equal(cached(step).rows.ref_logps[place], VALUES[int(uid)])


def test_the_weights_digest_is_of_names_shapes_types_and_bytes():
    weights = {"params": {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}}
    base = weights_digest(weights)
    assert base == weights_digest(json.loads(json.dumps({"params": {}})) | {"params": dict(weights["params"])})
    flipped = weights["params"]["b"].copy()
    flipped.view(np.uint32)[3] ^= 1
    for changed in (
        {"a": weights["params"]["a"], "b": flipped},
        {"a": weights["params"]["a"], "c": weights["params"]["b"]},
        {"a": weights["params"]["a"].reshape(3, 2), "b": weights["params"]["b"]},
        {"a": weights["params"]["a"].astype(np.int32), "b": weights["params"]["b"]},
    ):
        assert weights_digest({"params": changed}) != base
    assert weights_digest(jax.device_put(weights)) == base
    assert weights_digest({"scalar": np.float32(1)}) != weights_digest({"scalar": np.float32(2)})
