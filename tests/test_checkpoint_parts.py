"""Parts of checkpoint tensors: read slice by slice they are the parts of the whole, and hosts share the digest."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file
from test_models import CASES

from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import WeightsDigest, shares
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config, read_weights
from dpo_jax.models.weights import Checkpoint
from dpo_jax.untrusted import read_bytes

MODELS = GOLDEN / "models"


def model_of(case):
    return make_model(decoder_config(load_config(MODELS / case)))


def boxes(shape, rng):
    """Halves along each axis, and a box anywhere."""
    whole = [slice(0, length) for length in shape]
    for axis, length in enumerate(shape):
        if length > 1:
            yield (*whole[:axis], slice(length // 2, length), *whole[axis + 1 :])
    ends = [np.sort(rng.choice(length + 1, 2, replace=False)) for length in shape]
    yield tuple(slice(int(first), int(end)) for first, end in ends)


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_a_tensor_is_read_and_no_more(case, monkeypatch):
    model, rng, read, original = model_of(case), np.random.default_rng(0), [], Checkpoint.read

    def counting(checkpoint, name, box=None):
        read.append((found := original(checkpoint, name, box)).nbytes)
        return found

    whole = read_weights(MODELS / case, model, digest=WeightsDigest())  # which takes in whole tensors
    for stored, loaded in zip(read_weights(MODELS / case, model), whole, strict=True):
        assert stored[:2] == loaded[:2]
        assert (stored.array.shape, stored.array.dtype) == (loaded.array.shape, loaded.array.dtype)
        np.testing.assert_array_equal(np.asarray(stored.array), loaded.array)
        for box in boxes(stored.array.shape, rng):
            with monkeypatch.context() as patch:
                patch.setattr(Checkpoint, "read", counting)
                read.clear()
                part = stored.array[box]
            np.testing.assert_array_equal(part, loaded.array[box], err_msg=f"{stored.path} {box}")
            assert sum(read) == part.nbytes, (stored.path, box)


def digest_of(folder, model, hosts):
    """The digest that each of so many hosts, here threads, comes to, and which share of the tensors it has read."""
    meeting, given = threading.Barrier(hosts), {}

    def of_host(number):
        def all_gather(mine):
            given[number] = mine
            meeting.wait(timeout=60)
            return np.concatenate([given[one] for one in range(hosts)])

        digest, read = WeightsDigest(share=(number, hosts), joined=all_gather), 0
        for piece in read_weights(folder, model, digest=digest):
            read += piece.array.nbytes if isinstance(piece.array, np.ndarray) else 0
        return digest.hexdigest(), read, digest.all_in("float32")

    with ThreadPoolExecutor(hosts) as pool:
        return list(pool.map(of_host, range(hosts)))


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral"])
def test_hosts_that_share_a_digest_come_to_that_of_one(case):
    model, alone = model_of(case), WeightsDigest()
    total = sum(piece.array.nbytes for piece in alone.watch(read_weights(MODELS / case, model, digest=WeightsDigest())))
    for hosts in (2, 3):
        found = digest_of(MODELS / case, model, hosts)
        assert {digest for digest, _, _ in found} == {alone.hexdigest()}
        assert sum(read for _, read, _ in found) == total  # each tensor by one of them
        assert all(same for *_, same in found)


def test_a_small_file_takes_little_memory(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    tracemalloc.start()
    assert read_bytes(tmp_path / "index.json") == b"{}"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_shares_are_even():
    sizes = np.random.default_rng(0).integers(1, 100, 50).tolist()
    of_host = shares(sizes, 4)
    loads = [sum(size for size, host in zip(sizes, of_host, strict=True) if host == one) for one in range(4)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) < max(sizes)


def test_the_host_whose_rows_differ_refuses_a_head_that_is_tied_and_another(tmp_path):
    case = "gemma2"
    stored = load_file(MODELS / case / "model.safetensors")
    head = stored["model.embed_tokens.weight"].copy()
    head[0] += 1
    save_file({**stored, "lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((MODELS / case / "config.json").read_text())
    model = model_of(case)

    def read(number):
        digest = WeightsDigest(share=(number, 2), joined=lambda mine: np.concatenate([mine, mine]))
        return sum(1 for _ in read_weights(tmp_path, model, digest=digest))

    with pytest.raises(ValueError, match="differs from the embedding although"):
        read(0)
    assert read(1) > 0
