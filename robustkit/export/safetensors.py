"""Weights as safetensors, with a model card: for `robustkit.load`, and any reader of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import robustkit
from robustkit.core import checkpoint as checkpoints
from robustkit.core.model import STATISTICS
from robustkit.core.registry import registry
from robustkit.core.spec import canonical, to_json
from robustkit.export.source import Source, results_text, selection_text, sha256_of
from robustkit.loading import EXPORTED


def write_safetensors(source: Source, folder: Path) -> None:
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
    (folder / "README.md").write_text(_card(source, sha256_of(folder / EXPORTED)), encoding="utf-8")


def _card(source: Source, sha256: str) -> str:
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

{results_text(source)}

## Training

- Recipe: `model.json`, under `recipe`; its digest is `{facts["digest"]}`
- Seed {recipe.seed}: one run. Other seeds give other numbers
- {selection_text(source)}
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


def _fingerprint(source: Source) -> str:
    for key in source.results:
        if source.images.get(key):
            return f"; fingerprint of the test images (of {key}): `{source.images[key]}`"
    return ""


def _machine(source: Source) -> str:
    known = source.environment
    found = known.get("packages")
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if version) if found else ""
    return f"Trained on {known.get('device_name') or 'an unknown device'} with {packages or 'unknown versions'}"
