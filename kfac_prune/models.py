"""Models from disk or hub, and the weight matrices in them that can be pruned."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from kfac_prune.errors import InputError, reason, shown
from kfac_prune.experts import routers
from kfac_prune.pruned_model import with_own_widths

#: What a model ends in, told by the name of its architecture.
Head = Literal["causal", "masked", "classes", "encoder"]
LOADERS: dict[Head, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}
#: Classes whose own forward pass is that of nn.Linear, written out.
PLAIN = {"FalconLinear"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """A module with one weight matrix, seen as ``W: [out, in]`` whatever the module's own layout.

    Attributes:
        name: in the model, e.g. ``model.layers.0.mlp.down_proj``.
        module: nn.Linear, or GPT-2's Conv1D, whose weight is stored [in, out].
    """

    name: str
    module: nn.Module

    @property
    def _parameter(self) -> nn.Parameter:
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """W [out, in], a view of the parameter, without gradient."""
        stored = self._parameter.detach()
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def bias(self) -> Tensor | None:
        """[out], a view of the parameter, or None."""
        bias = self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def parameters(self) -> list[nn.Parameter]:
        """The weight and, where there is one, the bias."""
        return [p for p in (self._parameter, self.module.bias) if isinstance(p, nn.Parameter)]

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layout in which the module stores its weight."""
        return matrix.T if isinstance(self.module, Conv1D) else matrix

    def assign(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace W [out, in] (and the bias [out]) by these, in the parameter's dtype and on its device.

        Where they are so already, the parameter takes over the tensors themselves. The old ones are not written to:
        whoever holds them (``WeightSwap``) keeps their values.
        """
        _replace(self._parameter, self.stored(weight))
        if bias is not None:
            assert isinstance(self.module.bias, nn.Parameter)
            _replace(self.module.bias, bias)


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.to(dtype=parameter.dtype, device=parameter.device).contiguous()


class WeightSwap:
    """Holds the present weights of some layers, so that they can be put back for a moment or for good.

    Costs no copy: ``Layer.assign`` never writes into a tensor that is held here.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._parameters = [p for layer in layers for p in (layer._parameter, layer.module.bias) if p is not None]
        self._held = [p.data for p in self._parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the held weights."""
        present = [p.data for p in self._parameters]
        try:
            self.restore()
            yield
        finally:
            for parameter, value in zip(self._parameters, present, strict=True):
                parameter.data = value

    def restore(self) -> None:
        """Put the held weights back for good."""
        for parameter, value in zip(self._parameters, self._held, strict=True):
            parameter.data = value


@contextmanager
def only_trained(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block autograd is on, and of a module's parameters just these require gradients."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def prunable_layers(model: PreTrainedModel, include: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Layer]:
    """Every linear layer of the model but its head and routers, filtered by shell patterns on the names.

    Args:
        model: a transformers model.
        include: patterns such as ``*.mlp.*``; empty means all.
        ignore: patterns of layers to leave dense.

    Raises:
        InputError: a pattern matches no layer, or none is left.
    """
    head = model.get_output_embeddings() or _classifier(model)
    embedded = model.get_input_embeddings()
    tied = {id(m.weight) for m in (head, embedded, *routers(model)) if m is not None and hasattr(m, "weight")}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if is_plain(module) and module is not head and id(module.weight) not in tied:
            layers.append(Layer(name, module))
            if 0 in layers[-1].shape:
                raise InputError(f"layer {name} is {list(layers[-1].shape)} [out, in], which holds no weight")
            tied.add(id(module.weight))  # a matrix that two modules share is one matrix
    for pattern in (*include, *ignore):
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
            raise InputError(
                f"the layer pattern {pattern!r} matches none of the {len(layers)} linear layers "
                f"(the first is {layers[0].name!r}); `kfac-prune inspect` lists them"
                if layers
                else f"the layer pattern {pattern!r} matches nothing: {type(model).__name__} has no linear layer"
            )
    kept = [
        layer
        for layer in layers
        if (not include or any(fnmatch.fnmatchcase(layer.name, p) for p in include))
        and not any(fnmatch.fnmatchcase(layer.name, p) for p in ignore)
    ]
    if not kept:
        raise InputError(f"no layer of {type(model).__name__} is left to prune after --include and --ignore")
    return kept


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes ``x Wᵀ + b``: a subclass of nn.Linear with a forward pass of its own need not."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or type(module).__name__ in PLAIN


def _classifier(model: PreTrainedModel) -> nn.Module | None:
    """The last linear layer of a sequence classifier, if it gives the classes' logits."""
    if "ForSequenceClassification" not in type(model).__name__:
        return None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == model.config.num_labels else None


def find_blocks(model: nn.Module, layers: Iterable[Layer]) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the repeated blocks: the list of modules that holds most of the layers."""
    names = [layer.name for layer in layers]
    best: tuple[int, list[str], list[nn.Module]] = (0, [], [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(one.startswith(f"{name}.") for one in names)
            if count > best[0]:
                best = (count, [f"{name}.{i}" for i in range(len(module))], list(module))
    return best[1], best[2]


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, checked to be that of a model that can be pruned (see ``head_of``).

    Raises:
        InputError: no such folder or hub id, a model of another kind, or a quantised checkpoint.
    """
    try:
        folder = Path(source).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without permission, no such ~user
        raise InputError(f"{source} cannot be looked up: {reason(error)}") from error
    if exists:
        if not folder.is_dir() or not (folder / "config.json").is_file():
            raise InputError(f"{source} is not a model folder: it holds no config.json")
        try:
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{source}/config.json cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{source}/config.json holds {type(content).__name__}, not an object of settings")
    elif source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1:
        raise InputError(f"there is no model folder {source}")
    try:
        config = AutoConfig.from_pretrained(str(folder) if exists else source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value, a wrong type and a failing network each have their own types there
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source} comes with code of its own, which runs only with --trust-remote-code"
            ) from error
        what = "/config.json cannot be used" if exists else " is neither a local model folder nor a hub model to be had"
        raise InputError(f"{source}{what}: {reason(error)}") from error
    for name, kind in (("architectures", list), ("auto_map", dict)):
        if not isinstance(getattr(config, name, None) or kind(), kind):
            raise InputError(
                f"{source}/config.json has {name} {shown(getattr(config, name))}; it must be a {kind.__name__}"
            )
    if not all(isinstance(name, str) for name in config.architectures or []):
        raise InputError(f"{source}/config.json has architectures {shown(config.architectures)}; it must hold names")
    if getattr(config, "quantization_config", None):
        raise InputError(f"{source} is a quantised checkpoint; prune the full-precision model, then quantise that")
    if head_of(config) is None:
        raise InputError(
            f"{source} is not a causal language model, nor a masked one, a sequence classifier or a bare encoder (type "
            f"{config.model_type}, architectures {config.architectures or []}); what it should still do is not defined"
        )
    return config


def head_of(config: Any) -> Head | None:
    """What a model with this configuration ends in; None for any other kind of model."""
    names = config.architectures or []
    name = names[0].removeprefix("Pruned") if names else ""
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if "ForMaskedLM" in name:
        return "masked" if encoder else None
    if "ForSequenceClassification" in name:
        return None if config.is_encoder_decoder else "classes"
    both_sides = encoder and not getattr(config, "is_decoder", True)  # BERT and its kin, unless told otherwise
    if name.endswith("Model") and "LMHead" not in name:
        return "encoder" if both_sides or (encoder and not hasattr(config, "is_decoder")) else None
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    named = not names or any("CausalLM" in a or "LMHead" in a for a in names)
    return "causal" if causal and named and not both_sides else None


def load(source: str | Path, **options: Any) -> PreTrainedModel:
    """``from_pretrained`` with the class that fits the checkpoint, models with widths of their own included.

    Those need no remote code here. Pickles are refused.

    Args:
        source: local folder or hub id.
        options: of ``from_pretrained``.
    """
    _check_files(str(source), Path(source).expanduser())
    options["use_safetensors"] = True
    config = AutoConfig.from_pretrained(source, trust_remote_code=options.get("trust_remote_code", False))
    head = head_of(config)
    named = getattr(transformers, (config.architectures or [""])[0], None) if head is None else None
    kind = class_with_own_widths(config) or named or LOADERS[head or "causal"]
    return cast(PreTrainedModel, kind.from_pretrained(source, **options))


def class_with_own_widths(config: Any) -> Any:
    """The class of a model whose blocks have widths of their own; None for any other."""
    if not hasattr(config, "pruned_shapes"):
        return None
    return with_own_widths(getattr(transformers, config.architectures[0].removeprefix("Pruned")))


def load_model(
    source: str, *, dtype: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model for pruning: evaluation mode, finite weights.

    Args:
        source: local folder or hub id.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
        device: of torch.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        InputError: as ``load_config``, or weights that are missing, broken, NaN or infinite.
    """
    load_config(source, trust_remote_code=trust_remote_code)
    folder = Path(source).expanduser()
    try:
        loaded = load(
            str(folder) if folder.exists() else source,
            dtype=DTYPES[dtype] if dtype else "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except InputError:
        raise
    except Exception as error:  # safetensors, torch and the hub raise unrelated types for broken files
        raise InputError(f"the weights of {source} cannot be loaded: {reason(error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)  # as asked for by output_loading_info
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise InputError(f"the checkpoint {source} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"the checkpoint {source} has {name} as {list(stored)}; its config.json makes it {list(wanted)}"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: weight {name} holds NaN or infinity; the checkpoint is broken")
    model.to(device)  # type: ignore[arg-type]  # the stubs confuse the overloads
    return cast(PreTrainedModel, model.eval())


def _check_files(source: str, folder: Path) -> None:
    """All weights are in safetensors files of the checkpoint itself; a pickle is never loaded.

    Raises:
        InputError: there are pickles alone, or the index of shards names something else.
    """
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and (found := sorted(folder.glob("*.bin"))):
        raise InputError(
            f"{source} holds its weights as {found[0].name}, a pickle, which can run code and is never loaded; save "
            "the model again as safetensors"
        )
    name = "model.safetensors.index.json"
    index = cached_file(
        str(folder) if folder.is_dir() else source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is None:
        return
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{source}/{name} cannot be read: {reason(error)}") from error
    for shard in shards:
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise InputError(f"{source}/{name} names {shown(shard)}, which is no safetensors file beside it")


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: the folder or hub id has none.
    """
    folder = Path(source).expanduser()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if folder.exists() else source, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as for the weights
        raise InputError(f"{source} has no usable tokenizer (tokenizer.json or its like): {reason(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise InputError(f"{source} has no usable tokenizer: its files are missing, or its vocabulary is empty")
    return tokenizer


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's positions allow, or None if its configuration states none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
