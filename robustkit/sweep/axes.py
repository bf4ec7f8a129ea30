"""`loss.weight=1,2 seed=1,2,3 optimizer.lr=0.01..0.3:log`: overrides with the values that a setting goes through."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import attrs

from robustkit.core.errors import SpecError
from robustkit.core.override import literal

_WORD = re.compile(r"([\w-]+(?:\.[\w-]+)*)=(.*)", re.DOTALL)
_SPAN = re.compile(r"(.+?)\.\.(.+?)(:log)?")
_PLAIN = re.compile(r"[^\w.+-]+")
_CLOSES = {"(": ")", "[": "]", "'": "'", '"': '"'}
_LONGEST = 60  # characters of a value in a folder's name


@attrs.frozen
class Axis:
    """A setting and its values, as they stand on the command line; of a range, `values` are its ends."""

    path: str
    values: tuple[str, ...]
    scale: Literal["", "linear", "log"] = ""

    @property
    def varies(self) -> bool:
        return len(self.values) > 1


def is_word(text: str) -> bool:
    """Whether an argument changes a setting (`loss.weight=1`) rather than naming a file."""
    return _WORD.fullmatch(text) is not None


def axes_of(words: Sequence[str]) -> tuple[Axis, ...]:
    """The settings that `words` name, in their order.

    Raises:
        SpecError: a word is none, or one of its values is empty or stands there twice.
    """
    return tuple(_axis(word) for word in words)


def _axis(word: str) -> Axis:
    match = _WORD.fullmatch(word)
    if match is None:
        raise SpecError("a setting reads path=value,value,...", place=repr(word), remedy="e.g. loss.weight=1,2,3.5")
    path, text = match.groups()
    span = _SPAN.fullmatch(text)
    if span is not None and all(_is_number(end) for end in span.groups()[:2]):
        return Axis(path, (span[1], span[2]), "log" if span[3] else "linear")
    values = tuple(_split(text))
    for value in values:
        if not value:
            raise SpecError("one of its values is empty", place=word, remedy="leave out the comma, or give a value")
        if values.count(value) > 1:
            raise SpecError(f"'{value}' stands there twice", place=word, remedy="give each value once")
    return Axis(path, values)


def _is_number(text: str) -> bool:
    try:
        value = literal(text)
    except ValueError:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _split(text: str) -> Iterator[str]:
    """The parts between commas, but for commas in brackets or quotes."""
    start, open_ones = 0, ""
    for place, mark in enumerate(text):
        if open_ones and mark == _CLOSES[open_ones[-1]]:
            open_ones = open_ones[:-1]
        elif mark in _CLOSES and open_ones[-1:] not in ("'", '"'):
            open_ones += mark
        elif mark == "," and not open_ones:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def combinations(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    """A word for each axis, in every combination of values; the last axis moves first."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield tuple(f"{axis.path}={value}" for axis, value in zip(axes, values, strict=True))


def values_of(axes: Sequence[Axis], words: Sequence[str]) -> dict[str, str]:
    """{setting: value} of those that vary; `words` are a trial's, one for each axis."""
    return {axis.path: word.partition("=")[2] for axis, word in zip(axes, words, strict=True) if axis.varies}


def folder_name(values: dict[str, str]) -> str:
    """'loss.weight=2,seed=1', of characters that need no quoting."""
    return ",".join(f"{path}={_PLAIN.sub('_', _short(text))[:_LONGEST]}" for path, text in values.items())


def _short(text: str) -> str:
    """Drawn numbers have many digits: four are enough to know them by."""
    return f"{float(text):.4g}" if re.fullmatch(r"-?\d+\.\d{5,}(e-?\d+)?", text) else text
