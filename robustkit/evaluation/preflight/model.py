"""Checks of the model as a function: logits, labels in its order, modes, normalisation, the same answer twice."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import DataError
from robustkit.core.model import STATISTICS, Normalize
from robustkit.core.parts import Parts
from robustkit.engine.folding import close
from robustkit.evaluation.findings import Finding, finding
from robustkit.evaluation.logits import LogitsOf, is_right
from robustkit.evaluation.preflight.case import FEW, Case
from robustkit.evaluation.results import wilson
from robustkit.evaluation.sources import check_labels

PER_CLASS = 10
"""With so many images per class and more, a class without any is no accident."""
MEAN, STD = 2.0, (0.2, 5.0)
"""Normalised images have a mean within -MEAN..MEAN and a standard deviation within STD, or were meant for others."""
NORMALISED: dict[int, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    1: {"mnist": ((0.1307,), (0.3081,)), "-1..1": ((0.5,), (0.5,))},
    3: {"cifar10": STATISTICS["cifar10"], "imagenet": STATISTICS["imagenet"], "-1..1": STATISTICS["svhn"]},
}
"""Means and deviations that are common, for images of so many channels."""


def logits(case: Case) -> Finding:
    """No probabilities; what is no logits at all, `case_of` refuses."""
    low, high, classes = float(case.logits.min()), float(case.logits.max()), case.logits.shape[1]
    data = {"classes": classes, "low": low, "high": high}
    text = f"{classes} logits between {low:.3g} and {high:.3g}"
    if low >= 0 and high <= 1 and high - low > 0.5:
        remedy = "if the model ends in a sigmoid or a scaled softmax, take that off its end"
        return finding("logits", "warning", f"{text}, all within [0, 1]", remedy, **data)
    if high <= 0 and bool(((case.logits.exp().sum(dim=1) - 1).abs() < 1e-4).all()):
        text += ": log-probabilities, which serve as logits"
    return finding("logits", "ok", text, **data)


def labels(case: Case, name: str = "labels") -> Finding:
    """Labels that are classes of the model, and classes that have images."""
    count, known, classes = len(case.labels), case.logits.shape[1], case.classes
    present = torch.unique(case.labels).numel()
    data = {"images": count, "present": present, "logits": known, "classes": classes}
    try:
        check_labels(case.labels, count, known)
    except DataError as error:
        return finding(name, "failure", error.fault, error.remedy, **data)
    if classes is not None and classes != known:
        text = f"the model has {known} logits, the data have {classes} classes"
        remedy = "is it for these data, with classes in this order?"
        return finding(name, "failure" if known < classes else "warning", text, remedy, **data)
    text, remedy = f"{present} of {known} classes among the labels of {count} images", "are all images here?"
    missing = present < known and count >= PER_CLASS * known
    return finding(name, "warning" if missing else "ok", text, remedy, **data)


def modes(case: Case) -> Finding:
    """Nothing stays in training mode, and batch statistics are those of training."""
    stubborn = [name for name, part in case.module.named_modules() if part.training]
    norms: list[Any] = [part for part in case.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm for norm in norms if norm.running_mean is not None]
    fresh = [norm for norm in tracked if not norm.running_mean.any() and bool((norm.running_var == 1).all())]
    data = {"batch_norms": len(norms), "tracked": len(tracked), "unmoved": len(fresh)}
    if stubborn:
        text = f"'{stubborn[0] or 'the model'}' stays in training mode when it is told to evaluate"
        remedy = "if that is no randomised defence, let it follow train() and eval()"
    elif tracked and len(fresh) == len(tracked):
        text = f"the statistics of all {len(tracked)} batch normalisations are those of a fresh model"
        remedy = "is it trained, and were buffers loaded with the weights?"
    elif len(tracked) < len(norms):
        text = f"{len(norms) - len(tracked)} of {len(norms)} batch normalisations keep no statistics"
        remedy = "they use those of the batch: an image's logits depend on its neighbours"
    else:
        return finding("modes", "ok", "the model is judged in eval mode, in which all of it is", **data)
    return finding("modes", "warning", text, remedy, **data)


def normalisation(case: Case) -> Finding:
    """Normalised once, with statistics that suit the images, inside the model."""
    seen: list[tuple[str, Tensor, Tensor]] = []  # layers that normalise: what went in, what came out
    with ExitStack() as hooks:
        for name, part in case.module.named_modules():
            if "normali" in type(part).__name__.lower() and hasattr(part, "mean") and hasattr(part, "std"):
                note = partial(lambda name, _, given, made: seen.append((name, given[0], made)), name)
                hooks.enter_context(part.register_forward_hook(note))
        LogitsOf(case.module)(case.x)  # the module itself, not a faster twin of it
    text, data = "no layer that normalises was found, none is missed", {}
    for name, given, made in seen:
        low, high, mean, std = (float(value) for value in (given.min(), given.max(), made.mean(), made.std()))
        data = {"low": low, "high": high, "mean": mean, "std": std}
        if low < -0.01 or high > 1.01:
            text = f"'{name}' gets pixels from {low:.3g} to {high:.3g}: they are normalised already"
            return finding("normalisation", "warning", text, "normalise once, inside the model", **data)
        text = f"'{name}' brings the images to mean {mean:.2g}, standard deviation {std:.2g}"
        if abs(mean) > MEAN or not STD[0] <= std <= STD[1]:
            remedy = "are its statistics those of images in [0, 1], and of these data?"
            return finding("normalisation", "warning", text, remedy, **data)
    right, n = int(is_right(case.logits, case.y).sum()), len(case.y)
    for name, statistics in NORMALISED.get(case.x.shape[1], {}).items() if case.trained else ():
        images = Normalize(*statistics).to(case.x.device)(case.x)
        then = int(is_right(case.subject.logits(images), case.y).sum())
        if wilson(right, n)[1] < wilson(then, n)[0]:  # it has been trained on such
            text = f"accuracy is {right} of {n} on the images as given, and {then} of {n} on images normalised ({name})"
            remedy = "the model seems to expect normalised images: put the normalisation inside it"
            return finding("normalisation", "warning", text, remedy, right=right, right_normalised=then, n=n)
    return finding("normalisation", "ok", text, **data)


def accuracy(case: Case) -> Finding:
    """Better than chance on the images as they are."""
    predicted, n, classes = case.logits.argmax(dim=1), len(case.y), case.logits.shape[1]
    right = int((predicted == case.y).sum())
    text = f"{right} of {n} images are classified rightly, {n / classes:.3g} would be by chance"
    data = {"right": right, "n": n, "classes": classes}
    most = int(case.y.bincount().max())  # what one answer to all images reaches, however labels are shifted
    for shift, whose in ((1, "labels"), (-1, "model's classes")):
        shifted = int((predicted + shift == case.y).sum())
        if wilson(right, n)[1] < wilson(shifted, n)[0] and wilson(most, n)[1] < shifted / n:
            text += f", {shifted} with all labels shifted by {shift}"
            return finding("accuracy", "warning", text, f"the {whose} seem to count from 1", **data)
    poor = right <= n / classes and n >= FEW // 4  # of fewer nothing can be said
    remedy = "is the model trained, are the labels in its order, and the images as it was trained on?"
    return finding("accuracy", "warning" if poor else "ok", text, remedy, **data)


def determinism(case: Case) -> Finding:
    """The same logits twice, and alone as in company."""
    again = case.subject.logits(case.x)
    data = {"difference": float((again - case.logits).abs().max())}
    if not close(again, case.logits):
        changed = int((again.argmax(dim=1) != case.logits.argmax(dim=1)).sum())
        text = f"logits differ by up to {data['difference']:.3g} between two forwards, {changed} predictions change"
        remedy = "a randomised model is judged by AutoAttack(version='rand'); else find what draws in eval mode"
        return finding("determinism", "warning", text, remedy, **data)
    alone = case.subject.logits(case.x[: max(1, len(case.x) // 8)])
    error = float((alone - case.logits[: len(alone)]).norm() / alone.norm().clamp_min(1e-12))
    if error > 1e-3:  # less is rounding
        text = f"logits change by {100 * error:.2g} % with the other images in the batch"
        remedy = "in eval mode an image's logits must be its own: use stored statistics"
        return finding("determinism", "warning", text, remedy, **data)
    return finding("determinism", "ok", "two forwards give the same logits", **data)


def pretrained(parts: Parts) -> Finding:
    """Weights that come from elsewhere see images normalised as there."""
    settings, normalize = parts.recipe.model, parts.model.normalize
    known: Any = getattr(parts.model.backbone, "pretrained_cfg", None) or {}
    if not settings.pretrained or "mean" not in known or "std" not in known:
        return finding("pretrained", "ok", "weights start at random")
    theirs = torch.tensor([known["mean"], known["std"]])
    ours = torch.tensor([[0.0], [1.0]]).expand_as(theirs)
    if normalize is not None:
        ours = torch.stack([normalize.mean.flatten(), normalize.std.flatten()]).cpu()
    wrong = ours.shape == theirs.shape and float((ours - theirs).abs().max()) > 0.1
    mean, std = (", ".join(f"{value:.3g}" for value in known[name]) for name in ("mean", "std"))
    text = f"its weights expect images of mean {mean} and deviation {std}, model.normalization={settings.normalization}"
    return finding("pretrained", "warning" if wrong else "ok", text, "e.g. model.normalization=imagenet")
