"""Kronecker factors of a model's Fisher on calibration windows, of all layers at once or of groups of them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.capture import FactorCapture, GradientMoments, InputMoments
from kfac_prune.curvature.factors import Factors, FactorShelf, LayerFactors
from kfac_prune.curvature.few_tokens import FewTokens, shrink_
from kfac_prune.curvature.spans import Span, recorded
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.fisher import FisherType
from kfac_prune.memory import mapped
from kfac_prune.models import Layer, find_blocks, only_trained
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.progress import progress

#: Cotangents per window where the model has one output per sequence; where it has one per token, every token has one.
SEQUENCE_DRAWS = 4


def estimate_factors(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Windows,
    *,
    objective: Objective = CAUSAL,
    fisher: FisherType = "sampled",
    seed: int = 0,
    batch_size: int = 4,
    max_memory: int | None = None,
    quiet: bool = True,
) -> Factors:
    """Estimate A and G of every layer with one forward and one backward pass over the windows (per sampled label).

    Where the factors of all layers need more memory than there is for them, the layers are taken in groups: the first
    with the whole pass, every other with one through its own blocks (``Span``). Those that are finished wait off the
    device (``FactorShelf``).

    The Fisher is the true one by default: labels are sampled (with replacement) from the model's own predictions at
    every position, so that it is the Hessian of KL(dense‖pruned) at the dense model (Martens & Grosse 2015; Kunstner
    et al. 2019 on why not the data's labels). Gradients are those of the loss summed over a sequence. No parameter
    gradient is stored. Several processes share out the windows, and each has the sums of all. An expert sees a share of
    the tokens, and its factors are shrunk as far as that makes them uncertain (``few_tokens``).

    Args:
        model: a transformer with the objective's head; its training mode and ``requires_grad`` flags are as before
            afterwards.
        layers: whose factors are wanted.
        windows: calibration tokens [N, T].
        objective: what the model computes. Where it counts sequences, every G is multiplied by the rows per sequence
            that its layer sees, so that losses are in nats per sequence.
        fisher: "sampled" labels, or the "empirical" Fisher with the data's next tokens.
        seed: of the sampled labels; the labels do not depend on how the windows are batched.
        batch_size: windows per pass.
        max_memory: bytes of the device that the factors may take at a time; None: half of what is free on a GPU, all
            that they need on a CPU.
        quiet: show no progress bar.

    Raises:
        InputError: the windows hold no token, a layer never took part, its statistics are not finite, or its factors
            alone need more than ``max_memory``.
    """
    if windows.tokens == 0:
        raise InputError("the calibration windows hold no token: every position is masked")
    if (away := next((layer.name for layer in layers if layer.weight.is_meta), None)) is not None:
        raise InputError(
            f"the weights of {away} are not in memory, as of a model that was loaded with device_map; let "
            "kfac_prune.offload.offload(model, device) take it over"
        )
    draws = draw_all(model, windows, objective, seed)
    sequences = len(windows) * len(draws) if objective.unit == "sequence" else None
    device = model.device
    groups = layer_groups(layers, _half_of_free(device) if max_memory is None else max_memory)
    found: MutableMapping[str, LayerFactors] = {}
    if len(groups) > 1:
        found = FactorShelf(device, on_disk=device.type == "cpu" or not _room_for(layers))
    size = max(min(batch_size, len(windows) // ranks.count()), 1)
    batches = ranks.share(list(windows.batches(size)))
    seen = sum(len(batch.input_ids) for batch in batches) * len(groups)
    streams: dict[str, Tensor] = {}
    names, blocks = find_blocks(model, layers)
    keep = mapped if device.type == "cpu" else Tensor.cpu
    spans = [Span(group, names, blocks, keep) for group in groups[1:]]
    with frozen(model), progress(total=seen, desc="curvature", unit="seq", disable=quiet) as bar:
        for group, span in zip(groups, [None, *spans], strict=True):
            observed = dict(zip(names, blocks, strict=True)) if span is None else {}
            capture = FactorCapture(group, observed, per_sequence=sequences is not None)
            alone = span if span is not None and span.suffices else None
            with capture.hooked(), recorded(spans if span is None else []):
                for index, batch in enumerate(batches):
                    ids, mask = batch.on(device)
                    capture.token_mask = mask
                    first, last = int(batch.index[0]), int(batch.index[-1])
                    capture.batch = f"batch {first // size + 1} (windows {first + 1} to {last + 1})"
                    if alone is not None:
                        alone.run(index, device)
                    else:
                        with torch.enable_grad():
                            output = objective.output(model, ids, mask)
                        for i, draw in enumerate(draws):
                            cotangent = objective.cotangent(output, draw[batch.index], ids, mask, fisher)
                            output.backward(cotangent, retain_graph=i < len(draws) - 1)
                    bar.update(len(ids))
            capture.add_up(device)
            for name in capture.blocks:
                moments = capture.gradients[name]
                streams[name] = moments.second / (sequences or windows.tokens)
            found.update(_finish(group, capture, sequences, windows.tokens))
            if span is not None:
                span.clear()
    return Factors(found, streams, tokens=windows.tokens, data_sha256=windows.sha256())


def _needs(layer: Layer) -> int:
    """Bytes that a layer's A and G take on the device."""
    return 4 * sum(width**2 for width in layer.shape)


def _room_for(layers: Sequence[Layer]) -> bool:
    """Half of the main memory that is free holds the triangles of all factors, in every process of this machine."""
    free: int = psutil.virtual_memory().available
    return sum(map(_needs, layers)) * ranks.neighbours() < free


def _half_of_free(device: torch.device) -> int | None:
    """Bytes that factors may take where nobody has said, the same in every process; None on a CPU: no limit."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return -ranks.largest(-(torch.cuda.mem_get_info(device)[0] + cached) // 2, device)


def fit_together(layers: Sequence[Layer], device: torch.device) -> bool:
    """Whether ``estimate_factors`` has room for the factors of all these layers at a time, where nobody has said."""
    return len(layer_groups(layers, _half_of_free(device))) == 1


def layer_groups(layers: Sequence[Layer], most: int | None) -> list[list[Layer]]:
    """Neighbouring layers whose factors fit into so many bytes together."""
    if most is None:
        return [list(layers)]
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        need = _needs(layer)
        if need > most:
            raise InputError(
                f"layer {layer.name}: its factors, {' and '.join(f'{n} x {n}' for n in reversed(layer.shape))}, need "
                f"{need / 2**30:.3g} GiB, more than the {most / 2**30:.3g} GiB that factors may take; raise "
                "--max-memory, or leave the layer out with --ignore"
            )
        if need > room or not groups:
            groups.append([])
            room = most
        groups[-1].append(layer)
        room -= need
    return groups


def draws_per_window(objective: Objective) -> int:
    """Cotangents that are drawn for each window."""
    return SEQUENCE_DRAWS if objective.unit == "sequence" else 1


def draw_all(model: PreTrainedModel, windows: Windows, objective: Objective, seed: int) -> list[Tensor]:
    """The random numbers of all cotangents: per draw, the first dimension the windows."""
    samples = draws_per_window(objective)
    return [objective.draws(model, windows, (seed * samples + i) % 2**63) for i in range(samples)]


def participants(
    model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, objective: Objective
) -> list[Layer]:
    """The layers that the objective depends on, told by one window: a gradient comes back to their outputs.

    Experts are always among them, since which of them a window reaches says nothing of others.
    """
    ids, mask = next(windows.batches(1)).on(model.device)
    reached: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: reached.add(name))

        return after

    with frozen(model), torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_hook(watch(layer.name)).remove)
        objective.output(model, ids, mask).sum().backward()
    return [layer for layer in layers if layer.name in reached or isinstance(layer.module, ExpertLinear)]


def without_curvature(
    model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, objective: Objective
) -> tuple[list[Layer], list[Layer]]:
    """The layers of which A and G, which are over tokens, do not tell all; by one window.

    A layer that is neither called nor used here, such as an expert that no token was sent to, is not among them.

    Returns:
        Those whose weights the model uses without calling them (Mamba's ``dt_proj``), so that no hook sees their
        inputs; and those that it also calls on what does not depend on the text (DeBERTa's queries and keys, which are
        those of relative positions too).
    """
    ids, mask = next(windows.batches(1)).on(model.device)
    called: set[str] = set()
    unmoved: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            called.add(name)
            if not output.requires_grad:
                unmoved.add(name)

        return after

    with frozen(model), torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_hook(watch(layer.name)).remove)
        objective.output(model, ids, mask)
    silent = [layer for layer in layers if layer.name not in called]
    bypassed = []
    if silent:
        weights = [layer.parameters()[0] for layer in silent]
        with only_trained(model, weights):
            output = objective.output(model, ids, mask)
            if output.requires_grad:
                found = torch.autograd.grad(output.sum(), weights, allow_unused=True)
                bypassed = [layer for layer, gradient in zip(silent, found, strict=True) if gradient is not None]
    return bypassed, [layer for layer in layers if layer.name in unmoved]


def _finish(
    layers: Sequence[Layer], capture: FactorCapture, sequences: int | None, everything: int
) -> dict[str, LayerFactors]:
    """Sums to means, in place, with the checks that name the layer; G to sums per sequence where there are such.

    G is per token of the text, of which there are ``everything``, however often a layer is called and on whichever it
    is. An expert's factors are shrunk; one that saw no token has none.
    """
    layers = [layer for layer in layers if not isinstance(layer.module, ExpertLinear) or _tokens(layer, capture)]
    for layer in layers:
        _check(layer.name, capture)
    shared = {id(moments): moments for moments in (capture.inputs[layer.name] for layer in layers)}
    for moments in shared.values():
        moments.second /= moments.tokens
        moments.first /= moments.tokens
    found: dict[str, LayerFactors] = {}
    rho_a: dict[int, float] = {}  # by the moments, which experts may share
    for layer in layers:
        inputs, gradients = capture.inputs[layer.name], capture.gradients[layer.name]
        gradients.second /= sequences or everything
        a, g, few = inputs.second, gradients.second, None
        if isinstance(layer.module, ExpertLinear):
            if id(inputs) not in rho_a:
                rho_a[id(inputs)] = shrink_(a, inputs.tokens)
            rho_g = shrink_(g, gradients.tokens)
            few = FewTokens(inputs.tokens, inputs.tokens / everything, rho_a[id(inputs)], rho_g)
        found[layer.name] = LayerFactors(a, inputs.first, g, inputs.tokens, layer.bias is not None, few)
    return found


def _tokens(layer: Layer, capture: FactorCapture) -> int:
    """That a layer has seen."""
    return capture.inputs[layer.name].tokens if layer.name in capture.inputs else 0


def _check(name: str, capture: FactorCapture) -> None:
    """A layer has seen tokens, and what it has seen is finite."""
    if name not in capture.inputs or name not in capture.gradients:
        raise InputError(f"layer {name} took no part in the forward pass; leave it out with --ignore '{name}'")
    inputs, gradients = capture.inputs[name], capture.gradients[name]
    if inputs.tokens == 0:
        raise InputError(
            f"layer {name} saw no token of the calibration text; add text, or leave it out with --ignore '{name}'"
        )
    sides: tuple[tuple[str, InputMoments | GradientMoments], ...]
    sides = (("inputs", inputs), ("output gradients", gradients))
    for label, moments in sides:
        if not torch.isfinite(moments.second).all():
            where = capture.broken_by(moments) or "a batch of another process"
            raise InputError(
                f"layer {name}: its {label} hold NaN or infinity on the calibration text, first in {where}; "
                "try --dtype float32 or bfloat16, other text, or --skip-bad-batches"
            )


class frozen:
    """Evaluation mode, no parameter gradients, and input embeddings whose output starts the autograd graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._training = [module.training for module in model.modules()]
        self._flags = [p.requires_grad for p in model.parameters()]

    def __enter__(self) -> None:
        self._handle = self._model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )
        self._model.eval().requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
        for module, training in zip(self._model.modules(), self._training, strict=True):
            module.training = training
        for parameter, flag in zip(self._model.parameters(), self._flags, strict=True):
            parameter.requires_grad_(flag)
