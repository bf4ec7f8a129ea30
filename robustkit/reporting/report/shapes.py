"""Whether JSON data look as they should: files of a run may be half written, damaged, or of another time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

LARGEST = 1e100


@attrs.frozen
class Maybe:
    """Of a key in an object: it may be absent."""

    shape: Any


@attrs.frozen
class Each:
    """An object all of whose values have that shape."""

    shape: Any


def number(data: Any) -> bool:
    return isinstance(data, (int, float)) and not isinstance(data, bool) and abs(data) < LARGEST


def amount(data: Any) -> bool:
    """A number of at least 0."""
    return number(data) and data >= 0


def positive(data: Any) -> bool:
    return number(data) and data > 0


def share(data: Any) -> bool:
    """A number in [0, 1]."""
    return number(data) and 0 <= data <= 1


def count(data: Any) -> bool:
    """A whole number of at least 0."""
    return isinstance(data, int) and not isinstance(data, bool) and 0 <= data < LARGEST


def counted(data: Any) -> bool:
    """A whole number of at least 1."""
    return count(data) and data > 0


def text(data: Any) -> bool:
    return isinstance(data, str)


def bits(data: Any) -> bool:
    """Text of 0 and 1."""
    return isinstance(data, str) and set(data) <= {"0", "1"}


def fits(data: Any, shape: Any) -> bool:
    """Whether `data` have that shape: a predicate of this module, [shape] for a list of any length, (shape, shape) for
    one of that length, {key: shape} for an object with at least those keys, Each(shape) for one with any keys.
    """
    if isinstance(shape, list):
        return isinstance(data, list) and all(fits(item, shape[0]) for item in data)
    if isinstance(shape, tuple):
        return isinstance(data, list) and len(data) == len(shape) and all(map(fits, data, shape))
    if isinstance(shape, Each):
        return isinstance(data, dict) and all(fits(value, shape.shape) for value in data.values())
    if isinstance(shape, dict):
        return isinstance(data, dict) and all(_has(data, key, inner) for key, inner in shape.items())
    predicate: Callable[[Any], bool] = shape
    return predicate(data)


def _has(data: dict[str, Any], key: str, shape: Any) -> bool:
    if isinstance(shape, Maybe):
        return data.get(key) is None or fits(data[key], shape.shape)
    return key in data and fits(data[key], shape)
