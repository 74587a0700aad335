"""Models from disk, their prunable layers, and weights that change and come back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from kfac_prune.errors import InputError
from kfac_prune.loading import context_length, load_config, load_model, load_tokenizer
from kfac_prune.models import Layer, WeightSwap, prunable_layers

NAMES = {
    "llama": [
        f"model.layers.{block}.{name}"
        for block in (0, 1)
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ],
    "gpt2": [
        f"transformer.h.{block}.{name}"
        for block in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "opt": [
        f"model.decoder.layers.{block}.{name}"
        for block in (0, 1)
        for name in (
            *("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
            *("fc1", "fc2"),
        )
    ],
}


def names_of(model, **patterns):
    return [layer.name for layer in prunable_layers(model, **patterns)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- which layers -----------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_head(family, model):
    assert names_of(model) == NAMES[family]
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    assert all(layer.module.weight is not tied for layer in prunable_layers(model))


def test_an_untied_head_is_left_out(model):
    expected = names_of(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert names_of(model) == expected


def test_a_projection_tied_to_the_embedding_is_left_out(make_model):
    model = make_model("llama")
    model.extra = nn.Linear(24, 48, bias=False)
    assert "extra" in names_of(model)
    model.extra.weight = model.get_input_embeddings().weight
    assert "extra" not in names_of(model)


def test_a_shared_matrix_is_one_layer(make_model):
    model = make_model("llama")
    first, second = (model.get_submodule(f"model.layers.{block}.mlp.down_proj") for block in (0, 1))
    second.weight = first.weight
    found = names_of(model)
    assert "model.layers.0.mlp.down_proj" in found
    assert "model.layers.1.mlp.down_proj" not in found
    assert len(found) == 13


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": ["*.mlp.*"]}, r"mlp"),
        ({"include": ["*.0.*", "*.q_proj"]}, r"\.0\.|q_proj"),
        ({"ignore": ["*.mlp.*"]}, r"self_attn"),
        ({"include": ["*_proj"], "ignore": ["*.1.*", "*.[qkv]_proj"]}, r"\.0\..*(o|gate|up|down)_proj"),
        ({"include": ["model.layers.1.mlp.up_proj"]}, r"layers\.1\.mlp\.up_proj"),
    ],
    ids=str,
)
def test_patterns_select_layers_in_the_models_order(make_model, patterns, expected):
    wanted = [name for name in NAMES["llama"] if re.search(expected, name)]
    assert names_of(make_model("llama"), **patterns) == wanted


@pytest.mark.parametrize("argument", ["include", "ignore"])
@pytest.mark.parametrize("pattern", ["*.MLP.*", "mlp", "lm_head", "", "model.layers.2.*"], ids=repr)
def test_a_pattern_that_matches_nothing_is_quoted(make_model, argument, pattern):
    with pytest.raises(InputError) as caught:
        prunable_layers(make_model("llama"), **{argument: ["*.mlp.*", pattern]})
    assert repr(pattern) in str(caught.value)
    assert "14 linear layers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_left_to_prune(make_model):
    model = make_model("gpt2")
    with pytest.raises(InputError, match="no layer of GPT2LMHeadModel is left"):
        prunable_layers(model, ignore=["*"])
    with pytest.raises(InputError, match="no layer"):
        prunable_layers(model, include=["*.mlp.*"], ignore=["*.c_fc", "*.c_proj"])


def test_a_model_without_linear_layers(make_model):
    model = make_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(InputError, match="no layer of LlamaForCausalLM is left"):
        prunable_layers(model)
    with pytest.raises(InputError, match=r"'\*' matches nothing: LlamaForCausalLM has no linear layer"):
        prunable_layers(model, include=["*"])


# --- one layer --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[nn.Linear, Conv1D], ids=["linear", "conv1d"])
def layer(request):
    """W: [5, 3] with bias, whatever the module."""
    torch.manual_seed(0)
    module = nn.Linear(3, 5) if request.param is nn.Linear else Conv1D(5, 3)
    return Layer("it", module)


def test_the_weight_maps_inputs_to_outputs(near, layer):
    x = randn(7, 3)
    assert layer.shape == (5, 3) == layer.weight.shape
    assert not layer.weight.requires_grad
    near(x @ layer.weight.T + layer.bias, layer.module(x).detach(), 1e-6)


def test_assign_replaces_weight_and_bias_and_leaves_the_old_tensors(near, layer):
    old_weight, old_bias = layer.weight, layer.bias
    values = old_weight.clone(), old_bias.clone()
    parameters = dict(layer.module.named_parameters())
    weight, bias, x = randn(5, 3, seed=1), randn(5, seed=2), randn(7, 3)
    layer.assign(weight, bias)
    near(layer.module(x).detach(), x @ weight.T + bias, 1e-6)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(old_weight, values[0])
    assert torch.equal(old_bias, values[1])
    assert all(layer.module.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in parameters.values())


def test_assign_takes_no_copy_of_what_fits(layer):
    weight, bias = layer.stored(layer.stored(randn(5, 3, seed=1)).contiguous()), randn(5, seed=2)
    layer.assign(weight, bias)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.bias.data_ptr() == bias.data_ptr()


def test_assign_without_a_bias_keeps_the_bias(layer):
    bias = layer.bias.clone()
    layer.assign(torch.zeros(5, 3))
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_assign_casts_to_the_parameters_dtype(layer, stored):
    layer.module.to(stored)
    weight = randn(5, 3, seed=1, dtype=torch.float64)
    layer.assign(weight)
    assert layer.weight.dtype == stored
    assert torch.equal(layer.weight, weight.to(stored))


def test_a_layer_without_bias():
    layer = Layer("it", nn.Linear(3, 5, bias=False))
    assert layer.bias is None
    layer.assign(torch.ones(5, 3))
    assert layer.weight.sum() == 15


# --- weights that come back -------------------------------------------------------------------------------------


def change_all(layers):
    for layer in layers:
        layer.assign(2 * layer.weight, None if layer.bias is None else layer.bias + 1)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_weights_are_dense_within_the_block_and_come_back(make_model, family, dtype):
    model = make_model(family, dtype=dtype)
    layers, dense = prunable_layers(model), snapshot(model)
    swap = WeightSwap(layers)
    change_all(layers)
    changed = snapshot(model)
    assert not torch.equal(changed[f"{layers[0].name}.weight"], dense[f"{layers[0].name}.weight"])
    for _ in range(2):
        with swap.swapped_in():
            assert_state(model, dense)
        assert_state(model, changed)
    swap.restore()
    assert_state(model, dense)


def test_swapped_weights_come_back_after_an_exception(model):
    layers, dense = prunable_layers(model), snapshot(model)
    swap = WeightSwap(layers)
    change_all(layers)
    changed = snapshot(model)

    def fails():
        with swap.swapped_in():
            assert_state(model, dense)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert_state(model, changed)


def test_a_change_within_the_block_does_not_reach_the_held_weights(model):
    layers, dense = prunable_layers(model), snapshot(model)
    swap = WeightSwap(layers)
    with swap.swapped_in():
        change_all(layers)
    assert_state(model, dense)
    change_all(layers)
    change_all(layers)
    swap.restore()
    assert_state(model, dense)


def test_held_weights_cost_no_copy(model):
    before = [parameter.data_ptr() for parameter in model.parameters()]
    swap = WeightSwap(prunable_layers(model))
    with swap.swapped_in():
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


# --- from disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, make_model):
    """A Llama's folder, its config.json as a dictionary, and its tensors."""
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write_config(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def refused(call, *args, **kwargs):
    """The message of the InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no model folder /no/such/folder"),
        ("./nowhere", "no model folder ./nowhere"),
        ("a/b/c", "no model folder a/b/c"),
        ("~no-such-user-here/model", "~no-such-user-here/model cannot be looked up"),
        ("x" * 400, "cannot be looked up"),
        ("nobody/no-model-of-this-name", "nobody/no-model-of-this-name is neither"),
        ("not a name", "not a name is neither"),
    ],
    ids=["absolute", "relative", "deep", "user", "long", "hub", "no-name"],
)
def test_a_source_that_does_not_exist(source, message):
    assert message in refused(load_config, source)


def test_a_folder_without_a_configuration(tmp_path):
    assert "holds no config.json" in refused(load_config, str(tmp_path))
    (tmp_path / "file").write_text("text")
    assert "holds no config.json" in refused(load_config, str(tmp_path / "file"))


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "llama",}', "\x00"], ids=repr)
def test_a_configuration_that_is_not_json(tmp_path, content):
    assert "config.json cannot be read" in refused(load_config, write_config(tmp_path, content))


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"model_type": "nonesuch"}', '{"model_type": 3}'])
def test_a_configuration_of_no_known_model(tmp_path, content):
    assert str(tmp_path) in refused(load_config, write_config(tmp_path, content))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [({"hidden_size": "wide"}, "hidden_size"), ({"num_attention_heads": 5}, "not a multiple")],
    ids=["type", "value"],
)
def test_a_configuration_with_a_wrong_entry(saved, entry, reason):
    folder, config, _ = saved
    assert reason in refused(load_config, write_config(folder, config | entry))


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "bert", "architectures": ["BertLMHeadModel"]},
        {"model_type": "bert"},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "t5", "architectures": ["T5ForSequenceClassification"]},
        {"model_type": "bart", "architectures": ["BartModel"]},
        {"model_type": "gpt2", "architectures": ["GPT2Model"]},
        {"model_type": "vit"},
    ],
    ids=["bert-head-sees-both-sides", "bert", "t5", "t5-classifier", "both-halves", "no-head", "vision"],
)
def test_a_model_of_another_kind(tmp_path, content):
    assert "is not a causal language model" in refused(load_config, write_config(tmp_path, content))


def test_a_bert_that_is_a_decoder_is_causal(tmp_path):
    content = {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}
    assert load_config(write_config(tmp_path, content)).model_type == "bert"


def test_a_quantised_checkpoint(saved):
    folder, config, _ = saved
    source = write_config(folder, config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "is a quantised checkpoint" in refused(load_config, source)


def test_a_model_from_disk(saved, make_model):
    model = load_model(str(saved[0]))
    assert not model.training
    assert_state(model, make_model("llama").state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_in_another_dtype(saved, dtype):
    model = load_model(str(saved[0]), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_the_checkpoints_dtype_is_kept(tmp_path, make_model):
    make_model("opt", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.bfloat16


def test_missing_and_truncated_weights(saved):
    folder, _, _ = saved
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for content in (data[: len(data) // 2], data[:-1], data[:4], b""):
        file.write_bytes(content)
        assert f"the weights of {folder} cannot be loaded" in refused(load_model, str(folder))
    file.unlink()
    assert "model.safetensors" in refused(load_model, str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_weight_that_is_not_finite_is_named(saved, value):
    folder, _, tensors = saved
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refused(load_model, str(folder))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(saved):
    folder, _, tensors = saved
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = refused(load_model, str(folder))
    assert "lacks 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight" in message


def test_tensors_that_the_model_has_no_place_for_are_told(saved, caplog):
    folder, _, tensors = saved
    load_model(str(folder))
    assert not caplog.records
    save_file(tensors | {"model.mtp.weight": torch.ones(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    load_model(str(folder))
    assert f"1 tensors of {folder} are no part of LlamaForCausalLM and are not kept, such as model.mtp.weight" in [
        record.getMessage() for record in caplog.records
    ]


def test_a_tensor_of_another_shape_is_refused(saved):
    folder, _, tensors = saved
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = refused(load_model, str(folder))
    assert "model.norm.weight as [5]" in message
    assert "[24]" in message


def test_loading_checks_the_configuration_first(tmp_path):
    assert "holds no config.json" in refused(load_model, str(tmp_path))


def test_a_tokenizer_from_disk(saved):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(saved[0])
    assert load_tokenizer(str(saved[0]))(["two one three"])["input_ids"] == [[2, 1, 0]]


def test_a_folder_without_a_tokenizer(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    assert f"{tmp_path} has no usable tokenizer" in refused(load_tokenizer, str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"], ids=repr)
def test_a_broken_tokenizer(saved, content):
    (saved[0] / "tokenizer.json").write_text(content)
    assert "has no usable tokenizer" in refused(load_tokenizer, str(saved[0]))


def test_the_context_length(model):
    assert context_length(model) == 16


@pytest.mark.parametrize("value", [None, 0, -1, "many"], ids=repr)
def test_no_context_length(make_model, value):
    model = make_model("llama")
    object.__setattr__(model.config, "max_position_embeddings", value)
    assert context_length(model) is None


def test_a_context_length_in_a_nested_configuration(make_model):
    model = make_model("llama")
    text = model.config

    class Nested:
        def get_text_config(self):
            return text

    model.config = Nested()
    assert context_length(model) == 16
