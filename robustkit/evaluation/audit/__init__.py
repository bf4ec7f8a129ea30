"""Is a model's robustness real? The field's checklist against false robustness, as checks with evidence.

An attack that fails looks like a defence that works. What tells them apart has been written down (Athalye et al. 2018,
"Obfuscated gradients give a false sense of security"; Carlini et al. 2019, "On evaluating adversarial robustness";
Tramer et al. 2020, "On adaptive attacks"; Pintor et al. 2022, "Indicators of attack failure"): here it is executed.
A failure says that gradient attacks, PGD above all, do not measure this model. It says nothing against a model that is
not robust and shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
from torch import nn

from robustkit.core.device import device_of
from robustkit.core.errors import DataError
from robustkit.core.rng import derive
from robustkit.core.spec import to_json
from robustkit.core.strategy import ThreatModel
from robustkit.evaluation.audit.case import Case, Detector
from robustkit.evaluation.audit.conduct import determinism, independence
from robustkit.evaluation.audit.gradients import gradient_correctness, landscape, saturation, zero_gradients
from robustkit.evaluation.audit.others import by_scores, detector, minimum_norm, smoothing, transfer
from robustkit.evaluation.audit.strength import epsilon, losses, noise, restarts, steps, unbounded
from robustkit.evaluation.evaluate import PROBE, check_model, fixed_part
from robustkit.evaluation.findings import Finding, worst
from robustkit.evaluation.logits import judging
from robustkit.evaluation.sources import check_labels, source_of
from robustkit.reporting import notebook
from robustkit.threats.linf import Linf

__all__ = ["CHECKS", "Audit", "Case", "Check", "Detector", "Finding", "Judgement", "Watch", "audit"]

Check = Callable[[Case], Finding]
"""A function of the case alone."""

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "determinism": determinism,
        "batch independence": independence,
        "zero gradients": zero_gradients,
        "saturation": saturation,
        "gradient correctness": gradient_correctness,
        "loss landscape": landscape,
        "steps": steps,
        "epsilon": epsilon,
        "unbounded": unbounded,
        "restarts": restarts,
        "noise": noise,
        "losses": losses,
        "smoothing": smoothing,
        "minimum norm": minimum_norm,
        "transfer": transfer,
        "by scores": by_scores,
        "detector": detector,
    }
)
"""All checks, by name, in the order in which they run."""

FEWEST = 10
"""Images that the model must get right for an audit to mean anything."""

Judgement = Literal["trustworthy", "suspicious", "false robustness"]
Watch = Callable[[str, int, int], None]
"""Told the name of a check before it begins, its number from 0, and how many there are."""


@attrs.frozen(kw_only=True)
class Audit:
    """What an audit found, in the order of its checks; of `images` the model got `right` right."""

    findings: tuple[Finding, ...]
    threat: ThreatModel
    images: int
    right: int
    seed: int

    @property
    def verdict(self) -> Judgement:
        """Do gradient attacks measure this model? Any failure says no, any warning makes it doubtful."""
        found = worst(self.findings)
        return "false robustness" if found == "failure" else "suspicious" if found == "warning" else "trustworthy"

    def __getitem__(self, check: str) -> Finding:
        return {finding.check: finding for finding in self.findings}[check]

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "images": self.images,
            "right": self.right,
            "seed": self.seed,
            "threat": to_json(self.threat),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def __str__(self) -> str:
        width = max(len(finding.check) for finding in self.findings)
        lines = [f"{finding.verdict:8} {finding.check:{width}}  {finding.evidence}" for finding in self.findings]
        return "\n".join([*lines, self.verdict])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from robustkit.reporting.audits import audit_as_html

        return audit_as_html(self)


def audit(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    threat: ThreatModel | None = None,
    limit: int | None = 100,
    seed: int = 0,
    surrogate: nn.Module | None = None,
    detector: Detector | None = None,
    checks: Mapping[str, Check] = CHECKS,
    device: torch.device | str | None = None,
    watch: Watch | None = None,
) -> Audit:
    """Holds any module that maps images in [0, 1] to logits against the checklist.

    Args:
        model: maps (B, C, H, W) to logits (B, K), or to an Output. It stays as found.
        images: as `robustkit.evaluation.evaluate` takes them.
        labels: likewise.
        threat: the ball that attacks may move in; None: `Linf(epsilon=8/255)`.
        limit: take a fixed random part of so many images; they are forwarded in one batch.
        surrogate: another model for the same images, whose adversarial images are tried on this one.
        detector: the model's reject option, to be attacked along with it.
        checks: some of `CHECKS`, or your own.
        device: where to work; None: where the model is.
        watch: told of each check before it begins; None: in a notebook a bar in the cell.

    Raises:
        DataError: images or labels are not as above, or the model gets hardly any of them right.
        UserError: there is no such device.
    """
    threat = Linf() if threat is None else threat
    source = source_of(images, labels)
    rows = fixed_part(len(source), limit)
    where = _home(model) if device is None else device_of(device)
    x, y = (part.to(where) for part in source.rows(rows))
    came_training = model.training
    with ExitStack() as stack:
        stack.enter_context(_repeatable(where, seed))
        subject = stack.enter_context(judging(stack.enter_context(_moved(model, where)), threat, x[:PROBE]))
        classes = check_model(subject, x[:PROBE])
        check_labels(y, len(y), classes, rows)
        other = None
        if surrogate is not None:
            judged = stack.enter_context(judging(stack.enter_context(_moved(surrogate, where)), threat, x[:PROBE]))
            other = judged.logits
            if check_model(judged, x[:PROBE]) != classes:
                raise DataError(f"does not have the model's {classes} logits", place="surrogate")
        case = Case(subject, x, y, len(x), seed, came_training, other, detector)
        right = ~case.broken(x)
        if int(right.sum()) < FEWEST:
            raise DataError(
                f"gets {int(right.sum())} of {len(x)} images right, too few to attack",
                place="model",
                remedy="are labels and classes in the same order, and is normalisation inside the model?",
            )
        case = attrs.evolve(case, x=x[right], y=y[right])
        findings = []
        watch = stack.enter_context(notebook.auditing(watch))
        for number, (name, check) in enumerate(checks.items()):
            if watch is not None:
                watch(name, number, len(checks))
            findings.append(check(case))
    return Audit(findings=tuple(findings), threat=threat, images=len(x), right=len(case), seed=seed)


def _home(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The model on `device`, afterwards where it was."""
    home = _home(model)
    try:
        yield model.to(device)
    finally:
        model.to(home)


@contextmanager
def _repeatable(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's own generators, which randomised models draw from, begin with `seed` and are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "audit"))
        yield
