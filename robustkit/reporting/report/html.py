"""Markup as values: text is escaped unless it is markup already, so that nothing a file holds becomes markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = ("br", "img", "meta")
"""Elements that have no end."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *content: str | None, **attributes: str | int | bool | None) -> Html:
    """An element: `tag("td", "1 < 2", class_="number")`. Content that is None, and attributes that are None or False,
    are left out; an attribute that is True has no value.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(str(value), quote=True)}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in VOID else f"{start}{joined(content)}</{name}>")


def joined(parts: Iterable[str | None]) -> Html:
    """The parts one after the other, each escaped unless it is markup; None is left out."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, numbers: bool = False) -> Html:
    """A table in a box that scrolls where the page is narrow. The first cell of each row is its heading.

    Args:
        numbers: whether all cells but the first column are numbers, which stand to the right.
    """
    kind = "number" if numbers else None
    head = (tag("th", text, scope="col", class_=kind if place else None) for place, text in enumerate(headings))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell, class_=kind) for cell in cells))
        for first, *cells in rows
    )
    content = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return scrolling(content, caption)


def scrolling(content: str, name: str) -> Html:
    """A box of its own that scrolls sideways; `name` is what screen readers say of it."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=name)


def folded(summary: str, *content: str | None) -> Html:
    """What opens at a click; no script is needed."""
    return tag("details", tag("summary", summary), *content)


def commands(*lines: str) -> Html:
    """Lines for a terminal."""
    return scrolling(tag("pre", tag("code", "\n".join(lines))), "commands")


def missing(what: str, command: str | None = None) -> Html:
    """The line that stands where a piece is not there, with the command that makes it."""
    make = None if command is None else joined((" Make it with ", tag("code", command), "."))
    return tag("p", what, make, class_="missing")
