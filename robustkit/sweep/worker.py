"""A worker: takes a trial that nobody is at, trains it to its end, and takes the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import attrs

from robustkit.core.errors import UserError
from robustkit.core.override import override
from robustkit.core.recipe import learn_backbone
from robustkit.display import RunDisplay, Silent
from robustkit.limits import Limits
from robustkit.lock import InUseError, holder
from robustkit.reporting.together import Together
from robustkit.runs import evaluate_run, resume, run
from robustkit.sweep.folder import Sweep, Trial

LOOK_EVERY = 3.0
"""Seconds between looks for a trial, while other workers are at all that are left."""


def work(
    sweep: Sweep,
    *,
    device: str | None = None,
    max_time: float | None = None,
    retry: bool = False,
    display: Callable[[], RunDisplay] = Silent,
) -> str:
    """Works until every trial of the sweep has ended, whoever trains it. Returns why it stopped before, or "".

    As many workers as you like may be at one sweep, on every machine that sees its folder. A trial whose worker died or
    was stopped goes on from its last checkpoint. One that fails is noted, and left alone.

    Args:
        device: "cpu", "cuda:1", ... (default: the best there is).
        max_time: stop after so many seconds: "time" is returned; SIGTERM does the same, Ctrl-C gives "interrupt".
        retry: first take up once more the trials that failed.
        display: makes a display for each trial.
    """
    limits = Limits(deadline=None if max_time is None else time.monotonic() + max_time)
    speaker = display()
    if retry:
        take_up_again(sweep)
    with limits.listening(speaker.say):
        try:
            waiting = False
            while not (reason := limits.reason()):
                with _free_trial(sweep) as trial:
                    if trial is not None:
                        waiting = False
                        stopped = _train(sweep, trial, device, limits, display())
                        if stopped:
                            return stopped
                        continue
                left = [trial.name for trial in sweep.trials() if not trial.ended]
                if not left:
                    return _measure_best(sweep, device, limits, display())
                if not waiting:
                    some = f"{len(left)} trial{'' if len(left) == 1 else 's'}"
                    speaker.say(f"Other workers are at {some}; waiting for them")
                    waiting = True
                _pause(limits)
            return reason
        finally:
            speaker.end()


def _pause(limits: Limits) -> None:
    """Until the next look, or until it is time to stop."""
    until = time.monotonic() + LOOK_EVERY
    while time.monotonic() < until and not limits.reason():
        time.sleep(0.1)


def take_up_again(sweep: Sweep) -> None:
    """Trials that failed are to be done once more."""
    for trial in sweep.trials():
        if trial.ended == "failed" and (lock := sweep.claim(trial.number)) is not None:
            with lock:
                sweep.write(attrs.evolve(trial, ended="", line=""))


@contextmanager
def _free_trial(sweep: Sweep) -> Iterator[Trial | None]:
    """A trial that has not ended and that nobody is at, until it is given back; None if there is none."""
    for trial in sweep.trials():
        if trial.ended or holder(sweep.path(trial)) or (lock := sweep.claim(trial.number)) is None:
            continue  # somebody may work on its run by other commands, too
        with lock:
            trial = sweep.again(trial)  # it may have ended before we had the lock
            if not trial.ended:
                yield trial
                return
    if sweep.search is None or len(sweep.trials()) >= sweep.search.trials:
        yield None
        return
    with _drawn(sweep) as drawn:
        yield drawn


@contextmanager
def _drawn(sweep: Sweep) -> Iterator[Trial | None]:
    """The next trial of a search, ours before others see it; None if another worker is drawing, or drew the last."""
    from robustkit.sweep.search import draw

    assert sweep.search is not None
    drawing = sweep.lock("drawing")
    if drawing is None:
        yield None
        return
    with drawing:
        trial = draw(sweep) if len(sweep.trials()) < sweep.search.trials else None
        lock = None if trial is None else sweep.claim(trial.number)
        if trial is not None and lock is not None:
            sweep.write(trial)
    if lock is None:
        yield None
        return
    with lock:
        yield trial


def _train(sweep: Sweep, trial: Trial, device: str | None, limits: Limits, display: RunDisplay) -> str:
    """The trial to its end, which is written down. Returns why it stopped before, or ""."""
    from robustkit.sweep.search import Pruned, Pruner

    folder = sweep.path(trial)
    of = len(sweep.trials()) if sweep.search is None else sweep.search.trials
    display.say(f"Trial {trial.number} of {of}: {trial.name}")
    watching = Together(display, Pruner(sweep, trial)) if sweep.search is not None and sweep.search.prune else display
    try:
        if (folder / "recipe.json").is_file():
            outcome = resume(folder, device=device, max_time=limits.left(), display=watching)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # a worker died before there was anything in it
            recipe, source = sweep.recipe(trial), sweep.source(trial)
            learn_backbone(source, recipe.model)
            outcome = run(
                recipe,
                out=folder,
                source=source,
                overrides=trial.words,
                device=device,
                max_time=limits.left(),
                display=watching,
            )
    except InUseError as error:
        display.say(str(error))
        return ""
    except Pruned:
        ended = attrs.evolve(trial, ended="pruned")
    except Exception as error:  # whatever it is, the other trials are not to blame
        line = " ".join(str(error).split())
        line = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
        ended = attrs.evolve(trial, ended="failed", line=line)
        display.say(f"Trial {trial.name} failed: {line}")
    else:
        if outcome.stopped not in ("", "collapse"):
            return outcome.stopped
        ended = attrs.evolve(trial, ended="collapse" if outcome.stopped else "done")
    sweep.write(ended)
    return ""


def _measure_best(sweep: Sweep, device: str | None, limits: Limits, display: RunDisplay) -> str:
    """Of a search, what the recipe measures on test images, of the best trial alone."""
    if sweep.search is None:
        return ""
    from robustkit.sweep.search import best_trial

    best = best_trial(sweep)
    suites = () if best is None else override(sweep.bases[best.base], best.words).evaluation
    if best is None or not suites:
        return ""
    while not (reason := limits.reason()):
        lock = sweep.claim(best.number)
        if lock is not None:
            with lock, suppress(InUseError):
                folder = sweep.path(best)
                outcome = evaluate_run(folder, suite=suites, device=device, max_time=limits.left(), display=display)
                return outcome.stopped
        _pause(limits)
    return reason
