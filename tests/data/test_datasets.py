import os
import pickle

import attrs
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from robustkit.core.errors import DataError, SpecError
from robustkit.core.rng import whole
from robustkit.core.spec import digest, from_json, to_json
from robustkit.core.strategy import Dataset
from robustkit.data import Data, InMemory, make_batch, validation_split
from robustkit.datasets import SVHN, Cifar10, Cifar100, Digits, ImageFolder, Synthetic, registry
from robustkit.datasets.cifar import CIFAR10_CLASSES

CPU = torch.device("cpu")
REAL = os.path.abspath(os.environ["ROBUSTKIT_CIFAR10_DIR"]) if "ROBUSTKIT_CIFAR10_DIR" in os.environ else None
SPECS = [
    Digits(augment="crop"),
    Cifar10(root="somewhere", augment="none", padding="reflect"),
    Cifar100(root="somewhere"),
    SVHN(root="somewhere", download=False),
    ImageFolder(root="somewhere", size=16, grey=True),
    Synthetic(train=32, size=8),
]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    for name in ("CIFAR10", "CIFAR100", "SVHN", "DATA"):
        variable = "ROBUSTKIT_DATA_DIR" if name == "DATA" else f"ROBUSTKIT_{name}_DIR"
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_checksums(monkeypatch):
    def exists(path, md5=None):
        return os.path.isfile(path)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", exists)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", exists)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        print("Downloading")
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", refuse)


def small(shape=(1, 4, 4), labels=(0, 1)):
    pixels = torch.randint(256, (len(labels), *shape), dtype=torch.uint8)
    return InMemory(pixels, torch.tensor(labels, dtype=torch.int64))


def write_picture(path, shape=(32, 32), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = () if mode == "L" else (len(mode),)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def picture_tensor(seed, shape=(32, 32)):
    """What `write_picture` wrote, as (3, H, W)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    images = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = (generator.permutation(20) % 10).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        images[name] = (torch.from_numpy(data).view(20, 3, 32, 32), labels)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    return images


# Images, data, batches


def test_images_are_uint8_with_one_label_each():
    with pytest.raises(DataError, match="uint8"):
        InMemory(torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"\(2,\) int64"):
        InMemory(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    images = small().to("cpu")
    assert (len(images), images.shape) == (2, (1, 4, 4))


def test_data_refuses_what_does_not_fit():
    with pytest.raises(DataError, match=r"data\.test: label 7 of image 1 is not one of 0\.\.1; .*more than 2"):
        Data(small(), small(labels=(0, 7)), ("a", "b"))
    with pytest.raises(DataError, match="label -1 of image 0"):
        Data(small(labels=(-1, 0)), small(), ("a", "b"))
    with pytest.raises(DataError, match="1x4x4, test images 3x4x4"):
        Data(small(), small((3, 4, 4)), ("a", "b"))
    with pytest.raises(DataError, match="no images"):
        Data(small(), small(labels=()), ("a", "b"))


def test_batch_carries_pixels_labels_and_rows():
    images = small((3, 5, 4), labels=tuple(range(10)))
    index = torch.tensor([7, 0, 7])
    x, y, rows = make_batch(images, index, device=CPU)
    assert x.dtype == torch.float32 and x.shape == (3, 3, 5, 4)
    assert torch.equal(x, images.pixels[index].float() / 255)
    assert y.tolist() == [7, 0, 7] and rows.tolist() == [7, 0, 7]
    with pytest.raises(ValueError, match="generator"):
        make_batch(images, index, device=CPU, augmentation=Cifar10().augmentation)


def test_augmentation_draws_anew_and_leaves_the_images_alone():
    images = small((3, 32, 32), labels=tuple(range(16)))
    before, index = images.pixels.clone(), torch.arange(16)
    first, again, other = (
        make_batch(
            images, index, device=CPU, augmentation=Cifar100().augmentation, generator=whole(index, seed, "augment")
        ).x
        for seed in (1, 1, 2)
    )
    assert torch.equal(images.pixels, before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_validation_split_is_fixed_disjoint_and_complete():
    train, validation = validation_split(1000, 100)
    assert len(train) == 900 and len(validation) == 100
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(1000))
    assert train.tolist() == sorted(train.tolist()) and validation.tolist() == sorted(validation.tolist())
    torch.manual_seed(3)
    assert torch.equal(validation_split(1000, 100)[1], validation)
    assert set(validation.tolist()) < set(validation_split(1000, 200)[1].tolist())
    assert abs(validation.float().mean() - 500) < 100  # neither the first rows nor the last
    assert len(validation_split(10, 0)[1]) == 0
    for count in (10, 11, -1):
        with pytest.raises(DataError, match="of 10"):
            validation_split(10, count)


# Specs


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_values(spec):
    assert from_json(Dataset, to_json(spec)) == spec
    assert to_json(spec)["name"] == registry.name_of(type(spec))
    assert digest(attrs.evolve(spec, augment="crop-flip")) != digest(spec)
    if hasattr(spec, "root"):
        assert digest(attrs.evolve(spec, root="elsewhere")) == digest(spec)
    if hasattr(spec, "download"):
        assert digest(attrs.evolve(spec, download=not spec.download)) == digest(spec)


def test_augmentation_defaults_follow_the_papers():
    cifar = Cifar10().augmentation
    assert (cifar.padding, cifar.mode, cifar.flip, cifar.degrees) == (4, "zero", True, 0)
    assert Cifar100().augmentation == attrs.evolve(cifar, degrees=15.0)
    assert Cifar10(padding="reflect").augmentation.mode == "reflect"
    assert Cifar10(augment="crop").augmentation.flip is False
    assert [spec.augmentation for spec in (SVHN(), Digits(), Synthetic(), ImageFolder())] == [None] * 4
    with pytest.raises(SpecError, match="crop-flip"):
        Cifar10(augment="flip")


@pytest.mark.parametrize("spec", [Digits(), Synthetic(train=24, test=8, classes=3, size=6, channels=2)])
def test_facts_hold(spec):
    data = spec.load()
    assert spec.facts == (data.train.shape, len(data.classes))


def test_facts_of_what_must_be_read_first():
    assert Cifar10().facts == SVHN().facts == ((3, 32, 32), 10)
    assert Cifar100().facts == ((3, 32, 32), 100)
    assert ImageFolder().facts == (None, None)
    assert ImageFolder(size=16, grey=True).facts == ((1, 16, 16), None)


# Digits, synthetic


def test_digits():
    data = Digits().load()
    assert (len(data.train), len(data.test), data.train.shape) == (1437, 360, (1, 8, 8))
    assert data.classes == tuple("0123456789")
    assert (data.train.pixels.min(), data.train.pixels.max()) == (0, 255)
    shares = data.test.labels.bincount()
    assert shares.min() >= 34 and shares.max() <= 38
    assert torch.equal(Digits().load().test.pixels, data.test.pixels)


def test_digits_parts_share_no_image_and_labels_are_right():
    from sklearn.datasets import load_digits

    known = {tuple(image.tolist()): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    data = Digits().load()
    seen = set()
    for images in (data.train, data.test):
        values = (images.pixels.flatten(1).double() / 255 * 16).round()
        for image, label in zip(map(tuple, values.tolist()), images.labels.tolist(), strict=True):
            assert known[image] == label
            seen.add(image)
    assert len(seen) == len(known) == 1797


def test_synthetic_can_be_learnt():
    data = Synthetic().load()
    assert (len(data.train), len(data.test), data.train.shape) == (256, 64, (3, 32, 32))
    assert data.train.labels.bincount().min() >= 25
    assert torch.equal(Synthetic().load().train.pixels, data.train.pixels)
    train, test = (images.pixels.float().flatten(1) for images in (data.train, data.test))
    means = torch.stack([train[data.train.labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(test, means).argmin(1) == data.test.labels).float().mean() > 0.95


# Torchvision's files


def test_cifar10_from_torchvision_files(tmp_path, monkeypatch, no_checksums):
    written = write_cifar10(tmp_path / "there")
    monkeypatch.setenv("ROBUSTKIT_CIFAR10_DIR", str(tmp_path / "there"))
    data = Cifar10().load()
    assert (len(data.train), len(data.test), data.classes) == (100, 20, CIFAR10_CLASSES)
    assert torch.equal(data.train.pixels[20:40], written["data_batch_2"][0])
    assert data.train.labels[20:40].tolist() == written["data_batch_2"][1]
    assert torch.equal(data.test.pixels, written["test_batch"][0])
    assert data.train.pixels.is_contiguous()


def test_root_comes_before_the_environment(tmp_path, monkeypatch, no_checksums):
    write_cifar10(tmp_path / "there")
    monkeypatch.setenv("ROBUSTKIT_CIFAR10_DIR", str(tmp_path / "nowhere"))
    assert len(Cifar10(root=str(tmp_path / "there")).load().train) == 100
    monkeypatch.setenv("ROBUSTKIT_DATA_DIR", str(tmp_path / "there"))
    with pytest.raises(DataError, match="nowhere"):
        Cifar10(download=False).load()
    monkeypatch.delenv("ROBUSTKIT_CIFAR10_DIR")
    assert len(Cifar10().load().train) == 100
    monkeypatch.delenv("ROBUSTKIT_DATA_DIR")
    (tmp_path / "data").symlink_to(tmp_path / "there")
    assert len(Cifar10().load().train) == 100


def test_damaged_cifar10_is_one_line(tmp_path):
    write_cifar10(tmp_path)  # its checksums are not the true ones
    with pytest.raises(DataError, match=r"CIFAR-10 in .* is damaged .*; delete cifar-10-batches-py") as error:
        Cifar10(root=str(tmp_path)).load()
    assert "\n" not in str(error.value)


def test_unpickling_failure_is_one_line(tmp_path, no_checksums):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"\x80\x04 broken")
    with pytest.raises(DataError, match="is damaged"):
        Cifar10(root=str(tmp_path)).load()


@pytest.mark.parametrize("spec", [Cifar10(), Cifar100(), SVHN()], ids=lambda spec: type(spec).__name__)
def test_without_network_one_line_says_what_to_do(spec, tmp_path, no_network, capsys):
    variable = f"ROBUSTKIT_{type(spec).__name__.upper()}_DIR"
    with pytest.raises(DataError, match=f"cannot be downloaded .*no network.*data.root or {variable}") as error:
        spec.load()
    assert str(tmp_path / "data") in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match=f"is not there .*{variable}.*data.download=true"):
        attrs.evolve(spec, download=False).load()


def test_cifar100_from_torchvision_files(tmp_path, no_checksums):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class {i:02d}" for i in range(100)]
    pixels = np.random.default_rng(0).integers(0, 256, (100, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        entry = {"data": pixels, "fine_labels": list(range(99, -1, -1)), "coarse_labels": [0] * 100}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    data = Cifar100(root=str(tmp_path)).load()
    assert data.classes == tuple(names) and data.test.labels.tolist() == list(range(99, -1, -1))
    assert torch.equal(data.train.pixels.flatten(1), torch.from_numpy(pixels))


def test_svhn_from_torchvision_files(tmp_path, no_checksums):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
    labels = np.arange(30)[:, None] % 10 + 1  # SVHN writes 10 for the digit 0
    for name in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": pixels, "y": labels.astype(np.uint8)})
    data = SVHN(root=str(tmp_path)).load()
    assert data.train.labels.tolist() == [(i + 1) % 10 for i in range(30)]
    assert torch.equal(data.test.pixels, torch.from_numpy(pixels).permute(3, 2, 0, 1))


# Image folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write_picture(root / part / name / f"{i}.png", seed=10 * label + i)
    return root


def test_image_folder(folder):
    (folder / "train" / "ant" / ".hidden").write_text("not a picture")
    (folder / "train" / "readme.txt").write_text("not a class")
    data = ImageFolder(root=str(folder)).load()
    assert data.classes == ("ant", "bee") and data.train.shape == (3, 32, 32)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.train.pixels[4], picture_tensor(seed=11))


def test_image_folder_accepts_val_and_other_modes(folder):
    (folder / "test").rename(folder / "val")
    write_picture(folder / "train" / "ant" / "3.png", mode="L")
    write_picture(folder / "train" / "ant" / "4.png", mode="RGBA")
    data = ImageFolder(root=str(folder)).load()
    assert len(data.train) == 8 and len(data.test) == 4
    grey = ImageFolder(root=str(folder), grey=True).load()
    assert grey.train.shape == (1, 32, 32)
    with Image.open(folder / "train" / "bee" / "2.png") as picture:
        assert torch.equal(grey.train.pixels[-1, 0], torch.from_numpy(np.array(picture.convert("L"))))


def test_image_folder_without_a_split(tmp_path):
    """A fifth of each class, the same however often it is read; what is added moves at most what its rank displaces."""
    root = tmp_path / "photos"
    for label, (name, count) in enumerate({"ant": 10, "bee": 3, "cow": 2}.items()):
        for i in range(count):
            write_picture(root / name / f"{i}.png", seed=100 * label + i)
    data = ImageFolder(root=str(root)).load()
    assert data.classes == ("ant", "bee", "cow")
    assert data.train.labels.tolist() == [0] * 8 + [1] * 2 + [2] and data.test.labels.tolist() == [0, 0, 1, 2]
    every = {
        100 * label + i: picture_tensor(seed=100 * label + i) for label, n in enumerate((10, 3, 2)) for i in range(n)
    }

    def seeds(images):
        return [next(s for s, picture in every.items() if torch.equal(picture, pixels)) for pixels in images.pixels]

    train, test = seeds(data.train), seeds(data.test)
    assert sorted(train + test) == sorted(every) and [s // 100 for s in train] == data.train.labels.tolist()
    again = ImageFolder(root=str(root)).load()
    assert torch.equal(again.test.pixels, data.test.pixels)
    half = ImageFolder(root=str(root), test_share=0.5).load()
    assert len(half.test) == 5 + 2 + 1 and set(test) <= set(seeds(half.test))
    write_picture(root / "ant" / "more.png", seed=50)
    every[50] = picture_tensor(seed=50)
    assert len({s for s in seeds(ImageFolder(root=str(root)).load().test)} & set(test)) >= 3


def test_image_folder_too_small_to_split(tmp_path):
    write_picture(tmp_path / "photos" / "ant" / "0.png")
    with pytest.raises(DataError, match=r"photos/ant: has 1 pictures: too few .*; add some"):
        ImageFolder(root=str(tmp_path / "photos")).load()
    write_picture(tmp_path / "photos" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"photos/ant: has 2 pictures: .*; lower data\.test_share"):
        ImageFolder(root=str(tmp_path / "photos"), test_share=0.9).load()


def test_image_folder_of_different_sizes(folder):
    odd = folder / "train" / "bee" / "1.png"
    write_picture(odd, shape=(40, 80))
    with pytest.raises(DataError, match=rf"{odd}: is 3x40x80, but .*ant/0\.png is 3x32x32; set data\.size=32"):
        ImageFolder(root=str(folder)).load()
    data = ImageFolder(root=str(folder), size=20).load()
    assert data.train.shape == (3, 20, 20)
    with Image.open(odd) as picture:
        shorter = picture.resize((40, 20), Image.Resampling.BILINEAR).crop((10, 0, 30, 20))
    expected = torch.from_numpy(np.array(shorter)).permute(2, 0, 1).int()
    assert (data.train.pixels[4, :, 2:-2, 2:-2].int() - expected[:, 2:-2, 2:-2]).abs().max() <= 1


def test_larger_pictures_are_decoded_by_several_threads(folder):
    for i in range(150):
        write_picture(folder / "train" / "ant" / f"{i:03d}.png", shape=(64, 64), seed=i)
    data = ImageFolder(root=str(folder), size=64).load()
    files = sorted(file.name for file in (folder / "train" / "ant").iterdir())
    for i in (0, 77, 149):
        assert torch.equal(data.train.pixels[files.index(f"{i:03d}.png")], picture_tensor(i, (64, 64)))


def test_broken_picture_is_named(folder):
    broken = folder / "test" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"{broken}: is no readable picture .*; replace or delete it"):
        ImageFolder(root=str(folder)).load()


def test_missing_folders_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/train: .*set data\.root"):
        ImageFolder(root=str(tmp_path / "nowhere")).load()
    (folder / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat: a class without pictures"):
        ImageFolder(root=str(folder)).load()
    (folder / "train" / "cat").rename(folder / "test" / "cat")
    with pytest.raises(DataError, match=r"test/cat: a class without training images"):
        ImageFolder(root=str(folder)).load()
    (folder / "test").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"pictures/test: there is no such folder"):
        ImageFolder(root=str(folder)).load()


def test_cifar10_from_an_image_folder(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(CIFAR10_CLASSES):
            write_picture(tmp_path / part / name / "0.png", seed=label)
    data = Cifar10(root=str(tmp_path)).load()
    assert data.classes == CIFAR10_CLASSES and data.train.labels.tolist() == list(range(10))
    with pytest.raises(DataError, match=r"not CIFAR-100 .*100 classes"):
        Cifar100(root=str(tmp_path)).load()
    for part in ("train", "test"):
        (tmp_path / part / "automobile").rename(tmp_path / part / "car")  # would come after bird
    with pytest.raises(DataError, match="rename the folders"):
        Cifar10(root=str(tmp_path)).load()


@pytest.mark.skipif(REAL is None, reason="ROBUSTKIT_CIFAR10_DIR is not set")
def test_real_cifar10():
    data = Cifar10(root=REAL).load()
    assert (len(data.train), len(data.test)) == (50000, 10000)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    mean = data.train.pixels[::10].float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01)
