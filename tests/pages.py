"""The documentation as tests read it: its pages, their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from robustkit.core.registry import FOLDERS, registry

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
]


class Block(NamedTuple):
    """Fenced text of a page, without its indentation. `number` counts the page's blocks from 0, lines count from 1."""

    page: Path
    number: int
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """What a user types at a prompt, in one line, and where it stands."""

    place: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; those of one language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for number, match in enumerate(re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE)):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, number, line, match[2], textwrap.dedent(match[3])))
    return [block for block in found if language in (None, block.language)]


def commands(block: Block) -> list[Command]:
    """The commands of a console block: a line each, but for lines that end in a backslash, and lines of comment."""
    found, begun = [], ""
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        start = number - begun.count("\n")
        begun += line
        if line.endswith("\\"):
            begun = f"{begun[:-1]}\n"
            continue
        text, begun = begun.replace("\n", " ").strip(), ""
        if text and not text.startswith("#"):
            found.append(Command(f"{block.page.relative_to(ROOT)}:{start}", text))
    return found


def spans(page: Path) -> list[Command]:
    """The commands in a page's sentences: `robustkit ...`."""
    text = re.sub(
        r"^( *)```(?:.*\n)*?\1```$", lambda match: "\n" * match[0].count("\n"), page.read_text("utf-8"), flags=re.M
    )
    return [
        Command(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", " ".join(match[1].split()))
        for match in re.finditer(r"(?<!`)`(robustkit [^`]*)`(?!`)", text)
    ]


def plugins_of(page: Path) -> set[str]:
    """The modules of the plugins whose recipes a page runs."""
    text = page.read_text(encoding="utf-8")
    return {name.replace("-", "_") for name in re.findall(r"plugins/(robustkit-[\w-]+)/recipes", text)}


def can_be_tried(page: Path) -> bool:
    """Whether the plugins that a page speaks of are installed."""
    return all(find_spec(module) for module in plugins_of(page))


def forget_strategies(module: str) -> None:
    """Takes back the names that Python blocks have registered, in modules whose names begin so."""
    for kind in FOLDERS:
        names = registry(kind)
        for cls, name in list(names._names.items()):
            if cls.__module__.startswith(module):
                del names._names[cls], names._classes[name]
