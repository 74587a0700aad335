"""Text that a model writes itself: more to reconstruct on than the calibration text holds.

Blocks learn to give the dense model's outputs, for which any text will do that the model meets in use, and no label is
needed. Where text is scarce, what is learnt from it alone fits its noise. Windows that the dense model continues by
itself are nearly as good as further windows of the text (self-calibration, Williams et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kfac_prune import ranks
from kfac_prune.config import OWN_TEXT, Recipe
from kfac_prune.data import Windows
from kfac_prune.errors import InputError, reason
from kfac_prune.fisher import sample_labels
from kfac_prune.models import find_blocks, prunable_layers
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.progress import progress

#: One part in so many of a window is the text's own, and the model continues it. (Of 2, 4 and 8 the last was best.)
PROMPT = 8
#: Room for keys and values of the windows that are written at a time: bytes on a CPU, one part in so many of a GPU. Not
#: what happens to be free, since rounding, and now and then a token, depends on how many there are.
CACHE_BYTES, CACHE_SHARE = 2**29, 8


def own_text_of(recipe: Recipe, objective: Objective, *, writes: bool) -> int:
    """Windows that the model is to write per calibration window: as the recipe says, or by its rule.

    By that epochs are enough to see all text, since each takes as many steps as there is calibration text.

    Args:
        recipe: resolved.
        objective: of the model.
        writes: the model's code can generate text.

    Raises:
        InputError: it asks for text that the model cannot write.
    """
    if not recipe.reconstruct:
        return 0
    able = objective == CAUSAL and writes
    if recipe.own_text is None:
        return min(OWN_TEXT, recipe.reconstruct - 1) if able and not recipe.offload else 0
    if recipe.own_text and not able:
        why = f"a model for {objective.name}" if objective != CAUSAL else "a model whose code has no generate()"
        raise InputError(f"own_text is {recipe.own_text}, and {why} writes no text; use --own-text 0")
    return recipe.own_text


def check_writes(model: PreTrainedModel, windows: Windows) -> None:
    """The model can write: it is let to continue a token by eight.

    Raises:
        InputError: it cannot.
    """
    continued(model, Windows(windows.input_ids[:1, : PROMPT + 1]), 1)


def continued(model: PreTrainedModel, windows: Windows, copies: int, *, seed: int = 0, quiet: bool = True) -> Windows:
    """Windows that begin as the calibration's do and are continued by samples of the model's distribution.

    Of several processes every one continues its own windows. What is written depends on the number that a window has
    among those of all processes, and on what it is batched with by rounding alone.

    Args:
        model: a causal language model, as it is to be.
        windows: [N, T] that the process takes steps on, without padding.
        copies: continuations of each.
        seed: of the samples.
        quiet: show no progress bar.

    Returns:
        Token windows [copies · N, T].

    Raises:
        InputError: the windows are padded, or the model's code cannot generate.
    """
    if windows.attention_mask is not None and not bool(windows.attention_mask.all()):
        raise InputError("windows are padded, and their text cannot be continued; use --own-text 0")
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} writes no text; use --own-text 0")
    ids = windows.input_ids.repeat(copies, 1)
    length, prompt = ids.shape[1], max(ids.shape[1] // PROMPT, 1)
    shape = len(windows) * ranks.count(), copies, length
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    numbers = numbers[ranks.index() :: ranks.count()].transpose(0, 1).flatten(0, 1)
    size = max(_room(model.device) // _cache_bytes(model, length), 1)
    parts = list(zip(ids.split(size), numbers.split(size), strict=True))
    written = []
    with _plainly(model, length - prompt), progress(total=len(parts), desc="write", disable=quiet) as bar:
        for rows, draws in parts:
            try:
                written.append(_write(model, rows[:, :prompt].to(model.device), draws).cpu())
                if written[-1].shape != rows.shape:
                    raise ValueError(f"{list(written[-1].shape)} tokens instead of {list(rows.shape)}")
            except Exception as error:  # whatever the model's code happens to raise
                message = f"{type(model).__name__} cannot write text ({reason(error)}); use --own-text 0"
                raise InputError(message) from error
            bar.update(1)
    return Windows(torch.cat(written))


def _write(model: PreTrainedModel, begun: Tensor, draws: Tensor) -> Tensor:
    generate: Any = model.generate
    sampled = LogitsProcessorList([_Sampled(draws)])
    text: Tensor = generate(begun, attention_mask=torch.ones_like(begun), logits_processor=sampled)
    return text


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // CACHE_SHARE


def _cache_bytes(model: PreTrainedModel, length: int) -> int:
    blocks, _ = find_blocks(model, prunable_layers(model))
    embeddings: Any = model.get_input_embeddings().weight
    return cache_bytes(model.config.get_text_config(), length, len(blocks), embeddings.shape[1], model.dtype.itemsize)


def cache_bytes(config: Any, length: int, blocks: int, width: int, item: int) -> int:
    """Of the keys and values of one window; they are as wide as the residual stream where KV heads are not told.

    Args:
        config: of the language model.
        length: tokens of a window.
        blocks: their number.
        width: of the residual stream.
        item: bytes of a number.
    """
    heads, head = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    if isinstance(heads, int) and isinstance(head, int):
        width = heads * head
    return max(2 * length * blocks * width * item, 1)


@contextmanager
def _plainly(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Within the block the model writes so many tokens, whatever its own settings, and does not stop at any."""
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=tokens)
    try:
        yield
    finally:
        model.generation_config = own


class _Sampled(LogitsProcessor):
    """Leaves one token of every row: a sample of the distribution, by a number that was drawn before.

    Args:
        draws: uniform numbers [B, T], the positions' own.
    """

    def __init__(self, draws: Tensor) -> None:
        self._draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V], of which all but one are −∞."""
        tokens = sample_labels(scores, self._draws[:, input_ids.shape[1]])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
