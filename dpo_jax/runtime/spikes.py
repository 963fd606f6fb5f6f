"""Detection of spikes in loss or gradient norm, relative to the median of previous steps."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterator, Mapping

WINDOW, LEAST = 64, 16  # steps of the median; least number of steps before a spike can be reported
TIMES_MEDIAN, TIMES_LARGEST = 4.0, 1.5


class Spikes:
    """Reports each spike of the metrics `names` once, at the step where it begins.

    A value is a spike if it exceeds `TIMES_MEDIAN` times the median of the last `WINDOW` steps and `TIMES_LARGEST` times the
    largest recent normal value. The spike ends with the next normal value. A metric whose median is not positive has no spikes.
    """

    def __init__(self, *names: str):
        self._seen = {name: collections.deque[float](maxlen=WINDOW) for name in names}
        self._usual = {name: collections.deque[float](maxlen=WINDOW) for name in names}
        self._inside = dict.fromkeys(names, False)

    def of(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """Messages about the metrics of the next step."""
        for name in [name for name in self._seen if name in metrics]:
            value, seen, usual = metrics[name], self._seen[name], self._usual[name]
            median = statistics.median(seen) if len(seen) >= LEAST else 0.0
            high = median > 0 and value > max(TIMES_MEDIAN * median, TIMES_LARGEST * max(usual, default=0.0))
            if high and not self._inside[name]:
                before = f"the median of the {len(seen)} steps before ({median:.4g})"
                yield f"{name} {value:.4g} is {value / median:.1f} times {before}"
            self._inside[name] = high
            seen.append(value)  # also during a spike: a lasting level becomes normal
            if not high:
                usual.append(value)
