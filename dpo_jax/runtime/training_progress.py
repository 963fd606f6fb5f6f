"""Progress display of training: a line per step and per evaluation, readable in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dpo_jax.runtime.progress import BOARD, SILENCE_SECONDS, Board, Pace, cut, duration, rate

Row = Mapping[str, float]

UNITS = ("pairs", "texts")  # what a batch counts, in `Batch.stats`
FIRST_STEPS = 5  # a log file gets each of them
WIDE, BAR = 100, (10, 40)  # columns of a terminal with room for a bar; least and most columns of the bar


class Progress:
    """Progress line: loss, accuracy and margin of the last step, then speed and remaining time.

    A terminal has one updating line. A log file gets the first steps, then a line every `SILENCE_SECONDS`, and a note during a
    long step. `epochs` is the total number, `shapes` that of batch shapes, which are compiled; 0 if unknown.
    """

    def __init__(self, *, epochs: float = 0.0, shapes: int = 0, board: Board | None = None) -> None:
        self._board, self._epochs, self.shapes = board or BOARD, epochs, shapes
        self._row: Row = {}
        self._rates: dict[str, float] = {}

    def start(self, step: int, total: int) -> None:
        self._first, self._done, self._total = step, step, total
        self.began = self._step_began = self._board.clock()
        self._pace = Pace(self._board)
        self._board.push(self)

    def step(self, row: Row) -> None:
        """Shows the row of one training step, with its throughput."""
        self._done, self._row = int(row["step"]) + 1, row
        if not self._pace.compiled():
            for name, value in row.items():
                if name.endswith("_per_second"):  # single steps vary a lot
                    self._rates[name] = 0.8 * self._rates.get(name, value) + 0.2 * value
        self._pace.tick()
        self._step_began = self._board.clock()
        if self._board.terminal:
            self._board.draw()
        elif self._is_first() or self._done == self._total or self._next_is_late():
            self._board.say(self.line())

    def evaluated(self, row: Row) -> None:
        self._board.say(evaluation_line(row, width=self._board.columns if self._board.terminal else None))
        self._step_began = self._board.clock()

    def close(self) -> None:
        self._board.pop(self)
        if self._board.terminal and self._row:
            self._board.say(self.line(self._board.columns - 1))

    def due(self, silent: float) -> bool:
        # If all steps are long, each has its own line; only an unusually long one is reported.
        return silent >= max(SILENCE_SECONDS, 2 * (self._pace.each or 0.0))

    def line(self, width: int | None = None) -> str:
        waited, left = self._board.clock() - self._step_began, self._pace.seconds(self._total - self._done)
        rates = {name: each for name in (*UNITS, "scored_tokens") if (each := self._rates.get(f"{name}_per_second"))}
        fields = [  # (text, rank): the highest rank is omitted first if space is short
            (f"step {self._done}/{self._total}", 0),
            (f"epoch {self._epochs * self._done / max(1, self._total):.2f}" if self._epochs else "", 6),
            *_measured(self._row),
            *((f"{rate(each)} {name.replace('_', ' ')}/s", 4 if name in UNITS else 7) for name, each in rates.items()),
            (f"ETA {duration(left)}" if left is not None and self._done < self._total else "", 3),
            (f"step {self._done + 1} takes {duration(waited)}" if waited >= SILENCE_SECONDS else "", 2),
            (self._board.compilation(), 5),
        ]
        shown = _fitting([field for field in fields if field[0]], width)
        return shown if width is None else _with_bar(shown, self._done / max(1, self._total), width)

    def _next_is_late(self) -> bool:
        return self._board.silent_for() + (self._pace.each or 0.0) >= SILENCE_SECONDS

    def _is_first(self) -> bool:
        return self._done - self._first <= FIRST_STEPS


def _measured(row: Row) -> list[tuple[str, int]]:
    """The metrics of a step, with the ranks used by `Progress.line`."""
    forms = {
        "loss": ("loss {}", digits, 1),
        "nll_per_token": ("{} per token", digits, 2),
        "rewards/accuracies": ("acc {}", _hundredths, 1),
        "accuracy": ("acc {}", _hundredths, 1),
        "rewards/margins": ("margin {}", _hundredths, 1),
    }
    return [(text.format(form(row[name])), rank) for name, (text, form, rank) in forms.items() if name in row]


def evaluation_line(row: Row, *, width: int | None = None) -> str:
    """An evaluation as one line: `eval @16: loss 0.021  acc 1.00 [0.93, 1.00]  margin 3.90  chosen +10.9  rejected -28.0`.

    `row` has `step` and names that begin with `eval/`. `chosen` and `rejected` are the mean log pi - log pi_ref, in nats. Other
    metrics follow by name. If `width` columns are too few, spaces and digits are reduced.
    """
    lines = [_evaluation(row, gap=gap, places=places) for gap, places in ((2, 1), (1, 1), (1, 0))]
    return next((line for line in lines if width is None or len(line) <= width), lines[-1])


def _evaluation(row: Row, *, gap: int, places: int) -> str:
    values = {name.removeprefix("eval/"): value for name, value in row.items() if name != "step"}
    for side in ("chosen", "rejected"):  # rewards: displacement times beta, in metrics.jsonl
        values.pop(f"rewards/{side}", None)
    parts = []
    if (loss := values.pop("loss", None)) is not None:
        parts.append(f"loss {digits(loss)}")
    if (nats := values.pop("nll_per_token", None)) is not None:
        parts.append(f"{digits(nats)} per token")
        parts.append(f"perplexity {digits(math.exp(min(nats, 700.0)))}")
    if (accuracy := values.pop("rewards/accuracies", None)) is not None:
        low, high = (values.pop(f"rewards/accuracies_{end}", None) for end in ("low", "high"))
        interval = "" if low is None or high is None else f" [{low:.2f},{' ' * (gap - 1)}{high:.2f}]"
        parts.append(f"acc {accuracy:.2f}{interval}")
    if (margin := values.pop("rewards/margins", None)) is not None:
        parts.append(f"margin {_hundredths(margin)}")
    for side in ("chosen", "rejected"):
        if (moved := values.pop(f"displacement/{side}", None)) is not None:
            parts.append(f"{side} {moved:+.{places}f}")
    for name in [name for name in values if name.endswith("/rewards/accuracies")]:  # of one source of the data
        source = name.removesuffix("/rewards/accuracies")
        parts.append(f"{source} acc {values.pop(name):.2f}")
        for other in ("loss", "rewards/margins"):  # in metrics.jsonl
            values.pop(f"{source}/{other}", None)
    parts += [f"{name} {digits(value)}" for name, value in values.items()]
    return f"eval @{row['step']:.0f}: {(' ' * gap).join(parts)}"


def digits(value: float) -> str:
    """A number with about four significant digits."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 5e-4:
        return f"{value:.1e}"
    return f"{value:,.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def _hundredths(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # avoids -0


def _fitting(fields: list[tuple[str, int]], width: int | None) -> str:
    """As many fields as fit, lowest ranks first, in order."""
    kept = sorted(range(len(fields)), key=lambda number: (fields[number][1], number))
    while width is not None and len(kept) > 1 and sum(len(fields[number][0]) + 2 for number in kept) - 2 > width:
        kept.pop()
    return cut("  ".join(fields[number][0] for number in sorted(kept)), width)


def _with_bar(text: str, share: float, width: int) -> str:
    """A bar before the text, if there is room."""
    room = min(width - len(text) - 4, BAR[1])
    if width < WIDE - 1 or room < BAR[0]:
        return text
    filled = round(room * share)
    return f"[{'#' * filled}{'.' * (room - filled)}]  {text}"
