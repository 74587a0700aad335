"""Tiny random models of many families, and what removing units does to each of their tensors, written out by name."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from kfac_prune.models import prunable_layers
from kfac_prune.structure.groups import find_ffn, find_heads
from kfac_prune.structure.shrink import Cut

HIDDEN = 24
WIDTH = 40
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEXT = {"vocab_size": 48, "max_position_embeddings": 16, **IDS}
BLOCKS = {"hidden_size": HIDDEN, "num_hidden_layers": 2}
GATED = {**TEXT, **BLOCKS, "intermediate_size": WIDTH}
GROUPED = {**GATED, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
FOUR_HEADS = {**BLOCKS, "intermediate_size": WIDTH, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    """A configuration, and where the units lie in the tensors of a block.

    Attributes:
        config: of a model with two blocks.
        block: name of a block, with its number left open.
        ffn: tensor -> (axis, how often the units are stacked on it).
        ffn_reader: consumer of the units, and the axis.
        heads: tensor -> the stacked parts of axis 0; empty where heads cannot be told apart.
        head_reader: consumer of the heads; its axis is 1.
        counts: (KV groups, query heads in each).
        head_dim: width of a head.
        ffn_module, head_module: below the block.
        auto: the Auto class.
        width_field: what the configuration calls the width.
    """

    config: Callable
    block: str
    ffn: dict
    ffn_reader: tuple
    heads: dict = field(default_factory=dict)
    head_reader: str = ""
    counts: tuple = (0, 0)
    head_dim: int = 0
    ffn_module: str = ".mlp"
    head_module: str = ".self_attn"
    auto: type = AutoModelForCausalLM
    width_field: str = "intermediate_size"


def llama_like(config_class, biases=False, **options):
    heads = {"self_attn.q_proj.weight": "q", "self_attn.k_proj.weight": "k", "self_attn.v_proj.weight": "v"}
    if biases:
        heads |= {name.replace("weight", "bias"): parts for name, parts in heads.items()}
    return Family(
        config=lambda **more: config_class(**{**GROUPED, **options, **more}),
        block="model.layers.{}",
        ffn={"mlp.gate_proj.weight": (0, 1), "mlp.up_proj.weight": (0, 1)},
        ffn_reader=("mlp.down_proj", 1),
        heads=heads,
        head_reader="self_attn.o_proj",
        counts=(3, 2),
        head_dim=4,
    )


def with_biases(names, parts):
    return {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True) for kind in ("weight", "bias")}


FAMILIES = {
    "llama": llama_like(LlamaConfig),
    "llama-biased": llama_like(LlamaConfig, biases=True, attention_bias=True),
    "llama-tied": llama_like(LlamaConfig, tie_word_embeddings=True),
    "mistral": llama_like(MistralConfig, sliding_window=None),
    "qwen2": llama_like(Qwen2Config, biases=True),
    "qwen3": llama_like(Qwen3Config),
    "gemma": llama_like(GemmaConfig),
    "gemma2": llama_like(Gemma2Config, sliding_window=3),
    "phi3": Family(
        config=lambda **more: Phi3Config(**{**GROUPED, **more}),
        block="model.layers.{}",
        ffn={"mlp.gate_up_proj.weight": (0, 2)},
        ffn_reader=("mlp.down_proj", 1),
        heads={"self_attn.qkv_proj.weight": "qkv"},
        head_reader="self_attn.o_proj",
        counts=(3, 2),
        head_dim=4,
    ),
    "opt": Family(
        config=lambda: OPTConfig(**TEXT, **BLOCKS, ffn_dim=WIDTH, num_attention_heads=4, word_embed_proj_dim=HIDDEN),
        block="model.decoder.layers.{}",
        ffn={"fc1.weight": (0, 1), "fc1.bias": (0, 1)},
        ffn_reader=("fc2", 1),
        heads=with_biases(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "qkv"),
        head_reader="self_attn.out_proj",
        counts=(4, 1),
        head_dim=6,
        ffn_module="",
        width_field="ffn_dim",
    ),
    "gpt2": Family(
        config=lambda: GPT2Config(
            vocab_size=48, n_positions=16, n_embd=HIDDEN, n_inner=WIDTH, n_layer=2, n_head=4, **IDS
        ),
        block="transformer.h.{}",
        ffn={"mlp.c_fc.weight": (1, 1), "mlp.c_fc.bias": (0, 1)},  # [in, out]
        ffn_reader=("mlp.c_proj", 0),
        width_field="n_inner",
    ),
    "gpt_neox": Family(
        config=lambda: GPTNeoXConfig(**TEXT, **FOUR_HEADS),
        block="gpt_neox.layers.{}",
        ffn={"mlp.dense_h_to_4h.weight": (0, 1), "mlp.dense_h_to_4h.bias": (0, 1)},
        ffn_reader=("mlp.dense_4h_to_h", 1),
    ),
    "bert": Family(
        config=lambda: BertConfig(vocab_size=48, **FOUR_HEADS),
        block="bert.encoder.layer.{}",
        ffn={"intermediate.dense.weight": (0, 1), "intermediate.dense.bias": (0, 1)},
        ffn_reader=("output.dense", 1),
        ffn_module="",
        auto=AutoModelForMaskedLM,
    ),
    "vit": Family(
        config=lambda: ViTConfig(image_size=16, patch_size=8, **FOUR_HEADS),
        block="vit.layers.{}",
        ffn={"mlp.fc1.weight": (0, 1), "mlp.fc1.bias": (0, 1)},
        ffn_reader=("mlp.fc2", 1),
        heads=with_biases(["attention.q_proj", "attention.k_proj", "attention.v_proj"], "qkv"),
        head_reader="attention.o_proj",
        counts=(4, 1),
        head_dim=6,
        head_module=".attention",
        auto=AutoModelForImageClassification,
    ),
}
COUPLED = Family(lambda: Olmo2Config(**GROUPED), "model.layers.{}", {}, ())  # a norm over all heads


def random_model(family, dtype=torch.float32, seed=0, **options):
    """A model in evaluation mode whose every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the model's own initialisation
        model = family.auto.from_config(family.config(**options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def example(family, dtype=torch.float32):
    """What ``model(...)`` takes."""
    if family.auto is AutoModelForImageClassification:
        return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def logits(model, inputs):
    with torch.no_grad():
        return model(inputs).logits


def groups_of(model):
    """FFNs and attentions by name."""
    layers = prunable_layers(model)
    return {group.name: group for group in (*find_ffn(model, layers), *find_heads(model, layers))}


def some(total, count, seed):
    return sorted(random.Random(seed).sample(range(total), count))


@dataclass(frozen=True)
class Smaller:
    """A removal in three forms.

    Attributes:
        cuts: for ``shrink``.
        masked: the model with the consumers' new weights, zeros in the columns that go.
        state: what the tensors of the smaller model must be.
    """

    cuts: list
    masked: torch.nn.Module
    state: dict


def remove(model, family, widths=(), heads=(), *, was=None, seed=0):
    """Keep random units; consumers get other weights and biases than they had.

    Args:
        model: stays as it is.
        family: its layout.
        widths: FFN units that stay, per block, None for all; empty: all everywhere.
        heads: (KV groups, query heads in each) that stay, likewise.
        was: the counts before, per block, if the model is smaller than its family's.
        seed: of the choice.
    """
    masked, groups, cuts = copy.deepcopy(model), groups_of(model), []
    state = dict(model.state_dict())
    for number, width in enumerate(widths):
        if width is None:
            continue
        block = family.block.format(number)
        reader, axis = family.ffn_reader
        units = state[f"{block}.{reader}.weight"].shape[axis]
        kept = some(units, width, seed + number)
        for name, (along, copies) in family.ffn.items():
            parts = state[f"{block}.{name}"].chunk(copies, along)
            state[f"{block}.{name}"] = torch.cat(
                [part.index_select(along, torch.tensor(kept)) for part in parts], along
            )
        cut = _read(masked, state, f"{block}.{reader}", axis, kept)
        cuts.append(Cut(groups[block + family.ffn_module], torch.tensor(kept), *cut))
    for number, wanted in enumerate(heads):
        if wanted is None:
            continue
        block = family.block.format(number)
        all_groups, per_group = was[number] if was else family.counts
        chosen = {
            group: some(per_group, wanted[1], seed + 10 * number + group)
            for group in some(all_groups, wanted[0], seed + number)
        }
        queries = [group * per_group + member for group, members in chosen.items() for member in members]
        for name, parts in family.heads.items():
            total = {"q": all_groups * per_group, "k": all_groups, "v": all_groups}
            pieces = iter(state[f"{block}.{name}"].split(family.head_dim))
            stay = []
            for part in parts:
                own = [next(pieces) for _ in range(total[part])]
                stay += [own[i] for i in (queries if part == "q" else chosen)]
            assert next(pieces, None) is None
            state[f"{block}.{name}"] = torch.cat(stay)
        columns = [query * family.head_dim + i for query in queries for i in range(family.head_dim)]
        cut = _read(masked, state, f"{block}.{family.head_reader}", 1, columns)
        kept = torch.tensor(queries).view(wanted)
        cuts.append(Cut(groups[block + family.head_module], kept, *cut))
    return Smaller(cuts, masked, state)


def _read(masked, state, name, axis, kept):
    """Shift a consumer and zero what goes; the smaller weight [out, in] and bias."""
    module = masked.get_submodule(name)
    with torch.no_grad():
        module.weight.add_(0.1)
        gone = torch.ones(module.weight.shape[axis], dtype=torch.bool)
        gone[kept] = False
        module.weight.movedim(axis, 0)[gone] = 0
        state[f"{name}.weight"] = module.weight.detach().index_select(axis, torch.tensor(kept))
        if module.bias is None:
            bias = None
        else:
            module.bias.add_(0.1)
            bias = state[f"{name}.bias"] = module.bias.detach().clone()
    weight = state[f"{name}.weight"]
    return (weight.T if isinstance(module, Conv1D) else weight), bias
