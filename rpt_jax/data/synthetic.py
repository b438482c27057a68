"""A corpus of worked puzzles on which thinking helps by construction, for experiments that take minutes on a CPU.

A document is an opening sentence, a puzzle over digits mod 10, its result, and a closing sentence. The text before it
determines only the result; names, verbs and operands are free. One forward pass of a small model cannot chain the
steps, but a written thought can.

The files are train.jsonl and heldout.jsonl (documents; the position of the result is labelled `determined/k` for k
steps), warm_start.jsonl (exercise sheets, plain documents and worked thoughts in training order, short puzzles first),
and the closed vocabulary as a tokenizer directory.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer, word_level

# Five names: with eight, ln 8 nats of free choice would look like difficulty.
_NAMES = ("Ana", "Ben", "Cora", "Dan", "Eve")
_OPENINGS = (
    "It rained all day on the hill.",
    "The old shop by the sea was shut.",
    "They sat by the fire for a game.",
    "Nobody in the room had said a word.",
)
_CLOSINGS = (
    " They wrote it down and went home.",
    " Then the lamp by the door went out.",
    " Nobody had seen it coming.",
    " It was late when they left the room.",
)
_DIAL = {
    "+": (" {name} winds it on by {n}.", " {name} turns it up by {n}."),
    "-": (" {name} winds it back by {n}.", " {name} turns it down by {n}."),
    "*": (" {name} doubles the number.", " {name} makes it twice as much."),
}
_CHAIN = {
    "+": (" {name} takes {last} plus {n}.", " {name} adds {n} to {last}."),
    "-": (" {name} takes {last} minus {n}.", " {name} takes {n} from {last}."),
    "*": (" {name} takes twice {last}.", " {name} doubles {last}."),
}
_GUESS = " A guess."
_PIECES = re.compile(r"</?think>|\\boxed\{| ?[A-Za-z]+| ?[0-9]|.")


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One document and its solution.

    Attributes:
        text: the whole document.
        answer_offset: byte offset of the determined result, including its leading space.
        num_steps: number of operations that lead to it.
        thought: the worked steps, e.g. " 6, Dan+ 4 0, Ana* 2 0,".
    """

    text: str
    answer_offset: int
    num_steps: int
    thought: str


def _apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * 2}[op] % 10


def _operation(rng: random.Random) -> tuple[str, int]:
    op = rng.choice("+-*")
    return op, 2 if op == "*" else rng.randint(1, 4)


def make_puzzle(rng: random.Random, *, max_steps: int) -> Puzzle:
    """Make a random dial or chain document with 1 to `max_steps` (at most 4) operations."""
    names = rng.sample(_NAMES, 5)
    value = rng.randrange(10)
    is_dial = rng.random() < 0.5
    first = names.pop()
    text = rng.choice(_OPENINGS)
    text += f" The dial on the safe shows {value}." if is_dial else f" {first} picks {value}."
    thought, last = f" {value},", first
    num_steps = rng.randint(1, max_steps)
    for _ in range(num_steps):
        name, (op, n) = names.pop(), _operation(rng)
        value = _apply(value, op, n)
        text += rng.choice((_DIAL if is_dial else _CHAIN)[op]).format(name=name, last=last, n=n)
        thought += f" {name}{op} {n} {value},"
        last = name
    text += " Now the dial shows" if is_dial else f" So {last} ends on"
    return Puzzle(
        text=f"{text} {value}.{rng.choice(_CLOSINGS)}",
        answer_offset=len(text.encode()),
        num_steps=num_steps,
        thought=thought,
    )


def _exercise_sheet(rng: random.Random, num_facts: int = 12) -> str:
    """Make a sequence of the steps that thoughts consist of; thoughts alone are too sparse to learn from."""
    value = rng.randrange(10)
    text = f" {value},"
    for _ in range(num_facts):
        op, n = _operation(rng)
        value = _apply(value, op, n)
        text += f" {rng.choice(_NAMES)}{op} {n} {value},"
    return text


def _worked_thought(rng: random.Random, puzzle: Puzzle) -> dict:
    """Cut a document at a position and add a completion in the response format.

    Three in four cuts are at the result, the others at free positions. More than half of the thoughts at the result,
    and all at free positions, are just a guess: thinking, and thinking correctly, is left for RPT to learn.
    """
    text = puzzle.text.encode()
    if rng.random() < 0.75:
        offset = puzzle.answer_offset
        thought = puzzle.thought if rng.random() < 0.45 else _GUESS
    else:
        starts = [m.start() for m in _PIECES.finditer(puzzle.text)]
        offset, thought = rng.choice(starts[16:]), _GUESS
    target = _PIECES.match(puzzle.text, offset)[0]
    return {"text": text[:offset].decode(), "completion": f"{thought}{THINK_CLOSE}{BOX_OPEN}{target}}}"}


def _warm_start(rng: random.Random, draw, *, short_sequences: int, long_sequences: int) -> list[dict]:
    """Make the warm start in training order: puzzles of one or two steps first, because the transition to reading steps
    off a text does not occur within 300 steps of mixed lengths. The second part has fewer sheets: their arithmetic is
    learned by then."""
    sequences = []
    for max_steps, count, kinds in ((2, short_sequences, "tttttttdss"), (4, long_sequences, "ttttttttds")):
        for number in range(count):
            kind = kinds[number % len(kinds)]
            if kind == "t":
                sequences.append(_worked_thought(rng, draw(max_steps)))
            elif kind == "s":
                sequences.append({"text": _exercise_sheet(rng)})
            else:
                # Weighted like the contexts of thoughts; otherwise plain text dominates the few tokens of a thought.
                sequences.append({"text": draw(max_steps).text, "text_weight": 0.2})
    return sequences


def make_tokenizer() -> Tokenizer:
    """Make the corpus's closed vocabulary: words, digits and marks, with response marks as single entries."""
    phrases = [*_OPENINGS, *_CLOSINGS, _GUESS, " The dial on the safe shows picks. Now the dial So ends on"]
    phrases += [p for wording in (_DIAL, _CHAIN) for options in wording.values() for p in options]
    entries = {piece for p in phrases for piece in _PIECES.findall(re.sub(r" ?\{\w+\}", "", p))}
    entries |= {f" {name}" for name in _NAMES} | {f" {digit}" for digit in range(10)}
    entries |= {*"+-*,.}", THINK_OPEN, THINK_CLOSE, BOX_OPEN}
    return word_level(sorted(entries))


def write_corpus(
    directory: Path, *, seed: int, num_train: int, num_heldout: int, short_sequences: int, long_sequences: int
) -> None:
    """Write the files listed in the module docstring into `directory`.

    No training document or worked thought shares its puzzle (the text up to the result) with a held-out document.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def question(puzzle: Puzzle) -> str:
        return puzzle.text[: puzzle.answer_offset]

    heldout = [make_puzzle(rng, max_steps=4) for _ in range(num_heldout)]
    taken = {question(p) for p in heldout}

    def draw(max_steps: int) -> Puzzle:
        while question(puzzle := make_puzzle(rng, max_steps=max_steps)) in taken:
            pass
        return puzzle

    def record(puzzle: Puzzle) -> dict:
        return {"text": puzzle.text, "position_labels": [[puzzle.answer_offset, f"determined/{puzzle.num_steps}"]]}

    files = {
        "heldout.jsonl": [record(p) for p in heldout],
        "train.jsonl": [record(draw(4)) for _ in range(num_train)],
        "warm_start.jsonl": _warm_start(rng, draw, short_sequences=short_sequences, long_sequences=long_sequences),
    }
    for name, records in files.items():
        (directory / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    make_tokenizer().save(directory / "tokenizer")
