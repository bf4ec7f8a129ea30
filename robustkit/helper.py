"""A helper: a network that was trained before, and only looks on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.core.checkpoint import facts_of
from robustkit.core.errors import CheckpointError, SpecError, UserError
from robustkit.core.model import Model, RobustModel
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Head
from robustkit.core.world import World
from robustkit.engine import Predictor


@spec
class Helper:
    """The network of a finished run (`run`: its folder, or that of an exported model).

    `sha256` is its checkpoint's, as the .json beside it has it; None takes the one that is there when training begins,
    and a resumed run must find the same again. `made_by` is the recipe that makes such a run.
    """

    run: str = setting(default="runs/helper", location=True)
    checkpoint: Literal["last", "best"] = "best"
    sha256: str | None = None
    made_by: str = setting(default="recipes/uiat_helper.py:cifar10", location=True)

    def validate(self) -> None:
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise SpecError(f"must be 64 hexadecimal digits, got '{self.sha256}'", place="Helper.sha256")

    def network(self, world: World) -> tuple[RobustModel, str]:
        """The network, on the CPU, and its checkpoint's sha256. Nothing of the run's is executed.

        Raises:
            UserError: there is none (the line says how to make it), its training is not finished, it is for other
                images, damaged, or its head or backbone is not installed.
        """
        from robustkit import loading  # here: of all losses only those with a helper need it

        folder = Path(self.run)
        if not folder.is_dir():
            remedy = f"make it with: robustkit run {self.made_by} --out {self.run}"
            raise UserError("the helper's run is not there", place=self.run, remedy=remedy)
        last = folder / "checkpoints" / "last.safetensors"
        if last.is_file():
            facts = facts_of(last, epoch=int, recipe=dict)
            done, epochs = facts["epoch"], facts["recipe"].get("epochs")
            if not isinstance(epochs, int) or done < epochs:
                remedy = f"robustkit resume {self.run}"
                raise UserError(f"the helper stands at epoch {done} of {epochs}", place=self.run, remedy=remedy)
        state, facts = loading.read(folder, self.checkpoint)
        shape, classes = tuple(facts["image_shape"]), len(facts["classes"])
        if (shape, classes) != (world.image_shape, world.classes):
            fault = f"the helper is for {classes} classes of {shape} images, the data have {world.classes} of"
            raise UserError(f"{fault} {world.image_shape}", place=self.run, remedy="train one on these data")
        loading.refuse_another_size(state, facts, folder)
        network = loading.build(facts)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            fault = f"the helper's weights do not fit its recipe: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(fault, place=self.run) from error
        return network, str(facts["sha256"])


@spec
class Untrained:
    """No helper, but a network with random weights: for smoke runs and tests, where nothing is learnt."""

    model: Model
    head: Head

    def network(self, world: World) -> tuple[RobustModel, str]:
        from robustkit import loading

        return loading.fresh(self.model, self.head, world.classes, world.image_shape), ""


class Frozen(nn.Module):
    """A helper at work: never trained, always in eval mode and float32.

    State: whose weights they are. The weights themselves stay out of checkpoints and of the optimiser, and are loaded
    when training begins: a finished run is judged without them.
    """

    sha256: Tensor

    def __init__(self, helper: Helper | Untrained, world: World) -> None:
        super().__init__()
        self.helper, self.world = helper, world
        pinned = helper.sha256 if isinstance(helper, Helper) else None
        self.register_buffer("sha256", _bytes(pinned or ""))
        self._network: list[RobustModel] = []  # in a list: a submodule would be saved and trained

    def ready(self) -> str:
        """Loads the network if it is not there yet, and says in words which it is ("" for an untrained one).

        Raises:
            UserError: as `Helper.network`; or it is not the one that the recipe pins, or that training began with.
        """
        if not self._network:
            network, found = self.helper.network(self.world)
            if isinstance(self.helper, Helper):
                self._recognise(found, self.helper.run)
            network = network.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._network.append(network.requires_grad_(False).eval())
        if not isinstance(self.helper, Helper):
            return ""
        return f"{self.helper.run}, {self.helper.checkpoint}, sha256 {bytes(self.sha256.tolist()).hex()}"

    def _recognise(self, sha256: str, place: str) -> None:
        known = bytes(self.sha256.tolist()).hex()
        if known.strip("0") and known != sha256:
            fault = f"the helper is another one: its sha256 is {sha256 or 'none'}, not {known}"
            raise UserError(fault, place=place, remedy="put back the one that is meant, or begin a new run")
        self.sha256.copy_(_bytes(sha256))

    @property
    def network(self) -> RobustModel:
        """It, loaded: in eval mode, on the world's device."""
        if not self._network:
            self.ready()
        return self._network[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return Predictor(self.network, self.world.device)(images).logits


def _bytes(sha256: str) -> Tensor:
    """(32,) uint8, zeros where nothing is known."""
    return torch.tensor(list(bytes.fromhex(sha256 or 64 * "0")), dtype=torch.uint8)
