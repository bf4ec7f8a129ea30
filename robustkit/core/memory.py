"""One remembered row for each training image, equal in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.core.world import World


class PerSampleMemory(nn.Module):
    """Rows (N, width) in float32 and whether each was ever written; part of the checkpoint."""

    values: Tensor
    visited: Tensor

    def __init__(self, world: World, width: int) -> None:
        super().__init__()
        self.world = world
        self.register_buffer("values", torch.zeros(world.samples, width, device=world.device))
        self.register_buffer("visited", torch.zeros(world.samples, dtype=torch.bool, device=world.device))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width) remembered rows, and (B,) whether there is one: rows never written are zero."""
        return self.values[index], self.visited[index]

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Remember `rows` (B, width) of every process; where an image stands twice in a batch, the last wins."""
        index = self.world.gather_rows(index)
        rows = self.world.gather_rows(rows.detach().float())
        positions = torch.arange(len(index), device=index.device)
        last = (positions * (index[None, :] == index[:, None])).amax(dim=1)
        self.values[index] = rows[last]  # repeated images write equal rows, so their order cannot matter
        self.visited[index] = True
