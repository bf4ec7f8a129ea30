"""What several checks compare, and what to do about the commonest faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.batch import Mode, Output
from robustkit.core.spec import evolve
from robustkit.core.strategy import ThreatModel, build
from robustkit.core.world import World

DRAW = "draw from the generator that is given (`generator`, `scene.generator(purpose)`) and from nothing else"
KEEP = "keep what is remembered in buffers (register_buffer), and draw from scene.generator(purpose) alone"
CHARGE = "let `passes` say what is forwarded and differentiated, no more and no less"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def state_of(part: Any) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in part.state_dict().items()} if isinstance(part, nn.Module) else {}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def _in_mode(strategy: Any, mode: Mode) -> Any:
    """The strategy with every `mode` setting in it, and in the strategies it wraps, set to `mode`."""
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(strategy)):
        value = getattr(strategy, field.name)
        if field.name == "mode":
            changes["mode"] = mode
        elif attrs.has(type(value)):
            changes[field.name] = _in_mode(value, mode)
    return evolve(strategy, **changes)


def variants(strategy: Any) -> list[Any]:
    """The strategy, and itself in the other modes that it can be told to use."""
    return list(dict.fromkeys([strategy, *(_in_mode(strategy, mode) for mode in get_args(Mode))]))


def mode_of(strategy: Any) -> Mode | None:
    return getattr(strategy, "mode", None)


def name_of(strategy: Any) -> str:
    text = repr(strategy)
    return text if len(text) <= 120 else type(strategy).__name__


def listed(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())


def rebuilt(strategy: Any, world: World, runtime: Any) -> Any:
    """A fresh runtime with the other's state, as a resumed run would have it."""
    fresh = build(strategy, world)
    if isinstance(runtime, nn.Module):
        fresh.load_state_dict(state_of(runtime))
    return fresh


def differ(three: Sequence[Tensor], who: str, *, drew: bool) -> None:
    """Results under seeds a, a, b."""
    assert torch.equal(three[0], three[1]), f"{who} gives different results under the same seed; {DRAW}"
    if drew:
        assert not torch.equal(three[0], three[2]), f"{who} draws, but gives the same under another seed"


def check_images(images: Tensor, like: Tensor, who: str) -> None:
    remedy = "give an image for each of `x`, of its shape and type"
    assert isinstance(images, Tensor), f"{who} must give a tensor, gave {type(images).__name__}; {remedy}"
    assert images.shape == like.shape, f"{who} must give {tuple(like.shape)}, gave {tuple(images.shape)}; {remedy}"
    assert images.dtype == like.dtype, f"{who} must give {like.dtype}, gave {images.dtype}; {remedy}"
    assert not images.requires_grad, f"{who} must give detached images; give images.detach()"
    assert bool(images.isfinite().all()), f"{who} gave numbers that are not finite"
    low, high = images.min().item(), images.max().item()
    assert low >= 0 and high <= 1, f"{who} left the box [0, 1]: pixels range from {low:g} to {high:g}; clamp last"


def check_in_ball(x_adv: Tensor, x: Tensor, threat: ThreatModel, radius: Tensor, who: str) -> None:
    check_images(x_adv, x, who)
    sizes = threat.size(x_adv - x)
    excess = sizes - radius
    assert bool((excess <= 1e-5 + 1e-4 * radius).all()), (
        f"{who} left the ball: {threat.norm} distances {listed(sizes)} for radii {listed(radius)}; bring images back "
        "into the ball of their own radius (an attack: by threat.project)"
    )


def cut_rows(output: Output, rows: slice) -> Output:
    return Output(*(value[rows] for value in output))
