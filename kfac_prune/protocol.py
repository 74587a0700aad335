"""What a comparison consists of: every method at every level with every seed, each cell the recipe of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kfac_prune.config import ALLOCATIONS, METHODS, OWN_TEXT, SEQUENCE_METHODS, Recipe, parse_pattern
from kfac_prune.errors import InputError

#: Compared where nothing else is asked for: all by their own allocation, and the other ones that are known; but not
#: those that need every sequence's gradient, and with it more memory than a large model leaves.
COMPARED = (
    *(m for m in METHODS if m not in SEQUENCE_METHODS), "magnitude:global", "obd:global", "wanda:owl", "sparsegpt:owl"
)  # fmt: skip
LEVELS = ("50%", "60%", "70%", "80%", "2:4")
#: What follows the one-shot solution.
REPAIRS = ("none", "reconstruction")
#: Recipe fields that no cell decides and that decide what a cell's figures are.
SHARED = (
    "objective", "samples", "seqlen", "batch_size", "own_text", "include", "ignore", "damping", "fisher", "dtype"
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """How much is removed.

    Attributes:
        name: "70%" or "2:4".
        sparsity: fraction of the prunable weights, in (0, 1).
        pattern: "unstructured" or n:m.
    """

    name: str
    sparsity: float
    pattern: str = "unstructured"

    @classmethod
    def parse(cls, text: str) -> Level:
        """``"70%"``, ``"0.7"`` or ``"2:4"``.

        Raises:
            InputError: anything else, or out of range.
        """
        if ":" in text:
            try:
                groups = parse_pattern(text)
            except InputError as error:
                raise InputError(f"levels: {error}") from error
            assert groups is not None
            return cls(text, 1 - groups[0] / groups[1], text)
        try:
            sparsity = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError as error:
            raise InputError(
                f"levels: {text!r} is neither a sparsity such as 70% or 0.7 nor a pattern such as 2:4"
            ) from error
        if not 0 < sparsity < 1:
            raise InputError(f"levels: {text} is out of range; a sparsity must be above 0 and below 100%")
        return cls(f"{100 * sparsity:.10g}%", sparsity)


@dataclass(frozen=True)
class Trial:
    """One method at one level with one seed: the cells that share a plan.

    Attributes:
        method: as given: a method, or method:allocation.
        level: how much is removed.
        recipe: of the run, resolved.
    """

    method: str
    level: Level
    recipe: Recipe


@dataclass(frozen=True)
class Comparison:
    """What to compare, and on what.

    Attributes:
        recipe: model, data, protocol and output folder of all cells, and the first seed. ``reconstruct`` epochs, if
            any, are measured beside the one-shot results.
        methods: of ``METHODS``, each alone or with an allocation, such as "magnitude:global".
        levels: such as "70%", "0.7" or "2:4".
        seeds: how many, from the recipe's on: calibration windows and sampled labels change with it.

    Raises:
        InputError: from the constructor, naming the field and the value.
    """

    recipe: Recipe
    methods: Sequence[str] = COMPARED
    levels: Sequence[str] = LEVELS
    seeds: int = 1
    _levels: tuple[Level, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("methods", "levels"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name at least one")
        if self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}; it must be at least 1")
        if self.recipe.seed + self.seeds > 2**63:
            raise InputError(f"seeds is {self.seeds} from seed {self.recipe.seed} on; all must be below 2^63")
        levels = {level.name: level for level in map(Level.parse, self.levels)}
        object.__setattr__(self, "_levels", tuple(levels.values()))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        for name in self.methods:
            method, _, allocation = name.partition(":")
            if method not in METHODS:
                raise InputError(f"methods: {name!r} is unknown; choose among {', '.join(METHODS)}")
            if ":" in name and allocation not in ALLOCATIONS[method]:
                raise InputError(f"methods: {name!r}: {method} allocates by {' or '.join(ALLOCATIONS[method])}")
        if not self.trials(self.recipe.seed):
            raise InputError(
                f"levels: {', '.join(levels)} fix every layer's sparsity, so that nothing is left for the allocations "
                f"of {', '.join(self.methods)}; add a level such as 70%"
            )

    @property
    def repairs(self) -> tuple[str, ...]:
        """What every trial is measured with."""
        return REPAIRS if self.recipe.reconstruct else REPAIRS[:1]

    @property
    def own_text(self) -> int:
        """Windows that the model writes itself for a reconstruction, per calibration window."""
        return OWN_TEXT if self.recipe.own_text is None else self.recipe.own_text

    def trials(self, seed: int) -> list[Trial]:
        """Those with a seed, level by level; an allocation other than uniform has none where a pattern fixes all."""
        made = []
        for level in self._levels:
            fixed = level.pattern != "unstructured"
            for name in self.methods:
                method, _, allocation = name.partition(":")
                if fixed and allocation not in ("", "uniform"):
                    continue
                own: dict[str, Any] = {"method": method, "pattern": level.pattern, "seed": seed}
                own |= {} if fixed else {"sparsity": level.sparsity, "allocation": allocation or None}
                own["reconstruct"] = self.recipe.reconstruct or 0
                own["own_text"] = self.own_text
                made.append(Trial(name, level, replace(self.recipe, **own).resolved()))
        return made

    def shared(self) -> dict[str, Any]:
        """All options that decide the figures of every cell, as JSON holds them."""
        fields = asdict(self.trials(self.recipe.seed)[0].recipe)
        options = {name: list(v) if isinstance(v := fields[name], tuple) else v for name in SHARED}
        return options | {"reconstruct_unit": fields["reconstruct_unit"]}
