"""Labels and output gradients of the Fisher information."""

import math

import pytest
import torch

from kfac_prune import fisher
from kfac_prune.fisher import logit_gradient, next_token_labels, sample_labels

INF = math.inf
ALMOST_ONE = 1 - 2.0**-53  # the largest float64 below 1, the largest number that torch.rand returns


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0], ids=["uniform", "soft", "peaked"])
def test_sampled_labels_have_the_models_frequencies(scale):
    draws, classes = 40_000, 7
    logits = scale * randn(classes, seed=1)
    labels = sample_labels(logits.expand(draws, classes), rand(draws, seed=2))
    weights = [math.exp(x) for x in logits.tolist()]
    probability = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    seen = torch.bincount(labels, minlength=classes).double()
    z = (seen - draws * probability) / (draws * probability * (1 - probability)).sqrt()
    assert z.abs().max() < 4, z
    chi_square = ((seen - draws * probability) ** 2 / (draws * probability)).sum()
    assert chi_square < 22.5  # the 99.9 % quantile for 6 degrees of freedom


def test_a_stratified_sample_has_exactly_the_models_frequencies():
    probability = torch.tensor([0.5, 0.0, 0.125, 0.375])
    uniforms = torch.arange(800, dtype=torch.float64) / 800
    labels = sample_labels(probability.log().expand(800, 4), uniforms)
    assert torch.bincount(labels, minlength=4).tolist() == [400, 0, 100, 300]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_have_the_shape_of_the_uniform_numbers(shape, dtype):
    labels = sample_labels(randn(*shape, 11, dtype=dtype), rand(*shape))
    assert labels.shape == shape
    assert labels.dtype == torch.int64


def test_labels_do_not_depend_on_the_split_into_batches():
    logits, uniforms = 3 * randn(12, 5, 31), rand(12, 5)
    whole = sample_labels(logits, uniforms)
    for size in (1, 5, 12):
        parts = [sample_labels(*pair) for pair in zip(logits.split(size), uniforms.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_labels_of_bfloat16_logits_are_those_of_their_exact_values():
    logits, uniforms = randn(500, 301, dtype=torch.bfloat16), rand(500)
    assert torch.equal(sample_labels(logits, uniforms), sample_labels(logits.double(), uniforms))


@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 61])
def test_labels_do_not_depend_on_the_chunks(monkeypatch, chunk):
    logits, uniforms = 3 * randn(12, 5, 31), rand(12, 5)
    whole = sample_labels(logits, uniforms)
    monkeypatch.setattr(fisher, "CHUNK", chunk)
    assert torch.equal(sample_labels(logits, uniforms), whole)


@pytest.mark.parametrize("span", [1, 2, 30, 31, 32, 500])
def test_labels_invert_the_cumulative_distribution(monkeypatch, span):
    """Those of a plain float64 computation, but where rounding decides."""
    monkeypatch.setattr(fisher, "SPAN", span)
    logits, uniforms = 3 * randn(2000, 31, dtype=torch.float64), rand(2000)
    cumulative = logits.softmax(-1).cumsum(-1)
    plain = torch.searchsorted(cumulative, uniforms[:, None]).squeeze(1)
    clear = (cumulative - uniforms[:, None]).abs().amin(-1) > 1e-9
    assert clear.sum() > 1990
    assert torch.equal(sample_labels(logits, uniforms)[clear], plain[clear])


def test_logits_that_are_not_finite_still_have_labels():
    """What is wrong is reported where it is known by which layer."""
    labels = sample_labels(torch.full((3, 700), float("nan")), rand(3))
    assert ((labels >= 0) & (labels < 700)).all()


EXTREMES = {
    "one-at-1e4": [0.0, 1e4, 0.0, -1.0],
    "all-at-minus-1e4-but-one": [-1e4, -1e4, 0.0, -1e4],
    "both-ends-impossible": [-INF, 0.0, 1.0, -INF],
    "only-one-possible": [-INF, -INF, 3.0, -INF],
    "impossible-between": [0.0, -INF, 2.0, -INF],
    "underflow-at-the-end": [5.0, 0.0, -900.0, -1e4],
}


@pytest.mark.parametrize("logits", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("u", [0.0, 2.0**-60, 0.5, 1 - 2.0**-24, ALMOST_ONE], ids=str)
def test_no_label_of_probability_zero(logits, u):
    row = torch.tensor([logits])
    label = int(sample_labels(row, torch.tensor([u], dtype=torch.float64)))
    assert row.double().softmax(-1)[0, label] > 0


@pytest.mark.parametrize("u", [0.0, 0.25, ALMOST_ONE], ids=str)
def test_no_label_of_probability_zero_in_large_vocabularies(u):
    logits = 5 * randn(64, 5003, seed=3)
    possible = rand(64, 5003, seed=4) < 0.3
    logits[~possible] = -INF
    labels = sample_labels(logits, torch.full((64,), u, dtype=torch.float64))
    assert possible.gather(1, labels[:, None]).all()


def test_next_token_labels_without_a_mask():
    labels, has_label = next_token_labels(torch.tensor([[4, 5, 6], [7, 8, 9]]), None)
    assert labels[:, :-1].tolist() == [[5, 6], [8, 9]]
    assert has_label.tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 0]),
        ([1, 1, 0, 0], [1, 0, 0, 0]),
        ([0, 0, 1, 1], [0, 0, 1, 0]),
        ([0, 1, 1, 0], [0, 1, 0, 0]),
        ([1, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 0, 0, 1], [0, 0, 0, 0]),
        ([1, 0, 1, 1], [0, 0, 1, 0]),
    ],
    ids=str,
)
def test_next_token_labels_need_a_real_token_and_a_real_successor(mask, expected):
    ids = torch.tensor([[10, 11, 12, 13]])
    before = torch.tensor([mask], dtype=torch.bool)
    given = before.clone()
    labels, has_label = next_token_labels(ids, given)
    assert has_label.int().tolist() == [expected]
    assert all(int(labels[0, t]) == int(ids[0, t + 1]) for t in range(4) if expected[t])
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-7), (torch.float32, 5e-7), (torch.bfloat16, 2**-8)],  # computed in float32, then rounded
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradient_is_that_of_the_summed_cross_entropy(near, dtype, tolerance, masked):
    logits = (3 * randn(3, 5, 13)).to(dtype).requires_grad_()
    labels = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(1))
    counts = rand(3, 5, seed=2) < 0.6 if masked else None
    exact = logits.detach().double().requires_grad_()
    losses = exact.logsumexp(-1) - exact.gather(-1, labels[..., None])[..., 0]
    (losses if counts is None else losses[counts]).sum().backward()
    gradient = logit_gradient(logits, labels, counts)
    assert gradient.dtype == dtype
    assert not gradient.requires_grad
    near(gradient, exact.grad, tolerance)


def test_gradient_of_a_confident_bfloat16_prediction_does_not_cancel():
    logits = torch.tensor([[[8.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    rest = 2 * math.exp(-8.0) / (1 + 2 * math.exp(-8.0))
    gradient = logit_gradient(logits, torch.tensor([[0]]), None)
    assert gradient[0, 0].tolist() == pytest.approx([-rest, rest / 2, rest / 2], rel=2**-8)


def test_gradient_is_exactly_zero_where_a_position_does_not_count():
    counts = torch.tensor([[True, False, True], [False, False, False]])
    gradient = logit_gradient(randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), counts)
    assert torch.equal(gradient.abs().sum(-1) > 0, counts)


def test_gradient_with_impossible_tokens_is_finite():
    gradient = logit_gradient(torch.tensor([[[0.0, -INF, 1e4, -1e4]]]), torch.tensor([[2]]), None)
    assert gradient.tolist() == [[[0.0, 0.0, 0.0, 0.0]]]


def test_arguments_are_not_written_to():
    logits, labels, counts = randn(2, 3, 5), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    uniforms = rand(2, 3)
    before = [x.clone() for x in (logits, labels, counts, uniforms)]
    sample_labels(logits, uniforms)
    logit_gradient(logits, labels, counts)
    next_token_labels(labels, counts)
    for now, then in zip((logits, labels, counts, uniforms), before, strict=True):
        assert torch.equal(now, then)
