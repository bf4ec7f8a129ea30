"""What an evaluation has found so far, on disk: killed at any moment, it goes on from the last finished stage.

One line of JSON for each stage of each slice, appended and synced, in a file of each process's own. A line cut short by
a kill is as if it had not been written. Lines count only for the same evaluation: the file's name carries a digest of
the model's weights, the measure, the threat model, the seed and the choice of images, and every line a digest of each
of its images.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.checkpoint import naming
from robustkit.core.reading import LARGEST, parse_json, read_text
from robustkit.core.strategy import Outcomes


@attrs.frozen
class Entry:
    """A slice as far as it is judged: `images` has 8 characters for each image, `seconds` are all that it took."""

    images: str
    outcomes: Outcomes
    finished: bool
    seconds: float

    def to_json(self, number: int) -> dict[str, Any]:
        return {
            "slice": number,
            "images": self.images,
            "right": "".join("1" if right else "0" for right in self.outcomes.right.tolist()),
            "breakdown": self.outcomes.breakdown,
            "notes": list(self.outcomes.notes),
            "shares": self.outcomes.shares,
            "finished": self.finished,
            "seconds": self.seconds,
        }


class Ledger:
    """The entries of one measure, in `folder`; without a folder, in memory alone."""

    def __init__(self, folder: Path | None = None, identity: str = "", rank: int = 0) -> None:
        self._folder, self._identity, self._rank = folder, identity, rank

    def read(self) -> dict[int, Entry]:
        """The latest entry of each slice, from all processes that ever wrote one."""
        entries: dict[int, Entry] = {}
        for path in self._files():
            for line in read_text(path, 4 * LARGEST, errors="replace").splitlines():
                try:
                    data = parse_json(line)
                    right = torch.tensor([sign == "1" for sign in data["right"]], dtype=torch.bool)
                    found = Entry(
                        str(data["images"]),
                        Outcomes(
                            right,
                            {str(stage): float(share) for stage, share in data["breakdown"].items()},
                            tuple(map(str, data["notes"])),
                            {str(stage): dict(shares) for stage, shares in data.get("shares", {}).items()},
                        ),
                        bool(data["finished"]),
                        float(data["seconds"]),
                    )
                    number = int(data["slice"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # cut short
                known = entries.get(number)
                if known is None or len(found.outcomes.breakdown) >= len(known.outcomes.breakdown):
                    entries[number] = found
        return entries

    def write(self, number: int, entry: Entry) -> None:
        if self._folder is None:
            return
        path = self._folder / f"{self._identity}.{self._rank}.jsonl"
        self._folder.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("a", encoding="utf-8") as file:
            if file.tell() and not _ends_a_line(path):
                file.write("\n")
            file.write(json.dumps(entry.to_json(number)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forgets everything: the result is recorded elsewhere."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self._folder is not None and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _files(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(f"{self._identity}.*.jsonl"))


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def digest_of_weights(model: nn.Module) -> str:
    """A digest of everything in the model's state."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_images(x: Tensor, y: Tensor) -> str:
    """8 characters for each image and its label, in their order."""
    digests = []
    for image, label in zip(x.float().cpu().contiguous().numpy(), y.tolist(), strict=True):
        digests.append(hashlib.blake2b(image.tobytes() + str(label).encode(), digest_size=4).hexdigest())
    return "".join(digests)
