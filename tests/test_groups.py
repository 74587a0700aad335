"""Which units fall together, and what is told about those that cannot be removed."""

import re

import pytest
import torch
from families import COUPLED, FAMILIES, llama_like, random_model, remove
from transformers import BitNetConfig, CohereConfig, GptOssConfig, StableLmConfig

from kfac_prune.errors import InputError
from kfac_prune.inspect_model import describe
from kfac_prune.models import prunable_layers
from kfac_prune.structure.groups import FfnUnits, find_ffn, find_heads, saving
from kfac_prune.structure.shrink import shrink

ALL = pytest.mark.parametrize("name", FAMILIES)
WITH_HEADS = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.heads])
NO_HEADS = pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bert"])


@ALL
def test_ffns(name):
    family = FAMILIES[name]
    model = random_model(family)
    found = find_ffn(model, prunable_layers(model))
    assert [group.name for group in found] == [family.block.format(i) + family.ffn_module for i in (0, 1)]
    for number, group in enumerate(found):
        block = family.block.format(number)
        assert group.units == 40
        assert group.everything().tolist() == list(range(40))
        assert group.consumer.name == f"{block}.{family.ffn_reader[0]}"
        assert [f"{layer.name}.weight" for layer in group.producers] == [
            f"{block}.{tensor}" for tensor in family.ffn if tensor.endswith("weight")
        ]


@WITH_HEADS
def test_heads(name):
    family = FAMILIES[name]
    model = random_model(family)
    found = find_heads(model, prunable_layers(model))
    assert [group.name for group in found] == [family.block.format(i) + family.head_module for i in (0, 1)]
    for number, group in enumerate(found):
        block = family.block.format(number)
        assert (group.groups, group.per_group) == family.counts
        assert group.head_dim == family.head_dim
        assert group.consumer.name == f"{block}.{family.head_reader}"
        assert [f"{layer.name}.weight" for layer in group.producers] == [
            f"{block}.{tensor}" for tensor in family.heads if tensor.endswith("weight")
        ]


def test_rows_and_columns_of_grouped_heads():
    model = random_model(FAMILIES["llama"])
    group = find_heads(model, prunable_layers(model))[0]
    assert group.everything().tolist() == [[0, 1], [2, 3], [4, 5]]
    kept = torch.tensor([[1], [4]])  # of the first group and of the last
    query = [4, 5, 6, 7, 16, 17, 18, 19]
    shared = [0, 1, 2, 3, 8, 9, 10, 11]
    assert group.columns(kept).tolist() == query
    assert [rows.tolist() for _, rows in group.rows(kept)] == [query, shared, shared]


def test_rows_of_stacked_projections():
    """Queries 0 to 23, keys 24 to 35, values 36 to 47; gates 0 to 39, ups 40 to 79."""
    model = random_model(FAMILIES["phi3"])
    layers = prunable_layers(model)
    ((_, rows),) = find_heads(model, layers)[1].rows(torch.tensor([[2, 3]]))
    assert rows.tolist() == [*range(8, 16), *range(28, 32), *range(40, 44)]
    ((_, rows),) = find_ffn(model, layers)[1].rows(torch.tensor([3, 39]))
    assert rows.tolist() == [3, 39, 43, 79]


@pytest.mark.parametrize(
    ("name", "unit", "group", "head"),
    [
        ("llama", 72, 4 * 24 * (2 + 1 + 1 + 2), 3 * 4 * 24 * 2),
        ("phi3", 72, 4 * 24 * (2 + 1 + 1 + 2), 3 * 4 * 24 * 2),
        ("opt", 48, 6 * 24 * 4, None),
        ("vit", 48, 6 * 24 * 4, None),
        ("gpt2", 48, None, None),
    ],
)
def test_weights_that_go(name, unit, group, head):
    """``head``: with one query head of each group keys and values stay."""
    model = random_model(FAMILIES[name])
    layers = prunable_layers(model)
    ffn = find_ffn(model, layers)[0]
    assert saving(ffn, ffn.everything()) == 0
    assert saving(ffn, ffn.everything()[1:]) == unit
    assert saving(ffn, ffn.everything()[:1]) == 39 * unit
    for attention in find_heads(model, layers):
        everything = attention.everything()
        assert saving(attention, everything) == 0
        assert saving(attention, everything[1:]) == group
        if head is not None:
            assert saving(attention, everything[:, :1]) == head


@NO_HEADS
def test_heads_that_cannot_be_told_apart(name):
    model = random_model(FAMILIES[name])
    assert find_heads(model, prunable_layers(model)) == []


def test_heads_that_a_norm_couples_are_refused():
    model = random_model(COUPLED)
    layers = prunable_layers(model)
    assert len(find_ffn(model, layers)) == 2
    with pytest.raises(
        InputError, match=r"heads of model\.layers\.0\.self_attn cannot be removed: its q_norm\.weight \[24\]"
    ):
        find_heads(model, layers)


@pytest.mark.parametrize(
    ("config", "options", "tensor"),
    [
        (StableLmConfig, {"qk_layernorm": True}, "q_layernorm.norms.0.weight"),
        (CohereConfig, {"use_qk_norm": True}, "q_norm.weight"),
        (GptOssConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
    ],
    ids=["stablelm", "cohere", "gpt_oss"],
)
def test_heads_with_tensors_of_their_own_are_refused(config, options, tensor):
    """Each would have to be sliced as well; a list of norms per head would silently shift."""
    model = random_model(llama_like(config, **options))
    assert tensor in dict(model.model.layers[0].self_attn.named_parameters())
    with pytest.raises(InputError, match=r"the heads of model\.layers\.0\.self_attn cannot be removed"):
        find_heads(model, prunable_layers(model))


def test_an_ffn_with_a_norm_over_its_units_is_left_out():
    model = random_model(llama_like(BitNetConfig))
    assert find_ffn(model, prunable_layers(model)) == []


@pytest.mark.parametrize("left_out", ["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_layer_left_out_takes_its_group_along(left_out):
    model = random_model(FAMILIES["llama"])
    layers = prunable_layers(model, ignore=[f"*.1.*.{left_out}"])
    names = [group.name for group in (*find_ffn(model, layers), *find_heads(model, layers))]
    gone = "mlp" if left_out in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    everything = [f"model.layers.{i}.{module}" for module in ("mlp", "self_attn") for i in (0, 1)]
    assert names == [name for name in everything if name != f"model.layers.1.{gone}"]


def test_only_what_is_included():
    model = random_model(FAMILIES["llama"])
    layers = prunable_layers(model, include=["*.mlp.*"])
    assert all(isinstance(group, FfnUnits) for group in (*find_ffn(model, layers), *find_heads(model, layers)))
    assert len(find_ffn(model, layers)) == 2
    assert find_heads(model, layers) == []


def told(tmp_path, family, *, ignore=(), **options):
    """The part of ``kfac-prune inspect`` on groups."""
    random_model(family, **options).save_pretrained(tmp_path)
    return describe(str(tmp_path), ignore=ignore).split("\n\n")[1]


def group_rows(text):
    """(name, size, weights each) of every group's line."""
    return re.findall(r"^(\S+) +(\d+ hidden|\d+ x \d+ heads) +([\d,]+)$", text, re.MULTILINE)


def test_inspect_lists_groups(tmp_path):
    text = told(tmp_path, FAMILIES["llama"])
    assert group_rows(text) == [
        ("model.layers.0.mlp", "40 hidden", "72"),
        ("model.layers.1.mlp", "40 hidden", "72"),
        ("model.layers.0.self_attn", "3 x 2 heads", "576"),
        ("model.layers.1.self_attn", "3 x 2 heads", "576"),
    ]
    assert text.endswith("plain configuration can hold: 3 x 2, 3 x 1, 2 x 2, 2 x 1, 1 x 2, 1 x 1")
    assert "cannot" not in text


def test_inspect_tells_which_heads_fit(tmp_path):
    assert told(tmp_path, FAMILIES["opt"]).endswith("plain configuration can hold: 4 x 1")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (FAMILIES["gpt2"], "no attention with a layout in which heads can be told apart"),
        (FAMILIES["gpt_neox"], "no attention with a layout in which heads can be told apart"),
        (
            COUPLED,
            "model.layers.0.self_attn cannot be removed: its q_norm.weight [24] belongs to several heads of width 4",
        ),
    ],
    ids=["gpt2", "gpt_neox", "olmo2"],
)
def test_inspect_tells_why_heads_stay(family, reason, tmp_path):
    text = told(tmp_path, family)
    assert [size for _, size, _ in group_rows(text)] == ["40 hidden"] * 2
    last = text.splitlines()[-1]
    assert last.startswith("heads cannot be removed: ")
    assert reason in last


def test_inspect_of_one_head(tmp_path):
    text = told(tmp_path, FAMILIES["llama"], num_attention_heads=1, num_key_value_heads=1)
    assert re.search(r"^model\.layers\.0\.self_attn +1 x 1 heads +the last$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inspect_of_a_model_with_widths_of_its_own(name, tmp_path):
    model = random_model(FAMILIES[name])
    shrink(model, remove(model, FAMILIES[name], (24, 16)).cuts).save_pretrained(tmp_path)
    text = describe(str(tmp_path))
    assert [size for _, size, _ in group_rows(text)][:2] == ["24 hidden", "16 hidden"]


def test_inspect_without_any_ffn(tmp_path):
    text = told(tmp_path, FAMILIES["llama"], ignore=["*.down_proj"])
    assert [name for name, _, _ in group_rows(text)] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "FFN units cannot be removed: " in text


def test_inspect_of_queries_that_share_all_keys(tmp_path):
    """With one KV group, the unit is a query head."""
    text = told(tmp_path, FAMILIES["llama"], num_key_value_heads=1)
    assert group_rows(text)[2:] == [(f"model.layers.{i}.self_attn", "1 x 6 heads", str(2 * 4 * 24)) for i in (0, 1)]
