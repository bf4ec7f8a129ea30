"""The same training step by robustkit and by others: one process, steps by turns, the same network, batch and attack.

    python tests/benchmarks/peers.py --backbone resnet18_cifar_w16 --batch 64
    python tests/benchmarks/peers.py --device cuda --precision bf16 --windows 5 --steps 10 --workers 8

A step is a batch of augmented 32x32 images, PGD on its cross-entropy in eval mode (L-infinity 8/255, steps of 2/255,
uniform start), and one SGD step on the adversarial examples. Who takes part:

    robustkit       recipes/pgd_at_rn18.py on these images, at a constant rate
    usual script    what papers' code does: torchvision's transforms in a DataLoader, PGD by hand, float32
    torchattacks    the same script with `torchattacks.PGD`, as its documentation shows
    ART             `ProjectedGradientDescentPyTorch.generate` and `PyTorchClassifier.fit`, the two calls of a batch in
                    ART's AdversarialTrainer, fed by the same DataLoader; one attack batch (ART's default cuts it to 32)

With --precision bf16, robustkit and a second usual script (autocast) compute in bfloat16; the other two know no such
setting. torchattacks and ART are left out where they are not installed. They pin old versions of what they need:

    pip install --no-deps torchattacks adversarial-robustness-toolbox six

All nets begin with the same weights, those after robustkit's warm-up. One step of each is checked before time is taken:
are its examples in the ball and in the box, and how much do they raise the loss of that first network? What it costs is
counted in operations, as multiples of one forward (23 with 10 attack steps: 11 forwards, 10 backwards to the images,
one to the weights, which counts as two); of robustkit it is what the recipe declares, which tests hold to the truth.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clock import middle, seconds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from robustkit import Model, Precision, evolve, load_recipe
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.parts import Parts
from robustkit.core.strategy import Record
from robustkit.datasets import Synthetic
from robustkit.engine.memory import keeping_memory
from robustkit.opening import load_parts, make_world
from robustkit.reporting import consoles
from robustkit.reporting.tables import plain_table
from robustkit.schedules import Constant

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
LEARNING_RATE = 0.01
WARM_UP = 5
"""Steps before all nets are given the same weights: batch statistics come near those of the images."""
RECIPE = Path(__file__).parents[2] / "recipes" / "pgd_at_rn18.py"

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Takes a training step; returns its images (B, C, H, W), labels and adversarial examples."""
Attack = Callable[[Tensor, Tensor], Tensor]
"""Adversarial examples of images and labels."""


def robustkit_step(parts: Parts, size: int) -> Step:
    """`train_step`, on one batch of rows after the other."""
    seen: list[Record] = []
    parts.strategies["loss"] = _Noted(parts.strategies["loss"], seen)
    batches = _forever(lambda: torch.split(parts.order(parts.progress.epoch), size))

    def step() -> tuple[Tensor, Tensor, Tensor]:
        seen.clear()
        train_step(parts, next(batches))
        return seen[0].batch.x, seen[0].batch.y, seen[0].x_adv

    return step


class _Noted:
    """A loss that keeps the record of its step."""

    def __init__(self, loss: Any, seen: list[Record]) -> None:
        self._loss, self.observe = loss, seen.append

    def __call__(self, *arguments: Any) -> Any:
        return self._loss(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


def usual_step(
    net: nn.Module, loader: DataLoader[Any], attack: Attack, device: torch.device, autocast: bool = False
) -> Step:
    """A batch from a loader, examples by `attack`, and a step on them."""
    optimizer, batches = _optimizer(net), _forever(lambda: loader)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        x, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            x_adv = attack(x, y)
            net.train()
            loss = F.cross_entropy(net(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return x, y, x_adv

    return step


def script_step(net: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device, autocast: bool) -> Step:
    """The usual script."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        net.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
        return x_adv

    return usual_step(net, loader, attack, device, autocast)


def torchattacks_step(net: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device) -> Step:
    import torchattacks

    attack = torchattacks.PGD(net, eps=EPSILON, alpha=STEP_SIZE, steps=steps, random_start=True)
    return usual_step(net, loader, attack, device)


def art_step(net: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device) -> Step:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    batches, size = _forever(lambda: loader), loader.batch_size or 1
    x, _ = next(batches)
    classifier = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(),
        optimizer=_optimizer(net),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        eps=EPSILON,
        eps_step=STEP_SIZE,
        max_iter=steps,
        num_random_init=1,
        batch_size=size,
        verbose=False,
    )

    def step() -> tuple[Tensor, Tensor, Tensor]:
        x, y = (tensor.numpy() for tensor in next(batches))
        x_adv = attack.generate(x, y=y)
        classifier.fit(x_adv, y, batch_size=size, nb_epochs=1, verbose=False)
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), torch.from_numpy(x_adv).to(device)

    return step


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them: one by one, through PIL."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.images = [to_pil_image(image) for image in pixels]
        self.labels = labels.tolist()
        chain = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose(chain)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Logits(nn.Module):
    """Our network as others know networks."""

    def __init__(self, model: RobustModel) -> None:
        super().__init__()
        self.model = deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _forever(items: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from items()


def steps_of(arguments: argparse.Namespace) -> tuple[dict[str, Step], RobustModel, int]:
    """Everybody's step, ours first; the network that all begin with; and what our step costs, in forwards."""
    precision = Precision(attack=arguments.precision, outer=arguments.precision)
    recipe = load_recipe(RECIPE)
    recipe = evolve(
        recipe,
        data=Synthetic(train=max(8, WARM_UP) * arguments.batch, augment="crop-flip"),
        model=Model(backbone=arguments.backbone),
        attack=evolve(recipe.attack, steps=arguments.attack_steps),
        schedule=Constant(),
        optimizer=evolve(recipe.optimizer, lr=LEARNING_RATE),
        batch_size=arguments.batch,
        validation=evolve(recipe.validation, images=0),
        precision=precision,
    )
    parts = load_parts(recipe, make_world(recipe, arguments.device))
    device = parts.world.device
    ours = robustkit_step(parts, arguments.batch)
    for _ in range(WARM_UP):
        ours()
    first = deepcopy(parts.model)
    data = recipe.data.load().train
    pictures = Pictures(data.fetch(torch.arange(len(data))), data.labels)
    loader = DataLoader(
        pictures,
        arguments.batch,
        shuffle=True,
        num_workers=arguments.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=arguments.workers > 0,
    )
    count = arguments.attack_steps
    steps = {f"robustkit, {arguments.precision}": ours}
    steps["usual script, fp32"] = script_step(Logits(first), loader, count, device, False)
    if arguments.precision == "bf16":
        steps["usual script, bf16"] = script_step(Logits(first), loader, count, device, True)
    for package, module, make in (
        ("torchattacks", "torchattacks", torchattacks_step),
        ("adversarial-robustness-toolbox", "art", art_step),
    ):
        try:
            step = make(Logits(first), loader, count, device)
        except ImportError as error:
            print(f"{package} is left out: {error}", file=sys.stderr)
        else:
            steps[f"{module} {importlib.metadata.version(package)}, fp32"] = step
    return steps, first, step_passes(recipe, parts.progress).units


class Operations(TorchDispatchMode):
    """Adds up the floating-point operations of convolutions and matrix products inside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, count = func(*args, **(kwargs or {})), flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def checked(step: Step, judge: RobustModel, units: float | None = None) -> dict[str, Any]:
    """What one step did: where its examples lie, what they do to the loss of `judge`, what it cost (unless `units`).

    Raises:
        AssertionError: examples lie outside the ball or the box.
    """
    with Operations() if units is None else nullcontext(Operations()) as counter:
        x, y, x_adv = step()
    radius = float((x_adv - x).abs().max())
    assert radius <= EPSILON + 1e-6 and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1, f"outside: {radius}"
    with torch.no_grad(), judge.using("eval"), Operations() as forward:
        clean, adversarial = (float(F.cross_entropy(judge(images).logits, y)) for images in (x, x_adv))
    if units is None:
        units = 2 * counter.total / forward.total
    return {"radius": radius, "clean_loss": clean, "loss": adversarial, "forwards_worth": units}


def compared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everybody is checked, then measured by turns."""
    steps, first, units = steps_of(arguments)
    device = next(first.parameters()).device
    ours, *_ = steps
    found = {name: checked(step, first, units if name == ours else None) for name, step in steps.items()}
    windows: dict[str, list[float]] = {name: [] for name in steps}
    for window in range(arguments.windows):
        print(f"window {window + 1} of {arguments.windows}", file=sys.stderr)
        for name, step in steps.items():
            with keeping_memory(name == ours):  # as in a run of ours; the others' memory is treated as usual
                step()
                windows[name].append(seconds(step, device, arguments.steps))
    for name, times in windows.items():
        ratios = [theirs / own for theirs, own in zip(times, windows[ours], strict=True)]
        found[name] |= middle(times) | {"times_as_long": statistics.median(ratios)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    setting = {key: value for key, value in vars(arguments).items() if key != "json"} | {"device": name}
    return {"setting": setting, "torch": torch.__version__, "steps": found}


def show(found: dict[str, Any]) -> None:
    setting = found["setting"]
    title = f"{setting['backbone']}, batches of {setting['batch']}, PGD-{setting['attack_steps']}, {setting['device']}"
    table = plain_table("Step by", title=f"{title}, torch {found['torch']}")
    for heading in ("ms (windows)", "Times as long", "Forwards' worth", "Radius x 255", "Loss at x -> at x_adv"):
        table.add_column(heading, justify="right")
    for name, step in found["steps"].items():
        middle, low, high = (1000 * step[key] for key in ("seconds", "fastest", "slowest"))
        table.add_row(
            name,
            f"{middle:.1f} ({low:.1f}-{high:.1f})",
            f"{step['times_as_long']:.2f}",
            f"{step['forwards_worth']:.1f}",
            f"{255 * step['radius']:.2f}",
            f"{step['clean_loss']:.3f} -> {step['loss']:.3f}",
        )
    consoles.results().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18_cifar", help="any backbone for 32x32 images")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--attack-steps", type=int, default=10, help="of PGD")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--windows", type=int, default=3, help="timed windows of each; medians are reported")
    parser.add_argument("--steps", type=int, default=1, help="steps in a window")
    parser.add_argument("--workers", type=int, default=0, help="processes of the DataLoader")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    logging.getLogger("art").setLevel(logging.ERROR)
    found = compared(arguments)
    print(json.dumps(found, indent=2)) if arguments.json else show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
