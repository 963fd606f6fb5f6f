"""The table of preference losses by name: function, options, paper. `--help`, checks and documentation are made from it.

To add a loss, write its function in `dpo_jax/losses/` and add a line to `LOSSES`; a new option gets a line in `OPTIONS`. This
module imports neither JAX nor numpy, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.option import Option
from dpo_jax.own_loss import file_of, find, is_own

RowKind = Literal["pairs", "unpaired", "rankings"]
"""The kind of example a loss takes: two completions, a single one that is desirable or not, or K completions, best first."""


SIGNALS = ("lengths", "mean_lengths", "weight", "aligned_logps", "desirable")
"""Inputs that `dpo_step` supplies from the batch to a loss with a keyword of that name:

    lengths        float32[P, K]  scored tokens of each completion; 0 in padding examples
    mean_lengths   float32[P, K]  their mean over the pairs of the global batch; all rows are equal
    weight         float32[P]     1, and 0 for padding examples
    aligned_logps  float32[P, K]  mean over tokens of log pi(y_t) - log sum_v pi(v)^2 of the policy, without gradient (WPO)
    desirable      float32[P]     1 or 0: the label of a single completion, in `Rows.extras` (KTO)
"""


class Loss(NamedTuple):
    """A loss: its function as "module.function" of `dpo_jax.losses`, the options it reads, its title and its paper.

    `needs`: options that have no good default. `at_reference`: the loss of a policy that equals its reference, as a Python
    expression; empty where that depends on the data (K is the number of completions). `reference`: whether the loss uses the
    reference at all. `rows`: the kind of example. `whole_batch`: the loss looks at all examples of a batch at once.
    """

    function: str
    options: tuple[str, ...]
    title: str
    paper: str
    at_reference: str = ""
    needs: tuple[str, ...] = ()
    reference: bool = True
    whole_batch: bool = False
    rows: RowKind = "pairs"


class Term(NamedTuple):
    """A part of a weighted sum of losses."""

    weight: float
    name: str

    @property
    def loss(self) -> Loss:
        if self.name in LOSSES:
            return LOSSES[self.name]
        try:
            return own_loss(self.name)
        except ValueError:  # of a run whose file is gone; who would train with it calls `own_problems`
            return Loss(self.name, tuple(OPTIONS), "a function that no longer exists", "")


Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
_any = lambda value: True  # noqa: E731

OPTIONS: Mapping[str, Option] = {
    "beta": Option(
        float,
        0.1,
        lambda x: x > 0,
        "must be greater than 0",
        "KL penalty coefficient beta; the paper uses 0.1, and 0.5 for TL;DR. Losses on means per token need more: "
        "sigmoid_norm 5, simpo 2.",
    ),
    "alpha": Option(
        float | None,
        None,
        lambda x: 0 <= x <= 1,
        "must be between 0 and 1",
        "Weight of the rejected completion, 0 to 1.",
    ),
    "label_smoothing": Option(
        float,
        0.0,
        lambda x: 0 <= x < 0.5,
        "must be at least 0 and below 0.5",
        "Assumed share of swapped labels, 0 to below 0.5; required by exo_pair, whose paper uses 0.001.",
    ),
    "reference_free": Option(bool, False, _any, "", "Use a uniform reference in the loss instead of the reference model."),
    "f_divergence": Option(Divergence, "reverse_kl", _any, "", "Divergence from the reference (f-DPO)."),
    "f_alpha": Option(float, 0.5, _any, "", "Alpha of f_divergence alpha_divergence."),
    "discopop_tau": Option(float, 0.05, lambda x: x > 0, "must be greater than 0", "Temperature that mixes DiscoPOP's losses."),
    "length_penalty": Option(
        float, 0.01, lambda x: x >= 0, "must not be negative", "Reward penalty per token (alpha in the paper)."
    ),
    "gamma": Option(float, 0.5, _any, "", "Target margin."),
    "cpo_alpha": Option(float, 1.0, lambda x: x >= 0, "must not be negative", "Weight of the SFT term."),
    "wpo": Option(
        bool,
        False,
        _any,
        "",
        "Weight pairs by how likely the policy is to generate them (WPO); for every pair loss except aot and aot_unpaired.",
    ),
    "desirable_weight": Option(
        float,
        1.0,
        lambda x: x >= 0,
        "must not be negative",
        "Weight of desirable completions. Weight times count should be 1 to 4/3 times that of undesirable ones (KTO, eq. 8).",
    ),
    "undesirable_weight": Option(float, 1.0, lambda x: x >= 0, "must not be negative", "Weight of undesirable completions."),
}

_F = ("f_divergence", "f_alpha")
_UNPAIRED = ("beta", "desirable_weight", "undesirable_weight")
_LN2 = "log(2)"
_DPO = Loss(
    "margin.dpo_loss",
    ("beta", "label_smoothing", "reference_free", *_F),
    "Direct Preference Optimization",
    "2305.18290",
    _LN2,
)

LOSSES: Mapping[str, Loss] = {
    "dpo": _DPO,
    "sigmoid": _DPO._replace(title="Direct Preference Optimization (TRL's name for dpo)"),
    "sigmoid_norm": Loss("margin.length_normalized_loss", ("beta", *_F), "length-normalized DPO (Tulu 3)", "2411.15124", _LN2),
    "length_regularized": Loss(
        "margin.length_regularized_loss", ("beta", "length_penalty"), "length-regularized DPO (R-DPO)", "2403.19159"
    ),
    "ipo": Loss(
        "margin.ipo_loss", ("beta", *_F), "Identity Preference Optimization, summed", "2310.12036", "1 / (2 * beta) ** 2"
    ),
    "ipo_per_token": Loss(
        "margin.ipo_per_token_loss", ("beta", *_F), "IPO with means per token (TRL's ipo)", "2310.12036", "1 / (2 * beta) ** 2"
    ),
    "hinge": Loss("margin.hinge_loss", ("beta", *_F), "hinge loss (SLiC-HF, RSO)", "2305.10425", "1.0"),
    "robust": Loss("margin.robust_loss", ("beta", "label_smoothing", *_F), "robust DPO", "2403.00409", _LN2),
    "exo_pair": Loss(
        "margin.exo_pair_loss",
        ("beta", "label_smoothing", *_F),
        "Efficient Exact Optimization",
        "2402.00856",
        "-log(2) - log((1 - label_smoothing) * label_smoothing) / 2",
        needs=("label_smoothing",),
    ),
    "discopop": Loss("margin.discopop_loss", ("beta", "discopop_tau", *_F), "DiscoPOP", "2406.08414", "(log(2) + 1) / 2"),
    "nca_pair": Loss("pointwise.nca_pair_loss", ("beta",), "noise contrastive alignment", "2402.05369", "2 * log(2)"),
    "bco_pair": Loss("pointwise.bco_pair_loss", ("beta",), "binary classifier optimization", "2404.04656", "2 * log(2)"),
    "sppo_hard": Loss(
        "pointwise.sppo_hard_loss", ("beta",), "self-play preference optimization", "2405.00675", "2 * (0.5 / beta) ** 2"
    ),
    "apo_zero": Loss("pointwise.apo_zero_loss", ("beta",), "anchored preference optimization, zero", "2408.06266", "1.0"),
    "apo_down": Loss("pointwise.apo_down_loss", ("beta",), "anchored preference optimization, down", "2408.06266", "1.0"),
    "aot": Loss(
        "transport.aot_loss",
        ("beta", "label_smoothing"),
        "alignment via optimal transport, paired",
        "2406.05882",
        _LN2,
        whole_batch=True,
    ),
    "aot_unpaired": Loss(
        "transport.aot_unpaired_loss",
        ("beta", "label_smoothing"),
        "alignment via optimal transport, unpaired",
        "2406.05882",
        _LN2,
        whole_batch=True,
    ),
    "simpo": Loss("likelihood.simpo_loss", ("beta", "gamma", "label_smoothing"), "SimPO", "2405.14734", reference=False),
    "cpo": Loss(
        "likelihood.cpo_loss",
        ("beta", "cpo_alpha", "label_smoothing"),
        "contrastive preference optimization",
        "2401.08417",
        reference=False,
    ),
    "orpo": Loss("likelihood.orpo_loss", ("beta",), "odds ratio preference optimization", "2403.07691", reference=False),
    "sft": Loss("likelihood.sft_loss", (), "NLL per token of the chosen completion", "2404.19733", reference=False),
    "unlikelihood": Loss(
        "likelihood.unlikelihood_loss", ("alpha",), "unlikelihood training", "2305.18290", needs=("alpha",), reference=False
    ),
    "preferred_ft": Loss(
        "likelihood.preferred_ft_loss", (), "fine-tuning on chosen completions", "2305.18290", reference=False
    ),
    "kto": Loss(
        "unpaired.kto_loss",
        _UNPAIRED,
        "Kahneman-Tversky optimization",
        "2402.01306",
        "0.5",
        whole_batch=True,
        rows="unpaired",
    ),
    "apo_zero_unpaired": Loss(
        "unpaired.apo_zero_unpaired_loss",
        _UNPAIRED,
        "anchored preference optimization, zero, unpaired",
        "2408.06266",
        "0.5",
        rows="unpaired",
    ),
    "plackett_luce": Loss(
        "rankings.plackett_luce_loss",
        ("beta",),
        "DPO on rankings (Plackett-Luce)",
        "2305.18290",
        "log(factorial(K))",
        rows="rankings",
    ),
}


_WORDS: Mapping[str, str] = {"pairs": "pairs", "unpaired": "single completions", "rankings": "rankings"}


def _of(option: str) -> str:
    """A sentence naming the losses that read an option; empty if more than ten do."""
    names = [name for name, loss in LOSSES.items() if option in loss.options]
    return f" Used by {', '.join(names)}." if 0 < len(names) <= 10 else ""


HELP: Mapping[str, str] = {
    "loss": f"One of {', '.join(LOSSES)}; or a weighted sum, such as dpo + 0.1*sft; or FILE.py:FUNCTION, a loss of your own "
    "(dpo_jax/losses/README.md). ipo is the paper's, on summed log-probabilities; TRL's ipo is ipo_per_token. kto reads "
    "labeled single completions, plackett_luce reads rankings.",
    **{name: option.help + _of(name) for name, option in OPTIONS.items()},
}
"""The help texts of `--help`."""


def terms(text: str) -> list[Term]:
    """The weighted losses named by a text: "dpo", or a sum such as "dpo + 0.1*sft". ValueError: a name or weight is wrong.

    >>> terms("0.8*sigmoid + sft")
    [Term(weight=0.8, name='sigmoid'), Term(weight=1.0, name='sft')]
    """
    found = []
    for part in text.split("+"):
        weight, star, name = part.rpartition("*")
        name = name.strip()
        if name not in LOSSES and not is_own(name):
            close = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.6)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise ValueError(
                f"expected one of {', '.join(LOSSES)}, or a sum such as dpo + 0.1*sft, or FILE.py:FUNCTION of your own (path "
                f"without + and *), got the text {name!r}{hint}"
            )
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"the weight of {name} must be a number above 0, as in dpo + 0.1*sft, got {weight.strip()!r}")
        found.append(Term(value, name))
    return found


def own_loss(name: str) -> Loss:
    """The loss `FILE.py:FUNCTION`, described by its arguments. ValueError if there is none, or if it has others.

    Arguments that are named like options get their values. With `desirable` it takes single completions, and with `weight` it
    looks at the whole batch.
    """
    found = find(name)
    named = {*found.required, *found.optional}
    if other := [argument for argument in found.required if argument not in OPTIONS and argument not in SIGNALS]:
        raise ValueError(
            f"{name}: {', '.join(other)}: neither an option ({', '.join(OPTIONS)}) nor an input that the step has "
            f"({', '.join(SIGNALS)}); give it a default"
        )
    return Loss(
        name,
        tuple(option for option in OPTIONS if option in named),
        f"`{found.function}`, a user-defined loss",
        "",
        whole_batch="weight" in found.required,
        rows="unpaired" if "desirable" in found.required else "pairs",
    )


def own_problems(text: str) -> Iterator[str]:
    """What is wrong with the losses of your own in a text: no such file or function, or an argument that nobody gives."""
    for name in (term.name for term in terms(text) if is_own(term.name)):
        try:
            own_loss(name)
        except ValueError as error:
            yield str(error)


def own_files(text: str) -> list[Path]:
    """The files of the losses of your own in a text, whether they are there or not; none for an invalid text."""
    try:
        return [file_of(term.name) for term in terms(text) if is_own(term.name)]
    except ValueError:
        return []


def reads(text: str) -> set[str]:
    """The options read by the losses of a text."""
    found = {option for term in terms(text) for option in term.loss.options}
    return found if whole_batch(text) or rows_of(text) != "pairs" else found | {"wpo"}


def uses_reference(text: str) -> bool:
    """Whether any of the losses of a text uses the reference."""
    return any(term.loss.reference for term in terms(text))


def likelihood_term(text: str) -> str | None:
    """The first loss of a text that is a likelihood and not a comparison with the reference. None for an invalid text."""
    try:
        return next((term.name for term in terms(text) if not term.loss.reference), None)
    except ValueError:
        return None


def rows_of(text: str) -> RowKind:
    """The kind of example that the losses of a text take; "pairs" for an invalid text.

    >>> rows_of("kto")
    'unpaired'
    """
    try:
        return terms(text)[0].loss.rows
    except ValueError:
        return "pairs"


def example_word(text: str) -> str:
    """The word for examples of the losses of a text, in messages: "pairs", "completions" or "rankings"."""
    return {"unpaired": "completions"}.get(rows := rows_of(text), rows)


def names_of(rows: RowKind) -> str:
    """The losses that take this kind of example, for messages: "kto, apo_zero_unpaired"."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.rows == rows)


def whole_batch(text: str) -> bool:
    """Whether any of the losses of a text looks at all examples of a batch at once. False for an invalid text."""
    try:
        return any(term.loss.whole_batch for term in terms(text))
    except ValueError:
        return False


def problems(text: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems with the option values of the losses of a text, as (option, what is wrong and what to do)."""
    try:
        read = reads(text)
    except ValueError as error:
        yield "loss", str(error)
        return
    if len(kinds := {term.loss.rows: term.name for term in terms(text)}) > 1:
        kinds = ", ".join(f"{name} of {_WORDS[rows]}" for rows, name in kinds.items())
        yield "loss", f"the losses of a sum must read the same examples, but these do not: {kinds}"
    for name, option in OPTIONS.items():
        value = values[name]
        if name not in read and value != option.default:
            readers = ", ".join(loss for loss in LOSSES if name in reads(loss))
            yield name, f"loss {text} does not read it: leave it at {_shown(option.default)}, or use one that does ({readers})"
        elif value is not None and not option.inside(value):
            yield name, f"{option.expected}, got {value}"
    for term in terms(text):
        for name in term.loss.needs:
            if values[name] == OPTIONS[name].default:
                yield name, f"loss {term.name} needs it: {OPTIONS[name].help[0].lower()}{OPTIONS[name].help[1:]}"
    if values["f_alpha"] != OPTIONS["f_alpha"].default and values["f_divergence"] != "alpha_divergence":
        yield "f_alpha", "belongs to f_divergence alpha_divergence: set that, or leave it out"


def markdown() -> str:
    """The table as Markdown, for the documentation."""
    lines = [
        "| `dpo.loss` | what it is | options | paper | loss at pi = pi_ref |",
        "|---|---|---|---|---|",
    ]
    for name, loss in LOSSES.items():
        paper = f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})"
        title = loss.title + ("" if loss.reference else "; no reference")
        title += "" if loss.rows == "pairs" else f"; of {_WORDS[loss.rows]}"
        title += "; looks at the whole batch" if loss.whole_batch else ""
        at = f"`{loss.at_reference}`" if loss.at_reference else "depends on the data"
        lines.append(f"| `{name}` | {title} | {', '.join(f'`{option}`' for option in loss.options)} | {paper} | {at} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
