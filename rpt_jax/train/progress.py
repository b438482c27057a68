"""What a person sees during a run: a console on stderr, and progress as bars or lines."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rpt_jax.parallel.interruption import check_alone

console = Console(stderr=True)


# Without a terminal, a line at least this often while work is done, seconds.
_LINE_SECONDS = 30.0


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator:
    """Show progress; yield update(completed, note, new total if given).

    A terminal gets a bar. A file or a pipe gets plain lines: the first item, one every half minute, and the last.

    Args:
        description: text before the bar.
        total: number of items; None if unknown.
    """
    if not console.is_terminal:
        lines = _Lines(description, total)
        yield lines.update
        lines.end()
        return
    columns = (
        TextColumn("[bold]{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda completed, note="", total=None: progress.update(task, completed=completed, note=note, total=total)


class _Lines:
    """Progress as plain lines."""

    def __init__(self, description: str, total: int | None):
        self._description, self._total, self._note = description, total, ""
        self._done, self._printed, self._first = 0, -1, None
        self._begin = self._last = time.monotonic()

    def update(self, completed: int, note: str = "", total: int | None = None) -> None:
        """Note the progress, and print it if it is time."""
        self._done, self._note = completed, note
        self._total = self._total if total is None else total
        now = time.monotonic()
        if self._first is None:
            # A resumed stage does not begin at 0, and the first item compiles: neither counts in the estimate.
            self._first = (completed, now)
        if self._printed < 0 or now - self._last >= _LINE_SECONDS or completed == self._total:
            self._print(now)

    def end(self) -> None:
        """Print what is not printed yet."""
        if self._printed != self._done:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        total = "" if self._total is None else f"/{self._total}"
        words = [f"{self._description:<12} {self._done}{total}", f"{_clock(now - self._begin)} elapsed"]
        first, since = self._first or (0, self._begin)
        if self._total and self._done > first and self._done < self._total:
            words.append(f"{_clock((now - since) / (self._done - first) * (self._total - self._done))} left")
        console.print("  ".join([*words, self._note]).rstrip(), highlight=False, soft_wrap=True)
        self._last, self._printed = now, self._done


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def tracked(description: str, batches: Iterable) -> Iterable:
    """Yield the batches and show how many are done."""
    batches = list(batches)
    with progress_bar(description, len(batches)) as progress:
        for number, batch in enumerate(batches, start=1):
            yield batch
            progress(number)


def counted(description: str, items: Iterable) -> Iterable:
    """Yield the items and show how many are done, without a known total."""
    with progress_bar(description, None) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            check_alone()
            if number % 100 == 0:
                progress(number)
