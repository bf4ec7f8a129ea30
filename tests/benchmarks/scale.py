"""What do a million images and a thousand classes cost?

    python tests/benchmarks/scale.py --folder /tmp/scale                  # 7 GB of files there, deleted afterwards
    python tests/benchmarks/scale.py --folder /tmp/scale --images 20000   # a try

A file of random images is written as published ones are (npz: `image` (N, 32, 32, 3) uint8, `label`), and converted as
`with-synthetic` does. Then it is asked what a process holds while it trains on them, whether a batch of 512 costs the
same from a thousand, 50,000 and a million images, what fetching ahead hides, what an epoch's order and the memory of
per-sample targets cost, and whether 1,000 classes take longer than 10. Every question is answered in a process of its
own. The network is one convolution (of the last question: `convnet_small`), so that what is asked about is not hidden
behind its work.

*cold* means that the system was told to forget the file: pictures come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from clock import middle, seconds
from timm.models import register_model
from torch import Tensor, nn

from robustkit import Model, Recipe, Validation
from robustkit.attacks import PGD
from robustkit.backbones import Backbone
from robustkit.core.loop import train, train_step
from robustkit.core.memory import PerSampleMemory
from robustkit.core.order import Mixture, epoch_order
from robustkit.core.parts import Parts
from robustkit.core.rng import whole
from robustkit.core.world import World
from robustkit.data import Ahead, Images, InMemory, Stored, make_batch
from robustkit.data.augment import Augmentation, augment
from robustkit.datasets import Synthetic, WithSynthetic
from robustkit.datasets.npz import read_npz
from robustkit.display import Silent
from robustkit.losses import Align, CrossEntropy
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.reporting import consoles
from robustkit.reporting.tables import plain_table
from robustkit.schedules import Constant
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf

BATCH, SHAPE = 512, (3, 32, 32)
CPU = torch.device("cpu")
WINDOWS = 7
PIECE = 10_000
"""Images that are written at once."""

Answer = dict[str, Any]


class Net(Backbone):
    """One convolution: hardly any work."""

    num_features = 16

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_chans, 16, 4, 4), nn.ReLU())
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@register_model
def scale_net(pretrained: bool = False, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> Net:
    return Net(num_classes, in_chans)


def write_npz(path: Path, count: int, classes: int = 10) -> None:
    """Random pixels and labels, never all in memory."""
    draws = np.random.default_rng(0)
    channels, height, width = SHAPE
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, PIECE):
                file.write(draws.bytes(min(PIECE, count - start) * channels * height * width))
        with archive.open("label.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, draws.integers(0, classes, count))


def held() -> dict[str, float]:
    """MB that this process holds: now, anonymous (its own) and of files, and at the peak. Linux only."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    names = {"now": "VmRSS", "own": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: round(int(lines[field].split()[0]) / 1024, 1) for name, field in names.items()}


def forget(path: Path) -> None:
    """Tells the system that nobody needs the file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def converted(folder: Path, count: int) -> Stored:
    return read_npz(folder / f"{count}.npz")


def recipe_of(folder: Path, count: int, **parts: Any) -> Recipe:
    inner = Synthetic(train=2 * BATCH, test=16, augment="crop-flip")
    given: dict[str, Any] = {
        "data": WithSynthetic(inner=inner, file=f"{count}.npz", root=str(folder), original=0.3),
        "model": Model(backbone="scale_net"),
        "threat": Linf(),
        "attack": PGD(steps=10),
        "loss": CrossEntropy(),
        "schedule": Constant(),
        "optimizer": SGD(lr=0.01),
        "epochs": 1000,
        "batch_size": BATCH,
        "validation": Validation(images=0),
        "evaluation": (),
    }
    return Recipe(**given | parts)


# Questions


def conversion(folder: Path, count: int) -> Answer:
    before = held()
    began = time.perf_counter()
    images = converted(folder, count)
    return {"seconds": time.perf_counter() - began, "gb": images.path.stat().st_size / 1e9, "mb": held(), "was": before}


def training(folder: Path, count: int) -> Answer:
    """Steps over a million images: what the process holds after a few, and after many."""
    parts = load_parts(recipe_of(folder, count), make_world(recipe_of(folder, count), "cpu"))
    after: dict[int, dict[str, float]] = {}
    for steps in (5, 50, 200):
        taken = _train_to(parts, steps)
        after[steps] = held()
    return {"mb after steps": after, "seconds a step": taken}


def _train_to(parts: Parts, steps: int) -> float:
    """Seconds for each step."""

    def nothing(*arguments: object) -> None: ...

    began, first = time.perf_counter(), parts.step
    train(
        parts,
        display=Silent(),
        save=nothing,
        rewind=nothing,
        go_back=nothing,
        set_aside=nothing,
        record=nothing,
        should_stop=lambda: False,
        should_save=lambda: False,
        until=steps,
    )
    return (time.perf_counter() - began) / (parts.step - first)


def batches(folder: Path, count: int) -> Answer:
    """Seconds to make a batch from so many images: from memory, from a file, and augmented."""
    draws = torch.Generator().manual_seed(0)
    found: Answer = {}
    for size in sorted({1000, min(50_000, count), count}):
        images = converted(folder, size)
        rows = [torch.randint(size, (BATCH,), generator=draws) for _ in range(20)]
        sources: dict[str, Any] = {"file": images}
        if size < count or count <= 50_000:
            sources["memory"] = InMemory(images.fetch(torch.arange(size)), images.labels)
        for name, source in sources.items():
            make = partial(_make, source, cycle(rows))
            found[f"{size} {name}"] = middle([seconds(make, CPU, len(rows)) for _ in range(WINDOWS)])
        if size == count:
            cold = []
            for index in rows:
                forget(images.path)
                cold.append(seconds(partial(_make, images, iter([index])), CPU))
            found[f"{size} file, cold"] = middle(cold)
    x, augmentation = torch.rand(BATCH, *SHAPE), Augmentation(flip=True)
    windows = [seconds(lambda: augment(x, augmentation, whole(x, 0, "scale")), CPU, 5) for _ in range(WINDOWS)]
    found["crop and flip"] = middle(windows)
    return found


def _make(images: Images, rows: Iterator[Tensor]) -> object:
    return make_batch(images, next(rows), device=CPU)


class Late:
    """Images that come from a disk which takes 0.2 s a batch, as one over a network may."""

    def __init__(self, images: Any) -> None:
        self.images, self.labels, self.shape = images, images.labels, images.shape

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, index: Tensor) -> Tensor:
        time.sleep(0.2)
        return self.images.fetch(index)  # type: ignore[no-any-return]


def ahead(folder: Path, count: int) -> Answer:
    """Seconds a step: images in memory, in a file, and on a slow disk; fetched ahead, and when they are needed."""
    recipe = recipe_of(folder, count)
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    assert isinstance(parts.train, Ahead)
    joined = parts.train.images
    few = torch.unique(torch.cat([parts.order(epoch) for epoch in range(2)]))
    places = torch.searchsorted(few, torch.arange(len(joined))).clamp_max(len(few) - 1)
    memory = Chosen(InMemory(joined.fetch(few), joined.labels[few]), places, joined.labels)
    sources = {
        "memory": memory,
        "file, when needed": joined,
        "file, ahead": Ahead(joined),
        "slow, when needed": Late(joined),
        "slow, ahead": Ahead(Late(joined)),
    }
    windows: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(WINDOWS - 2):
        for name, source in sources.items():
            parts.train = source
            _train_to(parts, parts.step + 1)  # nothing was expected of its batch
            windows[name].append(_train_to(parts, parts.step + 10))
    return {name: middle(values) for name, values in windows.items()}


@attrs.frozen(eq=False)
class Chosen:
    """Those of a large set that two epochs use, in memory; other rows give wrong pictures, which costs the same."""

    images: InMemory
    places: Tensor
    labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.places)

    def fetch(self, index: Tensor) -> Tensor:
        return self.images.fetch(self.places[index])


def order(folder: Path, count: int) -> Answer:
    """Seconds for the order of an epoch."""
    rows = torch.arange(count)
    mixture, mixed = Mixture(own=50_000, share=0.3), torch.arange(50_000 + count)
    actions: dict[str, Callable[[], object]] = {
        f"shuffle {min(50_000, count)}": lambda: epoch_order(rows[:50_000], 1, 0),
        f"shuffle {count}": lambda: epoch_order(rows, 1, 0),
        f"mix 50000 and {count}": lambda: mixture.epoch_order(mixed, BATCH, 1, 0),
    }
    return {name: middle([seconds(action, CPU) for _ in range(WINDOWS)]) for name, action in actions.items()}


def targets(folder: Path, count: int) -> Answer:
    """The memory of per-sample targets: MB, and seconds to read and write a batch's rows."""
    found: Answer = {}
    for samples, classes in ((50_000, 10), (50_000 + count, 10), (50_000 + count, 100)):
        world = World(samples=samples, training=samples, classes=classes, image_shape=SHAPE)
        memory = PerSampleMemory(world, classes)
        index, rows = torch.randint(samples, (BATCH,)), torch.rand(BATCH, classes)

        def both(memory: PerSampleMemory = memory, index: Any = index, rows: Any = rows) -> None:
            memory.write(index, rows)
            memory.read(index)

        both()
        size = sum(tensor.numel() * tensor.element_size() for tensor in memory.state_dict().values())
        windows = [seconds(both, CPU, 10) for _ in range(WINDOWS)]
        found[f"{samples} x {classes}"] = {"mb": size / 1e6} | middle(windows)
    return found


def classes(folder: Path, count: int) -> Answer:
    """Seconds a step with 10 and with 1,000 classes, by turns: adversarial training, and UIAT."""
    uiat = {"target": Momentum(inner=Universal(), start=0.0), "loss": Align()}
    found: Answer = {}
    for method, parts in (("PGD-AT", {}), ("UIAT", uiat)):
        made = {}
        for number in (10, 1000):
            data = Synthetic(train=2 * BATCH, test=16, classes=number)
            recipe = recipe_of(folder, count, data=data, model=Model(backbone="convnet_small"), batch_size=128, **parts)
            made[number] = load_parts(recipe, make_world(recipe, "cpu"))
        rows = {number: one.order(0)[:128] for number, one in made.items()}
        windows: dict[int, list[float]] = {number: [] for number in made}
        for turn in range(WINDOWS + 1):
            for number, one in made.items():
                taken = seconds(partial(train_step, one, rows[number]), CPU)
                if turn:  # the first is warm-up
                    windows[number].append(taken)
        ratios = [slow / fast for fast, slow in zip(windows[10], windows[1000], strict=True)]
        found[method] = {str(number): middle(values) for number, values in windows.items()}
        found[method]["ratio"] = statistics.median(ratios)
    return found


QUESTIONS: dict[str, Callable[[Path, int], Answer]] = {
    f.__name__: f for f in (conversion, training, batches, ahead, order, targets, classes)
}


def ask(name: str, folder: Path, count: int) -> Answer:
    """The answer of a fresh process."""
    words = [sys.executable, __file__, "--folder", str(folder), "--images", str(count), "--question", name]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def show(answers: dict[str, Answer]) -> None:
    console = consoles.results()
    for name, answer in answers.items():
        table = plain_table("", "", title=name)
        for key, value in answer.items():
            table.add_row(key, _text(value))
        console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict) and {"seconds", "fastest", "slowest"} <= value.keys():
        size = f"{value['mb']:.1f} MB, " if "mb" in value else ""
        low, middle_, high = (1e3 * value[key] for key in ("fastest", "seconds", "slowest"))
        return f"{size}{middle_:.2f} ms ({low:.2f}-{high:.2f})"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(part)}" for key, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files: made, and removed at the end")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="writes the answers as JSON")
    parser.add_argument("--only", nargs="*", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--keep", action="store_true", help="take files that are there, and leave them")
    parser.add_argument("--question", choices=list(QUESTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.question:
        print(json.dumps(QUESTIONS[arguments.question](arguments.folder, arguments.images)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=arguments.keep)  # else nobody's files are in the way, or removed
    answers: dict[str, Answer] = {}
    try:
        for count in sorted({1000, min(50_000, arguments.images), arguments.images}):
            path = arguments.folder / f"{count}.npz"
            if not path.exists():
                write_npz(path, count)
        for name in arguments.only:
            answers[name] = ask(name, arguments.folder, arguments.images)
            if arguments.out:
                arguments.out.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)
        show(answers)


if __name__ == "__main__":
    main()
