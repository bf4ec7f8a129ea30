"""A step whose objective or gradient is NaN or infinite: noticed, described, set aside.

On a GPU nobody waits for the numbers of a step: they are copied while the next step runs, and looked at when that one
is on its way. So a fault is noticed one step late there, but always before a checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from robustkit.core.batch import Batch, Part, Progress
from robustkit.core.world import World

ROWS = 5
"""So many rows are named in a line."""


class Piece(NamedTuple):
    """What a fault in a piece of the batch is described by."""

    part: Part
    batch: Batch
    x_adv: Tensor  # (B, C, H, W)
    epsilon: Tensor  # (B,)
    logits: dict[str, Tensor]  # of each view, (B, K)
    terms: dict[str, Tensor]  # means over the piece
    objective: Tensor  # their sum, as a share of the global batch's


class Size(NamedTuple):
    """Of a step, over all processes and pieces."""

    objective: Tensor
    norm: Tensor  # of the whole gradient
    norms: Tensor  # (P,) of each parameter's
    parameters: list[Tensor]


@attrs.frozen(eq=False)
class Evidence:
    """Of one step, in this process."""

    progress: Progress
    lr: float
    pieces: list[Piece]
    size: Size


class Fault(Exception):
    """A step's objective or gradient is not a finite number. Raised in all processes at once."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.progress = evidence.progress
        self.number = evidence.progress.step + 1  # of the step, counted from 1
        super().__init__(f"not a finite number in step {self.number}")


class Watch:
    """Raises Fault for a step whose numbers are not finite: at once, or on a GPU while the next step runs.

    With `at_once` a GPU is waited for in every step, too. A gradient so large that its norm is no float32 is a fault.
    """

    def __init__(self, device: torch.device, *, at_once: bool = False) -> None:
        self._later = device.type == "cuda" and not at_once
        self._pending: tuple[Evidence, Tensor, torch.cuda.Event] | None = None

    def see(self, evidence: Evidence) -> None:
        """Takes note of a step that was made, or is on its way."""
        numbers = torch.stack([evidence.size.objective, evidence.size.norm])
        if not self._later:
            _judge(evidence, numbers.cpu())
            return
        copied = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.settle()  # the step before, which the device has done, or nearly
        self._pending = evidence, copied, event

    def settle(self) -> None:
        """Looks at what has not been looked at yet; must be called before anything is kept."""
        pending, self._pending = self._pending, None
        if pending is not None:
            evidence, copied, event = pending
            event.synchronize()
            _judge(evidence, copied)


def _judge(evidence: Evidence, numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise Fault(evidence)


class Report(NamedTuple):
    """What is known of a fault: a line, the batch, and facts (JSON)."""

    line: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def describe(fault: Fault, names: Mapping[Any, str], world: World) -> Report:
    """Of all processes, which must all ask; `names` of the parameters."""
    evidence, pieces = fault.evidence, fault.evidence.pieces

    def gathered(values: list[Tensor]) -> Tensor:
        return world.gather_rows(torch.cat(values)).cpu()

    tensors = {
        "rows": gathered([piece.batch.index for piece in pieces]),
        "labels": gathered([piece.batch.y for piece in pieces]),
        "images": gathered([piece.batch.x for piece in pieces]),
        "adversarial": gathered([piece.x_adv for piece in pieces]),
        "epsilon": gathered([piece.epsilon for piece in pieces]),
    }
    looked = {"images": tensors["images"], "adversarial images": tensors["adversarial"]}
    for view in pieces[0].logits:
        looked[f"logits of {view}"] = gathered([piece.logits[view] for piece in pieces])
    broken = {what: _broken(values, tensors["rows"]) for what, values in looked.items()}
    terms = {name: _summed([_share(p) * p.terms[name] for p in pieces], world) for name in pieces[0].terms}
    size = evidence.size
    norms = {names[p]: norm for p, norm in zip(size.parameters, size.norms.tolist(), strict=True)}
    gradients = [name for name in names.values() if not math.isfinite(norms.get(name, 0.0))]
    radii = [float(tensors["epsilon"].min()), float(tensors["epsilon"].max())]
    facts = {
        "epoch": fault.progress.epoch + 1,
        "step": fault.number,
        "lr": evidence.lr,
        "objective": str(float(size.objective)),  # JSON knows neither NaN nor infinity
        "terms": {name: str(value) for name, value in terms.items()},
        "gradient": str(float(size.norm)),
        "gradients that are not finite": gradients,
        "gradients": len(norms),
        "rows that are not finite": {what: rows for what, rows in broken.items() if rows},
        "epsilon": radii,
    }
    return Report(_line(fault, terms, gradients, len(norms), broken, radii), tensors, facts)


def _line(
    fault: Fault,
    terms: dict[str, float],
    gradients: list[str],
    count: int,
    broken: dict[str, list[int]],
    radii: list[float],
) -> str:
    sick = [f"'{name}' is {value}" for name, value in terms.items() if not math.isfinite(value)]
    what = [f"term {', '.join(sick)}"] if sick else []
    if gradients:
        others = f" and {len(gradients) - 1} others" if len(gradients) > 1 else ""
        what.append(f"gradient of {gradients[0]}{others} of {count}")
    if not what:
        finite = math.isfinite(float(fault.evidence.size.objective))
        what.append("the gradient's norm" if finite else "the objective")
    first = next((name for name, rows in broken.items() if rows), None)
    if first is not None:
        rows = broken[first]
        shown = ", ".join(map(str, rows[:ROWS])) + (f" and {len(rows) - ROWS} more" if len(rows) > ROWS else "")
        what.append(f"{first} of training row{'s' if len(rows) > 1 else ''} {shown}")
    return (
        f"not a finite number in epoch {fault.progress.epoch + 1}, step {fault.number}: {'; '.join(what)} "
        f"(learning rate {fault.evidence.lr:.4g}, radii {radii[0]:.4g} to {radii[1]:.4g}); "
        f"{_remedy(first, bool(sick))}"
    )


def _remedy(first: str | None, terms: bool) -> str:
    if first == "images":
        return "mend these images"
    if first == "adversarial images":
        return "the attack's gradient is not finite: precision.attack=fp32, or mend the attack"
    if first is not None:
        return "lower optimizer.lr, or optimizer.clip_norm=1; in bfloat16 also precision.outer=fp32"
    if terms:
        return "the logits are finite, the loss is not: look there for log, sqrt or a division at 0"
    return "lower optimizer.lr; or the loss has no gradient at this point: look there for sqrt or norm at 0"


def _broken(values: Tensor, rows: Tensor) -> list[int]:
    """Which training rows hold what is not finite."""
    return [int(row) for row in rows[~values.flatten(1).isfinite().all(dim=1)]]


def _share(piece: Piece) -> float:
    return len(piece.batch.y) / piece.part.total


def _summed(values: list[Tensor], world: World) -> float:
    return float(world.sum(torch.stack(values).sum()))
