"""What was looked at, whether it is in order, what was found, and what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """One line. A remedy stands where there is something to do."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def told(error: BaseException) -> str:
    """'ImportError: no module named ...', in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
