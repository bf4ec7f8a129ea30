"""A training step on an accelerator that is not there.

torch's device "meta" has tensors of every shape and no numbers in them. A step on it costs next to nothing, and shows
on any machine what a GPU would suffer from: tensors left on the CPU, and moments in which the host waits for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import robustkit
from robustkit.core.errors import UserError
from robustkit.core.faults import Evidence
from robustkit.core.loop import train_step
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.spec import walk
from robustkit.core.world import World
from robustkit.opening import load_parts
from robustkit.testing.common import name_of
from robustkit.testing.spec import kind_of
from robustkit.testing.tiny import tiny_recipe

ELSEWHERE = torch.device("meta")
FIELDS = ("threat", "epsilon", "attack", "objective", "target", "head", "loss", "weights", "average", "optimizer")
"""Kinds that have a part in a step."""

_MIX = "make tensors on the device of those they meet (torch.zeros_like, x.new_full, device=x.device)"
_ASK = "compute with tensors (torch.where, masks as factors) instead of asking them, or declare `waits = True`"
_MAKE = "make it of a shape there (x.new_full, torch.arange(..., device=x.device)), or once, in build"
_MOVE = "move it once, in build, or with non_blocking=True"
_HOLD = "move it before, and give it to `repeatedly` among the tensors"


class _Fault(BaseException):
    """Not an Exception: nobody on the way may take it for one of theirs."""


class _Wait(_Fault):
    """One that a strategy may allow itself, if it says so."""


def check_device(strategy: Any) -> None:
    """Steps of a tiny recipe with the strategy leave no tensor behind on the CPU, and wait for no device.

    Raises:
        AssertionError: one does; the sentence says where.
    """
    kind = kind_of(strategy)
    if kind not in FIELDS:
        return
    within = registry("attack").get("pgd")
    try:
        recipe = tiny_recipe(attack=within(steps=2, objective=strategy)) if kind == "objective" else None
        recipe = recipe or tiny_recipe(**{kind: strategy})
    except UserError:  # it needs more beside it: see `check_steps`
        return
    check_steps(recipe, name_of(strategy))


def check_steps(recipe: Recipe, who: str) -> None:
    """As `check_device`, of a whole recipe: its first step, one in the middle of training, and the last.

    A step is looked at up to where a strategy waits that says it does (`waits`), or to an operation that torch cannot
    do without numbers.
    """
    may_wait = any(getattr(part, "waits", False) for _, part in walk(recipe))
    with _elsewhere():
        parts = load_parts(recipe, World(samples=0, training=0, classes=0, image_shape=(0, 0, 0), device=ELSEWHERE))
        for part in parts.strategies.values():
            if hasattr(part, "ready"):
                part.ready()
        watching = _Watching()  # type: ignore[no-untyped-call]
        parts.watch = _Blind()  # type: ignore[assignment]  # which waits a step later, on purpose
        parts.graphs = _Held(watching)  # type: ignore[assignment]
        total = recipe.epochs * parts.steps_per_epoch
        for step in sorted({0, total // 2, total - 1}):
            parts.step = step
            first = step % parts.steps_per_epoch * recipe.batch_size
            rows = parts.order(parts.progress.epoch)[first : first + recipe.batch_size]
            try:
                with _Making(watching), watching:
                    train_step(parts, rows)
            except _Fault as fault:
                if not (may_wait and isinstance(fault, _Wait)):
                    raise AssertionError(f"{who} {fault}") from None
            except NotImplementedError:  # torch's own, of an operation that "meta" lacks
                continue
            except (RuntimeError, TypeError) as error:
                line = " ".join(str(error).split())
                raise AssertionError(f"{who} fails on a device that is not the CPU: {line}") from error


class _Blind:
    """In place of the watch over a step's numbers."""

    def see(self, evidence: Evidence) -> None:
        """Finds no fault: there are no numbers."""


class _Held:
    """Runs what would be recorded; a recording allows even less."""

    path = ""

    def __init__(self, watching: _Watching) -> None:
        self.watching = watching

    def __call__(self, key: Hashable, function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> Tensor:
        self.watching.recording = True
        try:
            return function(*tensors)
        finally:
            self.watching.recording = False


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation before it is done."""

    recording = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device == ELSEWHERE for tensor in tensors) or "device" in kwargs:
            self._look(func, tensors, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        aten = torch.ops.aten
        if func.overloadpacket is aten._to_copy:
            self._look_at_copy(args[0].device, kwargs.get("device"), kwargs.get("non_blocking"))
        elif func.overloadpacket is aten.copy_:
            self._look_at_copy(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        elif len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            self.say(f"has a tensor on the CPU meet one on the device in {_name(func)}", _MIX, _Fault)
        elif func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            fills = func.overloadpacket is not aten.index and args[2].numel() == 1
            if masks and not fills:
                self.say("waits for the device: how many images a mask picks is known there alone", _ASK)
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.say(f"waits for the device, which alone knows the outcome of {_name(func)}", _ASK)

    def _look_at_copy(self, source: torch.device, target: Any, non_blocking: Any) -> None:
        if target is None or torch.device(target) == source:
            return
        if source == ELSEWHERE:
            self.say("waits for the device: it copies from there", _ASK)
        elif self.recording:
            self.say("copies to the device in the midst of what is recorded there", _HOLD)
        elif not non_blocking:
            self.say("waits for the device: it copies to there", _MOVE)

    def say(self, what: str, remedy: str, kind: type[_Fault] = _Wait) -> None:
        """Raises it, with its place in the code."""
        ours = Path(__file__)
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename) != ours]
        torchs = Path(torch.__file__).parent
        place = next(frame for frame in reversed(frames) if torchs not in Path(frame.filename).parents)
        home = Path(robustkit.__file__).parent.parent
        path = Path(place.filename)
        shown = path.relative_to(home) if home in path.parents else path
        raise kind(f"{what} ({shown}:{place.lineno}); {remedy}")


class _Making(TorchFunctionMode):
    """Looks at what makes tensors of Python's numbers: that is a copy which waits, and of which nobody else is told."""

    def __init__(self, watching: _Watching) -> None:
        super().__init__()
        self.watching = watching

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        makes = getattr(func, "__name__", "") in ("tensor", "new_tensor", "as_tensor", "asarray")
        if makes and isinstance(made, Tensor) and made.device == ELSEWHERE:
            data = args[1] if func is Tensor.new_tensor else args[0]
            if not isinstance(data, Tensor):
                self.watching.say("waits for the device: it makes a tensor there of numbers here", _MAKE)
        return made


def _name(func: Any) -> str:
    if func.overloadpacket is torch.ops.aten._local_scalar_dense:
        return "item() (or float, int, bool, if)"
    return str(func.overloadpacket).rpartition(".")[2]


@contextmanager
def _elsewhere() -> Iterator[None]:
    """What "meta" lacks: a generator, autocast, and numbers by which a folding is judged."""

    class Anywhere(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Anywhere:
            return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    with ExitStack() as stack:
        stack.enter_context(patch("torch.Generator", Anywhere))
        stack.enter_context(patch("torch.autocast", lambda *args, **kwargs: nullcontext()))
        stack.enter_context(patch("robustkit.engine.folding.close", lambda *args: True))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield
