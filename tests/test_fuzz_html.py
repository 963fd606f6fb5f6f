"""HTML of posts: well-formed markup is read as Python's own parser reads it, and any other in linear time."""

import html
import random
from collections import Counter
from html.parser import HTMLParser

import pytest
from mutate import mutants, time_limit

from dpo_jax.data.html import strip_html
from dpo_jax.untrusted import LIMITS


class Reference(HTMLParser):
    """The reading of well-formed markup that `strip_html` had while Python's own parser did it."""

    VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.blocks, self.around = [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag in self.VOID:
            return
        if tag == "p" and not self.around:
            self.blocks.append("")
        elif tag == "code" and "code" not in self.around and self.around[:1] in ([], ["pre"]):
            self.blocks.append("<code>")
        self.around.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.around:
            return
        if tag == "code" and self.around.count("code") == 1 and self.around[0] in ("pre", "code"):
            self.blocks[-1] += "</code>"
        while self.around.pop() != tag:
            pass

    def handle_data(self, data):
        if self.around == ["p"] or ("code" in self.around and self.around[0] in ("pre", "code")):
            self.blocks[-1] += data


TEXTS = [
    "a",
    "x &lt; 1",
    "&amp;amp;",
    "&eacute;&copy",
    "&#65;&#x42;&#0065;&#0;",
    "&#128512;",
    " \n\t",
    "é🙂",
    "1 < 2",
    "a<1",
    "q&a",
]
ATTRIBUTES = ["", " class='l'", ' href="a>b"', " x=y", " href=http://a/", " checked", ' a = "1" b', " data-x='\"'", "\n id=1"]


def document(generator, depth=0):
    """Well-formed markup of the kinds that posts have, comments and declarations among it."""
    parts = []
    for _ in range(generator.randrange(1, 5)):
        kind = generator.random()
        tags = ["b", "a", "ul", "li", "code", "p", "h2"] if depth else ["p", "p", "P", "pre", "code", "blockquote"]
        tag = generator.choice(tags)
        if kind < 0.4 or depth > 5:
            parts.append(generator.choice(TEXTS))
        elif kind < 0.5:
            parts.append(
                generator.choice(["<br>", "<br/>", "<img src='x'>", "<!-- a <p> b -->", "<!DOCTYPE html>", "<hr />", "<p/>"])
            )
        else:
            parts.append(f"<{tag}{generator.choice(ATTRIBUTES)}>{document(generator, depth + 1)}</{tag}>")
    return "".join(parts)


def test_well_formed_html_is_read_as_pythons_parser_reads_it():
    generator = random.Random(0)
    texts = Counter()
    for _ in range(mutants(1000)):
        markup = document(generator)
        found = strip_html(markup)
        assert found == "\n\n".join(Reference(markup).blocks), markup
        texts[found] += 1
    assert len(texts) > 300
    special = "<p>" + "".join(f"&{name};" for name in sorted(html.entities.html5)) + "</p>"
    assert strip_html(special) == "".join(Reference(special).blocks)


N = 60_000
HOSTILE = {
    **{
        "nested": "<b>" * N,
        "p": "<p>" * N,
        "closed": "</b>" * N,
        "unopened": "<p>" + "</b>" * N,
        "ends": "<" * N,
        "raw": "<script>" * N,
    },
    **{"sections": "<![X[" * N, "CDATA": "<![CDATA[" * N, "comments": "<!--" * N, "declared": "<!a" * N, "asked": "<?" * N},
    **{
        "tags": "<a " * N,
        "quotes": '<a b="' * N,
        "both": "<a b='\"" * N,
        "equals": "<a " + "=" * N,
        "slashes": "<a " + "/" * N,
    },
    **{
        "dashes": "<!--" + "--" * N,
        "spaces": "<!--" + "-- " * N,
        "void": "<p>" + "a<br>" * N + "</p>",
        "ampersands": "<p>" + "&" * N,
    },
    **{"digits": "<p>&#" + "9" * N + ";</p>", "zeros": "<p>&#" + "0" * N + "65;</p>", "hex": "<p>&#x" + "f" * N + ";</p>"},
    **{"styles": "<style>a</style>" * N, "mixed": "<p>a<!-- b --><![X[ c" * N, "names": "<" + "a" * N, "gt": ">" * N},
    **{"code": "<code>" * N, "code closed": "<code>a</code>" * N, "deep": "<div>" * 99 + "<p>" + "</div>" * 99},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_html_takes_linear_time(name, monkeypatch):
    """What took time with the square of its length, here or in Python's parser, would not end within the limit."""
    monkeypatch.setattr(LIMITS, "depth", 10**9)
    with time_limit():
        assert isinstance(strip_html(HOSTILE[name]), str)


def test_damaged_html_keeps_its_text():
    assert strip_html("<p>a <![X[ b") == "a <![X[ b"
    assert strip_html("<p>1 < 2 & 3 <b") == "1 < 2 & 3 <b"
    assert strip_html("<p>a&#" + "9" * 9000 + ";b&#" + "0" * 9000 + "65;") == "a\ufffdbA"
    assert strip_html("<p>a<script>var b = '<p>'</script>c</p>") == "ac"
