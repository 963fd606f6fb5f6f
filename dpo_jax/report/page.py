"""Blocks of a report, rendered as one HTML page and as Markdown. Text in a block is data, never markup."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from markupsafe import Markup, escape

from dpo_jax.data.terminal import one_line, printable

LEVELS = {"alarm": "Careful", "warning": "Note", "health": "Unusual", "fine": "Nothing unusual in"}
LITTLE = 60  # characters too few to be worth folding away
TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Text:
    words: str
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Notice:
    """A notice to read first. Level "alarm": the numbers below may be misleading.

    `title` comes before the words (default: the name of the level), `advice`, what to try, after them.
    """

    words: str
    level: Literal["alarm", "warning", "health", "fine"] = "warning"
    title: str = ""
    advice: str = ""
    kind: str = "notice"

    @property
    def name(self) -> str:
        return self.title or LEVELS[self.level]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Headline numbers: (name, value, uncertainty)."""

    items: Sequence[tuple[str, str, str]]
    kind: str = "tiles"


@dataclasses.dataclass(frozen=True)
class Table:
    """Table of text cells; the first cell of a row is its name. `caption` says what the table is, `note` how to read it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""
    kind: str = "table"

    @property
    def right(self) -> list[bool]:
        """Mask of numeric columns, which are right-aligned."""
        return [_is_numeric([row[place] for row in self.rows]) for place in range(len(self.columns))]


@dataclasses.dataclass(frozen=True)
class Figures:
    """PNG or SVG files with captions, side by side where there is room. Small ones have their title in the image."""

    images: Sequence[tuple[Path, str]]
    caption: str = ""
    size: Literal["small", "half", "wide"] = "small"
    kind: str = "figures"


class Side(NamedTuple):
    """One policy's completion of a prompt. `mark`: a remark on the text, such as that it was truncated."""

    who: str
    text: str
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the completions of several policies."""

    prompt: str
    sides: Sequence[Side]
    kind: str = "sample"


Block = Text | Notice | Tiles | Table | Figures | Sample


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]

    @property
    def images(self) -> list[Path]:
        """Every image once, in reading order."""
        found = [path for s in self.sections for block in s.blocks if isinstance(block, Figures) for path, _ in block.images]
        return list(dict.fromkeys(found))


def render_html(page: Page) -> str:
    """A self-contained page: images are data URIs, and there is no script. A click on a figure enlarges it to the full page."""
    environment = _environment(autoescape=True, finalize=html_text)
    environment.filters |= {"attribute": attribute_text, "whole": _whole_interval, "options": _whole_options}
    environment.filters |= {"beginning": beginning, "ending": ending}
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    template = environment.get_template("report.html.j2")
    return template.render(page=page, css=css, data_uri=lambda image: Markup(_data_uri(image)))


def render_markdown(page: Page, *, link: Callable[[Path], str]) -> str:
    """The same page as Markdown; `link(image)` gives the path of an image relative to the file."""
    environment = _environment(autoescape=False, finalize=markdown_text)
    return environment.get_template("report.md.j2").render(page=page, link=lambda image: Markup(link(image)))


def _environment(**options: Any) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)


def _data_uri(image: Path) -> str:
    kind = "svg+xml" if image.suffix == ".svg" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(image.read_bytes()).decode()


def beginning(text: str, limit: int) -> tuple[str, str]:
    """The text up to about `limit` characters, and the rest. Not split if little would be left."""
    if len(text) <= limit + LITTLE:
        return text, ""
    at = max(text.rfind(" ", limit - LITTLE, limit), text.rfind("\n", limit - LITTLE, limit))
    at = at if at > 0 else limit
    return text[:at], text[at:]


def ending(text: str, limit: int) -> tuple[str, str]:
    """The text before about the last `limit` characters, and these: in a dialogue, the last turn is the question."""
    rest, last = beginning(text[::-1], limit)
    return last[::-1], rest[::-1]


def _whole_interval(cell: str) -> Markup:
    """A number with its interval, which may wrap only before the bracket."""
    number, bracket, rest = cell.partition(" (")
    return html_text(number) + (Markup(' <span class="whole">({}</span>').format(html_text(rest)) if bracket else "")


def _whole_options(words: str) -> Markup:
    """Words in which no --option wraps over two lines."""
    parts = re.split(r"(--[\w.-]*\w)", words)
    return Markup("").join(
        Markup('<span class="whole">{}</span>').format(part) if place % 2 else html_text(part)
        for place, part in enumerate(parts)
    )


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?%?( [±(/].*)?")  # also with its interval


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


# Letters of right-to-left scripts, and direction controls: such a text could reverse the text next to it.
_TURNING = re.compile(
    r"[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)


def html_text(value: object) -> Markup:
    """Any text as HTML that shows exactly this text: without markup, with invisible characters escaped (`terminal.HIDDEN`), and
    isolated if it could reverse the direction of the text next to it.
    """
    if isinstance(value, Markup):
        return value
    shown = escape(printable(str(value)))
    return Markup("<bdi>{}</bdi>").format(shown) if _TURNING.search(str(value)) else shown


def attribute_text(value: object) -> Markup:
    """Any text as an attribute value or a title, where markup is not possible."""
    return escape(one_line(str(value)))


_INLINE = re.compile(r"([\\`*_\[\]<>&|~$@])")
# Beginnings of a Markdown heading, list, or heading underline; a line that is a number has none.
_BLOCK = re.compile(r"^(\d*)([.)](?=\s|$)|[-+](?=[\s-]|$)|[#=])")


def markdown_text(value: object) -> str:
    """Any text as one line of Markdown that shows exactly this text: no heading, link, image, HTML, table cell or mention.

    As in `html_text`, invisible characters are escaped, and text that could reverse its surroundings is isolated.
    """
    if isinstance(value, Markup):
        return str(value)
    shown = printable(str(value).strip())
    text = _BLOCK.sub(r"\1\\\2", _INLINE.sub(r"\\\1", shown))
    text = text.replace("://", "\\://").replace("www.", "www\\.").replace("\n", "<br>")
    return f"<bdi>{text}</bdi>" if _TURNING.search(str(value)) else text


def markdown_code(text: str) -> str:
    """Any text as a Markdown code span that its content cannot end. Not for table cells, where `|` would end it."""
    shown = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown.strip() else markdown_text(repr(text))
