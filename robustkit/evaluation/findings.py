"""What a check found: a verdict, its evidence, and what to do."""

from __future__ import annotations

from typing import Any, Literal

import attrs

Verdict = Literal["ok", "warning", "failure", "skipped"]

VERDICTS: tuple[Verdict, ...] = ("ok", "warning", "failure", "skipped")


@attrs.frozen(kw_only=True)
class Finding:
    """One check's result. `evidence` is one line with the numbers; `remedy` says what to do where it is not ok.

    `data` holds the same numbers for programs: JSON values only.
    """

    check: str
    verdict: Verdict
    evidence: str
    remedy: str = ""
    data: dict[str, Any] = attrs.field(factory=dict, eq=False)

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self)


def worst(findings: tuple[Finding, ...]) -> Verdict:
    """Failure before warning before ok; skipped where there is nothing else."""
    order: tuple[Verdict, ...] = ("failure", "warning", "ok", "skipped")
    return min((finding.verdict for finding in findings), key=order.index, default="skipped")


def finding(check: str, verdict: Verdict, evidence: str, remedy: str = "", /, **data: Any) -> Finding:
    """A finding whose remedy goes where nothing is wrong."""
    wrong = verdict in ("warning", "failure")
    return Finding(check=check, verdict=verdict, evidence=evidence, remedy=remedy if wrong else "", data=data)
