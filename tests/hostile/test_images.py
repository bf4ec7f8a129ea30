"""Pictures and arrays that are odd, damaged, or made to hurt."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import in_time
from PIL import Image

from robustkit.cli.main import main
from robustkit.core.errors import DataError
from robustkit.data.stored import Stored, array_header
from robustkit.datasets import ImageFolder, npz
from robustkit.datasets.image_folder import FORMATS, decode, formats
from robustkit.datasets.npz import read_npz
from robustkit.prediction import find_pictures


def noise(*shape: int, seed: int = 0, most: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, shape).astype(dtype)


def frames(count: int = 3, mode: str = "RGB") -> list[Image.Image]:
    return [Image.fromarray(noise(9, 7, len(mode), seed=number), mode=None) for number in range(count)]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has so many grey pixels, and inflates to zeros without end."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


# Pictures that are read


def moving(path: Path, **options: Any) -> Path:
    first, *others = frames()
    return saved(path, first, save_all=True, append_images=others, duration=50, **options)


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {})])
def test_of_moving_pictures_the_first_is_taken(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = moving(tmp_path / name, **options)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.array_equal(decode(path), noise(9, 7, 3, seed=0).transpose(2, 0, 1))


def test_of_a_moving_gif_the_first_is_taken(tmp_path: Path) -> None:
    first, other = (Image.fromarray(np.full((5, 5), grey, np.uint8)) for grey in (40, 200))
    path = saved(tmp_path / "a.gif", first, save_all=True, append_images=[other])
    assert np.array_equal(decode(path), np.full((3, 5, 5), 40))


def test_cmyk_palettes_and_sixteen_bits(tmp_path: Path) -> None:
    inks = np.zeros((4, 4, 4), np.uint8)
    inks[..., 0] = 255  # cyan
    cyan = decode(saved(tmp_path / "cyan.jpg", Image.fromarray(inks, mode="CMYK"), quality=95))
    assert cyan.shape == (3, 4, 4) and cyan[0].max() < 40 and cyan[1:].min() > 150
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    path = saved(tmp_path / "palette.png", palette, transparency=0)  # colour 0 is clear: white shows
    assert decode(path)[:, 0, 0].tolist() == [255, 255, 255] and decode(path)[:, 0, 1].tolist() == [200, 100, 50]
    path = saved(tmp_path / "half.png", palette, transparency=bytes([128, 255]))
    assert decode(path)[:, 0, 1].tolist() == [200, 100, 50] and 120 < decode(path)[0, 0, 0] < 140
    deep = saved(tmp_path / "deep.png", Image.fromarray(np.array([[0, 65535]], np.uint16)))
    assert decode(deep)[0].tolist() == [[0, 255]]


def test_a_name_says_nothing_of_the_format(tmp_path: Path) -> None:
    pixels = noise(6, 6, 3)
    for name in ("really.jpg", "really.txt", "really.npy", "really"):
        assert np.array_equal(decode(saved(tmp_path / name, Image.fromarray(pixels), format="PNG"))[0], pixels[..., 0])


# Pictures that are not


def whole(name: str) -> bytes:
    held = io.BytesIO()
    frames(1)[0].save(held, name)
    return held.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%s) (w) file closefile showpage\n"
BROKEN: dict[str, bytes] = {
    "0 bytes": b"",
    "text": b"no picture",
    "page": b"<html><img src=x onerror=alert(1)></html>",
    "half a png": whole("PNG")[:150],
    "half a jpeg": whole("JPEG")[:300],
    "half a webp": whole("WEBP")[:60],
    "half a gif": whole("GIF")[:60],
    "half a tiff": whole("TIFF")[:100],
    "header of a png": whole("PNG")[:33],
    "30,000 x 30,000": png_of(30_000, 30_000),
    "9,000 x 9,000": png_of(9_000, 9_000),
    "2^31 - 1 wide": png_of((1 << 31) - 1, 1),
    "0 wide": png_of(0, 5),
    "more pixels than there are": png_of(5_000, 5_000),
    "floats": b"",  # written below
    "postscript": EPS,
    "windows metafile": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(100),
    "archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_picture(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *words, **options: pytest.fail("a program was started"))
    path = tmp_path / "photo.png"
    path.write_bytes(BROKEN[kind])
    if kind == "floats":
        Image.fromarray(np.ones((3, 3), np.float32)).save(path, "TIFF")
    with in_time(), warnings.catch_warnings(), pytest.raises(DataError) as error:
        warnings.simplefilter("ignore")  # of Pillow's, where files end early; they are shown once
        decode(path)
    assert f"{path}: is no readable picture" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "photo.png")
    with in_time(), pytest.raises(DataError, match="is no readable picture"):
        decode(tmp_path / "photo.png")


def test_formats() -> None:
    assert set(formats()) <= set(FORMATS) and {"PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"} <= set(formats())
    assert not {"EPS", "WMF", "PSD", "FITS", "HDF5"} & set(formats())


def test_in_a_folder_and_before_a_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set is refused whole; predict goes on with the others, says why in a line, and exits with 1."""
    good = noise(8, 8, 3)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            saved(tmp_path / part / name / "0.png", Image.fromarray(good))
    assert len(ImageFolder(root=str(tmp_path)).load().train) == 2
    for kind in ("30,000 x 30,000", "text", "0 bytes"):
        (tmp_path / "train" / "bee" / "1.png").write_bytes(BROKEN[kind])
        with in_time(), pytest.raises(DataError, match=r"bee/1\.png: is no readable picture"):
            ImageFolder(root=str(tmp_path)).load()
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, content in enumerate(BROKEN.values()):
        (photos / f"{number:02}.png").write_bytes(content)
    os.mkfifo(photos / "pipe.png")
    saved(photos / "good.png", Image.fromarray(good))
    broken = sorted(path for path in photos.iterdir() if path.name not in ("good.png", "pipe.png"))
    assert find_pictures([photos]) == [*broken, photos / "good.png"]  # no pipe
    words = ["predict", str(finished), str(photos), str(photos / "pipe.png"), "--device", "cpu"]
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(words) == 1
    out, err = capsys.readouterr()
    assert "good.png" in out and len(err.splitlines()) == len(broken) + 1
    for path, line in zip([*broken, photos / "pipe.png"], err.splitlines(), strict=True):
        assert line.startswith(f"{path}: is no readable picture (")


# Arrays


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 MB of zeros in 300 kB; nothing is written. The limits hold at any size, so the test is a small one."""
    monkeypatch.setattr(npz, "BOMB", 1 << 20)
    image = np.zeros((1000, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "bomb.npz", image=image, label=np.zeros(1000, np.int64))
    with pytest.raises(DataError, match=r"'image' unpacks to [\d,]+ times its size") as error:
        read_npz(tmp_path / "bomb.npz")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.npy"))
    np.savez_compressed(tmp_path / "noise.npz", image=noise(1000, 32, 32, 3), label=np.zeros(1000, np.int64))
    assert len(read_npz(tmp_path / "noise.npz")) == 1000
    monkeypatch.setattr(npz, "MOST", 999)
    with pytest.raises(DataError, match="holds 1,000 images, more than 999"):
        read_npz(tmp_path / "noise.npz")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked before hours are spent on filling it."""
    np.savez(tmp_path / "made.npz", image=noise(4, 8, 8, 3), label=np.arange(4))
    full = type("Usage", (), {"free": 767})
    monkeypatch.setattr(npz.shutil, "disk_usage", lambda path: full)
    with pytest.raises(DataError, match=r"there is no room for them.*data\.cache"):
        read_npz(tmp_path / "made.npz")
    full.free = 768
    assert len(read_npz(tmp_path / "made.npz")) == 4


def header(shape: Any, descr: str = "|u1", version: int = 1) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def archive(path: Path, image: bytes, label: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("image.npy", image)
        made.writestr("label.npy", label)
    return path


SHAPES = {
    "negative": header("(-1, -1, 8, 8)") + bytes(64),
    "all negative": header("(-2, -2, -2, -2)") + bytes(16),
    "overflowing": header(f"({1 << 62}, {1 << 62}, 8, 8)") + bytes(64),
    "of huge numbers": header(f"({'9' * 3000}, 1, 1, 1)") + bytes(64),
    "of booleans": header("(True, 8, 8, 1)") + bytes(64),
    "of texts": header("('6', 8, 8, 1)") + bytes(64),
    "no shape": header("None") + bytes(64),
    "an expression": header("(__import__('os').abort(), 8, 8, 1)") + bytes(64),
    "deep": header("(" * 3000 + ")" * 3000) + bytes(64),
    "header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64),
    "header of zeros": b"\x93NUMPY\x02\x00\xff\xff\xff\x00" + bytes(1 << 24),
    "a version to come": b"\x93NUMPY\x09\x00" + bytes(64),
    "pickles": header("(6, 8, 8, 1)", "|O") + b"\x80\x04.",
    "records": header("(6, 8, 8, 1)", "|V1") + bytes(384),
    "half floats": header("(6, 8, 8, 1)", "<f2") + bytes(768),
}
LABELS = header("(6,)", "<i8") + bytes(48)
IMAGES = header("(6, 8, 8, 1)") + bytes(384)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "made.npz", SHAPES[shape], LABELS)
    with in_time(), pytest.raises(DataError, match=r"made\.npz: ") as error:
        read_npz(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 5000 and not list(tmp_path.glob("*.npy"))
    stored = tmp_path / "stored.npy"
    stored.write_bytes(SHAPES[shape])
    with in_time(), pytest.raises(DataError, match=r"stored\.npy: "):
        Stored(stored, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    "label",
    [
        header("(6,)", "<f2") + np.full(6, np.nan, np.float16).tobytes(),
        header("(6,)", "<f8") + np.full(6, np.nan).tobytes(),
        header("(-6,)", "<i8") + bytes(48),
        header("(6, 1)", "<i8") + bytes(48),
        header("()", "<i8") + bytes(8),
        header("(6,)", "|b1") + bytes(6),
        header("(6,)", "<M8[s]") + bytes(48),
        header("(6,)", "<c16") + bytes(96),
        header("(6,)", "<U3") + bytes(72),
        LABELS + bytes(1 << 24),
        LABELS[:-1],
        b"",
    ],
    ids=lambda label: repr(label[10:50]),
)
def test_labels(label: bytes, tmp_path: Path) -> None:
    with in_time(), pytest.raises(DataError, match=r"made\.npz: ") as error:
        read_npz(archive(tmp_path / "made.npz", IMAGES, label))
    assert "\n" not in str(error.value)


def test_sizes_that_the_archive_s_index_does_not_tell_truly(tmp_path: Path) -> None:
    """The index says what to expect: what is more is not unpacked, what is less is missed."""
    whole = archive(tmp_path / "made.npz", IMAGES, LABELS).read_bytes()
    place = whole.index(b"PK\x01\x02") + 24  # the first member's size in the index
    size = struct.unpack_from("<I", whole, place)[0]
    for said in (0, 1, size - 1, size + 1, 1 << 31, (1 << 32) - 2):
        (tmp_path / "made.npz").write_bytes(whole[:place] + struct.pack("<I", said) + whole[place + 4 :])
        with in_time(), pytest.raises(DataError, match=r"made\.npz: "):
            read_npz(tmp_path / "made.npz")
    assert not list(tmp_path.glob("*.npy"))


def test_names_in_the_archive_are_shown_in_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "made.npz", "w") as made:
        made.writestr("i\nmage\x1b[31m.npy", IMAGES)
    with pytest.raises(DataError, match=r"holds no 'image', but i\\nmage\\x1b\[31m;") as error:
        read_npz(tmp_path / "made.npz")
    assert "\n" not in str(error.value)


def test_an_array_s_header_is_read_to_its_end_only() -> None:
    for version in (1, 2):
        stream = io.BytesIO(b"before" + header("(3,)", "<i2", version) + b"after")
        stream.seek(6)
        assert array_header(stream) == ((3,), False, np.dtype("<i2")) and stream.read() == b"after"
