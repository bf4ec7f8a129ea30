"""Weights, network and claim as RobustBench takes them (Croce et al., NeurIPS Datasets and Benchmarks 2021)."""

from __future__ import annotations

import json
import pprint
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from robustkit.core.model import STATISTICS
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.registry import registry
from robustkit.core.spec import to_json
from robustkit.export.source import Source, results_text, selection_text, sha256_of
from robustkit.loading import build

FILL_IN = "FILL IN"
"""How a field begins that only the model's authors can fill."""

_TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}
"""Data sets of RobustBench's leaderboards that recipes can name, and their test images."""
_RADII = {"Linf": 8 / 255, "L2": 0.5}
"""The radii of its leaderboards for them."""
_ARCHITECTURES = {
    "resnet18_cifar": "ResNet-18",
    "preact_resnet18": "PreActResNet-18",
    "preact_resnet18_silu": "PreActResNet-18 (SiLU)",
    "preact_resnet18_raw": "PreActResNet-18",
    "preact_resnet18_gradalign": "PreActResNet-18",
    "wrn28_10": "WideResNet-28-10",
    "wrn28_10_silu": "WideResNet-28-10 (SiLU)",
    "wrn34_10": "WideResNet-34-10",
    "wrn34_10_silu": "WideResNet-34-10 (SiLU)",
}


def write_robustbench(source: Source, folder: Path) -> None:
    name = re.sub(r"\W+", "_", f"{source.name}_{source.facts['checkpoint']}").strip("_")
    claim, notes = _claim(source)
    place = folder / "model_info" / source.data / source.recipe.threat.norm
    place.mkdir(parents=True)
    (place / f"{name}.json").write_text(json.dumps(claim, indent=2) + "\n", encoding="utf-8")
    state = {key: tensor.clone().contiguous() for key, tensor in source.state.items()}
    torch.save(state, folder / f"{name}.pt")
    (folder / "model.py").write_text(_definition(source, name), encoding="utf-8")
    notes += _about_keys(state)
    (folder / "README.md").write_text(_covering_note(source, name, notes, folder), encoding="utf-8")


def _claim(source: Source) -> tuple[dict[str, Any], list[str]]:
    """The claim as RobustBench's model_info has it, and what is to be said about it. Not measured is null."""
    recipe = source.recipe
    verdict, reason = _verdict(source)
    clean = source.results.get("clean", {})
    total = _TEST_IMAGES.get(source.data)
    on_all = bool(clean) and total is not None and clean["n"] == total
    warned = bool(verdict and verdict.get("notes"))
    claim = {
        "link": f"{FILL_IN}: address of the paper",
        "name": f"{FILL_IN}: title of the paper",
        "authors": f"{FILL_IN}: authors, separated by commas",
        "additional_data": recipe.model.pretrained,
        "number_forward_passes": 1,
        "dataset": source.data,
        "venue": f"{FILL_IN}: venue and year, or Unpublished",
        "architecture": _ARCHITECTURES.get(recipe.model.backbone, recipe.model.backbone),
        "eps": source.radius,
        "clean_acc": _percent(clean) if on_all else None,
        "reported": _percent(verdict) if verdict else None,
        "autoattack_acc": _percent(verdict) if verdict else None,
        "unreliable": None if warned or not verdict else False,
    }
    notes = ["`link`, `name`, `authors` and `venue` are for you to fill in"]
    if not on_all:
        notes.append("`clean_acc` is null: clean accuracy on all test images of CIFAR-10 or CIFAR-100 was not measured")
    if not verdict:
        notes.append(f"`autoattack_acc` and `reported` are null: {reason}")
    elif warned:
        notes += [f"`unreliable` is null, for you to decide: {note}" for note in verdict["notes"]]
    notes.append(
        f"`additional_data` is {json.dumps(recipe.model.pretrained)} because the backbone "
        f"{'was' if recipe.model.pretrained else 'was not'} pretrained; that the training images were those of "
        f"`{source.data}` and no others is for you to confirm"
    )
    if total is None:
        notes.append(f"RobustBench has no leaderboard for `{source.data}`")
    elif recipe.threat.norm not in _RADII or abs(recipe.threat.epsilon - _RADII[recipe.threat.norm]) > 1e-9:
        notes.append(f"RobustBench has no leaderboard for {recipe.threat.norm} {source.radius} on `{source.data}`")
    if source.facts["checkpoint"] == "best" or source.unfinished:
        notes.append(selection_text(source))
    return claim, notes


def _verdict(source: Source) -> tuple[dict[str, Any] | None, str]:
    """What standard AutoAttack found on all test images in the recipe's ball; otherwise why there is nothing."""
    total = _TEST_IMAGES.get(source.data)
    reason = "standard AutoAttack was not measured in the recipe's threat model"
    for suite, measure in source.recipe.measures():
        entry = source.results.get(result_key(suite, measure))
        settings = to_json(measure)
        same = suite.threat is None or suite.threat == source.recipe.threat
        if entry is None or not same or (settings["name"], settings.get("version")) != ("autoattack", "standard"):
            continue
        if settings.get("attacks"):
            reason = f"AutoAttack ran with {', '.join(settings['attacks'])} only"
        elif total is None:
            reason = f"they are for CIFAR-10 and CIFAR-100 ({entry['n']:,} images of `{source.data}` were measured)"
        elif entry["n"] != total:
            reason = f"standard AutoAttack was measured on {entry['n']:,} of {total:,} test images"
        else:
            return entry, ""
    return None, reason


def _percent(entry: dict[str, Any]) -> str:
    return f"{100 * entry['accuracy']:.2f}"


def _about_keys(state: dict[str, Tensor]) -> Iterator[str]:
    """RobustBench cuts as many letters off a key as "module." or "model." has wherever it finds one of them inside."""
    for part in ("module.", "model."):
        if any(part in key for key in state):
            yield f"keys of the weights contain `{part}`, which RobustBench's loader would cut: rename them"


def _definition(source: Source, name: str) -> str:
    """Python text that defines `Net`, into which the weights load strictly."""
    recipe, facts = source.recipe, source.facts
    channels, height, width = facts["image_shape"]
    count = len(facts["classes"])
    network = build(facts)
    ours = type(network.backbone).__module__.startswith("robustkit.")
    arguments = f"{json.dumps(recipe.model.backbone)}, num_classes=0, in_chans={channels}"
    if recipe.model.patch_size is not None:
        arguments += f", patch_size={recipe.model.patch_size}"
    if _takes_size(recipe, channels, (height, width)):
        arguments += f", img_size=({height}, {width})"
    imports = ["import timm", "import torch", "from torch import nn"]
    if ours:
        imports += [
            "",
            f"import robustkit.backbones  # registers {recipe.model.backbone} with timm; copy its file instead",
        ]
    made, used = _head_text(recipe, source.state, count)
    body = [f"self.backbone = timm.create_model({arguments})", *made]
    if recipe.model.normalization != "none":
        mean, std = STATISTICS[recipe.model.normalization]
        body += [
            "self.normalize = nn.Module()",
            f'self.normalize.register_buffer("mean", torch.tensor({mean}).view(1, -1, 1, 1))',
            f'self.normalize.register_buffer("std", torch.tensor({std}).view(1, -1, 1, 1))',
        ]
        normalized = "(x - self.normalize.mean) / self.normalize.std"
    else:
        normalized = "x"
    lines = [
        f'"""The network of {name}.pt, for robustbench/model_zoo: state dicts load strictly."""',
        "",
        *imports,
        "",
        "",
        "class Net(nn.Module):",
        f'    """Images (B, {channels}, {height}, {width}) in [0, 1] -> logits (B, {count})."""',
        "",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in body),
        "",
        "    def forward(self, x):",
        f"        features = self.backbone({normalized})",
        *(f"        {line}" for line in used),
        "",
    ]
    return "\n".join(lines)


def _head_text(recipe: Recipe, state: dict[str, Tensor], classes: int) -> tuple[list[str], list[str]]:
    """Lines that build the head, and that turn `features` into logits and return them."""
    name = registry("head").name_of(type(recipe.head))
    if name == "linear":
        width = state["head.linear.weight"].shape[1]
        return [f'self.head = nn.ModuleDict({{"linear": nn.Linear({width}, {classes})}})'], [
            'return self.head["linear"](features)'
        ]
    if name == "gaussian-mixture":
        shape = tuple(state["head.centres"].shape)
        return [f'self.head = nn.ParameterDict({{"centres": torch.zeros{shape}}})'], [
            'centres = self.head["centres"]',
            "squared = features.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * features @ centres.T",
            "return -squared / 2",
        ]
    settings = pprint.pformat(to_json(recipe.head), width=10_000, sort_dicts=False)
    return [
        "from robustkit.core.spec import from_json  # the head is not one of robustkit's own",
        "from robustkit.core.strategy import Head",
        "",
        f"head = from_json(Head, {settings})",
        f"self.head = head.build(self.backbone.num_features, {classes})",
    ], ["return self.head(features, None).logits"]


def _takes_size(recipe: Recipe, channels: int, size: tuple[int, int]) -> bool:
    """Whether timm's builder wants to know the size of the images, as transformers do."""
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if recipe.model.patch_size is not None:
        options["patch_size"] = recipe.model.patch_size
    with torch.random.fork_rng(()):
        try:
            timm.create_model(recipe.model.backbone, img_size=size, **options)
        except TypeError:
            return False
    return True


def _covering_note(source: Source, name: str, notes: list[str], folder: Path) -> str:
    place = f"model_info/{source.data}/{source.recipe.threat.norm}/{name}.json"
    listed = "\n".join(f"- {note}" for note in notes)
    return f"""# {name} for RobustBench

- `{place}`: the claim. RobustBench calls such files <Author><Year><FirstWordOfTitle>.json
- `{name}.pt`: the state dict, tensors only (sha256 `{sha256_of(folder / f"{name}.pt")}`)
- `model.py`: the network. Normalisation is inside

```python
import torch
from model import Net

model = Net()
model.load_state_dict(torch.load("{name}.pt", weights_only=True))
model.eval()
```

To contribute it, follow "Adding a new model" in RobustBench's README: the claim, the network in `model_zoo`, and an
address of the weights. RobustBench measures again.

## Before you send it

{listed}

## What was measured

{results_text(source)}
"""
