"""The per-sample memory: one row for each training image, whatever the order in which they come."""

import pytest
import torch
from torch import Tensor

from robustkit.core.memory import PerSampleMemory
from robustkit.core.world import World

N, K = 40, 3


def memory() -> PerSampleMemory:
    return PerSampleMemory(World(samples=N, training=N, classes=K, image_shape=(1, 2, 2)), K)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, K, generator=torch.Generator().manual_seed(seed))


def test_unwritten_rows_are_zero_and_say_so() -> None:
    values, seen = memory().read(torch.tensor([3, 0, 39]))
    assert torch.equal(values, torch.zeros(3, K)) and seen.tolist() == [False] * 3


def test_against_a_dictionary() -> None:
    kept, plain = memory(), {}
    generator = torch.Generator().manual_seed(1)
    for turn in range(60):
        index = torch.randint(N, (9,), generator=generator)  # some stand twice: the last one wins
        given = rows(9, turn)
        kept.write(index, given)
        for place, i in enumerate(index.tolist()):
            plain[i] = given[place]
        values, seen = kept.read(torch.arange(N))
        assert seen.tolist() == [i in plain for i in range(N)]
        for i, row in plain.items():
            assert torch.equal(values[i], row)


def test_the_last_of_equal_images_wins() -> None:
    kept, given = memory(), rows(6)
    kept.write(torch.tensor([7, 2, 7, 7, 2, 5]), given)
    values, _ = kept.read(torch.tensor([7, 2, 5]))
    assert torch.equal(values, given[[3, 4, 5]])


def test_what_is_read_is_a_copy() -> None:
    kept = memory()
    kept.write(torch.tensor([1]), rows(1))
    values, _ = kept.read(torch.tensor([1]))
    values.zero_()
    assert kept.read(torch.tensor([1]))[0].sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_float32_without_gradient(dtype: torch.dtype) -> None:
    kept = memory()
    kept.write(torch.tensor([1, 2]), rows(2).to(dtype).requires_grad_())
    values, _ = kept.read(torch.tensor([1, 2]))
    assert values.dtype == torch.float32 and not values.requires_grad


def test_state_travels() -> None:
    kept, other = memory(), memory()
    kept.write(torch.tensor([1, 30]), rows(2))
    assert set(kept.state_dict()) == {"values", "visited"} and not list(kept.parameters())
    other.load_state_dict(kept.state_dict())
    for a, b in zip(other.read(torch.arange(N)), kept.read(torch.arange(N)), strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch_is_nothing() -> None:
    """A process may hold no row of a small last batch."""
    kept = memory()
    values, seen = kept.read(torch.empty(0, dtype=torch.int64))
    assert values.shape == (0, K) and seen.shape == (0,)
