"""A saved model is the model that was saved."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kfac_prune.export import save_model, verify_saved
from kfac_prune.models import prunable_layers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def two_to_four(model):
    """Write zeros into the first two of every four weights of every prunable layer."""
    for layer in prunable_layers(model):
        keep = torch.arange(layer.shape[1]) % 4 >= 2
        layer.assign(layer.weight * keep)
    return model


def edit(folder, **changes):
    """Replace tensors of a saved model."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, {"format": "pt"})


@DTYPES
def test_a_round_trip_keeps_every_bit(tmp_path, make_model, family, dtype):
    model = two_to_four(make_model(family, dtype=dtype))
    save_model(model, None, tmp_path)
    verify_saved(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for layer in prunable_layers(loaded):
        assert not layer.weight[:, torch.arange(layer.shape[1]) % 4 < 2].any()
        assert (layer.weight != 0).double().mean() == 0.5
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_tie_stays(tmp_path, model):
    save_model(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.shape == (48, 24) for tensor in stored.values()) == 1
    assert "lm_head.weight" not in stored


def test_the_configuration_is_a_plain_one(tmp_path, model):
    before = model.config.to_dict()
    save_model(two_to_four(model), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in config if "quantization" in key or "sparsity" in key or "compress" in key]
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "model_type", "n_inner", "ffn_dim"):
        assert config.get(name) == before.get(name)


def test_only_standard_files_are_written(tmp_path, model):
    save_model(model, None, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_the_tokenizer_is_saved_beside_the_model(tmp_path, make_model):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    save_model(make_model("llama"), tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("two")["input_ids"] == [2]


@DTYPES
def test_shards_load_as_one_model(tmp_path, monkeypatch, make_model, family, dtype):
    model = two_to_four(make_model(family, dtype=dtype))
    whole = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, to: whole(self, to, max_shard_size="10KB"))
    save_model(model, None, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    verify_saved(model, tmp_path)


@pytest.mark.parametrize("change", ["one-bit", "pruned-weight-back", "sign"])
def test_a_changed_tensor_is_named(tmp_path, make_model, change):
    model = two_to_four(make_model("llama"))
    save_model(model, None, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = model.get_parameter(name).detach().clone()
    if change == "one-bit":
        tensor.view(torch.int32)[3, 2] ^= 1
    elif change == "sign":
        tensor[3, 2] = -tensor[3, 2]
    else:
        tensor[3, 0] = 1e-30
    edit(tmp_path, **{name: tensor})
    with pytest.raises(RuntimeError, match=f"differs in {name}"):
        verify_saved(model, tmp_path)


def test_a_changed_embedding_is_found_though_it_is_tied(tmp_path, model):
    save_model(model, None, tmp_path)
    (name,) = (n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    edit(tmp_path, **{name: model.get_parameter(name).detach() + 1})
    with pytest.raises(RuntimeError, match="differs in"):
        verify_saved(model, tmp_path)


def test_a_changed_bias_is_found(tmp_path, make_model):
    model = make_model("gpt2")
    save_model(model, None, tmp_path)
    bias = model.transformer.h[0].mlp.c_fc.bias
    with torch.no_grad():
        bias[3] += 1
    with pytest.raises(RuntimeError, match=r"differs in transformer\.h\.0\.mlp\.c_fc\.bias"):
        verify_saved(model, tmp_path)


def test_a_missing_tensor_is_found(tmp_path, make_model):
    model = make_model("llama")
    save_model(model, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        verify_saved(model, tmp_path)


def test_another_depth_is_found(tmp_path, make_model):
    model = make_model("llama")
    save_model(model, None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(RuntimeError, match=r"has other tensors.*layers\.1"):
        verify_saved(model, tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["lost", "gained"])
def test_a_tie_that_is_lost_or_gained_is_found(tmp_path, make_model, tied):
    model = make_model("llama")
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    save_model(model, None, tmp_path)
    verify_saved(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not tied}))
    edit(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    with pytest.raises(RuntimeError, match="tie"):
        verify_saved(model, tmp_path)


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(9)[None]).logits, sys.argv[2])
"""


def test_a_fresh_process_that_knows_only_transformers_gives_the_same_logits(tmp_path, make_model):
    model = two_to_four(make_model("gpt2"))
    save_model(model, None, tmp_path / "model")
    subprocess.run([sys.executable, "-c", RELOAD, tmp_path / "model", tmp_path / "logits"], check=True, cwd=tmp_path)
    with torch.no_grad():
        here = model(input_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), here, rtol=0, atol=1e-6 * float(here.abs().max()))
