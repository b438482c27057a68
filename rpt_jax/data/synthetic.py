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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer, word_level


@dataclass(frozen=True, kw_only=True)
class Telling:
    """The words that puzzles are told in. Those of two languages correspond, so that thoughts can mix them.

    Attributes:
        names: of people. Five: with eight, ln 8 nats of free choice would look like difficulty.
        openings, closings: sentences around a puzzle.
        shows, picks: how a dial and a chain of people begin.
        dial, chain: for each operation, sentences with {name}, {n} and, in chains, {last}.
        dial_ends, chain_ends: what precedes the result.
        guess: a thought without work.
    """

    names: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    shows: str
    picks: str
    dial: dict[str, tuple[str, ...]]
    chain: dict[str, tuple[str, ...]]
    dial_ends: str
    chain_ends: str
    guess: str

    @property
    def phrases(self) -> list[str]:
        """Return every phrase of puzzles, with its blanks."""
        steps = [p for wording in (self.dial, self.chain) for options in wording.values() for p in options]
        ends = [self.shows, self.picks, self.dial_ends, self.chain_ends]
        return [*self.openings, *self.closings, self.guess, *ends, *steps]


ENGLISH = Telling(
    names=("Ana", "Ben", "Cora", "Dan", "Eve"),
    openings=(
        "It rained all day on the hill.",
        "The old shop by the sea was shut.",
        "They sat by the fire for a game.",
        "Nobody in the room had said a word.",
    ),
    closings=(
        " They wrote it down and went home.",
        " Then the lamp by the door went out.",
        " Nobody had seen it coming.",
        " It was late when they left the room.",
    ),
    shows=" The dial on the safe shows {value}.",
    picks=" {name} picks {value}.",
    dial={
        "+": (" {name} winds it on by {n}.", " {name} turns it up by {n}."),
        "-": (" {name} winds it back by {n}.", " {name} turns it down by {n}."),
        "*": (" {name} doubles the number.", " {name} makes it twice as much."),
    },
    chain={
        "+": (" {name} takes {last} plus {n}.", " {name} adds {n} to {last}."),
        "-": (" {name} takes {last} minus {n}.", " {name} takes {n} from {last}."),
        "*": (" {name} takes twice {last}.", " {name} doubles {last}."),
    },
    dial_ends=" Now the dial shows",
    chain_ends=" So {last} ends on",
    guess=" A guess.",
)
RUSSIAN = Telling(
    names=("Аня", "Боря", "Вера", "Глеб", "Ева"),
    openings=(
        "Весь день над холмом шёл дождь.",
        "Старая лавка у моря была закрыта.",
        "Они сели у огня играть.",
        "Никто в доме не сказал ни слова.",
    ),
    closings=(
        " Они записали это и ушли домой.",
        " Потом погасла лампа у двери.",
        " Никто этого не ждал.",
        " Было поздно, когда все вышли.",
    ),
    shows=" Диск на сейфе показывает {value}.",
    picks=" {name} выбирает {value}.",
    dial={
        "+": (" {name} крутит вперёд на {n}.", " {name} прибавляет ещё {n}."),
        "-": (" {name} крутит назад на {n}.", " {name} убавляет на {n}."),
        "*": (" {name} удваивает число.", " {name} делает вдвое больше."),
    },
    chain={
        "+": (" {name} берёт {last} плюс {n}.", " {name} добавляет {n} к {last}."),
        "-": (" {name} берёт {last} минус {n}.", " {name} отнимает {n} от {last}."),
        "*": (" {name} берёт дважды {last}.", " {name} удваивает {last}."),
    },
    dial_ends=" Теперь диск показывает",
    chain_ends=" Итак, у {last} выходит",
    guess=" Наугад.",
)
_PIECES = re.compile(r"</?think>|\\boxed\{| ?[^\W\d_]+| ?[0-9]|.", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One document and its solution.

    Attributes:
        text: the whole document.
        answer_offset: byte offset of the determined result, including its leading space.
        start: value before the first operation.
        steps: (name, operation, operand, value after it) of each operation that leads to the result.
    """

    text: str
    answer_offset: int
    start: int
    steps: tuple[tuple[str, str, int, int], ...]

    @property
    def question(self) -> str:
        """Return the text before the result."""
        return self.text.encode()[: self.answer_offset].decode()

    @property
    def thought(self) -> str:
        """Return the worked steps, e.g. " 6, Dan+ 4 0, Ana* 2 0,"."""
        return worked(self.start, self.steps)


def worked(start: int, steps: Iterable[tuple[str, str, int, int]]) -> str:
    """Return a worked thought; arguments as in `Puzzle`."""
    return f" {start}," + "".join(f" {name}{op} {n} {value}," for name, op, n, value in steps)


def _apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * 2}[op] % 10


def _operation(rng: random.Random) -> tuple[str, int]:
    op = rng.choice("+-*")
    return op, 2 if op == "*" else rng.randint(1, 4)


def make_puzzle(rng: random.Random, *, max_steps: int, telling: Telling = ENGLISH) -> Puzzle:
    """Make a random dial or chain document with 1 to `max_steps` (at most 4) operations."""
    names = rng.sample(telling.names, 5)
    start = value = rng.randrange(10)
    is_dial = rng.random() < 0.5
    last = names.pop()
    text = rng.choice(telling.openings)
    text += (telling.shows if is_dial else telling.picks).format(value=value, name=last)
    steps = []
    for _ in range(rng.randint(1, max_steps)):
        name, (op, n) = names.pop(), _operation(rng)
        value = _apply(value, op, n)
        text += rng.choice((telling.dial if is_dial else telling.chain)[op]).format(name=name, last=last, n=n)
        steps.append((name, op, n, value))
        last = name
    text += (telling.dial_ends if is_dial else telling.chain_ends).format(last=last)
    return Puzzle(
        text=f"{text} {value}.{rng.choice(telling.closings)}",
        answer_offset=len(text.encode()),
        start=start,
        steps=tuple(steps),
    )


def exercise_sheet(rng: random.Random, num_facts: int = 12, names: Sequence[str] = ENGLISH.names) -> str:
    """Make a sequence of the steps that thoughts consist of; thoughts alone are too sparse to learn from."""
    start = value = rng.randrange(10)
    steps = []
    for _ in range(num_facts):
        op, n = _operation(rng)
        value = _apply(value, op, n)
        steps.append((rng.choice(names), op, n, value))
    return worked(start, steps)


def with_thought(puzzle: Puzzle, thought: str) -> dict:
    """Return the puzzle's question with a completion in the response format: the thought, and the result."""
    target = _PIECES.match(puzzle.text, len(puzzle.question))[0]
    return {"text": puzzle.question, "completion": f"{thought}{THINK_CLOSE}{BOX_OPEN}{target}}}"}


def guessed_position(rng: random.Random, puzzle: Puzzle, thought: str) -> dict:
    """Cut a document at a free position, and add a thought and the piece that follows."""
    starts = [m.start() for m in _PIECES.finditer(puzzle.text)]
    offset = rng.choice(starts[16:])
    target = _PIECES.match(puzzle.text, offset)[0]
    return {"text": puzzle.text[:offset], "completion": f"{thought}{THINK_CLOSE}{BOX_OPEN}{target}}}"}


def _worked_thought(rng: random.Random, puzzle: Puzzle) -> dict:
    """Cut a document at a position and add a completion in the response format.

    Three in four cuts are at the result, the others at free positions. More than half of the thoughts at the result,
    and all at free positions, are just a guess: thinking, and thinking correctly, is left for RPT to learn.
    """
    if rng.random() < 0.75:
        return with_thought(puzzle, puzzle.thought if rng.random() < 0.45 else ENGLISH.guess)
    return guessed_position(rng, puzzle, ENGLISH.guess)


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
                sequences.append({"text": exercise_sheet(rng)})
            else:
                # Weighted like the contexts of thoughts; otherwise plain text dominates the few tokens of a thought.
                sequences.append({"text": draw(max_steps).text, "text_weight": 0.2})
    return sequences


def make_tokenizer(tellings: Sequence[Telling] = (ENGLISH,), others: Sequence[str] = ()) -> Tokenizer:
    """Make a closed vocabulary: words, digits and marks, with response marks as single entries.

    Args:
        tellings: whose words it holds.
        others: further phrases.
    """
    phrases = [*others, *(phrase for telling in tellings for phrase in telling.phrases)]
    entries = {piece for p in phrases for piece in _PIECES.findall(re.sub(r" ?\{\w+\}", "", p))}
    entries |= {f" {name}" for telling in tellings for name in telling.names} | {f" {digit}" for digit in range(10)}
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
    heldout = [make_puzzle(rng, max_steps=4) for _ in range(num_heldout)]
    taken = {p.question for p in heldout}

    def draw(max_steps: int) -> Puzzle:
        while (puzzle := make_puzzle(rng, max_steps=max_steps)).question in taken:
            pass
        return puzzle

    files = {
        "heldout.jsonl": [labelled(p) for p in heldout],
        "train.jsonl": [labelled(draw(4)) for _ in range(num_train)],
        "warm_start.jsonl": _warm_start(rng, draw, short_sequences=short_sequences, long_sequences=long_sequences),
    }
    write_files(directory, files, make_tokenizer())


def labelled(puzzle: Puzzle) -> dict:
    """Return the record of a document whose determined position is labelled."""
    return {"text": puzzle.text, "position_labels": [[puzzle.answer_offset, f"determined/{len(puzzle.steps)}"]]}


def write_files(directory: Path, files: dict[str, list[dict]], tokenizer: Tokenizer) -> None:
    """Write jsonl files into `directory`; the tokenizer last, so that its presence means that all are complete."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (directory / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer.save(directory / "tokenizer")
