"""What a head must do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from robustkit.core.batch import Output, Progress
from robustkit.core.strategy import Head
from robustkit.testing.common import name_of, same_state, state_of
from robustkit.testing.spec import check_spec
from robustkit.testing.tiny import BATCH, CLASSES, EPOCHS, STEPS, WIDTH


def check_head(head: Head) -> None:
    """Finite logits, a margin only where labels are given, rows that do not mix, state in parameters and buffers."""
    check_spec(head)
    who = name_of(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = head.build(WIDTH, CLASSES)
        torch.manual_seed(0)
        twin = head.build(WIDTH, CLASSES)
        torch.manual_seed(1)
        other = head.build(WIDTH, CLASSES)
    assert same_state(state_of(module), state_of(twin)), (
        f"{who}.build does not draw from torch's seeded generator alone; initialise by torch.nn.init"
    )
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(BATCH, WIDTH, generator=generator).requires_grad_()
    y = torch.arange(BATCH) % CLASSES
    plain, labelled = module(features), module(features, y)
    shapes = {"logits": (BATCH, CLASSES), "margined": (BATCH, CLASSES), "features": (BATCH, WIDTH), "penalty": (BATCH,)}
    for output in (plain, labelled):
        assert isinstance(output, Output), f"{who} must give an Output, gave {type(output).__name__}"
        for name, shape in shapes.items():
            value = getattr(output, name)
            remedy = "see core.batch.Output for its fields"
            assert value.shape == shape, f"{who}: {name} must be {shape}, is {tuple(value.shape)}; {remedy}"
            assert value.dtype == torch.float32, f"{who}: {name} must be float32, is {value.dtype}; {remedy}"
            assert bool(value.isfinite().all()), f"{who}: {name} is not finite"
    assert torch.equal(plain.logits, plain.margined), f"{who}: the margin applies although no label was given"
    assert torch.equal(plain.logits, labelled.logits), f"{who}: logits depend on the label; put margins in `margined`"
    half = module(features[:2], y[:2])
    for name in shapes:
        assert torch.allclose(getattr(half, name), getattr(labelled, name)[:2], atol=1e-5), (
            f"{who}: {name} of an image depends on the other images"
        )
    value = F.cross_entropy(labelled.margined, y) + labelled.penalty.mean()
    gradients = torch.autograd.grad(value, [features, *module.parameters()], allow_unused=True)
    for name, gradient in zip(["the features", *(n for n, _ in module.named_parameters())], gradients, strict=True):
        assert gradient is not None and bool(gradient.isfinite().all()), f"{who}: no finite gradient for {name}"
    other.load_state_dict(state_of(module))
    assert torch.equal(other(features).logits, plain.logits), f"{who}: part of its state is not in state_dict()"
    with torch.autocast("cpu", torch.bfloat16):
        low = module(features.detach().bfloat16(), y)
    for name in shapes:
        assert bool(getattr(low, name).isfinite().all()), f"{who}: {name} is not finite under bfloat16"
    for epoch in range(EPOCHS):
        weight = head.penalty_weight(Progress.at(epoch * STEPS, EPOCHS, STEPS))
        assert math.isfinite(weight) and weight >= 0, f"{who}: the penalty weighs {weight} in epoch {epoch}"
    unknown = set(head.parameter_options()) - {"lr_scale", "weight_decay"}
    assert not unknown, f"{who}: unknown options for the optimiser: {', '.join(sorted(unknown))}"
