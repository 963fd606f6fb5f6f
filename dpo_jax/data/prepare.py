"""Encode preferences as token ids for a run; every dropped pair is counted by cause."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpo_jax.data.encode import Bos, Encoded, EosInText, Truncation, encode, ended_ids, image_bytes, scored_bytes
from dpo_jax.data.image_prompts import ImageTokens, encode_images
from dpo_jax.data.layout import Completion, Text, images_of
from dpo_jax.data.mixture import copy_number
from dpo_jax.data.pairs import BadRow, Cause, DataReport, OnBad, Preference, PreferenceSet, Spans, Triage
from dpo_jax.data.segments import group_size
from dpo_jax.data.unpaired import mismatched, one_prompt
from dpo_jax.untrusted import reading


class EncodedSet(Sequence[Encoded]):
    """Encoded pairs in the order of their files, with the complete `report`."""

    def __init__(self, encoded: Sequence[Encoded], report: DataReport) -> None:
        self._encoded, self.report = list(encoded), report

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index):
        return self._encoded[index]


def encode_all(
    preferences: PreferenceSet,
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation | Literal["drop"] = "keep_end",
    bos: Bos = "auto",
    on_bad: OnBad = "refuse",
    row_length: int | None = None,
    images: ImageTokens | None = None,
) -> EncodedSet:
    """Encode all pairs as `encode` does, or with `images` as `encode_images` does.

    Raises `DataError` for unusable ones, or drops and counts them with `on_bad="drop"`.

    A pair with an unusable `sft_target` is unusable too, so that every task of a run has the same data. Each single completion
    gets a mismatched one (`data.unpaired`), except a demonstration, which has no use for it. `row_length` is the longest row
    that a pair may need in the shared layout, in tokens. Truncations are counted in the report. A pair that truncation makes
    identical states no preference: it is always dropped and counted. So is, with `truncation` "drop", a row longer than
    `max_length`.
    """
    report = preferences.report.copy()
    triage, whole = Triage(report, on_bad=on_bad), truncation == "drop"
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "bos": bos}
    limits["truncation"] = "completions" if whole else truncation
    tokenizer = _CachingTokenizer(tokenizer)
    sound: list[Encoded] = []
    alone: set[str] = set()  # uids of demonstrations
    for preference in preferences:
        try:
            pair = _encode_text(preference, tokenizer, images, **limits)
            if whole:
                _check_whole(pair, preference, tokenizer, max_length)
            _check(pair, tokenizer, preference, max_length)
            _check_target(preference, tokenizer)
        except BadRow as problem:
            triage.reject(preference.uid, problem)
            continue
        sound.append(pair)
        if preference.demonstration:
            alone.add(pair.uid)
    labeled = [pair for pair in sound if pair.desirable is not None and pair.uid not in alone]
    if labeled:
        if one_prompt(labeled):
            report.notes.append(
                "all completions have one prompt: none can be mismatched, and KTO's z0 is that of the completions"
            )
        found = {pair.uid: pair for pair in mismatched(labeled, max_length=max_length)}
        sound = [found.get(pair.uid, pair) for pair in sound]
    kept = []
    for pair in sound:
        try:
            _check_room(pair, row_length, alone=pair.uid in alone)
        except BadRow as problem:
            triage.reject(pair.uid, problem)
            continue
        kept.append(pair)
        for what in ("prompt", "chosen", "rejected", "between"):
            if getattr(pair, f"{what}_cut") and not (what == "rejected" and pair.desirable is not None):
                report.truncated[what] = report.truncated.get(what, 0) + 1
    triage.finish(len(kept))
    return EncodedSet(kept, report)


def encode_targets(
    preferences: Sequence[Preference],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation = "keep_end",
    bos: Bos = "auto",
    score_prompt: bool = False,
    images: ImageTokens | None = None,
) -> tuple[list[Text], list[str]]:
    """SFT training texts: (prompt, completion) token ids of each distinct text, and their uids. `preferences` passed
    `encode_all`.

    The completion is the `sft_target` of a preference, or else its chosen side, truncated as in the original: by its own length
    only. In a completion of several turns, the assistant's turns are scored. Undesirable completions are left out. With
    `score_prompt`, prompt and completion are one fully scored text (except its first token and images).
    """
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation": truncation, "bos": bos}
    tokenizer = _CachingTokenizer(tokenizer)
    seen: dict[tuple[str, tuple[str, ...], str, Spans | None, bool, int], Preference] = {}
    for preference in preferences:
        if preference.desirable is False:
            continue
        spans = None if preference.sft_target else preference.chosen_spans
        cut = not preference.sft_target and "chosen" in preference.unended
        # A second copy of a pair, made by the weight of its source, is trained on twice.
        target, shown = preference.sft_target or preference.chosen, tuple(image.digest for image in preference.images)
        seen.setdefault((preference.prompt, shown, target, spans, cut, copy_number(preference.uid)), preference)
    texts: list[Text] = []
    uids: list[str] = []
    for (_, _, target, spans, cut, _), preference in seen.items():
        sides = {"chosen": target, "rejected": target, "chosen_spans": spans, "rejected_spans": spans}
        sides |= {"unended": ("chosen", "rejected") if cut else ()}
        record = dataclasses.replace(preference, **sides, between=(), desirable=None)
        pair = _encode_text(record, tokenizer, images, **limits)
        texts.append(_whole_text(pair) if score_prompt else _of_side(pair))
        uids.append(preference.uid)
    return texts, uids


def _of_side(pair: Encoded) -> Text:
    """Prompt and chosen completion of a pair."""
    text = pair.prompt, pair.chosen
    return text if pair.chosen_scored is None and pair.images is None else Completion(*text, pair.chosen_scored, pair.images)


def _whole_text(pair: Encoded) -> Text:
    """Prompt and chosen completion as one text, fully scored except image tokens, which nothing predicts."""
    text, images = np.concatenate([pair.prompt, pair.chosen]), pair.images
    if images is None:
        return text[:0], text
    scored = np.ones(len(text), bool)
    scored[(images.starts[:, None] + np.arange(images.tokens)).reshape(-1)] = False
    return Completion(text[:0], text, scored, images)


def data_digest(examples: Sequence[Encoded] | Sequence[Text]) -> str:
    """SHA-256 over all token ids in order, scored masks and labels; a resumed run must find it unchanged.

    >>> data_digest(encoded) == data_digest(encoded[::-1])
    False
    """
    digest = hashlib.sha256()
    for example in examples:
        if isinstance(example, Encoded):
            prompt, sides = example.prompt, example.sides
        else:
            prompt, sides = example[0], [Completion.of(example)[1:3]]
        parts = (prompt, *(ids for ids, _ in sides))
        digest.update(np.array([len(ids) for ids in parts], "<i4").tobytes())
        digest.update(np.concatenate(parts).astype("<i4").tobytes())
        digest.update(scored_bytes(*sides) + image_bytes(images_of(example)))
        if isinstance(example, Encoded) and example.desirable is not None:
            digest.update(b"desirable" if example.desirable else b"undesirable")
    return digest.hexdigest()


class _CachingTokenizer:
    """A tokenizer that caches the ids of recent texts, because several checks need those of one preference.

    A plain fast tokenizer is called through the tokenizers library, in half the time of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id  # slow to look up in transformers
        from transformers import PreTrainedTokenizerFast  # imported here, after the settings of `data.tokenizer`

        self._eos = _literal_eos(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else ()
        if type(tokenizer) is PreTrainedTokenizerFast:
            tokenizer("", add_special_tokens=False)  # resets truncation and padding left by another call
            below = tokenizer.backend_tokenizer

            def plain(text: str) -> Any:
                with reading("the tokenizer", remedy="it cannot encode a text of the data; use another one"):
                    return {"input_ids": below.encode(text, add_special_tokens=False).ids}
        else:
            plain = functools.partial(tokenizer, add_special_tokens=False)
        self._plain = functools.lru_cache(maxsize=8)(plain)
        self._with_special = functools.lru_cache(maxsize=1)(tokenizer.__call__)  # `encode.adds_bos` always uses the same text

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        if options == {"add_special_tokens": False}:
            return self._plain(text)
        return self._with_special(text) if not options else self._tokenizer(text, **options)

    def may_hold_eos(self, text: str) -> bool:
        """Whether the ids of a text may contain EOS. False only if that is certain without tokenizing."""
        if not self._eos or any(spelling in text for spelling in self._eos):
            return True
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return normalizer is not None and any(spelling in normalizer.normalize_str(text) for spelling in self._eos)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _literal_eos(tokenizer: Any) -> tuple[str, ...]:
    """The spellings of EOS, one of which is in every text whose ids contain EOS; empty if EOS may come from other text.

    A BPE token is a run of the text, unless it is the unknown token. Spaces and other letters may be spelled differently.
    """
    model, normalizer, eos = tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.normalizer, tokenizer.eos_token
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return ()
    covered = model.byte_fallback or type(tokenizer.backend_tokenizer.pre_tokenizer).__name__ == "ByteLevel"
    if (model.unk_token == eos and not covered) or not (eos and eos.isascii() and eos.isprintable() and " " not in eos):
        return ()
    return (eos,) if normalizer is None else (eos, normalizer.normalize_str(eos))


def _encode_text(preference: Preference, tokenizer: Any, images: ImageTokens | None, **limits: Any) -> Encoded:
    try:
        if images is None:
            return encode(preference, tokenizer, **limits)
        return encode_images(preference, tokenizer, images=images, **limits)
    except EosInText as error:
        raise BadRow(Cause.EOS_IN_TEXT, str(error)) from error


def _check_whole(pair: Encoded, preference: Preference, tokenizer: _CachingTokenizer, max_length: int) -> None:
    """Raises `BadRow` if a completion of the pair was cut, or its own SFT target would be."""
    cut = max(pair.chosen_cut, pair.rejected_cut, pair.between_cut) + max(0, len(pair.prompt) - max_length)
    if (target := preference.sft_target) is not None and not tokenizer.may_hold_eos(target):
        cut = max(cut, len(pair.prompt) + len(ended_ids(target, tokenizer, chat=preference.chat)) - max_length)
    if cut > 0:
        raise BadRow(Cause.BEYOND_MAX_LENGTH, f"{cut} tokens beyond --data.max-length, {max_length}")


def _check_target(preference: Preference, tokenizer: _CachingTokenizer) -> None:
    """Raises `BadRow` if the preference has its own SFT target and that is blank or contains EOS."""
    target = preference.sft_target
    if target is None:
        return
    if not target.strip():
        raise BadRow(Cause.EMPTY, "the completion to train on is empty or blank", field="sft_target")
    if not tokenizer.may_hold_eos(target):
        return
    record = {"prompt": preference.prompt, "chosen": target, "rejected": target, "chat": preference.chat}
    try:
        encode(record, tokenizer, max_length=2, max_prompt_length=1, bos="never")
    except EosInText as error:
        raise BadRow(Cause.EOS_IN_TEXT, str(error).removeprefix("chosen "), field="sft_target") from error


def _check(pair: Encoded, tokenizer: Any, preference: Preference, max_length: int) -> None:
    """Raises `BadRow` if the token ids form no usable pair although the texts did."""
    if not min(map(len, pair.completions)) and len(pair.prompt) >= max_length:
        detail = f"the prompt has {len(pair.prompt)} tokens, --data.max-length is {max_length}"
        raise BadRow(Cause.NO_ROOM, detail, field="prompt")
    single = pair.desirable is not None
    if not single and len({ids.tobytes() for ids in pair.completions}) < len(pair.completions):
        if pair.chosen_cut or pair.rejected_cut or pair.between_cut:
            same = f"both completions begin with the same {len(pair.chosen)} tokens"
            raise BadRow(Cause.IDENTICAL_AFTER_TRUNCATION, same if not pair.between else "two completions begin with the same")
        same = "two completions" if pair.between else "chosen and rejected"
        raise BadRow(Cause.IDENTICAL, f"{same} are the same tokens")
    if len(pair.prompt) == 0 and not preference.demonstration:
        raise BadRow(Cause.NO_PROMPT, "the prompt has no tokens", field="prompt")
    for side in ("chosen",) if single else ("chosen", "rejected"):
        ids = getattr(pair, side)
        scored = getattr(pair, f"{side}_scored")
        if getattr(pair, f"{side}_cut") and not tokenizer.decode(ids if scored is None else ids[scored]).strip():
            what = "only blanks" if scored is None else "nothing that the assistant wrote"
            raise BadRow(Cause.COMPLETION_CUT, f"truncation to {len(ids)} tokens leaves {what}", field=side)


def _check_room(pair: Encoded, row_length: int | None, *, alone: bool) -> None:
    """Raises `BadRow` for a pair, or the one text of a demonstration, that needs a longer row than `row_length`."""
    needed = len(pair.prompt) + len(pair.chosen) if alone else group_size(pair, shared=True)[0]
    if row_length is not None and needed > row_length:
        sizes = " + ".join(str(len(ids)) for ids in (pair.prompt, *pair.completions))
        what = "prompt and all completions" if pair.between else "prompt, chosen and rejected"
        what = "prompt, completion and a mismatched one" if pair.desirable is not None else what
        if alone:
            sizes, what = f"{len(pair.prompt)} + {len(pair.chosen)}", "prompt and completion"
        detail = f"{what} need {sizes} tokens"
        raise BadRow(Cause.NO_ROOM, f"{detail}, rows hold {row_length} (--data.row-length)")
