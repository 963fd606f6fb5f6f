"""StackExchange HTML to text, as the original implementation does it."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])


def strip_html(markup: str) -> str:
    """Paragraphs and code of a post, joined by blank lines; code stays between `<code>` tags.

    Equal to `strip_html_tags` of eric-mitchell/direct-preference-optimization on well-formed markup (but for white space), with
    its gaps: of a paragraph only the text directly inside `<p>` stays (links, emphasis and inline code go), and lists, quotes
    and headings go.
    """
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    return "\n\n".join(reader.blocks)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._open: list[str] = []  # tags around the current place, outermost first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        if tag == "p" and not self._open:
            self.blocks.append("")
        elif tag == "code" and "code" not in self._open and self._open[:1] in ([], ["pre"]):
            self.blocks.append("<code>")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return
        if tag == "code" and self._open.count("code") == 1 and self._open[0] in ("pre", "code"):
            self.blocks[-1] += "</code>"
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        in_paragraph = self._open == ["p"]
        in_code = "code" in self._open and self._open[0] in ("pre", "code")
        if in_paragraph or in_code:
            self.blocks[-1] += data
