"""A recipe as a YAML file, read (plain values only, every field once), and its paths as one holds them."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from kfac_prune.config import Recipe
from kfac_prune.errors import InputError, shown

#: A recipe has some forty short lines.
MAX_BYTES = 2**20


class _RecipeLoader(yaml.SafeLoader):
    """Reads ``pattern: 2:4`` as text; to YAML 1.1 it is the number 124, written to base 60."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node."""
        if kind is yaml.ScalarNode and implicit[0] and re.fullmatch(r"[0-9]+:[0-9]+", value):
            return "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; none that stands for another one, of which a few lines can make gigabytes."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "a recipe has no aliases", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping; YAML would take the last of two equal keys."""
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{shown(key)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def from_anywhere(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths, which repeats its run from any folder; names of the hub stay."""
    named = {name: os.path.expanduser(getattr(recipe, name) or "") for name in ("model", "data", "eval_data", "out")}
    local = {name: path for name, path in named.items() if name == "out" or os.path.exists(path)}
    paths: Any = {name: os.path.abspath(path) for name, path in local.items()}
    return dataclasses.replace(recipe, **paths)


def read_recipe(path: str) -> dict[str, Any]:
    """The fields that a YAML recipe sets.

    Raises:
        InputError: the file cannot be read, is not a mapping, or has an unknown field.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"the recipe {path} has over {MAX_BYTES:,} bytes; it should be a few lines of YAML")
        text = data.decode()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no such ~user
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    try:
        fields = yaml.load(text, _RecipeLoader)
    except Exception as error:  # a value that does not fit its tag, a date or a number can raise anything there
        raise InputError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise InputError(f"the recipe {path} must be a mapping of fields such as 'sparsity: 0.5'")
    known = [f.name for f in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            raise InputError(f"the recipe {path} has an unknown field {shown(name)}; the fields are {', '.join(known)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
