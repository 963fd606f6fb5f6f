"""The check that a policy starts from its reference: DPO's loss is ln 2, and no log-probability has moved."""

from __future__ import annotations

from collections.abc import Mapping


class WrongStart(RuntimeError):
    """The policy does not equal its reference where it should, such as at step 0."""


# Tolerance in nats between a policy and its own cached log-probabilities: rows of another shape are summed in another order.
# In bfloat16 a completion's log-probability moves by some tenths of a nat.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def starts_at_reference(
    step: int,
    metrics: Mapping[str, float],
    *,
    expected_loss: float | None,
    tolerance: float = TOLERANCE["float32"],
    first: bool = True,
    every: int = 0,
) -> None:
    """Raises `WrongStart` unless the policy equals its reference: at step 0 if `first` is set, and after every `every` steps.

    A policy that equals its reference has displacement 0 and the loss `expected_loss` (DPO: ln 2). `expected_loss` is None
    where the loss uses no reference. `tolerance`: in nats, one of `TOLERANCE` by the format of numbers. Bound to its options it
    is the `check` of `dpo_jax.train`, which gets `step` and the metrics of each step.

    >>> check = partial(starts_at_reference, expected_loss=math.log(2))
    >>> check(0, {"loss": 0.6931, "displacement/chosen": 0.0, "displacement/rejected": 1e-5})
    >>> check(0, {"loss": 0.7, "displacement/chosen": 0.4, "displacement/rejected": 0.1})
    Traceback (most recent call last):
    ...
    dpo_jax.training.start_check.WrongStart: ...
    """
    if not (first if step == 0 else every and step % every == 0):
        return
    displaced = max(abs(metrics["displacement/chosen"]), abs(metrics["displacement/rejected"]))
    loss = metrics["loss"] - metrics.get("router/aux_loss", 0.0)  # load balancing does not depend on the reference
    off = 0.0 if expected_loss is None else abs(loss - expected_loss) / max(1.0, expected_loss)
    if displaced > tolerance or off > tolerance:
        remedy = "Delete the reference cache and run `dpo-jax refs` again." if step == 0 else "Delete the folder `references`."
        raise WrongStart(
            f"step {step} has loss {loss:.6f}"
            + (f" where a policy equal to its reference has {expected_loss:.6f}" if expected_loss is not None else "")
            + f", and is {displaced:.4f} nats from its reference: the cached log-probabilities belong to other weights or "
            f"other code. {remedy}"
        )
