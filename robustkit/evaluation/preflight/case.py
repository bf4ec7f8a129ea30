"""What the checks look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.errors import DataError
from robustkit.core.strategy import Subject, ThreatModel
from robustkit.evaluation.evaluate import check_model, fixed_part
from robustkit.evaluation.logits import judging
from robustkit.evaluation.sources import OwnImages, check_labels, source_of

FEW, SLOW = 32, 0.1
"""Images that a model is tried on; a quarter of them where the forward of one takes so many seconds."""


@attrs.frozen
class Sample:
    """A few images with labels, and what is known of the rest."""

    x: Tensor  # (B, C, H, W)
    y: Tensor  # (B,)
    low: float  # of all pixels that are at hand
    high: float
    labels: Tensor  # of all images, where they are at hand, else of the few
    total: int  # images


@attrs.frozen(kw_only=True)
class Case(Sample):
    """A sample, and the model as measures see it."""

    subject: Subject
    module: nn.Module
    logits: Tensor  # (B, K), of x
    classes: int | None = None  # of the data, where known
    batch_size: int = 128
    trained: bool = True


def sample_of(images: Any, labels: Any = None, rows: Tensor | None = None) -> Sample:
    """Of what `evaluate` takes, or some `rows` of it; tensors as they are, so that a fault becomes a finding."""
    if labels is None:
        source = source_of(images)
        rows = torch.arange(len(source)) if rows is None else rows
        x, y = source.rows(rows[fixed_part(len(rows), FEW)])
        known = images.labels[rows] if isinstance(source, OwnImages) else y
        return Sample(x, y, float(x.min()), float(x.max()), known, len(rows))
    pixels, known = torch.as_tensor(images).detach(), torch.as_tensor(labels).detach()
    if pixels.ndim != 4 or len(pixels) == 0:
        raise DataError(f"must be (N, C, H, W), N >= 1, got {tuple(pixels.shape)}", place="images")
    check_labels(known, len(pixels))
    rows = fixed_part(len(pixels), FEW)
    x, y = pixels[rows.to(pixels.device)].float(), known[rows.to(known.device)].long()
    return Sample(x, y, float(pixels.min()), float(pixels.max()), known, len(pixels))


def case_of(stack: ExitStack, module: nn.Module, threat: ThreatModel, sample: Sample, **known: Any) -> Case:
    """The sample before a model, judged until `stack` ends; fewer images where it is slow. DataError: no logits."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    x, y = sample.x.to(device), sample.y.to(device)
    subject = stack.enter_context(judging(module, threat, x[:2]))
    part = x[: FEW // 4]
    check_model(subject, part)
    if seconds(subject.logits, part) < SLOW * len(part):
        part = x
        check_model(subject, part)
    known |= attrs.asdict(sample, recurse=False) | {"x": part, "y": y[: len(part)]}
    return Case(subject=subject, module=module, logits=subject.logits(part), **known)


def few(x: Tensor) -> Tensor:
    """A quarter of the images, but four where there are so many: for what costs more than a forward."""
    return x[: max(4, len(x) // 4)]


def slope(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The gradient of a value (B,) with respect to the images; None where they are not connected."""
    with torch.enable_grad():
        images = x.detach().clone().requires_grad_()
        result = value(images)
        return torch.autograd.grad(result.sum(), images, allow_unused=True)[0] if result.requires_grad else None


def seconds(work: Callable[[Tensor], object], x: Tensor) -> float:
    """That `work` on the images takes, until the device has done it."""
    began = time.perf_counter()
    work(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
