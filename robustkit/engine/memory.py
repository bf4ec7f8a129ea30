"""Memory that is freed is kept for the next step.

A step on a CPU takes and frees the same large blocks again and again. The C library gives such blocks back to the
system at once, and each time they are taken anew the system clears every page of them: often a third of the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_KEEP = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: -1}  # larger blocks are still the system's; give nothing back
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # what glibc settles on in a process with large blocks

_depth = 0


@contextmanager
def keeping_memory(wanted: bool = True) -> Iterator[None]:
    """Inside, the process keeps the memory that it frees; on leaving, it is given back to the system.

    A matter of glibc's allocator: under another one, and on other systems, nothing happens. With `wanted` false,
    memory is treated as usual inside, whatever is around it.
    """
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    before, _depth = _depth, _depth + 1 if wanted else 0
    _set(library, before > 0, _depth > 0)
    try:
        yield
    finally:
        _set(library, _depth > 0, before > 0)
        _depth = before


def _set(library: ctypes.CDLL, before: bool, now: bool) -> None:
    if before == now:
        return
    for name, value in (_KEEP if now else _USUAL).items():
        library.mallopt(name, value)
    if not now:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  others have no such function
    except (OSError, AttributeError, TypeError):
        return None
    return library
