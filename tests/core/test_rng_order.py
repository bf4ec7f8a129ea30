"""Randomness and data order are functions of counters: nothing to save, and no process sees another draw."""

import hashlib
import subprocess
import sys

import pytest
import torch

from robustkit.core.batch import Part, Passes, Progress
from robustkit.core.order import SMALLEST_BATCH, batches_per_epoch, epoch_order, micro_parts
from robustkit.core.rng import Generator, derive, whole
from robustkit.core.world import World

CPU = torch.device("cpu")


def world(seed: int = 0) -> World:
    return World(samples=50, training=50, classes=3, image_shape=(1, 2, 2), seed=seed)


def test_derived_seeds() -> None:
    """Stable across processes and versions: a run resumed elsewhere must draw the same."""
    assert derive(1, "attack", 3, 7) == derive(1, "attack", 3, 7)
    keys = [
        (seed, purpose, epoch, step)
        for seed in range(4)
        for purpose in ("attack", "order", "torch/pass")
        for epoch in range(12)
        for step in range(12)
    ]
    found = [derive(*key) for key in keys]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**63 for seed in found)
    digest = hashlib.blake2b(b"0/weights", digest_size=8).hexdigest()
    assert derive(0, "weights") == int(digest, 16) // 2
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in found]).double().mean(dim=0)
    assert (bits - 0.5).abs().max() < 0.1


def test_the_seed_does_not_depend_on_pythons_hash_seed() -> None:
    code = "from robustkit.core.rng import derive; print(derive(5, 'attack', 1, 2))"
    for hash_seed in ("0", "1"):
        shown = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        )
        assert int(shown.stdout) == derive(5, "attack", 1, 2)


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_a_process_draws_its_rows_of_the_whole(draw: str) -> None:
    like = torch.zeros(10, 2, 3, 3)
    everything = getattr(Generator(9, Part(0, 10, 10), CPU), draw)(like)
    for start, stop in ((0, 4), (4, 7), (7, 10), (3, 3)):
        mine = getattr(Generator(9, Part(start, stop, 10), CPU), draw)(like[start:stop])
        assert torch.equal(mine, everything[start:stop])
    assert everything.dtype == torch.float32
    assert getattr(Generator(9, Part(0, 10, 10), CPU), draw)(like.double()).dtype == torch.float64


def test_whole_numbers() -> None:
    everything = Generator(9, Part(0, 300, 300), CPU).integers(7, torch.zeros(300, 1))
    mine = Generator(9, Part(100, 250, 300), CPU).integers(7, torch.zeros(150, 1))
    assert torch.equal(mine, everything[100:250])
    assert set(everything.tolist()) == set(range(7))
    drawn = [Generator(seed, Part(0, 1, 1), CPU).integer(5) for seed in range(500)]
    assert set(drawn) == set(range(5)) and max(map(drawn.count, range(5))) < 150
    generator = Generator(3, Part(0, 1, 1), CPU)
    several = [generator.integer(1000) for _ in range(20)]
    assert len(set(several)) > 15
    other = Generator(3, Part(5, 9, 20), CPU)
    assert [other.integer(1000) for _ in range(20)] == several  # equal in every process


def test_wrong_numbers_of_rows_are_noticed() -> None:
    for draw in ("uniform", "normal"):
        with pytest.raises(ValueError, match="expected 4 rows, got 5"):
            getattr(Generator(0, Part(0, 4, 8), CPU), draw)(torch.zeros(5, 1))


def test_generators_of_a_step() -> None:
    """Asking twice gives the same; other purposes, epochs, steps and seeds give others."""
    part, like = Part(0, 4, 4), torch.zeros(4, 3)
    at = [("attack", 5, 0), ("attack", 6, 0), ("inverse", 5, 0), ("attack", 5, 1)]
    drawn = [world(seed).generator(purpose, Progress.at(step, 10, 4), part).uniform(like) for purpose, step, seed in at]
    again = world(0).generator("attack", Progress.at(5, 10, 4), part).uniform(like)
    assert torch.equal(drawn[0], again)
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(whole(like, 3, "x").uniform(like), whole(like, 3, "x").uniform(like))
    assert not torch.equal(whole(like, 3, "x").uniform(like), whole(like, 3, "y").uniform(like))


def test_epoch_order() -> None:
    rows = torch.arange(50) * 3
    orders = [epoch_order(rows, seed, epoch) for seed in (1, 2) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, rows)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(epoch_order(rows, 1, 2), orders[2])
    state = torch.get_rng_state()
    epoch_order(rows, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is not touched


def test_batches_per_epoch() -> None:
    assert [batches_per_epoch(n, 128) for n in (50_000, 48_976, 73_257)] == [391, 383, 573]
    assert SMALLEST_BATCH == 8
    for samples, size, wanted in (
        (128, 128, 1),
        (135, 128, 1),
        (136, 128, 2),
        (12, 4, 3),
        (13, 4, 3),
        (15, 4, 3),
        (7, 128, 0),
        (8, 128, 1),
        (3, 2, 1),
    ):
        assert batches_per_epoch(samples, size) == wanted
        starts = range(0, wanted * size, size)
        assert all(min(size, samples - start) >= min(8, size) for start in starts)


@pytest.mark.parametrize("total", [1, 5, 16, 37, 128])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_cover_the_batch_once(total: int, ranks: int, pieces: int) -> None:
    seen: list[int] = []
    for rank in range(ranks):
        parts = micro_parts(total, rank, ranks, pieces)
        assert 1 <= len(parts) <= pieces and all(part.total == total for part in parts)
        for part in parts:
            seen += range(part.start, part.stop)
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len(parts) == pieces or sum(sizes) < 2 * pieces  # fewer only where batch statistics would have one image
        assert min(sizes) >= 2 or len(parts) == 1
    assert seen == list(range(total))


def test_progress() -> None:
    progress = Progress.at(10, 5, 4)
    assert (progress.step, progress.epoch, progress.epochs, progress.steps_per_epoch) == (10, 2, 5, 4)
    assert progress.total_steps == 20
    assert [Progress.at(step, 5, 4).epoch for step in (0, 3, 4, 19)] == [0, 0, 1, 4]


def test_units_of_passes() -> None:
    assert Passes(13, 10, 2).units == 27 and Passes().units == 0
    assert Passes(1, 2, 3) + Passes(10, 20, 30) == Passes(11, 22, 33)
