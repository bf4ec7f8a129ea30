"""Questions to all processes: who says yes, and when it is known."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from robustkit.core.world import Poll, World

ALONE = World(samples=0, training=0, classes=0, image_shape=(0, 0, 0))


@attrs.frozen(kw_only=True)
class Two(World):
    """Beside another process, which answers in turn as `other` says."""

    other: list[tuple[bool, bool]]
    size: int = 2

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.add_(torch.tensor(self.other.pop(0)))


def two(*other: tuple[bool, bool]) -> Two:
    return Two(**attrs.asdict(ALONE, filter=lambda field, _: field.name != "size"), other=list(other))


def test_one_process_asks_itself() -> None:
    assert Poll(ALONE)(True, False) == (True, False)


def test_any_yes_counts_at_once() -> None:
    poll = Poll(two((False, True), (False, False), (True, True)))
    assert [poll(False, False), poll(True, False), poll(True, True)] == [(False, True), (True, False), (True, True)]


def test_on_several_gpus_answers_come_one_call_later(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []

    class Event:
        def record(self) -> None: ...

        def synchronize(self) -> None:
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    poll = Poll(two((False, True), (False, False), (False, False)))
    poll._later = True
    assert poll(False, False) == (False, False) and not waited  # nobody waits for the step that has just begun
    assert poll(True, False) == (False, True)
    assert poll(False, False) == (True, False)
    assert len(waited) == 2
