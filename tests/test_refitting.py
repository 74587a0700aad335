import pytest
import torch

from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.obs import NM
from kfac_prune.plan import make_plan, prune
from kfac_prune.refitting import refit


def pruned(model, windows, **options):
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, **options)
    return layers, factors, plan, prune(layers, plan)


def stream_error(model, dense, windows):
    """Mean squared difference of the last hidden states, counted tokens only."""
    states = []
    for context in (None, dense):
        with torch.no_grad():
            if context is None:
                out = model(
                    input_ids=windows.input_ids, attention_mask=windows.attention_mask, output_hidden_states=True
                )
            else:
                with context():
                    out = model(
                        input_ids=windows.input_ids, attention_mask=windows.attention_mask, output_hidden_states=True
                    )
        states.append(out.hidden_states[-1])
    difference = (states[0] - states[1]).square().mean(-1)
    return float(difference.mean() if windows.attention_mask is None else difference[windows.attention_mask].mean())


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["unstructured", "2:4"])
def test_every_writer_gets_nearer_to_its_target_and_keeps_its_count(model, make_windows, pattern):
    windows = make_windows(count=24, length=12)
    layers, factors, plan, dense = pruned(model, windows, sparsity=0.5, pattern=pattern, allocation="uniform")
    before = stream_error(model, dense.swapped_in, windows)
    new, records = refit(model, layers, plan, factors, windows, dense.swapped_in, pattern=pattern)
    assert [r.name for r in records] == [n for n in (layer.name for layer in layers) if n in {r.name for r in records}]
    assert len(records) == 4
    assert all(0 <= record.after <= record.before for record in records)
    assert stream_error(model, dense.swapped_in, windows) < before
    touched = {record.name for record in records}
    for layer, old, now in zip(layers, plan.layers, new.layers, strict=True):
        assert int(now.mask.sum()) == int(old.mask.sum())
        assert torch.equal(layer.weight, now.weight)
        assert bool((now.weight[~now.mask] == 0).all())
        if pattern is not None:
            assert pattern.is_valid(now.mask)
        if layer.name not in touched:
            assert torch.equal(now.mask, old.mask)


def test_one_dense_writer_reaches_the_ridge_solution(make_model, make_windows):
    """Everything but the first block's last matrix stays dense, so its target is what the dense one gives."""
    model, windows = make_model("llama"), make_windows(count=8, length=12)
    layers, factors, plan, dense = pruned(model, windows, sparsity=0.0)
    damaged = next(layer for layer in layers if layer.name.endswith("layers.0.mlp.down_proj"))
    wanted = damaged.weight.clone()
    damaged.assign(0.5 * wanted)
    inputs = []
    handle = damaged.module.register_forward_hook(lambda m, a, o: inputs.append(a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        model(input_ids=windows.input_ids)
    handle.remove()
    h = inputs[0].double()
    moment = h.T @ h / len(h)
    ridge = 0.1 * moment.diagonal().mean()
    target = h @ wanted.double().T
    eye = torch.eye(h.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(moment + ridge * eye, h.T @ target / len(h) + ridge * 0.5 * wanted.double().T).T
    refit(model, layers, plan, factors, windows, dense.swapped_in)
    torch.testing.assert_close(damaged.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_lost_nothing_stays_as_it_is(model, make_windows):
    windows = make_windows(count=8, length=12)
    layers, factors, plan, dense = pruned(model, windows, sparsity=0.0)
    kept = [layer.weight.clone() for layer in layers]
    refit(model, layers, plan, factors, windows, dense.swapped_in)
    for layer, weight in zip(layers, kept, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


def test_padding_does_not_matter(make_model, make_windows):
    lengths = (12, 7, 9, 3, 12, 5)
    windows = make_windows(count=6, length=12, lengths=lengths)
    other = Windows(windows.input_ids.where(windows.attention_mask, torch.tensor(7)), windows.attention_mask)
    results = []
    for chosen in (windows, other):
        model = make_model("llama")
        layers, factors, plan, dense = pruned(model, windows, sparsity=0.5, allocation="uniform")
        new, _ = refit(model, layers, plan, factors, chosen, dense.swapped_in, batch_size=2)
        results.append(torch.cat([layer.weight.reshape(-1) for layer in new.layers]))
    assert torch.equal(*results)


def test_batches_do_not_matter(make_model, make_windows):
    """Of damaged weights that may all change: with masks another order of sums can turn a near tie."""
    windows = make_windows(count=6, length=12, lengths=(12, 7, 9, 3, 12, 5))
    results = []
    for batch_size in (2, 6):
        model = make_model("llama")
        layers, factors, plan, dense = pruned(model, windows, sparsity=0.0)
        for layer in layers:
            layer.assign(0.5 * layer.weight)
        refit(model, layers, plan, factors, windows, dense.swapped_in, batch_size=batch_size)
        results.append(torch.cat([layer.weight.reshape(-1) for layer in layers]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_layers_left_out_stay_bit_for_bit(make_model, make_windows):
    model, windows = make_model("llama"), make_windows(count=8, length=12)
    layers = prunable_layers(model, ignore=["*.layers.1.*"])
    untouched = WeightSwap([x for x in prunable_layers(model) if ".layers.1." in x.name])
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.5, allocation="uniform")
    dense = prune(layers, plan)
    _, records = refit(model, layers, plan, factors, windows, dense.swapped_in)
    assert {r.name for r in records} == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    }
    for parameter, held in zip(untouched._parameters, untouched._held, strict=True):
        assert parameter.data is held or torch.equal(parameter.data, held)


def test_a_writer_that_stays_dense_still_counts_as_one(make_model, make_windows):
    model, windows = make_model("llama"), make_windows(count=8, length=12)
    layers = prunable_layers(model, ignore=["*.o_proj"])
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.5, allocation="uniform")
    dense = prune(layers, plan)
    _, records = refit(model, layers, plan, factors, windows, dense.swapped_in)
    assert [r.name for r in records] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(r.after < r.before for r in records)


def test_a_writer_that_nothing_enters_stays(make_model, make_windows):
    """At a sparsity so high that a layer before it has no weight left."""
    model, windows = make_model("llama"), make_windows(8, 8)
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.5, method="magnitude", allocation="uniform")
    for made in plan.layers:
        if made.name.endswith("up_proj"):
            made.weight.zero_()
            made.mask.zero_()
    dense = prune(layers, plan)
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, records = refit(model, layers, plan, factors, windows, dense.swapped_in)
    for record in records:
        changed = not torch.equal(model.get_parameter(f"{record.name}.weight"), before[f"{record.name}.weight"])
        assert changed == (not record.name.endswith("down_proj"))
