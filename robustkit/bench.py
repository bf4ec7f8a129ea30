"""How fast is a recipe's training step, where does the time go, and how much faster is it than the usual script's?

The usual script is the same recipe in the same process, as papers' code does it: float32, NCHW, batch normalisation as
it is, and `loss.backward()` in the attack, which computes the gradients of all weights and throws them away. Steps of
the two alternate, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from robustkit.core import loop
from robustkit.core.batch import Passes
from robustkit.core.loop import train_step
from robustkit.core.parts import Parts, forward_operations
from robustkit.core.recipe import Recipe
from robustkit.core.spec import evolve
from robustkit.engine import Predictor
from robustkit.engine.memory import keeping_memory
from robustkit.opening import load_parts, make_world

WARM_UP = 1
"""Steps of each kind that are not counted: memory is fetched, kernels are chosen."""
RECORDING = 2
"""More of them, where attacks are recorded: one that shows that it comes again, one that is recorded."""
CEILING_SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Of the square matrices whose product says what the machine can do."""
CEILING_SECONDS = 0.05
"""A product that takes longer is the largest: where bfloat16 is emulated, the next ones may take a minute."""

Watch = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Bench:
    """What was measured. Times are seconds for a step; spreads are the fastest and the slowest window."""

    device: str
    path: str
    batch_size: int
    windows: int
    seconds: float
    spread: tuple[float, float]
    images_per_second: float
    passes: Passes
    units: float
    flops: float
    flops_per_second: float
    ceiling: float
    memory: int
    split: dict[str, float]
    plain_seconds: float | None
    ratio_to_plain: float | None

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self) | {"share_of_ceiling": self.flops_per_second / self.ceiling}


def bench(
    recipe: Recipe,
    *,
    device: str | None = None,
    windows: int = 3,
    steps: int = 1,
    plain: bool = True,
    watch: Watch | None = None,
) -> Bench:
    """Measures the training step of `recipe` on its own data.

    Args:
        windows, steps: the median is over so many windows of so many steps each, or more where steps cost differently.
        plain: measure the usual script's step, too.
        watch: told what is being measured.

    Raises:
        UserError: the data are missing, or there is no such device.
    """
    with keeping_memory():
        return _bench(recipe, device, windows, steps, plain, watch or (lambda text: None))


def _bench(recipe: Recipe, device: str | None, windows: int, steps: int, plain: bool, tell: Watch) -> Bench:
    world = make_world(recipe, device)
    ours = _still(load_parts(recipe, world))
    steps = -(-steps // recipe.interval) * recipe.interval  # what not every step does, in its due share
    usual = _plain_parts(recipe, ours) if plain else None
    order = ours.order(0)
    batch = order[: min(recipe.batch_size, len(order))]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(WARM_UP if ours.graphs is None else WARM_UP + RECORDING):
        tell("warming up")
        _timed(ours, batch, 1)
    memory = _peak_memory(world.device)
    if usual is not None:
        with _as_usual():
            for _ in range(WARM_UP):
                _timed(usual, batch, 1)
    fast, slow = [], []
    for window in range(windows):
        tell(f"window {window + 1} of {windows}")
        if usual is not None:
            _timed(ours, batch, 1)  # memory has been given back
        fast.append(_timed(ours, batch, steps))
        if usual is not None:
            with _as_usual():
                slow.append(_timed(usual, batch, steps))
    tell("where the time goes")
    split = _split(ours, batch)
    passes = sum(recipe.mean_passes(ours.progress).values(), Passes())
    flops = forward_operations(ours.model, ours.world) * len(batch) * passes.units
    seconds = statistics.median(fast)
    plain_seconds = statistics.median(slow) if slow else None
    ratios = [usually / quickly for quickly, usually in zip(fast, slow, strict=False)]
    tell("what the machine can do")
    return Bench(
        device=str(world.device),
        path=ours.path,
        batch_size=len(batch),
        windows=windows,
        seconds=seconds,
        spread=(min(fast), max(fast)),
        images_per_second=len(batch) / seconds,
        passes=passes,
        units=passes.units,
        flops=flops,
        flops_per_second=flops / seconds,
        ceiling=_ceiling(world.device, ours.precision.attack),
        memory=memory,
        split=split,
        plain_seconds=plain_seconds,
        ratio_to_plain=statistics.median(ratios) if ratios else None,
    )


def _still(parts: Parts) -> Parts:
    """With rates of zero: every window measures the same network, and none of them can diverge."""
    for group in parts.optimizer.param_groups:
        group["lr_scale"] = 0.0
    return parts


def _plain_parts(recipe: Recipe, ours: Parts) -> Parts:
    """The same run once more, in float32 and NCHW, without folding."""
    precision = evolve(recipe.precision, attack="fp32", outer="fp32")
    usual = _still(load_parts(evolve(recipe, precision=precision), ours.world))
    usual.model.to(memory_format=torch.contiguous_format)
    usual.folding = usual.graphs = None
    return usual


@contextmanager
def _as_usual() -> Iterator[None]:
    """Inside, attacks call `backward()`, as if weights had asked for their gradients, and images are NCHW.

    Memory is treated as usual, too.
    """
    grad, layout = torch.autograd.grad, Predictor.layout

    def backward(outputs: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(inputs, Tensor) or not inputs.is_leaf:
            return grad(outputs, inputs, *arguments, **options)
        inputs.grad = None
        torch.autograd.backward(outputs)
        found, inputs.grad = inputs.grad, None
        return (found,)

    torch.autograd.grad, Predictor.layout = backward, torch.contiguous_format
    try:
        with keeping_memory(False):
            yield
    finally:
        torch.autograd.grad, Predictor.layout = grad, layout


def _timed(parts: Parts, batch: Tensor, steps: int) -> float:
    """Seconds for a step, over so many."""
    _wait(parts.world.device)
    began = time.perf_counter()
    for _ in range(steps):
        train_step(parts, batch)
    _wait(parts.world.device)
    return (time.perf_counter() - began) / steps


def _split(parts: Parts, batch: Tensor) -> dict[str, float]:
    """Seconds of one more step, by part. What is not in another part is the outer pass with the target's forward."""
    spent = dict.fromkeys(("data", "epsilon", "attack", "target", "optimizer"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            _wait(parts.world.device)
            began, inside = time.perf_counter(), sum(spent.values())
            result = call(*arguments, **options)
            _wait(parts.world.device)
            spent[part] += time.perf_counter() - began - (sum(spent.values()) - inside)  # a target may attack, too
            return result

        return act

    module: Any = loop
    held, make_batch = dict(parts.strategies), module.make_batch
    for name in ("epsilon", "attack", "target"):
        if held[name] is not None:
            parts.strategies[name] = _Watched(held[name], name, timed)
    module.make_batch = timed("data", make_batch)
    parts.optimizer.step = timed("optimizer", parts.optimizer.step)  # type: ignore[method-assign]
    try:
        total = _timed(parts, batch, 1)
    finally:
        parts.strategies.update(held)
        module.make_batch = make_batch
        del parts.optimizer.step
    return spent | {"outer": total - sum(spent.values())}


class _Watched:
    """A strategy whose work is timed."""

    def __init__(self, inner: Any, part: str, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._inner, self._part, self._timed = inner, part, timed

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._timed(self._part, self._inner)(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "at":
            return lambda progress: _Watched(found(progress), self._part, self._timed)
        return self._timed(self._part, found) if name == "prepare" else found


def _ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product in that precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for size in CEILING_SIZES:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            _wait(device)
            began = time.perf_counter()
            matrix @ matrix
            _wait(device)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > CEILING_SECONDS:
            break
    return best


def _peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the accelerator, else of the process, where the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
