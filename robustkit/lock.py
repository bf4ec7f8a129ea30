"""One process at a time writes into a run's folder; reading it is free.

The lock is the operating system's, on a file `.lock` in the folder that says who holds it: it vanishes with its holder,
however that one ends. (filelock, which guards the trials of a sweep, is not used: where a file system has no locks, it
makes one of a file's being there, which outlives a process that is killed.)
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

from robustkit.core.errors import UserError
from robustkit.core.reading import read_object

if TYPE_CHECKING:
    from robustkit.core.world import World

NAME = ".lock"

PATIENCE = 0.3
"""Seconds after which a folder counts as in use: `holder` and a process that is just leaving take none of them."""

_told: set[int] = set()
"""File systems that were said to have no locks."""


class InUseError(UserError):
    """Another process writes into the run's folder."""


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the run's folder while something is written there.

    Things go on without a lock where none can be made, as the folder is read-only (writing will say so), and where the
    file system has none: this is said, once.

    Raises:
        InUseError: another process holds it, or another thread of this one.
    """
    path = folder / NAME
    descriptor = _take(path, say)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                if _is_at(path, descriptor):  # the folder may be another by now
                    path.unlink()
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


@contextmanager
def locked_by_first(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """`locked`, in the first of several processes, for all.

    Raises:
        InUseError: in every process.
    """
    with ExitStack() as stack:
        refused: InUseError | None = None
        if world.rank == 0:
            try:
                stack.enter_context(locked(folder, say))
            except InUseError as error:
                refused = error
        refused = world.share(refused)
        if refused is not None:
            raise refused
        yield


def holder(folder: Path) -> str:
    """Which process writes into the run's folder, in words; "" where none does."""
    path = folder / NAME
    if fcntl is None:
        return ""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _who(path)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


def _take(path: Path, say: Callable[[str], None]) -> int | None:
    """The lock's file, open and ours; None where there can be no lock."""
    if fcntl is None:
        _tell(path, "this system has none", say)
        return None
    until = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = _open(path)
        except OSError:
            return None
        late = time.monotonic() > until
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            if late:
                remedy = "wait until it has ended, or stop it"
                raise InUseError(f"is in use by {_who(path)}", place=str(path.parent), remedy=remedy) from error
        except OSError as error:
            os.close(descriptor)
            _tell(path, error.strerror or str(error), say)
            return None
        else:
            if late or _is_at(path, descriptor):
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps({"process": os.getpid(), "host": platform.node()}).encode(), 0)
                return descriptor
            os.close(descriptor)  # its holder has removed it: it is nobody's lock any more
        time.sleep(0.02)


def _open(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a stranger's folder may have anything there
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # of another user, in a folder that we share


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file is (still, or again) the one of that name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _who(path: Path) -> str:
    try:
        facts = read_object(path)
    except UserError:
        facts = {}
    process, host = facts.get("process"), facts.get("host")
    if type(process) is not int or not isinstance(host, str):
        return "another process"
    return f"process {process} on {host}"


def _tell(path: Path, why: str, say: Callable[[str], None]) -> None:
    system = os.stat(path.parent).st_dev
    if system not in _told:
        _told.add(system)
        say(f"{path.parent}: cannot be locked ({why}): see to it that no other process works on this run")
