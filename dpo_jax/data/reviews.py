"""A synthetic language of short film reviews with exactly known sentiment: built-in data and a test bed for preferences.

    prompt      We saw The Silent Harbor on Friday. For me the script is
    completion   rather clever, but the music grates. Not worth the ticket.

The setting is the paper's controlled sentiment generation (Rafailov et al. 2023, section 6.1). A prompt is the neutral
beginning of a review, a completion makes it positive or negative, and a known reward compares two completions. Here the reward
is not a classifier but a rule over the words of the grammar:

    reward(text) = sum of the points of its opinions, limited to [-20, 20]

An *opinion* is the first use of a sentiment word in the text. Its points are its strength (1, 2 or 3; negative for blame),
times 1.5 after an intensifier ("very", "utterly") or 0.5 after a softener ("rather", "slightly"), times -0.5 after a negator
("not", "never", "hardly"):

    superb +3     very dull -3     rather clever +1     never dull +1     not very funny -1.5

Modifiers and negators act on the next sentiment word of their clause, across at most three other words. The nearest of several
modifiers counts, and a second negator changes nothing. Points are multiples of 1/4, so rewards are exact in floating point.
Every text has a reward: words outside the lexicon count 0, the empty text has reward 0, and repeating a word adds nothing.

The reward is graded: strong words, modifiers and further opinions are each rarer than mild ones. So a policy cannot just flip
one bit of sentiment: to approach the best rewards it must move several nats away from the language. Everything is a pure
function of (n, seed, split), the first items do not depend on n, and the prompts of the two splits are disjoint for any seeds.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from dpo_jax.data.pairs import Preference

Split = Literal["train", "test"]
_T = TypeVar("_T")

MAX_REWARD = 20.0
NEGATION = -0.5
REACH = 3  # most neutral words between a modifier or negator and its sentiment word

INTENSIFIERS = ("very", "truly", "really", "utterly", "absolutely", "simply")
SOFTENERS = ("rather", "fairly", "slightly", "somewhat")
NEGATORS = ("not", "never", "hardly")
MODIFIERS = dict.fromkeys(INTENSIFIERS, 1.5) | dict.fromkeys(SOFTENERS, 0.5)
_CLAUSE_ENDS = frozenset((*".,;:!?", "and", "or", "but", "yet", "though", "although", "while"))


class _Topic(NamedTuple):
    """A topic of a clause, with its adjectives and verbs by strength 1, 2, 3."""

    name: str
    subjects: str
    praise: tuple[str, str, str]
    blame: tuple[str, str, str]
    praise_verbs: tuple[str, str, str]
    blame_verbs: tuple[str, str, str]


_TOPICS = (
    _Topic(
        "acting",
        "the acting/the cast/the young lead/the villain/the leading pair",
        ("solid/likeable/pleasant/decent", "charming/convincing/graceful/funny", "superb/brilliant/magnificent"),
        ("stiff/flat/bland/uneven", "wooden/weak/tiresome/dull", "dreadful/terrible/embarrassing"),
        ("pleases/amuses", "shines/impresses/delights", "dazzles/astonishes"),
        ("falters/wavers", "disappoints/irritates", "appals"),
    ),
    _Topic(
        "plot",
        "the plot/the script/the ending/the dialogue/the story",
        ("neat/decent/sensible/amusing", "clever/gripping/touching/funny", "brilliant/unforgettable/superb"),
        ("thin/predictable/uneven/muddled", "clumsy/dull/confusing/lazy", "dreadful/awful/unbearable"),
        ("works/amuses", "sparkles/delights/surprises", "dazzles/astonishes"),
        ("stumbles/wanders/falters", "drags/disappoints", "collapses"),
    ),
    _Topic(
        "craft",
        "the music/the camera work/the editing/the lighting/the set design",
        ("tidy/pleasant/decent/fitting", "elegant/beautiful/inventive/lovely", "stunning/magnificent/superb"),
        ("bland/noisy/uneven/dated", "ugly/clumsy/dull/tiresome", "horrible/awful/dreadful"),
        ("pleases/works", "delights/shines/impresses", "dazzles/astonishes"),
        ("distracts/wavers", "grates/irritates", "appals"),
    ),
    _Topic(
        "film",
        "the film/the first hour/the second half/the whole thing",
        ("pleasant/decent/enjoyable/amusing", "gripping/moving/charming/lovely", "wonderful/unforgettable/brilliant"),
        ("slow/uneven/predictable/muddled", "dull/tedious/silly/tiresome", "terrible/unbearable/awful"),
        ("works/amuses", "delights/sparkles/surprises", "soars/astonishes"),
        ("stumbles/wanders", "drags/disappoints", "collapses"),
    ),
)

TOPICS = tuple(topic.name for topic in _TOPICS)
"""The topics of prompts. Most prompts name one, which its words praise or blame; some leave it open."""

# Closing sentences: strength, the sentiment words in them, the sentences.
_VERDICTS = (
    (1, "liked/smiled", "I liked it./We all liked it./I smiled all the way home./My sister smiled at the end."),
    (2, "enjoyed/treat", "I enjoyed every minute./We really enjoyed it./A treat from start to finish."),
    (2, "worth/recommended", "Worth the ticket./Worth a second visit./Recommended./Recommended to everyone."),
    (3, "loved/triumph", "I loved it./We loved it./I absolutely loved it./A triumph."),
    (3, "masterpiece", "A masterpiece./Simply a masterpiece."),
    (-1, "yawned/shrugged", "I yawned twice./My sister yawned at the end./We shrugged and went home."),
    (-1, "forgettable", "Forgettable./A forgettable evening."),
    (-2, "skip/waste", "Skip it./Skip this one./A waste of an evening./Truly a waste of money."),
    (-2, "regretted", "I regretted the ticket./We regretted going."),
    (-3, "hated", "I hated it./We hated it./I really hated it."),
    (-3, "disaster/torture", "A disaster./Simply a disaster./Torture."),
)
_OTHER_VERDICTS = (
    "Not worth the ticket./I never liked it./We never once smiled./Hardly a masterpiece./Hardly a waste of money."
    "/It runs for two hours./Then we took the bus home./There may be a sequel./That is all I have to say."
)

# Alternatives are separated by "/".
_TITLE_FIRST = (
    "Silent/Last/Northern/Hidden/Paper/Winter/Golden/Second/Distant/Glass/Summer/Iron/Hollow/Crimson/Midnight/Painted/River"
)
_TITLE_SECOND = (
    "Harbor/Orchard/Lantern/Station/Garden/Letter/Mirror/Bridge/Island/Witness/Canyon/Tailor/Signal/Carnival/Compass/Window"
    "/Violin/Voyage/Hotel/Kingdom/Passenger/Meadow/Archive/Lighthouse"
)
_WHEN = "on Friday/last night/on Sunday/in a small cinema/after work/in March/last week/at the festival"
_COMPANY = "with my sister/with two friends/with the kids/alone/with my father/with a colleague"
_ABOUT = (
    "a family by the sea/two brothers/a retired spy/a night train/a teacher in Rome/a village choir/a bank clerk/an old map"
)
_OPENINGS = (
    "I saw {title} {when}.",
    "We saw {title} {when}.",
    "I watched {title} {when} {company}.",
    "We watched {title} {when}.",
    "{title} is about {about}.",
    "{title} tells of {about}. I saw it {when}.",
    "My brother took me to {title} {when}.",
    "I went to {title} {company}.",
    "This is my review of {title}.",
    "So this was {title}, a film about {about}.",
)
_LEAD_INS = "For me/I think/This time/I must say/In the end/I found that/To my eye/Once again"
_COPULAS = ("is", "is", "is", "feels", "seems")
_DEGREES = (("very", "truly", "really"), ("very", "truly", "really", "utterly"), ("utterly", "absolutely", "simply", "truly"))
_STRENGTHS = (1, 1, 1, 2, 2, 3)
_MOODS = (0.9, 0.9, 0.5, 0.1, 0.1)  # probability that an opinion is praise, in good, mixed and bad reviews


def _lexicon() -> dict[str, float]:
    """Every sentiment word with its points. A word has the same points everywhere."""
    entries = [(word, float(strength)) for strength, words, _ in _VERDICTS for word in words.split("/")]
    for topic in _TOPICS:
        for words, sign in ((topic.praise, 1), (topic.praise_verbs, 1), (topic.blame, -1), (topic.blame_verbs, -1)):
            entries += [(word, float(sign * strength)) for strength, group in enumerate(words, 1) for word in group.split("/")]
    lexicon: dict[str, float] = {}
    for word, points in entries:
        if lexicon.setdefault(word, points) != points:
            raise AssertionError(f"{word!r} has two strengths in the grammar: {lexicon[word]} and {points}")
    return lexicon


LEXICON = _lexicon()


class Opinion(NamedTuple):
    word: str
    points: float


def opinions(text: str) -> list[Opinion]:
    """The opinions in any text, in order. Their points add up to its reward (rules in the module docstring)."""
    found: dict[str, float] = {}
    modifier, negated, reach = 1.0, False, 0
    for token in re.findall(r"[a-z]+|[.,;:!?]", text.lower()):
        if token in MODIFIERS:
            modifier, reach = MODIFIERS[token], REACH
        elif token in NEGATORS:
            negated, reach = True, REACH
        elif token not in LEXICON and token not in _CLAUSE_ENDS and reach > 0:
            reach -= 1
        else:
            if token in LEXICON:
                found.setdefault(token, LEXICON[token] * modifier * (NEGATION if negated else 1.0))
            modifier, negated, reach = 1.0, False, 0
    return [Opinion(word, points) for word, points in found.items()]


def reward(text: str) -> float:
    """The true sentiment of a whole review (prompt and completion): a multiple of 1/4 in [-20, 20]. Defined for any text."""
    total = sum((opinion.points for opinion in opinions(text)), 0.0)
    return max(-MAX_REWARD, min(MAX_REWARD, total))


class _Prefix(NamedTuple):
    """A prompt, and the state of its last sentence."""

    text: str
    used: frozenset[str]
    topic: _Topic | None = None
    copula: str = ""


class _Writer:
    """Random draws from the grammar. `phrase` repeats an alternative in one review only when all are used."""

    def __init__(self, rng: random.Random, used: frozenset[str] = frozenset()) -> None:
        self.rng, self.used = rng, set(used)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[_T]) -> _T:
        # Not `rng.choice`: only `random()` is guaranteed to be stable across Python versions.
        return options[int(self.rng.random() * len(options))]

    def phrase(self, alternatives: str) -> str:
        options = alternatives.split("/")
        choice = self.pick([option for option in options if option not in self.used] or options)
        self.used.add(choice)
        return choice

    def lead_in(self) -> str:
        return self.phrase(_LEAD_INS) + " " if self.chance(0.55) else ""

    def predicate(self, topic: _Topic, praise: bool, copula: str = "") -> str:
        """Praise or blame: "is very clever", "never drags", or, after a given copula, "very clever"."""
        strength = self.pick(_STRENGTHS) - 1
        negate = copula in ("", "is") and self.chance(0.15)
        adjectives, verbs = (topic.praise, topic.praise_verbs) if praise != negate else (topic.blame, topic.blame_verbs)
        if not copula and self.chance(0.35):
            return ("never " if negate else self.pick(("", "", "", "truly ", "really "))) + self.phrase(verbs[strength])
        degree = ""
        if negate:
            degree = self.pick(("not ", "not ", "never ", "hardly ", "not very ", "not exactly "))
        elif self.chance(0.25):
            degree = self.pick(_DEGREES[strength]) + " "
        elif strength < 2 and self.chance(0.2):
            degree = self.pick(SOFTENERS) + " "
        adjective = self.phrase(adjectives[strength])
        if not degree and self.chance(0.15):
            adjective += " and " + self.phrase(adjectives[self.pick(_STRENGTHS) - 1])
        if copula:
            return degree + adjective
        return f"{'is' if negate else self.pick(_COPULAS)} {degree}{adjective}"

    def clause(self, praise: bool) -> str:
        topic = self.pick(_TOPICS)
        return f"{self.phrase(topic.subjects)} {self.predicate(topic, praise)}"

    def verdict(self, score: float) -> str:
        """A closing sentence, mostly with the sign of `score`."""
        if self.chance(0.25):
            return self.phrase(_OTHER_VERDICTS)
        sign = 1 if self.chance(0.5 if score == 0 else 0.93 if score > 0 else 0.07) else -1
        strength = sign * self.pick(_STRENGTHS)
        return self.phrase("/".join(sentences for points, _, sentences in _VERDICTS if points == strength))

    def completion(self, prefix: _Prefix) -> str:
        """The rest of a review, with its leading space: one to three clauses and perhaps a verdict."""
        mood = self.pick(_MOODS)
        praise = self.chance(mood)
        if prefix.topic:
            text = " " + self.predicate(prefix.topic, praise, prefix.copula)
        else:
            text = " " + _capital(self.lead_in() + self.clause(praise))
        if self.chance(0.6):
            agrees = praise == (praise := self.chance(mood))
            text += self.pick((" and ", ", and ") if agrees else (", but ", ", yet ", " though ")) + self.clause(praise)
        text += "."
        if self.chance(0.3):
            text += f" {_capital(self.lead_in() + self.clause(self.chance(mood)))}."
        if self.chance(0.7):
            text += " " + self.verdict(reward(prefix.text + text))
        return text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _prefix(rng: random.Random) -> _Prefix:
    """A neutral beginning: an opening sentence, mostly followed by the first words of an opinion."""
    writer = _Writer(rng)
    text = writer.pick(_OPENINGS).format(
        title=f"The {writer.phrase(_TITLE_FIRST)} {writer.phrase(_TITLE_SECOND)}",
        when=writer.phrase(_WHEN),
        company=writer.phrase(_COMPANY),
        about=writer.phrase(_ABOUT),
    )
    if writer.chance(0.2):
        return _Prefix(text, frozenset(writer.used))
    topic = writer.pick(_TOPICS)
    copula = writer.pick(_COPULAS) if writer.chance(0.6) else ""
    text += " " + _capital(f"{writer.lead_in()}{writer.phrase(topic.subjects)} {copula}").rstrip()
    return _Prefix(text, frozenset(writer.used), topic, copula)


def _prefixes(n: int, seed: int, split: Split, topics: Sequence[str] | None = None) -> Iterator[tuple[int, _Prefix]]:
    """The first `n` prefixes of a split. The split of a prompt depends on its text alone, so no prompt is in both."""
    if topics is not None and (not topics or set(topics) - set(TOPICS)):
        raise ValueError(f"topics of reviews are {', '.join(TOPICS)}, got {', '.join(topics) or 'none'}")
    if split not in ("train", "test"):
        raise ValueError(f"the generated reviews have the splits 'train' and 'test', not {split!r}")
    rng = random.Random(f"prompts {split} {seed}")
    found = 0
    while found < n:
        prefix = _prefix(rng)
        wanted = topics is None or (prefix.topic is not None and prefix.topic.name in topics)
        if wanted and (zlib.crc32(prefix.text.encode()) % 8 == 0) == (split == "test"):
            yield found, prefix
            found += 1


def review_prompts(n: int, seed: int, *, split: Split = "train", topics: Sequence[str] | None = None) -> list[str]:
    """`n` neutral beginnings of reviews (reward 0). A completion begins with a space. Prompts may repeat, very rarely.

    With `topics` (from `TOPICS`), only prompts that end in the first words about one of them.

    >>> review_prompts(1, 0, topics=["craft"])
    ['I went to The Iron Witness with the kids. For me the set design']
    """
    return [prefix.text for _, prefix in _prefixes(n, seed, split, topics)]


def generate_reviews(n: int, seed: int, *, split: Split = "train") -> list[str]:
    """`n` whole reviews of mixed sentiment on the prompts of `review_prompts(n, seed)`, to train a language model."""
    rng = random.Random(f"reviews {split} {seed}")
    return [prefix.text + _Writer(rng, prefix.used).completion(prefix) for _, prefix in _prefixes(n, seed, split)]


def review_preferences(n: int, seed: int, *, split: Split = "train", min_gap: float = 1.0) -> list[Preference]:
    """`n` pairs on the prompts of `review_prompts(n, seed)`: two independent completions, the one with the higher reward
    chosen.

    The rewards of a pair differ by at least `min_gap` points, in (0, 4]; closer pairs are redrawn (one in ten with the default;
    0.25 would exclude only ties). `sft_target` is a third, independent draw: SFT learns the language with its mixed sentiment,
    not the preferences.
    """
    if not 0 < min_gap <= 4:
        raise ValueError(f"min_gap must be in (0, 4] points, got {min_gap}: a tie states no preference, and wide gaps are rare")
    rng = random.Random(f"preferences {split} {seed}")
    pairs = []
    for i, prefix in _prefixes(n, seed, split):
        sft_target = _Writer(rng, prefix.used).completion(prefix)
        low = high = (0.0, "")
        while high[0] - low[0] < min_gap:
            drafts = [_Writer(rng, prefix.used).completion(prefix) for _ in range(2)]
            low, high = sorted((reward(prefix.text + draft), draft) for draft in drafts)
        pairs.append(Preference(prefix.text, high[1], low[1], f"reviews/{split}/{seed}:{i}", sft_target=sft_target))
    return pairs
