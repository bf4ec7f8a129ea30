"""What every measure shares: a module as a function to logits, when it is right, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustkit.core.batch import Output
from robustkit.core.model import RobustModel


class LogitsOf(nn.Module):
    """Images (B, C, H, W) -> logits (B, K) float32, of a module that returns logits, or an Output as ours do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.module, RobustModel):  # the layout of the prediction path; other modules may not take it
            images = images.contiguous(memory_format=torch.channels_last)
        output = self.module(images)
        logits: Tensor = output.logits if isinstance(output, Output) else output
        return logits.float()


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the largest logit is the true one. NaN is never right (argmax would make it class 0, or whichever)."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards, every module is in the mode, and every parameter in the need of gradients, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in needs:
            parameter.requires_grad_(needed)
