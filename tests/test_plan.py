import itertools

import pytest
import torch

from kfac_prune import plan as planning
from kfac_prune import probe as probing
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curves import loss_curves
from kfac_prune.errors import InputError
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping, damping, quadratic_loss
from kfac_prune.plan import make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.quality import evaluate
from kfac_prune.store import Journal


@pytest.fixture
def problem(make_model, make_windows):
    model, windows = make_model("llama"), make_windows(count=20, length=12)
    layers = prunable_layers(model)
    return model, windows, layers, estimate_factors(model, layers, windows)


@pytest.mark.parametrize("allocation", ["curves", "uniform", "global"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.85])
def test_total_sparsity_is_what_was_asked_for(problem, allocation, sparsity):
    _, _, layers, factors = problem
    plan = make_plan(layers, factors, sparsity=sparsity, allocation=allocation)
    weights = sum(layer.weight.numel() for layer in layers)
    assert plan.sparsity == pytest.approx(sparsity, abs=len(layers) / weights)
    assert plan.predicted == pytest.approx(sum(layer.predicted for layer in plan.layers))


def test_curves_predict_less_loss_than_uniform(problem):
    _, _, layers, factors = problem
    best = make_plan(layers, factors, sparsity=0.6)
    assert best.predicted < make_plan(layers, factors, sparsity=0.6, allocation="uniform").predicted


def test_a_plan_changes_nothing_and_prune_changes_all(problem):
    model, windows, layers, factors = problem
    before = [layer.weight.clone() for layer in layers]
    plan = make_plan(layers, factors, sparsity=0.5, probe=Probe.on(model, windows))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    dense = prune(layers, plan)
    for layer, planned in zip(layers, plan.layers, strict=True):
        assert torch.equal(layer.weight, planned.weight)
        assert torch.equal(layer.weight != 0, planned.mask)
    dense.restore()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_curves_that_were_made_before_give_the_same_plan(problem):
    _, _, layers, factors = problem
    curves = loss_curves(layers, factors)
    for sparsity in (0.4, 0.7):
        ready, fresh = (make_plan(layers, factors, sparsity=sparsity, curves=c) for c in (curves, None))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(ready.layers, fresh.layers, strict=True))


def test_the_probe_measures_one_layer_and_leaves_the_model_dense(problem):
    model, windows, layers, factors = problem
    plan = make_plan(layers, factors, sparsity=0.5, allocation="uniform")
    layer, planned = layers[3], plan.layers[3]
    before = layer.weight.clone()
    measured = Probe(model, windows)([layer], [planned])
    assert torch.equal(layer.weight, before)
    dense = prune([layer], planning.Plan((planned,), "kfac", "uniform"))
    assert measured == pytest.approx(evaluate(model, windows, dense=dense.swapped_in, batch_size=4).kl, rel=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_is_worse_than_predicted_is_spared(problem):
    """A probe that finds one layer ten times as sensitive as its curvature says moves sparsity away from it."""
    _, _, layers, factors = problem
    victim = layers[5].name

    class Biased(Probe):
        def __init__(self):
            pass

        def factors(self, layers, planned, *, together=False, quiet=True):
            return {layer.name: 10 if layer.name == victim else 1 for layer in layers}

    plain = make_plan(layers, factors, sparsity=0.6)
    warned = make_plan(layers, factors, sparsity=0.6, probe=Biased())
    sparsity = [{p.name: p.sparsity for p in plan.layers} for plan in (plain, warned)]
    assert sparsity[1][victim] < sparsity[0][victim] - 0.1
    assert warned.sparsity == pytest.approx(plain.sparsity, abs=1e-3)


def test_with_a_probe_the_prediction_is_what_it_measures(problem):
    model, windows, layers, factors = problem
    probe = Probe(model, windows)
    plan = make_plan(layers, factors, pattern=NM(2, 4), probe=probe)
    trusting = make_plan(layers, factors, pattern=NM(2, 4))
    for planned, plain in zip(plan.layers, trusting.layers, strict=True):
        assert torch.equal(planned.weight, plain.weight)
    for block in {layer.name.split(".")[2] for layer in layers}:  # model.layers.N.: nothing is decided, one is enough
        inside = [i for i, layer in enumerate(layers) if layer.name.split(".")[2] == block]
        found, expected = (sum(p.layers[i].predicted for i in inside) for p in (plan, trusting))
        measured = probe([layers[i] for i in inside], [plan.layers[i] for i in inside])
        assert found == pytest.approx(max(measured, probing.MIN_FACTOR * expected))
    factors_found = probe.factors(layers, trusting.layers)
    for layer, plain in zip(layers, trusting.layers, strict=True):
        alone = max(probe([layer], [plain]), probing.MIN_FACTOR * plain.predicted)
        assert factors_found[layer.name] * plain.predicted == pytest.approx(alone)


def test_probe_takes_a_few_windows(problem, make_windows, monkeypatch):
    model, _, layers, _ = problem
    many = make_windows(count=40, length=8)
    taken = probing.PROBE_PASSES * 40 // len(layers)
    assert 4 < taken < 40
    assert torch.equal(Probe.on(model, many).windows.input_ids, many.input_ids[-taken:])
    monkeypatch.setattr(probing, "PROBE_TOKENS", 48)
    assert len(Probe.on(model, many).windows) == 6
    monkeypatch.setattr(probing, "PROBE_PASSES", 1)
    assert len(Probe.on(model, many).windows) == 4
    few = make_windows(count=3, length=8)
    assert Probe.on(model, few).windows is few


def test_table_notes_what_is_unusual(problem):
    _, _, layers, factors = problem
    table = make_plan(layers, factors, pattern=NM(3, 7)).table()
    assert "no multiple of m" in table
    assert f"{'total':20}".strip() in table


def test_a_layer_without_factors_is_named(problem):
    _, _, layers, factors = problem
    del factors.layers[layers[2].name]
    with pytest.raises(InputError, match=layers[2].name):
        make_plan(layers, factors)


def test_an_unknown_rule_is_refused(problem):
    _, _, layers, factors = problem
    with pytest.raises(InputError, match="random"):
        make_plan(layers, factors, allocation="random")


@pytest.mark.parametrize("method", ["layerwise", "sparsegpt", "wanda"])
def test_losses_that_do_not_compare_are_not_allocated_by(problem, method):
    _, _, layers, factors = problem
    for allocation in ("curves", "global"):
        with pytest.raises(InputError, match=f"method {method} cannot allocate by '{allocation}'; choose uniform"):
            make_plan(layers, factors, method=method, allocation=allocation)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_methods_of_the_field_are_planned_like_the_others(problem, method, pattern):
    _, _, layers, factors = problem
    kfac, plan = (make_plan(layers, factors, pattern=pattern, method=m, allocation="uniform") for m in ("kfac", method))
    assert plan.sparsity == pytest.approx(0.5)
    for layer, best, planned in zip(layers, kfac.layers, plan.layers, strict=True):
        statistics = factors.layers[layer.name]
        fisher, _ = statistics.operator("kfac", Damping(), where=layer.name)
        assert planned.predicted == pytest.approx(quadratic_loss(fisher, planned.weight - layer.weight))
        assert planned.predicted > best.predicted
        assert planned.kkt is None
        assert torch.equal(planned.weight != 0, planned.mask)


class Doubling(Probe):
    """Finds every other layer twice as sensitive as predicted."""

    def __init__(self):
        pass

    def factors(self, layers, planned, *, together=False, quiet=True):
        return {layer.name: 2 if "mlp" in layer.name else 1 for layer in layers}


@pytest.mark.parametrize("probe", [None, Doubling()], ids=["trusting", "probed"])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.4, 0.45])
def test_a_partly_dense_plan_is_the_best_choice_of_layers(problem, sparsity, probe):
    _, _, layers, factors = problem
    pattern = NM(2, 4)
    full = make_plan(layers, factors, pattern=pattern, probe=probe)
    plan = make_plan(layers, factors, sparsity=sparsity, pattern=pattern, probe=probe)
    assert (full.allocation, plan.allocation) == ("uniform", "curves")
    pruned = [p.sparsity > 0 for p in plan.layers]
    for layer, whole, planned, is_pruned in zip(layers, full.layers, plan.layers, pruned, strict=True):
        assert torch.equal(planned.weight, whole.weight if is_pruned else layer.weight)
        assert torch.equal(planned.mask, whole.mask if is_pruned else torch.ones_like(whole.mask))
        assert planned.predicted == (whole.predicted if is_pruned else 0.0)
    sizes = [layer.weight.numel() // 2 for layer in layers]
    costs = [p.predicted for p in full.layers]
    target = sparsity * 2 * sum(sizes)
    assert plan.sparsity >= sparsity
    assert plan.sparsity * 2 * sum(sizes) == pytest.approx(sum(itertools.compress(sizes, pruned)))
    least = min(
        sum(itertools.compress(costs, chosen))
        for chosen in itertools.product((False, True), repeat=len(layers))
        if sum(itertools.compress(sizes, chosen)) >= target
    )
    assert plan.predicted == pytest.approx(least, rel=1e-12)
    for i, j in itertools.permutations(range(len(layers)), 2):  # no exchange of two layers is predicted to be better
        if pruned[i] and not pruned[j] and sizes[j] >= sizes[i]:
            assert costs[j] >= costs[i]


def test_a_pattern_cannot_remove_more_than_it_does(problem):
    _, _, layers, factors = problem
    with pytest.raises(InputError, match=r"sparsity is 0\.6, and pattern 2:4 removes only 0\.5 of the weights"):
        make_plan(layers, factors, sparsity=0.6, pattern=NM(2, 4))
    # 24 = 3 groups of 7 and 3 more, all of which stay: 4:7 removes less than 3/7
    with pytest.raises(InputError, match=r"sparsity is 0\.42, and pattern 4:7 removes only 0\.3"):
        make_plan(layers, factors, sparsity=0.42, pattern=NM(4, 7))
    with pytest.raises(InputError, match="chosen by allocation 'curves', not by 'uniform'"):
        make_plan(layers, factors, sparsity=0.4, pattern=NM(2, 4), allocation="uniform")
    with pytest.raises(InputError, match="method layerwise cannot allocate by 'curves'; choose uniform"):
        make_plan(layers, factors, sparsity=0.4, pattern=NM(2, 4), method="layerwise")


def test_factors_are_damped_and_factorised_once(problem, monkeypatch):
    """The curve, the refined curve and the solution of a layer share what factorising its damped factors told."""
    _, _, layers, factors = problem
    calls = []
    monkeypatch.setattr(damping, "is_definite", lambda matrix: calls.append(1) or True)
    once = make_plan(layers, factors, sparsity=0.5)
    assert len(calls) == 2 * len(layers)
    calls.clear()
    again = make_plan(layers, factors, sparsity=0.5, curves=loss_curves(layers, factors))
    assert len(calls) == 4 * len(layers)  # curves from before know nothing of this plan's problems
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(once.layers, again.layers, strict=True))


def test_a_sparsity_out_of_range_is_refused_with_its_own_number(make_model, make_windows):
    model, windows = make_model("llama"), make_windows(4, 8)
    layers = prunable_layers(model)
    with pytest.raises(InputError, match=r"sparsity is 1.5; it must be at least 0 and below 1"):
        make_plan(layers, estimate_factors(model, layers, windows), sparsity=1.5)


@pytest.mark.parametrize("sparsity", [0.6, 0.7])
def test_a_model_with_zeros_is_allocated_by_what_is_left(problem, sparsity):
    model, windows, layers, _ = problem
    with torch.no_grad():
        for i, layer in enumerate(layers):  # some layers matter far more than others
            layer.module.weight *= 1.0 if i % 3 else 3.0
    factors = estimate_factors(model, layers, windows)
    prune(layers, make_plan(layers, factors, sparsity=0.5, allocation="uniform"))
    factors, dense = estimate_factors(model, layers, windows), [layer.weight.clone() for layer in layers]
    lost = {}
    for allocation in ("curves", "uniform"):
        probe = Probe.on(model, windows) if allocation == "curves" else None
        plan = make_plan(layers, factors, sparsity=sparsity, allocation=allocation, probe=probe)
        swap = prune(layers, plan)
        lost[allocation] = evaluate(model, windows, dense=swap.swapped_in).kl
        swap.restore()
        assert plan.sparsity == pytest.approx(sparsity, abs=1e-3)
    assert lost["curves"] < 0.9 * lost["uniform"]
    assert all(torch.equal(layer.weight, before) for layer, before in zip(layers, dense, strict=True))


def test_a_layer_of_zeros_takes_no_part(problem):
    model, windows, layers, _ = problem
    zero = layers[3]
    with torch.no_grad():
        zero.module.weight.zero_()
    factors = estimate_factors(model, layers, windows)
    layers = [layer for layer in layers if factors.layers[layer.name].g.trace() > 0]
    plan = make_plan(layers, factors, sparsity=0.5)
    assert plan.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {layer.name: layer.predicted for layer in plan.layers}[zero.name] == 0


def test_the_allocation_is_not_made_twice(problem, tmp_path):
    model, windows, layers, factors = problem
    journal = Journal(tmp_path, "plan", "key")
    first = make_plan(layers, factors, sparsity=0.6, probe=Probe.on(model, windows), journal=journal)

    class Silent(Probe):
        def factors(self, *arguments, **options):
            raise AssertionError

    again = make_plan(layers, factors, sparsity=0.6, probe=Silent.on(model, windows), journal=journal)
    assert [layer.predicted for layer in again.layers] == [layer.predicted for layer in first.layers]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(again.layers, first.layers, strict=True))


def test_a_layer_that_overflows_alone_is_named(problem, monkeypatch):
    model, windows, layers, factors = problem
    monkeypatch.setattr(Probe, "__call__", lambda *arguments: float("nan"))
    with pytest.raises(InputError, match=f"is nan where {layers[0].name} alone is pruned"):
        make_plan(layers, factors, sparsity=0.6, probe=Probe.on(model, windows))
