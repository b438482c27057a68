"""Social stories made on the spot: a task that nothing verifies, for experiments that take minutes on a CPU.

A prompt asks for a story about a place, and states four criteria. A story has up to four parts of templated sentences,
and meets each criterion about half of the time. `criteria_met` judges a text by rule; experiments use it to check what
rewards teach, never as a reward.

The files are questions.jsonl and heldout.jsonl (prompts of other places; the accepted answer is the rubric),
warm_start.jsonl (stories, learned whole; stories with the rubric's sentences that they meet, with their score, and
pairs with the better one's number, of which only what follows the stories is learned), and the closed vocabulary as a
tokenizer directory.
"""

import json
import random
import re
from pathlib import Path

from rpt_jax.config import DataConfig, QuestionsConfig
from rpt_jax.data.questions import make_question_template
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer, word_level

_PLACES = (
    "dentist", "library", "pool", "bakery", "zoo", "station", "park", "museum", "school", "market", "farm", "beach",
    "garden", "theatre", "clinic", "bank",
)  # fmt: skip
_FRIENDS = ("my mother", "my father", "my sister", "my brother", "my class", "my friend")
_ASK = "Write a social story about going to the {place} with {friend}. {rubric}"
_HEADINGS = ("Title:", "Beginning:", "Middle:", "End:")
_DESCRIBE = (
    " Many children go to the {place}.", " The {place} has a big door.", " People at the {place} are kind.",
    " It can be loud at the {place}.", " Some days there is a line.", " {Friend} likes the {place}.",
)  # fmt: skip
_ACTS = ("wait", "ask for help", "say hello", "sit down", "take a breath", "hold a hand")
_DIRECT, _SECOND = " I can {act}.", " You can {act}."
_FORBID = (" I must not shout.", " I must not run.", " I never push.")
# One sentence of the rubric for each criterion, in order.
RUBRIC = (
    "It has four parts.", "It describes twice as much as it directs.", "It speaks to nobody.", "It forbids nothing.",
)  # fmt: skip
_PIECES = re.compile(r"</?think>|\\boxed\{| ?[A-Za-z]+| ?[0-9]|.", re.DOTALL)
# What rewards put between a text and what they score (rewards/likelihood.py).
CRITERIA, SCORE = "\n\nCriteria: ", "\n\nScore from 1 to 5: "
BETWEEN, BETTER = "\n\nAnother text: ", "\n\nThe better one (1 or 2): "


def criteria_met(story: str) -> tuple[bool, ...]:
    """Return whether a text meets each criterion: four parts in order, twice as many sentences that describe as
    sentences that direct, no second person, no prohibition. A text without a sentence meets none."""
    text = story.rpartition(THINK_CLOSE)[2]
    sentences = [s for s in re.split(r"[.\n]|Title:|Beginning:|Middle:|End:", text) if s.strip()]
    if not sentences:
        return (False,) * 4
    words = [re.findall(r"[a-z]+", s.lower()) for s in sentences]
    places = [text.find(heading) for heading in _HEADINGS]
    has_parts = -1 not in places and places == sorted(places) and all(text.count(h) == 1 for h in _HEADINGS)
    num_direct = sum(w[:2] in (["i", "can"], ["you", "can"], ["i", "must"], ["i", "never"]) for w in words)
    num_describe = len(sentences) - num_direct
    return (
        has_parts,
        num_describe >= 2 * num_direct,
        not any({"you", "your"} & set(w) for w in words),
        not any({"not", "never"} & set(w) for w in words),
    )


def make_story(rng: random.Random, place: str, friend: str) -> str:
    """Make a random story; each criterion is met about half of the time."""
    has_parts, is_descriptive, is_first_person, is_free = (rng.random() < 0.5 for _ in range(4))

    def describe() -> str:
        return rng.choice(_DESCRIBE).format(place=place, Friend=friend[0].upper() + friend[1:])

    wordings = [_DIRECT if is_first_person else _SECOND, rng.choice((_DIRECT, _DIRECT if is_first_person else _SECOND))]
    direct = [wording.format(act=rng.choice(_ACTS)) for wording in wordings[: rng.randint(1, 2)]]
    if not is_free:
        direct.append(rng.choice(_FORBID))
    middle = direct + [describe() for _ in range(max(0, 2 * len(direct) - 2 if is_descriptive else len(direct) - 2))]
    rng.shuffle(middle)
    parts = [f" The {place}.", describe(), "".join(middle), describe()]
    headings = list(_HEADINGS)
    if not has_parts:
        missing = rng.randrange(4)
        headings[missing] = ""
        parts[missing] = "" if missing != 2 else parts[2]
    return "".join(f"\n{heading}{part}" if heading else part for heading, part in zip(headings, parts, strict=True))


def make_tokenizer() -> Tokenizer:
    """Make the closed vocabulary: words, digits and marks, with response marks as single entries."""
    phrases = [_ASK.format(place=p, friend=f, rubric=" ".join(RUBRIC)) for p in _PLACES for f in _FRIENDS]
    phrases += [d.format(place=p, Friend=f[0].upper() + f[1:]) for d in _DESCRIBE for p in _PLACES for f in _FRIENDS]
    phrases += [s.format(act=act) for s in (_DIRECT, _SECOND) for act in _ACTS]
    phrases += [*_FORBID, *_HEADINGS, *(f" {s}" for s in RUBRIC), *RUBRIC, CRITERIA, SCORE, BETWEEN, BETTER]
    entries = {piece for phrase in phrases for piece in _PIECES.findall(phrase)} | set("12345")
    return word_level(sorted(entries | {" ", "}", THINK_OPEN, THINK_CLOSE, BOX_OPEN}))


def _question(place: str, friend: str) -> str:
    return _ASK.format(place=place, friend=friend, rubric=" ".join(RUBRIC))


def _example(rng: random.Random, kind: str, tokenizer: Tokenizer, place: str, friend: str) -> tuple[list[int], int]:
    """Return (completion tokens, how many of them are given), in the layout that rewards score."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode_continuation(text)

    story = make_story(rng, place, friend)
    own, end, met = encode(THINK_CLOSE + story), tokenizer.eos_id, criteria_met(story)
    if kind == "story":
        return [*own, end], 0
    if kind == "rubric":
        given, label = own + encode(CRITERIA), encode(" ".join(s for s, is_met in zip(RUBRIC, met) if is_met))
    elif kind == "score":
        given, label = own + encode(SCORE), encode(str(1 + sum(met)))
    else:
        while sum(criteria_met(other := make_story(rng, place, friend))) == sum(met):
            pass
        given = [*own, end, *encode(BETWEEN), *encode(THINK_CLOSE + other), *encode(BETTER)]
        label = encode("1" if sum(met) > sum(criteria_met(other)) else "2")
    return [*given, *label, end], len(given)


def write_stories(directory: Path, *, seed: int, num_examples: int, num_heldout_places: int = 4) -> None:
    """Write the files listed in the module docstring into `directory`; the tokenizer last."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    template = make_question_template(tokenizer, QuestionsConfig(template="none"), DataConfig())
    places = rng.sample(_PLACES, len(_PLACES))
    rubric = " ".join(RUBRIC)

    def questions(some) -> list[dict]:
        return [{"question": _question(p, f), "answer": rubric} for p in some for f in _FRIENDS]

    examples = []
    for number in range(num_examples):
        place, friend = rng.choice(places[num_heldout_places:]), rng.choice(_FRIENDS)
        kind = ("story", "rubric", "score", "choice")[number % 4]
        completion, given = _example(rng, kind, tokenizer, place, friend)
        trunk = [*template.header.tolist(), *tokenizer.encode(_question(place, friend))]
        examples.append({
            "trunk_tokens": trunk, "completion_tokens": completion, "given_tokens": given,
            "tokenizer": tokenizer.fingerprint, "template": template.fingerprint,
        })  # fmt: skip
    files = {
        "questions.jsonl": questions(places[num_heldout_places:]),
        "heldout.jsonl": questions(places[:num_heldout_places]),
        "warm_start.jsonl": examples,
    }
    for name, records in files.items():
        (directory / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer.save(directory / "tokenizer")
