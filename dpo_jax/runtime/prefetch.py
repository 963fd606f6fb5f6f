"""Prefetching: the next batch is prepared in a background thread while the current step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Calls `batches(i)` for `i` from `start` to `stop - 1`, in order and one ahead, in a single thread. A context manager.

    It does not run ahead if `i` is a multiple of `refresh_every`: the inputs of `batches` change after the previous step.
    """

    def __init__(self, batches: Callable[[int], Any], start: int, stop: int, *, refresh_every: int = 0) -> None:
        if not callable(batches):
            raise TypeError(
                f"stream: expected a function, got {type(batches).__name__}: stream(i) gives the batch of step i; for a "
                "list: batches.__getitem__"
            )
        self._batches, self._stop, self._refresh_every = batches, stop, refresh_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next = self._pool.submit(batches, start) if start < stop else None

    def get(self, index: int) -> Any:
        """The batch of step `index`; starts preparing the next one. Re-raises exceptions of `batches`."""
        try:
            batch = (self._next or self._pool.submit(self._batches, index)).result()
        except StopIteration as error:  # a `with` of a generator would turn it into an error without a cause
            message = f"stream({index}) raised StopIteration: it must give the batch of any step, not advance an iterator"
            raise RuntimeError(message) from error
        waits = self._refresh_every > 0 and (index + 1) % self._refresh_every == 0
        self._next = self._pool.submit(self._batches, index + 1) if index + 1 < self._stop and not waits else None
        return batch

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
