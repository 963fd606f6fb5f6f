"""Limits on the steps of a `tokenizer.json` (normalizer, pre-tokenizer, post-processor, decoder), checked before any runs.

A file may declare steps that repeatedly make a text a thousand times longer, and regular expressions may take exponential time.
Neither can be interrupted, because the Rust library returns only when done.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.untrusted import LIMITS, read_bytes

STEPS = 100
TRIED = 10_000  # characters of each test text
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
_LONGER = {"ByteLevel": 2, "Metaspace": 2, "BertNormalizer": 3}  # most characters made from one

# Splits each text by each pattern, as tokenizers does. Exits with 3 if its engine gives up.
_TRIAL = """
import json, sys
from tokenizers import Regex, pre_tokenizers
for pattern, texts in json.load(sys.stdin):
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:
        continue  # whoever loads the tokenizer is told
    for text in texts:
        try:
            split.pre_tokenize_str(text)
        except BaseException:
            sys.exit(3)
"""


def check_steps(file: str | os.PathLike[str]) -> None:
    """Raises ValueError for a `tokenizer.json` whose steps exceed the limits `growth` and `pattern_s`."""
    content = json.loads(read_bytes(file))
    if not isinstance(content, dict):
        raise ValueError("a JSON object is needed")
    patterns: dict[str, None] = {}
    for part in _PARTS:
        steps = list(_steps(content.get(part)))
        if len(steps) > STEPS:
            raise ValueError(f"{part}: {len(steps):,} steps, but the limit is {STEPS}")
        if (growth := math.prod(map(_growth, steps))) > LIMITS.growth:
            raise ValueError(f"{part}: makes a text up to {growth:,.0f} times as long; {LIMITS.remedy('growth')}")
        patterns |= {step["pattern"]["Regex"]: None for step in steps if isinstance(_of(step.get("pattern"), "Regex"), str)}
    if patterns:
        _try_patterns(list(patterns))


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """A step, or the steps of a sequence."""
    stack = [step]
    while stack:
        step = stack.pop()
        if not isinstance(step, dict):
            continue
        inside = [item for name in _LISTS if isinstance(step.get(name), list) for item in step[name]]
        if not inside:
            yield step
        stack += inside


def _growth(step: Mapping[str, Any]) -> float:
    """Most characters or tokens that this step may make from one."""
    match step.get("type"):
        case "Replace":
            content, pattern = _length(step.get("content")), _length(_of(step.get("pattern"), "String"))
            return max(1.0, content / pattern) if pattern else 1.0 + content  # a pattern may match between any two characters
        case "Prepend":
            return 1.0 + _length(step.get("prepend"))
        case "TemplateProcessing":
            special = step.get("special_tokens")
            ids = {name: _length(_of(token, "ids")) for name, token in special.items()} if isinstance(special, dict) else {}
            return float(max(_pieces(step.get(form), ids) for form in ("single", "pair")))
        case str(kind):
            return float(_LONGER.get(kind, 1))
    return 1.0


def _pieces(template: Any, ids: Mapping[str, int]) -> int:
    pieces = template if isinstance(template, list) else []
    names = [_of(_of(piece, "SpecialToken"), "id") for piece in pieces]
    return max(1, sum(ids.get(name, 1) if isinstance(name, str) else 1 for name in names))


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list) else 0


def _try_patterns(patterns: list[str]) -> None:
    """Raises ValueError if splitting test texts that are likely to be slow takes a subprocess longer than allowed."""
    cases = json.dumps([(pattern, _texts(pattern)) for pattern in patterns])
    shown = ", ".join(repr(pattern[:60]) for pattern in patterns[:3])
    try:
        command = [sys.executable, "-c", _TRIAL]
        code = subprocess.run(
            command, input=cases.encode(), capture_output=True, timeout=LIMITS.pattern_s, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        raise ValueError(f"the regular expressions {shown} take too long; {LIMITS.remedy('pattern_s')}") from None
    if code == 3:
        raise ValueError(f"the regular expressions {shown} need too many steps for {TRIED:,} characters")


def _texts(pattern: str) -> list[str]:
    """Test texts: repetitions of what a pattern may match, each also with a different end, so that many partial matches
    fail."""
    letters = dict.fromkeys(["a", "A", "1", " ", "\n", "é", "中", "!", *pattern[:40]])
    words = dict.fromkeys(re.findall(r"\w{2,20}", pattern)[:10])
    runs = [(unit * TRIED)[:TRIED].encode("utf-8", "replace").decode() for unit in (*letters, *words)]
    return [text for run in runs for text in (run, f"{run}~")]
