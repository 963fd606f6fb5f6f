"""Schemas (`dpo_jax.shapes`) of the files in a run directory that a report reads."""

from __future__ import annotations

from typing import Any

NUMBER, COUNTS = (float, None), {str: int}

ENV = {
    "packages?": {str: (str, None)},
    "devices?": [str],
    "processes?": int,
    "argv?": [str],
    "started?": str,
    "git?": ({"commit": str, "dirty": bool}, None),
}

_SOURCE = {"weight": float, "format": str, "read": int, "kept": int, "pairs_share?": float, "tokens_share?": float}
SPLIT: dict[Any, Any] = {
    "source?": str,
    "format?": str,
    "rows?": int,
    "read": int,
    "kept": int,
    "dropped?": COUNTS,
    "truncated?": COUNTS,
    "images?": int,
    "notes?": [str],
    "files?": [{"path": str, "bytes": int, "sha256": str}],
    "sources?": {str: _SOURCE},
}
DATA = {str: SPLIT}
_FINDING = {"pairs": int, "share": float, "examples?": [str]}
_FINDINGS = {str: (_FINDING, None)}
_PART = {"scored": (bool, [bool]), "tokens": [str]}
AUDITED: dict[Any, Any] = SPLIT | {
    "verdict": [{"about": str, "found": str, "remedy": str}],
    "repeats?": _FINDINGS,
    "overlap?": _FINDINGS,
    "demonstrations?": int,
    "longer_wins": ({"chosen_longer": float, "accuracy": float, "low": float, "high": float}, None),
    "labels?": COUNTS,
    "lengths": {"prompt": {str: float}, str: {str: float}},
    "cut": {str: {"tokens": int, "share": float}},
    "example?": {"uid": str, "desirable?": bool, "prompt": _PART, str: _PART},
}

_MEASURES = {str: NUMBER}
EVALUATION = {
    "pairs": int,
    "examples?": str,  # what "pairs" counts: pairs, completions, rankings
    "policy?": _MEASURES,
    "reference?": _MEASURES,
    "weights?": {str: str},
    "sampling?": {"max_new_tokens?": int},
    "of_run?": bool,
    "chosen_on_these?": bool,
}

_SHARE = {"accuracy": float, "low": float, "high": float}
_REWARD = _SHARE | {"margin": float, "length": {"spearman": NUMBER, "spearman_low": NUMBER, "spearman_high": NUMBER}}
_SUBSET = _SHARE | {"subset": str, "pairs": int}
_IMPLICIT = _REWARD | {
    "pairs": int,
    "subsets?": [_SUBSET | {"margin": float}],
    "macro?": _SHARE,
    "rewardbench?": {"sections": [_SHARE | {"section": str, "pairs": int}], "score": _SHARE, "missing": [str]},
}
REWARDS = {
    "pairs": int,
    "settings": {"data": str, "split": str, "beta": float},
    "weights?": {str: str},
    "rewards": {"implicit": _IMPLICIT, str: _REWARD},
    "calibration": {
        **dict.fromkeys(("ece", "expected_ece", "expected_ece_high", "overconfidence"), float),
        **dict.fromkeys(("ece_interval", "overconfidence_interval"), [float, float]),
    },
    "bradley_terry?": bool,
    "length": {"mean_tokens": [float, float], "accuracy": [_SUBSET]},
}

_RATES = ("win_rate", "win_rate_at_equal_length", "win_rate_length_controlled")
_POINT = {
    "series": str,
    "at": NUMBER,
    "extrapolated": bool,
    **dict.fromkeys(("pairs", "won", "lost", "flipped", "failed", "pairs_at_equal_length"), int),
    **dict.fromkeys(("policy_length", "baseline_length"), float),
    **{f"{rate}{end}": NUMBER for rate in _RATES for end in ("", "_low", "_high")},
}
JUDGED = {
    "settings": {"model": str, "prompt": str, "one_order": bool, "fence": bool},
    "baseline": str,
    "by": str,
    "outcomes": {"unanswered": int, str: int},
    "points": [_POINT],
    "injections": [{str: (str, int)}],
    "books": {str: {"dropped": {str: [str]}}},
    "models": COUNTS,
    "failures": COUNTS,
    "faults": COUNTS,
    "tokens": COUNTS,
    "first_preferred": ({"value": float, "low": float, "high": float}, None),
    "cost": float,
    **dict.fromkeys(("questions", "answers", "requests"), int),
}
REPORTS: dict[str, Any] = {"eval": EVALUATION, "rewards": REWARDS, "judge": JUDGED}
"""Schema of `report.json`, by kind of stage."""

_TURN = {"role": str, "content": str}
SAMPLE = {"prompt": str, "turns?": [_TURN], "images?": [str], **{f"{who}?": str for who in ("reference", "policy")}}
SAMPLE |= {f"{who}_finished?": bool for who in ("reference", "policy")}
SAMPLE_OF_TRAINING = {"prompt": str, "turns?": [_TURN], "images?": [str], "completion": str, "finished": bool}
BAD_BATCH = {"step": int, "uids": [str], "metrics": {str: (float, str, None)}}
RESUMED = {"step": int, "time": str}
_GAIN = {name: float for gain in ("gain", "second_gain") for name in (gain, f"{gain}_low", f"{gain}_high")}
_GAIN |= dict.fromkeys(("method", "label", "reading", "turned"), str) | {"kl": float}
SUMMARY = {
    "at_equal_kl?": [{"method": str, "kl": float, "reward": NUMBER, "share_of_gain": NUMBER}],
    "second_reward?": {"name": str, "words": str, "gains": [_GAIN]},
}
ROBUST = {
    "tables": [{"caption": str, "columns": [str], "rows": [[str]], "note": str}],
    "falls?": [{"what": str, "words": str}],
}
"""Schema of the `summary.json` of `dpo-jax dialogue`, and of an experiment of `dpo-jax robust`."""
RESULTS = ("method", "label", "seed", "kl", "reward", "reward_low", "reward_high")
"""Columns of the frontier's `results.csv`; the last four are numbers."""

_ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
_AGREEMENT = {"agree": _ESTIMATE, "kappa": _ESTIMATE}
_PEOPLE = dict.fromkeys(("raters", "kept", "ties", "items"), int) | dict.fromkeys(("win", "majority_win", "first"), _ESTIMATE)
AGREEMENT = {
    "names": {"a": str, "b": str},
    "people": _PEOPLE | {"with_people": _AGREEMENT},
    "judges": {str: {"win": _ESTIMATE, "with_people": _AGREEMENT, "with_majority": _AGREEMENT}},
}
