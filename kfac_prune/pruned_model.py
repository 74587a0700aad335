"""A transformers model whose blocks have widths of their own, as ``pruned_shapes`` in its configuration says.

This file is also written beside the weights of such a model, where ``trust_remote_code=True`` finds it; it needs
nothing but torch and transformers. ``kfac_prune.load`` loads the model without remote code.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn


def with_own_widths(base: Any) -> Any:
    """The model class ``base``, whose constructor gives the layers in ``config.pruned_shapes`` their own [out, in].

    A matrix of experts there has three sizes, [experts, out, in]. ``config.pruned_head_counts`` gives attention modules
    their own (query heads, key-value heads).
    """

    class Pruned(base):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for name, shape in config.pruned_shapes.items():
                parent, _, child = name.rpartition(".")
                old: Any = getattr(self.get_submodule(parent), child)
                *_, rows, columns = shape
                new: Any
                if isinstance(old, nn.Parameter):  # of experts
                    new = nn.Parameter(torch.empty(shape, device=old.device, dtype=old.dtype))
                elif isinstance(old, nn.Linear):
                    new = nn.Linear(columns, rows, old.bias is not None, old.weight.device, old.weight.dtype)
                else:  # GPT-2's Conv1D, whose weight is [in, out]
                    new = type(old)(rows, columns).to(device=old.weight.device, dtype=old.weight.dtype)
                setattr(self.get_submodule(parent), child, new)
            for name, (heads, kv_heads) in config.pruned_head_counts.items():
                attention = self.get_submodule(name)
                counts = {"num_key_value_groups": heads // kv_heads, "num_key_value_heads": kv_heads}
                counts |= {"num_heads": heads, "num_attention_heads": heads}
                for attribute, value in counts.items():
                    if hasattr(attention, attribute):
                        setattr(attention, attribute, value)
                if hasattr(attention, "qkv_proj"):  # is split by what the attention's own configuration says
                    attention.config = copy.copy(config)
                    attention.config.num_attention_heads = heads

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    return Pruned


BASE = "@BASE@"
if hasattr(transformers, BASE):
    globals()[f"Pruned{BASE}"] = with_own_widths(getattr(transformers, BASE))
