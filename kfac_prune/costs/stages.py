"""The stages of ``prune`` in order: for each its work, the memory that it needs at its peak, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kfac_prune.config import Recipe
from kfac_prune.costs.dry_run import DryRun, Matrix, Passes
from kfac_prune.costs.solver import QUICK, SLOW, SLOW_NM, curve_work, solve_work, workspace_bytes
from kfac_prune.costs.work import Call, Product, Transfer, Work, total
from kfac_prune.curvature.estimate import draws_per_window, layer_groups
from kfac_prune.curvature.factors import CURVATURE_BYTES
from kfac_prune.data import Windows, held_out
from kfac_prune.own_text import PROMPT, cache_bytes
from kfac_prune.probe import KEPT_BYTES, PROBE_PASSES, PROBE_TOKENS
from kfac_prune.reconstruction import step_windows

#: Operations that loading and saving a model take besides reading and writing: files, modules, tokenizer.
LOAD_CALLS, SAVE_CALLS = 5e4, 1e4
#: Bytes of main memory per byte of text while it is tokenised: of one running text, and of documents.
RUNNING_TEXT_BYTES, DOCUMENTS_BYTES = 165, 25
#: Bytes of main memory that torch takes for itself once a model has run forward and backward.
TORCH_BYTES = 2.5e8
#: Epochs in which the first block of a reconstruction tries learning rates: from two to eight have been seen.
TRIALS = 4
#: Sizes of the output in float32 that a pass holds at once, with gradient or with what is compared.
OUTPUTS_BACKWARD, OUTPUTS_COMPARED = 3, 4


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: as in the result file.
        work: everything it does.
        device: bytes of the device's memory at its peak.
        host: bytes of main memory; where the device is a CPU, ``device`` is part of it.
        disk: bytes that lie on disk at its end, in the work folder and in --out.
    """

    name: str
    work: Work
    device: float
    host: float
    disk: float = 0.0


@dataclass
class Setting:
    """What a run is about.

    Attributes:
        recipe: resolved.
        dry: its model on the meta device.
        bytes: of all parameters.
        item: bytes of one.
        gpu: the device has memory of its own.
        room: bytes that factors may take at a time; None = no limit.
        text: bytes of every file of text that is tokenised.
        cache: bytes that keys and values of the model's own text may take.
    """

    recipe: Recipe
    dry: DryRun
    bytes: float
    item: int
    gpu: bool
    room: float | None
    text: Mapping[str, float]
    cache: float
    _passes: dict[int, Passes] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Groups of layers that the curvature is estimated in: the first with a whole pass, others in their blocks."""
        layers: Any = self.dry.matrices  # a name and a shape are all that is asked of them
        return len(layer_groups(layers, None if self.room is None else int(self.room)))

    @property
    def windows(self) -> Windows:
        """As many as the calibration has."""
        return Windows(torch.zeros(self.recipe.samples, self.recipe.seqlen, dtype=torch.long))

    @property
    def factor_bytes(self) -> int:
        """Of A and G of all layers; layers that read one tensor share A."""
        squares = sum(m.shape[0] ** 2 + m.shape[1] ** 2 * m.own_inputs for m in self.dry.matrices)
        return 4 * squares

    @property
    def stream_bytes(self) -> int:
        """Of G after every block."""
        return 4 * self.dry.count * self.dry.width**2

    @property
    def weights(self) -> int:
        """That can be pruned."""
        return sum(m.weights for m in self.dry.matrices)

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return self.recipe.samples * self.recipe.seqlen

    def passes(self, batch: int) -> Passes:
        """Of a batch of so many windows."""
        if batch not in self._passes:
            self._passes[batch] = self.dry.passes(batch, self.recipe.seqlen)
        return self._passes[batch]

    def over(self, windows: int) -> Iterator[tuple[Passes, float]]:
        """The batches that windows come in: what one takes, and how many there are, the last in its part."""
        size = min(self.recipe.batch_size, windows)
        yield self.passes(size), windows / size


def stages_of(s: Setting) -> list[Stage]:
    """All stages of a run that makes weights zero."""
    recipe = s.recipe
    pruned = recipe.sparsity != 0
    parts = [_load(s), _curvature(s)]
    if recipe.permute:
        parts.append(_permute(s))
    parts += [_curves(s)] if recipe.allocation == "curves" and pruned else []
    parts += [_solve(s), _evaluate(s, "measure dense")]
    if recipe.refit and pruned:
        parts.append(_refit(s))
    if recipe.reconstruct and pruned:
        parts.append(_reconstruct(s))
    return [*parts, _evaluate(s, "measure pruned"), _save(s)]


def _resident(s: Setting) -> tuple[float, float]:
    """Bytes of the model on the device and, where that has memory of its own, in main memory."""
    if not s.recipe.offload:
        return s.bytes, 0.0
    return s.bytes - s.dry.blocks_bytes + 2 * s.dry.block_bytes, s.dry.blocks_bytes


def _factors_kept(s: Setting) -> tuple[float, float]:
    """Bytes of factors after the curvature on the device and, as triangles, off it."""
    if s.groups == 1:
        return s.factor_bytes + s.stream_bytes, 0.0
    largest = max(sum(width**2 for width in m.shape) for m in s.dry.matrices)
    return 4 * largest + s.stream_bytes, s.factor_bytes / 2


def _factors_left(s: Setting) -> tuple[float, float]:
    """What is kept of them once the plan is made and nothing is refitted any more."""
    return (s.stream_bytes, 0.0) if s.recipe.reconstruct_unit == "block" else _factors_kept(s)


def _stage(s: Setting, name: str, work: Work, device: float, host: float = 0.0, disk: float = 0.0) -> Stage:
    """A stage, given what it holds besides the model."""
    on_device, in_main = _resident(s)
    device += on_device
    if not s.gpu:
        host += device + TORCH_BYTES * (name != "load")
    return Stage(name, work, device, host + in_main, disk)


def _load(s: Setting) -> Stage:
    work = s.passes(1).forward * 2 + Work(
        {Transfer("disk"): s.bytes, Transfer("text"): sum(s.text.values()), Call(): LOAD_CALLS}
    )
    work.move(3 * s.bytes)
    work.add(Transfer("link"), s.bytes * s.gpu)
    each = RUNNING_TEXT_BYTES if s.recipe.separator is None else DOCUMENTS_BYTES
    return _stage(s, "load", work, 0, max(s.text.values(), default=0.0) * each + s.bytes * s.gpu)


def _curvature(s: Setting) -> Stage:
    work = Work()
    later = 1 - 1 / s.groups  # share of the blocks that are passed through once more
    for passes, batches in s.over(s.recipe.samples):
        rows = min(s.recipe.batch_size, s.recipe.samples) * s.recipe.seqlen
        again = 2 if s.recipe.offload else 1  # forward passes
        once = passes.forward * again + passes.labels + passes.backward
        blocks = passes.blocks * again + passes.backward * (passes.blocks.flops / passes.forward.flops)
        work += (once + blocks * later + _covariances(s, rows)) * batches
    kept, waiting = _factors_kept(s)
    draws = draws_per_window(s.dry.objective)
    waiting += (s.groups - 1) * (1 + draws) * s.tokens * s.dry.width * s.item  # streams and gradients between groups
    sums = kept if s.groups == 1 else min(s.factor_bytes, s.room or s.factor_bytes) + s.stream_bytes
    passes = s.passes(min(s.recipe.batch_size, s.recipe.samples))
    held = passes.held / (s.dry.count if s.recipe.offload else 1) + OUTPUTS_BACKWARD * passes.output
    work = _visits(s, work, s.recipe.samples, 3 * (1 + later))
    left = kept if s.groups == 1 and kept <= CURVATURE_BYTES else 0  # for --resume
    work += Work({Transfer("hash"): left, Transfer("disk"): left})
    return _stage(s, "curvature", work, sums + held, waiting * s.gpu, left + waiting * (not s.gpu))


def _covariances(s: Setting, rows: int) -> Work:
    """Of one batch: Σ a aᵀ once per tensor that is read, Σ g gᵀ per layer and block."""
    half = s.gpu and s.item == 2
    work = Work()
    for m in s.dry.matrices:
        seen = max(round(rows * m.share), 1)
        for width in (m.shape[0], *m.shape[1:] * m.own_inputs):
            work.add(Product("bfloat16" if half else "float32", width, seen, width))
            work.move(4 * seen * width + 8 * width**2 * (s.gpu and half))
            work.add(Call(), 6)
    work.add(Product("bfloat16" if half else "float32", s.dry.width, rows, s.dry.width), s.dry.count)
    return work


def _permute(s: Setting) -> Stage:
    work = total(solve_work(m, "magnitude", s.recipe.pattern, SLOW) for m in s.dry.matrices)
    work.move(2**20, s.dry.count * 3 * PERMUTE_MOVES)
    kept, waiting = _factors_kept(s)
    return _stage(s, "permute", work, kept + 4 * s.weights, waiting * s.gpu)


#: Megabytes that the search of one space moves, about.
PERMUTE_MOVES = 2e4


def _planning(s: Setting, planned: int) -> float:
    """Bytes on the device while layers are solved: factors, what is planned already, and one layer's own."""
    return _factors_kept(s)[0] + planned * _planned_bytes(s) + max(workspace_bytes(m) for m in s.dry.matrices)


def _planned_bytes(s: Setting) -> float:
    """Weights and masks."""
    return s.weights * (s.item + 1)


def _curves(s: Setting) -> Stage:
    work = total(curve_work(m) + solve_work(m, "kfac", "unstructured", QUICK, known=True) for m in s.dry.matrices)
    work += _waiting(s, 2) + _probe(s, len(s.dry.matrices))
    on_host = s.recipe.offload * _planned_bytes(s)
    device = _planning(s, 0 if s.recipe.offload else 1) + _probe_bytes(s)
    return _stage(s, "plan: curves, probe", work, device, _factors_kept(s)[1] * s.gpu + on_host)


def _solve(s: Setting) -> Stage:
    recipe = s.recipe
    iterations = SLOW if recipe.pattern == "unstructured" else SLOW_NM
    known = recipe.allocation == "curves" and recipe.pattern == "unstructured"
    work = total(solve_work(m, recipe.method, recipe.pattern, iterations, known=known) for m in s.dry.matrices)
    work += _waiting(s, 1)
    if recipe.allocation != "curves":
        work += _probe(s, s.dry.count if recipe.sparsity != 0 else 0)
    written = _planned_bytes(s) + s.stream_bytes + bool(recipe.permute) * s.bytes
    work += Work({Transfer("hash"): s.bytes + 2 * written, Transfer("disk"): written})
    on_host = recipe.offload * _planned_bytes(s)
    device = _planning(s, 0 if recipe.offload else 1) + _probe_bytes(s)
    return _stage(s, "plan: solve", work, device, _factors_kept(s)[1] * s.gpu + on_host, written)


def _waiting(s: Setting, times: int) -> Work:
    """Triangles that come back to the device."""
    return Work({Transfer("link" if s.gpu else "disk"): _factors_kept(s)[1] * times})


def _probe_windows(s: Setting) -> int:
    affordable = PROBE_PASSES * s.recipe.samples // max(len(s.dry.matrices), 1)
    return min(max(min(affordable, PROBE_TOKENS // s.recipe.seqlen), 4), s.recipe.samples)


def _probe(s: Setting, measurements: int) -> Work:
    """Forward passes that begin at the block of what is measured: half of the blocks on average."""
    work = Work()
    blocks = s.dry.count
    for passes, batches in s.over(_probe_windows(s)):
        rest = _without(passes.forward, passes.blocks)
        once = passes.blocks * ((blocks + 1) / (2 * blocks)) + rest + passes.compared + passes.divergence
        if passes.output * batches > KEPT_BYTES:
            once += passes.blocks * (1 / blocks) + rest + passes.compared
        work += (once * measurements + passes.blocks * 2 + rest + passes.compared) * batches
    return _visits(s, work, _probe_windows(s), measurements / 2)


def _probe_bytes(s: Setting) -> float:
    """Outputs in work; what is kept of the dense model's."""
    ((passes, batches),) = s.over(_probe_windows(s))
    kept = passes.output * batches
    return OUTPUTS_COMPARED * passes.output + (kept if kept <= KEPT_BYTES else passes.output)


def _without(whole: Work, part: Work) -> Work:
    """What is left of it."""
    return whole + part * -1


def _evaluate(s: Setting, name: str) -> Stage:
    work, pruned = Work(), name == "measure pruned"
    for passes, batches in s.over(s.recipe.eval_samples):
        once = passes.forward + passes.compared
        work += (once * 2 + passes.divergence if pruned else once) * batches
    passes = s.passes(min(s.recipe.batch_size, s.recipe.eval_samples))
    on_device, in_main = _factors_left(s) if pruned else _factors_kept(s)
    device = on_device + _plan_bytes(s) + OUTPUTS_COMPARED * passes.output
    host = _host_bytes(s) + in_main * s.gpu
    return _stage(s, name, _visits(s, work, s.recipe.eval_samples, 1 + pruned), device, host)


def _plan_bytes(s: Setting) -> float:
    """The plan on the device; once it is applied, the masks, and the pruned weights beside the dense ones."""
    return 0.0 if s.recipe.offload else _planned_bytes(s)


def _host_bytes(s: Setting) -> float:
    """The same in main memory."""
    return s.recipe.offload * _planned_bytes(s)


def _visits(s: Setting, work: Work, windows: int, passes: float) -> Work:
    """Work, and the blocks that come to the device for every batch of the windows, so many times."""
    if not s.recipe.offload:
        return work
    batches = -(-windows // s.recipe.batch_size)
    return work + Work({Transfer("link"): s.dry.blocks_bytes * passes * batches})


def _refit(s: Setting) -> Stage:
    """Every layer that writes into the residual stream: moments of its input and target, and the problem once more."""
    work = Work()
    for passes, batches in s.over(s.recipe.samples):
        work += passes.blocks * (4 * batches)
    writers = _writers(s)
    for m in writers:
        rows, columns = m.shape
        seen = max(round(s.tokens * m.share), 1)
        for shape in ((columns, seen, columns), (rows, seen, columns), (rows, seen, rows)):
            work.add(Product("float32", *shape))
        work.move(8 * seen * (rows + columns))
        work += solve_work(m, "kfac", s.recipe.pattern, SLOW if s.recipe.pattern == "unstructured" else SLOW_NM)
    moments = max(4 * (3 * sum(m.shape) ** 2) for m in writers) if writers else 0
    streams = 4 * s.tokens * s.dry.width * s.item
    on_device, in_main = _factors_kept(s)
    device = on_device + _plan_bytes(s) + moments + streams * (not s.gpu)
    host = _host_bytes(s) + (in_main + streams) * s.gpu
    return _stage(s, "refit", _visits(s, work, s.recipe.samples, 4), device, host)


def _writers(s: Setting) -> list[Matrix]:
    """As wide as the residual stream at their output, and alone with their input."""
    ms = s.dry.matrices
    alone = [i + 1 == len(ms) or ms[i + 1].own_inputs for i in range(len(ms))]
    return [m for m, only in zip(ms, alone, strict=True) if only and m.own_inputs and m.shape[0] == s.dry.width]


def _reconstruct(s: Setting) -> Stage:
    recipe, dry = s.recipe, s.dry
    assert recipe.reconstruct is not None
    size = step_windows(s.windows)
    steps = -(-recipe.samples // size)
    held = held_out(steps)
    pool = steps + (recipe.own_text or 0) * (steps - held)  # batches
    again = 1 + TRIALS / (recipe.reconstruct * dry.count)  # epochs in which the first block tries learning rates
    train, look = (steps - held) * recipe.reconstruct, held * (recipe.reconstruct + 1)
    step = dry.step(size, recipe.seqlen)
    work = step.head_train * train + step.head_forward * look
    work += (step.train * train + step.forward * look) * again + step.forward * (3 * pool)
    rows = size * recipe.seqlen
    work.add(Product("float32", rows, dry.width, dry.width), (dry.count - 1) * again * (2 * train + look))
    work.move(12 * rows * dry.width, (dry.count - 1) * again * (6 * train + 3 * look))
    block = s.weights / dry.count
    work.move(12 * block, 6 * dry.count * train * again)  # Adam, masks, rounding to the model's dtype
    work.add(Call(), train * again * 14 * len(dry.matrices))
    stream = pool * rows * dry.width * s.item
    written = s.weights * s.item
    work += Work({Transfer("hash"): stream + s.weights + 2 * s.bytes + written, Transfer("disk"): written})
    work.add(Transfer("link"), s.gpu * stream * (6 + recipe.reconstruct * steps / pool) * dry.count)
    writing, cache = _writing(s, (pool - steps) * size)
    work += writing
    training = block * (4 * 5 + 2 * s.item) + step.held + 3 * 4 * rows * dry.width
    streams = 5 * stream
    at_device = recipe.streams == "device" or (recipe.streams == "cpu" and not s.gpu)
    on_device, in_main = _factors_left(s)
    device = on_device + s.stream_bytes + _plan_bytes(s) + max(training + streams * at_device, cache)
    host = _host_bytes(s) + (in_main + streams * (recipe.streams == "cpu")) * s.gpu
    return _stage(s, "reconstruct", work, device, host, written + streams * (recipe.streams == "disk"))


def _writing(s: Setting, windows: int) -> tuple[Work, float]:
    """Text of the model's own, token by token; and what keys and values take."""
    if not windows:
        return Work(), 0.0
    each = cache_bytes(s.dry.config, s.recipe.seqlen, s.dry.count, s.dry.width, s.item)
    size = min(max(int(s.cache // each), 1), windows)
    one, tokens = s.dry.passes(size, 1), s.recipe.seqlen * (1 - 1 / PROMPT) * windows / size
    work = (one.forward + one.labels) * tokens
    work.move(2 * size * each, tokens)  # half of the keys and values on average, read and written one behind the other
    return work, float(size * each)


def _save(s: Setting) -> Stage:
    work = Work({Transfer("disk"): 2 * s.bytes, Transfer("link"): s.bytes * s.gpu, Call(): SAVE_CALLS})
    work.move(3 * s.bytes)
    on_device, in_main = _factors_left(s)
    host = _host_bytes(s) + in_main * s.gpu + s.bytes
    return _stage(s, "save", work, on_device + _plan_bytes(s), host, s.bytes)
