"""Recovery: distillation of a pruned model with its mask fixed."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import build, random_windows

from kfac_prune import recovery
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.quality import evaluate
from kfac_prune.recovery import recover


class Job:
    """A model without the smaller half of every matrix, and its dense weights."""

    def __init__(self, model):
        self.model, self.layers = model, prunable_layers(model)
        self.dense = WeightSwap(self.layers)
        self.masks = {layer.name: layer.weight.abs() >= layer.weight.abs().median() for layer in self.layers}
        for layer in self.layers:
            layer.assign(layer.weight * self.masks[layer.name])

    def run(self, windows, epochs=2, **options):
        return recover(
            self.model, self.layers, windows, self.dense.swapped_in, epochs=epochs, masks=self.masks, **options
        )

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def test_held_out_kl_falls_and_the_mask_stays(model, make_windows):
    job, windows = (
        Job(
            model,
        ),
        make_windows(count=64, length=12),
    )
    outside = job.tensors()
    record = job.run(windows, epochs=3, seed=1)
    assert 0 < record.after < record.before
    assert (record.epochs, record.best_epoch) == (3, 3)
    measured = evaluate(model, windows.split(6)[1], dense=job.dense.swapped_in).kl
    assert record.after == pytest.approx(measured, rel=1e-4)
    trained = {id(p) for layer in job.layers for p in layer.parameters()}
    for layer in job.layers:
        weight, mask = layer.weight, job.masks[layer.name]
        assert bool((weight[~mask] == 0).all())
        assert bool((weight[mask] != 0).all())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, outside[name]) == (id(parameter) not in trained), name
        assert parameter.requires_grad


def test_dense_weights_can_be_put_back(make_model, make_windows):
    before = make_model("llama").state_dict()
    job = Job(make_model("llama"))
    job.run(make_windows(count=20, length=8), epochs=1)
    job.dense.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bytes(make_model, make_windows, dtype):
    results = []
    for seed in (0, 0, 1):
        job = Job(make_model("llama", dtype=dtype))
        torch.manual_seed(len(results))  # the global generator has no part in it
        record = job.run(make_windows(count=40, length=8), seed=seed)
        assert record.after < record.before
        results.append(job.tensors())
    first, again, other = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_rate_that_diverges_changes_nothing(make_model, make_windows, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "RATE", 1e6)
    monkeypatch.setattr(recovery, "LOWEST", 2e5)
    job = Job(make_model("llama"))
    before = job.tensors()
    record = job.run(make_windows(count=24, length=8))
    assert record.after == record.before
    assert (record.best_epoch, record.learning_rate, record.epochs) == (0, 0, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.tensors().items())
    assert "left as it was" in caplog.text


def test_training_stops_when_held_out_windows_gain_no_more(make_model, make_windows, monkeypatch):
    job = Job(make_model("llama"))
    values = iter([1.0, 0.9, 0.8, 0.85, 0.81, 0.1])
    monkeypatch.setattr(recovery._Distillation, "kl", lambda *_: next(values))
    record = job.run(make_windows(count=20, length=6), epochs=9)
    assert (record.epochs, record.best_epoch, record.after) == (4, 2, 0.8)


def test_a_rate_that_is_too_high_is_halved_from_the_start(make_model, make_windows, monkeypatch):
    first, job = recovery.RATE, Job(make_model("llama"))
    values = iter([1.0, 1.2, 1.1, 0.9, 0.8])
    monkeypatch.setattr(recovery._Distillation, "kl", lambda *_: next(values))
    record = job.run(make_windows(count=20, length=6))
    assert (record.epochs, record.best_epoch, record.after, record.learning_rate) == (4, 2, 0.8, first / 4)
    monkeypatch.setattr(recovery, "RATE", first / 4)
    values, direct = iter([1.0, 0.9, 0.8]), Job(make_model("llama"))
    direct.run(make_windows(count=20, length=6))
    assert all(torch.equal(tensor, direct.tensors()[name]) for name, tensor in job.tensors().items())


def test_masked_positions_do_not_count(make_model, make_windows):
    windows = make_windows(count=20, length=10, lengths=(10, 7, 4, 5) * 5)
    changed = torch.where(windows.attention_mask, windows.input_ids, 5)
    results = []
    for ids in (windows.input_ids, changed):
        job = Job(make_model("llama"))
        job.run(Windows(ids, windows.attention_mask), epochs=1)
        results.append(job.tensors())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-6)


def test_another_model_may_be_the_dense_one(make_model, make_windows):
    windows, dense = make_windows(count=30, length=8), make_model("gpt2")
    one, other = Job(make_model("gpt2")), Job(make_model("gpt2"))
    one.run(windows)
    recover(other.model, other.layers, windows, dense, epochs=2, masks=other.masks)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_a_model_that_lost_nothing_stays(make_model, make_windows):
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = recover(model, prunable_layers(model), make_windows(count=20), make_model("llama"), epochs=2)
    assert (record.before, record.after, record.epochs) == (0, 0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_recovered_is_refused(make_model, make_windows):
    job = Job(make_model("llama"))
    with pytest.raises(InputError, match="add --samples"):
        job.run(make_windows(count=1))
    layer = next(layer for layer in job.layers if layer.name.endswith("down_proj"))  # attention may swallow a NaN
    layer.assign(torch.full_like(layer.weight, float("nan")))
    with pytest.raises(InputError, match="is not finite on the calibration text"):
        job.run(make_windows(count=20))


def of_two():
    """The same model and windows in each of two processes, as a launcher starts them (run by test_ranks.py)."""
    patch = pytest.MonkeyPatch()
    job = Job(build("llama"))
    calls, divergence = [], recovery._Distillation._divergence
    patch.setattr(
        recovery._Distillation, "_divergence", lambda s, b: calls.append(len(b.input_ids)) or divergence(s, b)
    )
    record = job.run(random_windows(count=160, length=8))
    patch.undo()
    return job.tensors(), record, calls


def check_two(results):
    """What ``of_two`` returned in both processes is what one does alone."""
    (tensors, record, calls), (others, _, _) = results
    assert set(calls) == {1}  # half of two windows
    job = Job(build("llama"))
    alone = job.run(random_windows(count=160, length=8))
    assert alone.after == pytest.approx(record.after, rel=1e-4)
    for name, tensor in job.tensors().items():
        assert torch.equal(tensors[name], others[name])
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-5)


def test_it_works_beside_a_training_of_another_precision(make_model, make_windows):
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        record = Job(make_model("llama")).run(make_windows(count=24, length=12), epochs=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert record.after < record.before
