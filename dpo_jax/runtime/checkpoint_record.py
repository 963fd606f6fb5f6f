"""The record of a checkpoint: shape, dtype and digest of every leaf, the caller's `meta`, and a digest of the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax.runtime import hosts
from dpo_jax.runtime.seal import digest
from dpo_jax.runtime.tiles import tile_digests
from dpo_jax.untrusted import parse_object

FORMAT = 4  # 1 had no seals, 2 had kernels that write to the residual stream with D last
WHOLE = 3  # had a SHA-256 of each whole array instead of digests of tiles
READ = (WHOLE, FORMAT)
Leaves = dict[str, Any]


class StateMismatch(ValueError):
    """The checkpoint is intact, but belongs to a different model or optimizer than the state to be filled."""


def read_record(step_folder: epath.Path) -> dict[str, Any]:
    """The record of a step, without its arrays. Raises OSError, ValueError, KeyError or TypeError if it is incomplete."""
    record = parse_object((step_folder / "record" / "metadata").read_bytes(), f"checkpoint {step_folder.name}")
    if record["format"] not in READ or record["digest"] != record_digest(record):
        raise ValueError("the record is of another format, or differs from its digest")
    return record


def record_digest(record: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in record.items() if name != "digest"})


def named(state: Any) -> Leaves:
    """Leaves by dotted path, in tree order. Containers without leaves (`optax.EmptyState`) are restored from the target
    tree. ValueError naming a leaf that cannot be saved."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted path")
    for name, leaf in named.items():
        where = f"state.{name}".rstrip(".")  # the tree may be a single leaf
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"{where}: expected an array, got {type(leaf).__name__}: make it one, or it cannot be saved")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            remedy = "keep jax.random.key_data(key), and use jax.random.wrap_key_data in the step"
            raise ValueError(f"{where}: expected an array of numbers, got {leaf.dtype}, which cannot be saved: {remedy}")
    return named


def make_record(step: int, leaves: Leaves, meta: Mapping[str, Any]) -> dict[str, Any]:
    described = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "tiles": sums}
        for (name, leaf), sums in zip(leaves.items(), tile_digests(leaves, every_copy=False).values(), strict=True)
    }
    record = {"format": FORMAT, "step": step, "leaves": described, "meta": json.loads(json.dumps(meta))}
    return {**record, "digest": digest(record)}


def check_leaves(record: Mapping[str, Any], leaves: Leaves) -> None:
    """Raises ValueError naming a leaf whose values differ from the record. All hosts must call it."""
    older = record["format"] == WHOLE
    found = {name: _sha256(leaf) for name, leaf in leaves.items()} if older else tile_digests(leaves, every_copy=True)
    for name, digest_ in found.items():
        if digest_ != record["leaves"][name]["sha256" if older else "tiles"]:
            raise ValueError(f"{name} differs from its digest")


def _sha256(leaf: Any) -> str:
    """SHA-256 of the logical array, row-major and little endian, independent of its device layout."""
    sha = hashlib.sha256()
    for piece in hosts.gathered_chunks(leaf):
        sha.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return sha.hexdigest()


def check_target(record: Mapping[str, Any], wanted: Leaves, where: str) -> None:
    if record["format"] not in READ:
        raise StateMismatch(
            f"{where} is in format {record['format']}, but this version reads {WHOLE} and {FORMAT}: continue it with the "
            "version that wrote it, or choose another directory"
        )
    have = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in record["leaves"].items()}
    want = {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in wanted.items()}
    differing = [name for name in [*have, *(want.keys() - have.keys())] if have.get(name) != want.get(name)]
    if differing:
        lines = [f"  {name}: {have.get(name, 'absent')} there, {want.get(name, 'absent')} here" for name in differing[:5]]
        more = [f"  and {len(differing) - 5} more"] if len(differing) > 5 else []
        remedy = "Continue it with the settings it was saved with, or choose another directory."
        raise StateMismatch("\n".join([f"{where} belongs to a different model or optimizer:", *lines, *more, remedy]))
