"""What mkdocs lacks for this site: pages that are made from the code, links to files outside docs/, formulas as MathML.

On a page of the repository a link may lead to any file of it. On the site each such file becomes a page: Markdown as it
is, code in a block. So the site holds all that it speaks of, and needs no network.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml"}
"""Files that are shown as code."""
CONTRACTS = ("core.strategy", "core.batch", "core.world", "core.registry", "core.spec", "testing")
"""Modules that somebody who writes a strategy needs."""
PLAIN = "\n    options: {show_root_heading: false, show_root_toc_entry: false, members: []}"
"""A strategy's docstring alone: its settings stand above it, and its methods are those of the contract."""


LENGTHS = ("epsilon", "radius", "step_size")
"""Settings in pixels."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu's lists of methods, in the order of their table, and of the API reference."""
    methods = re.findall(r"\((\w+\.md)\)", (DOCS / "methods" / "README.md").read_text(encoding="utf-8"))
    lists = {"Methods": [f"methods/{name}" for name in methods], "API": [f"api/{name}.md" for name in api_pages()]}
    for entry in config.nav or []:
        for title in entry if isinstance(entry, dict) else ():
            entry[title] += lists.get(title, [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API reference, notebooks, and a page for each file that a page links to."""
    made = {f"api/{name}.md": text for name, text in api_pages().items()}
    for notebook in DOCS.rglob("*.ipynb"):
        made[str(notebook.relative_to(DOCS).with_suffix(".md"))] = notebook_page(notebook)
        if (file := files.get_file_from_path(str(notebook.relative_to(DOCS)))) is not None:
            files.remove(file)
    recipes = [path for path in ROOT.glob("recipes/**/*.py") if "__pycache__" not in path.parts]
    waiting = {*recipes, *(goal for page in DOCS.rglob("*.md") for goal in outside(page))}
    while waiting:
        path = waiting.pop()
        if (source := source_page(path)) in made:
            continue
        made[source] = text_of(path)
        if path.suffix == ".md":
            waiting |= outside(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ lead to the page that stands for the file."""
    here = origin(page.file.src_uri)
    if here is None:
        return markdown

    def turned(match: re.Match[str]) -> str:
        link, _, anchor = match[2].partition("#")
        goal = None if re.match(r"[a-z]+:", match[2]) or not link else target(here, link)
        if goal is None:
            return match[0]
        at = str(goal.relative_to(DOCS)) if goal.is_relative_to(DOCS) else source_page(goal)
        if goal.suffix == ".ipynb":
            at = at.removesuffix(".ipynb") + ".md"
        way = os.path.relpath(at, Path(page.file.src_uri).parent)
        return f"{match[1]}{way}{'#' + anchor if anchor else ''}{match[3]}"

    blocks = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(block if number % 2 else LINK.sub(turned, block) for number, block in enumerate(blocks))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML, which browsers draw themselves."""

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)


def outside(page: Path) -> set[Path]:
    """The files of the repository, but not of docs/, that a page links to."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = {link.partition("#")[0] for _, link, _ in LINK.findall(text) if not re.match(r"[a-z]+:", link)}
    found = {target(page, link) for link in links if link}
    return {goal for goal in found if goal is not None and not goal.is_relative_to(DOCS)}


def target(page: Path, link: str) -> Path | None:
    """The file that a link leads to; of a folder its README, or its __init__."""
    goal = (page.parent / link).resolve()
    if goal.is_dir():
        goal = next((goal / name for name in ("README.md", "__init__.py") if (goal / name).exists()), goal)
    return goal if goal.is_file() and goal.is_relative_to(ROOT) else None


def source_page(path: Path) -> str:
    """The name, on the site, of the page that stands for a file outside docs/."""
    name = str(path.relative_to(ROOT))
    return f"files/{name}" if path.suffix == ".md" else f"files/{name}.md"


def origin(source: str) -> Path | None:
    """The file that a page of the site was made from; None for the API reference."""
    if not source.startswith("files/"):
        path = DOCS / source
        return path if path.exists() else path.with_suffix(".ipynb") if path.with_suffix(".ipynb").exists() else None
    path = ROOT / source.removeprefix("files/")
    return path if path.exists() else None


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def notebook_page(path: Path) -> str:
    """The text and the code of a notebook."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"````python\n{text}\n````")
    return "\n\n".join(parts)


def signature(home: str) -> str:
    """The settings of a strategy with their defaults, as Python."""
    module, _, name = home.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    lines = "".join(f"    {parameter.name}{default(parameter)},\n" for parameter in parameters)
    return (
        f"````python\nfrom {module.rpartition('.')[0]} import {name}\n\n{name}({chr(10) if lines else ''}{lines})\n````"
    )


def default(parameter: inspect.Parameter) -> str:
    """=value; lengths as fractions of 255, as papers write them."""
    value = parameter.default
    if value is parameter.empty:
        return ""
    if parameter.name in LENGTHS and isinstance(value, float) and value:
        return f"={value * 255:g} / 255"
    return f"={value!r}"


def api_pages() -> dict[str, str]:
    """The reference: what `robustkit` exports, the contracts, and the strategies of each kind."""
    package = importlib.import_module("robustkit")
    homes: dict[str, str] = package._HOMES
    named = "\n\n".join(f"::: robustkit.{homes[name]}.{name}" for name in sorted(package.__all__, key=str.lower))
    pages = {"README": f"# API reference\n\nWhat `from robustkit import ...` offers.\n\n{named}\n"}
    contracts = "\n\n".join(f"## robustkit.{name}\n\n::: robustkit.{name}" for name in CONTRACTS)
    pages["contracts"] = f"# Contracts\n\nWhat strategies and the loop say to each other.\n\n{contracts}\n"
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group, points in project["entry-points"].items():
        folder = group.removeprefix("robustkit.")
        text = f"# {folder.capitalize()}\n\n`from robustkit.{folder} import ...`\n\n"
        for name, home in points.items():
            text += f"## {name}\n\n{signature(home)}\n\n::: {home.replace(':', '.')}{PLAIN}\n\n"
        pages[folder] = text
    return pages
