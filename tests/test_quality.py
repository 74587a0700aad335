"""Loss, perplexity and KL of a model on token windows."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.quality import Quality, evaluate

LENGTHS = (9, 3, 1, 7, 2)
paddings = pytest.mark.parametrize("lengths", [(), LENGTHS], ids=["whole", "padded"])


def sequences(windows):
    """The unpadded rows, each [1, length]."""
    if windows.attention_mask is None:
        return [row[None] for row in windows.input_ids]
    return [row[mask][None] for row, mask in zip(windows.input_ids, windows.attention_mask, strict=True)]


def logits_of(model, windows):
    """Float64 logits [tokens, vocabulary] before every predicted token, and those tokens; one sequence at a time."""
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[0, :-1].double() for ids in sequences(windows)]
    return torch.cat(logits), torch.cat([ids[0, 1:] for ids in sequences(windows)])


@paddings
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_loss_is_torchs_cross_entropy(model, make_windows, lengths, batch_size):
    windows = make_windows(lengths=lengths)
    found = evaluate(model, windows, batch_size=batch_size)
    logits, targets = logits_of(model, windows)
    assert found.tokens == len(targets) == (sum(LENGTHS) - 5 if lengths else 40)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.kl is None


def test_padding_on_the_left_predicts_nothing(make_model, make_windows):
    dense, model, windows = make_model("llama"), make_model("llama", seed=1), make_windows(lengths=LENGTHS)
    flipped = Windows(windows.input_ids.flip(1), windows.attention_mask.flip(1))
    found = evaluate(model, flipped, dense=dense)
    (log_q, targets), (log_p, _) = ((z.log_softmax(-1), y) for z, y in (logits_of(m, flipped) for m in (model, dense)))
    assert found.tokens == len(targets)
    assert found.loss == pytest.approx(float(F.nll_loss(log_q, targets)), rel=1e-5)
    assert found.kl == pytest.approx(float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)), rel=1e-5)


@paddings
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_kl_is_that_of_the_definition(make_model, family, make_windows, lengths, batch_size):
    dense, model, windows = make_model(family), make_model(family, seed=1), make_windows(lengths=lengths)
    found = evaluate(model, windows, dense=dense, batch_size=batch_size)
    p, q = (logits_of(m, windows)[0].softmax(-1) for m in (dense, model))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert expected > 0.1
    assert found.kl == pytest.approx(expected, rel=1e-5)
    assert found.loss == evaluate(model, windows, batch_size=batch_size).loss
    assert found.kl != pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-3)  # not the other way round


def test_the_kl_of_a_model_with_itself_is_zero(model, make_windows):
    windows = make_windows(lengths=LENGTHS)
    assert evaluate(model, windows, dense=model).kl == 0
    assert evaluate(model, windows, dense=WeightSwap(prunable_layers(model)).swapped_in).kl == 0


@paddings
def test_swapped_in_weights_equal_a_second_model(make_model, family, make_windows, lengths):
    dense, model, windows = make_model(family), make_model(family), make_windows(lengths=lengths)
    layers = prunable_layers(model)
    swap = WeightSwap(layers)
    for layer in layers:
        layer.assign(0.9 * layer.weight)
    second, swapped = (evaluate(model, windows, dense=d, batch_size=2) for d in (dense, swap.swapped_in))
    assert second == swapped
    assert second.kl > 0
    assert all(
        torch.equal(layer.weight, 0.9 * model_layer.weight)
        for layer, model_layer in zip(layers, prunable_layers(dense), strict=True)
    )


def test_a_small_kl_is_resolved(make_model, make_windows):
    """KL grows with the square of a small change: float32 must not drown it."""
    dense, windows, values = make_model("llama"), make_windows(), []
    for step in (1e-2, 1e-3):
        model = make_model("llama")
        for layer in prunable_layers(model):
            layer.assign((1 + step) * layer.weight)
        values.append(evaluate(model, windows, dense=dense).kl)
    assert values[0] / values[1] == pytest.approx(100, rel=0.1)


def test_bfloat16_models_are_compared_in_float32(make_model, make_windows):
    model, windows = make_model("llama", dtype=torch.bfloat16), make_windows()
    logits, targets = logits_of(model, windows)
    assert evaluate(model, windows).loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=0.02)


class Masked(nn.Module):
    """A head that gives the last tokens of the vocabulary no probability, as models with padded vocabularies do."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x).index_fill(-1, torch.tensor([46, 47]), -math.inf)


def test_impossible_tokens_contribute_nothing(make_model, make_windows):
    dense, model, windows = make_model("llama"), make_model("llama", seed=1), make_windows(3, 6)
    windows.input_ids.clamp_(max=45)
    p, q = (logits_of(m, windows)[0][:, :46].softmax(-1) for m in (dense, model))
    for m in (dense, model):
        m.lm_head = Masked(m.lm_head)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert evaluate(model, windows, dense=dense).kl == pytest.approx(expected, rel=1e-5)


def test_faults_are_not_hidden(make_model, make_windows):
    dense, model = make_model("llama"), make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    found = evaluate(model, make_windows(), dense=dense)
    assert math.isnan(found.loss)
    assert math.isnan(found.kl)
    assert math.isnan(found.perplexity)


def test_a_hopeless_perplexity_is_a_number():
    assert math.isfinite(Quality(loss=1e4, kl=None, tokens=1).perplexity)


def test_evaluation_leaves_no_trace(model, make_windows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, make_windows(), dense=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_windows_without_a_predicted_position_are_refused(make_model, make_windows):
    with pytest.raises(InputError, match="no position to predict"):
        evaluate(make_model("llama"), make_windows(lengths=(1, 1, 1, 1, 1)))
    with pytest.raises(InputError, match="no position to predict"):
        evaluate(make_model("llama"), Windows(torch.ones(2, 1, dtype=torch.int64)))
