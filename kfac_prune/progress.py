"""Progress of long work: a bar on a terminal, elsewhere (in the log of a job) a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

#: Seconds between two lines, and before the first: short work prints none.
EVERY = 30.0


def progress(*arguments: Any, **options: Any) -> tqdm[Any]:
    """``tqdm`` with these arguments, in lines where standard error is no terminal."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "delay": EVERY, "mininterval": EVERY, "maxinterval": EVERY, "leave": False}
        options |= {"ncols": 0}  # figures alone, no bar
    return tqdm(*arguments, **options)


class _Lines:
    """A file for what tqdm writes over and over: every state is a line of its own."""

    def write(self, text: str) -> None:
        """To standard error, whichever it is now."""
        if line := text.replace("\x1b[A", "").strip("\r\n "):  # it moves up from bars within bars
            print(line, file=sys.stderr)

    def flush(self) -> None:
        """Show it."""
        sys.stderr.flush()
