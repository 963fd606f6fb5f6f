"""Writes losses.json: what TRL's own trainers compute from given log-probabilities (needs torch and trl 1.16).

`make_losses.py [CASES [FILE]]`. A case is a batch of four pairs. Log-probabilities are multiples of 1/1024, so that their sums
are exact in float32 and float64. A setting is a loss of ours by name, and TRL's options for it.
"""

import contextlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PAIRS, TOKENS = 4, 12
STORED = Path(__file__).with_name("losses.json")
DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
# (loss of ours, its options, DPOTrainer's options where they are called otherwise)
SETTINGS = [
    ("sigmoid", {}, {}),
    ("sigmoid", {"beta": 0.5}, {}),
    ("sigmoid_norm", {"beta": 5.0}, {}),
    ("ipo_per_token", {"beta": 0.3}, {}),
    ("hinge", {}, {}),
    ("robust", {"label_smoothing": 0.1}, {}),
    ("exo_pair", {"label_smoothing": 0.001}, {}),
    ("discopop", {}, {}),
    ("nca_pair", {}, {}),
    ("bco_pair", {}, {}),
    ("sppo_hard", {}, {}),
    ("apo_zero", {}, {}),
    ("apo_down", {}, {}),
    ("aot", {}, {}),
    ("aot", {"label_smoothing": 0.2}, {}),
    ("aot_unpaired", {"label_smoothing": 0.2}, {}),
    ("sft", {}, {}),
    (
        "0.8*sigmoid + 0.2*bco_pair + sft",
        {},
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    ("sigmoid", {"wpo": True}, {"use_weighting": True}),
    ("sigmoid", {"ld_alpha": 0.3}, {}),
    *(
        (name, {"f_divergence": kind, **options}, {"f_divergence_type": kind})
        for name, options in (
            ("sigmoid", {}),
            ("sigmoid_norm", {"beta": 2.0}),
            ("hinge", {}),
            ("ipo_per_token", {}),
            ("robust", {"label_smoothing": 0.1}),
            ("exo_pair", {"label_smoothing": 0.01}),
            ("discopop", {}),
        )
        for kind in ("forward_kl", "js_divergence")
    ),
    ("sigmoid", {"f_divergence": "alpha_divergence"}, {"f_divergence_type": "alpha_divergence"}),
    (
        "sigmoid_norm",
        {"f_divergence": "alpha_divergence", "f_alpha": 1.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    ),
    ("simpo", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1}, {"trainer": "cpo", "alpha": 0.0, "simpo_gamma": 1.0}),
    ("cpo", {"cpo_alpha": 0.7}, {"trainer": "cpo", "alpha": 0.0, "loss_type": "sigmoid", "cpo_alpha": 0.7}),
    ("orpo", {"beta": 0.25}, {"trainer": "orpo"}),
    ("kto", {}, {"trainer": "kto"}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.5}, {"trainer": "kto"}),
    ("apo_zero_unpaired", {"beta": 0.3, "undesirable_weight": 0.5}, {"trainer": "kto"}),
]


def draw(rng):
    """Log-probabilities of tokens float64[2 * PAIRS, TOKENS], chosen completions first as in TRL, and what goes with them."""
    lengths = rng.integers(1, TOKENS + 1, size=2 * PAIRS)
    mask = np.arange(TOKENS) < lengths[:, None]
    tokens = -np.round(rng.exponential(2.0, size=mask.shape) * 1024 + 1) / 1024 * mask
    ref = np.round((tokens.sum(axis=1) + rng.normal(0, 2, size=2 * PAIRS)) * 1024) / 1024
    own = -np.round(rng.exponential(1.0, size=mask.shape) * 1024) / 1024 * mask
    return {"lengths": lengths, "tokens": tokens, "ref": ref, "own": own}


def by_pair(x):
    return np.asarray(x).reshape(2, PAIRS).T.tolist()


class Model(torch.nn.Module):
    """Returns given log-probabilities, whatever it is asked."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, **_):
        return SimpleNamespace(**self.outputs)


def dpo_trainer(case, options, theirs, tokens, kind):
    mask = torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.long)
    mask[:, 1:] = torch.arange(TOKENS) < torch.tensor(case["lengths"])[:, None]
    ref = torch.tensor(case["ref"], dtype=kind)
    zeros = torch.zeros_like(tokens)
    settings = DEFAULTS | {name: value for name, value in options.items() if name in DEFAULTS} | theirs
    names = settings.pop("loss_types", None) or [options["name"].replace("ipo_per_token", "ipo")]
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=contextlib.nullcontext
    )
    trainer = SimpleNamespace(
        loss_types=names,
        loss_weights=settings.pop("loss_weights", [1.0] * len(names)),
        use_weighting=settings.pop("use_weighting", False),
        ld_alpha=options.get("ld_alpha"),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    own = torch.tensor(case["own"], dtype=kind)
    model = Model(
        log_probs=tokens, log_sum_sq_probs=own, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(tokens, dtype=bool)
    )
    trainer.model = model
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": ref[:PAIRS],
        "ref_rejected_logps": ref[PAIRS:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def other_trainer(case, options, theirs, tokens):
    """The loss functions of CPOTrainer and ORPOTrainer, with the likelihood term that their trainers add per token."""
    lengths = torch.tensor(case["lengths"])
    sums = tokens.sum(dim=1)
    likelihood = -sums[:PAIRS].sum() / lengths[:PAIRS].sum()
    settings = {**DEFAULTS, "accelerator": SimpleNamespace(device="cpu"), **options, "loss_type": options["name"], **theirs}
    trainer = SimpleNamespace(**settings)
    if theirs["trainer"] == "orpo":
        means = sums / lengths
        return likelihood - ORPOTrainer.odds_ratio_loss(trainer, means[:PAIRS], means[PAIRS:])[0].mean()
    values = sums / lengths if trainer.loss_type == "simpo" else sums
    losses = CPOTrainer.cpo_loss(trainer, values[:PAIRS], values[PAIRS:])[0]
    return losses.mean() + options.get("cpo_alpha", 0.0) * likelihood


def labels(case):
    """Which of the first PAIRS completions are desirable; the others are their mismatched ones."""
    return case["lengths"][:PAIRS] % 2 == 1


def kto_trainer(case, options, tokens):
    """KTOTrainer's loss. Its model is asked for the completions and, apart from them, for the mismatched ones."""

    def model(*, input_ids, **_):
        mine = tokens[:PAIRS] if input_ids[0, 0] == 0 else tokens[PAIRS:]
        zeros = torch.zeros_like(mine)
        return SimpleNamespace(log_probs=mine, entropy=zeros, mean_logits=zeros)

    model.training = True
    mask = torch.ones(PAIRS, TOKENS + 1, dtype=torch.long)
    ref, mismatched = torch.tensor(case["ref"]).split(PAIRS)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        loss_type=options["name"],
        calculate_KL=options["name"] == "kto",
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **{"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | {k: v for k, v in options.items() if k != "name"},
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    inputs = {
        **{"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask},
        **{"KL_input_ids": torch.ones_like(mask), "KL_attention_mask": mask, "KL_completion_mask": mask},
        **{"label": torch.tensor(labels(case)), "ref_logps": ref, "ref_KL_logps": mismatched},
    }
    return KTOTrainer._compute_loss(trainer, model, inputs, False)


def run(case, name, options, theirs):
    # TRL has no float64 for two of these.
    narrow = options.get("f_divergence") == "alpha_divergence" or theirs.get("trainer") == "orpo"
    kind = torch.float32 if narrow else torch.float64
    torch.set_default_dtype(kind)
    tokens = torch.tensor(case["tokens"], dtype=kind, requires_grad=True)
    options = {"name": name, **options}
    if theirs.get("trainer") == "kto":
        loss = kto_trainer(case, options, tokens)
    elif "trainer" in theirs:
        loss = other_trainer(case, options, theirs, tokens)
    else:
        loss = dpo_trainer(case, options, theirs, tokens, kind)
    loss.backward()
    return loss.item(), by_pair(tokens.grad[:, 0].double().numpy())


def main(count=5, out=STORED):
    rng = np.random.default_rng(0)
    cases = [draw(rng) for _ in range(count)]
    settings = []
    for name, options, theirs in SETTINGS:
        losses, gradients = zip(*(run(case, name, options, theirs) for case in cases), strict=True)
        settings.append({"loss": name, "options": options, "losses": losses, "gradients": gradients})
    aligned = [(case["tokens"] - case["own"]).sum(axis=1) / case["lengths"] for case in cases]
    shown = [
        {
            "lengths": by_pair(case["lengths"]),
            "tokens": case["tokens"].tolist(),
            "ref_logps": by_pair(case["ref"]),
            "aligned_logps": by_pair(values),
            "desirable": labels(case).astype(float).tolist(),
        }
        for case, values in zip(cases, aligned, strict=True)
    ]
    Path(out).write_text(json.dumps({"trl": trl.__version__, "cases": shown, "settings": settings}) + "\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, Path), sys.argv[1:], strict=False)))
