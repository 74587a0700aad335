"""Texts and models that are poor in one way or another: finite results of the right size, or a refusal by name."""

import math
import random
from dataclasses import replace

import pytest
import torch
from letters import letter_tokenizer, save_llama
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
)

from kfac_prune import job, pipeline
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.inputs import finite_windows
from kfac_prune.models import prunable_layers
from kfac_prune.objective import CAUSAL, Classes
from kfac_prune.obs import NM
from kfac_prune.pipeline import run
from kfac_prune.plan import make_plan


def test_the_batch_that_is_not_finite_is_named(make_model, make_windows, monkeypatch):
    model, windows = make_model("llama"), make_windows(7, 9)
    windows.input_ids[4] = 40
    windows.input_ids[:4].clamp_(max=39)
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = math.nan
    with pytest.raises(InputError, match=r"q_proj: its inputs .*, first in batch 3 \(windows 5 to 6\); try --dtype"):
        estimate_factors(model, prunable_layers(model), windows, batch_size=2)


@pytest.mark.parametrize("lengths", [(), (9, 3, 9, 7, 2, 9, 9)], ids=["whole", "padded"])
def test_batches_that_are_not_finite_can_be_left_out(make_model, make_windows, lengths):
    model, windows = make_model("llama"), make_windows(7, 9, lengths=lengths)
    windows.input_ids.clamp_(max=39)
    windows.input_ids[2, 0] = windows.input_ids[6, 0] = 40
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # was the embeddings'
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = math.nan
    layers = prunable_layers(model)
    left = finite_windows(model, layers, windows, CAUSAL, batch_size=2)
    assert torch.equal(left.input_ids, windows.input_ids[[0, 1, 4, 5]])
    assert (left.attention_mask is None) == (not lengths)
    estimate_factors(model, layers, left)
    windows.input_ids[:, 0] = 40
    with pytest.raises(InputError, match="every one of the 7 calibration windows gives NaN"):
        finite_windows(model, layers, windows, CAUSAL, batch_size=2)


def test_a_run_counts_the_batches_that_it_leaves_out(tmp_path, monkeypatch):
    save_llama(tmp_path / "model", tie_word_embeddings=False)
    (tmp_path / "text.txt").write_text("abcde" * 300, encoding="utf-8")
    fields = {"samples": 12, "seqlen": 16, "batch_size": 2, "device": "cpu", "pattern": "2:4", "reconstruct": 0}
    made = Recipe(model=str(tmp_path / "model"), data=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), **fields)
    loads = job.load_inputs

    def broken(*arguments):
        inputs = loads(*arguments)
        token = inputs.tokenizer("f").input_ids[-1]
        inputs.calibration.input_ids[3, 5] = token
        with torch.no_grad():
            inputs.model.get_input_embeddings().weight[token] = math.nan
        return inputs

    monkeypatch.setattr(job, "load_inputs", broken)
    with pytest.raises(InputError, match=r"in batch 2 \(windows 3 to 4\); .* --skip-bad-batches"):
        run(made)
    monkeypatch.setattr(pipeline, "save_model", lambda *arguments: None)  # which refuses NaN, rightly
    monkeypatch.setattr(pipeline, "verify_saved", lambda *arguments, **options: None)
    record = run(replace(made, skip_bad_batches=True))
    assert record["calibration"]["skipped"] == 2
    assert record["calibration"]["tokens"] == 160
    assert math.isfinite(record["kl_measured"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_may_be_slow_on_a_cpu_is_told(tmp_path, dtype):
    save_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abcde" * 300, encoding="utf-8")
    fields = {"samples": 4, "seqlen": 16, "device": "cpu", "dtype": dtype, "reconstruct": 0, "method": "magnitude"}
    lines = []
    run(Recipe(str(tmp_path / "model"), str(tmp_path / "text.txt"), str(tmp_path / "out"), **fields), echo=lines.append)
    assert any("bfloat16" in line and "--dtype float32" in line for line in lines) == (dtype == "bfloat16")


def test_a_layer_that_is_called_without_a_token_is_named(make_model, make_windows):
    """As an expert is to which no token is sent."""
    model = make_model("opt")
    fc2 = model.get_submodule("model.decoder.layers.1.fc2")
    model.spare = nn.Linear(fc2.in_features, fc2.out_features)
    fc2.register_forward_hook(lambda module, args, output: output + model.spare(args[0][:0]).sum())
    with pytest.raises(InputError, match="layer spare saw no token of the calibration text"):
        estimate_factors(model, prunable_layers(model), make_windows())


@pytest.mark.parametrize("case", ["one window", "constant text", "dead unit"])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["50%", "2:4"])
def test_poor_inputs_give_finite_plans_of_the_right_size(make_model, case, pattern):
    """Factors of rank one or with zeros: damping makes up for them, masks are complete."""
    model = make_model("opt")
    if case == "dead unit":
        with torch.no_grad():
            model.get_submodule("model.decoder.layers.0.fc1").weight[3] = 0
            model.get_submodule("model.decoder.layers.0.fc1").bias[3] = -1
    ids = {"one window": torch.tensor([[5, 9, 7]]), "constant text": torch.full((4, 6), 5)}
    windows = Windows(ids.get(case, torch.arange(24).view(4, 6)))
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.5, pattern=pattern, allocation="uniform")
    for made in plan.layers:
        assert torch.isfinite(made.weight).all()
        assert math.isfinite(made.predicted)
        assert made.mask.sum() == made.mask.numel() // 2
        assert pattern is None or (made.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_one_token_is_refused_by_name(make_model, family):
    """Attention to a single token has no gradient; without these layers, nothing varies, and biases take up all."""
    model = make_model(family)
    model.set_attn_implementation("eager")  # a fast path gives gradients of rounding errors instead of none
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, Windows(torch.tensor([[5]])))
    dead = [layer.name for layer in layers if layer.name.endswith(("q_proj", "k_proj"))]
    with pytest.raises(InputError) as caught:
        make_plan(layers, factors, allocation="uniform")
    assert str(caught.value).startswith(f"{len(dead)} of {len(layers)} layers see only zeros, or no gradient")
    assert str(caught.value).endswith(f"leave them out with --ignore {' '.join(dead)}")
    layers = [layer for layer in layers if layer.name not in dead]
    if family == "opt":
        with pytest.raises(InputError, match=r"^layer .*v_proj: its inputs are the same for all 1 tokens.*--ignore"):
            make_plan(layers, factors, allocation="uniform")


def test_the_largest_seed_draws_cotangents(make_windows):
    config = BertConfig(vocab_size=48, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).eval()
    factors = estimate_factors(model, prunable_layers(model), make_windows(), objective=Classes(), seed=2**63 - 1)
    assert torch.isfinite(factors.layers["bert.pooler.dense"].g).all()


@pytest.mark.parametrize("fields", [{}, {"pattern": "2:4"}, {"refit": True, "reconstruct": 0}], ids=str)
def test_a_model_that_runs_one_block_several_times(fields, tmp_path):
    """ALBERT: measured as a whole; what sees a block's first call alone is left out, and said."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=40, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join("".join(random.Random(i).choices("abcdef ", k=14)) for i in range(60)), encoding="utf-8")
    said = []
    options = {"samples": 24, "eval_samples": 8, "seqlen": 16, "device": "cpu", "separator": "\n"}
    recipe = Recipe(str(tmp_path / "model"), str(text), out=str(tmp_path / "out"), **options | fields)
    record = run(recipe, echo=said.append)
    assert any("AlbertForMaskedLM runs a block several times" in line for line in said)
    assert record["kl_measured"] > 0
    assert 0.2 < record["kl_measured"] / record["kl_predicted"] < 5


def test_a_model_of_one_block_that_returns_a_tuple(tmp_path):
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.3))
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdef ", k=4000)), encoding="utf-8")
    options = {"samples": 64, "eval_samples": 8, "seqlen": 16, "device": "cpu", "reconstruct": 3, "sparsity": 0.8}
    record = run(Recipe(str(tmp_path / "model"), str(text), out=str(tmp_path / "out"), **options))
    (one,) = record["reconstruction"]
    assert one["after"] < one["before"]
