"""What ``kfac-prune estimate`` tells of a run before it: time, memory and disk of every stage, without a weight."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kfac_prune.config import BASELINES, SEQUENCE_METHODS, Recipe
from kfac_prune.costs.dry_run import DryRun
from kfac_prune.costs.machine import Machine, measured, named
from kfac_prune.costs.stages import Setting, stages_of
from kfac_prune.data import MAX_TEXT_BYTES, Document, token_stream
from kfac_prune.errors import InputError
from kfac_prune.inputs import resolve_device
from kfac_prune.inspect_model import empty_model
from kfac_prune.loading import DTYPES, load_config, load_tokenizer
from kfac_prune.objective import find_objective
from kfac_prune.own_text import CACHE_BYTES, CACHE_SHARE, own_text_of

GIB = 2**30
#: Share of the processor that others use, from which times are not to be trusted.
BUSY = 0.2
#: Characters of a text that its tokenizer is timed on.
SAMPLE = 1_000_000
#: Of a GPU's memory, what is left to a run: the rest is the driver's and lost between allocations.
USABLE = 0.92


@dataclass(frozen=True)
class Row:
    """One stage.

    Attributes:
        stage: its name in the result file, of ``plan`` in two parts.
        flops: floating point operations of products and factorisations.
        moved: bytes that memory-limited operations read and write.
        seconds: it takes.
        device: bytes of the device's memory at its peak; None where the device is a CPU.
        host: bytes of main memory at its peak.
        disk: bytes on disk at its end.
    """

    stage: str
    flops: float
    moved: float
    seconds: float
    device: float | None
    host: float
    disk: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        machine: that it runs on.
        rows: its stages.
        parameters: of the model.
        weights: that can be pruned.
        groups: of layers that the curvature is estimated in.
        notes: what to do, and what is not in the rows.
    """

    machine: Machine
    rows: tuple[Row, ...]
    parameters: int
    weights: int
    groups: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(row.seconds for row in self.rows)

    @property
    def device(self) -> float | None:
        """Bytes of the device's memory at the peak of the run; None where the device is a CPU."""
        return max(row.device or 0.0 for row in self.rows) if self.machine.gpu else None

    @property
    def host(self) -> float:
        """Bytes of main memory at the peak of the run."""
        return max(row.host for row in self.rows)

    @property
    def disk(self) -> float:
        """Bytes on disk at the end, when work folder and result lie side by side."""
        return sum(row.disk for row in self.rows)

    @property
    def fits(self) -> bool:
        """In the memory of the device, and in main memory where its size is known."""
        if self.device is not None and self.device > USABLE * self.machine.memory:
            return False
        return self.machine.host is None or self.host <= self.machine.host

    def table(self) -> str:
        """Stage by stage as aligned text."""
        head = ("stage", "time", "TFLOP", "GB moved", "device GiB", "host GiB", "disk GiB")
        lines = [head]
        for row in self.rows:
            device = "-" if row.device is None else f"{row.device / GIB:.2f}"
            lines.append((row.stage, duration(row.seconds), f"{row.flops / 1e12:.4g}", f"{row.moved / 1e9:.4g}", device,
                          f"{row.host / GIB:.2f}", f"{row.disk / GIB:.2f}"))  # fmt: skip
        flops, moved = sum(row.flops for row in self.rows), sum(row.moved for row in self.rows)
        device = "-" if self.device is None else f"{self.device / GIB:.2f}"
        lines.append(("all", duration(self.seconds), f"{flops / 1e12:.4g}", f"{moved / 1e9:.4g}", device,
                      f"{self.host / GIB:.2f}", f"{self.disk / GIB:.2f}"))  # fmt: skip
        text = [f"{line[0]:20}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines]
        more = f"; curvature in {self.groups} groups of layers" if self.groups > 1 else ""
        text.insert(0, f"{self.parameters:,} parameters, {self.weights:,} to prune, on {self.machine.name}{more}")
        return "\n".join([*text, *self.notes])

    def record(self) -> dict[str, Any]:
        """The same as plain values: seconds, bytes, operations."""
        return {
            "device": self.machine.name,
            "parameters": self.parameters,
            "prunable": self.weights,
            "curvature_groups": self.groups,
            "seconds": self.seconds,
            "peak_device_bytes": self.device,
            "peak_host_bytes": self.host,
            "disk_bytes": self.disk,
            "fits": self.fits,
            "stages": {
                row.stage: {
                    "seconds": row.seconds,
                    "flops": row.flops,
                    "bytes_moved": row.moved,
                    "peak_device_bytes": row.device,
                    "peak_host_bytes": row.host,
                    "disk_bytes": row.disk,
                }
                for row in self.rows
            },
            "notes": list(self.notes),
        }


def estimate(recipe: Recipe, card: str | None = None) -> Estimate:
    """What a run of ``prune`` takes.

    Args:
        recipe: of the run; of its text only the size of files that exist is looked at.
        card: name of a GPU; None for the recipe's device, measured on the spot.

    Raises:
        InputError: no such model or card, or a kind of run that is not modelled.
    """
    recipe = recipe.resolved()
    _check(recipe, card)
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    objective = find_objective(recipe.objective, recipe.model, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < recipe.seqlen:
        raise InputError(f"--seqlen is {recipe.seqlen}, and the model's context is {limit} tokens; lower --seqlen")
    dtype = DTYPES[recipe.dtype] if recipe.dtype != "auto" else _stored(config)
    machine = named(card) if card is not None else measured(resolve_device(recipe.device), dtype)
    if card is None and (speed := _tokenizing(recipe)) is not None:
        machine = replace(machine, channels={**machine.channels, "text": speed})
    model = empty_model(recipe.model, config, recipe.trust_remote_code, dtype)
    recipe = replace(recipe, own_text=own_text_of(recipe, objective, writes=model.can_generate()))
    dry = DryRun(model, objective, recipe.include, recipe.ignore)
    parameters = model.num_parameters()
    size = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    room = None if recipe.max_memory is None else recipe.max_memory * GIB
    if room is None and machine.gpu:  # half of what is free, as ``estimate_factors`` has it, but one layer at least
        taken = size if not recipe.offload else size - dry.blocks_bytes + 2 * dry.block_bytes
        room = max((machine.memory - taken) / 2, 4.0 * max(sum(n**2 for n in m.shape) for m in dry.matrices))
    cache = machine.memory / CACHE_SHARE if machine.gpu else float(CACHE_BYTES)
    setting = Setting(recipe, dry, size, dtype.itemsize, machine.gpu, room, _text_bytes(recipe), cache)
    rows = []
    host = machine.base
    for stage in stages_of(setting):
        device = stage.device if machine.gpu else None
        work = stage.work
        host = max(host, machine.base + stage.host)  # as the result file has it: of the process so far
        rows.append(Row(stage.name, work.flops, work.moved, machine.seconds(work), device, host, stage.disk))
    found = Estimate(machine, tuple(rows), parameters, setting.weights, setting.groups, ())
    return replace(found, notes=_notes(found, recipe, card))


def _check(recipe: Recipe, card: str | None) -> None:
    """Only runs that are modelled."""
    others = {
        "structured": recipe.structured,
        "recover_epochs": recipe.recover_epochs,
        "shots": (recipe.shots or 1) > 1 and recipe.shots,
        "method": recipe.method if recipe.method in (*SEQUENCE_METHODS, *BASELINES[2:]) else None,
    }
    for name, value in others.items():
        if value:
            raise InputError(
                f"{name} is {value}, and estimate knows runs in one shot that make single weights zero, by kfac, "
                "layerwise, obd, magnitude, wanda or sparsegpt"
            )
    if card is not None and recipe.device != "auto":
        raise InputError(f"for names a GPU and device is {recipe.device}; give one of them")


def _stored(config: Any) -> torch.dtype:
    """The dtype that the checkpoint says it has."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _text_bytes(recipe: Recipe) -> dict[str, float]:
    """Of the files that will be tokenised, as far as they are on this disk."""
    sizes: dict[str, float] = {}
    for source in (recipe.data, recipe.eval_data):
        try:
            path = Path(source or "").expanduser()
            if path.is_file():
                sizes[str(path)] = float(min(path.stat().st_size, MAX_TEXT_BYTES))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{source} cannot be looked at: {error}") from error
    return sizes


def _tokenizing(recipe: Recipe) -> float | None:
    """Bytes per second of the model's tokenizer on the beginning of a text; None where one of them is not here."""
    files = _text_bytes(recipe)
    if not files or not Path(recipe.model).expanduser().is_dir():
        return None
    try:
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
        with Path(next(iter(files))).open(encoding="utf-8", errors="replace") as file:
            text = file.read(SAMPLE)
    except (InputError, OSError):  # a configuration alone is enough for an estimate
        return None
    parts = text.split(recipe.separator) if recipe.separator else [text]
    token_stream(tokenizer, [Document(text[: SAMPLE // 10], bos=True)])  # the first call pays for what it builds
    begin = time.process_time()  # of all threads: documents are shared out
    token_stream(tokenizer, [Document(part, bos=True) for part in parts])
    return len(text.encode()) / max(time.process_time() - begin, 1e-6)


def check_record(file: str) -> None:
    """Make sure, before the work, that a file for the figures has a folder.

    Raises:
        InputError: it has none.
    """
    try:
        exists = Path(file).expanduser().parent.is_dir()
    except (OSError, RuntimeError) as error:  # no permission to look, no such ~user
        raise InputError(f"--json {file} cannot be written: {error}") from error
    if not exists:
        raise InputError(f"--json {file} cannot be written: there is no such folder")


def write_record(found: Estimate, file: str) -> None:
    """Write an estimate's figures as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(file).expanduser().write_text(json.dumps(found.record(), indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise InputError(f"--json {file} cannot be written: {error}") from error


def _notes(found: Estimate, recipe: Recipe, card: str | None) -> tuple[str, ...]:
    """Whether it fits, what to do if not, and what is not counted."""
    notes = []
    memory = found.machine.memory / GIB
    if found.device is not None:
        need = found.device / GIB
        if need > USABLE * memory:
            ways = [] if recipe.offload else ["--offload (blocks visit the device)"]
            ways += ["a smaller --max-memory (factors of fewer layers at a time)"]
            ways += ["a smaller --batch-size", "another device"]
            notes.append(f"does not fit: {need:.1f} GiB of {memory:.1f} on the device; try {', '.join(ways)}")
        else:
            notes.append(f"fits: {need:.1f} GiB of {memory:.1f} on the device")
    if found.machine.host is not None:
        need, memory = found.host / GIB, found.machine.host / GIB
        if need > memory:
            notes.append(f"does not fit: {need:.1f} GiB of {memory:.1f} in main memory; try a smaller --max-memory, "
                         "--streams disk, a smaller --batch-size, or --dtype bfloat16")  # fmt: skip
        elif found.device is None:
            notes.append(f"fits: {need:.1f} GiB of {memory:.1f} in main memory")
    if found.machine.busy > BUSY:
        notes.append(f"{found.machine.busy:.0%} of the processor was busy with other work, which slows products of "
                     "several threads many times, here and in a run: estimate again when it is idle")  # fmt: skip
    widest = {name: rates[-1][1] for name, rates in found.machine.products.items()}
    if found.device is None and widest["bfloat16"] < widest["float32"] / 2:
        notes.append(f"this CPU multiplies the model's dtype {widest['float32'] / widest['bfloat16']:.0f} times slower "
                     "than float32: add --dtype float32")  # fmt: skip
    if card is not None:
        notes.append("speed of the GPU: shares of its public figures, not measured; main memory is not known")
    if not _text_bytes(recipe):
        notes.append("reading and tokenising text is not counted; name files by --data and --eval-data")
    if recipe.shots is None and not recipe.reconstruct and recipe.method == "kfac":
        notes.append("further shots, taken where much is lost and nothing is reconstructed, are not counted")
    return tuple(notes)


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
