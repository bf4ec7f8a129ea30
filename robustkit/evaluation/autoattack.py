"""AutoAttack: the official package, and nothing of our own but a check of what it claims."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustkit.core.batch import Passes
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Outcomes, Slice, Subject, ThreatModel
from robustkit.evaluation.attacked import RESISTING
from robustkit.evaluation.logits import is_right

SubAttack = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

_LOGGER = logging.getLogger("auto-attack")  # the package's


@registry("measure").register("autoattack")
@spec
class AutoAttack:
    """Accuracy under AutoAttack (Croce and Hein, ICML 2020), by the authors' own code.

    "standard" is APGD-CE, targeted APGD-DLR, targeted FAB and Square; "plus" adds attacks and restarts, "rand" is for
    randomised defences; `attacks` names sub-attacks to run instead, with the settings that "standard" gives them. They
    run one after the other, each on the images still right and each seeded alike, as within one call of the package:
    that gives the breakdown, and lets an evaluation go on after any of them. What the package returns is checked: an
    image counts as broken if it lies in the ball and the box and the model, forwarded once more, gets it wrong (except
    for "rand", where one more forward proves nothing). With K < 10 classes the targeted attacks aim at all K - 1
    others; the targeted DLR loss needs 4 classes and the plain one 3, and with fewer their attacks are left out, with a
    note.

    A slice of `slice_size` images is one call of the package with the evaluation's seed: outcomes depend on the slices,
    as the package draws from one stream for all images of a call, but not on who judged them or when.
    """

    key: str = "autoattack"
    version: Literal["standard", "plus", "rand"] = "standard"
    attacks: tuple[SubAttack, ...] = ()
    images: int | None = setting(default=None, at_least=1)
    slice_size: int = setting(default=250, at_least=1)

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        """The breakdown is accuracy after each sub-attack; what the package warns of becomes notes."""
        for outcomes, _ in self._stages(subject, part, seed, before):
            yield outcomes

    def examples(self, subject: Subject, part: Slice, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Images (B, C, H, W) after each sub-attack, by its name: those broken so far, the others as they are."""
        for outcomes, images in self._stages(subject, part, seed, None):
            yield next(reversed(outcomes.breakdown), self.key), images

    def _stages(
        self, subject: Subject, part: Slice, seed: int, before: Outcomes | None
    ) -> Iterator[tuple[Outcomes, Tensor]]:
        """What is found, and the images as they were broken since `before`."""
        logits, (x, y, _) = subject.logits, part
        output = logits(x if before is None else x[:1])
        classes = output.shape[1]
        made, right = x, is_right(output, y) if before is None else before.right.clone()
        breakdown = {} if before is None else dict(before.breakdown)
        notes = [] if before is None else list(before.notes)
        with _contained(x.device) as heard:
            package = _package(logits, subject.threat, seed, self.version, x.device)
            parts, remarks = _fit(package, self.attacks, classes)
        if "square" in parts and x.shape[2] != x.shape[3]:
            remarks.append("AutoAttack: Square may not work properly on images that are not square")
        notes += [*remarks, *_worded(heard)]
        for name in parts:
            if name in breakdown:
                continue
            left = right.nonzero().squeeze(1)
            if len(left):
                images, labels = x[left].contiguous(), y[left]
                with _contained(x.device) as heard:
                    package.attacks_to_run = [name]
                    x_adv, predicted = package.run_standard_evaluation(images, labels, batch_size=len(left))
                claimed = predicted != labels
                proven = claimed & _within(x_adv, images, subject.threat)
                if self.version != "rand":
                    proven &= ~is_right(logits(x_adv), labels)
                if not torch.equal(claimed, proven):
                    notes.append(
                        f"AutoAttack: not all images that {name} claims to have broken stood our check; "
                        "they count as not broken by it"
                    )
                notes += _worded(heard)
                made, right = made.clone(), right.clone()
                made[left[proven]], right[left] = x_adv[proven], ~proven
            breakdown[name] = int(right.sum()) / len(right)
            yield Outcomes(right, dict(breakdown), tuple(dict.fromkeys(notes))), made
        if not parts:
            yield Outcomes(right, {}, tuple(dict.fromkeys(notes))), made

    def passes(self, norm: str, classes: int) -> Passes:
        """Of all sub-attacks but the first only those images that are still right.

        APGD takes 100 steps (five restarts in L1), targeted APGD and FAB up to nine times as many, FAB checks each step
        with one more forward, Square makes 5,000 queries.
        """
        nine, restarts = min(9, classes - 1), 5 if self.version == "plus" else 1
        apgd = 100 * (5 if norm == "L1" else restarts) * (20 if self.version == "rand" else 1)
        targeted, fab = 100 * (min(5, nine) if norm == "L1" else nine), 100 * restarts
        backwards = {"apgd-ce": apgd, "apgd-dlr": apgd, "apgd-t": targeted, "fab": fab * classes, "fab-t": fab * nine}
        forwards = backwards | {"fab": 2 * fab, "fab-t": 2 * fab * nine, "square": 5000}
        versions = {
            "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
            "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
            "rand": ("apgd-ce", "apgd-dlr"),
        }
        shares = {
            name: RESISTING if number else 1 for number, name in enumerate(self.attacks or versions[self.version])
        }
        forward = sum(share * forwards[name] for name, share in shares.items())
        backward = sum(share * backwards.get(name, 0) for name, share in shares.items())
        return Passes(forward=round(1 + forward), input_backward=round(backward))

    def remarks(self, breakdown: dict[str, float]) -> tuple[str, ...]:
        """The package's alarm over all images: Square, which needs no gradients, broke what gradients could not."""
        from pyautoattack import checks

        with _listening() as heard:
            checks.check_square_sr(breakdown, logger=_LOGGER)
        return _worded(heard)


def _package(logits: nn.Module, threat: ThreatModel, seed: int, version: str, device: torch.device) -> Any:
    import pyautoattack

    package = pyautoattack.AutoAttack(
        logits, norm=threat.norm, eps=threat.epsilon, seed=seed, version=version, device=device
    )
    package.verbose = False
    return package


def _fit(package: Any, attacks: tuple[str, ...], classes: int) -> tuple[list[str], list[str]]:
    """Aims the package at as many classes as there are: the sub-attacks that can run, and a note on those left out."""
    for targeted in (package.apgd_targeted, package.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    needs = {"apgd-dlr": 3, "apgd-t": 4}
    wanted = list(attacks or package.attacks_to_run)
    parts = [part for part in wanted if classes >= needs.get(part, 0)]
    left_out = [part for part in wanted if part not in parts]
    if not left_out:
        return parts, []
    reasons = " and ".join(f"{part} (its DLR loss needs {needs[part]} classes)" for part in left_out)
    ran = ", ".join(parts) or "nothing"
    return parts, [f"AutoAttack ran without {reasons}, as there are {classes}; what ran: {ran}"]


def _within(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """(B,) bool: in the ball and in the box, but for rounding."""
    tolerance = 1e-6 + 1e-5 * threat.epsilon
    flat = x_adv.flatten(1)
    in_box = ((flat >= -1e-6) & (flat <= 1 + 1e-6)).all(dim=1)
    return in_box & (threat.size(x_adv - x) <= threat.epsilon + tolerance)


@contextmanager
def _contained(device: torch.device) -> Iterator[list[str]]:
    """Gives what the package warns of, and undoes what it does to the world around it.

    It seeds torch's global generators, ends any tracing (coverage, debuggers), counts calls in a dictionary that is
    never reset, and prints.
    """
    from pyautoattack import checks

    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    trace = sys.gettrace()
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), redirect_stdout(io.StringIO()):
        try:
            with _listening() as heard:
                yield heard
        finally:
            sys.settrace(trace)


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What the package's logger warns of, instead of its reaching the terminal."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, level, propagate = Ear(logging.WARNING), _LOGGER.level, _LOGGER.propagate
    _LOGGER.addHandler(ear)
    _LOGGER.setLevel(logging.WARNING)
    _LOGGER.propagate = False
    try:
        yield heard
    finally:
        _LOGGER.removeHandler(ear)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate


def _worded(messages: list[str]) -> tuple[str, ...]:
    """The package's warnings, each once: without numbers of points, which differ from call to call, and references.

    Its warning that DLR losses are impossible is dropped: those that are, `_fit` left out, and it names others too.
    """
    messages = [re.sub(r"there are \d+ points", "there are points", message) for message in messages]
    messages = [re.sub(r"\s*See \S+ for details\.", "", message) for message in messages]
    return tuple(dict.fromkeys(f"AutoAttack: {message}" for message in messages if "it is not possible" not in message))
