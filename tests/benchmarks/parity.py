"""Does the fast path learn the same? One small recipe, trained in float32 the plain way and the fast way, seed by seed.

    python tests/benchmarks/parity.py --out runs/parity                  # goes on where it was
    python tests/benchmarks/parity.py --out runs/parity --max-time 9m    # exit code 75: not done yet
    python tests/benchmarks/parity.py --out runs/parity --device cuda --backbone resnet18_cifar_w16 --epochs 10

*plain* computes in float32, forwards batch normalisation as it is and records nothing; *fast* computes in --precision,
with batch normalisation folded in the passes of attacks, which a GPU records. All else is equal: PGD-10 training at
L-infinity 8/255 on 500 images a class of CIFAR-10, judged in float32 on 1,000 test images (AutoAttack: 256). Every run
is an ordinary one in OUT/plain-1, OUT/fast-1 and so on: `robustkit compare OUT/plain-* OUT/fast-*` shows the same
tables.

Two facts of a step are measured on a trained network besides, on 256 test images: on how many pixels the two ways agree
about the sign of the gradient, where the attack starts and before its last step; and how near the fast attack comes to
the loss that the plain one reaches, both judged in float32 the plain way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import Model, Precision, Recipe, Suite, UserError, Validation, evolve, px, resume, run
from robustkit.attacks import PGD
from robustkit.cli.options import EXIT_TIME, count, seconds
from robustkit.core.batch import Budget
from robustkit.core.parts import Parts, fold_backbone
from robustkit.core.rng import whole
from robustkit.datasets import Cifar10
from robustkit.engine import Predictor
from robustkit.evaluation import PGD_20, AutoAttack, Clean
from robustkit.folder import read_results
from robustkit.losses import CrossEntropy
from robustkit.opening import load_parts, make_world, recipe_of, restore
from robustkit.optimizers import SGD
from robustkit.reporting import consoles
from robustkit.reporting.comparison import load_item, print_comparison, to_data
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

MODES = ("plain", "fast")
IMAGES = 256
"""Test images that the facts of a step are measured on."""


def recipe_for(mode: str, seed: int, arguments: argparse.Namespace) -> Recipe:
    precision = arguments.precision if mode == "fast" else "fp32"
    recipe = Recipe(
        data=Cifar10(per_class=arguments.per_class),
        model=Model(backbone=arguments.backbone),
        threat=Linf(epsilon=8 * px),
        attack=PGD(steps=10),
        loss=CrossEntropy(),
        optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=OneCycle(),
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        validation=Validation(images=0),  # the last weights are judged: nothing is chosen
        precision=Precision(attack=precision, outer=precision),
        evaluation=(Suite(measures=(Clean(), PGD_20, AutoAttack(images=256)), images=1000),),
        seed=seed,
    )
    return evolve(recipe, **arguments.changes)


@contextmanager
def plainly() -> Iterator[None]:
    """Training inside forwards batch normalisation as it is, and records no attack."""
    with ExitStack() as stack:
        for name in ("parts.fold_backbone", "loop.fold_backbone", "parts.graphs_for"):
            stack.enter_context(patch(f"robustkit.core.{name}", return_value=None))
        yield


def train_and_judge(mode: str, seed: int, arguments: argparse.Namespace, max_time: float | None) -> bool:
    """Whether the run is done: it is begun, gone on with, or found finished.

    Raises:
        UserError: its folder holds a run with other settings.
    """
    folder, recipe = arguments.out / f"{mode}-{seed}", recipe_for(mode, seed, arguments)
    begun = (folder / "recipe.json").is_file()
    if begun and recipe_of(folder) != recipe:
        raise UserError("holds a run with other settings", place=str(folder), remedy="choose another --out")
    if begun and set(read_results(folder).get("last", ())) == {measure.key for _, measure in recipe.measures()}:
        return True
    with plainly() if mode == "plain" else nullcontext():
        if begun:
            outcome = resume(folder, device=arguments.device, max_time=max_time)
        else:
            outcome = run(recipe, out=folder, device=arguments.device, max_time=max_time)
    return outcome.stopped in ("", "collapse")


def facts_of_a_step(folder: Path, precision: str, device: str | None) -> dict[str, float]:
    """How the two ways agree on the network that the run in `folder` trained."""
    recipe = recipe_of(folder)
    parts = load_parts(recipe, make_world(recipe, device))
    restore(parts, folder / "checkpoints" / "last.safetensors", weights_only=True)
    where = parts.world.device
    plain = Predictor(parts.final, where, "fp32", None)
    fast = Predictor(parts.final, where, precision, fold_backbone(parts.final, parts.world))
    x, y = _test_images(parts)
    budget = Budget(x.new_full((len(x),), recipe.threat.epsilon))

    def attacked(predict: Predictor, steps: int) -> Tensor:
        return PGD(steps=steps)(predict, x, y, budget, recipe.threat, whole(x, recipe.seed, "parity"))

    def agreement(images: Tensor) -> float:
        one, other = (_gradient(predict, images, y).sign() for predict in (plain, fast))
        return float((one == other).float().mean())

    def loss(images: Tensor) -> float:
        with torch.no_grad(), plain.using("eval") as predict:
            return float(F.cross_entropy(predict(images).logits, y))

    steps = recipe.attack.steps if isinstance(recipe.attack, PGD) else 10
    clean, exact, quick = loss(x), loss(attacked(plain, steps)), loss(attacked(fast, steps))
    return {
        "images": len(x),
        "sign_agreement_first_step": agreement(attacked(plain, 0)),
        "sign_agreement_last_step": agreement(attacked(plain, steps - 1)),
        "loss_clean": clean,
        "loss_plain_attack": exact,
        "loss_fast_attack": quick,
        "loss_ratio": quick / exact,
        "rise_ratio": (quick - clean) / (exact - clean),
    }


def _test_images(parts: Parts) -> tuple[Tensor, Tensor]:
    rows = torch.arange(min(IMAGES, len(parts.data.test)))
    x = parts.data.test.fetch(rows).to(parts.world.device).float() / 255
    return x, parts.data.test.labels[rows].to(parts.world.device)


def _gradient(predict: Predictor, images: Tensor, y: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    with predict.using("eval") as forward:
        (gradient,) = torch.autograd.grad(F.cross_entropy(forward(images).logits, y, reduction="sum"), images)
    return gradient


def main(words: Sequence[str] | None = None, **changes: Any) -> int:
    """`changes` go into the recipe: for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and parity.json")
    parser.add_argument("--backbone", default="resnet18_cifar_w16", help="or convnet_small, ...")
    parser.add_argument("--epochs", type=count, default=8, metavar="N")
    parser.add_argument("--per-class", type=count, default=500, metavar="N", help="training images of each class")
    parser.add_argument("--batch", type=count, default=64, metavar="N", help="images in a batch")
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="1 to N")
    parser.add_argument("--precision", choices=("bf16",), default="bf16", help="of the fast runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--max-time", type=seconds, metavar="TIME", help="stop cleanly after 9m, 2h, ...")
    arguments = parser.parse_args(words)
    arguments.changes = changes
    deadline = None if arguments.max_time is None else time.monotonic() + arguments.max_time
    seeds = range(1, arguments.seeds + 1)
    for seed in seeds:
        for mode in MODES:
            print(f"{mode}, seed {seed}", file=sys.stderr, flush=True)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not train_and_judge(mode, seed, arguments, left):
                    print("Stopped; the same command goes on where it was", file=sys.stderr)
                    return EXIT_TIME
            except UserError as error:
                parser.exit(2, f"error: {error}\n")
    items = [load_item(str(arguments.out / f"{mode}-{seed}")) for mode in MODES for seed in seeds]
    facts = facts_of_a_step(arguments.out / "plain-1", arguments.precision, arguments.device)
    found = to_data(items) | {"step": facts}
    (arguments.out / "parity.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console = consoles.results()
    print_comparison(console, items)
    console.print(
        f"A step on the network of plain-1, {facts['images']} test images: signs of the gradient agree on "
        f"{100 * facts['sign_agreement_first_step']:.1f} % of all pixels where the attack starts, on "
        f"{100 * facts['sign_agreement_last_step']:.1f} % before its last step; the attack reaches a loss of "
        f"{facts['loss_fast_attack']:.4f} the fast way and of {facts['loss_plain_attack']:.4f} the plain way "
        f"(ratio {facts['loss_ratio']:.4f}; of the rise from {facts['loss_clean']:.4f}, {facts['rise_ratio']:.4f})."
    )
    resolved = [f"{d['checkpoint']} {d['measure']}" for d in found["differences"] if d["resolved"]]
    console.print(f"Modes differ in: {', '.join(resolved)}" if resolved else "No measure tells the modes apart.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
