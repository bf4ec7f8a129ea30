"""The prediction path: how attacks, targets and evaluation see the model.

Attacks differentiate with respect to images only (`torch.autograd.grad(value, images)`), so parameters never collect
gradients here and nothing passes through a data-parallel wrapper. Precision and memory format are decided in this
file; what comes back is float32 in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustkit.core.batch import Mode, Output
from robustkit.core.model import RobustModel
from robustkit.engine.folding import Folding
from robustkit.engine.graphs import Graphs


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast where `precision` is "bf16", else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def float_output(output: Output) -> Output:
    """Logits and the penalty in float32: softmax, KL and entropies are never taken in half precision."""
    logits = output.logits.float()
    margined = logits if output.margined is output.logits else output.margined.float()
    return Output(logits, margined, output.features.float(), output.penalty.float())


class Predictor:
    """`predict(images) -> Output` over a model, in channels-last layout and the given precision.

    Given a folding of its backbone, it takes that in eval mode: gradients then reach images only. Given graphs, what
    is done `repeatedly` in eval mode is recorded and replayed.
    """

    layout: ClassVar[torch.memory_format] = torch.channels_last

    def __init__(
        self,
        model: RobustModel,
        device: torch.device,
        precision: str = "fp32",
        folding: Folding | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.device, self.precision, self.folding, self.graphs = model, device, precision, folding, graphs
        self._backbone: nn.Module | None = None

    def __call__(self, images: Tensor, y: Tensor | None = None) -> Output:
        """Labels (B,) are for the pure pass alone, where the head may apply its margin."""
        with autocast(self.device, self.precision):
            return float_output(self.model(images.contiguous(memory_format=self.layout), y, self._backbone))

    def repeatedly(self, key: Hashable, function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> Tensor:
        """`function(*tensors)`, which forwards through here, and does the same whenever `key` is the same."""
        if self.graphs is None or self.model.training:
            return function(*tensors)
        return self.graphs((key, self.precision), function, tensors)

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Predictor]:
        before = self._backbone
        with self.model.using(mode), _repeatable(mode == "eval" and self.device.type == "cuda"):
            self._backbone = None
            if self.folding is not None and mode == "eval":  # folded anew: weights may have changed since
                self._backbone = self.folding.refresh(torch.bfloat16 if self.precision == "bf16" else None)
            try:
                yield self
            finally:
                self._backbone = before


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """A GPU's convolutions give the same twice: a recording counts only if it does what the plain attack did."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class ModulePredictor:
    """`predict` over any module that maps images in [0, 1] to logits, or to an Output: for models made elsewhere.

    `forward` is how, where it is not the module itself.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Output | Tensor] | None = None) -> None:
        self.module, self.forward = module, forward or module

    def __call__(self, images: Tensor) -> Output:
        output = self.forward(images)
        if isinstance(output, Output):
            return float_output(output)
        logits = output.float()
        return Output(logits, logits, logits, logits.new_zeros(len(logits)))

    @contextmanager
    def using(self, mode: Mode) -> Iterator[ModulePredictor]:
        training = self.module.training
        self.module.train(mode != "eval")
        try:
            yield self
        finally:
            self.module.train(training)
