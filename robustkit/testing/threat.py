"""What a threat model must do."""

from __future__ import annotations

import math

import torch

from robustkit.core.batch import Part
from robustkit.core.rng import Generator
from robustkit.core.strategy import ThreatModel
from robustkit.testing.common import check_in_ball, differ, name_of, same
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage, elsewhere
from robustkit.testing.tiny import BATCH


def check_threat(threat: ThreatModel) -> None:
    """Points stay in ball and box, image by image; `ascend` is a unit step uphill; draws come from the generator."""
    check_spec(threat)
    who = name_of(threat)
    stage = Stage.set(threat)
    batch = stage.batch()
    x = batch.x
    x[0, :, :4] = 0.0  # corners of the box
    x[1, :, :4] = 1.0
    norms = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
    assert threat.norm in norms, f"{who}: norm must be one of {', '.join(norms)}, is {threat.norm!r}"
    assert threat.epsilon > 0, f"{who}: epsilon must be above 0, is {threat.epsilon}"
    epsilon = threat.epsilon * torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1, 1.0])

    far = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    size = threat.size(far)
    expected = torch.linalg.vector_norm(far.flatten(1), ord=norms[threat.norm], dim=1)
    assert size.shape == (BATCH,), f"{who}.size must give (B,), gave {tuple(size.shape)}"
    assert torch.allclose(size, expected, rtol=1e-4), f"{who}.size is not the {threat.norm} norm"

    whole = Part(0, BATCH, BATCH)
    inside = x.clone()
    draws = [threat.random(x, epsilon, Generator(seed, whole, x.device)) for seed in (1, 1, 2)]
    with elsewhere():
        draws[1] = threat.random(x, epsilon, Generator(1, whole, x.device))
    assert torch.equal(inside, x), f"{who}.random changes its argument; work on a copy"
    check_in_ball(draws[0], x, threat, epsilon, f"{who}.random")
    differ(draws, who + ".random", drew=True)
    parts = [Part(0, 4, BATCH), Part(4, BATCH, BATCH)]
    pieces = [threat.random(x[p.start : p.stop], epsilon[p.start : p.stop], Generator(1, p, x.device)) for p in parts]
    assert torch.equal(torch.cat(pieces), draws[0]), (
        f"{who}.random draws something else when a batch is split over processes: draw by generator.uniform(x) or "
        "generator.normal(x), in the shape of all images of the call"
    )

    projected = threat.project(x + far, x, epsilon)
    check_in_ball(projected, x, threat, epsilon, f"{who}.project")
    assert torch.allclose(threat.project(inside, x, epsilon), x, atol=1e-6), f"{who}.project moves the image itself"
    again = threat.project(projected, x, epsilon)
    assert torch.allclose(again, projected, atol=1e-5), f"{who}.project moves images that are inside already"
    assert torch.equal(inside, x), f"{who}.project changes its argument; work on a copy"

    up = far.clone()
    up[2] = 0
    direction = threat.ascend(up)
    assert same(up[2], torch.zeros_like(up[2])) and torch.equal(up[0], far[0]), (
        f"{who}.ascend changes its argument; work on a copy"
    )
    assert bool((direction[2] == 0).all()), f"{who}.ascend must be zero where the gradient is zero"
    others = torch.arange(BATCH) != 2
    lengths = threat.size(direction)[others]
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4), f"{who}.ascend has lengths {lengths.tolist()}"
    uphill = (direction * up).flatten(1).sum(dim=1)[others]
    assert bool((uphill > 0).all()), f"{who}.ascend does not go uphill"
