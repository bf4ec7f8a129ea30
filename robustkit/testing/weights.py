"""What a weight perturbation must do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Passes
from robustkit.core.strategy import WeightPerturbation
from robustkit.testing.common import CHARGE, name_of, same, same_state
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage, Stop, elsewhere
from robustkit.testing.tiny import EPOCHS, STEPS


def check_weights(weights: WeightPerturbation) -> None:
    """The displacement is taken back, a step made inside is kept, and nothing else of the model changes."""
    check_spec(weights)
    who = name_of(weights)
    for step in range(0, EPOCHS * STEPS, STEPS):
        seen = []
        for inside in ("nothing", "a step", "an error"):
            stage = Stage.set()
            with elsewhere():
                seen.append(_check_displaced(weights, stage, step, inside, f"{who} around {inside}"))
        assert same_state(seen[0], seen[1]) and same_state(seen[0], seen[2]), (
            f"{who}: three equal steps have three displacements; seed what is drawn by progress.step alone"
        )


def _check_displaced(weights: WeightPerturbation, stage: Stage, step: int, inside: str, who: str) -> dict[str, Tensor]:
    """The weights inside."""
    batch, progress, model = stage.batch(step), stage.progress(step), stage.model
    model.train()
    asked = 0

    def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
        nonlocal asked
        asked += 1
        with model.using("train-frozen"), torch.enable_grad():
            value = F.cross_entropy(model(batch.x).logits, batch.y)
            return list(torch.autograd.grad(value, parameters))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    try:
        with weights.displaced(model, gradients, progress):
            displaced = {name: p.detach().clone() for name, p in model.named_parameters()}
            if inside == "a step":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.125)
            if inside == "an error":
                raise Stop
    except Stop:
        assert inside == "an error"
    else:
        assert inside != "an error", f"{who} hides the error"
    kept = 0.125 if inside == "a step" else 0.0
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] + kept, rtol=1e-5, atol=1e-6), (
            f"{who} leaves {name} elsewhere; take back in `finally:` what was added, and keep a step made inside"
        )
        assert same(parameter.grad, held[name]), f"{who} changes the gradient of {name}"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), f"{who} changes the buffer {name}"
    assert model.training, f"{who} changes the model's mode"
    pure = Passes(forward=1, parameter_backward=1)
    declared = weights.passes(progress, pure)
    counted = sum([pure] * asked, Passes())
    assert declared == counted, f"{who} declares {declared}, but makes {counted}; {CHARGE}"
    return displaced
