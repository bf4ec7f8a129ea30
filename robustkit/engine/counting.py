"""Count what a step really does: forwards, input-only backwards, parameter backwards, weighed by images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from robustkit.core.batch import Output, Passes
from robustkit.core.model import RobustModel


@attrs.define
class Count:
    """Images that went through each kind of pass."""

    forward: int = 0
    input_backward: int = 0
    parameter_backward: int = 0

    def per_batch(self, batch_size: int) -> Passes:
        """Passes over a batch of that size."""
        counts = (self.forward, self.input_backward, self.parameter_backward)
        return Passes(*(n // batch_size if n % batch_size == 0 else n / batch_size for n in counts))


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Count]:
    """Counts passes inside, of the model and of any other network beside it (a helper, a teacher).

    A backward through a forward whose images need gradients is input-only. Where that gradient keeps its graph and is
    differentiated in turn (GradAlign), the second backward counts as two to the parameters: it goes back through the
    gradient's graph and then through the forward's, each time to activations and weights.
    """
    count = Count()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Output) -> None:
        if module is not model and not isinstance(module, RobustModel):
            return
        images: Tensor = inputs[0]
        count.forward += len(images)
        kind = "input_backward" if images.requires_grad else "parameter_backward"
        seen: set[str] = set()  # one backward may reach logits, margined and features alike; it is one pass

        def once(what: str, field: str, passes: int = 1) -> None:
            if what not in seen:
                seen.add(what)
                setattr(count, field, getattr(count, field) + passes * len(images))

        def backward(gradient: Tensor) -> None:
            keeps_graph = torch.is_grad_enabled()
            if "graph" in seen and not keeps_graph:
                once("second", "parameter_backward", 2)
            once("first", kind)
            if keeps_graph:
                seen.add("graph")

        for tensor in {id(t): t for t in (output.logits, output.margined, output.features)}.values():
            if tensor.requires_grad:
                tensor.register_hook(backward)  # type: ignore[no-untyped-call]

    handle = register_module_forward_hook(after)
    try:
        yield count
    finally:
        handle.remove()
