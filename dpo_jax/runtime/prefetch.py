"""The next batch is prepared in a background thread while the current step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Calls `batches(i)` for `i` from `start` to `stop - 1`, in order and one ahead, in a single thread. A context manager."""

    def __init__(self, batches: Callable[[int], Any], start: int, stop: int) -> None:
        self._batches, self._stop = batches, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next = self._pool.submit(batches, start) if start < stop else None

    def get(self, index: int) -> Any:
        """The batch of step `index`, after which the next one is begun. Raises what `batches` has raised."""
        assert self._next is not None
        batch = self._next.result()
        self._next = self._pool.submit(self._batches, index + 1) if index + 1 < self._stop else None
        return batch

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
