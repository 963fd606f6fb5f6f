"""Output files of a report, and the check that only files of an earlier report are replaced or deleted."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dpo_jax.cli.config import ConfigError
from dpo_jax.report.first import TITLE
from dpo_jax.report.run_record import shown_path
from dpo_jax.untrusted import read_bytes
from dpo_jax.writing import leftovers

HTML, MARKDOWN, IMAGES = "report.html", "report.md", "images"
# Image links as in our Markdown; in models' texts the bracket is escaped.
_LINK = re.compile(r"^!\[.*\]\(images/(\d\d+-[^)/]+)\)$", re.MULTILINE)


def earlier_images(out: Path) -> set[str]:
    """Names of the images in `out` that an earlier report has written; they must be all there are.

    Raises `ConfigError` if `out` holds a page or images that no report has written and that this one would replace.
    """
    known: set[str] = set()
    for name in (HTML, MARKDOWN):
        if os.path.lexists(out / name):
            text = _text_of(out / name)
            if TITLE not in text:
                raise ConfigError(_foreign(out, name))
            known |= set(_LINK.findall(text)) if name == MARKDOWN else set()
    folder = out / IMAGES
    if not os.path.lexists(folder):
        return set()
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(_foreign(out, IMAGES))
    known |= {file.name for file in leftovers(folder, *known)}
    present = sorted(folder.iterdir())
    for file in present:
        if file.name not in known or file.is_symlink() or not file.is_file():
            raise ConfigError(_foreign(out, f"{IMAGES}/{shown_path(file.name)}"))
    return {file.name for file in present}


def _foreign(out: Path, name: str) -> str:
    return (
        f"report.out: {shown_path(out)} holds {name}, which was not written by a report: choose another --report.out, or move "
        "it away"
    )


def _text_of(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return ""
    return read_bytes(path).decode("utf-8", "replace")
