"""The documentation says what the code does: its examples run, its overrides apply, its links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from pages import PAGES as ALL
from pages import README, ROOT, Block, blocks, can_be_tried, commands, forget_strategies

from robustkit.core.batch import Passes
from robustkit.core.loop import train_step
from robustkit.core.order import epoch_order
from robustkit.core.override import override
from robustkit.core.parts import Parts, assemble
from robustkit.core.recipe import Recipe, load_recipe, load_recipes
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import from_json, to_json
from robustkit.core.world import World
from robustkit.engine import count_passes
from robustkit.evaluation import evaluate
from robustkit.testing import check

PAGES = sorted((ROOT / "docs" / "kinds").glob("*.md"))
LANGUAGES = ("console", "python", "toml", "json", "text", "bash")
"""What a fenced block may be: commands, code, settings, data, what is printed or drawn, a script."""
PAGE_OF = {
    "threat": "threats",
    "epsilon": "epsilons",
    "attack": "attacks",
    "objective": "attacks",
    "target": "targets",
    "head": "heads",
    "loss": "losses",
    "weights": "weights",
    "average": "weights",
    "optimizer": "optimizers",
    "schedule": "optimizers",
    "dataset": "data",
    "measure": "evaluation",
}
PREAMBLE = """\
from typing import ClassVar

from robustkit import registry, setting, spec
from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.strategy import Scene
"""
"""What the README's example of a strategy leaves out."""
REGISTERED = re.compile(r'@registry\("([\w-]+)"\)\.register\("([\w-]+)"\)\s+@spec\s+class (\w+)')
PARTS = {
    "objective": "attack=PGD(steps=2, objective={})",
    "dataset": "data={}",
    "measure": "evaluation=(Suite(measures=({},)),)",
}
"""How a strategy enters a recipe, where it does so by another name than its kind's."""
MODULE = "robustkit_recipe_docs_"
"""How the module of a file begins that holds an example."""


def name_of(block: Block) -> str:
    return f"{block.page.stem}_{block.number}"


def section(title: str) -> str:
    """The README's text under a heading."""
    return README.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


EXAMPLES = [block for page in PAGES for block in blocks(page, "python")]
STRATEGIES = [block for block in EXAMPLES if REGISTERED.search(block.text)]
OTHERS = [block for block in EXAMPLES if block not in STRATEGIES]
COMMANDS = [
    pytest.param(
        command.text,
        id=f"{page.stem}: {command.text}",
        marks=pytest.mark.skipif(not can_be_tried(page), reason="needs a plugin"),
    )
    for page in ALL
    for block in blocks(page, "console")
    for command in commands(block)
    if re.match(r"robustkit (show|run|compare) (recipes|plugins)/\S*\.py", command.text)
]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Names that an example registers, modules that recipes import and torch's random state are as before."""
    modules = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        yield
    forget_strategies(MODULE)
    for name in set(sys.modules) - modules:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if name.startswith(MODULE) or Path(path).is_relative_to(ROOT / "recipes"):
            del sys.modules[name]


def in_a_recipe(text: str, name: str, tmp_path: Path, *, part: str) -> Recipe:
    """The recipe of a file that holds an example, and a recipe with the example in it."""
    imports = "from robustkit import Model, Suite\nfrom robustkit.attacks import PGD\n"
    imports += "from robustkit.testing import tiny_recipe\n"
    path = tmp_path / f"docs_{name}.py"
    path.write_text(f"{text}\n\n{imports}\nrecipe = tiny_recipe({part})\n", encoding="utf-8")
    return load_recipe(path)


def strategy_recipe(block: Block, tmp_path: Path, preamble: str = "") -> tuple[Any, Recipe]:
    ((kind, _, cls),) = REGISTERED.findall(block.text)
    part = PARTS.get(kind, f"{kind}={{}}").format(f"{cls}()")
    recipe = in_a_recipe(preamble + block.text, name_of(block), tmp_path, part=part)
    return getattr(sys.modules[MODULE + name_of(block)], cls)(), recipe


def trained_a_step(recipe: Recipe) -> Parts:
    """One real step, at the price that the recipe names, with finite weights that are not those of the start."""
    data = recipe.data.load()
    world = World(samples=len(data.train), training=0, classes=len(data.classes), image_shape=data.train.shape)
    parts = assemble(recipe, data, world)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    declared = sum(recipe.passes(parts.progress).values(), Passes())
    with count_passes(parts.model) as count:
        train_step(parts, epoch_order(parts.rows, recipe.seed, 0)[: recipe.batch_size])
    assert count.per_batch(recipe.batch_size) == declared
    for name, parameter in parts.model.named_parameters():
        assert bool(parameter.isfinite().all()), name
    assert any(not torch.equal(p, before[name]) for name, p in parts.model.named_parameters())
    return parts


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_what_it_says_it_is(page: Path) -> None:
    """One of our languages, and well-formed. (Commands and Python run: see test_docs_commands.)"""
    assert len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: '{block.language}' is none of {', '.join(LANGUAGES)}"
        match block.language:
            case "console" | "bash":
                done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
                assert done.returncode == 0, f"{block.place}: {done.stderr}"
            case "python":
                compile(block.text, block.place, "exec")
            case "toml":
                tomllib.loads(block.text)
            case "json":
                json.loads(block.text)


@pytest.mark.parametrize("block", STRATEGIES, ids=name_of)
def test_the_example_of_a_strategy_keeps_its_contract_and_trains(block: Block, tmp_path: Path) -> None:
    strategy, recipe = strategy_recipe(block, tmp_path)
    assert len(block.text.split("@spec")[1].splitlines()) <= 30
    check(strategy)
    assert from_json(Recipe, to_json(recipe)) == recipe
    parts = trained_a_step(recipe)
    for _, measure in recipe.measures():
        results = evaluate(parts.final, parts.data.test, threat=recipe.threat, suite=[measure], batch_size=8)
        result = results[measure.key]
        assert 0 <= result.accuracy <= 1 and result.n == len(parts.data.test)


@pytest.mark.parametrize("block", OTHERS, ids=name_of)
def test_every_other_python_block_runs(block: Block, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if models := re.findall(r"@register_model\ndef (\w+)", block.text):
        part = f"model=Model(backbone={models[0]!r})"
        trained_a_step(in_a_recipe(block.text, name_of(block), tmp_path, part=part))
        return
    path = tmp_path / "example.py"
    path.write_text(block.text, encoding="utf-8")
    runpy.run_path(str(path))
    assert ("print(" in block.text) == bool(capsys.readouterr().out)


def test_the_readme_s_strategy_needs_imports_only(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(README, "python") if REGISTERED.search(block.text))
    assert REGISTERED.search(section("Write your own"))
    strategy, recipe = strategy_recipe(block, tmp_path, PREAMBLE)
    check(strategy)
    trained_a_step(recipe)


def test_the_readme_shows_the_recipe_it_says_it_shows() -> None:
    named = re.search(r"This is `(\S+)` without its header", section("A recipe"))
    assert named is not None
    shown = next(block for block in blocks(README, "python") if block.text.startswith("recipe = Recipe("))
    assert (ROOT / named[1]).read_text(encoding="utf-8").endswith(shown.text)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_override_shown_applies(line: str) -> None:
    words = shlex.split(line, comments=True)
    changes = [word for word in words if "=" in word and not word.startswith("-")]
    for path in (word for word in words if re.search(r"\.py(:[\w.-]+)?$", word) and "=" not in word):
        recipe = load_recipe(ROOT / path)
        assert (override(recipe, changes) != recipe) == bool(changes)


def test_the_readme_s_methods_are_composed_as_it_says() -> None:
    rows = [row.split("|")[1:-1] for row in section("Methods").splitlines() if row.startswith("| ")]
    asked = 0
    for row in rows:
        changes = [word for span in re.findall(r"`([^`]*=[^`]*)`", row[2]) for word in span.split()]
        if not changes:
            continue
        family = re.search(r"any (\w+) recipe", row[2])
        pattern = f"*{family[1].lower()}*.py" if family else "*.py"
        recipes = sorted((ROOT / "recipes").glob(pattern))
        assert recipes, row
        for path in recipes:
            for recipe in load_recipes(path).values():
                assert override(recipe, changes).epochs == recipe.epochs
        asked += 1
    assert asked >= 4


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.relative_to(ROOT)} links to {link}, and there is no such heading"


def test_every_recipe_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"[\w./-]+\.py\b", README.read_text(encoding="utf-8")))
    assert {"recipes/quickstart.py", "uiat_rn18.py"} <= named
    missing = [name for name in named if not ((ROOT / name).is_file() or (ROOT / "recipes" / name).is_file())]
    assert missing == []


def test_the_pages_tell_of_every_built_in_and_of_every_setting() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    for kind, folder in FOLDERS.items():
        text = (ROOT / "docs" / "kinds" / f"{PAGE_OF[kind]}.md").read_text(encoding="utf-8")
        for name in groups[f"robustkit.{folder}"]:
            assert f"`{name}`" in text, f"{PAGE_OF[kind]}.md does not name the {kind} '{name}'"
            for field in attrs.fields(registry(kind).get(name)):
                assert f"`{field.name}`" in text, f"{PAGE_OF[kind]}.md does not name {name}'s setting '{field.name}'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_entry_points_announce_the_page_s_examples(page: Path) -> None:
    examples = {}
    for block in blocks(page, "python"):
        for kind, name, cls in REGISTERED.findall(block.text):
            examples[f"robustkit.{FOLDERS[kind]}", name] = cls
    announced = {}
    for block in blocks(page, "toml"):
        for group, points in tomllib.loads(block.text)["project"]["entry-points"].items():
            announced |= {(group, name): value.rpartition(":")[2] for name, value in points.items()}
    assert announced == examples and examples


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {f"kinds/{page.name}" for page in PAGES} == set(re.findall(r"\((kinds/[\w]+\.md)\)", index))
