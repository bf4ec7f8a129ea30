"""What every measure shares: a module as a function to logits, when it is right, and leaving it as it was found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from robustkit.core.batch import Output
from robustkit.core.model import RobustModel
from robustkit.core.strategy import Outcomes, Subject, ThreatModel
from robustkit.engine.folding import Folding, close, fold
from robustkit.engine.memory import keeping_memory
from robustkit.engine.predictor import ModulePredictor
from robustkit.functional import is_right as is_right

NOT_FINITE = "the model returned NaN or infinity on the way: attacks cannot follow that, accuracy may be too high"


class LogitsOf(nn.Module):
    """Images (B, C, H, W) -> logits (B, K) float32, of a module that returns logits, or an Output as ours do.

    As it is; or, once `quicken` has found a faster way that gives the same logits, that way. `broken` says whether any
    logits since it was last None were NaN or infinite, on finite images; it stays on the device until somebody asks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.layout = torch.contiguous_format
        self.folding: Folding | None = None
        self.broken: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        output = self.output(images)
        logits: Tensor = output.logits if isinstance(output, Output) else output
        return logits.float()

    def output(self, images: Tensor) -> Output | Tensor:
        """What the module itself returns."""
        images = images.contiguous(memory_format=self.layout)
        folded = self.folding is not None and not self.module.training
        output: Output | Tensor = (self.folding.twin if folded else self.module)(images)  # type: ignore[union-attr]
        logits = output.logits if isinstance(output, Output) else output
        if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(images):  # else it will be refused
            broken = (~_finite(logits.detach()) & _finite(images.detach())).any()
            self.broken = broken if self.broken is None else self.broken | broken
        return output

    @property
    def path(self) -> str:
        """How it forwards, in words."""
        layout = "channels-last" if self.layout is torch.channels_last else "as given"
        folded = "" if self.folding is None else f", {self.folding.folded} batch normalisations folded"
        return f"float32, {layout}{folded}"

    @torch.no_grad()
    def quicken(self, images: Tensor) -> None:
        """Tries channels-last layout and folded batch normalisation on `images`, and keeps what gives the same logits.

        A model that is randomised, or rounds, may not give the same logits twice: it stays as it is. So does one that
        is compiled already.
        """
        if any(isinstance(part, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule)) for part in self.modules()):
            return
        try:
            plain = self(images)
        except (RuntimeError, TypeError, AttributeError):  # no such images, no logits: whoever judges it will say so
            return
        self.layout = torch.channels_last
        try:
            same = close(self(images), plain)
        except RuntimeError:  # somebody views activations as if they were contiguous
            same = False
        if not same:
            self.layout = torch.contiguous_format
        try:
            self.folding = fold(self.module, images.contiguous(memory_format=self.layout))
        except RuntimeError:
            self.folding = None


@contextmanager
def judging(model: nn.Module, threat: ThreatModel, images: Tensor, *, exact: bool = False) -> Iterator[Subject]:
    """The model as measures see it: in eval mode and float32, without gradients for its parameters.

    Afterwards it is as it was. `images` (B, C, H, W) are a few that a faster way may be tried on; with `exact` the
    model forwards as if it were called by hand.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # attacks differentiate, whatever the caller is in
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(images.device.type, enabled=False))
        stack.enter_context(keeping_memory(not exact))
        if exact and isinstance(model, RobustModel):  # training keeps ours in another layout than files do
            model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        stack.enter_context(as_found(model))
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        logits = LogitsOf(model)
        if not exact:
            stack.enter_context(_full_float32())
            logits.quicken(images)
        yield Subject(predict=ModulePredictor(logits, logits.output), logits=logits, threat=threat)


def _finite(values: Tensor) -> Tensor:
    """(B,) bool, of (B, ...)."""
    return values.isfinite().flatten(1).all(dim=1)


def with_warning(outcomes: Outcomes, logits: nn.Module) -> Outcomes:
    """With a note where the model returned what is not finite, to the measure or to its attack."""
    if not isinstance(logits, LogitsOf) or logits.broken is None or not bool(logits.broken):
        return outcomes
    return outcomes._replace(notes=tuple(dict.fromkeys([*outcomes.notes, NOT_FINITE])))


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


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 that is float32: without the shortened mantissa that GPUs take for it by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
