"""What can be pruned, told from a configuration alone."""

import re

import pytest
import torch

from kfac_prune import inspect_model
from kfac_prune.errors import InputError
from kfac_prune.inspect_model import describe
from kfac_prune.models import prunable_layers


@pytest.fixture
def folder(tmp_path, model):
    """Only config.json: what needs a weight fails."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def rows(text):
    """(name, out, in, weights, bias, 2:4) of every layer line."""
    found = re.findall(r"^(\S+)\s+(\d+) x (\d+)\s+([\d,]+)\s+(yes|no)\s+(yes|no)$", text, re.MULTILINE)
    return [(n, int(o), int(i), int(w.replace(",", "")), b == "yes", f == "yes") for n, o, i, w, b, f in found]


def test_every_layer_has_a_line(folder, model):
    layers = prunable_layers(model)
    assert rows(describe(str(folder))) == [
        (layer.name, *layer.shape, layer.module.weight.numel(), layer.module.bias is not None, True) for layer in layers
    ]


def test_the_share_of_the_parameters(folder, model):
    covered = sum(layer.module.weight.numel() for layer in prunable_layers(model))
    total = sum(parameter.numel() for parameter in model.parameters())  # a tied matrix once
    text = describe(str(folder))
    assert f"{covered:,} of {total:,} parameters ({100 * covered / total:.1f}%)" in text


def test_what_is_left_out_is_named(folder, model):
    text = describe(str(folder))
    (name,) = (n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert f"{name} [48, 24]" in text
    vectors = sum(parameter.ndim == 1 for parameter in model.parameters())
    assert f"{vectors} vectors" in text
    assert "lm_head" not in text


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_patterns(folder, model):
    text = describe(str(folder), include=["*.mlp.*"], ignore=["*.1.*"])
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert [row[0] for row in rows(text)] == names
    assert f"3 layers hold {3 * 24 * 40:,} of" in text
    with pytest.raises(InputError, match=r"'\*\.nothing'"):
        describe(str(folder), ignore=["*.nothing"])


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_rows_that_groups_of_four_do_not_divide(tmp_path, model):
    config = model.config
    config.intermediate_size = 42
    config.save_pretrained(tmp_path)
    assert [row[0] for row in rows(describe(str(tmp_path))) if not row[5]] == [
        f"model.layers.{block}.mlp.down_proj" for block in (0, 1)
    ]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_untied_head_is_left_out_by_name(tmp_path, model):
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(tmp_path)
    text = describe(str(tmp_path))
    assert "lm_head.weight [48, 24]" in text
    assert "lm_head" not in [row[0] for row in rows(text)]


def test_no_weight_is_made(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        inspect_model, "prunable_layers", lambda model, *args: seen.append(model) or prunable_layers(model)
    )
    before = torch.get_rng_state()
    describe(str(folder))
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertLMHeadModel"]}')
    with pytest.raises(InputError, match="not a causal language model"):
        describe(str(tmp_path))
