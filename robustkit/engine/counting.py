"""Count what a step really does: forwards, input-only backwards, parameter backwards, weighed by images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor, nn

from robustkit.core.batch import Output, Passes


@attrs.define
class Count:
    """Images that went through each kind of pass."""

    forward: int = 0
    input_backward: int = 0
    parameter_backward: int = 0

    def per_batch(self, batch_size: int) -> Passes:
        """Passes over a batch of that size."""
        return Passes(
            round(self.forward / batch_size),
            round(self.input_backward / batch_size),
            round(self.parameter_backward / batch_size),
        )


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Count]:
    """Counts the model's passes inside. A backward through a forward whose images need gradients is input-only."""
    count = Count()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Output) -> None:
        images: Tensor = inputs[0]
        count.forward += len(images)
        kind = "input_backward" if images.requires_grad else "parameter_backward"
        pending = [True]  # one backward may reach logits, margined and features alike; it is one pass

        def backward(gradient: Tensor) -> None:
            if pending:
                pending.clear()
                setattr(count, kind, getattr(count, kind) + len(images))

        for tensor in {id(t): t for t in (output.logits, output.margined, output.features)}.values():
            if tensor.requires_grad:
                tensor.register_hook(backward)  # type: ignore[no-untyped-call]

    handle = model.register_forward_hook(after)
    try:
        yield count
    finally:
        handle.remove()
