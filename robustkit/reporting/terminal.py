"""A run on the terminal: a bar that moves with every step, a line for every epoch, a bar for every measure.

Where standard error is no terminal (a log file, a pipe) the bar becomes a plain line every ten seconds. In a notebook
(see `notebook`) lines and bar go to the cell.
"""

from __future__ import annotations

import os
import time
from collections import deque
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from robustkit.core.batch import Progress
from robustkit.core.collapse import Seen
from robustkit.core.overfitting import WINDOW
from robustkit.core.parts import Parts, Totals
from robustkit.core.recipe import Recipe
from robustkit.core.spec import digest
from robustkit.display import RunDisplay, Silent
from robustkit.evaluation.evaluate import News
from robustkit.reporting import consoles, formats

if TYPE_CHECKING:
    from robustkit.reporting.notebook import Cell

LOOK_EVERY = 0.5
"""Seconds between looks at the loss: each look waits for the device."""

LINE_EVERY = 10.0
"""Seconds between plain lines."""

_HEADINGS = ("epoch", "loss", "held out:", "natural", "robust", "training:", "natural", "robust", "lr", "time")
_WIDTHS = (9, 8, 11, 8, 7, 11, 8, 7, 10, 10)


def run_display(*, quiet: bool = False) -> RunDisplay:
    """Who watches a run on this process: nobody but on the first of several."""
    return Silent() if quiet or os.environ.get("RANK", "0") != "0" else TerminalDisplay(consoles.messages())


class TerminalDisplay:
    """Shows a run on `console`, and its bar in the cell of a notebook where there is one."""

    def __init__(self, console: Console, cell: Cell | None = None) -> None:
        self.console, self._cell = console, cell
        self.folder: Path | None = None
        self.animated = cell is not None or consoles.moves(console)
        self._live: Live | Cell | None = None
        self._bar = Bar()
        self._parts: Parts | None = None
        self._began = 0.0  # of this session's training, and the steps it found done
        self._first_step = 0
        self._mark: float | None = None  # when the last step ended; None: something else came between
        self._durations: deque[float] = deque(maxlen=50)
        self._next_look = 0.0
        self._next_line = 0.0
        self._measured: tuple[str, str] = ("", "")

    def begin(self, recipe: Recipe, folder: Path, parts: Parts) -> None:
        total = recipe.epochs * parts.steps_per_epoch
        parameters = sum(parameter.numel() for parameter in parts.model.parameters())
        self.say(
            f"{folder}: recipe {digest(recipe)}, {recipe.model.backbone} with {parameters:,} parameters on "
            f"{parts.world.device}, {recipe.epochs} epochs of {parts.steps_per_epoch} steps, "
            f"{len(parts.rows):,} training images, {len(parts.validation_rows):,} held out"
        )
        self.folder = self.folder or folder  # a control's lies inside
        self._parts, self._first_step = parts, parts.step
        self._began, self._mark = time.monotonic(), time.monotonic()
        self._durations.clear()
        if parts.step:
            self.say("Training is finished" if parts.finished else f"Going on after step {parts.step} of {total}")
        if not parts.finished:
            self.say("".join(f"{heading:>{width}}" for heading, width in zip(_HEADINGS, _WIDTHS, strict=True)))
            self._show(f"epoch {parts.progress.epoch + 1}/{recipe.epochs}", parts.step, total, "first step")
            self._next_line = self._began + LINE_EVERY

    def step(self, progress: Progress, totals: Totals) -> None:
        assert self._parts is not None
        now = time.monotonic()
        if self._mark is not None:
            self._durations.append(now - self._mark)
        self._mark = now
        if now < self._next_look and self.animated:
            return
        first = progress.step == self._first_step
        if not self.animated and now < self._next_line and not first:
            return
        self._next_line = now + LINE_EVERY
        done, total = progress.step + 1, progress.total_steps
        in_epoch = done - progress.epoch * progress.steps_per_epoch
        left = (now - self._began) / (done - self._first_step) * (total - done)
        title = f"epoch {progress.epoch + 1}/{progress.epochs}  step {in_epoch}/{progress.steps_per_epoch}"
        self._show(title, done, total, f"{formats.duration(left)} left", self._details(totals))
        self._next_look = time.monotonic() + LOOK_EVERY

    def epoch(self, report: dict[str, Any]) -> None:
        assert self._parts is not None
        recipe, validation, training = self._parts.recipe, report.get("validation", {}), report.get("training", {})
        shares = [
            f"{formats.percent(part[name])} %" if name in part else "-"
            for part in (validation, training)
            for name in ("natural", "robust")
        ]
        cells = [
            f"{report['epoch']}/{recipe.epochs}",
            f"{report['train']['objective']:.4f}",
            "",
            *shares[:2],
            "",
            *shares[2:],
            f"{report['lr']:.3g}",
            formats.duration(report["seconds"]),
        ]
        remark = "  best" if self._parts.best.get("epoch") == report["epoch"] else ""
        remark = "  collapsed" if "collapse" in report else remark
        self.say("".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + remark)
        if self._parts.best.get("collapse") == report["epoch"]:
            self.say(_collapse(report, recipe))
        if self._parts.course.get("leap", -1) == report.get("step"):
            self.say(_leap(report))
        if self._parts.course.get("overfitting") == report["epoch"]:
            self.say(_overfitting(report))
        self._mark = time.monotonic()  # what validation took is not the next step's

    def measuring(self, checkpoint: str, key: str, news: News) -> None:
        now = time.monotonic()
        if self._measured != (checkpoint, key):
            self._measured, self._began, self._next_line = (checkpoint, key), now, now + LINE_EVERY
        elif not self.animated and news.done < news.total and now < self._next_line:
            return
        self._next_line = now + LINE_EVERY
        took, left, details = now - self._began, "", ""
        if 0 < news.done < news.total:
            left = f"{formats.duration(took / news.done * (news.total - news.done))} left"
        elif news.judged:
            left = formats.duration(took)
        if news.judged:
            bound = "at most " if news.stage else ""
            details = f"accuracy {bound}{formats.percent(news.right / news.judged)} % on {news.judged} images"
            details += f", after {news.stage}" if news.stage else ""
        self._show(f"measuring {checkpoint}: {key}", news.done, news.total, left, details)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _details(self, totals: Totals) -> str:
        assert self._parts is not None
        means = totals.means()
        terms = {name.removeprefix("term "): value for name, value in means.items() if name.startswith("term ")}
        pace = len(self._durations) / max(1e-9, sum(self._durations))
        shown = [f"{pace * self._parts.recipe.batch_size:,.0f} images/s", f"loss {means['objective']:.3f}"]
        if len(terms) > 1:
            shown += [f"{name} {value:.3f}" for name, value in terms.items()]
        if self._parts.recipe.attack is not None:
            shown.append(f"epsilon {formats.in_255ths(means['epsilon'])}")
        return "  ".join(shown)

    def _show(self, title: str, done: int, total: int, left: str, details: str = "") -> None:
        if not self.animated:
            count = f"{100 * done / total:.0f} %" if total else ""
            self.say("  ".join(part for part in (title, count, left, details) if part))
            return
        self._bar = Bar(title, done, total, left, details)
        if self._live is None:
            self._live = self._cell or Live(self._bar, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(self._bar)


def _collapse(report: dict[str, Any], recipe: Recipe) -> str:
    """What to say when robustness has collapsed."""
    before, now = report["collapse"], report["validation"]
    falls, stays = (f"{formats.percent(now[name])} % (from {formats.percent(before[name])} %)" for name in Seen._fields)
    end = "training ends here" if recipe.validation.on_collapse == "stop" else "training goes on"
    return (
        f"Catastrophic overfitting: since epoch {before['epoch']}, accuracy under the validation attack fell to {falls}"
        f", under FGSM it is {stays}; checkpoints/best keeps epoch {before['epoch']}, {end}. "
        "Remedies: a smaller radius, loss=grad-align, attack=n-fgsm, attack=pgd"
    )


def _leap(report: dict[str, Any]) -> str:
    """What to say when a gradient was far longer than usual."""
    gradient = report["gradient"]
    return (
        f"Gradients leap: in step {gradient['step']} their norm is {gradient['largest']:.3g}, {gradient['leap']:.3g} "
        f"times the usual one, see gradient in metrics.jsonl. Remedies: a lower optimizer.lr, a warm-up, "
        f"optimizer.clip_norm={gradient['largest'] / gradient['leap']:.2g}"
    )


def _overfitting(report: dict[str, Any]) -> str:
    """What to say when training has begun to cost robustness."""
    best, now = report["overfitting"]["best"], report["overfitting"]["now"]
    held_out, trained = (
        f"{formats.percent(now[k])} % (from {formats.percent(best[k])} %)" for k in ("robust", "training")
    )
    return (
        f"Robust overfitting: since epoch {best['epoch']}, accuracy under the validation attack fell to {held_out} on "
        f"held-out images and rose to {trained} on those trained on, means of {WINDOW} epochs; checkpoints/best is the "
        "one to use. Remedies: fewer epochs, weights=awp, average=exponential, more data"
    )


class Bar:
    """Two lines: title, bar, share and time left; below them the numbers. Long lines are cut, never wrapped."""

    def __init__(self, title: str = "", done: int = 0, total: int = 0, left: str = "", details: str = "") -> None:
        self.title, self.done, self.total, self.left, self.details = title, done, total, left, details

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Table.grid(padding=(0, 1), expand=True)
        for _ in range(3):
            line.add_column(no_wrap=True)
        line.columns[1].ratio = 1
        pulse = self.done == 0
        bar = ProgressBar(total=self.total or None, completed=self.done, pulse=pulse)
        line.add_row(self.title, bar, self._share)
        yield line
        yield Text(self.details, no_wrap=True, overflow="ellipsis", style="dim")

    def as_html(self) -> str:
        """The same for a browser."""
        value = f' value="{self.done}" max="{self.total}"' if self.done else ""
        line = f"{escape(self.title)}  <progress{value}></progress>  {escape(self._share)}"
        style = "white-space: pre; font-family: monospace"
        return f'<div style="{style}">{line}\n<span style="opacity: 0.6">{escape(self.details)}</span></div>'

    @property
    def _share(self) -> str:
        return f"{100 * self.done / self.total:3.0f} %  {self.left}" if self.total else self.left
