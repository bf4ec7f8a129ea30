"""What an evaluation found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import attrs

from robustkit.core.spec import to_json
from robustkit.core.strategy import ThreatModel
from robustkit.evaluation.findings import Finding


@attrs.frozen
class Result:
    """What one measure found: `accuracy` in [0, 1] over `n` images, its 95 % interval, and the seconds it took.

    `breakdown` is accuracy after each stage of the measure, `shares` are further shares of the images for each;
    `outcomes` has one entry for each row of `fixed_part`, and `images` is a fingerprint of those images in their order.
    Seconds of several processes are added up. `path` says how the model was forwarded.
    """

    key: str
    accuracy: float
    n: int
    ci95: tuple[float, float]
    seconds: float
    breakdown: dict[str, float]
    notes: tuple[str, ...]
    outcomes: list[bool] = attrs.field(repr=False)
    images: str = ""
    path: str = ""
    shares: dict[str, dict[str, float]] = attrs.field(factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry in results.json: without outcomes; breakdown, shares and notes only where there are any."""
        data: dict[str, Any] = {
            "accuracy": self.accuracy,
            "n": self.n,
            "ci95": list(self.ci95),
            "seconds": round(self.seconds, 3),
            "path": self.path,
        }
        if self.breakdown:
            data["breakdown"] = dict(self.breakdown)
        if self.shares:
            data["shares"] = {stage: dict(shares) for stage, shares in self.shares.items()}
        if self.notes:
            data["notes"] = list(self.notes)
        return data

    def outcomes_to_json(self) -> dict[str, str]:
        """The entry in outcomes.json."""
        return {"images": self.images, "right": "".join("1" if right else "0" for right in self.outcomes)}


@attrs.frozen(eq=False)
class Results(Mapping[str, Result]):
    """Results by key: `results["autoattack"].accuracy`. Printed, a table.

    `path` says how the model was forwarded; `findings` what was noticed on the way.
    """

    by_key: dict[str, Result]
    threat: ThreatModel
    seed: int = 0
    path: str = ""
    findings: tuple[Finding, ...] = ()

    def __getitem__(self, key: str) -> Result:
        return self.by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_key)

    def __len__(self) -> int:
        return len(self.by_key)

    def to_json(self) -> dict[str, Any]:
        return {
            "results": {key: result.to_json() for key, result in self.by_key.items()},
            "threat": to_json(self.threat),
            "seed": self.seed,
            "path": self.path,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def __str__(self) -> str:
        width = max(map(len, self.by_key), default=0)
        lines = []
        for key, result in self.by_key.items():
            low, high = result.ci95
            interval = f"{100 * result.accuracy:5.1f} %  ({100 * low:.1f} - {100 * high:.1f})"
            lines.append(f"{key:{width}}  {interval}  of {result.n} images")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from robustkit.reporting.tables import Column, results_as_html

        entries = {key: result.to_json() for key, result in self.by_key.items()}
        title = f"{self.threat.norm} {self.threat.epsilon:.4g}"
        others = [finding for finding in self.findings if finding.check not in self]  # notes of measures are there
        remarks = [f"{one.check}: {one.evidence}{f'; {one.remedy}' if one.remedy else ''}" for one in others]
        return results_as_html([Column("model", "as it is", entries)] if entries else [], title=title, remarks=remarks)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    middle = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return middle - half if successes > 0 else 0.0, middle + half if successes < n else 1.0


def fingerprint(digests: str) -> str:
    """One digest of the images' digests."""
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
