"""When a run stops before its end, and when it saves."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import attrs

from robustkit.core.parts import Parts
from robustkit.core.world import World

SAVE_EVERY_SECONDS = 600.0


@attrs.define
class Limits:
    """When to stop before the end, and the signals that ask for it."""

    max_steps: int | None = None
    deadline: float | None = None  # of time.monotonic()
    rehearsal: bool = False  # evaluate all the same where training stops at `max_steps`
    asked: str = ""  # by a signal
    saved: float = attrs.field(factory=time.monotonic)

    def reason(self, parts: Parts | None = None) -> str:
        if self.asked:
            return self.asked
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "time"
        if parts is not None and self.max_steps is not None and parts.step >= self.max_steps:
            return "steps"
        return ""

    def agreed(self, world: World, parts: Parts | None = None) -> str:
        """The reason in every process, where any process has one."""
        reason = self.reason(parts)
        return next((known for known in ("interrupt", "time", "steps") if world.any(reason == known)), "")

    def left(self) -> float | None:
        """Seconds until the deadline, None where there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def should_save(self) -> bool:
        return time.monotonic() - self.saved > SAVE_EVERY_SECONDS

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Ctrl-C asks for a stop after the step, a second one is obeyed at once; SIGTERM counts as time being up."""

        def ask(number: int, frame: Any) -> None:
            if self.asked == "interrupt" and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = "interrupt" if number == signal.SIGINT else "time"
            with suppress(OSError, RuntimeError):  # the terminal is gone, or this came in the middle of another line
                say("Stopping after this step or measure; a second interrupt stops at once")

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: nothing to listen to
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
