"""What reaches a terminal: names of files and classes are shown as they are, and never act on it.

Data sets come from anywhere. A name may hold sequences that wipe or retitle a terminal, or what rich would take for
markup. So everything that commands print goes through ``escaping``, and every table through ``console``.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.text import Text

# C0 without tab and line feed, DEL, C1, marks and overrides of direction, line separators, undecodable bytes.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """The text with characters that act on a terminal escaped, as in ``\\x1b``."""
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def plotted(text: str) -> str:
    """The text for matplotlib, which takes what stands between dollar signs for a formula."""
    return shown(text).replace("$", r"\$")


def command_line(*words: object, overrides: Sequence[str] = ()) -> str:
    """A command of ours as a shell takes it."""
    settings = (part for override in overrides for part in ("--set", override))
    return shlex.join(["cpn-fast", *map(str, words), *settings])


class _Escaping:
    """A text stream that shows what is written to it. All else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(shown(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaping() -> Iterator[None]:
    """Standard output and standard error show what is printed, in the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Escaping(sys.stdout), _Escaping(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def console(*, stderr: bool = False) -> Console:
    """Rich's console of standard output or error. Its own sequences pass; strings hold no markup and no emoji codes."""
    stream = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, _Escaping) else stream
    return _Console(file=file, markup=False, emoji=False, highlight=False)
