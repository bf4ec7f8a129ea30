"""Data order is a function of (seed, epoch); the rows of a process are a slice of the global batch."""

from __future__ import annotations

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
