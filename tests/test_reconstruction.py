import pytest
import torch

from kfac_prune import reconstruction
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.plan import make_plan, prune
from kfac_prune.quality import evaluate
from kfac_prune.reconstruction import Reconstruction, reconstruct
from kfac_prune.stream import BlockStack, find_writers, observed
from kfac_prune.structure.prune import Settings, prune_structured, weights_target


class Job:
    """A model pruned to 2:4 by magnitude, and what its reconstruction needs."""

    def __init__(self, model, windows, batch_size=8):
        self.model, self.windows = model, windows
        self.layers = prunable_layers(model)
        self.factors = estimate_factors(model, self.layers, windows)
        self.plan = make_plan(self.layers, self.factors, pattern=NM(2, 4), method="magnitude")
        self.stack = BlockStack(model, self.layers, windows, batch_size)
        self.dense = prune(self.layers, self.plan)

    def run(self, epochs=3, unit="block", seed=0, trained=None, metric=None):
        by_name = {layer.name: layer for layer in self.layers}
        if metric is None:
            metric = {n: Damping()(f.g, name="G", where=n)[0] for n, f in self.factors.layers.items()}
        return reconstruct(
            self.stack,
            by_name,
            self.stack,
            by_name,
            metric,
            Reconstruction(epochs, unit, seed),
            trained=set(by_name) if trained is None else trained,
            masks={layer.name: layer.mask for layer in self.plan.layers},
            dense=self.dense.swapped_in,
        )

    def kl(self):
        return evaluate(self.model, self.windows, dense=self.dense.swapped_in).kl

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_the_stream_comes_nearer_and_the_mask_stays(model, make_windows, unit):
    job = Job(model, make_windows(count=32, length=12))
    before = job.kl()
    records = job.run(unit=unit)
    assert len(records) == (2 if unit == "block" else 4)
    assert all(record.after <= record.before for record in records)
    assert job.kl() < before
    for layer, planned in zip(job.layers, job.plan.layers, strict=True):
        assert bool((layer.weight[~planned.mask] == 0).all())


def test_dense_weights_can_be_put_back(model, make_windows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    job = Job(model, make_windows(count=24, length=8))
    job.run(epochs=1)
    job.dense.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(make_model, make_windows):
    results = []
    for seed in (0, 0, 1):
        job = Job(make_model("llama"), make_windows(count=32, length=8))
        job.run(seed=seed)
        results.append(job.tensors())
    first, again, other = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_masked_positions_do_not_count(model, make_windows):
    windows = make_windows(count=24, length=10, lengths=(10, 7, 4) * 8)
    changed = torch.where(windows.attention_mask, windows.input_ids, 5)
    results = []
    for ids in (windows.input_ids, changed):
        job = Job(model, Windows(ids, windows.attention_mask))
        job.run(epochs=1)
        results.append(job.tensors())
        job.dense.restore()
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=2e-3)


def test_only_the_layers_that_may_change_do(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    before = job.tensors()
    chosen = {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    records = job.run(trained=chosen)
    assert [record.name for record in records] == ["model.layers.1.mlp.down_proj"]
    changed = {name for name, tensor in job.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in chosen}


def test_a_linear_sub_block_reaches_least_squares(make_model, make_windows):
    """Only the last writer is trained and may use all of its weights: the optimum is a linear regression, for any G."""
    job = Job(make_model("llama", dtype=torch.float32), make_windows(count=32, length=12))
    name = "model.layers.0.mlp.down_proj"
    layer = next(layer for layer in job.layers if layer.name == name)
    job.plan = make_plan([layer], job.factors, sparsity=0.0, allocation="uniform")  # all of its weights may change
    (record,) = job.run(epochs=150, trained={name})
    inside = [x for x in job.layers if x.name.startswith("model.layers.0.")]
    h, target = [], []
    with torch.no_grad():
        for batch, entry in enumerate(job.stack.entries):
            with job.dense.swapped_in():
                goal = job.stack.run(0, batch, entry)
            with observed(inside) as seen:
                job.stack.run(0, batch, entry)
            before = entry + seen["model.layers.0.self_attn.o_proj"][1]
            h.append(seen[name][0].flatten(0, 1))
            target.append((goal - before).flatten(0, 1))
    g = Damping()(job.factors.layers[name].g, name="G", where=name)[0]
    solution = torch.linalg.lstsq(torch.cat(h[:-1]), torch.cat(target[:-1])).solution
    residual = h[-1] @ solution - target[-1]
    best = 0.5 * float(((residual @ g) * residual).sum(-1).mean())
    assert record.after <= 1.1 * best + 1e-3 * record.before


def test_a_rate_that_diverges_changes_nothing(make_model, make_windows, monkeypatch):
    monkeypatch.setattr(reconstruction, "LEARNING_RATES", (1e4,))
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    before = job.tensors()
    records = job.run(epochs=1)
    assert all(record.learning_rate == 0 and record.after == record.before for record in records)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.tensors().items())


def test_one_batch_is_too_few(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=8, length=8))
    with pytest.raises(InputError, match="there is one batch"):
        job.run()


def test_a_smaller_model_is_reconstructed_too(model, family, make_windows):
    windows = make_windows(count=48, length=10)
    layers = prunable_layers(model)
    kinds = ("ffn", "heads") if family == "llama" else ("ffn",)
    target = weights_target(model, layers, 0.2)
    best, _ = prune_structured(
        model, layers, windows, target, kinds=kinds, widths="per-layer", settings=Settings(shots=1, refit=False)
    )
    before = evaluate(best.model, windows, dense=model).kl
    factors = estimate_factors(model, layers, windows)
    reconstruct(
        BlockStack(model, layers, windows, 8),
        {layer.name: layer for layer in layers},
        BlockStack(best.model, prunable_layers(best.model), windows, 8),
        {layer.name: layer for layer in prunable_layers(best.model)},
        {n: Damping()(f.g, name="G", where=n)[0] for n, f in factors.layers.items()},
        Reconstruction(3),
        trained={layer.name for layer in layers},
    )
    assert evaluate(best.model, windows, dense=model).kl < before


def test_writers_end_the_sub_blocks(make_model, make_windows):
    job = Job(make_model("opt"), make_windows(count=24, length=8))
    with job.dense.swapped_in():
        inside = [layer for layer in job.layers if ".layers.0." in layer.name]
        writers = find_writers(job.stack, 0, job.stack.entries[0], inside)
    records = job.run(epochs=1, unit="sublayer")
    assert [record.name for record in records[:2]] == [writer.layer.name for writer in writers]
