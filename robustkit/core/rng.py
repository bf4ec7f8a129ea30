"""Randomness as a function of counters: (seed, purpose, epoch, step) and never of the process.

Nothing random is ever saved: a run resumed at any step draws what the run never stopped would have drawn. Noise is
drawn for the global batch and sliced, so one process and several see the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robustkit.core.batch import Part


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the purpose that `keys` name."""
    text = "/".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Generator:
    """Draws for one purpose of one step. Per-image draws are this process's rows of the global batch's draw.

    `chosen` (n,): those among this process's rows that it draws for; None: all.
    """

    def __init__(self, seed: int, part: Part, device: torch.device, chosen: Tensor | None = None) -> None:
        self.seed, self.part, self.device, self.chosen = seed, part, device, chosen
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)

    def of(self, rows: Tensor) -> Generator:
        """For some rows (n,) alone what this one draws for them among all, from its first draw on."""
        return Generator(self.seed, self.part, self.device, rows if self.chosen is None else self.chosen[rows])

    def uniform(self, like: Tensor) -> Tensor:
        """U(0, 1), shaped as `like` (whose first dimension are this process's rows)."""
        return self._rows(torch.rand(self._shape(like), generator=self._generator, device=self.device)).to(like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """N(0, 1), shaped as `like`."""
        return self._rows(torch.randn(self._shape(like), generator=self._generator, device=self.device)).to(like.dtype)

    def integer(self, below: int) -> int:
        """One whole number in [0, below), the same in every process and for every image."""
        self._drawn = getattr(self, "_drawn", 0) + 1
        return derive(self.seed, "integer", self._drawn) % below

    def integers(self, below: int, like: Tensor) -> Tensor:
        """(B,) whole numbers in [0, below), one for each row of `like`."""
        total = self.part.total
        return self._rows(torch.randint(below, (total,), generator=self._generator, device=self.device))[: len(like)]

    def _shape(self, like: Tensor) -> tuple[int, ...]:
        rows = self.part.stop - self.part.start if self.chosen is None else len(self.chosen)
        if len(like) != rows:
            raise ValueError(f"expected {rows} rows, got {len(like)}")
        return (self.part.total, *like.shape[1:])

    def _rows(self, drawn: Tensor) -> Tensor:
        own = drawn[self.part.start : self.part.stop]
        return own if self.chosen is None else own[self.chosen]


def whole(images: Tensor, seed: int, *keys: str | int) -> Generator:
    """A generator for `images` that are a whole batch by themselves (evaluation, tests)."""
    return Generator(derive(seed, *keys), Part(0, len(images), len(images)), images.device)
