"""A few test images as they are, attacked and helped, with what the model made of them: as the run drew them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkit.reporting import formats
from robustkit.reporting.report import words
from robustkit.reporting.report.html import Html, joined, missing, scrolling, tag
from robustkit.reporting.report.stored import StoredRun


def section(runs: Sequence[StoredRun]) -> Html:
    parts = []
    for run in runs:
        parts.append(tag("h3", run.name) if len(runs) > 1 else None)
        parts.append(_pictures(run))
    return joined(parts)


def _pictures(run: StoredRun) -> Html:
    if run.examples is not None:
        return _table(run.examples)
    if run.picture is not None:
        source = f"data:image/png;base64,{run.picture}"
        text = "Test images, natural, adversarial and inverse, with the predicted class and the true one's probability"
        return tag("p", tag("img", src=source, alt=text, class_="whole"))
    return missing("The run has drawn no pictures: it does so when all is measured.", words.command("resume", run.path))


def _table(found: dict[str, Any]) -> Html:
    head = [tag("th", f"true: {name}", scope="col") for name in found["true"]]
    body = [tag("tr", tag("th", row["label"], scope="row"), *_cells(row, found["true"])) for row in found["rows"]]
    ball = f"{words.NORMS.get(found['norm'], found['norm'])} {words.radius(found['epsilon'], found['norm'])}"
    caption = f"Test images within {ball}: the predicted class, and the probability of the true one"
    content = tag("table", tag("caption", caption), tag("thead", tag("tr", tag("td"), *head)), tag("tbody", *body))
    return tag("div", scrolling(content, caption), class_="pictures")


def _cells(row: dict[str, Any], true: Sequence[str]) -> list[Html]:
    return [_cell(picture, row["label"], name) for picture, name in zip(row["pictures"], true, strict=True)]


def _cell(picture: dict[str, Any], label: str, true: str) -> Html:
    alt = f"{label}: a test image of class {true}"
    image = tag("img", src=f"data:image/png;base64,{picture['image']}", alt=alt)
    said = picture.get("predicted")
    if said is None:
        return tag("td", image)
    kind = "right" if said == true else "wrong"
    share = picture.get("probability")
    probability = None if share is None else f"{formats.percent(share)} %"
    return tag("td", image, tag("span", f"{kind}: {said}", class_=kind), probability)
