"""`python -m dpo_jax.bench.expert_step`: a mixture's rate beside that of a dense model."""

import itertools
import re
import types

import pytest

from dpo_jax.bench import expert_step
from dpo_jax.models.flops import layer_weights


def test_the_dense_model_computes_what_a_tokens_experts_do():
    for experts, taken in expert_step.MIXTURES.values():
        mixture, dense = expert_step._config(experts, taken), expert_step._config(0, taken)
        assert (mixture.experts, mixture.experts_per_token, dense.experts) == (experts, taken, 0)
        router = mixture.width * experts
        assert layer_weights(mixture) == layer_weights(dense) + router


def test_a_line_for_each_mixture(monkeypatch, capsys):
    for name, value in {"WIDTH": 16, "LAYERS": 1, "EXPERT": 16, "VOCABULARY": 64, "PAIRS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(expert_step, name, value)
    monkeypatch.setattr(expert_step, "MIXTURES", {"4 experts, 2 taken": (4, 2)})
    assert expert_step.main() == 0
    _, line = capsys.readouterr().out.splitlines()
    rates = re.fullmatch(r"4 experts, 2 taken: ([\d.]+) of a dense model's FLOP/s by the clock, ([\d.]+) by .*", line)
    assert rates is not None
    assert all(float(rate) > 0 for rate in rates.groups())


def test_slower_steps_do_not_count(monkeypatch):
    taken = iter([0.0, 3.0, 3.0, 5.0, 5.0, 6.0])  # begin and end of three steps by the clock
    monkeypatch.setattr(expert_step, "ROUNDS", 3)
    monkeypatch.setattr(expert_step, "_stepper", lambda config: lambda: None)
    monkeypatch.setattr(expert_step, "_flops", lambda config: 10.0)
    ticks = itertools.count(step=2.0)
    clocks = {"perf_counter": lambda: next(taken), "process_time": lambda: next(ticks)}
    monkeypatch.setattr(expert_step, "time", types.SimpleNamespace(**clocks))
    [rate] = expert_step.rates(expert_step._config(4, 2))
    assert rate == pytest.approx((10.0, 5.0))
