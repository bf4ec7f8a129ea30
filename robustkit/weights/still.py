"""The weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from robustkit.core.batch import Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Gradients


@registry("weights").register("still")
@spec
class Still:
    """The weights stay where they are: an ordinary step."""

    accumulates: ClassVar[bool] = True

    @contextmanager
    def displaced(self, model: nn.Module, gradients: Gradients, progress: Progress) -> Iterator[None]:
        yield

    def passes(self, progress: Progress, pure: Passes) -> Passes:
        return Passes()
