"""A report as a list of blocks, written as one HTML page and as Markdown. What stands in a block is data, never markup."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from markupsafe import Markup, escape

LEVELS = {"alarm": "Careful", "warning": "Note", "health": "Unusual", "fine": "Nothing unusual in"}
LITTLE = 60  # characters that nobody needs to unfold
TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Text:
    words: str
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Notice:
    """One thing to know before reading on. An alarm: the numbers below may not mean what they seem to.

    `title` stands before the words, by default what the level is called; `advice`, what to try, behind them.
    """

    words: str
    level: Literal["alarm", "warning", "health", "fine"] = "warning"
    title: str = ""
    advice: str = ""
    kind: str = "notice"

    @property
    def name(self) -> str:
        return (
            self.title or {"alarm": "Careful", "warning": "Note", "health": "Unusual", "fine": "Nothing unusual in"}[self.level]
        )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The few numbers that a reader looks for first: (what, value, how sure)."""

    items: Sequence[tuple[str, str, str]]
    kind: str = "tiles"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first of a row names it. `caption` says what it is, `note` how to read it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""
    kind: str = "table"

    @property
    def right(self) -> list[bool]:
        """Which columns are numbers, and stand to the right."""
        return [_is_numeric([row[place] for row in self.rows]) for place in range(len(self.columns))]


@dataclasses.dataclass(frozen=True)
class Figures:
    """PNG or SVG files with their captions, side by side where there is room. Small ones have their title in the image."""

    images: Sequence[tuple[Path, str]]
    caption: str = ""
    size: Literal["small", "half", "wide"] = "small"
    kind: str = "figures"


class Side(NamedTuple):
    """What one policy made of a prompt. `mark`: what to know of the text, such as that it was cut."""

    who: str
    text: str
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what several policies made of it."""

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
    """A page that needs nothing else: its images are data URIs, and it has no script. A figure that is clicked fills it."""
    environment = _environment(autoescape=True)
    environment.filters["whole"] = _whole_interval
    environment.filters |= {"beginning": beginning, "ending": ending, "options": _whole_options}
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(page=page, css=css, data_uri=_data_uri)


def render_markdown(page: Page, *, link: Callable[[Path], str]) -> str:
    """The same as Markdown; `link(image)` is where its image lies, relative to the file."""
    environment = _environment(autoescape=False, finalize=markdown_text)
    return environment.get_template("report.md.j2").render(page=page, link=lambda image: Markup(link(image)))


def _environment(**options: Any) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)


def _data_uri(image: Path) -> str:
    kind = "svg+xml" if image.suffix == ".svg" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(image.read_bytes()).decode()


def beginning(text: str, limit: int) -> tuple[str, str]:
    """The text up to about `limit` characters, and the rest; all of it where little would be left."""
    if len(text) <= limit + LITTLE:
        return text, ""
    at = max(text.rfind(" ", limit - LITTLE, limit), text.rfind("\n", limit - LITTLE, limit))
    at = at if at > 0 else limit
    return text[:at], text[at:]


def ending(text: str, limit: int) -> tuple[str, str]:
    """What comes before about the last `limit` characters, and those: of a dialogue, the last turn is the question."""
    rest, last = beginning(text[::-1], limit)
    return last[::-1], rest[::-1]


def _whole_interval(cell: str) -> Markup:
    """A number with its interval may be broken before the bracket, and nowhere else."""
    number, bracket, rest = cell.partition(" (")
    return escape(number) + (Markup(' <span class="whole">({}</span>').format(rest) if bracket else "")


def _whole_options(words: str) -> Markup:
    """Words in which no --option is broken over two lines."""
    parts = re.split(r"(--[\w.-]*\w)", words)
    return Markup("").join(
        Markup('<span class="whole">{}</span>').format(part) if place % 2 else part for place, part in enumerate(parts)
    )


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?%?( [±(/].*)?")  # also with its interval


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)


_INLINE = re.compile(r"([\\`*_\[\]<>&|~$@])")
# What begins a heading, a list or a line under a heading: of a line that is a number, nothing does.
_BLOCK = re.compile(r"^(\d*)([.)](?=\s|$)|[-+](?=[\s-]|$)|[#=])")
_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def markdown_text(value: object) -> str:
    """Any text as one line of Markdown that shows exactly this text: no heading, link, image, HTML, table cell or mention."""
    if isinstance(value, Markup):
        return str(value)
    text = _BLOCK.sub(r"\1\\\2", _INLINE.sub(r"\\\1", str(value).strip()))
    text = text.replace("://", "\\://").replace("www.", "www\\.")
    return _BREAK.sub("<br>", text)
