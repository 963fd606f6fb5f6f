"""Partial training: a model of which only the last layers, or parameters matching a pattern, are trained.

`partial_model` moves the trained parameters into a separate collection, `{"params": frozen, "trained": trained}`. Freeze the
first (`step.init_state(..., frozen=...)`): gradients and optimizer state then exist for the second alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.checkpoint_stream import path_of
from dpo_jax.models.targets import Chosen as Chosen
from dpo_jax.models.targets import chosen_names
from dpo_jax.types import Model, Variables, init_shapes

TRAINED = "trained"
Tree = dict[str, Any]


def chosen_parameters(text: str, model: Model) -> Chosen:
    """The parameters of `model` named in `text`, as `targets.chosen_names` reads it. Raises ValueError as that does.

    >>> chosen_parameters("last_layer,final_norm.*", decoder)
    Chosen(names=frozenset({'final_norm.scale'}), layers=1)
    """
    shapes = init_shapes(model)["params"]
    every = {".".join(path_of(path)): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    depth = next(shape[0] for name, shape in every.items() if name.startswith("layers."))
    return chosen_names(text, list(every), layers=depth)


def partial_model(model: Model, chosen: Chosen) -> Model:
    """`model` for variables as `split` returns them. It also accepts variables of the whole model."""
    decode, rounded, by_layer, route, names = model.decode, model.rounded, model.by_layer, model.route, model.axes

    def of_axes() -> Variables:
        assert names is not None
        return split(names(), chosen, cut=lambda spec, _: spec)

    def decoded(variables: Variables, rows: Any, cache: Any) -> Any:
        assert decode is not None
        return decode(join(variables), rows, cache)

    return model._replace(
        init=lambda key: split(model.init(key), chosen),
        forward=lambda variables, rows: model.forward(_in_stacks(variables), rows),
        unembed=lambda variables, hidden: model.unembed(_in_stacks(variables), hidden),
        decode=None if decode is None else decoded,
        rounded=None if rounded is None else lambda variables: rounded(join(variables)),
        by_layer=None if by_layer is None else lambda variables, cache: by_layer(join(variables), cache),
        route=None if route is None else lambda variables, rows: route(_in_stacks(variables), rows),
        axes=None if names is None else of_axes,
    )


def split(
    variables: Variables, chosen: Chosen, *, cut: Callable[[Any, slice], Any] = lambda leaf, part: leaf[part]
) -> Variables:
    """`variables` of the whole model, with the trained ones in the collection "trained"; for `layers`, the last ones."""
    if TRAINED in variables:
        return variables
    frozen, trained = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        keys = path_of(path)
        if ".".join(keys) in chosen.names:
            trained[keys] = leaf
        elif chosen.layers and keys[0] == "layers":
            frozen[keys], trained[keys] = cut(leaf, slice(None, -chosen.layers)), cut(leaf, slice(-chosen.layers, None))
        else:
            frozen[keys] = leaf
    return {**variables, "params": _tree(frozen), TRAINED: _tree(trained)}


def join(variables: Variables) -> Variables:
    """The inverse of `split`: variables of the whole model; unchanged if they were not split."""
    if TRAINED not in variables:
        return variables

    def both(frozen: Any, trained: Any) -> Any:
        if isinstance(frozen, Mapping):
            return _united(frozen, trained, both)
        arrays = np if isinstance(frozen, np.ndarray) else jnp
        return arrays.concatenate([frozen, trained])

    whole = _united(variables["params"], variables[TRAINED], both)
    return {**{name: tree for name, tree in variables.items() if name != TRAINED}, "params": whole}


def _in_stacks(variables: Variables) -> Variables:
    """Like `join`, but frozen and trained layers stay two stacks, which the decoder runs through without a copy."""

    def both(frozen: Any, trained: Any, name: str = "") -> Any:
        return (frozen, trained) if name == "layers" and _same_tree(frozen, trained) else _united(frozen, trained, both)

    if TRAINED not in variables:
        return variables
    params, trained = variables["params"], variables[TRAINED]
    whole = {name: tree for name, tree in variables.items() if name != TRAINED}
    top = {name: params.get(name, trained.get(name)) for name in {**params, **trained}}
    for name in params.keys() & trained.keys():
        top[name] = both(params[name], trained[name], name)
    return {**whole, "params": top}


def _same_tree(one: Any, other: Any) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other)


def _united(one: Mapping[str, Any], other: Mapping[str, Any], both: Callable[[Any, Any], Any]) -> Tree:
    return {
        name: both(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
        for name in {**one, **other}
    }


def _tree(leaves: Mapping[tuple[str, ...], Any]) -> Tree:
    tree: Tree = {}
    for keys, leaf in leaves.items():
        here = tree
        for key in keys[:-1]:
            here = here.setdefault(key, {})
        here[keys[-1]] = leaf
    return tree
