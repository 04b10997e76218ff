"""Output to a terminal: names of files and classes appear as they are, and never control it.

Data sets come from anywhere. A name may hold sequences that clear or retitle a terminal, or text that looks like rich's
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

# C0 except tab and line feed, DEL, C1, marks and overrides of direction, line separators, undecodable bytes.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return the text with every character that controls a terminal escaped, as in ``\\x1b``."""
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def plotted(text: str) -> str:
    """Return the text for matplotlib, with escaped dollar signs, which would enclose a formula."""
    return shown(text).replace("$", r"\$")


def command_line(*words: object, overrides: Sequence[str] = ()) -> str:
    """Return a cpn-fast command, quoted for a shell."""
    settings = (part for override in overrides for part in ("--set", override))
    return shlex.join(["cpn-fast", *map(str, words), *settings])


class _Escaping:
    """A text stream that writes ``shown`` text. Everything else is the wrapped stream's."""

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
    """Escape everything that is printed to standard output and standard error in the block."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Escaping(sys.stdout), _Escaping(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def console(*, stderr: bool = False) -> Console:
    """Return rich's console of standard output or error.

    Rich's own sequences pass. Markup and emoji codes in strings have no effect.
    """
    stream = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, _Escaping) else stream
    return _Console(file=file, markup=False, emoji=False, highlight=False)
