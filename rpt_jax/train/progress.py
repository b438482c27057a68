"""What a person sees during a run: a console on stderr and progress bars."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rpt_jax.parallel.interruption import check_alone

console = Console(stderr=True)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator:
    """Show a rich progress bar; yield update(completed, note, new total if given).

    Args:
        description: text before the bar.
        total: number of items; None if unknown.
    """
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
