"""Blocks in main memory that visit the device: the same results, and nothing of them is left there."""

from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import build, random_windows
from letters import save_llama
from torch import nn

from kfac_prune import offload
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.errors import InputError
from kfac_prune.models import find_blocks, prunable_layers
from kfac_prune.objective import CAUSAL
from kfac_prune.offload import resident
from kfac_prune.pipeline import run
from kfac_prune.shots import shots_of


@pytest.fixture
def always_away(monkeypatch):
    """On a machine without a second device every block counts as away, so that it is run again for its gradients."""
    monkeypatch.setattr(offload._Visitor, "_is_away", lambda self: True)


def offloaded(family, device="cpu"):
    model = build(family)
    offload.offload(model, torch.device(device))
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_factors_are_those_of_the_whole_model(family, padded, always_away):
    windows = random_windows(count=5, length=9, lengths=(9, 4, 7, 9, 2) if padded else ())
    model = build(family)
    expected = estimate_factors(model, prunable_layers(model), windows, batch_size=2)
    model = offloaded(family)
    found = estimate_factors(model, prunable_layers(model), windows, batch_size=2)
    assert found.layers.keys() == expected.layers.keys()
    for name, factors in expected.layers.items():
        assert found.layers[name].tokens == factors.tokens
        for part in ("a", "mean", "g"):
            assert torch.equal(getattr(found.layers[name], part), getattr(factors, part)), (name, part)
    assert all(torch.equal(found.streams[name], g) for name, g in expected.streams.items())


@pytest.mark.parametrize("how", ["cpu", "disk", "some blocks"])
def test_a_model_that_accelerate_holds_elsewhere_is_taken_over(family, how, tmp_path):
    windows, model, cpu = random_windows(count=5, length=9), build(family), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = estimate_factors(model, prunable_layers(model), windows)
    if how == "cpu":
        cpu_offload(model, cpu)
    elif how == "disk":
        disk_offload(model, str(tmp_path), cpu)
    else:
        last = find_blocks(model, prunable_layers(model))[0][-1]
        owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
        places = {name: "disk" if name.startswith(f"{last}.") else "cpu" for name in owners}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with pytest.raises(InputError, match=r"was loaded with device_map; let kfac_prune\.offload\.offload"):
        estimate_factors(model, prunable_layers(model), windows)
    offload.offload(model, cpu)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    found = estimate_factors(model, prunable_layers(model), windows)
    for name, factors in expected.layers.items():
        assert torch.equal(found.layers[name].a, factors.a)
        assert torch.equal(found.layers[name].g, factors.g)


class TestVisits:
    @pytest.fixture
    def present(self, monkeypatch):
        """The blocks that are on the device, at any moment."""
        blocks = []

        @contextmanager
        def watched(block, device):
            blocks.append(block)
            try:
                with resident(block, device):
                    yield
            finally:
                blocks.remove(block)

        monkeypatch.setattr(offload, "resident", watched)
        return blocks

    @pytest.mark.parametrize("gradients", [False, True])
    def test_layers_run_while_their_block_is_there_and_no_other(self, family, gradients, present, always_away):
        model, runs = offloaded(family), []
        layers = prunable_layers(model)
        _, blocks = find_blocks(model, layers)
        home = {p: p.data_ptr() for block in blocks for p in block.parameters()}
        for layer in layers:
            layer.module.register_forward_hook(lambda module, args, output: runs.append((module, list(present))))
        with torch.set_grad_enabled(gradients):
            output = CAUSAL.output(model, torch.zeros(2, 7, dtype=torch.int64), None)
        if gradients:
            output.sum().backward()
        assert len(runs) > len(layers) if gradients else len(runs) == len(layers)
        assert all(len(there) == 1 and module in there[0].modules() for module, there in runs)
        assert not present
        assert all(p.data_ptr() == pointer for p, pointer in home.items())


class TestResident:
    def test_what_is_replaced_there_comes_back(self):
        layer = nn.Linear(3, 2)
        home = layer.weight.data
        with resident(layer, torch.device("cpu")):
            layer.bias.data = torch.ones(2)
        assert layer.weight.data.data_ptr() == home.data_ptr()
        assert torch.equal(layer.bias, torch.ones(2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("offload")
    save_llama(root / "model")
    (root / "text.txt").write_text("the cat sat on the mat and the dog sat on the log " * 60, encoding="utf-8")
    return root


@pytest.mark.parametrize("fields", [{"pattern": "2:4", "reconstruct": 1}, {"refit": True}], ids=["2:4", "refit"])
def test_a_run_gives_the_same_bytes(fields, place, always_away, tmp_path):
    small = {"model": str(place / "model"), "data": str(place / "text.txt"), "dtype": "bfloat16", "shots": 1}
    small |= {"samples": 20, "eval_samples": 4, "seqlen": 16, "device": "cpu", **fields}
    for name, away in (("whole", False), ("away", True)):
        run(Recipe(out=str(tmp_path / name), offload=away, **small))
    whole, away = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "away"))
    assert whole == away


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured": "ffn"}, "structured ffn needs the whole model"),
        ({"recover_epochs": 2}, "recover_epochs 2 needs the whole model"),
        ({"shots": 2}, "shots 2 needs the whole model"),
        ({"method": "llm-surgeon"}, "method llm-surgeon needs the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe(model="m", data="d", out="o", offload=True, **fields)


def test_no_further_shots_by_rule(place):
    one = Recipe(model="m", data="d", out="o", reconstruct=0)
    assert shots_of(one.resolved(), 1.0) == 3
    assert shots_of(Recipe(model="m", data="d", out="o", reconstruct=0, offload=True).resolved(), 1.0) == 1


def test_a_model_without_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(offload, "find_blocks", lambda model, layers: ([], []))
    with pytest.raises(InputError, match="LlamaForCausalLM has none"):
        offloaded("llama")
