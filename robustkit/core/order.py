"""Data order is a function of (seed, epoch); the rows of a process are a slice of the global batch."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from robustkit.core.batch import Part
from robustkit.core.rng import derive

SMALLEST_BATCH = 8
"""A last batch of fewer images is left out of its epoch: its batch statistics would mean nothing."""


def epoch_order(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """`rows` (n,), shuffled for one epoch."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return rows[torch.randperm(len(rows), generator=generator)]


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """How many batches an epoch has; the last short one counts if it holds at least `SMALLEST_BATCH` images."""
    full, rest = divmod(samples, batch_size)
    return full + (rest >= min(SMALLEST_BATCH, batch_size))


@attrs.frozen
class Shuffled:
    """Training images of one source, of which an epoch takes each of the `trained` ones once."""

    trained: int

    def batches_per_epoch(self, batch_size: int) -> int:
        return batches_per_epoch(self.trained, batch_size)

    def smallest_batch(self, batch_size: int) -> int:
        return min(batch_size, self.trained - (self.batches_per_epoch(batch_size) - 1) * batch_size)

    def epoch_order(self, rows: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
        """As `epoch_order`."""
        return epoch_order(rows, seed, epoch)


@attrs.frozen
class Mixture:
    """Training images of two sources: rows [0, `own`) are the data set's own, all further ones are synthetic.

    Of each batch of B, int(B (1 - `share`)) are synthetic. Own images are taken without replacement within an epoch,
    synthetic ones with it; an epoch has as many batches as the own images would fill, those held out for validation
    included (Rebuffi et al. 2021, as sampled by the code of HAT, which UIAT follows).
    """

    own: int
    share: float

    def batches_per_epoch(self, batch_size: int) -> int:
        return math.ceil(self.own / batch_size)

    def smallest_batch(self, batch_size: int) -> int:
        return batch_size

    def epoch_order(self, rows: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
        """(batches x batch_size,): the rows of an epoch, batch after batch, each batch shuffled.

        `rows` (n,) are those trained on, of both sources. Where the own ones run out, synthetic ones stand in.
        """
        generator = torch.Generator().manual_seed(derive(seed, "mixture", epoch))
        shape = self.batches_per_epoch(batch_size), batch_size
        own = epoch_order(rows[rows < self.own], seed, epoch)
        synthetic = rows[rows >= self.own]
        drawn = synthetic[torch.randint(len(synthetic), shape, generator=generator)]
        leading = drawn[:, : batch_size - int(batch_size * (1 - self.share) + 1e-9)]  # 10 x (1 - 0.9) is 1
        places = torch.ones_like(leading).nonzero()[: len(own)]  # batch after batch
        leading[places[:, 0], places[:, 1]] = own[: len(places)]
        return drawn.gather(1, torch.rand(shape, generator=generator).argsort(dim=1)).flatten()


def part_of(total: int, index: int, parts: int, start: int = 0) -> tuple[int, int]:
    """Rows [a, b) of piece `index` of `parts` nearly equal, contiguous pieces of `total` rows beginning at `start`."""
    return start + total * index // parts, start + total * (index + 1) // parts


def micro_parts(total: int, rank: int, ranks: int, micro_batches: int) -> list[Part]:
    """The pieces of a global batch that process `rank` works through, one after the other.

    As many as `micro_batches`, in every process; fewer where a short last batch would leave less than two images each.
    """
    micro_batches = max(1, min(micro_batches, total // (2 * ranks)))
    start, stop = part_of(total, rank, ranks)
    pieces = (part_of(stop - start, index, micro_batches, start) for index in range(micro_batches))
    return [Part(a, b, total) for a, b in pieces]
