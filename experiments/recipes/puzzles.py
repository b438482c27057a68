"""Corpora of puzzles for the recipes in tiny form: minutes on two CPU cores, with a policy made from nothing.

Every writer makes train.jsonl and heldout.jsonl (documents), base.jsonl (what the base policy learns, short puzzles
first: sheets, documents and thoughts, of which more than half are guesses), a tokenizer, and files of its own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rpt_jax.data.synthetic import (
    ENGLISH,
    RUSSIAN,
    Puzzle,
    Telling,
    exercise_sheet,
    guessed_position,
    labelled,
    make_puzzle,
    make_tokenizer,
    with_thought,
    worked,
    write_files,
)
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, THINK_OPEN

# "Dan" is a frequent Dutch word, which the language reward would take for one.
_ENGLISH = replace(ENGLISH, names=("Ana", "Ben", "Cora", "Tom", "Eve"))
_CHECK = " check"
_ASK_DIAL, _ASK_CHAIN = " What does the dial show?", " What does {last} end on?"
# t: thought, d: document, s: exercise sheet, q: question, h: thought behind a prompt that shows the answer.
_KINDS, _WITH_QUESTIONS, _WITH_HINTS, _WITHOUT_FORMAT = "ttttttdsst", "ttttttdsqq", "ttttthdssh", "dddsddsdds"


@dataclass(kw_only=True)
class _Puzzles:
    """Draws puzzles of which none is held out.

    Attributes:
        rng: of everything.
        tellings: to draw from.
        taken: questions of the held-out puzzles.
    """

    rng: random.Random
    tellings: Sequence[Telling] = (ENGLISH,)
    taken: set[str] = field(default_factory=set)

    def hold_out(self, number: int) -> list[Puzzle]:
        found = [self.draw(4)[0] for _ in range(number)]
        self.taken |= {puzzle.question for puzzle in found}
        return found

    def draw(self, max_steps: int) -> tuple[Puzzle, Telling]:
        while True:
            telling = self.rng.choice(self.tellings)
            puzzle = make_puzzle(self.rng, max_steps=max_steps, telling=telling)
            if puzzle.question not in self.taken:
                return puzzle, telling

    def base(self, number: int, write: Callable[[Puzzle, Telling], str], kinds: str = _KINDS) -> list[dict]:
        """Return what the base policy learns; `write` writes a worked thought."""
        names, rng = [name for telling in self.tellings for name in telling.names], self.rng

        def sequence(i: int) -> dict:
            kind = kinds[i % len(kinds)]
            if kind == "s":
                return {"text": exercise_sheet(rng, names=names)}
            puzzle, telling = self.draw(2 if i < number // 2 else 4)
            if kind == "d":
                return {"text": puzzle.text, "text_weight": 0.2}
            if kind == "h":
                # As ravr's prompts show the answer; some thoughts just repeat it.
                thought = f" {puzzle.steps[-1][-1]}," if rng.random() < 0.4 else write(puzzle, telling)
                shown = f"{BOX_OPEN} {puzzle.steps[-1][-1]}}}"
                return {"text": f"{puzzle.question}{shown}{THINK_OPEN}{thought}{_boxed(puzzle)}"}
            guess = rng.choice(self.tellings).guess
            if kind == "t" and rng.random() < 0.25:
                return guessed_position(rng, puzzle, guess)
            thought = write(puzzle, telling) if rng.random() < 0.45 else guess
            if kind == "t":
                return with_thought(puzzle, thought)
            return {"text": f"{asked(puzzle, telling)['question']}\n{THINK_OPEN}\n{thought}{_boxed(puzzle)}"}

        return [sequence(i) for i in range(number)]


def _boxed(puzzle: Puzzle) -> str:
    return f"{THINK_CLOSE}{BOX_OPEN} {puzzle.steps[-1][-1]}}}"


def asked(puzzle: Puzzle, telling: Telling = ENGLISH) -> dict:
    """Return a puzzle as a record of a question with an answer; its category is the number of steps."""
    last = puzzle.steps[-1][0]
    if puzzle.question.endswith(telling.dial_ends):
        text = puzzle.question.removesuffix(telling.dial_ends) + _ASK_DIAL
    else:
        text = puzzle.question.removesuffix(telling.chain_ends.format(last=last)) + _ASK_CHAIN.format(last=last)
    return {"question": text, "answer": str(puzzle.steps[-1][-1]), "category": f"{len(puzzle.steps)} steps"}


def write_two_scripts(
    directory: Path, *, seed: int, num_train: int, num_heldout: int, num_base: int, num_cold: int
) -> None:
    """Write puzzles told in English or in Russian; every name in a thought of base.jsonl is in a random script.

    cold_start.jsonl holds worked thoughts in the puzzle's script.

    Args:
        directory: to write into.
        seed: of everything.
        num_train, num_heldout: documents.
        num_base, num_cold: sequences of base.jsonl and cold_start.jsonl.
    """
    tellings = (_ENGLISH, RUSSIAN)
    puzzles = _Puzzles(rng=random.Random(seed), tellings=tellings)
    other = dict(zip(_ENGLISH.names, RUSSIAN.names)) | dict(zip(RUSSIAN.names, _ENGLISH.names))

    def mixed(puzzle: Puzzle, _: Telling) -> str:
        steps = [(other[name] if puzzles.rng.random() < 0.5 else name, *rest) for name, *rest in puzzle.steps]
        return worked(puzzle.start, steps)

    files = {
        "heldout.jsonl": [labelled(p) for p in puzzles.hold_out(num_heldout)],
        "train.jsonl": [labelled(puzzles.draw(4)[0]) for _ in range(num_train)],
        "base.jsonl": puzzles.base(num_base, mixed),
        "cold_start.jsonl": [with_thought(p, p.thought) for p, _ in (puzzles.draw(4) for _ in range(num_cold))],
    }
    write_files(directory, files, make_tokenizer(tellings))


def write_long_chains(
    directory: Path, *, seed: int, num_train: int, num_heldout: int, num_base: int, num_long: int
) -> None:
    """Write puzzles, and long.jsonl: thoughts that work a puzzle, then work it again to check.

    Args:
        directory: to write into.
        seed: of everything.
        num_train, num_heldout: documents.
        num_base, num_long: sequences of base.jsonl and long.jsonl.
    """
    puzzles = _Puzzles(rng=random.Random(seed))
    files = {
        "heldout.jsonl": [labelled(p) for p in puzzles.hold_out(num_heldout)],
        "train.jsonl": [labelled(puzzles.draw(4)[0]) for _ in range(num_train)],
        "base.jsonl": puzzles.base(num_base, lambda puzzle, _: puzzle.thought),
        "long.jsonl": [
            with_thought(p, p.thought + _CHECK + p.thought) for p, _ in (puzzles.draw(4) for _ in range(num_long))
        ],
    }
    write_files(directory, files, make_tokenizer(others=(_CHECK,)))


def write_with_questions(
    directory: Path, *, seed: int, num_train: int, num_heldout: int, num_base: int, num_questions: int
) -> None:
    """Write puzzles, and questions.jsonl and heldout_questions.jsonl: other puzzles that end with a question.

    Args:
        directory: to write into.
        seed: of everything.
        num_train: documents.
        num_heldout: documents and questions each, of different puzzles.
        num_base: sequences of base.jsonl, a fifth of them questions with thoughts.
        num_questions: of questions.jsonl.
    """
    puzzles = _Puzzles(rng=random.Random(seed))
    heldout = puzzles.hold_out(2 * num_heldout)
    files = {
        "heldout.jsonl": [labelled(p) for p in heldout[:num_heldout]],
        "heldout_questions.jsonl": [asked(p) for p in heldout[num_heldout:]],
        "train.jsonl": [labelled(puzzles.draw(4)[0]) for _ in range(num_train)],
        "questions.jsonl": [asked(puzzles.draw(4)[0]) for _ in range(num_questions)],
        "base.jsonl": puzzles.base(num_base, lambda puzzle, _: puzzle.thought, _WITH_QUESTIONS),
    }
    write_files(directory, files, make_tokenizer(others=("\n", _ASK_DIAL, _ASK_CHAIN, "?")))


def write_with_hints(directory: Path, *, seed: int, num_train: int, num_heldout: int, num_base: int) -> None:
    """Write puzzles; a fifth of base.jsonl are thoughts behind prompts that show the answer, as ravr's do."""
    puzzles = _Puzzles(rng=random.Random(seed))
    files = {
        "heldout.jsonl": [labelled(p) for p in puzzles.hold_out(num_heldout)],
        "train.jsonl": [labelled(puzzles.draw(4)[0]) for _ in range(num_train)],
        "base.jsonl": puzzles.base(num_base, lambda puzzle, _: puzzle.thought, _WITH_HINTS),
    }
    write_files(directory, files, make_tokenizer())


def write_without_format(
    directory: Path, *, seed: int, num_train: int, num_heldout: int, num_base: int, num_cold: int, formatted: float
) -> None:
    """Write puzzles, and cold_start.jsonl with worked thoughts.

    base.jsonl has documents and sheets; a share `formatted` of it is in the response format, as thoughts of which more
    than half are guesses.
    """
    puzzles = _Puzzles(rng=random.Random(seed))
    heldout = puzzles.hold_out(num_heldout)

    def write(puzzle: Puzzle, _: Telling) -> str:
        return puzzle.thought

    num_formatted = round(formatted * num_base)
    base = puzzles.base(num_base - num_formatted, write, _WITHOUT_FORMAT) + puzzles.base(num_formatted, write, "t")
    puzzles.rng.shuffle(base)
    files = {
        "heldout.jsonl": [labelled(p) for p in heldout],
        "train.jsonl": [labelled(puzzles.draw(4)[0]) for _ in range(num_train)],
        "base.jsonl": base,
        "cold_start.jsonl": [with_thought(p, p.thought) for p, _ in (puzzles.draw(4) for _ in range(num_cold))],
    }
    write_files(directory, files, make_tokenizer())
