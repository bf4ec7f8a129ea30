"""What docs/results.md says of a study is what the study's outcomes say, where they are kept (docs/studies)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from robustkit.cli.main import main
from robustkit.evaluation import statistics
from robustkit.reporting.comparison import differences, groups, load_item

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "studies"
PAGE = (ROOT / "docs" / "results.md").read_text()

COLUMNS = {"ldat": ("clean", "pgd-40", "apgd-dlr", "fab", "deepfool", "autoattack", "l2/pgd-40", "l2/apgd-dlr")}
"""The measures of a study's tables, from left to right."""
ATTACKS = {
    "ldat": (("pgd-40", "fab"), ("apgd-dlr", "pgd-40"), ("deepfool", "pgd-40"), ("l2/apgd-dlr", "l2/pgd-40")),
}
"""Those that are compared on one network, from left to right."""
TITLES = {"ldat": "## LDAT and its baselines, small"}
ARMS = [path.relative_to(STUDIES) for path in sorted(STUDIES.glob("*/*"))]


def section(study: str) -> str:
    return PAGE[PAGE.index(TITLES[study]) :].partition("\n## ")[0]


def rows(study: str, first: str) -> list[list[str]]:
    """The cells behind `first` of each row that begins with it."""
    lines = [line for line in section(study).splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines]


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.1g}"


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_accuracies_are_those_of_the_outcomes(arm: Path) -> None:
    study, name = arm.parts
    item = load_item(str(STUDIES / arm))
    told = []
    for key in COLUMNS[study]:
        entry, right = item.entry("last", key), item.right("last", key)
        assert right is not None  # image by image what the sum says
        low, high = entry["ci95"]
        told.append(f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f})")
    assert rows(study, f"`{name}`") == [told]


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_attacks_on_one_network_are_compared_by_its_outcomes(arm: Path) -> None:
    study, name = arm.parts
    item = load_item(str(STUDIES / arm))
    told = []
    for keys in ATTACKS[study]:
        (images, first), (same, second) = (item.right("last", key) or ("", "") for key in keys)
        assert images == same != ""
        found = statistics.paired(first, second)
        mark = "**" if found.p < statistics.LEVEL else ""
        told.append(f"{mark}{points(found.difference)}{mark}, {probability(found.p)}")
    assert rows(study, f"on `{name}`") == [told]


def test_differences_are_those_of_the_outcomes() -> None:
    for study in {arm.parts[0] for arm in ARMS}:
        pairs = re.findall(r"^\| (`([\w-]+)` - `([\w-]+)`) \|", section(study), re.MULTILINE)
        assert pairs
        for title, *names in pairs:
            first, second = (load_item(str(STUDIES / study / name)) for name in names)
            found = {each.key: each for each in differences(groups([first, second])) if each.checkpoint == "last"}
            told = []
            for key in COLUMNS[study]:
                each = found[key]
                assert each.basis == "same images" and each.ci95 is not None and each.p is not None
                low, high = (f"{100 * end:.1f}".replace("-0.0", "0.0") for end in each.ci95)
                mark = "**" if each.resolved else ""
                more = f", {probability(each.p)}" if each.resolved else ""
                told.append(f"{mark}{points(each.value)}{mark} ({low} to {high}){more}")
            assert rows(study, title) == [told]


def test_a_comparison_needs_three_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small enough to publish, as those in docs/studies are."""
    for name in ("pgd-at", "ldat-up"):
        (tmp_path / name).mkdir()
        for file in ("recipe.json", "results.json", "outcomes.json"):
            shutil.copy(STUDIES / "ldat" / name / file, tmp_path / name)
    assert main(["compare", str(tmp_path / "pgd-at"), str(tmp_path / "ldat-up"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {each["basis"] for each in told["differences"]} == {"same images"}
