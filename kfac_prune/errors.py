"""The package's error for input that cannot be used, and how values are quoted in its messages."""

from typing import Any


class InputError(ValueError):
    """A user's input cannot be used.

    The message is one line that names what cannot be used, the numbers and the remedy; the command line prints it as it
    stands and exits with 2.
    """


def shown(value: Any) -> str:
    """A value as it is quoted in a message: one line of moderate length, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of over 4300 digits
        return "a number of thousands of digits"
    return shorten(text, 200)


def shorten(text: str, most: int) -> str:
    """A text of at most so many characters, and how many there were."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


def reason(error: Exception) -> str:
    """An error's first line, with the second where the first only announces it."""
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
