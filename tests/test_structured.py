"""Structured pruning from plan to smaller model, its repair, and plans against milliseconds."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch.nn.functional import kl_div

from kfac_prune import probe as probing
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.operators import Damping
from kfac_prune.probe import Probe
from kfac_prune.structure import latency, plan
from kfac_prune.structure.curves import Option
from kfac_prune.structure.groups import FfnUnits
from kfac_prune.structure.latency import LatencyTable, Speed, latency_table, latency_target
from kfac_prune.structure.plan import Problem, one_size, own_sizes
from kfac_prune.structure.prune import (
    Settings,
    find_groups,
    parameters_target,
    prune_structured,
    weights_target,
)
from kfac_prune.structure.repair import repair

BOTH = ("ffn", "heads")
KINDS = {"llama": BOTH, "gpt2": ("ffn",), "opt": ("ffn",)}


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def block_weights(model):
    """Numbers in the matrices of the blocks, counted from the state dict."""
    matrices = (tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2 and "layers." in name)
    others = (tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2 and ".h." in name)
    return sum(tensor.numel() for tensor in (*matrices, *others))


def kl(dense, model, windows):
    """Mean KL(dense‖model) in nats per predicted token, by torch's own function in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=windows.input_ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    return float(kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True))


def pruned(model, windows, sparsity, *, kinds=BOTH, ignore=(), widths=None, **settings):
    layers = prunable_layers(model, ignore=ignore)
    target = weights_target(model, layers, sparsity)
    made = Settings(**{"multiple": 4, "shots": 1, **settings})
    return prune_structured(model, layers, windows, target, kinds=kinds, widths=widths, settings=made)


def problem_of(model, windows, kinds=BOTH, method="kfac"):
    groups = find_groups(model, prunable_layers(model), kinds)
    factors = estimate_factors(model, [group.consumer for group in groups], windows)
    return Problem(model, groups, factors, method, Damping(1e-3))


def weights(group, option):
    return option.saving


@pytest.fixture
def llama(make_model, make_windows):
    """A model and windows that all fit and are measured on."""
    return make_model("llama"), make_windows(count=24, length=12)


# --- plans


class TestProblem:
    @pytest.mark.parametrize("method", ["kfac", "layerwise", "obd", "magnitude"])
    def test_measuring_leaves_the_model_as_it_is(self, family, method, make_model, make_windows):
        model, windows = make_model(family), make_windows(count=8, length=12)
        problem = problem_of(model, windows, KINDS[family], method)
        before, storage = tensors(model), [p.data_ptr() for p in model.parameters()]
        curves = problem.curves(windows, multiple=16)
        for group in problem.groups:
            assert problem.measured(group, curves[group.name][-1], Probe(model, windows, 3)) > 0
        assert same(tensors(model), before)
        assert [p.data_ptr() for p in model.parameters()] == storage

    def test_the_model_is_restored_after_a_failure(self, llama, monkeypatch):
        model, windows = llama
        problem = problem_of(model, windows)
        option = problem.curves(None, multiple=16)[problem.groups[0].name][-1]
        before = tensors(model)

        def fails(*args, **kwargs):
            raise KeyboardInterrupt

        probe = Probe(model, windows)
        monkeypatch.setattr(probing, "evaluate", fails)
        with pytest.raises(KeyboardInterrupt):
            problem.measured(problem.groups[0], option, probe)
        assert same(tensors(model), before)

    def test_measured_is_the_kl_with_one_group_cut(self, family, make_model, make_windows):
        model, windows = make_model(family), make_windows(count=8, length=12)
        problem = problem_of(model, windows, KINDS[family])
        curves = problem.curves(None, multiple=16)
        for group in problem.groups:
            option = curves[group.name][1]
            (cut,), masked = problem.cuts(group, option), copy.deepcopy(model)
            consumer = Layer(group.consumer.name, masked.get_submodule(group.consumer.name))
            dense = torch.zeros(consumer.shape)
            dense[:, group.columns(option.kept)] = cut.weight
            consumer.assign(dense, cut.bias)
            measured = problem.measured(group, option, Probe(model, windows, 3))
            assert measured == pytest.approx(kl(model, masked, windows), rel=1e-3)

    def test_keeping_all_cuts_nothing(self, family, make_model, make_windows):
        model, windows = make_model(family), make_windows(count=8, length=12)
        problem = problem_of(model, windows, KINDS[family])
        for group in problem.groups:
            (cut,) = problem.cuts(group, Option(group.everything(), 0, 0.0))
            torch.testing.assert_close(cut.weight, group.consumer.weight, rtol=0, atol=1e-5)
            if cut.bias is not None:
                torch.testing.assert_close(cut.bias, group.consumer.bias, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("model_family", ["gpt2", "opt"])
    def test_the_bias_takes_up_the_mean_of_what_goes(self, model_family, make_model, make_windows):
        """The mean output of the consumer, over the tokens of the calibration, is what it was."""
        model, windows = make_model(model_family), make_windows(count=8, length=12)
        problem = problem_of(model, windows, ("ffn",))
        for group in problem.groups:
            mean = problem.factors.layers[group.consumer.name].mean
            (cut,) = problem.cuts(group, problem.curves(None, multiple=8)[group.name][3])
            before = group.consumer.weight @ mean + group.consumer.bias
            torch.testing.assert_close(cut.weight @ mean[cut.kept] + cut.bias, before, rtol=0, atol=1e-4)

    def test_a_method_without_coupling_leaves_weights_and_bias(self, make_model, make_windows):
        model, windows = make_model("opt"), make_windows(count=8, length=12)
        problem = problem_of(model, windows, ("ffn",), "magnitude")
        for group in problem.groups:
            (cut,) = problem.cuts(group, problem.curves(None, multiple=8)[group.name][2])
            assert torch.equal(cut.weight, group.consumer.weight[:, cut.kept])
            assert torch.equal(cut.bias, group.consumer.bias)


class TestSizes:
    @pytest.fixture
    def problem(self, llama):
        return problem_of(*llama)

    @pytest.fixture
    def curves(self, problem):
        return problem.curves(None, multiple=8)

    @pytest.fixture(params=[0.05, 0.3, 0.5, 0.7, 0.74])
    def target(self, request, problem):
        return request.param * block_weights(problem.model)

    def test_own_sizes_reach_the_target_at_the_least_cost(self, problem, curves, target):
        sizes = own_sizes(problem.groups, curves, weights, target)
        assert sum(option.saving for option in sizes.values()) >= target
        reaching = [
            sum(option.cost for option in choice)
            for choice in itertools.product(*(curves[group.name] for group in problem.groups))
            if sum(option.saving for option in choice) >= target * (1 + 1e-3)  # savings are rounded down by 1/4000 each
        ]
        assert sum(option.cost for option in sizes.values()) <= min(reaching) * (1 + 1e-12)

    def test_own_sizes_cost_no_more_than_one_size(self, problem, curves, target):
        own = own_sizes(problem.groups, curves, weights, target)
        one = one_size(problem.model, problem.groups, curves, weights, target * (1 + 1e-3))
        assert sum(o.cost for o in own.values()) <= sum(o.cost for o in one.values()) * (1 + 1e-12)

    @pytest.mark.parametrize("held", [{(1, 1)}, {(1, 2), (2, 1)}, set()], ids=str)
    def test_one_size_is_the_best_of_what_a_configuration_holds(self, problem, curves, target, held, monkeypatch):
        monkeypatch.setattr(plan, "accepted_heads", lambda model, attention: held)
        sizes = one_size(problem.model, problem.groups, curves, weights, target)
        best = math.inf
        for width, heads in itertools.product(range(8, 41, 8), {*held, (2, 2)}):
            wanted = [(width,) if isinstance(group, FfnUnits) else heads for group in problem.groups]
            options = [
                next(o for o in curves[group.name] if tuple(o.kept.shape) == shape)
                for group, shape in zip(problem.groups, wanted, strict=True)
            ]
            if sum(option.saving for option in options) >= target:
                best = min(best, sum(option.cost for option in options))
        if math.isinf(best):
            assert sizes is None
            return
        assert sum(option.saving for option in sizes.values()) >= target * (1 - 1e-9)
        assert sum(option.cost for option in sizes.values()) == pytest.approx(best)
        ffns, attentions = (
            {tuple(sizes[group.name].kept.shape) for group in problem.groups if isinstance(group, FfnUnits) == kind}
            for kind in (True, False)
        )
        assert len(ffns) == 1
        assert len(attentions) == 1
        assert attentions <= {*held, (2, 2)}

    @pytest.mark.parametrize("kind", ["ffn", "heads"])
    def test_one_size_of_one_kind(self, problem, curves, kind):
        groups = find_groups(problem.model, prunable_layers(problem.model), [kind])
        sizes = one_size(problem.model, groups, curves, weights, 500)
        assert sizes.keys() == {group.name for group in groups}
        assert len({tuple(option.kept.shape) for option in sizes.values()}) == 1
        assert sum(option.saving for option in sizes.values()) >= 500

    def test_out_of_reach(self, problem, curves):
        everything = block_weights(problem.model)
        assert own_sizes(problem.groups, curves, weights, everything) is None
        assert one_size(problem.model, problem.groups, curves, weights, everything) is None


# --- end to end


@pytest.mark.parametrize("shots", [1, 2])
def test_what_was_asked_for_is_gone_and_the_better_plan_kept(family, shots, make_model, make_windows):
    model, windows = make_model(family), make_windows(count=64, length=12)
    before = tensors(model)
    best, others = pruned(model, windows, 0.4, kinds=KINDS[family], shots=shots)
    assert same(tensors(model), before)
    assert {done.widths for done in (best, *others)} == {"uniform", "per-layer"}
    for done in (best, *others):
        assert block_weights(done.model) <= 0.6 * block_weights(model)
        assert done.model.num_parameters() < model.num_parameters()
        assert done.kl == pytest.approx(kl(model, done.model, windows.split(16)[1]), rel=1e-3)
        assert done.shots == shots
        assert done.predicted > 0
        assert not done.model.training
        plain = not hasattr(done.model.config, "pruned_shapes")
        assert plain or done.widths == "per-layer"
        assert all(name in done.table() for name in done.sizes)
    assert best.kl <= min(done.kl for done in others)


@pytest.mark.parametrize("shots", [1, 2])
def test_recorded_sizes_are_those_of_the_model(llama, shots):
    model, windows = llama
    best, others = pruned(model, windows, 0.5, shots=shots)
    for done in (best, *others):
        for name, (before, after) in done.sizes.items():
            here, there = model.get_submodule(name), done.model.get_submodule(name)
            for module, size in ((here, before), (there, after)):
                if name.endswith("mlp"):
                    assert size == (module.down_proj.in_features,)
                    assert module.up_proj.out_features == module.gate_proj.out_features == size[0]
                else:
                    groups, per_group = size
                    assert module.o_proj.in_features == module.q_proj.out_features == 6 * groups * per_group
                    assert module.k_proj.out_features == module.v_proj.out_features == 6 * groups


@pytest.mark.parametrize("shots", [1, 3])
def test_producers_lose_the_same_units_and_are_else_untouched(llama, shots):
    """Without the refit every row that is left is a row of the dense model, gate and up alike."""
    model, windows = llama
    best, others = pruned(model, windows, 0.5, shots=shots, refit=False)

    def rows(name, done):
        dense, left = (m.get_submodule(name).weight for m in (model, done.model))
        equal = (left[:, None] == dense[None]).all(-1)
        assert equal.sum(1).tolist() == [1] * len(left), name
        return equal.int().argmax(1).tolist()

    for done in (best, *others):
        for i in range(2):
            gate, up = (rows(f"model.layers.{i}.mlp.{part}_proj", done) for part in ("gate", "up"))
            assert gate == up == sorted(set(gate))
            q, k, v = (rows(f"model.layers.{i}.self_attn.{part}_proj", done) for part in "qkv")
            assert k == v
            groups = sorted({row // 6 for row in k})
            assert k == [6 * group + j for group in groups for j in range(6)]
            assert sorted({row // 12 for row in q}) == groups  # two query heads of six to a KV group


@pytest.mark.parametrize("method", ["kfac", "layerwise"])
def test_refit_comes_nearer_to_the_dense_model(family, method, make_model, make_windows):
    model, windows = make_model(family), make_windows(count=24, length=12)
    for widths in ("uniform", "per-layer"):
        with_it, without = (
            pruned(model, windows, 0.3, kinds=KINDS[family], widths=widths, method=method, refit=refit)[0]
            for refit in (True, False)
        )
        assert with_it.sizes == without.sizes
        assert kl(model, with_it.model, windows) < kl(model, without.model, windows)


@pytest.mark.parametrize("method", ["layerwise", "obd", "magnitude"])
def test_the_whole_curvature_does_best(llama, method):
    model, windows = llama
    whole, less = (pruned(model, windows, 0.3, method=m, refit=False)[0].kl for m in ("kfac", method))
    assert whole < less


def test_same_seed_same_bytes(llama):
    model, windows = llama
    one, _ = pruned(model, windows, 0.4, seed=3, shots=2)
    torch.manual_seed(99)  # the global generator has no part in it
    two, _ = pruned(model, windows, 0.4, seed=3, shots=2)
    assert same(tensors(one.model), tensors(two.model))
    assert (one.sizes, one.kl, one.predicted) == (two.sizes, two.kl, two.predicted)
    other, _ = pruned(model, windows, 0.4, seed=4, shots=2)
    assert not same(tensors(one.model), tensors(other.model))


def test_a_large_predicted_loss_is_tried_in_several_shots_too(llama):
    model, windows = llama
    little, others = pruned(model, windows, 0.01, kinds=("ffn",), shots=None, multiple=1)
    assert {done.shots for done in (little, *others)} == {1}
    much, others = pruned(model, windows, 0.6, shots=None)
    assert sorted((done.shots, done.widths) for done in (much, *others)) in (
        [(1, "per-layer"), (1, "uniform"), (3, widths)] for widths in ("per-layer", "uniform")
    )
    assert all(done.predicted > 0.05 for done in (much, *others))
    assert block_weights(much.model) <= 0.4 * block_weights(model)


@pytest.mark.parametrize(("count", "held_out"), [(64, 16), (32, 8), (3, 1)])
def test_the_last_windows_take_no_part_in_the_refit(count, held_out, make_model, make_windows):
    model, windows = make_model("llama"), make_windows(count=count, length=12)
    best, _ = pruned(model, windows, 0.3)
    assert best.kl == pytest.approx(kl(model, best.model, Windows(windows.input_ids[-held_out:])), rel=1e-3)
    other = windows.input_ids.clone()
    other[-held_out:] = windows.input_ids[:held_out]
    results = [  # without curvature and with sizes that the target alone fixes, the refit is all that sees windows
        pruned(model, chosen, 0.3, kinds=("ffn",), widths="uniform", method="magnitude")[0]
        for chosen in (windows, Windows(other))
    ]
    assert same(*(tensors(done.model) for done in results))
    assert results[0].kl != results[1].kl


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_only_the_widths_asked_for_are_built(llama, widths):
    model, windows = llama
    best, others = pruned(model, windows, 0.3, widths=widths)
    assert best.widths == widths
    assert others == []
    if widths == "uniform":
        assert len({after for name, (_, after) in best.sizes.items() if name.endswith("mlp")}) == 1
        assert not hasattr(best.model.config, "pruned_shapes")


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.3])
def test_parameters_come_down_to_what_was_asked(family, sparsity, make_model, make_windows):
    model, windows = make_model(family), make_windows(count=24, length=12)
    layers = prunable_layers(model)
    wanted = int((1 - sparsity) * model.num_parameters())
    target = parameters_target(model, layers, wanted)
    best, others = prune_structured(
        model, layers, windows, target, kinds=KINDS[family], settings=Settings(multiple=1, shots=1)
    )
    for done in (best, *others):
        assert sum(p.numel() for p in done.model.parameters()) <= wanted
    assert min(done.model.num_parameters() for done in (best, *others)) > wanted - 0.05 * model.num_parameters()


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_a_model_that_has_no_more_parameters_is_refused(llama, more):
    model, _ = llama
    with pytest.raises(InputError, match=f"--target-params is .* the model has {model.num_parameters():,} parameters"):
        parameters_target(model, prunable_layers(model), model.num_parameters() + more)


@pytest.mark.parametrize("kinds", [("ffn",), ("heads",), BOTH], ids="-".join)
def test_a_target_out_of_reach_names_groups_and_numbers(llama, kinds):
    model, windows = llama
    with pytest.raises(InputError, match=r"save .* weights .* of model\.layers\.0\..* and its kind: .* at most; ask"):
        pruned(model, windows, 0.97, kinds=kinds)


@pytest.mark.parametrize("kinds", [("heads",), BOTH], ids="-".join)
def test_heads_that_cannot_be_told_apart_are_refused(make_model, make_windows, kinds):
    with pytest.raises(InputError, match=r"heads of GPT2LMHeadModel .* use --structured ffn"):
        pruned(make_model("gpt2"), make_windows(), 0.3, kinds=kinds)


def test_ffns_without_all_of_their_layers_are_refused(llama):
    model, windows = llama
    with pytest.raises(InputError, match="no FFN of LlamaForCausalLM"):
        pruned(model, windows, 0.3, ignore=["*.up_proj"])


class TestOneBlockIgnored:
    IGNORE = ("*.layers.1.*",)

    def test_a_uniform_plan_is_impossible(self, llama):
        with pytest.raises(InputError, match=r"no uniform plan.* use --widths per-layer, or include all blocks"):
            pruned(*llama, 0.3, ignore=self.IGNORE, widths="uniform")

    @pytest.mark.parametrize("widths", [None, "per-layer"])
    def test_the_others_are_cut(self, llama, widths):
        model, windows = llama
        best, others = pruned(model, windows, 0.5, ignore=self.IGNORE, widths=widths, refit=False)
        assert best.widths == "per-layer"
        assert others == []
        assert all(name.startswith("model.layers.0.") for name in best.sizes)
        left, had = (sum(w.numel() for w in m.model.layers[0].parameters() if w.ndim == 2) for m in (best.model, model))
        assert left <= 0.5 * had
        for name, tensor in model.state_dict().items():
            if ".layers.0." not in name:
                assert torch.equal(best.model.state_dict()[name], tensor), name


# --- repair


def all_rows(model):
    return {layer.name: torch.arange(layer.shape[0]) for layer in prunable_layers(model)}


class TestRepair:
    def test_a_model_that_lost_nothing_stays_as_it_is(self, model, make_windows):
        twin = copy.deepcopy(model)
        before = tensors(model)
        repair(model, twin, all_rows(model), make_windows(count=12, length=12))
        assert same(tensors(model), before)
        for name, tensor in twin.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-3 * float(before[name].abs().max()))

    def test_only_the_layers_asked_for_change(self, llama):
        model, windows = llama
        twin = copy.deepcopy(model)
        damaged = twin.get_submodule("model.layers.0.mlp.down_proj")
        damaged.weight.data = 0.8 * damaged.weight
        before = tensors(twin)
        name = "model.layers.1.self_attn.o_proj"
        repair(model, twin, {name: all_rows(model)[name]}, windows)
        changed = [key for key, tensor in twin.state_dict().items() if not torch.equal(tensor, before[key])]
        assert changed == [f"{name}.weight"]

    def test_one_damaged_reader_is_the_ridge_solution(self, llama):
        """Everything before it is dense, so its inputs are the dense model's and its target is its dense output."""
        model, windows = llama
        name = "model.layers.0.mlp.up_proj"
        twin, inputs = copy.deepcopy(model), []
        wanted = model.get_submodule(name).weight.detach().double()
        module = twin.get_submodule(name)
        present = 0.5 * module.weight.detach().double() + 0.05
        module.weight.data = present.float()
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, o: inputs.append(a[0].flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=windows.input_ids)
        handle.remove()
        h = inputs[0].double()
        share = 0.1 * float(h.square().mean())  # of the mean diagonal of E[h hᵀ]
        # ridge regression as least squares with one more row per input
        stacked = torch.cat([h / len(h) ** 0.5, share**0.5 * torch.eye(h.shape[1], dtype=torch.float64)])
        targets = torch.cat([h @ wanted.T / len(h) ** 0.5, share**0.5 * present.T])
        expected = torch.linalg.lstsq(stacked, targets).solution.T
        repair(model, twin, {name: all_rows(model)[name]}, windows)
        torch.testing.assert_close(module.weight.detach().double(), expected, rtol=1e-3, atol=1e-4)

    def test_masked_positions_do_not_count(self, make_model, make_windows):
        model = make_model("llama")
        windows = make_windows(count=6, length=12, lengths=(12, 7, 9, 3, 12, 5))
        other = Windows(windows.input_ids.where(windows.attention_mask, torch.tensor(7)), windows.attention_mask)
        results = []
        for chosen in (windows, other):
            twin = copy.deepcopy(model)
            for block in twin.model.layers:
                block.mlp.down_proj.weight.data = 0.7 * block.mlp.down_proj.weight
            repair(model, twin, all_rows(model), chosen, batch_size=2)
            results.append(tensors(twin))
        assert same(*results)

    def test_batches_do_not_matter(self, model, make_windows):
        windows, results = make_windows(count=6, length=12), []
        for batch_size in (1, 4, 6):
            twin = copy.deepcopy(model)
            for layer in prunable_layers(twin)[::3]:
                layer.assign(0.7 * layer.weight)
            repair(model, twin, all_rows(model), windows, batch_size=batch_size)
            results.append(tensors(twin))
        for result in results[1:]:
            for name, tensor in result.items():
                torch.testing.assert_close(tensor, results[0][name], rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


# --- milliseconds


class TestLatencyTable:
    def test_widths_are_interpolated(self):
        table = LatencyTable(((8, 1.0), (16, 3.0), (40, 6.0)), ())
        points = {8: 1, 16: 3, 40: 6, 12: 2, 28: 4.5, 1: 1, 64: 6}
        assert [table.block((n,)) for n in points] == pytest.approx(list(points.values()))

    @pytest.mark.parametrize("plane", [(1.0, 0.25, 0.5), (0.0, 3.0, 0.0), (2.0, 0.0, 0.0)], ids=str)
    def test_heads_lie_on_a_plane(self, plane):
        def ms(groups, per_group):
            return plane[0] + plane[1] * groups * per_group + plane[2] * groups

        timed = tuple((g, q, ms(g, q)) for g in (1, 2, 4) for q in (1, 3))
        table = LatencyTable((), timed)
        for g in range(1, 5):
            for q in range(1, 4):
                assert table.block((g, q)) == pytest.approx(ms(g, q), rel=1e-9, abs=1e-12)

    def test_of_one_query_head_per_group_and_of_one_size(self):
        """Where the two slopes cannot be told apart their sum is what counts."""
        table = LatencyTable((), ((1, 1, 2.0), (2, 1, 3.0), (4, 1, 5.0)))
        assert table.block((3, 1)) == pytest.approx(4.0)
        assert LatencyTable((), ((1, 1, 7.0),)).block((1, 1)) == pytest.approx(7.0)

    def test_the_plane_is_the_least_squares_one(self):
        timed = ((1, 1, 1.0), (1, 2, 2.5), (2, 1, 2.0), (2, 2, 4.0), (3, 1, 2.0), (3, 2, 6.5))
        table = LatencyTable((), timed)
        misfit = [ms - table.block((g, q)) for g, q, ms in timed]
        for direction in ([1] * 6, [g * q for g, q, _ in timed], [g for g, _, _ in timed]):
            assert sum(m * d for m, d in zip(misfit, direction, strict=True)) == pytest.approx(0, abs=1e-9)


class TestCache:
    @pytest.fixture
    def clock(self, monkeypatch, tmp_path):
        """No time is taken: every timing is one more millisecond than the one before. The list of all of them."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        ticks = []

        def count(call, repeats=0):
            call()
            ticks.append(float(len(ticks) + 1))
            return ticks[-1]

        monkeypatch.setattr(latency, "milliseconds", count)
        return ticks

    @staticmethod
    def groups(model, kinds=BOTH):
        return find_groups(model, prunable_layers(model), kinds)

    def test_sizes_that_are_timed(self, make_model, clock):
        model = make_model("llama")
        before = tensors(model)
        table = latency_table(model, self.groups(model), 8)
        assert table.ffn == ((1, 1.0), (10, 2.0), (20, 3.0), (30, 4.0), (40, 5.0))
        assert table.heads == ((1, 1, 6.0), (1, 2, 7.0), (2, 1, 8.0), (2, 2, 9.0))
        assert same(tensors(model), before)

    @pytest.mark.parametrize("model_family", ["gpt2", "opt"])
    def test_ffns_alone(self, make_model, clock, model_family):
        model = make_model(model_family)
        table = latency_table(model, self.groups(model, ("ffn",)), 8)
        assert [n for n, _ in table.ffn] == [1, 10, 20, 30, 40]
        assert table.heads == ()

    def test_nothing_is_timed_twice(self, make_model, clock, tmp_path):
        first = latency_table(make_model("llama"), self.groups(make_model("llama")), 8)
        timed = len(clock)
        again = make_model("llama", seed=5)  # other weights take as long
        assert latency_table(again, self.groups(again), 8) == first
        assert len(clock) == timed
        assert [p.name for p in (tmp_path / "cache" / "kfac_prune").iterdir()] == ["latency.json"]

    @pytest.mark.parametrize("change", ["length", "groups", "dtype", "configuration", "threads"])
    def test_what_changes_the_time_is_timed_anew(self, make_model, clock, change, monkeypatch):
        model = make_model("llama")
        latency_table(model, self.groups(model), 8)
        timed = len(clock)
        if change == "dtype":
            model = make_model("llama", dtype=torch.bfloat16)
        elif change == "configuration":
            model = make_model("opt")
        elif change == "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        kinds = ("ffn",) if change in ("groups", "configuration") else BOTH
        latency_table(model, self.groups(model, kinds), 9 if change == "length" else 8)
        assert len(clock) > timed

    def test_entries_of_others_stay(self, make_model, clock, tmp_path):
        path = tmp_path / "cache" / "kfac_prune" / "latency.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"other": {"ffn": [], "heads": []}}))
        model = make_model("llama")
        latency_table(model, self.groups(model), 8)
        assert len(json.loads(path.read_text())) == 2
        assert json.loads(path.read_text())["other"] == {"ffn": [], "heads": []}

    @pytest.mark.parametrize("content", [b"", b"{", b"\x80\xff", b"[1]", b"null"], ids=repr)
    def test_a_cache_that_cannot_be_read_counts_as_empty(self, make_model, clock, tmp_path, content):
        path = tmp_path / "cache" / "kfac_prune" / "latency.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        model = make_model("llama")
        table = latency_table(model, self.groups(model), 8)
        assert len(clock) == 9
        assert latency_table(model, self.groups(model), 8) == table
        assert len(clock) == 9

    def test_a_cache_that_cannot_be_written_costs_only_time(self, make_model, clock, tmp_path):
        (tmp_path / "cache").write_text("in the way")
        model = make_model("llama")
        latency_table(model, self.groups(model), 8)
        latency_table(model, self.groups(model), 8)
        assert len(clock) == 18
        assert (tmp_path / "cache").read_text() == "in the way"


class TestLatencyTarget:
    TABLE = LatencyTable(((1, 1.0), (40, 4.9)), ((1, 1, 1.0), (1, 2, 2.0), (2, 1, 1.5), (2, 2, 3.5)))

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch):
        """A dense model of 20 ms whose blocks follow the table."""
        monkeypatch.setattr(latency, "latency_table", lambda *args: self.TABLE)
        monkeypatch.setattr(latency, "speeds", lambda models, length: [Speed(20.0, 2.0)] * len(models))

    @pytest.mark.parametrize("wanted", [20.0, 20.5, 1000])
    def test_a_model_that_is_fast_enough_is_refused(self, llama, wanted):
        model, _ = llama
        groups = find_groups(model, prunable_layers(model), BOTH)
        with pytest.raises(InputError, match=r"the dense model takes 20 ms for one window of 8 tokens"):
            latency_target(model, groups, 8, wanted)

    def test_is_the_difference_in_milliseconds(self, llama):
        model, windows = llama
        groups = find_groups(model, prunable_layers(model), ("ffn",))
        target = latency_target(model, groups, 8, 15.0)
        assert target.amount == pytest.approx(5.0)
        assert target.unit == "ms"
        assert target.saved(model) == pytest.approx(0.0)
        assert target.saving(groups[0], Option(torch.arange(10), 0, 0.0)) == pytest.approx(3.0)
        smaller, _ = pruned(model, windows, 0.4, kinds=("ffn",), widths="uniform")
        ((width,),) = {after for _, after in smaller.sizes.values()}
        assert target.saved(smaller.model) == pytest.approx(2 * 0.1 * (40 - width))

    @pytest.mark.parametrize("shots", [1, 2])
    @pytest.mark.parametrize("kinds", [("ffn",), BOTH], ids="-".join)
    def test_plans_reach_it(self, llama, kinds, shots):
        model, windows = llama
        layers = prunable_layers(model)
        target = latency_target(model, find_groups(model, layers, kinds), 8, 15.5)
        best, others = prune_structured(
            model, layers, windows, target, kinds=kinds, settings=Settings(multiple=1, shots=shots)
        )
        for done in (best, *others):
            ms = sum(self.TABLE.block(before) - self.TABLE.block(after) for before, after in done.sizes.values())
            assert ms >= 4.5 * (1 - 1e-9)
            assert target.saved(done.model) == pytest.approx(ms)

    def test_out_of_reach_speaks_of_milliseconds(self, llama):
        model, windows = llama
        layers = prunable_layers(model)
        target = latency_target(model, find_groups(model, layers, BOTH), 8, 1.0)
        with pytest.raises(InputError, match=r"save 19 ms .* of model\.layers\.0.*-latency must be 8\.6 ms"):
            prune_structured(model, layers, windows, target, settings=Settings(multiple=8))
        assert target.limit(11.39999) == "--target-latency must be 8.601 ms at least"  # 8.6 would be too little


def test_the_cheapest_of_the_sizes_that_suffice_is_taken():
    """Measured corrections may make a larger cut cheaper than a smaller one."""
    sizes = [(1.0, 2.5, {"ffn": "small"}), (2.0, 2.0, {"ffn": "large"}), (3.0, 4.0, {"ffn": "largest"})]
    assert plan._cheapest([sizes], 0.5) == {"ffn": "large"}
    heads = [(0.0, 0.0, {"heads": "all"}), (2.5, 1.0, {"heads": "half"})]
    assert plan._cheapest([heads, sizes], 3.0) == {"heads": "half", "ffn": "large"}
