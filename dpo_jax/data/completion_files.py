"""Reader for files of completions, as written by `dpo-jax sample --sample.out`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.columns import number, text
from dpo_jax.data.files import read_rows
from dpo_jax.data.pairs import HH_ASSISTANT, MAX_CHARACTERS, BadRow, Cause, DataError, DataReport
from dpo_jax.untrusted import LongLine, Unreadable, lines_of, parse_object

REMEDIES = {  # for rows that `dpo-jax sample` can produce itself
    Cause.NO_PROMPT: "leave the row out: an answer to an empty prompt cannot be judged",
    Cause.TOO_LONG: "leave the row out, or lower --sample.max-new-tokens",
}
CUES = ("TL;DR:", HH_ASSISTANT)  # what prompts end with to make a policy answer; not part of the question


class Completion(NamedTuple):
    prompt: str
    text: str
    at: float | None
    where: str  # "t0.jsonl:17"


def read_completions(path: str | Path, *, by: str | None = None, report: DataReport | None = None) -> list[Completion]:
    """The rows of a JSON Lines file (also .gz) with `prompt`, `completion` and, if `by` is given, a number in that column.

    The file is recorded in `report`. Raises `DataError`, naming file, line and field, for a row that cannot be judged: results
    on part of a file would not describe the policy.
    """
    path, found = Path(path), []
    if not path.is_file():
        raise DataError(f"{path}: no such file; `dpo-jax sample --sample.out {path}` writes one", causes=[Cause.BAD_LAYOUT])
    report = report or DataReport(source=str(path), split="completions")
    columns = ["prompt", "completion", *([by] if by else [])]
    read = read_rows(path.name, path, report=report, columns=lambda names, _: [*columns, *({"images"} & {*names})])
    for where, row in read:
        try:
            if isinstance(row, BadRow):
                raise row
            if row.get("images"):
                detail = "the prompt shows images, but only texts are compared: leave the row out"
                raise DataError(f"{path.parent / where}: images: {detail}", causes=[Cause.WRONG_TYPE])
            prompt, completion = text(row, "prompt"), text(row, "completion")
            for field, value in (("prompt", prompt), ("completion", completion)):
                if len(value) > MAX_CHARACTERS:
                    raise BadRow(Cause.TOO_LONG, f"{len(value):,} characters are too long to be read", field=field)
            if not without_cue(prompt):
                raise BadRow(Cause.NO_PROMPT, "the prompt is blank", field="prompt")
            found.append(Completion(prompt, completion, number(row, by) if by else None, where))
        except BadRow as problem:
            remedy = REMEDIES.get(problem.cause, "write the file with dpo-jax sample")
            raise DataError(f"{path.parent / where}: {problem}; {remedy}", causes=[problem.cause]) from problem
    return found


def without_cue(prompt: str) -> str:
    """The prompt as shown to a reader: stripped, and without the cue that asks for a completion."""
    prompt = prompt.rstrip()
    for cue in CUES:
        prompt = prompt.removesuffix(cue)
    return prompt.strip()


def holds_others(path: Path) -> bool:
    """Whether `path` is a file with other content than completions, which must not be overwritten."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        first = next(lines_of(file))
    try:
        return isinstance(first, LongLine) or "completion" not in parse_object(first, path)
    except Unreadable:
        return True
