import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomCrop, RandomHorizontalFlip, RandomRotation
from torchvision.transforms.functional import rotate as reference_rotate

from robustkit.core.batch import Part
from robustkit.core.rng import Generator, whole
from robustkit.data import augment as module
from robustkit.data.augment import Augmentation, augment, augmentation, crop, flip, rotate

EVERYTHING = Augmentation(flip=True, degrees=15.0)


def images(count=12, channels=3, height=32, width=32):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def positions(count, size=32):
    """Images whose pixels name their own place, all different and above zero."""
    return (torch.arange(size * size).view(1, 1, size, size).expand(count, 1, size, size) + 1) / (size * size)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 9, 14)])
def test_crop_equals_slicing(mode, shape):
    x = images(81, *shape)
    top, left = (grid.flatten() for grid in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    result = crop(x, top, left, 4, mode)
    for i in range(81):
        padded = F.pad(x[i : i + 1], (4, 4, 4, 4), mode="constant" if mode == "zero" else "reflect")[0]
        expected = padded[:, top[i] : top[i] + shape[1], left[i] : left[i] + shape[2]]
        assert torch.equal(result[i], expected)


def test_crop_at_the_centre_changes_nothing():
    x, centre = images(), torch.full((12,), 4)
    assert torch.equal(crop(x, centre, centre, 4, "zero"), x)


def test_crop_offsets_are_uniform():
    count = 8100
    x = positions(count, 9)
    result = augment(x, Augmentation(), whole(x, 0, "test"))
    names = (result[:, 0, 4, 4] * 81).round().long() - 1  # the centre of a 9x9 image comes from every place in it
    counts = names.bincount(minlength=81).float()
    assert len(counts) == 81
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert 40 < chi_square < 140  # 80 degrees of freedom: mean 80, deviation 12.6


def test_flip_mirrors_the_chosen():
    x = images(2)
    result = flip(x, torch.tensor([True, False]))
    assert torch.equal(result[0], x[0].flip(-1)) and torch.equal(result[1], x[1])


def test_half_of_the_images_are_flipped():
    x = positions(4000, 4)
    result = augment(x, Augmentation(padding=0, flip=True), whole(x, 1, "test"))
    flipped = (result != x).flatten(1).any(1)
    assert 1850 < flipped.sum() < 2150
    assert torch.equal(result[flipped], x[flipped].flip(-1))


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (20, 31)])
def test_rotation_equals_torchvision(shape):
    angles = torch.tensor([-15.0, -7.3, -1.0, 0.0, 2.5, 11.1, 15.0, 44.0])
    x = images(8, 3, *shape)
    result = rotate(x, angles)
    expected = torch.stack([reference_rotate(image, float(a)) for image, a in zip(x, angles, strict=True)])
    assert (result != expected).any(1).float().mean() < 0.005  # pixels that lie halfway between two
    assert torch.equal(result[3], x[3])


def test_rotation_by_right_angles_is_exact():
    x = images(3)
    result = rotate(x, torch.tensor([90.0, 180.0, -90.0]))
    for i, quarters in enumerate((1, 2, -1)):
        assert torch.equal(result[i], x[i].rot90(quarters, (1, 2)))


def test_rotation_angles_cover_the_range():
    x = torch.zeros(2000, 1, 41, 41)
    x[:, :, 20, 40] = 1  # a point at the right end moves up by 20 sin(angle)
    x[:, :, 20, 20] = 0.5
    result = augment(x, Augmentation(padding=0, degrees=15.0), whole(x, 2, "test"))
    found = (result == 1).flatten(1).any(1)
    rows = (result[found] == 1).flatten(1).int().argmax(1) // 41
    assert found.float().mean() > 0.8
    assert rows.min() == 15 and rows.max() == 25  # 20 -+ 20 sin(15 degrees)
    assert abs(rows.float().mean() - 20) < 0.3


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_pixels_are_the_images_own(mode):
    x = positions(64)
    result = augment(x, Augmentation(mode=mode, flip=True, degrees=15.0), whole(x, 3, "test"))
    assert result.shape == x.shape and result.dtype == x.dtype
    assert set(result.unique().tolist()) <= {0.0, *x.unique().tolist()}


# Beside torchvision's: the same results from the same draws, and draws of the same distribution.


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
def test_crop_is_torchvisions(mode, shape):
    theirs = RandomCrop(shape[1:], padding=4, padding_mode="constant" if mode == "zero" else "reflect")
    x = images(20, *shape)
    places = []
    for number, image in enumerate(x):
        torch.manual_seed(number)
        expected = theirs(image)
        torch.manual_seed(number)
        padded = torch.empty(shape[0], shape[1] + 8, shape[2] + 8)
        top, left, _, _ = RandomCrop.get_params(padded, shape[1:])
        places.append((top, left))
        found = crop(image[None], torch.tensor([top]), torch.tensor([left]), 4, mode)[0]
        assert torch.equal(found, expected)
    assert len(set(places)) > 10


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_crops_come_as_often_as_torchvisions(mode):
    """Every window of a 9x9 image, by frequency; two samples of 4,050, chi-square of two histograms."""
    x = positions(1, 9)
    windows = {
        crop(x, torch.tensor([top]), torch.tensor([left]), 4, mode).numpy().tobytes(): 9 * top + left
        for top in range(9)
        for left in range(9)
    }
    assert len(windows) == 81
    theirs = RandomCrop(9, padding=4, padding_mode="constant" if mode == "zero" else "reflect")
    torch.manual_seed(0)
    batch = x.expand(4050, -1, -1, -1)
    ours = augment(batch, Augmentation(mode=mode), whole(batch, 0, "test"))
    counts = [
        torch.tensor([windows[image.numpy().tobytes()] for image in sample]).bincount(minlength=81).double()
        for sample in ([image[None] for image in ours], [theirs(x) for _ in range(4050)])
    ]
    chi_square = ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1])).sum()
    assert 40 < chi_square < 140  # 80 degrees of freedom


def test_flips_come_as_often_as_torchvisions():
    x = positions(4000, 4)
    ours = augment(x, Augmentation(padding=0, flip=True), whole(x, 1, "test"))
    torch.manual_seed(0)
    theirs = torch.stack([RandomHorizontalFlip()(image) for image in x])
    allowed = {x[0].numpy().tobytes(), x[0].flip(-1).numpy().tobytes()}
    shares = []
    for sample in (ours, theirs):
        assert {image.numpy().tobytes() for image in sample} == allowed
        shares.append(float((sample != x).flatten(1).any(1).float().mean()))
    assert abs(shares[0] - shares[1]) < 4 * (2 * 0.25 / 4000) ** 0.5


def test_angles_are_drawn_as_torchvisions(monkeypatch):
    """Kolmogorov and Smirnov's distance between what both hand to their rotation."""
    drawn = []
    monkeypatch.setattr(module, "rotate", lambda x, degrees: drawn.append(degrees) or x)
    x = torch.zeros(5000, 1, 2, 2)
    augment(x, Augmentation(padding=0, degrees=15.0), whole(x, 2, "test"))
    torch.manual_seed(0)
    theirs = torch.tensor([RandomRotation.get_params(RandomRotation(15).degrees) for _ in range(5000)])
    assert drawn[0].abs().max() <= 15
    values = torch.cat([drawn[0], theirs]).sort().values
    shares = [torch.searchsorted(sample.sort().values, values, right=True) / 5000 for sample in (drawn[0], theirs)]
    assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / 5000) ** 0.5  # one in a thousand exceeds it


def test_order_is_crop_flip_rotate():
    x = images()
    draws = whole(x, 4, "test")
    top, left = draws.integers(9, x), draws.integers(9, x)
    chosen = draws.integers(2, x) == 1
    degrees = (2 * draws.uniform(x[:, 0, 0, 0]) - 1) * 15
    expected = rotate(flip(crop(x, top, left, 4, "zero"), chosen), degrees)
    assert torch.equal(augment(x, EVERYTHING, whole(x, 4, "test")), expected)


def test_a_slice_of_the_batch_gets_its_rows_of_the_draws():
    x = images(13)
    everything = augment(x, EVERYTHING, Generator(7, Part(0, 13, 13), x.device))
    for start, stop in ((0, 4), (4, 9), (9, 13)):
        piece = augment(x[start:stop], EVERYTHING, Generator(7, Part(start, stop, 13), x.device))
        assert torch.equal(piece, everything[start:stop])


def test_draws_are_a_function_of_the_seed():
    x = images()
    first, again, other = (augment(x, EVERYTHING, whole(x, seed, "test")) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_names():
    assert augmentation("none", "zero") is None
    assert augmentation("crop", "reflect") == Augmentation(mode="reflect")
    assert augmentation("crop-flip", "zero") == Augmentation(flip=True)
    assert augmentation("crop-flip-rotate", "zero") == EVERYTHING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_the_device():
    x = images().cuda()
    augment(x, EVERYTHING, whole(x, 0, "test"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(x, EVERYTHING, whole(x, 0, "test"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
