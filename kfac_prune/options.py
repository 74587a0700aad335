"""Fields of a dataclass that are also command-line options, and checks of what they are given."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, field
from typing import Any

from kfac_prune.errors import InputError, shown

#: Options that name a file or a folder.
PATHS = ("model", "data", "out", "eval_data", "dense", "recipe", "json")


def check_text(name: str, text: str) -> None:
    """A text can be written as UTF-8, and be the name of a file where it is to be one.

    Raises:
        InputError: it cannot; names what it is for.
    """
    if ("\0" in text and name in PATHS) or any(
        "\ud800" <= c <= "\udfff" for c in text
    ):  # how Python holds bytes that are not UTF-8
        raise InputError(f"{name} is {shown(text)}; it must be UTF-8 text without NUL characters")


def option(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A field that is also a command-line option: its default, its help and its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


def check_type(f: dataclasses.Field[Any], value: Any) -> None:
    """The value fits the field's annotation and choices (YAML can bring anything)."""
    optional = f.default is None
    wanted = str(f.type).replace(" | None", "")
    if value is None and optional:
        return
    fits = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(v, str) for v in value),
    }[wanted]
    if not fits:
        kind = "list of texts" if wanted.startswith("tuple") else {"str": "text"}.get(wanted, wanted)
        raise InputError(f"{f.name} is {shown(value)}; it must be of type {kind}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            check_text(f.name, text)
    if isinstance(value, int) and abs(value) >= 10**1000:
        raise InputError(f"{f.name} has over a thousand digits; give a number of usual size")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{f.name} is {shown(value)}; choose one of {', '.join(choices)}")
    assert f.default is not MISSING
