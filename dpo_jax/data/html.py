"""StackExchange HTML to text, as in the original implementation."""

from __future__ import annotations

import collections
import html
import re
from collections.abc import Iterator

from dpo_jax.untrusted import LIMITS, TooDeep

_VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])
_RAW = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in ("script", "style")}  # they contain no markup

# Constructs that begin with "<". Each pattern takes linear time, and a missing end is searched for only once.
_COMMENT, _CDATA = re.compile(r"<!--(?:-?>|.*?--\s*+>)", re.DOTALL), re.compile(r"<!\[CDATA\[.*?\]\]>", re.DOTALL)
_TAG = re.compile(
    r"""<(?P<close>/?)(?P<name>[a-zA-Z][^\s/>\0]*+)
    (?:[^>=/]++ | /(?!>) | =\s*+(?:"[^"]*+" | '[^']*+' | [^\s>]*+))*+
    (?P<empty>/?)>""",
    re.VERBOSE,
)
_BEGUN = re.compile(r"<[!?/a-zA-Z]")
_OTHER = re.compile(r"<[!?/][^>]*+>")  # <!DOCTYPE html>, <![if IE]>, <?xml ?>, </3>


def strip_html(markup: str) -> str:
    """Paragraphs and code of a post, joined by blank lines; code stays between `<code>` tags.

    Equals `strip_html_tags` of eric-mitchell/direct-preference-optimization on well-formed markup (except for white space),
    including its gaps: of a paragraph only the text directly inside `<p>` is kept (links, emphasis and inline code are lost),
    and lists, quotes and headings are lost. A "<" that begins no markup, or markup that never ends, is text. Raises ValueError
    for elements nested deeper than `limits.depth`.
    """
    # Not html.parser: it takes quadratic time on some damaged markup and raises AssertionError on other.
    reader = _Reader()
    for text, tag in _pieces(markup):
        if text:
            reader.text(text)
        if tag is None:
            continue
        name = tag["name"].lower()
        if tag["close"]:
            reader.close(name)
        elif name not in _VOID:
            reader.open(name)
            if tag["empty"]:
                reader.close(name)
    return "\n\n".join("".join(block) for block in reader.blocks)


class _Reader:
    def __init__(self) -> None:
        self.blocks: list[list[str]] = []
        self._open: list[str] = []  # open elements, outermost first
        self._count: collections.Counter[str] = collections.Counter()  # open elements by name

    def open(self, name: str) -> None:
        if len(self._open) >= LIMITS.depth:
            raise TooDeep(f"HTML elements {len(self._open) + 1} levels deep; {LIMITS.remedy('depth')}")
        if name == "p" and not self._open:
            self.blocks.append([])
        elif name == "code" and not self._count["code"] and self._open[:1] in ([], ["pre"]):
            self.blocks.append(["<code>"])
        self._open.append(name)
        self._count[name] += 1

    def close(self, name: str) -> None:
        if not self._count[name]:
            return
        if name == "code" and self._count["code"] == 1 and self._open[0] in ("pre", "code"):
            self.blocks[-1].append("</code>")
        while (inner := self._open.pop()) != name:
            self._count[inner] -= 1
        self._count[name] -= 1

    def text(self, text: str) -> None:
        if self._open == ["p"] or (self._count["code"] and self._open[0] in ("pre", "code")):
            self.blocks[-1].append(_unescaped(text))


def _pieces(markup: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Each text and the tag after it; None for comments and the like, and at the end."""
    done, at = 0, markup.find("<")
    while at >= 0:
        comment = _COMMENT if markup.startswith("<!--", at) else _CDATA if markup.startswith("<![CDATA[", at) else None
        tag = None if comment else _TAG.match(markup, at)
        found = tag or (comment or _OTHER).match(markup, at)
        if found:
            yield markup[done:at], tag
            done = at = found.end()
            if tag and not tag["close"] and (raw := tag["name"].lower()) in _RAW:
                closing = _RAW[raw].search(markup, done)
                at = closing.start() if closing else len(markup)
        elif _BEGUN.match(markup, at):
            break  # it never ends, and neither would the next one
        else:
            at += 1
        at = markup.find("<", at)
    yield markup[done:], None


def _unescaped(text: str) -> str:
    """`text` with character references resolved, even those with more digits than Python parses."""
    if "&" not in text:
        return text
    text = re.sub(r"&#0+(?=[0-9])", "&#", text)
    return html.unescape(re.sub(r"&#[0-9]{8,};?", "\N{REPLACEMENT CHARACTER}", text))
