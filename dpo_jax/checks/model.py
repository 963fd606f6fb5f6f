"""Check that a model gives the same log-probabilities for plain, shared and packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.arguments import check_pairs
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import packed_rows, plain_rows, shared_rows
from dpo_jax.logps import completion_logps
from dpo_jax.types import Model, Rows, Variables

LAYOUTS = ("plain", "shared", "packed")
MARGIN = 4  # padding at the end of every row, so that there is some


class WrongModel(ValueError):
    """The model reads some layout wrongly. The message names layout, error and likely cause."""


class Agreement(NamedTuple):
    """The difference between a layout and plain rows."""

    nats: float  # largest difference of a completion's log-probability
    gradients: float | None  # norm of the difference of the gradients, relative to their norm


def check_model(
    model: Model,
    variables: Variables,
    encoded: Sequence[Encoded],
    *,
    layouts: str | Sequence[str] = LAYOUTS,
    tolerance: float | None = None,
    gradients: bool = True,
) -> dict[str, Agreement]:
    """Test that a model of your own gives the same results for plain, shared and packed rows: {layout: Agreement} if so.

    First, tokens are changed in places that a given token must not see: padding, other rows, outside `[k_start, k_end)`. Its
    hidden state must not change. Then log-probabilities and gradients of `layouts` are compared with those of plain rows.
    It does not know the sizes of your tables, so it passes a model that clamps positions beyond them.

    Args:
      encoded: two or more pairs of your data; eight are enough. All their rows are in memory at once.
      layouts: those of "plain", "shared" and "packed" that you intend to use. A plain causal model passes with ("plain",).
      tolerance: relative error of log-probabilities; None: 2e-5 for float32 hidden states, 2e-2 for bfloat16 or float16. In
        16 bits the effect of a wrong mask can be smaller than that, so check in float32.
      gradients: also compare gradients, which takes the memory of two copies of the parameters.

    Raises `WrongModel`, a ValueError, naming each layout that is wrong, by how much, and the likely cause.

    >>> check_model(model, variables, encoded, gradients=False)["packed"].nats < 1e-3
    True
    >>> def causal(variables, rows):  # a model that knows nothing of intervals
    ...     index = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1]), rows.tokens.shape)
    ...     return forward(variables, rows.replace(k_start=0 * index, k_end=index + 1))
    >>> check_model(model._replace(forward=causal), variables, encoded, layouts=["shared"], gradients=False)
    Traceback (most recent call last):
    ...
    dpo_jax.checks.model.WrongModel: ...
    """
    check_pairs(encoded)
    layouts = (layouts,) if isinstance(layouts, str) else layouts
    if len(encoded) < 2 or not {*layouts} <= {*LAYOUTS}:
        raise ValueError(f"give two pairs or more, and layouts of {', '.join(LAYOUTS)}; got {len(encoded)} and {list(layouts)}")
    rows = {name: _rows(encoded, name) for name in dict.fromkeys(("plain", *layouts))}
    # By default an accelerator would multiply float32 coarsely, and differently for each shape.
    with jax.default_matmul_precision("highest"):
        dtype = _check_shapes(model, variables, rows["plain"])
        share = tolerance if tolerance is not None else 2e-5 if jnp.finfo(dtype).bits >= 32 else 2e-2
        forward, measure = jax.jit(model.forward), _measurer(model, gradients=gradients)
        plain, agreements, causes = None, {}, {}
        for name, laid_out in rows.items():
            try:
                leaks, measured = _leaks(forward, variables, laid_out), measure(variables, laid_out)
                plain = plain or measured
                agreements[name] = _agreement(measured, plain)
                allowed = share * float(np.abs(plain[0]).max()), 50 * share
                causes[name] = _causes(forward, variables, laid_out, agreements[name], leaks=leaks, allowed=allowed)
            except Exception as error:
                error.add_note(f"check_model failed on {name} rows, tokens[R, L] = {laid_out.tokens.shape}")
                raise
    if any(causes.values()):
        raise WrongModel(_message(causes, agreements))
    return {name: agreements[name] for name in layouts}


def _rows(encoded: Sequence[Encoded], layout: str) -> Rows:
    if layout == "plain":
        text = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in encoded)
        return plain_rows(encoded, length=text + MARGIN)
    both = max(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in encoded)
    if layout == "shared":
        return shared_rows(encoded, length=both + MARGIN)
    return packed_rows(encoded, length=2 * both + MARGIN, pairs_per_row=len(encoded))


def _check_shapes(model: Model, variables: Variables, rows: Rows) -> Any:
    """The type of the hidden states, after checking the results of the two functions."""
    hidden = jax.eval_shape(model.forward, variables, rows)
    shape = tuple(getattr(hidden, "shape", ()))  # a tuple of outputs has none
    if len(shape) != 3 or shape[:2] != rows.tokens.shape:
        found = shape if hasattr(hidden, "shape") else type(hidden).__name__
        raise WrongModel(f"forward returns {found} for rows of {rows.tokens.shape} tokens: hidden[R, L, D] is expected")
    logits = jax.eval_shape(model.unembed, variables, hidden)
    largest = int(rows.tokens.max())
    if logits.shape[:2] != rows.tokens.shape or logits.ndim != 3 or logits.shape[-1] <= largest:
        raise WrongModel(
            f"unembed returns {logits.shape} for hidden states {hidden.shape}: [R, L, V] is expected, and the largest token id "
            f"is {largest}"
        )
    return hidden.dtype


def _leaks(forward: Callable[..., jax.Array], variables: Variables, rows: Rows) -> list[str]:
    """A description of tokens seen that must not be; empty if there are none."""
    x, k_start, k_end = np.arange(rows.tokens.shape[1]), np.asarray(rows.k_start), np.asarray(rows.k_end)
    padding = np.asarray((k_start == x) & (k_end == x + 1) & (rows.positions == 0) & (rows.tokens == 0))
    before = np.asarray(forward(variables, rows), np.float32)
    scale = np.abs(before[~padding]).max()  # a model's output at padding is meaningless
    if not np.isfinite(scale):
        return ["hidden states are NaN or infinite"]
    rng = np.random.default_rng(0)
    somewhere = ~padding & (rng.random(rows.tokens.shape) < 0.2)
    first = np.zeros_like(padding)
    first[0] = True
    causes = []
    for changed, cause in (
        (padding, "padding is seen: tokens attend to positions outside of [k_start, k_end)"),
        (first & ~padding, "rows of a batch influence each other"),
        (somewhere, "tokens see others outside of [k_start, k_end): later ones, the other completion, or another pair"),
    ):
        moved = np.abs(np.asarray(forward(variables, _with_other_tokens(rows, changed)), np.float32) - before).max(axis=-1)
        # Tokens that see a changed token may change; visibility is transitive in every layout, so no others may.
        total = np.pad(np.cumsum(changed, axis=1), ((0, 0), (1, 0)))
        sees = np.take_along_axis(total, k_end, axis=1) > np.take_along_axis(total, k_start, axis=1)
        if (moved > 1e-5 * scale)[~sees & ~padding].any():
            causes.append(cause)
    return causes


def _with_other_tokens(rows: Rows, changed: np.ndarray) -> Rows:
    """`rows` with another token of the same texts wherever `changed`."""
    known = np.unique(rows.tokens)
    other = known[(np.searchsorted(known, rows.tokens) + 1) % len(known)]
    return rows.replace(tokens=np.where(changed, other, rows.tokens).astype(np.int32))


def _measurer(model: Model, *, gradients: bool) -> Callable[[Variables, Rows], tuple[np.ndarray, Any]]:
    """A function of (variables, rows): log-probabilities [P, 2] in the order of the caller, and gradients of a sum of them."""

    def total(variables: Variables, rows: Rows) -> tuple[jax.Array, jax.Array]:
        logps = completion_logps(model, variables, rows)
        # Chosen minus rejected, as in DPO, with a different weight for each pair, so that a swap would show.
        weight = jnp.where(rows.weight > 0, 1 + 0.1 * jnp.asarray(rows.index, jnp.float32), 0)
        return ((logps[:, 0] - logps[:, 1]) * weight.astype(logps.dtype)).sum(), logps

    differentiate = jax.jit(jax.grad(total, has_aux=True) if gradients else lambda *given: (None, total(*given)[1]))

    def measure(variables: Variables, rows: Rows) -> tuple[np.ndarray, Any]:
        found, logps = jax.device_get(differentiate(variables, rows))
        ordered = np.empty((int((rows.index >= 0).sum()), 2), np.float64)
        ordered[rows.index[rows.index >= 0]] = logps[rows.index >= 0]
        return ordered, found

    return measure


def _agreement(found: tuple[np.ndarray, Any], plain: tuple[np.ndarray, Any]) -> Agreement:
    nats = float(np.abs(found[0] - plain[0]).max())
    if plain[1] is None:
        return Agreement(nats, None)
    mine, theirs = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(x[1])]) for x in (found, plain)
    )
    return Agreement(nats, float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-30)))


def _causes(
    forward: Callable[..., jax.Array],
    variables: Variables,
    rows: Rows,
    found: Agreement,
    *,
    leaks: list[str],
    allowed: tuple[float, float],
) -> list[str]:
    """Why a layout is wrong: it leaks, or differs from plain rows by more than `allowed` (nats, relative gradient error)."""
    agrees = found.nats <= allowed[0]  # NaN does not
    if agrees and not leaks:
        right = found.gradients is None or found.gradients <= allowed[1]
        return [] if right else ["the gradients are wrong, the log-probabilities right: look at custom_vjp, and at jnp.where"]
    if agrees:
        return leaks
    x = np.broadcast_to(np.arange(rows.tokens.shape[1], dtype=np.int32), rows.tokens.shape)
    before = forward(variables, rows)
    ignored = [
        f"forward ignores {name}"
        for name, other in (
            (
                "k_start and k_end: use plain_rows, or let each token see the keys k_start <= k < k_end only",
                {"k_start": np.zeros_like(x), "k_end": x + 1},
            ),
            ("positions: take position embeddings from rows.positions, not from the place in the row", {"positions": x}),
        )
        if np.array_equal(before, forward(variables, rows.replace(**other)))
    ]
    return ignored or leaks or ["no cause found: compare forward with the example in the README"]


def _message(causes: dict[str, list[str]], agreements: dict[str, Agreement]) -> str:
    lines = []
    for name, found in causes.items():
        nats, gradients = agreements[name]
        off = "" if name == "plain" else f": log-probabilities differ from plain rows by up to {nats:.2g} nats"
        off += "" if name == "plain" or gradients is None else f", gradients by {gradients:.1%}"
        lines += [f"  {name} rows are {'wrong' if found else 'right'}{off}", *(f"    {cause}" for cause in found)]
    return "\n".join(["the model does not read every layout right", *lines])
