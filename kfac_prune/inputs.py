"""What a run begins with: a device that exists, text in windows that the model can read, layers that take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import participants, without_curvature
from kfac_prune.data import (
    Document,
    Windows,
    consecutive_windows,
    read_documents,
    sample_windows,
    sequence_windows,
    token_stream,
)
from kfac_prune.errors import InputError, reason
from kfac_prune.experts import split_experts
from kfac_prune.loading import context_length, load_model, load_tokenizer
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.offload import offload
from kfac_prune.stream import BlockStack, find_writers

#: Share of --data that is kept from calibration and measured on when no --eval-data is given.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Inputs:
    """A model and its data, checked to fit.

    Attributes:
        model: dense.
        tokenizer: of the model.
        layers: that are to be pruned.
        calibration: windows.
        held_out: windows to measure on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: list[Layer]
    calibration: Windows
    held_out: Windows


def load_inputs(recipe: Recipe, objective: Objective, echo: Callable[[str], None]) -> Inputs:
    """Load what a recipe names.

    Args:
        recipe: with a device that exists.
        objective: that the model has.
        echo: is told which layers stay dense because the objective does not depend on them.

    Raises:
        InputError: something cannot be used, or does not fit the rest.
    """
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    texts = read_texts(recipe)
    model = load_model(
        recipe.model,
        dtype=None if recipe.dtype == "auto" else recipe.dtype,
        device="cpu" if recipe.offload else recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    split_experts(model)
    if recipe.offload:
        offload(model, torch.device(recipe.device))
    layers = prunable_layers(model, recipe.include, recipe.ignore)
    if objective.unit == "token":
        check_length(model, recipe.seqlen)
    calibration, held_out = load_data(recipe, tokenizer, objective, texts)  # a long text takes its time
    check_tokens(model, calibration, held_out)
    check_runs(model, calibration, objective)
    layers = called_layers(model, layers, calibration, objective, echo)
    if objective.unit == "sequence":
        layers = reached_layers(model, layers, calibration, objective, echo)
    return Inputs(model, tokenizer, layers, calibration, held_out)


def resolve_device(name: str) -> str:
    """Turn "auto" into a device that exists, and check any other; of several processes each gets its own GPU.

    Raises:
        InputError: torch does not know the device or cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = ranks.device_of_process(name)
    try:
        torch.empty(1, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
    except Exception as error:  # torch raises RuntimeError, AssertionError or AcceleratorError by kind of device
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def read_texts(recipe: Recipe) -> tuple[list[Document], list[Document] | None]:
    """The documents to calibrate on, and those to measure on where there are such.

    Raises:
        InputError: a text is missing or empty.
    """
    options: Any = {"separator": recipe.separator, "field": recipe.text_field}
    documents = read_documents(recipe.data, **options)
    return documents, read_documents(recipe.eval_data, **options, split="test") if recipe.eval_data else None


def choose_texts(
    documents: Sequence[Document], held: Sequence[Document] | None, counts: tuple[int, int], seed: int, share: float
) -> tuple[list[str], list[str]]:
    """Texts to calibrate on and, none of them among these, to measure on; both at random.

    Args:
        documents: to choose from; equal ones count once.
        held: to measure on; None sets the last `share` of `documents` apart.
        counts: of the former, exactly, and of the latter, at most.
        seed: equal arguments give equal texts.
        share: see `held`.
    """
    texts = list(dict.fromkeys(document.text for document in documents))
    rest = list(dict.fromkeys(document.text for document in held)) if held is not None else []
    if held is None:
        cut = len(texts) - int(share * len(texts))
        texts, rest = texts[:cut], texts[cut:]
    generator = torch.Generator().manual_seed(seed)
    chosen = [texts[i] for i in torch.randperm(len(texts), generator=generator)[: counts[0]].tolist()]
    known = set(chosen)
    rest = [text for text in rest if text not in known]
    if len(chosen) < counts[0] or len(rest) < 2:
        raise InputError(
            f"{len(texts)} documents to calibrate on and {len(rest)} others to measure on, each of them one sequence; "
            f"needed are {counts[0]} (--samples) and at least 2: say what separates documents of a text file "
            r"(--separator '\n' makes every line one), add text, or lower --samples"
        )
    return chosen, [rest[i] for i in torch.randperm(len(rest), generator=generator)[: counts[1]].tolist()]


def load_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective = CAUSAL,
    texts: tuple[list[Document], list[Document] | None] | None = None,
) -> tuple[Windows, Windows]:
    """Calibration windows and held-out windows that share no text with them.

    For tokens they are cut out of the running text, the former at random starts; an objective per sequence has every
    document for a window of its own.

    Args:
        recipe: that names the texts.
        tokenizer: of the model.
        objective: that the model has.
        texts: from ``read_texts``; None reads them.

    Raises:
        InputError: a text is missing, empty or too short.
    """
    documents, held_documents = texts or read_texts(recipe)
    if objective.unit == "sequence":
        counts = recipe.samples, recipe.eval_samples
        chosen = choose_texts(documents, held_documents, counts, recipe.seed, HELD_OUT)
        first, second = (sequence_windows(tokenizer, texts, recipe.seqlen) for texts in chosen)
        return first, second
    stream = token_stream(tokenizer, documents)
    if held_documents is not None:
        held, name = token_stream(tokenizer, held_documents), recipe.eval_data or ""
    else:
        cut = len(stream) - int(HELD_OUT * len(stream))
        stream, held, name = stream[:cut], stream[cut:], f"the last tenth of {recipe.data}"
    if len(held) < recipe.seqlen:
        raise InputError(
            f"{name} gives {len(held)} tokens to measure on; a window needs {recipe.seqlen}: add text, "
            f"{'' if recipe.eval_data else 'name --eval-data, '}or lower --seqlen"
        )
    count = min(recipe.eval_samples, len(held) // recipe.seqlen)
    return (
        sample_windows(stream, recipe.samples, recipe.seqlen, recipe.seed, name=recipe.data),
        consecutive_windows(held, count, recipe.seqlen, name=name),
    )


def check_length(model: PreTrainedModel, length: int) -> None:
    """The model can read so many tokens at a time.

    Raises:
        InputError: it cannot.
    """
    limit = context_length(model)
    if limit is not None and length > limit:
        raise InputError(f"--seqlen is {length}, and the model's context is {limit} tokens; lower --seqlen")


def check_tokens(model: PreTrainedModel, *windows: Windows) -> None:
    """The model can read these windows: not longer than its context, no token outside its vocabulary.

    Raises:
        InputError: it cannot.
    """
    vocabulary = vocabulary_size(model)
    for one in windows:
        check_length(model, one.input_ids.shape[1])
        largest = int(one.input_ids.max())
        if largest >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest}, and the model knows {vocabulary}; they do not belong together"
            )


def check_runs(model: PreTrainedModel, windows: Windows, objective: Objective) -> None:
    """The model can be run, told by one window: a configuration can give shapes that do not fit together.

    Nor does what pads a sequence change its output, told by the shortest one beside the longest: classifiers that are
    decoders look for the last token that is not ``config.pad_token_id``.

    Raises:
        InputError: it cannot, or it does.
    """
    what, mask = f"{type(model).__name__} of {model.config.name_or_path}", windows.attention_mask
    rows = [0]
    if mask is not None and objective.unit == "sequence":
        lengths = mask.sum(1)
        rows = [int(lengths.where(lengths > 0, lengths.max()).argmin()), int(lengths.argmax())]
    try:
        with torch.no_grad():  # the first row alone, then beside the other
            parts = (windows.chosen(rows[: i + 1]) for i in range(len(rows)))
            outputs = [objective.output(model, *next(part.batches(2)).on(model.device))[0] for part in parts]
    except Exception as error:  # whatever the model's code happens to raise
        raise InputError(f"{what} fails on a window of text: {reason(error)}") from error
    alone, padded = outputs[0], outputs[-1]
    if float((padded - alone).abs().max() / alone.abs().max()) > torch.finfo(alone.dtype).eps ** 0.5:
        raise InputError(
            f"{what} gives another output for a sequence once it is padded: its config.json has pad_token_id "
            f"{model.config.pad_token_id}, which must be what the tokenizer pads with"
        )


def finite_windows(
    model: PreTrainedModel, layers: list[Layer], windows: Windows, objective: Objective, batch_size: int
) -> Windows:
    """The windows of those batches on which the inputs of all layers and the model's output are finite.

    Costs one forward pass, which several processes share.

    Raises:
        InputError: there is none.
    """
    good: list[int] = []
    finite: list[torch.Tensor] = []

    def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        finite.append(args[0].isfinite().all())

    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_pre_hook(see).remove)
        for batch in ranks.share(list(windows.batches(batch_size))):
            finite.clear()
            finite.append(objective.output(model, *batch.on(model.device)).isfinite().all())
            if torch.stack(finite).all():
                good += batch.index.tolist()
    rows = torch.tensor(sorted(row for part in ranks.gathered(good) for row in part), dtype=torch.int64)
    if not len(rows):
        raise InputError(
            f"every one of the {len(windows)} calibration windows gives NaN or infinity; try --dtype float32 or "
            "bfloat16, or other text"
        )
    return windows.chosen(rows)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    return embeddings.shape[0]


def evaluation_windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, objective: Objective) -> Windows:
    """The first windows of a text that is only measured on; every document is one where the objective is per sequence.

    Raises:
        InputError: the text is missing, empty or too short.
    """
    documents = read_documents(recipe.data, separator=recipe.separator, field=recipe.text_field, split="test")
    if objective.unit == "sequence":
        texts = list(dict.fromkeys(document.text for document in documents))[: recipe.eval_samples]
        if len(texts) < 2:
            raise InputError(
                f"{recipe.data} is one document, and every document is one sequence; say what separates them, such as "
                r"--separator '\n' where every line is one"
            )
        return sequence_windows(tokenizer, texts, recipe.seqlen)
    stream = token_stream(tokenizer, documents)
    if len(stream) < recipe.seqlen:
        raise InputError(
            f"{recipe.data} gives {len(stream)} tokens; a window needs {recipe.seqlen}: add text, or lower --seqlen"
        )
    count = min(recipe.eval_samples, len(stream) // recipe.seqlen)
    return consecutive_windows(stream, count, recipe.seqlen, name=recipe.data)


def called_layers(
    model: PreTrainedModel,
    layers: list[Layer],
    calibration: Windows,
    objective: Objective,
    echo: Callable[[str], None],
) -> list[Layer]:
    """The layers that have a curvature over tokens; says which ones have none, and why.

    Raises:
        InputError: none is left.
    """
    kind = type(model).__name__
    bypassed, unmoved = without_curvature(model, layers, calibration, objective)
    for why, some in (
        (f"{kind} uses their weights without calling them", bypassed),
        (f"{kind} also calls them on what does not depend on the text", unmoved),
    ):
        layers = [layer for layer in layers if layer not in some]
        names = ", ".join(layer.name for layer in some)
        if not layers:
            raise InputError(f"no curvature can be estimated for {names}, since {why}; choose other layers")
        if some:
            echo(f"left dense, since {why}: {names}")
    return layers


def reached_layers(
    model: PreTrainedModel,
    layers: list[Layer],
    calibration: Windows,
    objective: Objective,
    echo: Callable[[str], None],
) -> list[Layer]:
    """The layers on which the objective depends; says which ones it does not, such as an unused pooler."""
    taking_part = participants(model, layers, calibration, objective)
    idle = [layer.name for layer in layers if layer not in taking_part]
    if not taking_part:
        raise InputError(f"the objective {objective.name} depends on none of the chosen layers, such as {idle[0]}")
    if idle:
        echo(f"left dense, since the objective {objective.name} does not depend on them: {', '.join(idle)}")
    return taking_part


def first_window(model: PreTrainedModel, calibration: Windows) -> BlockStack:
    """The blocks of the model, and the calls to them on one window, which tell what repairs it allows."""
    first = next(calibration.batches(1))
    return BlockStack(model, Windows(first.input_ids, first.attention_mask), 1)


def has_writers(stack: BlockStack) -> bool:
    """Any layer of the first block adds its output to the residual stream, as the refit needs."""
    return not stack.blocks or bool(find_writers(stack, 0, stack.entries[0], stack.inside(0)))
