"""An attack recorded once and replayed as a whole.

On a GPU, launching the thousands of kernels of a K-step attack takes longer than running them. A CUDA graph launches
them all at once. It does exactly what was recorded, on the memory it was recorded on: inputs are copied there first,
and whoever changes weights must change them in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Function = Callable[..., Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a function once, and returns how to run it again, and the tensor that then holds its result."""

RECORDINGS = 4
"""So many are kept: batches of an epoch have two sizes, radii and steps take few values."""


class Graphs:
    """`graphs(key, function, tensors)` is `function(*tensors)`, replayed where that is possible and gives the same.

    The first call under a key runs plainly, the second records. A recording is taken only if its result equals the
    plain one bit for bit; `trouble` says why, where one was refused.
    """

    def __init__(self, record: Record) -> None:
        self.trouble = ""
        self._record = record
        self._seen: set[Hashable] = set()
        self._kept: dict[Hashable, tuple[list[Tensor], Callable[[], None], Tensor] | None] = {}

    def __call__(self, key: Hashable, function: Function, tensors: tuple[Any, ...]) -> Tensor:
        """Args:
        key: what `function` does apart from its arguments; equal keys, equal doings.
        tensors: its arguments, tensors or tuples of them; all that changes from call to call must be among them.
        """
        leaves, structure = tree_flatten(tensors)
        full = (key, str(structure), tuple(_form(leaf) for leaf in leaves))
        if full not in self._seen:
            self._seen.add(full)
            return function(*tensors)
        if full not in self._kept:
            if len(self._kept) >= RECORDINGS:
                return function(*tensors)
            plain = function(*tensors)
            self._kept[full] = self._recorded(function, leaves, structure, plain)
            return plain
        kept = self._kept[full]
        if kept is None:
            return function(*tensors)
        inputs, replay, result = kept
        for held, leaf in zip(inputs, _tensors(leaves), strict=True):
            held.copy_(leaf)
        replay()
        return result.clone()

    @property
    def path(self) -> str:
        """In words."""
        return f"attacks not recorded ({self.trouble})" if self.trouble else "attacks recorded"

    def _recorded(
        self, function: Function, leaves: list[Any], structure: TreeSpec, plain: Tensor
    ) -> tuple[list[Tensor], Callable[[], None], Tensor] | None:
        held = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(held, structure)
        try:
            replay, result = self._record(lambda: function(*arguments))
            replay()
        except RuntimeError as error:  # something in it waits for the device, or draws random numbers
            self.trouble = str(error).splitlines()[0]
            return None
        if not torch.equal(result, plain):
            self.trouble = "its result is not the same twice"
            return None
        return _tensors(held), replay, result


def graphs_for(device: torch.device) -> Graphs | None:
    """Recordings where the device has them."""
    return Graphs(_cuda_recorder()) if device.type == "cuda" else None


def _cuda_recorder() -> Record:
    """All its recordings work in the same memory: never two at once, and what one gives is copied before the next."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), _never_waiting():
                function()  # libraries choose their kernels and take their memory before the recording
        finally:
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: another one may be pinning the next images, which a recording of all would forbid.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            torch.cuda.set_stream(current)  # `graph` stays on its own where a recording breaks off
            raise
        return graph.replay, result

    return record


@contextmanager
def _never_waiting() -> Iterator[None]:
    """What waits for the GPU raises here, as a RuntimeError. Were it met in a recording, that would break off, and
    some versions of torch then take memory to be recorded for ever (pytorch/pytorch#180395).
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # is a prototype, which does not see all waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return leaf  # type: ignore[no-any-return]
