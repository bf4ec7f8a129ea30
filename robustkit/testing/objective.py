"""What an objective must do."""

from __future__ import annotations

import torch

from robustkit.core.strategy import Objective, Reference
from robustkit.testing.common import cut_rows, name_of
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage
from robustkit.testing.tiny import BATCH


def check_objective(objective: Objective) -> None:
    """One finite number for each image, of that image's output alone, with a gradient."""
    check_spec(objective)
    who, stage = name_of(objective), Stage.set()
    batch = stage.batch()
    reference = Reference()
    with stage.predict().using("eval") as predict:
        if objective.needs_reference:
            with torch.no_grad():
                reference = Reference(natural=predict(batch.x), adversarial=predict(stage.adversarial(batch, 1)))
        images = stage.adversarial(batch).requires_grad_()
        output = predict(images)
        values = objective(output, batch.y, reference)
    remedy = "give a number for each image, no mean or sum"
    assert values.shape == (BATCH,), f"{who} must give (B,), gave {tuple(values.shape)}; {remedy}"
    assert bool(values.isfinite().all()), f"{who} gave numbers that are not finite"
    (gradient,) = torch.autograd.grad(values[1], images)
    assert bool((gradient[torch.arange(BATCH) != 1] == 0).all()), f"{who}: an image's value depends on other images"
    two = slice(0, 2)
    first = objective(cut_rows(output, two), batch.y[two], Reference(*(o and cut_rows(o, two) for o in reference)))
    assert torch.allclose(first, values[two], atol=1e-6), f"{who}: an image's value depends on other images"
