"""Tiny ImageNet, as it is published: its validation pictures lie in one folder, and a table says what they show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from robustkit.core.errors import DataError
from robustkit.core.reading import read_text
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data
from robustkit.datasets.image_folder import decoded, visible
from robustkit.datasets.location import Sought
from robustkit.datasets.published import refuse_others

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
VARIABLE = "ROBUSTKIT_TINY_IMAGENET_DIR"


@registry("dataset").register("tiny-imagenet")
@spec
class TinyImageNet:
    """Tiny ImageNet, 64x64 colour, 200 classes, 100,000 training images, 10,000 to test (Le and Yang, CS231N 2015).

    The published test images have no labels: the validation images are tested on, as in the literature. Looked for in
    `root`, else ROBUSTKIT_TINY_IMAGENET_DIR, else ROBUSTKIT_DATA_DIR, else ./data: the folder tiny-imagenet-200, in
    there or that itself, as unpacked, or with val/ sorted into a folder for each class. Class k is the k-th of the
    sorted WordNet numbers, its name the first word of words.txt. `per_class` keeps the first so many training images of
    each class: studies on a small budget.
    """

    root: str | None = setting(default=None, location=True)
    augment: Augment = "crop-flip"
    padding: Padding = "zero"
    per_class: int | None = setting(default=None, at_least=1)

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (3, 64, 64), 200

    @property
    def sought(self) -> Sought:
        files = ("wnids.txt", "train", "val")
        return Sought(self.root, VARIABLE, files, or_folder=False, inside="tiny-imagenet-200")

    def load(self) -> Data:
        """Images (N, 3, 64, 64).

        Raises:
            DataError: it is not there, or damaged.
        """
        folder = self.sought.folder
        if self.sought.form() is None:
            raise DataError(
                f"Tiny ImageNet is not there (no wnids.txt and train/ and val/ in {folder.resolve()})",
                remedy=f"unpack {ADDRESS}, and set data.root or {VARIABLE} to where its folder is",
            )
        numbers = sorted(set(read_text(folder / "wnids.txt").split()))
        train = [_pictures(folder / "train" / number)[: self.per_class] for number in numbers]
        data = Data(decoded(train), decoded(_validation(folder / "val", numbers)), _names(folder, numbers))
        refuse_others(data, "Tiny ImageNet", self.facts, folder)
        return data


def _pictures(folder: Path) -> list[Path]:
    """Those of a class: in images/, where boxes are beside it, or in the folder itself."""
    inner = folder / "images"
    inner = inner if inner.is_dir() else folder
    found = [inner / name for name in visible(inner) if not name.endswith(".txt")] if inner.is_dir() else []
    if not found:
        raise DataError("a class without pictures", place=str(folder), remedy=f"unpack {ADDRESS} again")
    return found


def _validation(folder: Path, numbers: list[str]) -> list[list[Path]]:
    """By class, in the order of `numbers`."""
    table = folder / "val_annotations.txt"
    if not (table.is_file() and (folder / "images").is_dir()):
        return [_pictures(folder / number) for number in numbers]
    found: dict[str, list[Path]] = {number: [] for number in numbers}
    for line, text in enumerate(read_text(table).splitlines(), start=1):
        name, _, rest = text.partition("\t")
        number = rest.partition("\t")[0]
        if number not in found or Path(name).name != name:
            fault = f"line {line} names no picture and class of Tiny ImageNet: {text[:60]!r}"
            raise DataError(fault, place=str(table), remedy=f"unpack {ADDRESS} again")
        found[number].append(folder / "images" / name)
    return [sorted(paths) for paths in found.values()]


def _names(folder: Path, numbers: list[str]) -> tuple[str, ...]:
    """'goldfish' for n01443537; the number itself where two have that name, or it is nowhere said."""
    words = folder / "words.txt"
    lines = read_text(words, errors="replace").splitlines() if words.is_file() else []
    said = {number: rest.partition(",")[0].strip() for number, _, rest in (line.partition("\t") for line in lines)}
    names = [said.get(number) or number for number in numbers]
    count = Counter(names)
    return tuple(name if count[name] == 1 else number for name, number in zip(names, numbers, strict=True))
