"""Losses by name, sums of losses, and the inputs a loss takes besides the two log-probabilities of each completion."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import loss_table, own_loss
from dpo_jax.loss_table import SIGNALS as SIGNALS
from dpo_jax.types import Array

PreferenceLoss = Callable[..., tuple[jax.Array, jax.Array]]
"""(logps[P, K], ref_logps[P, K], **signals) -> (losses[P], rewards[P, K]): a function of `dpo_jax.losses`, its options bound. K
is 2, or the length of a ranking. `signals` are its keyword arguments without a default, such as `lengths` (`SIGNALS`), and the
extra columns of the batch (`Rows.extras`)."""


def required_inputs(loss: Callable[..., Any], *, columns: Collection[str] = ()) -> frozenset[str]:
    """The `SIGNALS` that a loss takes: its keyword arguments of those names without a default, but for `columns` of the batch.

    ValueError if one has the default None and nobody gives it a value: it would stay None, without a word.

    >>> sorted(required_inputs(partial(length_normalized_loss, beta=5.0)))
    ['lengths']
    """
    parameters = inspect.signature(loss).parameters
    taken = {name: parameters[name].default for name in SIGNALS if name in parameters and name not in columns}
    if unset := sorted(name for name, default in taken.items() if default is None and name not in _bound(loss)):
        raise ValueError(
            f"{unset[0]}=None: the step supplies {unset[0]} to a loss only if that keyword has no default. Remove the default, "
            f"or bind a value: partial(loss, {unset[0]}=...)"
        )
    return frozenset(name for name, default in taken.items() if default is inspect.Parameter.empty)


def _bound(loss: Callable[..., Any]) -> set[str]:
    """The keywords to which `functools.partial` has bound values."""
    found: set[str] = set()
    while isinstance(loss, functools.partial):
        found, loss = found | {*loss.keywords}, loss.func
    return found


def named_loss(text: str, **options: Any) -> PreferenceLoss:
    """The loss with this name, or the weighted sum of several names, with `options` bound to the losses that read them.

    ValueError: an unknown name, an option that none of the losses reads, or a value out of range. `dpo_jax/losses/README.md`
    has the table.

    >>> loss = named_loss("dpo + 0.1*sft", beta=0.1)
    >>> losses, _ = loss(np.full((1, 2), -12.0), np.full((1, 2), -12.0), mean_lengths=np.full((1, 2), 4.0))
    >>> print(f"{losses[0]:.4f}")  # log(2) + 0.1 * 3
    0.9931
    """
    if unknown := sorted({*options} - {*loss_table.OPTIONS}):
        raise ValueError(f"{', '.join(unknown)}: unknown option; losses have {', '.join(loss_table.OPTIONS)}")
    values = {name: options.get(name, option.default) for name, option in loss_table.OPTIONS.items()}
    found = [f"{name}: {problem}" for name, problem in loss_table.problems(text, values)]
    if found := found or [*loss_table.own_problems(text)]:
        raise ValueError("\n".join(found))
    parts = []
    for term in loss_table.terms(text):
        bound = {name: values[name] for name in term.loss.options}
        parts.append((term.weight, functools.partial(_function(term.loss.function), **bound)))
    loss = parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else sum_of_losses(parts)
    return weighted_by_policy(loss) if values["wpo"] else loss


def _function(name: str) -> PreferenceLoss:
    if own_loss.is_own(name):
        return own_loss.load(name)
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"dpo_jax.losses.{module}"), function)


def sum_of_losses(parts: Sequence[tuple[float, PreferenceLoss]]) -> PreferenceLoss:
    """A weighted sum of losses, such as MPO's (Wang et al. 2024, arXiv 2411.10442). The rewards are those of the first.

    `parts` are (weight, loss). The sum takes the signals that its parts take, and each part those that it names, of the step
    or of the batch (`Rows.extras`). TypeError for one that no part names.

    >>> loss = sum_of_losses([(0.5, partial(dpo_loss, beta=0.1)), (2.0, partial(ipo_loss, beta=0.5))])
    >>> print(loss(np.zeros((1, 2)), np.zeros((1, 2)))[0])  # log(2) / 2 + 2
    [2.3465736]
    """

    def total(logps: Array, ref_logps: Array, **signals: Array) -> tuple[jax.Array, jax.Array]:
        read = [_read(loss, signals) for _, loss in parts]
        if unread := sorted({*signals}.difference(*read)):
            raise TypeError(f"none of these losses reads {', '.join(unread)}")
        found = [loss(logps, ref_logps, **part) for (_, loss), part in zip(parts, read, strict=True)]
        combined = functools.reduce(
            lambda sum, part: sum + part, (weight * losses for (weight, _), (losses, _) in zip(parts, found, strict=True))
        )
        return combined, found[0][1]

    return _with_keywords(total, [keyword for _, loss in parts for keyword in _keywords(loss)])


def weighted_by_policy(loss: PreferenceLoss) -> PreferenceLoss:
    """WPO: a loss with each pair weighted by how likely the policy is to generate it (Zhou et al. 2024, 2406.11827, eq. 2).

    The weight is the product of both completions' `exp(aligned_logps)`, without gradient. The loss gets all other signals.

    >>> loss = weighted_by_policy(partial(dpo_loss, beta=0.1))
    >>> print(loss(np.zeros((1, 2)), np.zeros((1, 2)), aligned_logps=np.log([[0.5, 0.5]]))[0])  # log(2) / 4
    [0.1732868]
    """
    also = "aligned_logps" in required_inputs(loss)

    def weighted(logps: Array, ref_logps: Array, *, aligned_logps: Array, **signals: Array) -> tuple[jax.Array, jax.Array]:
        signals |= {"aligned_logps": aligned_logps} if also else {}
        losses, rewards = loss(logps, ref_logps, **signals)
        weights = jnp.exp(jnp.asarray(aligned_logps).sum(axis=1))
        return losses * jax.lax.stop_gradient(weights), rewards

    own = inspect.Parameter("aligned_logps", inspect.Parameter.KEYWORD_ONLY)
    return _with_keywords(weighted, [*_keywords(loss), own])


def _keywords(loss: PreferenceLoss) -> list[inspect.Parameter]:
    return list(inspect.signature(loss).parameters.values())[2:]


def _read(loss: PreferenceLoss, signals: Mapping[str, Array]) -> dict[str, Array]:
    """The `signals` that a loss has keywords for."""
    keywords = _keywords(loss)
    every = any(keyword.kind is inspect.Parameter.VAR_KEYWORD for keyword in keywords)
    return {name: value for name, value in signals.items() if every or name in {keyword.name for keyword in keywords}}


def _with_keywords(loss: PreferenceLoss, keywords: Sequence[inspect.Parameter]) -> PreferenceLoss:
    """`loss` with a signature that has these keywords; one that is there twice has a default only if both have one."""
    found: dict[str, inspect.Parameter] = {}
    for keyword in keywords:
        if keyword.name not in found or keyword.default is inspect.Parameter.empty:
            found[keyword.name] = keyword.replace(kind=max(keyword.kind, inspect.Parameter.KEYWORD_ONLY))
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("logps", "ref_logps")]
    parameters += sorted(found.values(), key=lambda keyword: keyword.kind)  # **signals come last
    loss.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def whole_set_signals(
    loss: Callable[..., Any], lengths: Array | None, *, pairs: int, desirable: Array | None = None
) -> Mapping[str, Array]:
    """The signals that a loss takes, for a whole set of pairs at once, as in an evaluation.

    `lengths` is float[P, K]; `desirable` float[P] holds the labels of single completions. `aligned_logps` are 0: WPO's weights
    belong to training, and held-out pairs count alike.
    """
    names = required_inputs(loss)
    if "desirable" in names and desirable is None:
        raise ValueError("this loss needs labels: desirable [P], 1 or 0")
    if lengths is None:
        if missing := sorted(names & {"lengths", "mean_lengths"}):
            raise ValueError(f"this loss needs the completions' lengths for its {', '.join(missing)}")
        lengths = np.zeros((pairs, 2), np.float32)
    lengths = np.asarray(lengths, np.float32)
    mean = np.broadcast_to(lengths.mean(axis=0), lengths.shape)
    found = {"lengths": lengths, "mean_lengths": mean, "weight": np.ones(pairs, np.float32)}
    found["aligned_logps"] = np.zeros_like(lengths)
    found |= {} if desirable is None else {"desirable": np.asarray(desirable, np.float32)}
    return {name: found[name] for name in names}
