"""The next batch is fetched while the present one is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from robustkit.data.images import Images


class Ahead:
    """`images`, whose rows a thread fetches before they are asked for, where it was told which: `expect`.

    What is fetched is the same with it and without it, and rows that nobody expected are fetched as well. One thread
    does all the fetching, so `images` need not stand several; its errors are raised by the `fetch` they belong to.
    With `pin`, pixels are put where an accelerator takes them from without waiting.
    """

    def __init__(self, images: Images, *, pin: bool = False) -> None:
        self.images = images
        self._pin = pin
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="robustkit-images")
        self._expected: dict[bytes, Future[Tensor]] = {}

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def expect(self, pieces: Iterable[Tensor]) -> None:
        """Begins to fetch the rows of each piece (B,) in turn; each will be asked for with these very rows."""
        for index in pieces:
            self._expected[_name(index)] = self._worker.submit(self._get, index)

    def fetch(self, index: Tensor) -> Tensor:
        found = self._expected.pop(_name(index), None)
        return (found or self._worker.submit(self._get, index)).result()

    def _get(self, index: Tensor) -> Tensor:
        pixels = self.images.fetch(index)
        return pixels.pin_memory() if self._pin and pixels.device.type == "cpu" else pixels


def _name(index: Tensor) -> bytes:
    return index.numpy().tobytes()
