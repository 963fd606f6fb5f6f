"""Tokenization of preferences, with the truncation of the original implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from dpo_jax.data.columns import text as text_in
from dpo_jax.data.special_tokens import ends_in_special

Truncation = Literal["keep_end", "keep_start", "completions"]
Bos = Literal["auto", "always", "never"]
Side = tuple[np.ndarray, np.ndarray | None]
"""A completion: ids int32[n], and bool[n] marking the scored ones (None: all)."""


class EosInText(ValueError):
    """A text contains the end-of-sequence token, which would end the completion early."""


@dataclasses.dataclass(frozen=True, eq=False)
class PromptImages:
    """The images in a prompt. Their features are looked up when a batch is built.

    starts    int32[I]                position in the prompt where the `tokens` tokens of each image begin
    names     I keys of `features`    equal names are one image, stored once per row
    tokens    T                       of each image
    features  {name: float32[T, W]}   outputs of the vision encoder; may be read from disk on access
    """

    starts: np.ndarray
    names: tuple[str, ...]
    tokens: int
    features: Mapping[str, np.ndarray]

    @property
    def columns(self) -> int:
        """Columns of `RowImages` needed: the tokens of its distinct images. Reads no features."""
        return len(set(self.names)) * self.tokens

    @property
    def width(self) -> int:
        """W. Reads the features of an image."""
        return self.features[self.names[0]].shape[1]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: arrays have no single truth value and no hash
class Encoded:
    """One preference as token ids. Completions end in EOS, or in the chat template's end of turn, unless truncated.

        prompt, chosen, rejected               int32[n] each
        uid                                    identifies the pair in messages
        prompt_cut, chosen_cut, rejected_cut   number of tokens removed by truncation
        bos_added                              the first token of the prompt is a BOS that is not in its text
        chosen_scored, rejected_scored         bool[n]: the scored tokens of a completion; None: all. The others are
                                               context, such as a user's turns
        between                                rankings only: the completions between best (`chosen`) and worst (`rejected`)
        between_cut                            number of their tokens removed by truncation
        desirable                              single completions only: the label of `chosen`; `rejected` is a mismatched one
        images                                 images in the prompt, or None
        unended                                "chosen", "rejected": samples that were cut off, which have no end

    `encode` makes one from texts; your own token ids work as well:

    >>> Encoded(prompt=np.int32([5, 6]), chosen=np.int32([7, 0]), rejected=np.int32([8, 9, 0])).rejected
    array([8, 9, 0], dtype=int32)
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    uid: str = ""
    prompt_cut: int = 0  # tokens removed by truncation
    chosen_cut: int = 0
    rejected_cut: int = 0
    bos_added: bool = False  # the prompt's first token is a BOS that is not in its text
    chosen_scored: np.ndarray | None = None  # bool[n]
    rejected_scored: np.ndarray | None = None
    between: tuple[np.ndarray, ...] = ()  # rankings only: int32[n] each, best first
    between_cut: int = 0
    desirable: bool | None = None  # single completions only (`data.unpaired`)
    images: PromptImages | None = None
    unended: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            object.__setattr__(self, name, _as_ids(getattr(self, name)))
        object.__setattr__(self, "between", tuple(map(_as_ids, self.between)))
        for name in ("chosen_scored", "rejected_scored"):
            if isinstance(scored := getattr(self, name), list):
                object.__setattr__(self, name, np.array(scored, bool))
        if self.desirable is not None:
            object.__setattr__(self, "desirable", _as_label(self.desirable))

    @property
    def sides(self) -> tuple[Side, ...]:
        """(ids, scored) of all completions, best first: two for a pair, all for a ranking."""
        return (self.chosen, self.chosen_scored), *((ids, None) for ids in self.between), (self.rejected, self.rejected_scored)

    @property
    def completions(self) -> tuple[np.ndarray, ...]:
        """The ids of `sides`."""
        return self.chosen, *self.between, self.rejected

    @property
    def scored_tokens(self) -> tuple[int, ...]:
        """Number of scored tokens of each completion, best first."""
        return tuple(count_scored(*side) for side in self.sides)


def _as_ids(ids: Any) -> Any:
    """A list of token ids as int32[n]; values that are no ids are left for `arguments.check_ids` to name."""
    if not isinstance(ids, list):
        return ids
    array = np.array(ids) if ids else np.zeros(0, np.int32)
    known = array.dtype.kind in "iu" and array.min(initial=0) >= -(2**31) and array.max(initial=0) < 2**31
    return array.astype(np.int32) if known else array


def _as_label(value: Any) -> bool:
    """A label as a bool. Data frames give numpy's bools, or 0 and 1."""
    if isinstance(value, (bool, np.bool_, int, float, np.integer, np.floating)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"desirable is {value!r}; a label is True or False")


def count_scored(ids: np.ndarray, scored: np.ndarray | None) -> int:
    """Number of scored tokens of a completion."""
    return len(ids) if scored is None else int(np.count_nonzero(scored))


def scored_bytes(*sides: Side) -> bytes:
    """The scored-token masks of completions as bytes, for keys and digests; empty if all tokens are scored."""
    if all(count_scored(*side) == len(side[0]) for side in sides):
        return b""
    marks = (np.ones(len(ids), bool) if scored is None else np.asarray(scored, bool) for ids, scored in sides)
    return b"scored" + b"".join(np.packbits(mark).tobytes() for mark in marks)


def image_bytes(images: PromptImages | None) -> bytes:
    """The images of a prompt as bytes, for keys and digests; empty without images. Images are identified by name."""
    if images is None:
        return b""
    return b"images" + np.asarray(images.starts, "<i4").tobytes() + "\0".join(images.names).encode()


def prompt_key(pair: Encoded) -> bytes:
    """The identity of a prompt: its ids and images."""
    return np.ascontiguousarray(pair.prompt, "<i4").tobytes() + image_bytes(pair.images)


def encode(
    preference: Any,
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation = "keep_end",
    bos: Bos = "auto",
) -> Encoded:
    """Token ids of one preference: a mapping or record with `prompt`, `chosen`, `rejected` (and optionally `uid`).

    A ranking also has the texts `between`. A single completion has a label, `desirable`; its text is both chosen and rejected.

    Like `tokenize_batch_element` of the original: prompt and completions are tokenized separately, without special tokens, and
    EOS is appended to the completions, except to the sides named in `unended`. `bos` decides whether the prompt begins with BOS
    (`with_bos`). If the prompt and the longer completion exceed `max_length` tokens, the prompt is cut to `max_prompt_length`
    (keeping BOS and its end, or its start). If that is not enough, both completions are cut to
    `max_length - max_prompt_length`; of a demonstration, to what the prompt leaves of `max_length`. With `truncation`
    "completions" the prompt stays whole, and completions are cut to what it leaves, if anything. Raises `EosInText` if a
    text contains EOS. Only in a record marked `chat` may EOS end the turns of the prompt. There a completion that the template
    already ended, with EOS or another special token, gets no further EOS (as in TRL).

    Lists of messages `{"role", "content"}` are rendered by the chat template of `tokenizer`, as in `load_preferences`. Without
    `prompt`, the prompt is the messages that both sides begin with. `tools` and `chat_template_kwargs` are passed to the
    template. In a completion of several turns, the assistant's turns are scored. Raises ValueError for a tokenizer without a
    template.

    Raises `BadRow`, a ValueError, naming a field that is missing or is not a text. Empty and equal completions are encoded like
    any others; `load_preferences` and the program refuse them.

    >>> pair = {"prompt": "The film was", "chosen": " a delight.", "rejected": " a bore."}
    >>> ids = encode(pair, tokenizer, max_length=64, max_prompt_length=32)
    >>> tokenizer.decode(ids.prompt), tokenizer.decode(ids.chosen)
    ('The film was', ' a delight.<|endoftext|>')
    """
    if truncation not in (known := get_args(Truncation)):
        raise ValueError(f"truncation={truncation!r}: use one of {', '.join(map(repr, known))}")
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length={max_prompt_length} must lie between 0 and max_length={max_length}")

    def get(name: str, default: Any = None) -> Any:
        return preference.get(name, default) if isinstance(preference, Mapping) else getattr(preference, name, default)

    uid = get("uid", "") or ""
    if get("images"):
        raise ValueError(
            f"{uid or 'encode'}: the prompt shows images; `encode_images` of `dpo_jax.data.image_prompts` reads them"
        )
    if any(isinstance(get(field), (list, tuple, np.ndarray)) for field in ("prompt", "chosen", "rejected")):
        from dpo_jax.data.chat import chat_preference  # imported here: plain texts do not need it

        sides = _messages(get("chosen")), _messages(get("rejected"))
        more = {name: get(name) for name in ("tools", "chat_template_kwargs")}
        preference = chat_preference(_messages(get("prompt")), *sides, uid=uid or "encode", tokenizer=tokenizer, **more)
    chat = bool(get("chat", False))
    _check_texts(preference)
    own = token_ids(get("prompt"), tokenizer)
    if not chat:
        _refuse_eos(own, tokenizer, "prompt")
    prompt = with_bos(own, tokenizer, bos=bos, chat=chat)
    (chosen, chosen_scored), (rejected, rejected_scored) = (
        _spans_ids(tokenizer, get(side), side, spans)
        if (spans := get(f"{side}_spans")) is not None
        else (ended_ids(get(side), tokenizer, name=side, chat=chat, ended=side not in (get("unended") or ())), None)
        for side in ("chosen", "rejected")
    )
    if isinstance(get("between", ()), str):
        from dpo_jax.data.pairs import BadRow, Cause

        raise BadRow(Cause.WRONG_TYPE, "expected a list of completions, got one string", field="between")
    between = [ended_ids(text, tokenizer, name=f"completion {i + 1}", chat=chat) for i, text in enumerate(get("between", ()))]
    full = {"prompt": len(prompt), "chosen": len(chosen), "rejected": len(rejected), "between": sum(map(len, between))}

    longer, whole_prompt = max(map(len, (chosen, *between, rejected))), truncation == "completions"
    if len(prompt) + longer > max_length and not whole_prompt:
        prompt = cut_prompt(prompt, max_prompt_length, tokenizer, truncation=truncation)
    if len(prompt) + longer > max_length:
        room = max(0, max_length - (len(prompt) if whole_prompt or get("demonstration") else max_prompt_length))
        chosen, *between, rejected = (ids[:room] for ids in (chosen, *between, rejected))
    return Encoded(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        uid=uid,
        prompt_cut=full["prompt"] - len(prompt),
        chosen_cut=full["chosen"] - len(chosen),
        rejected_cut=full["rejected"] - len(rejected),
        bos_added=full["prompt"] > len(own),
        chosen_scored=None if chosen_scored is None else chosen_scored[: len(chosen)],
        rejected_scored=None if rejected_scored is None else rejected_scored[: len(rejected)],
        between=tuple(between),
        desirable=get("desirable"),
        between_cut=full["between"] - sum(map(len, between)),
        unended=tuple(get("unended") or ()),
    )


def _messages(value: Any) -> Any:
    """Messages as a list: data frames and parquet files give arrays of them."""
    return list(value) if isinstance(value, (tuple, np.ndarray)) else value


def _check_texts(preference: Any) -> None:
    fields = ("prompt", "chosen", "rejected")
    texts = (
        preference if isinstance(preference, Mapping) else {f: getattr(preference, f) for f in fields if hasattr(preference, f)}
    )
    if all(isinstance(texts.get(field), str) for field in fields):
        return
    if not texts and not isinstance(preference, Mapping):
        raise TypeError(f"encode takes one preference with prompt, chosen and rejected, not {type(preference).__name__}")
    for field in fields:
        text_in(texts, field)


def token_ids(text: str, tokenizer: Any) -> np.ndarray:
    """Token ids of a text without special tokens: int32[n]."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a plain text with BOS, as Llama's, Mistral's and Gemma's do."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("hello")["input_ids"][:1] == [bos]


def with_bos(ids: np.ndarray, tokenizer: Any, *, bos: Bos = "auto", chat: bool = False) -> np.ndarray:
    """The ids of a text (int32[n]) with BOS prepended if `bos` asks for it. All encoding of prompts and whole texts uses this.

    "auto" adds BOS to a text if the tokenizer itself does (`adds_bos`), and leaves a conversation (`chat`) as its template
    wrote it. "always" adds it to both, "never" to neither. Ids that already begin with BOS are unchanged.

    Raises ValueError for "always" if the tokenizer has no BOS.
    """
    if bos not in ("auto", "always", "never"):
        raise ValueError(f"bos={bos!r}: use 'auto', 'always' or 'never'")
    token: Any = getattr(tokenizer, "bos_token_id", None)
    if bos == "always" and token is None:
        raise ValueError("bos='always': the tokenizer has no beginning-of-text token (bos_token); use 'auto' or 'never'")
    wanted = bos == "always" or (bos == "auto" and not chat and adds_bos(tokenizer))
    return ids if not wanted or ids[:1].tolist() == [token] else np.append(np.int32(token), ids)


def cut_prompt(ids: np.ndarray, limit: int, tokenizer: Any, *, truncation: Truncation = "keep_end") -> np.ndarray:
    """A prompt cut to `limit` tokens: its first ones, or its last ones with a leading BOS kept. With `truncation` "completions"
    it stays whole."""
    if len(ids) <= limit or truncation == "completions":
        return ids
    if truncation == "keep_start":
        return ids[:limit]
    kept = int(ids[:1].tolist() == [getattr(tokenizer, "bos_token_id", None)])
    return np.concatenate([ids[:kept], ids[len(ids) - limit + kept :]])


def ended_ids(text: str, tokenizer: Any, *, name: str = "completion", chat: bool, ended: bool = True) -> np.ndarray:
    """The completion's ids with exactly one EOS, at the end; with none if a chat template ends it with another token, or if
    it is a sample that did not end."""
    ids = token_ids(text, tokenizer)
    if not ended:
        _refuse_eos(ids, tokenizer, name)
        return ids
    if chat and tokenizer.eos_token_id in ids:
        end = int(np.argmax(ids == tokenizer.eos_token_id))
        if not tokenizer.decode(ids[end + 1 :]).strip():  # templates often end a turn with EOS and a newline
            ids = ids[:end]
    elif chat and ends_in_special(text, tokenizer):
        return ids
    _refuse_eos(ids, tokenizer, name)
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def _spans_ids(tokenizer: Any, text: str, name: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a completion of several turns, EOS at the end, and the scored ones: those that begin in one of `spans`, and EOS.

    The template may have ended each turn with EOS. None is added if it ends turns with another token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name}: finding the assistant's tokens in several turns needs a fast tokenizer (tokenizer.json)")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    own = np.flatnonzero(ids == tokenizer.eos_token_id)
    ended = bool(len(own)) and not tokenizer.decode(ids[own[-1] + 1 :]).strip()  # by the template
    if ended:
        ids, offsets = ids[: own[-1]], offsets[: own[-1]]
    begins, ends = offsets.T
    # With tokenizers that strip blanks, a blank token has no width: it begins where the token before it ends.
    begins = np.where(begins == ends, np.append(0, ends[:-1])[: len(ends)], begins)
    scored = np.zeros(len(ids), bool)
    for begin, end in spans:
        scored |= (begin <= begins) & (begins < end)
    if ended or not ends_in_special(text, tokenizer):
        return np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(scored, True)
    return ids, scored


def _refuse_eos(ids: np.ndarray, tokenizer: Any, name: str) -> None:
    if tokenizer.eos_token_id in ids:
        raise EosInText(f"{name} contains the end-of-sequence token {tokenizer.eos_token!r} (id {tokenizer.eos_token_id})")
