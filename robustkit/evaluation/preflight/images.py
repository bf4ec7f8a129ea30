"""Checks that need no model: are these pixels in [0, 1], is the radius of the size that is usual for them?"""

from __future__ import annotations

import math

from torch import Tensor

from robustkit.core.strategy import ThreatModel
from robustkit.evaluation.findings import Finding, Verdict, finding
from robustkit.evaluation.preflight.case import Sample
from robustkit.reporting import formats

DARK, BLACK, ROUNDING = 0.1, 0.02, 1e-4
"""No pixel above: another scale than [0, 1]; divided by 255 twice (0.0039). No pixel further outside: meant inside."""
USUAL = {"Linf": (0.25 / 255, 0.25, 0.5), "L2": (0.2 / 255, 0.05, 0.25), "L1": (0.05 / 255, 0.1, 0.25)}
"""Least and most epsilon per pixel value that is meant, and most for grey images, where radii are larger. For images of
3 x 32 x 32: Linf 0.001..0.25, L2 0.043..2.8, L1 0.6..307."""
CUSTOMARY = {"Linf": "8/255 = 0.0314", "L2": "0.5", "L1": "12"}
"""On 3 x 32 x 32 images."""


def input_range(sample: Sample) -> Finding:
    """Pixels in [0, 1], and as bright as pictures are."""
    low, high, mean, std = sample.low, sample.high, float(sample.x.mean()), float(sample.x.std())
    inside, twice = low >= 0 and high <= 1, low >= -1 - ROUNDING and high <= 1 + ROUNDING
    rules: list[tuple[bool, Verdict, str]] = [  # the first that holds
        (not math.isfinite(low) or not math.isfinite(high), "failure", "mend what is NaN or infinite"),
        (low == high, "failure", f"all pixels are {high:.4g}: are these the images?"),
        (inside and high < BLACK, "failure", "divide 8-bit pixels by 255 once, not twice"),
        (inside and high < DARK, "warning", "scale pixels to [0, 1]: radii are in that unit"),
        (inside, "ok", ""),
        (low > -ROUNDING and high < 1 + ROUNDING, "failure", f"clamp rounding of {max(-low, high - 1):.1g} to [0, 1]"),
        (low >= 0 and high <= 255, "failure", "divide 8-bit pixels by 255"),
        (twice, "failure", "these lie in [-1, 1]: give (x + 1) / 2, and put 2 x - 1 inside the model"),
        (low < 0, "failure", "as if normalised already: put that inside the model, or radii mean nothing"),
        (True, "failure", "scale pixels to [0, 1]"),
    ]
    verdict, remedy = next((verdict, remedy) for holds, verdict, remedy in rules if holds)
    text = f"pixels range from {low:.4g} to {high:.4g}, mean {mean:.3g}"
    return finding("input range", verdict, text, remedy, low=low, high=high, mean=mean, std=std)


def epsilon(threat: ThreatModel, x: Tensor) -> Finding:
    """A radius of the size that is usual for these images."""
    radius, norm, values = float(threat.epsilon), threat.norm, x[0].numel()
    each = radius / {"Linf": 1.0, "L2": math.sqrt(values), "L1": float(values)}[norm]
    least, most, most_grey = USUAL[norm]
    verdict: Verdict = "warning"
    text = f"{norm} " + (formats.setting("epsilon", radius) if norm == "Linf" else f"{radius:.4g}")
    remedy = f"{CUSTOMARY[norm]} is usual for 3 x 32 x 32 images; "
    if norm == "Linf" and radius > 1:
        verdict, text = "failure", f"{text} is more than the whole range of a pixel"
        remedy = f"pixels are in [0, 1]: did you mean {radius:g}/255?"
    elif each > (most if x.shape[1] >= 3 else most_grey):
        text += f", {each:.2g} per pixel value, leaves little of an image"
        remedy += "did you mean 8/255?" if norm == "Linf" else "is it meant for larger ones?"
    elif each < least:
        text += f", {255 * each:.2g}/255 per pixel value, is less than the rounding of 8-bit pixels"
        remedy += "was it divided by 255 twice, or is it meant for another norm?"
    else:
        verdict, near = "ok", round(255 * radius)
        if norm == "Linf" and 1 <= near <= 16 and 1e-6 < abs(255 * radius - near) < 0.1:
            text += f": not {near}/255, as the decimal may suggest"
    return finding("epsilon", verdict, text, remedy, epsilon=radius, norm=norm, per_value=each)
