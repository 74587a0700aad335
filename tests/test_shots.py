"""Shots after the first: gradient, Newton step with bias, and what may and may not change."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from kfac_prune import shots
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curvature.factors import LayerFactors
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.plan import make_plan, prune
from kfac_prune.problems import PlannedLayer
from kfac_prune.quality import evaluate
from kfac_prune.shots import Gradient, correct, kl_gradient, shots_of

PATTERNS = pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["unstructured", "2:4"])


def pruned(model, windows, **options):
    layers = prunable_layers(model)
    plan = make_plan(layers, estimate_factors(model, layers, windows), **options)
    return layers, plan, prune(layers, plan)


@PATTERNS
def test_never_worse_on_held_out_windows_and_as_many_weights(model, make_windows, pattern):
    windows = make_windows(count=80, length=12)
    layers, plan, dense = pruned(model, windows, sparsity=0.5 if pattern else 0.7, pattern=pattern)
    _, held_out = windows.split(8)

    def kl():
        return evaluate(model, held_out, dense=dense.swapped_in).kl

    before = kl()
    new, records = correct(model, layers, plan, windows, dense.swapped_in, 2, pattern=pattern)
    assert records[0].before == pytest.approx(before)
    assert records[-1].after == pytest.approx(kl())
    assert records[0].step > 0
    for record in records:
        assert record.after < record.before if record.step else record.after == record.before
    for layer, old, now in zip(layers, plan.layers, new.layers, strict=True):
        assert int(now.mask.sum()) == int(old.mask.sum())
        assert torch.equal(layer.weight, now.weight)
        assert (layer.bias is None) == (now.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, now.bias)
        assert bool((now.weight[~now.mask] == 0).all())
        if pattern is not None:
            assert pattern.is_valid(now.mask)


def test_the_curvature_of_a_shot_is_gone_before_the_next(make_model, make_windows, monkeypatch):
    model, windows = make_model("llama"), make_windows(count=24, length=12)
    layers, plan, dense = pruned(model, windows, sparsity=0.7)
    made, alive = [], []

    def estimate(*arguments, **options):
        gc.collect()
        alive.append([factor for factor in made if factor() is not None])
        factors = estimate_factors(*arguments, **options)
        made.extend(weakref.ref(layer.g) for layer in factors.layers.values())
        return factors

    monkeypatch.setattr(shots, "estimate_factors", estimate)
    correct(model, layers, plan, windows, dense.swapped_in, 2)
    assert alive == [[], []]


def test_what_held_out_windows_find_worse_is_undone(make_model, make_windows, monkeypatch):
    model, windows = make_model("opt"), make_windows(count=24, length=12)
    layers, plan, dense = pruned(model, windows, sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    broken = [PlannedLayer(**{**vars(p), "weight": torch.zeros_like(p.weight)}) for p in plan.layers]
    monkeypatch.setattr(shots, "_searched", lambda *arguments: (0.3, broken))
    new, records = correct(model, layers, plan, windows, dense.swapped_in, 3)
    assert [(r.step, r.after) for r in records] == [(0.0, records[0].before)]
    assert new == plan or all(a is b for a, b in zip(new.layers, plan.layers, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("count", "corrections"), [(24, 0), (1, 2)], ids=["one shot", "nothing to hold out"])
def test_nothing_is_done(make_model, make_windows, count, corrections):
    model, windows = make_model("llama"), make_windows(count=count, length=12)
    layers, plan, dense = pruned(model, windows, sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    new, records = correct(model, layers, plan, windows, dense.swapped_in, corrections)
    assert new is plan
    assert records == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(make_model, make_windows):
    found = []
    for seed in (3, 3, 4):
        model, windows = make_model("llama"), make_windows(count=24, length=12)
        layers, plan, dense = pruned(model, windows, sparsity=0.7)
        correct(model, layers, plan, windows, dense.swapped_in, 1, seed=seed)
        found.append([layer.weight for layer in layers])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("lengths", [(), (9, 3, 2, 7, 5)], ids=["whole", "padded"])
def test_the_gradient_is_autograds_on_the_output(model, make_windows, lengths, near):
    """Against F.kl_div sequence by sequence, with the parameters' own grad."""
    windows = make_windows(lengths=lengths)
    reference = copy.deepcopy(model)
    layers, _, dense = pruned(model, windows, sparsity=0.5)
    flags = [p.requires_grad for p in model.parameters()]
    gradients = kl_gradient(model, layers, windows, dense.swapped_in, batch_size=2)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    total, count = 0.0, 0
    masks = torch.ones_like(windows.input_ids, dtype=torch.bool) if not lengths else windows.attention_mask
    for ids, mask in zip(windows.input_ids, masks, strict=True):
        rows = ids[mask][None]
        with torch.no_grad():
            p = reference(input_ids=rows).logits[0, :-1].softmax(-1)
        q = model(input_ids=rows).logits[0, :-1].log_softmax(-1)
        total, count = total + F.kl_div(q, p, reduction="sum"), count + len(q)
    (total / count).backward()
    for layer, gradient in zip(layers, gradients, strict=True):
        near(gradient.weight, layer.stored(layer.module.weight.grad), 1e-3)
        if layer.bias is not None:
            largest = max(float(gradient.bias.abs().max()), float(gradient.weight.abs().max()))
            assert float((gradient.bias - layer.module.bias.grad).abs().max()) < 1e-3 * largest


@pytest.mark.parametrize("bias", [False, True])
def test_a_full_step_without_pruning_is_newtons(bias, near):
    """Of weight and bias together: G ⊗ [[A, m], [mᵀ, 1]] inverted at once."""
    torch.manual_seed(0)
    out, size, damping = 5, 7, 0.1
    a = torch.randn(40, size).double() + 1.0
    moment, mean = a.T @ a / 40, a.mean(0)
    g = torch.randn(out, 30).double()
    g = g @ g.T / 30
    layer = Layer("one", torch.nn.Linear(size, out, bias=bias))
    statistics = LayerFactors(moment, mean, g, 40, bias)
    slope = torch.randn(out, size + bias, dtype=torch.float64)
    central = moment - torch.outer(mean, mean) if bias else moment
    central = central + damping * central.diagonal().mean() * torch.eye(size)
    g = g + damping * g.diagonal().mean() * torch.eye(out)
    if bias:
        top = torch.cat([central + torch.outer(mean, mean), mean[:, None]], 1)
        central = torch.cat([top, torch.cat([mean, torch.ones(1)])[None]])
    expected = -torch.linalg.solve(torch.kron(g, central), slope.reshape(-1)).reshape(out, -1)
    gradient = Gradient(slope[:, :size].float(), slope[:, size].float() if bias else None)
    problem = shots._Problem(layer, statistics, gradient, Damping(damping))
    start = PlannedLayer("one", layer.weight, layer.bias, torch.ones(out, size, dtype=torch.bool), 0.0, None, ())
    moved = problem.solve(1.0, start, None)
    near(moved.weight - layer.weight, expected[:, :size], 1e-4)
    if bias:
        near(moved.bias - layer.bias, expected[:, size], 1e-4)


@pytest.mark.parametrize(
    ("fields", "predicted", "expected"),
    [
        ({"reconstruct": 0}, 0.06, 3),
        ({"reconstruct": 0}, 0.05, 1),
        ({"reconstruct": 0, "samples": 15}, 0.06, 1),
        ({"reconstruct": 0, "method": "layerwise"}, 0.06, 1),
        ({"refit": True, "pattern": "2:4"}, 0.06, 3),
        ({}, 0.06, 1),
        ({"shots": 2}, 0.0, 2),
        ({"reconstruct": 0, "shots": 1}, 0.06, 1),
    ],
    ids=str,
)
def test_the_rule(fields, predicted, expected):
    assert shots_of(Recipe(model="m", data="d", out="o", **fields).resolved(), predicted) == expected
