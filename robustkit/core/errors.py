"""Mistakes of the user. Each becomes one line on standard error and exit code 2; anything else is our bug."""

import re
from traceback import walk_tb


def visible(text: str) -> str:
    """`text` with what is no letter, mark, digit, sign or blank written as \\x1b or \\u202e.

    Names in files may hold what steers a terminal, turns its writing round, or cannot be written at all.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, those that turn the direction round, halves of characters."""


class UserError(Exception):
    """A mistake that its maker can mend: the fault, the place, the remedy, in one line."""

    def __init__(self, fault: str, *, place: str = "", remedy: str = "") -> None:
        self.fault, self.place, self.remedy = fault, place, remedy
        text = f"{place}: {fault}" if place else fault
        super().__init__(f"{text}; {remedy}" if remedy else text)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line of the cell, and no way through robustkit."""
        names = ((frame.f_globals.get("__name__"), line) for frame, line in walk_tb(self.__traceback__))
        line = next((f"line {line}: " for name, line in names if name == "__main__"), "")
        return [f"{type(self).__name__}: {line}{visible(str(self))}"]


class SpecError(UserError):
    """A setting has an unknown name, a wrong type or a value out of range."""


class RegistryError(UserError):
    """A strategy is unknown, claimed twice, or its plugin does not import."""


class RecipeError(UserError):
    """A recipe file is missing or broken, or its parts do not fit together."""


class DataError(UserError):
    """Data are missing, or are not what the recipe says."""


class LibraryError(UserError):
    """A library that is not always installed is missing, or cannot be imported."""


class CheckpointError(UserError):
    """A checkpoint is truncated, foreign, or belongs to another recipe."""


class DamagedError(CheckpointError):
    """A checkpoint is not there, is truncated, or is not what was written: another one may be whole."""


class StorageError(OSError):
    """The disk refuses: the fault, the place, the remedy, in one line. No mistake of the user's: exit code 1."""
