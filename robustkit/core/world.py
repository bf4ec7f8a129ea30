"""What a strategy may know of the world: the data's shape, the device, and the other processes.

Collectives go through here and nowhere else. Gradients are summed explicitly after the backward pass rather than by
DistributedDataParallel: an adversarial step pays one parameter backward among some twenty passes, so overlapping its
all-reduce buys little, while attacks, weight perturbations and companion networks all become ordinary code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from robustkit.core.batch import Part, Progress
from robustkit.core.processes import all_reduce, exchange
from robustkit.core.rng import Generator, derive

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class World:
    """Facts and collectives. `samples` counts the rows of the whole training set, `training` those trained on.

    Rows below `own` are the data set's own images, all others synthetic ones; None: there are no others.
    """

    samples: int
    training: int
    classes: int
    image_shape: tuple[int, int, int]
    own: int | None = None
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1
    seed: int = 0

    def generator(self, purpose: str, progress: Progress, part: Part) -> Generator:
        """The draws of one purpose in one step. Asking twice gives the same draws twice."""
        return Generator(derive(self.seed, purpose, progress.epoch, progress.step), part, self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Iterable[Tensor]) -> None:
        """Sums many tensors over processes in place, in one collective per dtype."""
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            all_reduce(flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in group])
            for tensor, piece in zip(group, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Every process's rows (B, ...), one after the other in rank order; processes may hold different numbers."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.sum(counts).tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in sizes]
        exchange(dist.all_gather, pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether any process says so: how a branch that guards a collective is decided."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def share(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        exchange(dist.broadcast_object_list, values)
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            exchange(dist.barrier)


class Poll:
    """Questions to all processes, once a step: whether any of them says yes.

    On several GPUs the answers are those to the call before (at first: no), so that no step waits for a device.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._later = world.size > 1 and world.device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        if self.world.size == 1:
            return flags
        yes = self.world.sum(torch.tensor(flags, dtype=torch.float32).to(self.world.device, non_blocking=True))
        if not self._later:
            return tuple(map(bool, yes.tolist()))
        copied, event = yes.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._pending = self._pending, (copied, event)
        if before is None:
            return (False,) * len(flags)
        answers, done = before
        done.synchronize()
        return tuple(map(bool, answers.tolist()))
