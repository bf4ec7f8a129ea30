"""Mistakes of the user. Each becomes one line on standard error and exit code 2; anything else is our bug."""


class UserError(Exception):
    """A mistake that its maker can mend: the fault, the place, the remedy, in one line."""

    def __init__(self, fault: str, *, place: str = "", remedy: str = "") -> None:
        self.fault, self.place, self.remedy = fault, place, remedy
        text = f"{place}: {fault}" if place else fault
        super().__init__(f"{text}; {remedy}" if remedy else text)


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
