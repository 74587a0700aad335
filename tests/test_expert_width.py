"""Experts that lose hidden units: equally many in all of a module, each its own; saved, loaded, planned, repaired."""

import copy
import dataclasses
import json
import random

import pytest
import torch
from families import random_model
from test_experts import MODELS, logits, save_mixtral, text, without_tokens
from transformers import AutoModelForCausalLM

from kfac_prune.cli import main
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.errors import InputError
from kfac_prune.experts import split_experts
from kfac_prune.export import save_model, verify_saved
from kfac_prune.inspect_model import describe
from kfac_prune.loading import load, load_model
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.operators import Damping
from kfac_prune.quality import evaluate
from kfac_prune.structure import prune as structured
from kfac_prune.structure.groups import ExpertUnits, consumers_of, find_widths, saving
from kfac_prune.structure.latency import latency_target, speeds
from kfac_prune.structure.plan import Problem
from kfac_prune.structure.prune import Settings, find_groups, parameters_target, prune_structured, weights_target
from kfac_prune.structure.shrink import CannotBeStored, Cut, shrink

#: What the configuration calls the experts' width.
FIELDS = {
    "mixtral": "intermediate_size",
    "phimoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}  # of the largest logit
NAMES = pytest.mark.parametrize("name", FIELDS)


def split_model(name, dtype=torch.float32):
    model = random_model(MODELS[name], dtype)
    if dtype == torch.float64:  # transformers' other implementations know no double
        model.set_experts_implementation("eager")
    split_experts(model)
    return model


def experts_in(model):
    return [group for group in find_widths(model, prunable_layers(model)) if isinstance(group, ExpertUnits)]


def some_units(group, width, seed=0):
    rng = random.Random(f"{group.name} {seed}")
    return torch.tensor([sorted(rng.sample(range(group.units), width)) for _ in group.experts])


def cut_at_random(model, widths):
    """Cuts to so many units per module with shifted consumers; the masked model; and the tensors sliced by name."""
    whole = copy.deepcopy(model)
    cuts = []
    for group, width in zip(experts_in(whole), widths, strict=True):
        for expert, kept in group.members(some_units(group, width)):
            weight = torch.zeros_like(expert.consumer.weight)
            weight[:, kept] = expert.consumer.weight[:, kept] + 0.1
            expert.consumer.assign(weight)
    for group, changed, width in zip(experts_in(model), experts_in(whole), widths, strict=True):
        for (expert, kept), other in zip(group.members(some_units(group, width)), changed.experts, strict=True):
            cuts.append(Cut(expert, kept, other.consumer.weight[:, kept], None))
    tensors = {}
    for group, width in zip(experts_in(whole), widths, strict=True):
        pairs = group.members(some_units(group, width))
        gates = [e.producers[0].weight[: group.units][k] for e, k in pairs]
        ups = [e.producers[0].weight[group.units :][k] for e, k in pairs]
        tensors[f"{group.name}.gate_up_proj"] = torch.stack([torch.cat(p) for p in zip(gates, ups, strict=True)])
        tensors[f"{group.name}.down_proj"] = torch.stack([e.consumer.weight[:, k] for e, k in pairs])
    return cuts, whole, tensors


def assert_holds(folder, tensors):
    """A saved model, loaded by transformers, has these tensors."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


# --- groups


@NAMES
def test_the_experts_of_a_module_are_one_group(name):
    model = split_model(name)
    groups = experts_in(model)
    assert [group.name for group in groups] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for group in groups:
        assert len(group.experts) == 4
        everything, kept = group.everything(), group.everything()[:, 3:]
        assert everything.shape == (4, group.units)
        assert (group.size(everything), group.size(kept)) == ((group.units,), (group.units - 3,))
        assert saving(group, everything) == 0
        assert saving(group, kept) == 4 * 3 * 3 * 24  # experts, units, matrices, width of the stream
    others = [group for group in find_widths(model, prunable_layers(model)) if group not in groups]
    assert [group.name for group in others] == [f"model.layers.{i}.mlp.shared_expert" for i in range(2)] * (
        name == "qwen2_moe"
    )


def test_a_module_with_experts_left_out_loses_none():
    model = split_model("mixtral")
    layers = prunable_layers(model, ignore=["*.layers.0.mlp.experts.2.*"])
    assert [group.name for group in find_widths(model, layers)] == ["model.layers.1.mlp.experts"]


# --- shrinking


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@NAMES
def test_one_width_gives_a_plain_model(name, dtype, near, tmp_path):
    model = split_model(name, dtype)
    cuts, masked, tensors = cut_at_random(model, (16, 16))
    smaller = shrink(model, cuts, plain=True)
    assert type(smaller) is type(model)
    assert getattr(smaller.config, FIELDS[name]) == 16
    assert not hasattr(smaller.config, "pruned_shapes")
    near(logits(smaller), logits(masked), TOLERANCE[dtype])
    save_model(smaller, None, tmp_path)
    verify_saved(smaller, tmp_path)
    assert_holds(tmp_path, tensors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@NAMES
def test_widths_of_their_own(name, dtype, near, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = split_model(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cuts, masked, tensors = cut_at_random(model, (16, 8))
    smaller = shrink(model, cuts)
    assert type(smaller).__name__ == f"Pruned{type(model).__name__}"
    near(logits(smaller), logits(masked), TOLERANCE[dtype])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    save_model(smaller, None, tmp_path / "saved")
    verify_saved(smaller, tmp_path / "saved")
    assert_holds(tmp_path / "saved", tensors)
    again = load_model(str(tmp_path / "saved"))
    if dtype == torch.float64:
        again.set_experts_implementation("eager")
    split_experts(again)
    near(logits(again), logits(smaller), TOLERANCE[dtype])
    once_more = shrink(again, cut_at_random(again, (8, 8))[0])
    assert type(once_more) is type(model)
    assert getattr(once_more.config, FIELDS[name]) == 8
    with pytest.raises(CannotBeStored, match="one width for all blocks, and these have 2"):
        shrink(model, cuts, plain=True)


def test_shared_experts_have_a_width_beside_them(near):
    model = split_model("qwen2_moe")
    cuts, masked, _ = cut_at_random(model, (16, 16))
    for group in find_widths(model, prunable_layers(model)):
        if not isinstance(group, ExpertUnits):
            kept = torch.arange(12)
            cuts.append(Cut(group, kept, group.consumer.weight[:, kept], None))
            masked.get_submodule(group.consumer.name).weight.data[:, 12:] = 0
    smaller = shrink(model, cuts, plain=True)
    assert (smaller.config.moe_intermediate_size, smaller.config.shared_expert_intermediate_size) == (16, 12)
    near(logits(smaller), logits(masked), TOLERANCE[torch.float32])


# --- planning


def problem_of(model, windows, method="kfac"):
    groups = find_groups(model, prunable_layers(model), ("ffn",))
    factors = estimate_factors(model, consumers_of(groups), windows)
    return Problem(model, groups, factors, method, Damping(1e-3))


def test_a_width_costs_what_all_experts_cost_at_it():
    """The cost of a size is the sum of the quadratics of its compensated experts, each per token of the text."""
    model, windows = split_model("mixtral"), text(32, 16)
    problem = problem_of(model, windows)
    curves = problem.curves(None, multiple=4)
    for group in problem.groups:
        assert [group.size(option.kept)[0] for option in curves[group.name]] == [40, 32, 24, 16, 8]  # whole 16 bytes
        for option in curves[group.name][1:]:
            total = 0.0
            for cut in problem.cuts(group, option):
                curvature = problem.curvature(cut.group)
                change = -cut.group.consumer.weight.double()
                change[:, cut.kept] += cut.weight.double()
                total += 0.5 * float((curvature.g.double() @ change @ curvature.a.double() * change).sum())
            assert option.cost == pytest.approx(total, rel=1e-4)
            assert option.saving == saving(group, option.kept)


def test_every_expert_loses_units_of_its_own():
    model = split_model("mixtral")
    problem = problem_of(model, text(32, 16))
    for options in problem.curves(None, multiple=4).values():
        assert len({tuple(row) for row in options[2].kept.tolist()}) == 4


def test_an_expert_without_tokens_goes_by_magnitude():
    model, windows = split_model("mixtral"), text(32, 16)
    without_tokens(model)
    problem = problem_of(model, windows)
    assert problem.unseen == ["model.layers.1.mlp.experts.3.down_proj"]
    group = problem.groups[1]
    option = problem.curves(None, multiple=4)[group.name][2]
    norms = group.experts[3].consumer.weight.norm(dim=0)
    assert option.kept[3].tolist() == sorted(norms.argsort(descending=True)[: group.size(option.kept)[0]].tolist())
    *_, last = problem.cuts(group, option)
    assert torch.equal(last.weight, group.experts[3].consumer.weight[:, option.kept[3]])


def test_experts_without_tokens_are_told(monkeypatch):
    model, said, silent = split_model("mixtral"), [], "model.layers.1.mlp.experts.3.down_proj"

    def estimated(*arguments, **options):
        found = estimate_factors(*arguments, **options)
        return dataclasses.replace(found, layers={n: f for n, f in found.layers.items() if n != silent})

    monkeypatch.setattr(structured, "estimate_factors", estimated)
    layers = prunable_layers(model)
    target, settings = weights_target(model, layers, 0.2), Settings(multiple=4, shots=1, refit=False)
    best, _ = prune_structured(model, layers, text(40), target, kinds=("ffn",), settings=settings, echo=said.append)
    assert best.unseen == (silent,)
    assert any("no calibration token reaches 1 experts" in line for line in said)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_better_than_magnitude(name, widths):
    model, kl = split_model(name), {}
    layers = prunable_layers(model)
    for method in ("magnitude", "kfac"):
        settings = Settings(method=method, multiple=4, shots=1, refit=False)
        best, _ = prune_structured(
            model,
            layers,
            text(64, 16),
            weights_target(model, layers, 0.3),
            kinds=("ffn",),
            widths=widths,
            settings=settings,
        )
        assert best.widths == widths
        kl[method] = evaluate(best.model, text(16, 16, seed=1), dense=model).kl
    assert kl["kfac"] < 0.8 * kl["magnitude"], kl


def test_a_target_in_parameters():
    model = split_model("qwen3_moe")
    layers, wanted = prunable_layers(model), model.num_parameters() - 3000
    best, _ = prune_structured(
        model, layers, text(40, 12), parameters_target(model, layers, wanted), settings=Settings(multiple=1, shots=1)
    )
    assert wanted - 6000 < best.model.num_parameters() <= wanted


def test_milliseconds_are_no_target():
    model = split_model("mixtral")
    groups = find_groups(model, prunable_layers(model), ("ffn",))
    with pytest.raises(InputError, match="--target-latency cannot tell how long experts take"):
        latency_target(model, groups, 8, 1.0)


def test_speed_is_that_of_the_saved_form(monkeypatch):
    """Experts are whole while models are timed, and split again after it."""
    model, seen = split_model("mixtral"), []
    hook = model.register_forward_pre_hook(lambda m, _: seen.append(any(p.ndim == 3 for p in m.parameters())))
    speeds([model, model], 8)
    hook.remove()
    assert all(seen)
    assert not any(p.ndim == 3 for p in model.parameters())
    estimate_factors(model, prunable_layers(model), text(2))  # the weights still take part in gradients


# --- whole runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_mixtral(tmp_path, width=64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ("--data", "text.txt", "--seqlen", "16", "--samples", "40", "--eval-samples", "8")


@pytest.mark.parametrize(
    "options", [("--widths", "uniform"), ("--widths", "per-layer"), ("--reconstruct", "2")], ids=" ".join
)
def test_by_the_command_line(here, options, capsys):
    command = ["prune", "model", *SMALL, "--structured", "ffn", "--sparsity", "0.3", "--out", "out", *options]
    assert main(command) == 0
    with open("out/kfac_prune.json", encoding="utf-8") as file:
        record = json.load(file)
    assert record["sparsity"] == pytest.approx(0.3, abs=0.06)
    assert record["experts_without_tokens"] == []
    assert all(size["after"] < size["before"] for size in record["groups"].values()) or record["widths"] == "per-layer"
    if "--reconstruct" in options:
        assert len(record["reconstruction"]) == 2
        assert any(block["after"] < block["before"] for block in record["reconstruction"])
    model = load(here / "out")
    for name, size in record["groups"].items():
        assert model.get_submodule(name).down_proj.shape == (4, 32, size["after"][0])
    if record["widths"] == "uniform":
        assert AutoModelForCausalLM.from_pretrained("out").config.intermediate_size == size["after"][0]
    capsys.readouterr()
    assert main(["eval", "out", "--dense", "model", *SMALL[:4], "--eval-samples", "8"]) == 0


def test_inspect_lists_them(here, capsys):
    said = describe("model")
    assert "\nmodel.layers.0.mlp.experts         4 x 64 hidden           384\n" in said


def test_the_dense_model_stays(here):
    model = split_model("mixtral")
    before, layers = {n: t.clone() for n, t in model.state_dict().items()}, prunable_layers(model)
    dense = WeightSwap(layers)
    prune_structured(model, layers, text(40, 12), weights_target(model, layers, 0.2), settings=Settings(multiple=4))
    dense.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
