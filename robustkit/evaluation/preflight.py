"""Before hours are spent: is what is about to be judged, or trained, what its maker thinks it is?

`preflight` tries a model on a handful of its images, `preflight_run` a run that is about to begin. Each check is a
small function and gives one Finding: "failure" where a result would mean nothing, "warning" where it probably is not
what was meant. A check that cannot be made is "skipped"; none raises. Modes, statistics, gradients and random states
are left as found. On several processes each checks for itself: nothing here waits for another.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Output, Passes, Progress
from robustkit.core.errors import DataError, UserError
from robustkit.core.model import STATISTICS
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.rng import whole
from robustkit.core.strategy import Measure, Subject, ThreatModel
from robustkit.data.loader import make_batch
from robustkit.engine import Predictor
from robustkit.engine.folding import close
from robustkit.evaluation.attacked import Attacked
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.findings import Finding, Verdict
from robustkit.evaluation.logits import LogitsOf, as_found, is_right, judging
from robustkit.evaluation.results import wilson
from robustkit.evaluation.sources import check_labels, source_of
from robustkit.functional import margin, per_image
from robustkit.reporting import formats

FEW = 32
"""Images that a model is tried on; a quarter of them where it is slow. Gradients: a quarter again, but four."""
SLOW = 0.1
"""Seconds for one image's forward from which a model is slow."""
DARK, BLACK = 0.1, 0.02
"""No pixel above: images on another scale than [0, 1]; divided by 255 twice (255/255/255 = 0.0039)."""
USUAL = {  # norm: least and most epsilon per pixel value, and most for grey images, where radii are larger
    "Linf": (0.25 / 255, 0.25, 0.5),
    "L2": (0.2 / 255, 0.05, 0.25),
    "L1": (0.05 / 255, 0.1, 0.25),
}
"""Radii beyond these are rarely meant. For 3 x 32 x 32: Linf 0.001..0.25, L2 0.043..2.8, L1 0.6..307."""
CUSTOMARY = {"Linf": "8/255 = 0.0314", "L2": "0.5", "L1": "12"}
"""On 3 x 32 x 32 images."""
MEAN, STD = 2.0, (0.2, 5.0)
"""Normalised images have a mean within -MEAN..MEAN and a standard deviation within STD, or were meant for others."""
PER_CLASS = 10
"""With so many images per class and more, a class without any is no accident."""
STUCK = 0.25
"""Share of images without a gradient from which it is worth a word."""
RESISTING = 0.5
"""Share of images that is assumed to resist, where a prediction of time needs one."""
DAY = 24 * 3600.0

_Statistics = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
_GREY: _Statistics = {"mnist": ((0.1307,), (0.3081,)), "-1..1": ((0.5,), (0.5,))}
_COLOUR: _Statistics = {
    "cifar10": STATISTICS["cifar10"],
    "imagenet": STATISTICS["imagenet"],
    "-1..1": STATISTICS["svhn"],
}


@attrs.frozen(kw_only=True)
class Case:
    """What the checks look at: a subject, a few images with labels, and what is known of the rest."""

    subject: Subject
    module: nn.Module
    x: Tensor  # (B, C, H, W)
    y: Tensor  # (B,)
    logits: Tensor  # (B, K), of x
    classes: int | None  # of the data, where known
    labels: Tensor  # of all images, where they are at hand, else of the few
    handed_over: frozenset[str]  # modes that modules were found in: "train", "eval"
    trained: bool = True
    batch_size: int = 128

    @property
    def few(self) -> tuple[Tensor, Tensor]:
        """Some of the images, for what costs more than a forward."""
        count = _fewer(self.x)
        return self.x[:count], self.y[:count]


Check = Callable[[Case], Finding]


def preflight(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    threat: ThreatModel,
    classes: int | None = None,
    measures: Sequence[Measure] = (),
    test_images: int | None = None,
    batch_size: int = 128,
) -> tuple[Finding, ...]:
    """Checks, in seconds, that an evaluation of `model` would mean what it seems to.

    Args:
        model: any module; it is tried where it is, and left as found.
        images, labels: as `evaluate` takes them; a few of them are tried.
        threat: the ball it is to be judged in.
        classes: of the data set, where the labels at hand do not tell.
        measures: what is to be measured, to predict how long it takes.
        test_images: how many images are to be judged (None: all of `images`).
        batch_size: images that are forwarded at a time.

    Returns:
        A finding for each check, in order. After a failure of the images or of the logits nothing else is tried.
    """
    with _nothing_changed(model):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        try:
            x, y, every_label, total, spread = _few_of(images, labels)
        except (UserError, ValueError, TypeError, IndexError) as error:
            return (Finding(check="images", verdict="failure", evidence=str(error)),)
        found = [_input_range(x, *spread), _epsilon(threat, x)]
        if found[0].verdict == "failure":
            return tuple(found)
        x, y = x.to(device), y.to(device)
        handed_over = frozenset("train" if module.training else "eval" for module in model.modules())
        with ExitStack() as stack:
            subject = _subject(stack, model, threat, x[:2])
            if isinstance(subject, Finding):
                return (*found, subject)
            x, y = _fewer_if_slow(subject, x, y)
            first, logits = _logits(subject, x)
            found.append(first)
            if logits is None:
                return tuple(found)
            case = Case(
                subject=subject,
                module=model,
                x=x,
                y=y,
                logits=logits,
                classes=classes,
                labels=every_label,
                handed_over=handed_over,
                batch_size=batch_size,
            )
            wrong = tried("labels", lambda: _labels(case))
            found.append(wrong)
            if wrong.verdict == "failure":
                return tuple(found)
            found += [tried(name, check, case) for name, check in CHECKS.items()]
            found.append(tried("memory", _memory_of_evaluation, case))
            if measures:
                count = total if test_images is None else test_images
                named = [(measure.key, threat, measure, count) for measure in measures]
                found.append(tried("evaluation time", lambda: _evaluation_time(case, named, 1)))
    return tuple(found)


def preflight_run(parts: Parts) -> tuple[Finding, ...]:
    """Checks, in seconds, that a run which is about to train is the one that was meant.

    Accuracy and batch statistics are not looked at: there is nothing to see before training.
    """
    from robustkit.evaluation.evaluate import fixed_part

    recipe, model = parts.recipe, parts.model
    with _nothing_changed(model):
        rows = parts.rows[fixed_part(len(parts.rows), FEW)]
        batch = make_batch(parts.train, rows, device=parts.world.device)
        threats = list(dict.fromkeys([recipe.threat, *(suite.threat or recipe.threat for suite in recipe.evaluation)]))
        found = [_input_range(batch.x, float(batch.x.min()), float(batch.x.max()))]
        found += [_epsilon(threat, batch.x) for threat in threats]
        if found[0].verdict == "failure":
            return tuple(found)
        with ExitStack() as stack:
            subject = _subject(stack, model, recipe.threat, batch.x[:2])
            if isinstance(subject, Finding):
                return (*found, subject)
            x, y = _fewer_if_slow(subject, batch.x, batch.y)
            first, logits = _logits(subject, x)
            found.append(first)
            if logits is None:
                return tuple(found)
            case = Case(
                subject=subject,
                module=model,
                x=x,
                y=y,
                logits=logits,
                classes=len(parts.data.classes),
                labels=parts.train.labels[parts.rows],
                handed_over=frozenset(),
                trained=False,
                batch_size=recipe.batch_size,
            )
            test = attrs.evolve(case, labels=parts.data.test.labels)
            found.append(tried("labels", lambda: _labels(case)))
            found.append(tried("test labels", lambda: attrs.evolve(_labels(test), check="test labels")))
            found.append(tried("pretrained", lambda: _pretrained(parts)))
            found += [tried(name, CHECKS[name], case) for name in BEFORE_TRAINING]
            named = [
                (result_key(suite, m), suite.threat or recipe.threat, m, min(suite.images or total, total))
                for total in [len(parts.data.test)]
                for suite, m in recipe.measures()
            ]
            checkpoints = 2 if len(parts.validation_rows) and recipe.epochs > 1 else 1
            judged = tried("evaluation time", lambda: _evaluation_time(case, named, checkpoints))
        found.append(tried("memory", lambda: _memory_of_training(parts, x, y)))
        training = tried("training time", lambda: _training_time(parts, x, y))
        if found[-1].verdict != "failure":
            found += [training, _worth(training, judged)]
    return tuple(found)


def tried(name: str, check: Callable[..., Finding], *arguments: Any) -> Finding:
    """What the check finds; "skipped" where it cannot be made."""
    try:
        return check(*arguments)
    except Exception as error:  # a check must never be what stops an evaluation
        return Finding(check=name, verdict="skipped", evidence=_described(error))


def lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines for a terminal: one for each that is amiss, and one with the count and the predicted times."""
    shown = [
        f"preflight: {finding.check}: {finding.evidence}" + (f"; {finding.remedy}" if finding.remedy else "")
        for finding in findings
        if finding.verdict in ("warning", "failure")
    ]
    counts: dict[str, int] = {
        verdict: sum(finding.verdict == verdict for finding in findings) for verdict in ("ok", "skipped")
    }
    parts = [f"{counts['ok']} checks ok"]
    if counts["skipped"]:
        parts.append(f"{counts['skipped']} skipped")
    for name in ("training", "evaluation"):
        seconds = [f.data["seconds"] for f in findings if f.check == f"{name} time" and "seconds" in f.data]
        parts += [f"{name} predicted {span(value)}" for value in seconds]
    return [*shown, "preflight: " + ", ".join(parts)]


def refuse(findings: Sequence[Finding]) -> None:
    """Raises UserError where a check failed."""
    for finding in findings:
        if finding.verdict == "failure":
            raise UserError(finding.evidence, place=f"preflight: {finding.check}", remedy=finding.remedy)


# --- images -----------------------------------------------------------------------------------------------------------


def _few_of(images: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor, int, tuple[float, float]]:
    """x and y of a few rows, labels of all rows where they are at hand, how many rows, and the range of the pixels.

    Tensors are taken as they are, so that a fault becomes a finding.
    """
    from robustkit.evaluation.evaluate import fixed_part  # here: that module may well want to call this one

    if labels is None:
        source = source_of(images)
        try:
            x, y = source.rows(fixed_part(len(source), FEW))
        except DataError as error:  # of a data set's own images, which are read only now
            raise DataError(error.fault, remedy=error.remedy) from error
        known = getattr(images, "labels", y)
        return x, y, known, len(source), (float(x.min()), float(x.max()))
    x, y = torch.as_tensor(images).detach(), torch.as_tensor(labels).detach()
    if x.ndim != 4 or len(x) == 0:
        raise DataError(f"must be (N, C, H, W), N >= 1, got {tuple(x.shape)}", place="images")
    check_labels(y, len(x))
    spread = float(x.min()), float(x.max())
    rows = fixed_part(len(x), FEW)
    return x[rows.to(x.device)].float(), y[rows.to(y.device)].long(), y, len(x), spread


def _input_range(x: Tensor, low: float, high: float) -> Finding:
    """Pixels in [0, 1], and as bright as pictures are."""
    mean, std = x.mean().item(), x.std().item()
    data = {"low": low, "high": high, "mean": mean, "std": std}
    text = f"pixels range from {low:.4g} to {high:.4g}, mean {mean:.3g}"
    verdict: Verdict = "failure"
    if not (math.isfinite(low) and math.isfinite(high)):
        text, remedy = "pixels are NaN or infinite", "mend the images"
    elif low >= 0 and high <= 1:
        if high == low:
            text, remedy = f"all pixels are {high:.4g}", "are these the images?"
        elif high < BLACK:
            remedy = "divide 8-bit pixels by 255 once, not twice"
        elif high < DARK:
            verdict, remedy = "warning", "scale pixels to [0, 1]: radii are in that unit"
        else:
            verdict, remedy = "ok", ""
    elif low > -1e-4 and high < 1 + 1e-4:
        text = f"pixels range from {low:.3g} to 1{high - 1:+.1g}: rounding"
        remedy = "clamp them to [0, 1]"
    elif low >= 0 and high <= 255:
        remedy = "divide 8-bit pixels by 255"
    elif low >= -1 - 1e-4 and high <= 1 + 1e-4:
        remedy = "these lie in [-1, 1]: give (x + 1) / 2, and put 2 x - 1 inside the model"
    elif low < 0:
        text += ", as if normalised already"
        remedy = "give images in [0, 1] and put normalisation inside the model, or radii mean nothing"
    else:
        remedy = "scale pixels to [0, 1]"
    return Finding(check="input range", verdict=verdict, evidence=text, remedy=remedy, data=data)


def _epsilon(threat: ThreatModel, x: Tensor) -> Finding:
    """A radius of the size that is usual for these images."""
    epsilon, norm = float(threat.epsilon), threat.norm
    channels, values = x.shape[1], x[0].numel()
    per_value = epsilon / {"Linf": 1.0, "L2": math.sqrt(values), "L1": float(values)}[norm]
    least, most, most_grey = USUAL[norm]
    most = most if channels >= 3 else most_grey
    data = {"epsilon": epsilon, "norm": norm, "per_value": per_value}
    text = f"{norm} {_radius(epsilon, norm)}"
    customary = f"{CUSTOMARY[norm]} is usual for 3 x 32 x 32 images"
    if norm == "Linf" and epsilon > 1:
        text += " is more than the whole range of a pixel"
        remedy = f"pixels are in [0, 1]: did you mean {epsilon:g}/255?"
        return Finding(check="epsilon", verdict="failure", evidence=text, remedy=remedy, data=data)
    if per_value > most:
        text += f", {per_value:.2g} per pixel value, leaves little of an image"
        remedy = f"{customary}; did you mean 8/255?" if norm == "Linf" else customary
        return Finding(check="epsilon", verdict="warning", evidence=text, remedy=remedy, data=data)
    if per_value < least:
        text += f" moves a pixel by {255 * per_value:.2g}/255 on average"
        if norm == "Linf":
            text = f"{norm} {epsilon:.3g} = {255 * epsilon:.2g}/255 is less than the rounding of 8-bit pixels"
        remedy = f"{customary}; was it divided by 255 twice, or is it meant for another norm?"
        return Finding(check="epsilon", verdict="warning", evidence=text, remedy=remedy, data=data)
    near = round(255 * epsilon)
    if norm == "Linf" and 1 <= near <= 16 and 1e-6 < abs(255 * epsilon - near) < 0.1:
        text += f": not {near}/255, as the decimal may suggest"
    return Finding(check="epsilon", verdict="ok", evidence=text, data=data)


def _radius(epsilon: float, norm: str) -> str:
    return formats.setting("epsilon", epsilon) if norm == "Linf" else f"{epsilon:.4g}"


# --- the model as it is -----------------------------------------------------------------------------------------------


def _subject(stack: ExitStack, model: nn.Module, threat: ThreatModel, x: Tensor) -> Subject | Finding:
    """The model as measures see it; plainly, where it breaks on a faster way: `_logits` then says what is wrong."""
    try:
        return stack.enter_context(judging(model, threat, x))
    except Exception:
        try:
            return stack.enter_context(judging(model, threat, x, exact=True))
        except Exception as error:
            text = f"the model cannot be judged: {_described(error)}"
            return Finding(check="logits", verdict="failure", evidence=text)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _fewer_if_slow(subject: Subject, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The images that there is time for."""
    try:
        subject.logits(x[:2])
        seconds = _seconds(lambda: subject.logits(x[:2]), x.device) / min(2, len(x))
    except Exception:  # `_logits` says why
        return x, y
    count = FEW // 4 if seconds > SLOW else FEW
    return x[:count], y[:count]


def _logits(subject: Subject, x: Tensor) -> tuple[Finding, Tensor | None]:
    """Logits (B, K): finite, no probabilities."""
    from robustkit.evaluation.evaluate import check_model

    try:
        check_model(subject, x)
        logits: Tensor = subject.logits(x)
    except DataError as error:
        kinds = {p.dtype for p in subject.logits.parameters() if p.is_floating_point()} - {torch.float32}
        remedy = f"its weights are {kinds.pop()}, images float32: give model.float()" if kinds else error.remedy
        return Finding(check="logits", verdict="failure", evidence=error.fault, remedy=remedy), None
    except Exception as error:
        text = f"the model cannot be called: {_described(error)}"
        return Finding(check="logits", verdict="failure", evidence=text), None
    classes, (low, high) = logits.shape[1], (logits.min().item(), logits.max().item())
    data = {"classes": classes, "low": low, "high": high}
    text = f"{classes} logits between {low:.3g} and {high:.3g}"
    if high <= 0 and bool(((logits.exp().sum(dim=1) - 1).abs() < 1e-4).all()):
        text += ": log-probabilities, which serve as logits"
    elif low >= 0 and high <= 1 and high - low > 0.5:
        text += ", all within [0, 1]"
        remedy = "if the model ends in a sigmoid or a scaled softmax, take that off its end"
        return Finding(check="logits", verdict="warning", evidence=text, remedy=remedy, data=data), logits
    return Finding(check="logits", verdict="ok", evidence=text, data=data), logits


def _labels(case: Case) -> Finding:
    """Labels that are classes of the model, and classes that have images."""
    labels, logits = case.labels, case.logits.shape[1]
    count = len(labels)
    present = torch.unique(labels).numel()
    data = {"images": count, "present": present, "logits": logits, "classes": case.classes}
    try:
        check_labels(labels, count, logits)
    except DataError as error:
        return Finding(check="labels", verdict="failure", evidence=error.fault, remedy=error.remedy, data=data)
    if case.classes is not None and case.classes != logits:
        verdict: Verdict = "failure" if logits < case.classes else "warning"
        text = f"the model has {logits} logits, the data have {case.classes} classes"
        remedy = "is it for these data, with classes in this order?"
        return Finding(check="labels", verdict=verdict, evidence=text, remedy=remedy, data=data)
    text = f"{present} of {logits} classes among the labels of {count} images"
    if present < logits and count >= PER_CLASS * logits:
        remedy = "are these all images, with the labels of this model?"
        return Finding(check="labels", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="labels", verdict="ok", evidence=text, data=data)


def _modes(case: Case) -> Finding:
    """Nothing stays in training mode, and batch statistics are those of training."""
    stubborn = [name for name, module in case.module.named_modules() if module.training]
    norms = [module for module in case.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]
    unmoved = [
        norm
        for norm in tracked
        if norm.running_mean is not None
        and norm.running_var is not None
        and not bool(norm.running_mean.any())
        and bool((norm.running_var == 1).all())
    ]
    data = {"batch_norms": len(norms), "tracked": len(tracked), "unmoved": len(unmoved)}
    if stubborn:
        text = f"'{stubborn[0] or 'the model'}' stays in training mode when it is told to evaluate"
        remedy = "if that is no randomised defence, let it follow train() and eval()"
        return Finding(check="modes", verdict="warning", evidence=text, remedy=remedy, data=data)
    if tracked and len(unmoved) == len(tracked):
        text = f"the statistics of all {len(tracked)} batch normalisations are those of a fresh model"
        remedy = "is it trained, and were buffers loaded with the weights?"
        return Finding(check="modes", verdict="warning", evidence=text, remedy=remedy, data=data)
    if len(tracked) < len(norms):
        text = f"{len(norms) - len(tracked)} of {len(norms)} batch normalisations keep no statistics"
        remedy = "they use those of the batch: an image's logits depend on its neighbours"
        return Finding(check="modes", verdict="warning", evidence=text, remedy=remedy, data=data)
    text = "found in eval mode"
    if "train" in case.handed_over:
        text = "found in training mode; it is judged in eval mode"
    return Finding(check="modes", verdict="ok", evidence=text, data=data)


def _normalisation(case: Case) -> Finding:
    """Normalised once, with statistics that suit the images, inside the model."""
    inputs, outputs = _through_normalisers(case)
    for name, x in inputs.items():
        low, high = x.min().item(), x.max().item()
        if low < -0.01 or high > 1.01:
            text = f"'{name}' gets pixels from {low:.3g} to {high:.3g}: they are normalised already"
            remedy = "normalise once, inside the model"
            return Finding(check="normalisation", verdict="warning", evidence=text, remedy=remedy)
    for name, x in outputs.items():
        mean, std = x.mean().item(), x.std().item()
        data = {"mean": mean, "std": std}
        text = f"'{name}' brings the images to mean {mean:.2g}, standard deviation {std:.2g}"
        if abs(mean) > MEAN or not STD[0] <= std <= STD[1]:
            remedy = "are its statistics those of images in [0, 1], and of these data?"
            return Finding(check="normalisation", verdict="warning", evidence=text, remedy=remedy, data=data)
    if case.trained and (finding := _expects_normalised(case)) is not None:
        return finding
    if outputs:
        return Finding(check="normalisation", verdict="ok", evidence=text, data=data)
    return Finding(check="normalisation", verdict="ok", evidence="no layer that normalises was found, none is missed")


def _through_normalisers(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into the layers that normalise with a fixed mean and deviation, and what comes out, by their names."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in case.module.named_modules():
        titled = "normaliz" in type(module).__name__.lower() or "normalis" in type(module).__name__.lower()
        if not titled or not hasattr(module, "mean") or not hasattr(module, "std"):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def note(_: nn.Module, given: tuple[Any, ...], output: Any, name: str = name) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                inputs.setdefault(name, given[0].detach())
                outputs.setdefault(name, output.detach())

        handles.append(module.register_forward_hook(note))
    try:
        if handles:
            LogitsOf(case.module)(case.x)  # the module itself, not a faster twin of it
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _expects_normalised(case: Case) -> Finding | None:
    """A model that does far better on normalised images has been trained on such."""
    right, n = int(is_right(case.logits, case.y).sum()), len(case.y)
    known = _GREY if case.x.shape[1] == 1 else _COLOUR if case.x.shape[1] == 3 else {}
    for name, (mean, std) in known.items():
        shift, scale = (torch.tensor(values, device=case.x.device).view(1, -1, 1, 1) for values in (mean, std))
        then = int(is_right(case.subject.logits((case.x - shift) / scale), case.y).sum())
        if wilson(right, n)[1] < wilson(then, n)[0]:
            text = f"accuracy is {right} of {n} on the images as given, and {then} of {n} on images normalised ({name})"
            remedy = "the model seems to expect normalised images: put the normalisation inside it"
            data = {"right": right, "right_normalised": then, "n": n, "statistics": name}
            return Finding(check="normalisation", verdict="warning", evidence=text, remedy=remedy, data=data)
    return None


def _accuracy(case: Case) -> Finding:
    """Better than chance on the images as they are."""
    predicted, n, classes = case.logits.argmax(dim=1), len(case.y), case.logits.shape[1]
    right = int((predicted == case.y).sum())
    text = f"{right} of {n} images are classified rightly, {n / classes:.3g} would be by chance"
    data = {"right": right, "n": n, "classes": classes}
    for shift, words in ((1, "the labels seem to count from 1"), (-1, "the model's classes seem to count from 1")):
        shifted = int((predicted + shift == case.y).sum())
        if wilson(right, n)[1] < wilson(shifted, n)[0]:
            text += f", {shifted} with all labels shifted by {shift}"
            return Finding(check="accuracy", verdict="warning", evidence=text, remedy=words, data=data)
    if right <= n / classes and n >= FEW // 4:  # of fewer nothing can be said
        remedy = "is the model trained, are the labels in its order, and the images as it was trained on?"
        return Finding(check="accuracy", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="accuracy", verdict="ok", evidence=text, data=data)


def _determinism(case: Case) -> Finding:
    """The same logits twice, and alone as in company."""
    logits, again = case.subject.logits, case.subject.logits(case.x)
    data = {"difference": float((again - case.logits).abs().max())}
    if not close(again, case.logits):
        changed = int((again.argmax(dim=1) != case.logits.argmax(dim=1)).sum())
        text = f"logits differ by up to {data['difference']:.3g} between two forwards, {changed} predictions change"
        remedy = "a randomised model is judged by AutoAttack(version='rand'); else find what draws in eval mode"
        return Finding(check="determinism", verdict="warning", evidence=text, remedy=remedy, data=data)
    x, _ = case.few
    half = x[: max(1, len(x) // 2)]
    alone, company = logits(half), logits(x)[: len(half)]
    error = (alone - company).norm() / company.norm().clamp_min(1e-12)
    if float(error) > 1e-3:
        text = f"logits change by {100 * float(error):.2g} % with the other images in the batch"
        remedy = "in eval mode an image's logits must be its own: use stored statistics"
        return Finding(check="determinism", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="determinism", verdict="ok", evidence="two forwards give the same logits", data=data)


# --- what attacks rely on ---------------------------------------------------------------------------------------------


def _gradient(case: Case) -> Finding:
    """A finite gradient that is not zero reaches the images."""
    x, y = case.few
    n = len(x)
    gradient = _gradient_of(lambda images: margin(case.subject.logits(images), y), x)
    remedy = "attacks follow this gradient: look for rounding, detach(), no_grad() or an argmax inside the model"
    if gradient is None:
        text = "no gradient reaches the images"
        return Finding(check="gradient", verdict="failure", evidence=text, remedy=remedy)
    broken = int((~gradient.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        text = f"the gradient is NaN or infinite on {broken} of {n} images"
        remedy = "look for sqrt, log, norm or a division at 0 inside the model"
        return Finding(check="gradient", verdict="failure", evidence=text, remedy=remedy, data={"broken": broken})
    zero = int((~gradient.flatten(1).any(dim=1)).sum())
    data = {"zero": zero, "n": n}
    if zero == n and not case.trained:  # a head that starts at zero passes nothing on: ask below it
        below = _gradient_of(lambda images: case.subject.predict(images).features.sum(dim=1), x)
        if below is not None and bool(below.any()):
            text = "the head passes no gradient on yet, the features do"
            return Finding(check="gradient", verdict="ok", evidence=text, data=data)
    if zero == n:
        text = f"the gradient is zero on all {n} images"
        return Finding(check="gradient", verdict="failure", evidence=text, remedy=remedy, data=data)
    if zero >= STUCK * n:
        text = f"the gradient is zero on {zero} of {n} images"
        return Finding(check="gradient", verdict="warning", evidence=text, remedy=remedy, data=data)
    entropy = _gradient_of(lambda images: F.cross_entropy(case.subject.logits(images), y, reduction="none"), x)
    flat = n if entropy is None else int((~entropy.flatten(1).any(dim=1)).sum())
    if flat >= STUCK * n:
        text = f"cross-entropy is saturated: its gradient is zero on {flat} of {n} images, the margin's is not"
        remedy = "PGD on cross-entropy stands still there: judge by CW and AutoAttack"
        return Finding(check="gradient", verdict="warning", evidence=text, remedy=remedy, data=data | {"flat": flat})
    size = float(gradient.flatten(1).norm(dim=1).median())
    text = f"it reaches all images, median length {size:.2g}" if not zero else f"it is zero on {zero} of {n} images"
    return Finding(check="gradient", verdict="ok", evidence=text, data=data)


def _gradient_of(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The gradient of a value (B,) with respect to the images; None where they are not connected."""
    with torch.enable_grad():
        images = x.detach().clone().requires_grad_()
        result = value(images)
        if not result.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(result.sum(), images, allow_unused=True)
    return gradient


def _one_step(case: Case) -> Finding:
    """A step up the gradient, a quarter of epsilon long, makes the true class less likely."""
    (x, y), threat = case.few, case.subject.threat
    gradient = _gradient_of(lambda images: margin(case.subject.logits(images), y), x)
    if gradient is None or not bool(gradient.any()):
        return Finding(check="one step", verdict="skipped", evidence="there is no gradient to follow")
    radius = x.new_full((len(x),), threat.epsilon)
    moved = threat.project(x + threat.ascend(gradient) * per_image(radius / 4, x), x, radius)
    size = float(threat.size(moved - x).max())
    rise = margin(case.subject.logits(moved), y) - margin(case.subject.logits(x), y)
    higher, n = int((rise > 0).sum()), len(x)
    data = {"rise": rise.mean().item(), "higher": higher, "n": n, "size": size}
    text = f"a step of epsilon / 4 raises the loss on {higher} of {n} images, by {data['rise']:.2g} on average"
    if size > threat.epsilon * (1 + 1e-4) + 1e-6:
        text = f"a projected step is {size:.4g} long, epsilon is {threat.epsilon:.4g}"
        remedy = f"{type(threat).__name__}.project must bring images into the ball"
        return Finding(check="one step", verdict="failure", evidence=text, remedy=remedy, data=data)
    rounding = 1e-5 * max(1.0, float(case.logits.abs().max()))
    if not case.trained and abs(data["rise"]) <= rounding:  # deep nets with fresh batch statistics hardly respond
        return Finding(check="one step", verdict="ok", evidence=text, data=data)
    if data["rise"] <= 0 or higher < n / 2:
        remedy = "the gradient does not tell where the loss grows: accuracy under attack will be too high"
        return Finding(check="one step", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="one step", verdict="ok", evidence=text, data=data)


def _radius_zero(case: Case) -> Finding:
    """An attack that may not move changes nothing."""
    x, y = case.few
    budget = Budget(epsilon=x.new_zeros(len(x)))
    x_adv = PGD(steps=2)(case.subject.predict, x, y, budget, case.subject.threat, whole(x, 0, "preflight"))
    moved = (x_adv - x).abs().max().item()
    changed = int((case.subject.logits(x_adv).argmax(dim=1) != case.subject.logits(x).argmax(dim=1)).sum())
    data = {"moved": moved, "changed": changed}
    text = f"an attack of radius 0 moves pixels by up to {moved:.2g} and changes {changed} predictions"
    if moved > 1e-5:
        remedy = f"{type(case.subject.threat).__name__} must keep images within epsilon, and in [0, 1]"
        return Finding(check="radius 0", verdict="failure", evidence=text, remedy=remedy, data=data)
    return Finding(check="radius 0", verdict="ok", evidence=text, data=data)


CHECKS: dict[str, Check] = {
    "modes": _modes,
    "normalisation": _normalisation,
    "accuracy": _accuracy,
    "determinism": _determinism,
    "gradient": _gradient,
    "one step": _one_step,
    "radius 0": _radius_zero,
}
"""Of any model whose logits are in order; more come from the images, and from what is to be done."""
BEFORE_TRAINING = ("normalisation", "determinism", "gradient", "one step", "radius 0")


def _pretrained(parts: Parts) -> Finding:
    """Weights that come from elsewhere see images normalised as there."""
    model, settings = parts.model, parts.recipe.model
    known: Any = getattr(model.backbone, "pretrained_cfg", None) or {}
    if not settings.pretrained or "mean" not in known or "std" not in known:
        return Finding(check="pretrained", verdict="ok", evidence="weights start at random")
    theirs = torch.tensor([*known["mean"], *known["std"]], dtype=torch.float32)
    channels = len(known["mean"])
    ours = torch.tensor([0.0] * channels + [1.0] * channels)
    if model.normalize is not None:
        ours = torch.cat([model.normalize.mean.flatten(), model.normalize.std.flatten()]).cpu()
    if ours.shape == theirs.shape and float((ours - theirs).abs().max()) > 0.1:
        mean, std = (", ".join(f"{value:.3g}" for value in known[name]) for name in ("mean", "std"))
        text = f"its weights expect images normalised by mean {mean} and deviation {std}, the recipe has "
        text += f"model.normalization={settings.normalization}"
        remedy = "e.g. model.normalization=imagenet"
        return Finding(check="pretrained", verdict="warning", evidence=text, remedy=remedy)
    return Finding(check="pretrained", verdict="ok", evidence="images are normalised as its weights expect")


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory_of_evaluation(case: Case) -> Finding:
    """One forward and backward at the batch size."""
    x, _ = case.few

    def work(images: Tensor) -> None:
        _gradient_of(lambda given: LogitsOf(case.module)(given).sum(dim=1), images)

    need = _activations(lambda: work(x), case.module) / len(x) * case.batch_size
    return _fits(need, work, x, case.batch_size, "a smaller batch_size, or slice_size of AutoAttack")


def _memory_of_training(parts: Parts, x: Tensor, y: Tensor) -> Finding:
    """One pure pass over what a process forwards at once, besides gradients and momentum."""
    recipe = parts.recipe
    count = _fewer(x)
    piece = math.ceil(recipe.batch_size / recipe.accumulate / parts.world.size)
    views = max(1, recipe.loss.passes(parts.progress).forward)

    def work(images: Tensor) -> None:
        with parts.model.using("train-frozen"):
            _parameter_gradients(parts, images, y[:1].expand(len(images)))

    used = _activations(lambda: work(x[:count]), parts.model) / count
    weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    remedy = f"a smaller batch_size, or accumulate={2 * recipe.accumulate}, which gives the same steps in pieces"
    return _fits(used * piece * views + 2 * weights, work, x, piece * views, remedy)


def _parameter_gradients(parts: Parts, x: Tensor, y: Tensor) -> None:
    with torch.enable_grad():
        predict = Predictor(parts.model, parts.world.device, parts.recipe.precision.outer)
        output: Output = predict(x, y)
        loss = F.cross_entropy(output.margined, y) + output.penalty.mean()
        trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)


def _activations(work: Callable[[], None], module: nn.Module) -> int:
    """Bytes that `work` keeps for its backward, without weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values())


def _fits(need: float, work: Callable[[Tensor], None], x: Tensor, count: int, remedy: str) -> Finding:
    """Whether a pass over `count` images fits: tried on a GPU, estimated on the CPU."""
    device = x.device
    free = _free_memory(device)
    data = {"need": round(need), "free": None if free is None else round(free), "images": count}
    text = f"about {_bytes(need)} for {count} images at once"
    if free is not None:
        text += f", {_bytes(free)} free"
    if device.type == "cuda":
        try:
            work(x.repeat(math.ceil(count / len(x)), 1, 1, 1)[:count])
        except torch.cuda.OutOfMemoryError:
            return Finding(
                check="memory", verdict="failure", evidence=f"out of memory: {text}", remedy=remedy, data=data
            )
        finally:
            torch.cuda.empty_cache()
    elif free is not None and need > free:
        return Finding(check="memory", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="memory", verdict="ok", evidence=text, data=data)


def _free_memory(device: torch.device) -> float | None:
    """Bytes that may still be asked for, where the system tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type != "cpu":
        return None
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(("MemAvailable:", "SwapFree:")):
                found.append(1024.0 * int(line.split()[1]))
        found = [sum(found)] if found else []
    except (OSError, ValueError):
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


# --- time -------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Pace:
    """Seconds per image of a forward, of a backward to the images, and of one to the parameters."""

    forward: float
    input_backward: float
    parameter_backward: float = 0.0

    def seconds(self, passes: Passes) -> float:
        return (
            passes.forward * self.forward
            + passes.input_backward * self.input_backward
            + passes.parameter_backward * self.parameter_backward
        )


def passes_of(measure: Measure, norm: str, classes: int) -> Passes | None:
    """What a measure costs per image, where half of the images resist; None where that is not known.

    AutoAttack's: APGD takes 100 steps (five restarts in L1), targeted APGD and FAB up to nine times as many, FAB checks
    each step with one more forward, Square makes 5,000 queries. All but the first attack see the images still right.
    """
    if isinstance(measure, Clean):
        return Passes(forward=1)
    if isinstance(measure, Attacked):
        attacks = measure.steps * (1 + RESISTING * (measure.restarts - 1))
        return Passes(forward=round(1 + attacks + measure.restarts), input_backward=round(attacks))
    if not isinstance(measure, AutoAttack):
        return None
    targets = min(5 if norm == "L1" else 9, classes - 1)
    restarts = 5 if norm == "L1" or measure.version == "plus" else 1
    draws = 20 if measure.version == "rand" else 1
    fab = 5 if measure.version == "plus" else 1
    costs = {
        "apgd-ce": (100 * restarts * draws, 100 * restarts * draws),
        "apgd-dlr": (100 * restarts * draws, 100 * restarts * draws),
        "apgd-t": (100 * targets, 100 * targets),
        "fab": (200 * fab, 100 * fab * classes),
        "fab-t": (200 * fab * min(9, classes - 1), 100 * fab * min(9, classes - 1)),
        "square": (5000, 0),
    }
    versions = {
        "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        "rand": ("apgd-ce", "apgd-dlr"),
    }
    total = [1.0, 0.0]
    for number, name in enumerate(measure.attacks or versions[measure.version]):
        share = RESISTING if number else 1.0
        total = [sum_so_far + share * cost for sum_so_far, cost in zip(total, costs[name], strict=True)]
    return Passes(forward=round(total[0]), input_backward=round(total[1]))


def _evaluation_time(case: Case, named: Sequence[tuple[str, ThreatModel, Measure, int]], checkpoints: int) -> Finding:
    """How long the measures take, on images each."""
    pace = _pace(case.subject.logits, case.x, case.batch_size)
    parts: dict[str, float] = {}
    unknown = []
    for key, threat, measure, images in named:
        passes = passes_of(measure, threat.norm, case.logits.shape[1])
        if passes is None:
            unknown.append(key)
            continue
        images = min(images, getattr(measure, "images", None) or images)
        parts[key] = checkpoints * images * pace.seconds(passes)
    seconds = math.fsum(parts.values())
    text = f"predicted {span(seconds)}: " + ", ".join(f"{key} {span(value)}" for key, value in parts.items())
    if not parts:
        text = "nothing to predict"
    if unknown:
        text += f"; without {', '.join(unknown)}, whose cost is not known"
    data: dict[str, Any] = {"parts": parts, "pace": attrs.asdict(pace)} | ({"seconds": seconds} if parts else {})
    if seconds > DAY:
        remedy = "limit the images (--limit, or a suite's images=1000), or take a faster device"
        return Finding(check="evaluation time", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="evaluation time", verdict="ok", evidence=text, data=data)


def _training_time(parts: Parts, x: Tensor, y: Tensor) -> Finding:
    """How long training takes: passes of all steps, and of validation."""
    recipe, world = parts.recipe, parts.world
    attacking = Predictor(parts.model, world.device, recipe.precision.attack)
    with torch.no_grad(), attacking.using("eval"):
        pace = _pace(lambda images: attacking(images).logits, x, recipe.batch_size)

    def step(images: Tensor) -> None:
        with parts.model.using("train-frozen"):
            _parameter_gradients(parts, images, y.repeat(math.ceil(len(images) / len(y)))[: len(images)])

    whole_pass = _per_image(step, x, recipe.batch_size)
    pace = attrs.evolve(pace, parameter_backward=max(0.0, whole_pass - pace.forward))
    images = len(parts.rows)
    in_steps = images * math.fsum(pace.seconds(passes) for passes in _by_epoch(recipe, parts.steps_per_epoch))
    validation = recipe.validation
    measured = len(parts.validation_rows) + min(validation.train_images, images) if len(parts.validation_rows) else 0
    looks = math.ceil(recipe.epochs / validation.every)
    attack = Passes() if validation.attack is None else validation.attack.passes(parts.progress) + Passes(forward=1)
    in_validation = looks * measured * pace.seconds(attack + Passes(forward=1))
    seconds = (in_steps + in_validation) / world.size
    text = f"predicted {span(seconds)}: {span(in_steps / world.size)} in steps, "
    text += f"{span(in_validation / world.size)} in validation"
    data = {"seconds": seconds, "steps": in_steps, "validation": in_validation, "pace": attrs.asdict(pace)}
    if seconds > 7 * DAY:
        remedy = "a GPU, fewer epochs, or a smaller model; --smoke tries all parts in seconds"
        return Finding(check="training time", verdict="warning", evidence=text, remedy=remedy, data=data)
    return Finding(check="training time", verdict="ok", evidence=text, data=data)


def _by_epoch(recipe: Recipe, steps: int) -> Iterator[Passes]:
    """All passes of a step, for each epoch."""
    for epoch in range(recipe.epochs):
        progress = Progress.at(epoch * steps, recipe.epochs, steps)
        yield sum(recipe.passes(progress).values(), Passes())


def _worth(training: Finding, judged: Finding) -> Finding:
    """The finding on evaluation, with a word where it takes longer than training and more than an hour."""
    ours, theirs = judged.data.get("seconds", 0.0), training.data.get("seconds", math.inf)
    if judged.verdict != "ok" or ours <= max(theirs, 3600.0):
        return judged
    text = f"{judged.evidence}; that is more than training"
    return attrs.evolve(judged, verdict="warning", evidence=text, remedy="limit the images of evaluation, e.g. to 1000")


def _pace(logits: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Pace:
    forward = _per_image(lambda images: logits(images), x, batch_size)
    both = _per_image(lambda images: _gradient_of(lambda given: logits(given).sum(dim=1), images), x, batch_size)
    return Pace(forward, max(0.0, both - forward))


def _per_image(work: Callable[[Tensor], object], x: Tensor, batch_size: int) -> float:
    """Seconds per image, in batches as large as there is time for."""
    few = x[: _fewer(x)]
    seconds = _seconds(lambda: work(few), x.device)
    if seconds / len(few) * batch_size > 0.25 and x.device.type == "cpu":
        return seconds / len(few)
    images = x.repeat(math.ceil(batch_size / len(x)), 1, 1, 1)[:batch_size]
    work(images)
    return min(_seconds(lambda: work(images), x.device) for _ in range(2)) / len(images)


def _fewer(x: Tensor) -> int:
    """A quarter of the images, but four where there are so many."""
    return min(len(x), max(4, len(x) // 4))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def span(seconds: float) -> str:
    """A duration to the accuracy of a prediction: '12 s', '53 min', '7.5 h', '3 days'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 2 * DAY:
        return f"{seconds / 3600:.2g} h"
    return f"{round(seconds / DAY):,} days"


# --- nothing changes --------------------------------------------------------------------------------------------------


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Afterwards random states, buffers, gradients and modes are what they were."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    kept = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.inference_mode(False), as_found(model), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers and not torch.equal(buffer, buffers[name]):
                        buffer.copy_(buffers[name])
            for parameter, gradient in gradients:
                parameter.grad = gradient
