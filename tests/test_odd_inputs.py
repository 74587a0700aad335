"""Texts and models that are poor in one way or another: finite results of the right size, or a refusal by name."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import prunable_layers
from kfac_prune.objective import Classes
from kfac_prune.obs import NM
from kfac_prune.plan import make_plan


def test_the_batch_that_is_not_finite_is_named(make_model, make_windows, monkeypatch):
    model, windows = make_model("llama"), make_windows(7, 9)
    windows.input_ids[4] = 40
    windows.input_ids[:4].clamp_(max=39)
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = math.nan
    with pytest.raises(InputError, match=r"q_proj: its inputs .*, first in batch 3 \(windows 5 to 6\); try --dtype"):
        estimate_factors(model, prunable_layers(model), windows, batch_size=2)


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


@pytest.mark.parametrize(
    ("family", "reason"),
    [("opt", "its inputs are the same for all 1 tokens"), ("llama", "its curvature factor G is zero")],
)
def test_one_token_is_refused_by_name(make_model, family, reason):
    """Nothing varies, so that biases take up all changes; and attention to a single token has no gradient."""
    model = make_model(family)
    model.set_attn_implementation("eager")  # a fast path gives gradients of rounding errors instead of none
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, Windows(torch.tensor([[5]])))
    with pytest.raises(InputError, match=rf"^layer model\..*0\.self_attn\.[qk]_proj: {reason}.*--ignore"):
        make_plan(layers, factors, allocation="uniform")


def test_the_largest_seed_draws_cotangents(make_windows):
    config = BertConfig(vocab_size=48, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).eval()
    factors = estimate_factors(model, prunable_layers(model), make_windows(), objective=Classes(), seed=2**63 - 1)
    assert torch.isfinite(factors.layers["bert.pooler.dense"].g).all()
