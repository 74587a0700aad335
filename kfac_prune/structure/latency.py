"""Milliseconds: of whole models, for the report, and of blocks at every size, for plans with a latency target."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import whole_experts
from kfac_prune.stream import BlockStack
from kfac_prune.structure.curves import Option, interpolated
from kfac_prune.structure.groups import AttentionHeads, ExpertUnits, FfnUnits, Group, Member, same_kinds
from kfac_prune.structure.prune import Target
from kfac_prune.structure.shrink import CannotBeStored, Cut, auto_class, base_class, shrink

#: Tokens generated when decoding is timed.
DECODED = 16
#: Seconds of repetitions, and least number of them, per figure.
SECONDS, REPEATS = 0.5, 5
#: Fractions of an FFN's units at which a block is timed.
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Speed:
    """How fast a model runs.

    Attributes:
        prefill_ms: one forward pass over one window [1, T], median.
        decode_ms: per generated token after such a window, with the cache, median; None where nothing is generated.
    """

    prefill_ms: float
    decode_ms: float | None


def speeds(models: Sequence[PreTrainedModel], length: int) -> list[Speed]:
    """Time several models in turns, so that what else the machine does meets all of them alike.

    Args:
        models: of one architecture, on one device.
        length: T, tokens of the window.
    """
    ids = torch.zeros(1, length, dtype=torch.int64, device=models[0].device)
    decoded = min(DECODED, length - 1)
    generates = models[0].can_generate()

    def prefill(model: PreTrainedModel) -> None:
        model(input_ids=ids, use_cache=False)

    def decode(model: PreTrainedModel) -> float:
        cache = model(input_ids=ids[:, : length - decoded], use_cache=True).past_key_values
        return milliseconds(
            lambda: [model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True) for _ in range(decoded)],
            model.device,
            repeats=1,
        )

    with ExitStack() as whole:
        for model in dict.fromkeys(models):
            whole.enter_context(whole_experts(model))
        with torch.inference_mode():
            for model in models:
                prefill(model)  # the first pass pays for kernels and memory
            rounds = [
                [
                    (milliseconds(partial(prefill, m), m.device, repeats=1), decode(m) if generates else 0.0)
                    for m in models
                ]
                for _ in range(7)
            ]
    return [
        Speed(median(r[i][0] for r in rounds), median(r[i][1] for r in rounds) / decoded if generates else None)
        for i in range(len(models))
    ]


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 0) -> float:
    """Median time of a call on a device; 0 repeats it for half a second."""
    times: list[float] = []
    while len(times) < (repeats or REPEATS) or (not repeats and sum(times) < 1000 * SECONDS):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one block's forward pass on one window, against the size of one of its groups.

    Attributes:
        ffn: (units, ms), units increasing; empty without FFN groups.
        heads: (KV groups, query heads per group, ms).
    """

    ffn: tuple[tuple[int, float], ...]
    heads: tuple[tuple[int, int, float], ...]

    def block(self, shape: Sequence[int]) -> float:
        """Ms of a block whose FFN has (units,), or whose attention has (KV groups, heads per group).

        Between widths linear; for heads the least-squares plane over query heads and KV groups.
        """
        if len(shape) == 1:
            xs, ys = zip(*self.ffn, strict=True)
            return interpolated(xs, ys, shape[0])
        rows = torch.tensor([[1.0, g * q, g] for g, q, _ in self.heads], dtype=torch.float64)
        ms = torch.tensor([t for _, _, t in self.heads], dtype=torch.float64)
        plane: Tensor = torch.linalg.lstsq(rows, ms[:, None], driver="gelsd").solution[:, 0]
        return float(plane @ torch.tensor([1.0, shape[0] * shape[1], shape[0]], dtype=torch.float64))


def latency_table(model: PreTrainedModel, groups: Sequence[Group], length: int) -> LatencyTable:
    """Time the first block at a few sizes of its FFN and of its attention; from the cache if timed here before.

    The cache, ``kfac_prune/latency.json`` in the user's cache folder, goes by device, threads, torch, data type,
    configuration and window length.
    """
    ffn = next((g for g in groups if isinstance(g, FfnUnits)), None)
    heads = next((g for g in groups if isinstance(g, AttentionHeads)), None)
    key = _key(model, length, [g.name for g in (ffn, heads) if g is not None])
    cache = _read_cache()
    if not _is_entry(cache.get(key)):
        entry: dict[str, list[Any]] = {"ffn": [], "heads": []}
        if ffn is not None:
            sizes = sorted({max(round(f * ffn.units), 1) for f in FRACTIONS})
            entry["ffn"] = [[n, _time_block(model, ffn, ffn.everything()[:n], length)] for n in sizes]
        if heads is not None:
            half = (heads.groups + 1) // 2
            shapes = sorted({(g, q) for g in (1, half, heads.groups) for q in (1, heads.per_group)})
            entry["heads"] = [[g, q, _time_block(model, heads, heads.everything()[:g, :q], length)] for g, q in shapes]
        cache = {**_read_cache(), key: entry}
        _write_cache(cache)
    entry = ranks.told(cache[key])  # all processes must come to the same plan
    return LatencyTable(tuple((n, t) for n, t in entry["ffn"]), tuple((g, q, t) for g, q, t in entry["heads"]))


def _time_block(model: PreTrainedModel, group: Member, kept: Tensor, length: int) -> float:
    columns = group.columns(kept).to(group.consumer.weight.device)
    smaller = shrink(model, [Cut(group, kept, group.consumer.weight[:, columns], group.consumer.bias)])
    window = Windows(torch.zeros(1, length, dtype=torch.int64))
    stack = BlockStack(smaller, window, 1)
    index = next(i for i, name in enumerate(stack.names) if group.name == name or group.name.startswith(f"{name}."))
    stream = stack.entries[0].to(model.device)
    with torch.inference_mode():
        stack.run(index, 0, stream)
        return milliseconds(lambda: stack.run(index, 0, stream), model.device)


def latency_target(model: PreTrainedModel, groups: Sequence[Group], length: int, wanted_ms: float) -> Target:
    """Bring the forward pass over one window [1, length] down to so many milliseconds on this device.

    Raises:
        InputError: the dense model is that fast already, has experts, or code of its own.
    """
    if any(isinstance(group, ExpertUnits) for group in groups):
        raise InputError(
            "--target-latency cannot tell how long experts take: it depends on how many tokens reach each; use "
            "--sparsity or --target-params, or --structured heads"
        )
    try:
        auto_class(base_class(model))
    except CannotBeStored as error:  # one block is timed at sizes of its own
        raise InputError(f"--target-latency cannot time blocks: {error}; use --sparsity or --target-params") from error
    (dense,) = ranks.told(speeds([model], length))
    if wanted_ms >= dense.prefill_ms:
        raise InputError(
            f"--target-latency is {wanted_ms:g} ms, and the dense model takes {dense.prefill_ms:.3g} ms for one window "
            f"of {length} tokens on {model.device}; ask for less"
        )
    table = latency_table(model, groups, length)
    full = {group.name: tuple(group.everything().shape) for group in groups}

    def saving(group: Group, option: Option) -> float:
        return table.block(tuple(group.everything().shape)) - table.block(tuple(option.kept.shape))

    def saved(smaller: PreTrainedModel) -> float:
        shapes = {group.name: tuple(group.everything().shape) for group in same_kinds(groups, smaller)}
        return sum(table.block(full[name]) - table.block(shapes[name]) for name in full)

    def limit(most: float) -> str:
        return f"--target-latency must be {math.ceil(1e3 * (dense.prefill_ms - most) - 1e-6) / 1e3:.10g} ms at least"

    return Target(dense.prefill_ms - wanted_ms, saving, saved, "ms", limit)


def _key(model: PreTrainedModel, length: int, names: Sequence[str]) -> str:
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else f"{platform.node()} {platform.processor()}"
    config = model.config.to_json_string()
    parts = [device, torch.get_num_threads(), torch.__version__, str(model.dtype), config, length, names]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kfac_prune" / "latency.json"


def _read_cache() -> Mapping[str, Any]:
    """What has been timed; a file that cannot be read counts as empty, since all in it can be timed again."""
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_entry(entry: Any) -> bool:
    """It has the sizes and times that ``latency_table`` writes."""
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("ffn"), list)
        or not isinstance(entry.get("heads"), list)
    ):
        return False
    sized = [(row, 2) for row in entry["ffn"]] + [(row, 3) for row in entry["heads"]]
    return all(
        isinstance(row, list) and len(row) == count and all(isinstance(x, int | float) for x in row)
        for row, count in sized
    )


def _write_cache(content: Mapping[str, Any]) -> None:
    """Replace the cache in one step; a folder that cannot be written costs the next run its timing, no more."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(new, path)
    except OSError:
        return
