"""docs/methods: a page for each method, whose costs, published numbers and compositions are those of the code."""

from __future__ import annotations

import re
import runpy
from itertools import groupby
from pathlib import Path

import pytest
from pages import ROOT, blocks, plugins_of

from robustkit import load_recipe, published
from robustkit.reporting.composition import phases

FOLDER = ROOT / "docs" / "methods"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "README.md")
SECTIONS = ["Equations", "Recipe", "Cost", "Numbers", "Where it departs from the paper, or had to choose"]
PASSES = ("forward", "input backward", "parameter backward", "units")


@pytest.fixture(autouse=True)
def plugins_are_installed(request: pytest.FixtureRequest) -> None:
    if "page" in request.fixturenames:
        for module in plugins_of(request.getfixturevalue("page")):
            pytest.importorskip(module)


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def section(page: Path, title: str) -> str:
    return page.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of the page's tables whose first column is called that."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        if head[0] == first:
            found += [dict(zip(head, cells, strict=True)) for cells in body]
    return found


def python_blocks(page: Path) -> list[str]:
    return [block.text for block in blocks(page, "python")]


@pages
def test_a_page_says_what_it_must(page: Path) -> None:
    headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert "$$" in section(page, "Equations")
    assert re.search(r"robustkit run \S+\.py", section(page, "Recipe"))
    assert python_blocks(page)
    assert "easured" in section(page, "Numbers")


@pages
def test_costs_are_those_of_the_recipes(page: Path) -> None:
    said: dict[str, list[tuple[int, int, list[str]]]] = {}
    for row in rows(page, "recipe"):
        name, first, last = re.fullmatch(r"`(\S+)`(?:, epochs? (\d+)(?:-(\d+))?)?", row["recipe"]).groups()
        span = (int(first or 1), int(last or first or 0))
        said.setdefault(name, []).append((*span, [row[each] for each in PASSES]))
    assert said
    for name, lines in said.items():
        recipe = load_recipe(ROOT / name)
        same = [list(group) for _, group in groupby(phases(recipe), key=lambda phase: phase.total)]
        assert len(lines) == len(same), f"{name} has {len(same)} phases"
        for (first, last, costs), group in zip(lines, same, strict=True):
            assert (first, last or recipe.epochs) == (group[0].first, group[-1].last), name
            total = group[0].total
            numbers = (total.forward, total.input_backward, total.parameter_backward, total.units)
            for word, number in zip(costs, numbers, strict=True):
                digits = len(word.partition(".")[2])
                assert abs(float(word) - number) <= 0.5 * 10**-digits + 1e-9 if digits else float(word) == number, name


@pages
def test_published_numbers_are_those_of_the_tables(page: Path) -> None:
    for row in rows(page, "table"):
        table = published.load(row.pop("table").strip("`"))
        label = row.pop("row")
        (found,) = (each for each in table.rows if each.label == label)
        for key, value in row.items():
            assert (None if value in ("", "-") else float(value)) == found.values.get(key), (label, key)


@pages
def test_compositions_are_those_of_the_recipes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for number, text in enumerate(python_blocks(page)):
        assert re.search(r"^assert recipe == load_recipe\(", text, re.MULTILINE)
        path = tmp_path / f"example_{number}.py"
        path.write_text(text, encoding="utf-8")
        runpy.run_path(str(path))


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"\((\w+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.name for page in PAGES]
