"""The output of the command line while it works: progress, colours, and text for any terminal."""

import codecs
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

# Seconds between two lines of progress that is written to a log or a pipe, not drawn as a bar.
_BETWEEN_LINES = 30.0
_COMPILING = "{desc}compiling ..."
_IN_ASCII = str.maketrans(
    {"±": "+-", "─": "-", "│": "|", "…": "...", "·": "."} | dict.fromkeys("╭╮╰╯├┤┬┴┼", "+")
)
_ERRORS = "experiments.terminal"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
T = TypeVar("T")


class Silent:
    """Progress that is not shown; it is also the interface of the classes that show it."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the progress."""

    def compiling(self, description: str = "") -> None:
        """Says that something is being compiled, until the next `update`."""

    def update(self, count: int = 1) -> None:
        """Counts so many more as done."""


class Progress(Silent):
    """A progress bar on a terminal, and elsewhere a plain line from time to time.

    Nothing is shown before the first `update` or `compiling`. While something is compiled, the bar
    says so instead of showing a count that does not change.
    """

    def __init__(self, total: int, unit: str = "step"):
        self._total, self._unit, self._done, self._description = total, unit, 0, ""
        self._compiling = False
        self._drawn = draws(sys.stderr)
        self._bar: Any = None
        self._began = self._written = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        """Ends the progress."""
        if self._bar is not None:
            self._bar.close()

    def compiling(self, description: str = "") -> None:
        """Says that something is being compiled, until the next `update`."""
        self._description = description or self._description
        if not self._compiling and not self._drawn:
            self._write("compiling ...")
        self._compiling = True
        if self._drawn:
            self._draw()

    def update(self, count: int = 1) -> None:
        """Counts so many more as done."""
        self._done += count
        if self._drawn:
            first = self._compiling or self._bar is None
            self._compiling = False
            bar = self._draw()
            if first:
                bar.unpause()  # Compiling does not count for the speed.
            bar.update(count)
            if first:
                bar.refresh()
            return
        self._compiling = False
        due = time.monotonic() - self._written >= _BETWEEN_LINES
        if due or self._done == self._total:
            seconds = time.monotonic() - self._began
            self._write(f"{self._done:,}/{self._total:,} {self._unit}s, {seconds:.0f} s")

    def _draw(self) -> Any:
        so_far = " ({n_fmt}/{total_fmt} {unit}s done)" if self._done else ""
        form = _COMPILING + so_far if self._compiling else None
        # As tqdm's own `set_description` has it.
        description = f"{self._description}: " if self._description else ""
        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                unit=self._unit,
                dynamic_ncols=True,
                file=sys.stderr,
                desc=description,
                bar_format=form,
            )
            return self._bar
        changed = (self._bar.bar_format, self._bar.desc) != (form, description)
        self._bar.bar_format, self._bar.desc = form, description
        if changed and self._compiling:
            self._bar.refresh()
        return self._bar

    def _write(self, text: str) -> None:
        start = f"{self._description}: " if self._description else ""
        print(start + text, file=sys.stderr, flush=True)
        self._written = time.monotonic()


def each(items: Iterable[T], description: str, unit: str) -> Iterator[T]:
    """Yields the items, and shows how many of them have been used."""
    items = list(items)
    with Progress(len(items), unit) as progress:
        progress.compiling(description)
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """A duration as text, in a suitable unit from seconds to years."""
    for size, unit in (
        (31_536_000, "year"),
        (86_400, "day"),
        (3_600, "hour"),
        (60, "minute"),
        (1, "second"),
    ):
        if seconds >= 2 * size or size == 1:
            return f"{max(round(seconds / size), 1):,} {unit}s"
    raise AssertionError


def draws(stream: TextIO) -> bool:
    """Whether a stream is a terminal, with a size, on which lines can be overwritten."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


def has_colours(stream: TextIO) -> bool:
    """Whether to write in colours: on a terminal or with FORCE_COLOR, and never with NO_COLOR.

    See https://no-color.org.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or draws(stream)


class WithoutColours:
    """A stream without colours, unless it is a terminal that is to have them.

    Code that asks whether the stream is a terminal gets the answer. Colours from code that does not
    ask, such as older versions of tyro, are taken away.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def isatty(self) -> bool:
        """Whether to write in colours."""
        return has_colours(self._stream)

    def write(self, text: str) -> int:
        """Writes text to the stream, without its colours unless the stream is to have them."""
        return self._stream.write(text if self.isatty() else _COLOUR.sub("", text))

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_anything(*streams: Any) -> None:
    """Lets streams replace characters that they cannot encode: ± by +-, others by their number."""
    codecs.register_error(_ERRORS, _replace)
    for stream in streams:
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors=_ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_IN_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
