"""A run's model in a folder that can be handed on: as safetensors with a model card, or as RobustBench takes it.

Both say what is known of the model and nothing else: numbers that were not measured are not there, and what only its
authors can say is marked to be filled in.
"""

from __future__ import annotations

import hashlib
import json
import pprint
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import timm
import torch
from torch import Tensor

import robustkit
from robustkit.core import checkpoint as checkpoints
from robustkit.core.errors import CheckpointError, UserError
from robustkit.core.model import STATISTICS
from robustkit.core.reading import read_object
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.registry import hint, registry
from robustkit.core.spec import canonical, digest, to_json
from robustkit.folder import read_outcomes, read_results
from robustkit.loading import EXPORTED, build, read
from robustkit.opening import recipe_of

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


@attrs.frozen
class Export:
    """What was written: the folder, and {file in it: its sha256}."""

    folder: Path
    form: str
    checkpoint: str
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "to": self.form, "checkpoint": self.checkpoint, "files": self.files}


@attrs.frozen
class _Source:
    """A run's checkpoint and all that is known of it."""

    name: str
    recipe: Recipe
    state: dict[str, Tensor]
    facts: dict[str, Any]
    results: dict[str, Any]
    images: dict[str, str]  # measure -> fingerprint of the test images it was taken on
    environment: dict[str, Any]

    @property
    def radius(self) -> str:
        """The threat model's radius as papers write it: 8/255 in L-infinity, else 0.5."""
        threat = self.recipe.threat
        units = threat.epsilon * 255
        return (
            f"{round(units)}/255"
            if threat.norm == "Linf" and abs(units - round(units)) < 1e-6
            else f"{threat.epsilon:g}"
        )

    @property
    def data(self) -> str:
        return registry("dataset").name_of(type(self.recipe.data)) or type(self.recipe.data).__name__

    @property
    def unfinished(self) -> bool:
        return bool(self.facts["checkpoint"] == "last" and self.facts["epoch"] < self.recipe.epochs)


def export(run: str | Path, to: str, *, checkpoint: str = "last", out: str | Path | None = None) -> Export:
    """Writes a run's model into a new folder (default: RUN/export/<to>-<checkpoint>).

    Args:
        to: "safetensors" (for `robustkit.load`, and any reader of safetensors) or "robustbench".
        checkpoint: "last" or "best".

    Raises:
        UserError: there is no such run or checkpoint, or the folder exists already.
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to '{to}'", place="to", remedy=hint(to, FORMATS))
    run = Path(run)
    source = _source(run, checkpoint)
    folder = run / "export" / f"{to}-{checkpoint}" if out is None else Path(out)
    if folder.exists():
        raise UserError("exists already", place=str(folder), remedy="remove it, or choose another --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        partial.chmod(folder.parent.stat().st_mode & 0o777)  # a temporary folder is for its owner's eyes alone
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
        raise UserError(fault, place=str(folder), remedy="choose another --out") from error
    try:
        FORMATS[to](source, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Export(folder, to, checkpoint, {str(path.relative_to(folder)): _sha256(path) for path in files})


def _source(run: Path, checkpoint: str) -> _Source:
    if not (run / "recipe.json").is_file():
        raise UserError("is not a run folder: it has no recipe.json", place=str(run))
    state, facts = read(run, checkpoint)
    checkpoints.facts_of(run / "checkpoints" / f"{checkpoint}.safetensors", step=int, epoch=int, best=dict)
    recipe = recipe_of(run)
    if facts["digest"] != digest(recipe):
        raise CheckpointError("belongs to another recipe than recipe.json", place=f"{run}, checkpoint '{checkpoint}'")
    environment = read_object(run / "environment.json")
    found = read_results(run).get(checkpoint, {})
    keys = [result_key(suite, measure) for suite, measure in recipe.measures()]
    results = {key: found[key] for key in dict.fromkeys([*keys, *found]) if key in found}  # in the recipe's order
    images = {key: entry["images"] for key, entry in read_outcomes(run).get(checkpoint, {}).items()}
    return _Source(run.resolve().name, recipe, state, facts, results, images, environment)


# safetensors


def _write_safetensors(source: _Source, folder: Path) -> None:
    recipe, facts = source.recipe, source.facts
    kept = ("digest", "checkpoint", "step", "epoch", "best", "classes", "image_shape")
    mean, std = STATISTICS.get(recipe.model.normalization, (None, None))
    about = {
        "robustkit": robustkit.__version__,
        "trained_with": facts.get("version"),
        **{key: facts[key] for key in kept},
        "recipe": json.loads(canonical(recipe)),  # without locations: paths of the machine it was trained on
        "normalization": {"name": recipe.model.normalization, "mean": mean, "std": std, "inside_the_model": True},
        "threat": to_json(recipe.threat) | {"norm": recipe.threat.norm},
        "results": source.results,
        "test_images": source.images,
    }
    about = json.loads(json.dumps(about))  # tuples become lists, as they will be when read
    checkpoints.write(folder / EXPORTED, source.state, about)
    (folder / "README.md").write_text(_card(source, _sha256(folder / EXPORTED)), encoding="utf-8")


def _card(source: _Source, sha256: str) -> str:
    """The model card."""
    recipe, facts = source.recipe, source.facts
    channels, height, width = facts["image_shape"]
    classes = facts["classes"]
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    parameters = sum(tensor.numel() for name, tensor in source.state.items() if tensor.is_floating_point())
    return f"""# {source.name}, {facts["checkpoint"]} checkpoint

An image classifier trained with robustkit {facts.get("version", "")} on `{source.data}`, and judged within
{recipe.threat.norm} {source.radius} (pixels in [0, 1]).

- Network: `{recipe.model.backbone}` with the head `{registry("head").name_of(type(recipe.head))}`, {parameters:,}
  numbers (weights and running statistics){", averaged over training steps" if recipe.average is not None else ""}
- Input: {channels} x {height} x {width} pixels in [0, 1]; normalisation ({recipe.model.normalization}) is inside
- Output: {len(classes)} logits: {shown}
- sha256 of `{EXPORTED}`: `{sha256}`

## Use

```python
import robustkit

model = robustkit.load("path/to/this/folder")
logits = model(images)  # (B, {channels}, {height}, {width}) in [0, 1] -> (B, {len(classes)})
```

The file holds tensors and JSON; loading it runs nothing. Without robustkit, `safetensors.torch.load_file` gives the
state dict: `backbone.*` is timm's `{recipe.model.backbone}` without a classifier, `head.*` follows it.

## Results

{_results(source)}

## Training

- Recipe: `model.json`, under `recipe`; its digest is `{facts["digest"]}`
- Seed {recipe.seed}: one run. Other seeds give other numbers
- {_selection(source)}
- Whether earlier runs, judged on the same test images, guided the settings is not known here
- Data: `{source.data}`, as the machine had it{_fingerprint(source)}. That they are the published images is not checked
- Threat model of the recipe: {recipe.threat.norm} {source.radius}; training may have used other radii
- {_machine(source)}

## Limits

- Robust means: within {recipe.threat.norm} {source.radius} of images like these, against the attacks above. Other
  perturbations (other norms, larger radii, rotations, corruptions) were not defended against
- Accuracy under an attack is an upper bound of robust accuracy: a better attack may find more
- Images from elsewhere than `{source.data}` were not looked at
"""


def _results(source: _Source) -> str:
    if not source.results:
        return "None: this checkpoint was not measured. `robustkit eval RUN` measures it."
    lines = ["| measure | accuracy % (95 % interval) | test images |", "|---|---|---|"]
    notes = []
    for key, entry in source.results.items():
        low, high = (100 * bound for bound in entry["ci95"])
        lines.append(f"| {key} | {100 * entry['accuracy']:.2f} ({low:.1f}-{high:.1f}) | {entry['n']:,} |")
        if entry.get("breakdown"):
            stages = ", ".join(f"{name} {100 * share:.2f}" for name, share in entry["breakdown"].items())
            notes.append(f"- {key}, accuracy after each stage: {stages}")
        notes += [f"- {key}: {note}" for note in entry.get("notes", ())]
    most = max(entry["n"] for entry in source.results.values())
    if any(entry["n"] < most for entry in source.results.values()):
        notes.append("- measures on fewer images took a fixed random part of the test images")
    notes.append("- intervals (Wilson, 95 %) cover the choice of test images, not that of the seed")
    return "\n".join([*lines, "", *notes])


def _selection(source: _Source) -> str:
    """How the checkpoint was chosen."""
    recipe, facts = source.recipe, source.facts
    collapse = facts["best"].get("collapse")
    remark = "" if collapse is None else f"; robustness collapsed in epoch {collapse} (catastrophic overfitting)"
    if source.unfinished:
        return (
            f"Last checkpoint of a training that is not finished: epoch {facts['epoch']} of {recipe.epochs}, "
            f"step {facts['step']}{remark}"
        )
    if facts["checkpoint"] == "last":
        return f"Last checkpoint, after {recipe.epochs} epochs: nothing was selected{remark}"
    what = "natural" if recipe.attack is None or recipe.validation.attack is None else "robust"
    return (
        f"Best checkpoint, epoch {facts['best'].get('epoch')} of {recipe.epochs}: the highest {what} accuracy on "
        f"{recipe.validation.images:,} training images that were held out. Test images chose nothing"
    )


def _fingerprint(source: _Source) -> str:
    for key in source.results:
        if source.images.get(key):
            return f"; fingerprint of the test images (of {key}): `{source.images[key]}`"
    return ""


def _machine(source: _Source) -> str:
    known = source.environment
    found = known.get("packages")
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if version) if found else ""
    return f"Trained on {known.get('device_name') or 'an unknown device'} with {packages or 'unknown versions'}"


# RobustBench (Croce et al., NeurIPS Datasets and Benchmarks 2021)


def _write_robustbench(source: _Source, folder: Path) -> None:
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


def _claim(source: _Source) -> tuple[dict[str, Any], list[str]]:
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
        notes.append(_selection(source))
    return claim, notes


def _verdict(source: _Source) -> tuple[dict[str, Any] | None, str]:
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


def _definition(source: _Source, name: str) -> str:
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


def _covering_note(source: _Source, name: str, notes: list[str], folder: Path) -> str:
    place = f"model_info/{source.data}/{source.recipe.threat.norm}/{name}.json"
    listed = "\n".join(f"- {note}" for note in notes)
    return f"""# {name} for RobustBench

- `{place}`: the claim. RobustBench calls such files <Author><Year><FirstWordOfTitle>.json
- `{name}.pt`: the state dict, tensors only (sha256 `{_sha256(folder / f"{name}.pt")}`)
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

{_results(source)}
"""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FORMATS: dict[str, Callable[[_Source, Path], None]] = {
    "safetensors": _write_safetensors,
    "robustbench": _write_robustbench,
}
