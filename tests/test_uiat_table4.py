"""UIAT's Table 4: its recipes find their rows and say what the sheet says; the pieces that only it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from robustkit import Model, evolve, px
from robustkit.attacks import PGD, AdamPGD
from robustkit.core.batch import Progress
from robustkit.core.checkpoint import facts_of
from robustkit.core.loop import train_step
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, Validation, load_recipe, load_recipes
from robustkit.datasets import Cifar10, Cifar100, WithSynthetic
from robustkit.losses import Align, Hat, Trades
from robustkit.objectives import KL, InverseObjective, Margin
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.published import load
from robustkit.reporting.comparison import Item
from robustkit.reporting.published import beside, match
from robustkit.runs import run
from robustkit.schedules import Cosine, OneCycle
from robustkit.targets import Momentum, OneOff, Universal
from robustkit.testing import tiny_recipe
from robustkit.weights import Exponential

FILE = Path(__file__).parents[1] / "recipes" / "uiat_table4.py"
RECIPES = load_recipes(FILE)
METHODS = {"uiat": "UIAT", "uiat-oneoff": "UIAT one-off", "hat": "HAT", "rebuffi": "Rebuffi"}
BLOCKS = {
    "cifar10-prn18": "CIFAR-10, PRN-18",
    "cifar10-wrn28": "CIFAR-10, WRN-28-10",
    "cifar100-prn18": "CIFAR-100, PRN-18",
    "cifar100-wrn28": "CIFAR-100, WRN-28-10",
}
ROWS = [(block, method) for block in BLOCKS for method in METHODS]


def test_all_are_there() -> None:
    assert set(RECIPES) == {f"{block}-{method}" for block in BLOCKS for method in (*METHODS, "helper")}


@pytest.mark.parametrize(("block", "method"), ROWS)
def test_each_finds_its_row_and_quotes_it(block: str, method: str) -> None:
    row = match(RECIPES[f"{block}-{method}"], load("uiat-table4"))
    assert row.label == f"{METHODS[method]}, {BLOCKS[block]}"
    text = FILE.read_text(encoding="utf-8")
    line = re.search(rf"^    {block}-{method} ([ \d.]+?)  +\d+(?: /.*)?$", text, re.MULTILINE)
    assert line is not None and tuple(map(float, line[1].split())) == tuple(row.values.values())


@pytest.mark.parametrize(("block", "method"), ROWS)
def test_by_the_sheet(block: str, method: str) -> None:
    """UIAT sheet 7.2, 8, 10.1 to 10.5, 11, 12.1."""
    recipe, cifar10 = RECIPES[f"{block}-{method}"], block.startswith("cifar10-")
    assert isinstance(recipe.data, WithSynthetic)
    assert recipe.data.inner == (Cifar10() if cifar10 else Cifar100())
    assert recipe.data.original == (0.3 if cifar10 else 0.4)
    assert recipe.data.file == ("cifar10_ddpm.npz" if cifar10 else "cifar100_ddpm.npz")
    backbone = "preact_resnet18_silu" if block.endswith("prn18") else "wrn28_10_silu"
    normalization = "cifar10" if cifar10 else "cifar100"
    assert recipe.model == Model(backbone=backbone, normalization=normalization, adopt_first_batch=True)
    lr, size = (0.4, 1024) if method in ("hat", "rebuffi") else (0.2, 512)
    assert recipe.optimizer == SGD(lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norm=False)
    schedule = Cosine(every="step", warm_up=10 / 400) if method == "rebuffi" else OneCycle(warm_up=0.25)
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (400, size, schedule)
    assert recipe.average == Exponential(rate=0.995, warm_up=0.0)
    chosen_by = PGD(steps=40, step_size=2 * px, objective=Margin())
    assert recipe.validation == Validation(images=1024, attack=chosen_by, every=1)
    universal = Universal(radius=4 * px, objective=InverseObjective(beta=1.0))
    if method == "hat":
        assert recipe.attack == PGD(steps=10, step_size=2 * px, objective=KL(), mode="train-frozen")
        assert recipe.target is None and isinstance(recipe.loss, Hat)
        assert (recipe.loss.weight, recipe.loss.helper_weight, recipe.loss.reach) == (3.5, 0.5, 2.0)
        assert recipe.loss.label_smoothing == 0.1
        helper = load_recipe(FILE.parents[1] / recipe.loss.helper.made_by)  # type: ignore[union-attr]
        assert helper.model == recipe.model and helper.data == recipe.data.inner and helper.epochs == 50
        assert helper.attack is None and recipe.loss.helper.run == f"runs/uiat-helper-{block}"  # type: ignore[union-attr]
        return
    if method == "rebuffi":
        assert recipe.attack == AdamPGD(steps=10, lr=0.1, drop=5, objective=KL(), mode="train-frozen")
        assert recipe.loss == Trades(weight=6.0, label_smoothing=0.1, smoothed="synthetic", natural_statistics=False)
        assert recipe.target is None
        return
    assert recipe.attack == PGD(steps=10, step_size=2 * px)
    assert recipe.loss == Align(weight=3.5, label_smoothing=0.1)
    assert recipe.target == (
        Momentum(inner=universal, gamma=0.9, start=0.875) if method == "uiat" else OneOff(inner=universal, start=0.8)
    )


def test_starts_are_the_paper_s_epochs() -> None:
    momentum, one_off = (RECIPES[f"cifar10-prn18-{name}"] for name in ("uiat", "uiat-oneoff"))
    units = [sum(p.units for p in one_off.passes(at(epoch)).values()) for epoch in (319, 320, 321)]
    assert units == [24, 28, 23]
    from robustkit.core.batch import start_epoch

    assert start_epoch(momentum.target.start, 400) == 350  # type: ignore[union-attr]


def test_the_data_inside_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a JPEG copy of the data set inside says so."""
    (tmp_path / "jpeg" / "train").mkdir(parents=True)
    monkeypatch.setenv("ROBUSTKIT_CIFAR10_DIR", str(tmp_path / "jpeg"))
    recipe = RECIPES["cifar10-prn18-uiat"]
    fewer = evolve(recipe, data=evolve(recipe.data, inner=Cifar10(per_class=1000)))  # type: ignore[type-var]
    results = {"last": {"clean": {"accuracy": 0.87, "n": 10_000, "ci95": [0.86, 0.88]}}}
    (found,) = beside([Item(str(tmp_path / "run"), fewer, True, results)], load("uiat-table4"))
    said = {deviation.what: deviation.here for deviation in found.deviations}
    assert said["data"].startswith("an image folder") and said["training images"] == "the first 1,000 of each class"
    stated = {deviation.what for deviation in found.deviations if deviation.paper != "not stated"}
    assert stated == {"data", "training images"}


def at(epoch: int) -> Progress:
    """The first step of an epoch counted from 1."""
    return Progress.at((epoch - 1) * 98, 400, 98)


def test_weight_average_warms_up() -> None:
    """UIAT sheet 10.3 and 17.23."""
    average = RECIPES["cifar10-prn18-uiat"].average
    assert average is not None
    decays = [average.decay(step, 400 * 98) for step in (1, 2, 10, 100, 1789, 1790, 39_200)]
    assert decays == pytest.approx([2 / 11, 0.25, 0.55, 101 / 110, 1790 / 1799, 0.995, 0.995], abs=1e-12)
    warm = Exponential(rate=0.995, warm_up=0.025)  # 980 of 39,200 steps
    assert [warm.decay(step, 39_200) for step in (1, 979, 980, 981)] == pytest.approx([0, 0, 0.1, 2 / 11])


def parts_of(recipe: Recipe) -> Parts:
    return load_parts(recipe, make_world(recipe, "cpu"))


def test_decay_spares_normalisations_alone() -> None:
    model = Model(backbone="preact_resnet18_silu")
    recipe = tiny_recipe(model=model, optimizer=SGD(weight_decay=0.01, decay_norm=False))
    parts = parts_of(recipe)
    decays = {id(p): group["weight_decay"] for group in parts.optimizer.param_groups for p in group["params"]}
    norms = {id(p) for m in parts.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert len(decays) == len(list(parts.model.parameters())) and len(norms) == 2 * 17
    assert all(decays[id(p)] == (0.0 if id(p) in norms else 0.01) for p in parts.model.parameters())
    assert {decays[id(p)] for p in parts.model.head.parameters()} == {0.01}  # the last layer's bias, too
    everything = parts_of(evolve(recipe, optimizer=SGD(weight_decay=0.01)))
    assert {group["weight_decay"] for group in everything.optimizer.param_groups} == {0.01}


def test_the_first_batch_is_adopted(tmp_path: Path) -> None:
    """After step 1 statistics are those of its last pass in training mode; after step 2 momentum is as always."""
    recipe = tiny_recipe(model=Model(backbone="convnet_small", batch_norm_momentum=0.01))
    adopting = evolve(recipe, model=evolve(recipe.model, adopt_first_batch=True))
    plain, ours = parts_of(recipe), parts_of(adopting)
    rows = plain.order(0)
    for parts in (plain, ours):
        train_step(parts, rows[:16])
    names = [name for name, _ in plain.model.named_buffers() if "running" in name]
    assert names
    before = {}
    for name in names:
        usual, adopted = (dict(parts.model.named_buffers())[name] for parts in (plain, ours))
        initial = 0.0 if name.endswith("mean") else 1.0
        assert torch.allclose(usual, 0.99 * initial + 0.01 * adopted, atol=1e-6)
        before[name] = adopted.clone()
    norms = [m for m in ours.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.01}
    train_step(ours, rows[16:32])
    for name in names:
        moved = dict(ours.model.named_buffers())[name]
        assert 0 < float((moved - before[name]).norm()) < 0.1 * float(before[name].norm())


def test_only_adversarial_images_move_statistics() -> None:
    """Rebuffi et al.: x̂ alone is tracked, and x still is normalised by its own batch."""
    found = {}
    for tracked in (True, False):
        loss = Trades(natural_statistics=tracked)
        parts = parts_of(tiny_recipe(model=Model(backbone="convnet_small"), attack=PGD(steps=1), loss=loss))
        seen: list[torch.Tensor] = []
        norm = next(m for m in parts.model.modules() if isinstance(m, nn.BatchNorm2d))

        def look(module: nn.Module, given: tuple[torch.Tensor], seen: list[torch.Tensor] = seen) -> None:
            if module.training:
                seen.append(given[0].detach())

        norm.register_forward_pre_hook(look)
        mean = norm.running_mean.clone()  # type: ignore[union-attr]
        train_step(parts, parts.order(0)[:16])
        views = seen[-2:]  # the pure pass: natural images first
        for view in views if tracked else views[1:]:
            mean = mean.lerp(view.mean(dim=(0, 2, 3)), norm.momentum or 0.0)
        torch.testing.assert_close(norm.running_mean, mean, atol=1e-6, rtol=1e-5)
        found[tracked] = [p.detach().clone() for p in parts.model.parameters()]
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)  # the step itself is the same


def test_one_step_of_each_kind(tmp_path: Path) -> None:
    """The table's composition on small images, two epochs, from a file of generated images."""
    import numpy as np

    from robustkit.datasets import Synthetic

    draws = np.random.default_rng(0)
    image = draws.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", image=image, label=draws.integers(0, 4, 50))
    inner = Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip")
    data = WithSynthetic(inner=inner, file="made.npz", root=str(tmp_path), original=0.3)
    for name in ("uiat", "uiat-oneoff", "rebuffi"):
        full = RECIPES[f"cifar10-prn18-{name}"]
        recipe = evolve(
            full,
            data=data,
            model=Model(backbone="convnet_small", batch_norm_momentum=0.01, adopt_first_batch=True),
            batch_size=16,
            epochs=4,
            validation=Validation(images=12, train_images=6, attack=PGD(steps=2)),
            evaluation=(),
        )
        outcome = run(recipe, out=tmp_path / name, device="cpu", preflight=False)
        assert outcome.stopped == "" and facts_of(tmp_path / name / "checkpoints" / "last.safetensors")["step"] == 20
