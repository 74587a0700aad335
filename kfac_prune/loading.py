"""Models and tokenizers from disk or hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import safe_open
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
from transformers.utils.hub import cached_file

from kfac_prune.errors import InputError, reason, shown
from kfac_prune.pruned_model import with_own_widths

logger = logging.getLogger("kfac_prune")

#: What a model ends in, told by the name of its architecture.
Head = Literal["causal", "masked", "classes", "encoder"]
LOADERS: dict[Head, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        raise InputError(f"there is no model folder {source}{'' if folder.is_absolute() else f' in {Path.cwd()}'}")
    try:
        config = AutoConfig.from_pretrained(str(folder) if exists else source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value, a wrong type and a failing network each have their own types there
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source} comes with code of its own, which runs only with --trust-remote-code"
            ) from error
        if exists:
            raise InputError(f"{source}/config.json cannot be used: {reason(error)}") from error
        what = f"neither a local model folder nor a hub model to be had: there is no such folder in {Path.cwd()}"
        raise InputError(f"{source} is {what}, and the hub library says: {reason(error)}") from error
    for name, kind in (("architectures", list), ("auto_map", dict)):
        if not isinstance(getattr(config, name, None) or kind(), kind):
            raise InputError(
                f"{source}/config.json has {name} {shown(getattr(config, name))}; it must be a {kind.__name__}"
            )
    if not all(isinstance(name, str) for name in config.architectures or []):
        raise InputError(f"{source}/config.json has architectures {shown(config.architectures)}; it must hold names")
    if getattr(config, "quantization_config", None):
        raise InputError(f"{source} is a quantised checkpoint; prune the full-precision model, then quantise that")
    if head_of(config, source) is None:
        raise InputError(
            f"{source} is not a causal language model, nor a masked one, a sequence classifier or a bare encoder (type "
            f"{config.model_type}, architectures {config.architectures or []}); what it should still do is not defined"
        )
    return config


def head_of(config: Any, source: str) -> Head | None:
    """What a model with this configuration ends in; None for any other kind of model.

    Where sentence-transformers' files come with it, it is an encoder whatever head its architecture names: they read
    the vectors before that, and the checkpoint often lacks its weights.

    Args:
        config: of the model.
        source: local folder or hub id that it is from.
    """
    names = config.architectures or []
    name = names[0].removeprefix("Pruned") if names else ""
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if encoder and modules_of(source).keys() >= {"Transformer", "Pooling"}:
        return "encoder"
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


def side_file(source: str, name: str) -> Path | None:
    """A file that comes with a model, from its folder or the hub; None if there is none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def modules_of(source: str) -> dict[str, str]:
    """Kind and folder of every module that modules.json lists; empty without such a file.

    Raises:
        InputError: the file cannot be read, or names a folder outside the model's.
    """
    file = side_file(source, "modules.json")
    if file is None:
        return {}
    try:
        parts = {str(part["type"]).rpartition(".")[2]: str(part["path"]) for part in read_json(file)}
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not a list of modules with type and path: {error}") from error
    for path in parts.values():
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{file} names {path!r}, which is not inside the model's folder")
    return parts


def read_json(path: Path) -> Any:
    """The content of a file that comes with a model.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


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
    head = head_of(config, str(source))
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
        raise InputError(f"the weights of {source} cannot be loaded: {_why(folder, error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)  # as asked for by output_loading_info
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise InputError(
            f"the checkpoint {source} lacks {len(missing)} of the model's tensors, such as {missing[0]}; fetch it "
            "again, whole, or see whether its config.json is that of another model"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"the checkpoint {source} has {name} as {list(stored)}; its config.json makes it {list(wanted)}"
        )
    if unknown := sorted(report["unexpected_keys"]):
        what = "%d tensors of %s are no part of %s and are not kept, such as %s"
        logger.warning(what, len(unknown), source, type(model).__name__, unknown[0])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: weight {name} holds NaN or infinity; the checkpoint is broken")
    model.to(device)  # type: ignore[arg-type]  # the stubs confuse the overloads
    return cast(PreTrainedModel, model.eval())


def _why(folder: Path, error: Exception) -> str:
    """Why weights cannot be loaded, with the file of a local checkpoint that is broken, if any, and what to do."""
    again = "the download may be incomplete: fetch the checkpoint again"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                continue
        except Exception as broken:  # a header of any content raises what the library happens to raise
            return f"{file.name} is not whole ({reason(broken)}); {again}"
    return f"{reason(error).rstrip('.')}; {again}" if isinstance(error, OSError) else reason(error)


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
        told = "backend tokenizer from one of" not in str(error)  # which lists what its own code was given
        raise InputError(f"{source} has no usable tokenizer: {reason(error) if told else _NO_TOKENIZER}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise InputError(f"{source} has no usable tokenizer: {_NO_TOKENIZER}")
    return tokenizer


_NO_TOKENIZER = (
    "its files are missing, or its vocabulary is empty; put those of the model's own tokenizer there (tokenizer.json "
    "and tokenizer_config.json)"
)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's positions allow, or None if its configuration states none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
