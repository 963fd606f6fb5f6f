"""Early stopping, and keeping the weights of the best evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.fit import Verdict
from dpo_jax.training.fingerprint import check_settings


class EarlyStopping:
    """Ends a run after `patience` evaluations in a row without improvement of `metric` (None: at its full length), with the
    weights of the best evaluation. One object per run.

    Lower is better, unless `higher`. An equal value is not better. `record` is saved with each checkpoint, so that a killed and
    resumed run stops at the same step.

    >>> stopping = EarlyStopping("loss", patience=2)
    >>> [stopping.observe(step, {"loss": loss}).stop for step, loss in ((4, 0.6), (8, 0.5), (12, 0.7), (16, 0.5))]
    [False, False, False, True]
    >>> stopping.best
    8
    """

    def __init__(self, metric: str = "loss", *, patience: int | None, higher: bool = False):
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, or None to run to the end, got {patience}")
        self.metric, self.patience, self.higher = metric, patience, higher
        self.record: dict[str, Any] = {"metric": metric, "higher": higher}

    @property
    def best(self) -> int | None:
        """The step count of the best evaluation; None before the first."""
        return self.record.get("best")

    @property
    def last(self) -> int:
        """The step count of the last evaluation; 0 before the first."""
        return self.record.get("last", 0)

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.record.get("worse", 0) >= self.patience

    def observe(self, done: int, metrics: Mapping[str, Any]) -> Verdict:
        """Takes the evaluation after `done` steps. Raises ValueError if it lacks the metric."""
        if self.metric not in metrics:
            raise ValueError(f"the evaluation has no {self.metric!r} to stop on; it has {', '.join(metrics)}")
        value = float(metrics[self.metric])
        before = self.record.get("value")
        better = before is None or (value > before if self.higher else value < before)
        found = {"best": done, "value": value, "worse": 0} if better else {"worse": self.record["worse"] + 1}
        self.record |= {**found, "last": done}
        return Verdict(save=better, stop=self.stopped)

    def watching(self, store: Checkpoints) -> Callable[[int, Mapping[str, Any]], Verdict]:
        """`observe`, which also pins the best step in `store`. The weights before the first step are no candidate."""

        def watch(done: int, metrics: Mapping[str, Any]) -> Verdict:
            verdict = self.observe(done, metrics) if done else Verdict()
            if verdict.save:
                store.pin(done)
            return verdict

        return watch

    def resume(self, record: Mapping[str, Any], *, place: str) -> None:
        """Continues from a `record` saved by the run in `place`. Raises `RunMismatch` if it is of another metric."""
        mine = {"metric": self.metric, "higher": self.higher}
        was, now = ({f"early stopping, {name}": value for name, value in part.items()} for part in (record, mine))
        check_settings(place, was, now)
        self.record.clear()
        self.record |= {**mine, **record}

    def catch_up(self, rows: Iterable[Mapping[str, Any]], *, until: int) -> None:
        """Observes the evaluation after `until` steps, if `rows` of `metrics.jsonl` have one and it has not been observed yet.

        A signal may end a run between the checkpoint of `until` steps and its evaluation. The evaluation of the next process is
        then in the log, but not in the record of that checkpoint.
        """
        name = f"eval/{self.metric}"
        for row in rows:
            if name in row and self.last < row["step"] == until:
                self.observe(row["step"], {self.metric: row[name]})

    def words(self, done: int) -> str:
        """Message on how the run ended, after `done` steps."""
        why = f"stopped after {done} steps: {self.patience} evaluations without a better" if self.stopped else "the best"
        return f"{why} {self.metric}; the weights are those of step {self.best}, where it was {self.record['value']:.4f}"
