"""What people see: progress, tables, errors. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[float], None]
QUIET_S = 5.0  # seconds between plain progress lines of one stage


def print_error(message: str, code: int, as_json: bool) -> None:
    """One line for people, or one object for machines."""
    line = " ".join(message.split())
    if as_json:
        print_json({"error": line, "exit_code": code})
    else:
        print(f"error: {line}", file=sys.stderr)  # noqa: T201 (this is where the program prints)


def print_note(text: str) -> None:
    """A line for people that is no result: on stderr."""
    print(f"note: {text}", file=sys.stderr)  # noqa: T201


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))  # noqa: T201


def print_line(text: str = "") -> None:
    """A line on stdout."""
    print(text)  # noqa: T201


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn for a terminal, aligned plain text for a pipe."""
    if sys.stdout.isatty():
        _draw_table(title, columns, rows)
        return
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    for row in (columns, *rows):
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _draw_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


class PlainWatch:
    """Progress as lines, for pipes and logs: a stage begins, every few seconds how far it is, how long it took."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._left = list(stages)
        self._count = len(self._left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def found(self, name: str) -> None:
        """A stage that an earlier run finished."""
        self._say(f"{name}: finished by an earlier run")

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """A stage under way."""
        begun = shown = time.monotonic()
        self._say(name)

        def report(fraction: float) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= QUIET_S and fraction > 0:
                shown = now
                left_s = (now - begun) * (1 - fraction) / fraction
                self._say(f"{name}: {fraction:.0%}, {left_s:.0f} s left")

        yield report
        self._say(f"{name}: done in {time.monotonic() - begun:.1f} s")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class BarWatch:
    """Progress as bars with time left, for a terminal: one for the stage, one for the whole road."""

    def __init__(self, stages: Sequence[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        own = open(os.dup(sys.stderr.fileno()), "w")  # noqa: SIM115, PTH123 (a target may mute fd 2 while bars go on)
        self._progress: Progress = Progress(*columns, console=Console(file=own))
        self._whole: TaskID = self._progress.add_task("all stages", total=len(stages))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def found(self, name: str) -> None:
        """A stage that an earlier run finished."""
        self._progress.add_task(f"{name} (finished by an earlier run)", total=1, completed=1)
        self._progress.advance(self._whole)

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """A stage under way."""
        task = self._progress.add_task(name, total=None)

        def report(fraction: float) -> None:
            self._progress.update(task, total=1.0, completed=fraction)

        yield report
        self._progress.update(task, total=1.0, completed=1.0)
        self._progress.advance(self._whole)


def watch(stages: Sequence[str]) -> PlainWatch | BarWatch:
    """Bars where stderr is a terminal, lines where it is not."""
    return BarWatch(stages) if sys.stderr.isatty() else PlainWatch(stages)
