"""Shape checks of JSON values: each record is checked once, where it is read.

A shape is `str`, `bool`, `int`, `float` (any number), `object` (anything), a tuple of alternatives such as `(float, None)`, a
list of one shape (an array of such elements) or of several (exactly these), or a dict: `{"name": shape}` is a required entry,
`{"name?": shape}` an optional one, and `{str: shape}` is for all other names. Without the latter, other names are unchecked, so
that a record of a later version fits.
"""

from __future__ import annotations

from typing import Any

from dpo_jax.untrusted import Unreadable, kind_of

Shape = Any
SHOWN = 60  # characters of a name
MOST = 2**53
"""Largest whole number accepted: a float does not hold larger ones exactly."""


def check_shape(value: Any, shape: Shape, where: str) -> Any:
    """`value`, if it has the shape. Raises `Unreadable` naming the first place that does not match."""
    if (wrong := misfit(value, shape)) is not None:
        place, what = wrong
        raise Unreadable(f"{where}: {place}: {what}" if place else f"{where}: {what}")
    return value


def misfit(value: Any, shape: Shape) -> tuple[str, str] | None:
    """(place, what is wrong there) of the first value that does not match its shape; None if all match."""
    if isinstance(shape, tuple):
        found = [misfit(value, one) for one in shape]
        return None if None in found else found[0]
    if isinstance(shape, dict):
        return _misfit_of_object(value, shape) if isinstance(value, dict) else _wrong("an object", value)
    if isinstance(shape, list):
        return _misfit_of_array(value, shape) if isinstance(value, list) else _wrong("an array", value)
    if shape is None:
        return None if value is None else _wrong("null", value)
    if shape is int and isinstance(value, int) and not isinstance(value, bool):
        return None if abs(value) <= MOST else ("", f"{str(value)[:20]}... is too large a number")
    known = {object: (object, ""), str: (str, "a string"), bool: (bool, "true or false"), int: (int, "a whole number")}
    kind, name = known.get(shape, ((int, float), "a number"))
    right = isinstance(value, kind) and (shape in (bool, object) or not isinstance(value, bool))
    return None if right else _wrong(name, value)


def _wrong(wanted: str, value: Any) -> tuple[str, str]:
    return "", f"expected {wanted}, got {kind_of(value)}"


def _misfit_of_object(value: dict[str, Any], shape: dict[Any, Shape]) -> tuple[str, str] | None:
    named = {name.removesuffix("?"): one for name, one in shape.items() if name is not str}
    for name in shape:
        if name is not str and not name.endswith("?") and name not in value:
            return "", f"has no {name!r}"
    for name, inner in value.items():
        one = named.get(name, shape.get(str, object))
        if (wrong := misfit(inner, one)) is not None:
            return _at(repr(name[:SHOWN]), wrong)
    return None


def _misfit_of_array(value: list[Any], shape: list[Shape]) -> tuple[str, str] | None:
    if len(shape) > 1 and len(value) != len(shape):
        return "", f"expected {len(shape)} elements, got {len(value)}"
    for number, inner in enumerate(value):
        if (wrong := misfit(inner, shape[number] if len(shape) > 1 else shape[0])) is not None:
            return _at(f"element {number}", wrong)
    return None


def _at(place: str, wrong: tuple[str, str]) -> tuple[str, str]:
    return (f"{place}, {wrong[0]}" if wrong[0] else place), wrong[1]
