"""Parsers of the public preference formats: one function for each line of `format_table.FORMATS`, of the same name.

Each takes `(where, row)` tuples and yields `(uid, Preference)`, or `(uid, BadRow)` with the reason why the candidate states no
usable preference. SHP and StackExchange follow the original implementation (eric-mitchell/direct-preference-optimization,
`preference_datasets.py`), the chat forms follow TRL.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from dpo_jax.data.candidates import (
    Candidates,
    Rows,
    chat_options,
    checked,
    completions_of,
    one_each,
    unread_options,
    with_target,
)
from dpo_jax.data.chat import chat_preference
from dpo_jax.data.columns import Row, column, number, text, truth
from dpo_jax.data.conversations import IMPLICIT, conversation, is_copy, with_system
from dpo_jax.data.demonstrations import sft_completion as sft_completion
from dpo_jax.data.demonstrations import sft_messages as sft_messages
from dpo_jax.data.demonstrations import sft_text as sft_text
from dpo_jax.data.html import strip_html
from dpo_jax.data.image_rows import take_images, with_images
from dpo_jax.data.pairs import (
    MAX_CHARACTERS,
    BadRow,
    Cause,
    Preference,
    check_completion,
    check_different,
    check_length,
)
from dpo_jax.data.prompt_rows import prompts as prompts
from dpo_jax.data.rankings import MAX_ANSWERS
from dpo_jax.data.rankings import ranked as ranked
from dpo_jax.data.transcripts import as_transcript
from dpo_jax.data.transcripts import hh as hh
from dpo_jax.data.transcripts import hh_chat as hh_chat
from dpo_jax.untrusted import TooDeep

SHP_MIN_RATIO = 2.0
MAX_MARKUP = 4 * MAX_CHARACTERS
_UNUSED = "the text in the column prompt is not in the messages and is not used"


def trl(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """TRL's four forms: standard (texts) or conversational (messages), with a `prompt` column or with the prompt implicit.

    As in TRL, a text in `prompt` beside conversations in `chosen` and `rejected` is a copy of their content and is not used.
    Unlike in TRL, a prompt of messages may have answers that are texts, and vice versa (`conversations.conversation`). Images
    of the prompt are read by `image_rows`.
    """

    def preference(uid: str, row: Row) -> Preference:
        row, images = take_images(row, tokenizer)
        prompt, *sides = conversation(row)
        more = chat_options(row)
        if any(isinstance(side, list) for side in sides):
            if unended_sides(row):
                raise BadRow(Cause.WRONG_TYPE, "a turn of a conversation always ends; only texts may be cut", field="unended")
            turns = prompt if isinstance(prompt, list) else None
            found = chat_preference(turns, *sides, uid=uid, tokenizer=tokenizer, **more)
            if isinstance(prompt, str) and not is_copy(prompt, sides):
                found = dataclasses.replace(found, notes=(*found.notes, _UNUSED))
            return with_images(found, images, tokenizer) if images else found
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        for field in ("chosen", "rejected"):
            check_length(row[field], field=field)
        unread = unread_options(row)
        if "prompt" in row:
            if not text(row, "prompt").strip():
                raise BadRow(Cause.NO_PROMPT, "the prompt is blank", field="prompt", remedy=IMPLICIT)
            found = Preference(text(row, "prompt"), chosen, rejected, uid, notes=unread, unended=unended_sides(row))
            return checked(found)
        cut = common_prompt(chosen, rejected)
        return checked(Preference(chosen[:cut], chosen[cut:], rejected[cut:], uid, notes=unread, unended=unended_sides(row)))

    return one_each(rows, preference)


def unended_sides(row: Row) -> tuple[str, ...]:
    """The sides of a row that a token limit cut off, as `label` writes them."""
    sides = row.get("unended")
    if sides is None:
        return ()
    if not isinstance(sides, list | tuple) or not all(side in ("chosen", "rejected") for side in sides):
        raise BadRow(Cause.WRONG_TYPE, 'a list of "chosen" and "rejected" is needed', field="unended")
    return tuple(sides)


def common_prompt(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share, cut back to the start of a word; the space before it goes to the completions.

    Like TRL's `extract_prompt`, which however cuts "the blue" and "the black" inside the word, at "bl", and fails if one text
    is a prefix of the other.
    """
    if chosen == rejected:
        raise BadRow(Cause.IDENTICAL, "chosen and rejected are the same text")
    cut = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    word_ends_on_both = chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()
    while not word_ends_on_both and cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if chosen[cut - 1 : cut] == " " else cut


def rewardbench(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """RewardBench (Lambert et al. 2024, arXiv 2403.13787): one question and two answers, as plain texts.

    They are chat turns, rendered with the tokenizer's chat template. Without a template the form of Anthropic HH is used, as
    for the other questions here; the report says which (`_answered`).
    """

    def preference(uid: str, row: Row) -> Preference:
        answers = [text(row, side) for side in ("chosen", "rejected")]
        return _answered(row, *answers, uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference)


def chat_texts(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """A prompt and two answers as texts that are turns of a chat, rendered with the tokenizer's chat template."""

    def preference(uid: str, row: Row) -> Preference:
        turns = with_system(row, [{"role": "user", "content": text(row, "prompt")}])
        sides = ([{"role": "assistant", "content": text(row, side)}] for side in ("chosen", "rejected"))
        return chat_preference(turns, *sides, uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference)


def pku(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """PKU-SafeRLHF: a question and two answers; `better_response_id` is the more helpful one. Rendered like RewardBench."""

    def preference(uid: str, row: Row) -> Preference:
        answers = [text(row, side) for side in ("response_0", "response_1")]
        better = number(row, "better_response_id")
        if better not in (0, 1):
            raise BadRow(Cause.OUT_OF_RANGE, f"expected 0 or 1, got {better:g}", field="better_response_id")
        return _answered(row, *(answers if better == 0 else answers[::-1]), uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference)


def _answered(row: Row, chosen: str, rejected: str, *, uid: str, tokenizer: Any) -> Preference:
    """A question and two answers as chat turns; in the form of Anthropic HH if the tokenizer has no chat template.

    That form has no place for a system text: such a row needs a template.
    """
    question = text(row, "prompt")
    turns = with_system(row, [{"role": "user", "content": question}])
    if getattr(tokenizer, "chat_template", None) is None and len(turns) == 1:
        return checked(Preference(as_transcript(question), " " + chosen, " " + rejected, uid))
    sides = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return chat_preference(turns, *sides, uid=uid, tokenizer=tokenizer)


def openai(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """OpenAI's preference fine-tuning format: messages in `input`, then `preferred_output` and `non_preferred_output`."""
    names = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}

    def preference(uid: str, row: Row) -> Preference:
        asked, sides = column(row, "input"), [column(row, names[side]) for side in ("chosen", "rejected")]
        if not isinstance(asked, Mapping):
            raise BadRow(Cause.WRONG_TYPE, f"expected an object, got {type(asked).__name__}", field="input")
        options = {"tools": asked["tools"]} if asked.get("tools") else {}
        messages = with_system(row, column(asked, "messages", inside="input."))
        with _fields_named(names):
            return chat_preference(messages, *sides, uid=uid, tokenizer=tokenizer, **options)

    return one_each(rows, preference)


def arena(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Chatbot Arena of LMSYS: two conversations that begin with the same question, and the winner. Ties form no pair."""

    def preference(uid: str, row: Row) -> Preference:
        sides, winner = {name: column(row, f"conversation_{name}") for name in ("a", "b")}, text(row, "winner")
        if winner in ("tie", "tie (bothbad)", "both_bad"):
            raise BadRow(Cause.TIE, f"no conversation is better: {winner}", field="winner")
        if winner not in ("model_a", "model_b"):
            detail = f"expected model_a, model_b, tie, tie (bothbad) or both_bad, got {winner[:40]!r}"
            raise BadRow(Cause.OUT_OF_RANGE, detail, field="winner")
        better, worse = ("a", "b") if winner == "model_a" else ("b", "a")
        with _fields_named({"chosen": f"conversation_{better}", "rejected": f"conversation_{worse}"}):
            return chat_preference(None, sides[better], sides[worse], uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference)


@contextlib.contextmanager
def _fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """A context in which a `BadRow` about prompt, chosen or rejected names the columns that hold them."""
    try:
        yield
    except BadRow as problem:
        head, dot, rest = problem.field.partition(".")
        raise BadRow(problem.cause, problem.detail, field=names.get(head, head) + dot + rest) from None


def helpsteer3(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """HelpSteer3 preferences of NVIDIA: a conversation and two answers, with a preference from -3 to 3."""

    def preference(uid: str, row: Row) -> Preference:
        context, preferred = with_system(row, column(row, "context")), number(row, "overall_preference")
        answers = [[{"role": "assistant", "content": text(row, side)}] for side in ("response1", "response2")]
        if not -3 <= preferred <= 3:
            raise BadRow(Cause.OUT_OF_RANGE, f"expected -3 to 3, got {preferred:g}", field="overall_preference")
        if preferred == 0:
            raise BadRow(Cause.TIE, "neither response is preferred", field="overall_preference")
        chosen, rejected = answers if preferred < 0 else answers[::-1]
        with _fields_named({"prompt": "context"}):
            return chat_preference(context, chosen, rejected, uid=uid, tokenizer=tokenizer)

    return one_each(rows, preference, subset="domain")


def tldr(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """TL;DR comparisons of openai/summarize_from_feedback: `info` (the Reddit post), two `summaries`, `choice` of one."""

    def preference(uid: str, row: Row) -> Preference:
        info, summaries, choice = column(row, "info"), column(row, "summaries"), number(row, "choice")
        if not isinstance(info, Mapping):
            raise BadRow(Cause.WRONG_TYPE, f"expected an object, got {type(info).__name__}", field="info")
        if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, Mapping) for s in summaries)):
            raise BadRow(Cause.WRONG_TYPE, "a list of two objects is needed", field="summaries")
        if choice not in (0, 1):
            raise BadRow(Cause.OUT_OF_RANGE, f"expected 0 or 1, got {choice}", field="choice")
        post = {field: text(info, field, inside="info.") for field in ("subreddit", "title", "post")}
        prompt = f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}\nTL;DR:"
        texts = [_spaced(text(summary, "text", inside=f"summaries.{i}.")) for i, summary in enumerate(summaries)]
        return checked(Preference(prompt, texts[int(choice)], texts[1 - int(choice)], uid))

    return one_each(rows, preference)


def shp(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Stanford Human Preferences as in the original implementation: pairs whose scores are at least a factor of two apart.

    `sft_target` is the best-scored response among all such pairs of the same prompt; of equal ones the first.
    """
    best: dict[str, tuple[float, str]] = {}

    def preference(uid: str, row: Row) -> Preference:
        prompt = as_transcript(text(row, "history"))
        responses = [" " + text(row, "human_ref_A"), " " + text(row, "human_ref_B")]
        scores = [number(row, "score_A"), number(row, "score_B")]
        label = number(row, "labels")
        if label not in (0, 1):
            raise BadRow(Cause.OUT_OF_RANGE, f"expected 0 or 1, got {label}", field="labels")
        if min(scores) <= 0:
            raise BadRow(Cause.OUT_OF_RANGE, f"expected positive scores, got {scores}", field="score_A, score_B")
        if max(scores) / min(scores) < SHP_MIN_RATIO:
            raise BadRow(Cause.SCORE_RATIO, f"the scores {scores} are less than a factor of {SHP_MIN_RATIO:g} apart")
        chosen, rejected = responses if label == 1 else responses[::-1]
        pair = checked(Preference(prompt, chosen, rejected, uid))
        for score, response in zip(scores, responses, strict=True):
            if prompt not in best or score > best[prompt][0]:
                best[prompt] = score, response
        return pair

    for uid, candidate in list(one_each(rows, preference)):
        if isinstance(candidate, Preference):
            candidate = with_target(candidate, best[candidate.prompt][1])
        yield uid, candidate


def stack_exchange(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """StackExchange preferences as in the original implementation: every two answers of a question form a pair, by `pm_score`.

    `sft_target` is the best-scored usable answer. HTML is stripped as in the original (`strip_html`). The original takes the
    later of two answers of equal score as chosen; here they form no pair and are counted as `tie`.
    """
    for where, row in rows:
        try:
            question = _without_html(row, "question")
            if not question.strip():
                raise BadRow(Cause.NO_PROMPT, "the question is blank once its HTML is removed", field="question")
            prompt = as_transcript(question)
            check_length(prompt, field="question")
            answers = _answers(row)
        except BadRow as problem:
            yield where, problem
            continue
        # Expensive work is done once per text: the texts may form half a million pairs.
        best = max(answers, key=lambda answer: (answer.problem is None, answer.score)).text
        for (i, first), (j, second) in combinations(enumerate(answers), 2):
            uid = f"{where}#{i}-{j}"
            chosen, rejected = (first, second) if first.score > second.score else (second, first)
            try:
                if first.score == second.score:
                    raise BadRow(Cause.TIE, f"both answers have score {first.score}")
                if problem := chosen.problem or rejected.problem:
                    raise problem
                check_different(chosen.text, rejected.text)
                yield uid, with_target(Preference(prompt, chosen.text, rejected.text, uid), best)
            except BadRow as problem:
                yield uid, problem


def unpaired(rows: Rows, *, tokenizer: Any = None) -> Candidates:
    """Single completions with a label, as used by KTO: `prompt`, `completion`, and whether it is desirable."""

    def preference(uid: str, row: Row) -> Preference:
        desirable = truth(row, "label")
        prompt, (completion,), (spans,), more = completions_of(row, [("completion", column(row, "completion"))], uid, tokenizer)
        both = {"chosen_spans": spans, "rejected_spans": spans}
        return Preference(prompt, completion, completion, uid, desirable=desirable, **both, **more)

    return one_each(rows, preference)


def _without_html(row: Row, field: str, *, inside: str = "") -> str:
    markup = text(row, field, inside=inside)
    check_length(markup, field=inside + field, most=MAX_MARKUP)
    try:
        return strip_html(markup)
    except TooDeep as error:
        raise BadRow(Cause.TOO_DEEP, str(error), field=inside + field) from None


class _Answer(NamedTuple):
    score: float
    text: str
    problem: BadRow | None  # why it cannot be a side of a pair


def _answers(row: Row) -> list[_Answer]:
    answers = column(row, "answers")
    if not (isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers)):
        raise BadRow(Cause.WRONG_TYPE, "a list of objects is needed", field="answers")
    if len(answers) < 2:
        raise BadRow(Cause.NO_PAIR, f"{len(answers)} answers form no pair", field="answers")
    if len(answers) > MAX_ANSWERS:
        raise BadRow(Cause.OUT_OF_RANGE, f"{len(answers):,} answers, but the limit is {MAX_ANSWERS:,}", field="answers")
    return [_answer(answer, f"answers.{i}.") for i, answer in enumerate(answers)]


def _answer(answer: Row, place: str) -> _Answer:
    score, completion = number(answer, "pm_score", inside=place), " " + _without_html(answer, "text", inside=place)
    try:
        check_completion(completion, field=f"{place}text")
    except BadRow as problem:
        return _Answer(score, completion, problem)
    return _Answer(score, completion, None)


def _spaced(summary: str) -> str:
    # The published summaries start with a space, so that their first word gets the same token as inside a text.
    return summary if summary[:1].isspace() else " " + summary
