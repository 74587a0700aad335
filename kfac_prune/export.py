"""Saving a pruned model as a plain Hugging Face checkpoint, and proving that it loads as what was saved."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kfac_prune import pruned_model
from kfac_prune.errors import InputError, reason
from kfac_prune.experts import whole_experts
from kfac_prune.loading import load, modules_of, side_file

#: File of a checkpoint that holds the code of a model with widths of its own.
CODE = "pruned_model.py"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write configuration, safetensors shards with exact zeros, and tokenizer.

    No sparsity or quantisation entry is added to the configuration: servers refuse or misread them. Experts that were
    split are whole again. A model with widths of its own takes along the code that ``trust_remote_code=True`` runs.
    """
    with whole_experts(model):
        model.save_pretrained(folder)
    if hasattr(model.config, "pruned_shapes"):
        code = Path(pruned_model.__file__).read_text(encoding="utf-8")
        base = type(model).__name__.removeprefix("Pruned")
        (folder / CODE).write_text(code.replace("@BASE@", base), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_saves(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """All but the weights can be written, which need not be so of what could be read.

    Raises:
        InputError: transformers refuses; says which part and why.
    """
    generation = getattr(model, "generation_config", None)  # of models that generate
    parts = {"config.json": model.config, "generation_config.json": generation, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as place:
        for name, part in parts.items():
            try:
                if part is not None:
                    part.save_pretrained(place)
            except Exception as error:  # validators of transformers raise types of their own
                source = model.config.name_or_path
                raise InputError(f"the {name} of {source} can be loaded and not saved: {reason(error)}") from error


def save_side_files(source: str, folder: Path) -> None:
    """Take along what makes a sentence-transformers model of an encoder: its list of modules and their settings."""
    if side_file(source, "modules.json") is None:
        return
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # its name once had them
    names = ["modules.json", "config_sentence_transformers.json", *(f"sentence_{kind}_config.json" for kind in kinds)]
    names += [f"{path}/config.json" for path in modules_of(source).values() if path]
    for name in names:
        file = side_file(source, name)
        if file is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def verify_saved(model: PreTrainedModel, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Reload a checkpoint and compare it with the model: every tensor bit for bit, and the ties between them.

    Raises:
        RuntimeError: it differs; names the tensor.
    """
    reloaded = load(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    with whole_experts(model):
        here, pairs = model.state_dict(), _tied_pairs(model)
    there = reloaded.state_dict()
    if here.keys() != there.keys():
        raise RuntimeError(f"the saved model in {folder} has other tensors: {sorted(here.keys() ^ there.keys())[:5]}")
    for name, tensor in here.items():
        if not torch.equal(tensor.cpu(), there[name].cpu()):
            raise RuntimeError(f"the saved model in {folder} differs in {name} after reloading")
    if pairs != _tied_pairs(reloaded):
        raise RuntimeError(f"the saved model in {folder} has lost a tie between input and output embeddings")


def _tied_pairs(model: PreTrainedModel) -> set[frozenset[str]]:
    """Groups of parameter names that share storage."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
