"""Kronecker factors: against direct computations, exactness where theory has it, invariances, failures."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from kfac_prune import offload
from kfac_prune.curvature.capture import FactorCapture, GradientMoments, InputMoments
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curvature.factors import FactorShelf, LayerFactors
from kfac_prune.curvature.spans import _flows
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.fisher import next_token_labels
from kfac_prune.linalg import packed_triangle, unpacked_triangle
from kfac_prune.models import Layer, find_blocks, prunable_layers
from kfac_prune.operators import Damping, Diagonal, Kronecker, ScaledIdentity
from kfac_prune.quality import evaluate

FLOAT32 = 2e-5  # sums of some hundred float32 products behind two layers, relative to the largest entry


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- a direct computation, token by token, without hooks ---------------------------------------------------------


def recompute_in_float64(model, layers):
    """A float64 copy of the model whose layers compute x Wᵀ + b + d; the lists fill with (x, d), d a zero leaf."""
    double, record = copy.deepcopy(model).double(), {layer.name: [] for layer in layers}
    for layer in layers:
        module, seen = double.get_submodule(layer.name), record[layer.name]
        equation = "...i,io->...o" if isinstance(module, Conv1D) else "...i,oi->...o"

        def forward(x, module=module, seen=seen, equation=equation):
            y = torch.einsum(equation, x, module.weight.detach())
            y = y if module.bias is None else y + module.bias.detach()
            seen.append((x.detach(), torch.zeros_like(y, requires_grad=True)))
            return y + seen[-1][1]

        module.forward = forward
    return double.eval(), record


def direct_factors(model, layers, windows, fisher, seed):
    """(A, mean, G) per layer, one unpadded sequence and one token at a time."""
    model, record = recompute_in_float64(model, layers)
    uniforms = torch.rand(windows.input_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = {layer.name: ([], []) for layer in layers}
    for n, row in enumerate(windows.input_ids):
        ids = row if windows.attention_mask is None else row[windows.attention_mask[n]]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = 0 * logits.sum()  # a sequence of one token has no label
        for t, z in enumerate(logits):
            log_p = z - z.logsumexp(0)
            if fisher == "sampled":
                cumulative = log_p.detach().exp().cumsum(0)
                loss = loss - log_p[int((cumulative <= uniforms[n, t]).sum())]
            elif t + 1 < len(ids):
                loss = loss - log_p[ids[t + 1]]
        for layer in layers:
            ((x, d),) = record[layer.name]
            (g,) = torch.autograd.grad(loss, d, retain_graph=True)
            rows[layer.name][0].extend(x.reshape(len(ids), -1))
            rows[layer.name][1].extend(g.reshape(len(ids), -1))
            record[layer.name].clear()

    def second_moment(vectors):
        return sum(torch.outer(v, v) for v in vectors) / len(vectors)

    return {
        name: (second_moment(inputs), sum(inputs) / len(inputs), second_moment(gradients))
        for name, (inputs, gradients) in rows.items()
    }


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("lengths", [(), (9, 3, 1, 7, 2)], ids=["whole", "padded"])
def test_factors_equal_a_direct_computation(near, model, make_windows, fisher, lengths):
    windows = make_windows(lengths=lengths)
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows, fisher=fisher, seed=3, batch_size=2)
    direct = direct_factors(model, layers, windows, fisher, seed=3)
    assert factors.tokens == (sum(lengths) if lengths else 45)
    assert factors.data_sha256 == windows.sha256()
    assert list(factors.layers) == [layer.name for layer in layers]
    for layer in layers:
        found, (a, mean, g) = factors.layers[layer.name], direct[layer.name]
        assert found.tokens == factors.tokens
        assert found.has_bias == (layer.bias is not None)
        near(found.a, a, FLOAT32)
        near(found.mean, mean, FLOAT32)
        near(found.g, g, FLOAT32)


def test_left_padding_gives_what_the_sequences_give_alone(near, make_model, make_windows):
    model = make_model("llama")  # rotary positions are relative
    windows = make_windows(lengths=(9, 3, 1, 7, 2))
    layers = prunable_layers(model)
    flipped = Windows(windows.input_ids.flip(1), windows.attention_mask.flip(1))
    factors = estimate_factors(model, layers, flipped, fisher="empirical", batch_size=5)
    alone = [Windows(ids[mask][None]) for ids, mask in zip(flipped.input_ids, flipped.attention_mask, strict=True)]
    parts = [estimate_factors(model, layers, w, fisher="empirical") for w in alone]
    for name, found in factors.layers.items():
        for field in ("a", "mean", "g"):
            total = sum(getattr(p.layers[name], field).double() * p.tokens for p in parts)
            near(getattr(found, field), total / factors.tokens, FLOAT32)


# --- invariances ------------------------------------------------------------------------------------------------


def assert_same_factors(near, actual, expected, tolerance=FLOAT32):
    assert actual.layers.keys() == expected.layers.keys()
    for name, found in actual.layers.items():
        for field in ("a", "mean", "g"):
            near(getattr(found, field), getattr(expected.layers[name], field), tolerance)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("lengths", [(), (9, 3, 1, 7, 2, 9, 4)], ids=["whole", "padded"])
def test_the_batch_size_does_not_matter(near, model, make_windows, batch_size, lengths):
    windows, layers = make_windows(7, lengths=lengths), prunable_layers(model)
    whole = estimate_factors(model, layers, windows, batch_size=7)
    assert_same_factors(near, estimate_factors(model, layers, windows, batch_size=batch_size), whole)


@pytest.mark.parametrize("lengths", [(), (9, 3, 1, 7, 2)], ids=["whole", "padded"])
def test_groups_of_layers_give_what_all_layers_give_together(near, model, make_windows, lengths):
    windows, layers = make_windows(5, lengths=lengths), prunable_layers(model)
    whole = estimate_factors(model, layers, windows, seed=2)
    most = max(4 * sum(n**2 for n in layer.shape) for layer in layers)  # just fits
    grouped = estimate_factors(model, layers, windows, seed=2, max_memory=most)
    assert isinstance(whole.layers, dict)
    assert isinstance(grouped.layers, FactorShelf)
    assert list(grouped.layers) == list(whole.layers)
    assert_same_factors(near, grouped, whole)
    assert grouped.streams.keys() == whole.streams.keys()
    for name, g in grouped.streams.items():
        assert torch.equal(g, whole.streams[name])
    for layer in layers:
        one, other = grouped.layers[layer.name], whole.layers[layer.name]
        assert (one.tokens, one.has_bias) == (other.tokens, other.has_bias)


@pytest.mark.parametrize("away", [False, True], ids=["resident", "offloaded"])
def test_groups_take_one_whole_pass_and_each_block_twice(near, monkeypatch, make_model, make_windows, away):
    """However many groups there are: the loss is computed once, and later groups run their own blocks alone."""
    model, windows = make_model("llama"), make_windows(4)
    layers = prunable_layers(model)
    if away:
        offload.offload(model, torch.device("cpu"))
        monkeypatch.setattr(offload._Visitor, "_is_away", lambda self: True)
    whole = estimate_factors(model, layers, windows, seed=2)
    blocks, runs, heads = find_blocks(model, layers)[1], Counter(), []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: runs.update([number]))
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads.append(1))
    inside = len(layers) // len(blocks)
    sizes = [4 * sum(n**2 for n in layer.shape) for layer in layers]
    grouped = estimate_factors(model, layers, windows, seed=2, batch_size=2, max_memory=sum(sizes[:inside]))
    assert len(heads) == 2
    assert runs == {0: 2} | dict.fromkeys(range(1, len(blocks)), 4)
    assert_same_factors(near, grouped, whole)


def test_what_gradients_flow_to_is_found_within_arguments():
    x = torch.ones(2, requires_grad=True)
    for argument in (x, (None, x), {"full": (x, 1)}, [{"full": x}]):
        assert _flows(argument)
    for argument in (None, "full", x.detach(), (1, x.detach()), {"full": (x.detach(),)}):
        assert not _flows(argument)


def test_layers_outside_all_blocks_take_whole_passes(make_model, make_windows):
    model, windows = make_model("opt"), make_windows(4)
    layers = prunable_layers(model)
    layers.append(Layer("a name of no block", layers[-1].module))
    whole = estimate_factors(model, layers, windows, seed=2)
    most = max(4 * sum(n**2 for n in layer.shape) for layer in layers)
    grouped = estimate_factors(model, layers, windows, seed=2, max_memory=most)
    assert torch.equal(grouped.layers[layers[-1].name].g, whole.layers[layers[-1].name].g)


def test_a_layer_that_does_not_fit_is_refused_before_any_pass(make_model, make_windows):
    model = make_model("llama")
    layers = prunable_layers(model)
    model.forward = None
    with pytest.raises(InputError, match=r"^layer model\.layers\.0\.self_attn\.q_proj: its factors, .* --max-memory"):
        estimate_factors(model, layers, make_windows(), max_memory=100)


def test_layers_that_read_one_tensor_share_one_matrix(make_model, make_windows):
    model = make_model("llama")
    factors = estimate_factors(model, prunable_layers(model), make_windows())
    q, k, o = (factors.layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q.a is k.a
    assert q.a is not o.a


class TestShelf:
    def factors(self, a, seed=0, width=3):
        g = randn(width, width, seed=seed, dtype=torch.float32)
        return LayerFactors(a, a[0].clone(), g + g.T, tokens=7, has_bias=True)

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_gives_back_what_it_got(self, on_disk):
        shelf = FactorShelf(torch.device("cpu"), on_disk=on_disk)
        first, second = (self.factors(torch.eye(n), seed=n, width=n + 1) for n in (4, 1))
        shelf["first"], shelf["second"] = first, second
        for name, want in (("first", first), ("second", second), ("first", first)):
            for field in ("a", "mean", "g"):
                assert torch.equal(getattr(shelf[name], field), getattr(want, field))
        shelf["first"] = second
        assert torch.equal(shelf["first"].g, second.g)
        del shelf["first"]
        assert list(shelf) == ["second"]
        assert len(shelf) == 1
        with pytest.raises(KeyError):
            shelf["first"]

    def test_a_shared_matrix_waits_once(self):
        shelf, a = FactorShelf(torch.device("cpu"), on_disk=False), torch.eye(5)
        shelf.update({"q": self.factors(a), "k": self.factors(a, seed=1), "o": self.factors(a.clone())})
        assert shelf._waiting["q"].a is shelf._waiting["k"].a
        assert shelf._waiting["q"].a is not shelf._waiting["o"].a
        assert shelf._waiting["q"].a.numel() == 15

    def test_a_copy_changes_by_itself_and_takes_no_memory(self):
        shelf = FactorShelf(torch.device("cpu"), on_disk=False)
        first, second = self.factors(torch.eye(4)), self.factors(2 * torch.eye(4), seed=1)
        shelf["q"] = first
        other = copy.copy(shelf)
        assert other._waiting["q"].a is shelf._waiting["q"].a
        other["q"] = second
        assert torch.equal(shelf["q"].a, first.a)
        assert torch.equal(other["q"].a, second.a)

    def test_a_layer_asked_for_again_is_not_unpacked_again(self):
        shelf = FactorShelf(torch.device("cpu"), on_disk=False)
        shelf["q"] = self.factors(torch.eye(2))
        assert shelf["q"] is shelf["q"]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_a_packed_triangle_holds_a_symmetric_matrix(size):
    matrix = randn(size, size)
    matrix = matrix + matrix.T
    packed = packed_triangle(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(unpacked_triangle(packed), matrix)
    assert_close(packed.sort().values, matrix[torch.tril_indices(size, size).unbind()].sort().values, rtol=0, atol=0)


def test_the_order_of_the_windows_does_not_matter(near, model, make_windows):
    windows, layers = make_windows(7, lengths=(9, 3, 1, 7, 2, 9, 4)), prunable_layers(model)
    order = torch.tensor([4, 0, 6, 2, 5, 3, 1])
    other = Windows(windows.input_ids[order], windows.attention_mask[order])
    first, second = (estimate_factors(model, layers, w, fisher="empirical", batch_size=3) for w in (windows, other))
    assert first.data_sha256 != second.data_sha256
    assert_same_factors(near, second, first)


def test_the_seed_decides_the_labels_and_nothing_else(make_model, make_windows):
    model, windows = make_model("llama"), make_windows()
    layers = prunable_layers(model)
    torch.manual_seed(11)
    first = estimate_factors(model, layers, windows, seed=5)
    torch.manual_seed(12)
    same, other = estimate_factors(model, layers, windows, seed=5), estimate_factors(model, layers, windows, seed=6)
    for name, found in first.layers.items():
        for field in ("a", "mean", "g"):
            assert torch.equal(getattr(found, field), getattr(same.layers[name], field))
        assert torch.equal(found.a, other.layers[name].a)
        assert not torch.equal(found.g, other.layers[name].g)


def test_the_callers_random_state_is_left_alone(make_model, make_windows):
    model = make_model("gpt2")
    before = torch.get_rng_state()
    estimate_factors(model, prunable_layers(model), make_windows())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bfloat16_model_accumulates_in_float32(model, make_windows):
    layers, windows = prunable_layers(model), make_windows()
    exact = estimate_factors(model, layers, windows, fisher="empirical")
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16()
    low = estimate_factors(model, layers, windows, fisher="empirical")
    for name, found in low.layers.items():
        for field in ("a", "mean", "g"):
            value, reference = getattr(found, field), getattr(exact.layers[name], field)
            assert value.dtype == torch.float32
            assert (value - reference).norm() < 0.25 * reference.norm(), (name, field)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_do_not_saturate(dtype):
    inputs = InputMoments(torch.zeros(2, 2), torch.zeros(2))
    gradients = GradientMoments(torch.zeros(2, 2))
    rows = torch.tensor([[1.0, 0.5]], dtype=dtype).expand(3, 2)
    for _ in range(1500):  # a sum of ones stops growing at 256 in bfloat16, at 2048 in float16
        inputs.add(rows)
        gradients.add(rows)
    assert inputs.tokens == gradients.tokens == 4500
    assert inputs.first.tolist() == [4500, 2250]
    assert inputs.second.tolist() == gradients.second.tolist() == [[4500, 2250], [2250, 1125]]


# --- what is left behind ----------------------------------------------------------------------------------------


def state_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": [[list(getattr(module, name)) for name in names] for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "weights": [parameter.data_ptr() for parameter in model.parameters()],
    }


def unusual_state(model):
    """Training mode but for one module, and every third parameter frozen."""
    model.train()
    prunable_layers(model)[0].module.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    return state_of(model)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "mixed-modes"])
def test_the_model_is_left_as_it_was(model, make_windows, training):
    before = unusual_state(model) if training else state_of(model)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    estimate_factors(model, prunable_layers(model), make_windows(), batch_size=2)
    assert state_of(model) == before
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_dropout_is_off(make_model, make_windows):
    model, windows = make_model("gpt2"), make_windows()
    layers = prunable_layers(model)
    assert model.config.resid_pdrop > 0
    quiet = estimate_factors(model, layers, windows)
    noisy = estimate_factors(model.train(), layers, windows)
    for name, found in quiet.layers.items():
        assert torch.equal(found.g, noisy.layers[name].g)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failure_in_the_loop_leaves_no_trace(monkeypatch, model, make_windows, failing_call):
    forward, calls = type(model).forward, Counter()

    def fails(self, *args, **kwargs):
        calls["forward"] += 1
        if calls["forward"] == failing_call:
            raise ArithmeticError("on purpose")
        return forward(self, *args, **kwargs)

    before = unusual_state(model)
    monkeypatch.setattr(type(model), "forward", fails)
    with pytest.raises(ArithmeticError, match="on purpose"):
        estimate_factors(model, prunable_layers(model), make_windows(), batch_size=2)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inference_mode_and_no_grad_around_the_call_do_not_matter(make_model, make_windows):
    model, windows = make_model("opt"), make_windows()
    layers = prunable_layers(model)
    expected = estimate_factors(model, layers, windows)
    with torch.no_grad():
        found = estimate_factors(model, layers, windows)
    for name in expected.layers:
        assert torch.equal(found.layers[name].g, expected.layers[name].g)


# --- sharing of A -----------------------------------------------------------------------------------------------

GROUPS = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "opt": [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)],
}


def test_layers_that_read_one_tensor_share_its_moments(family, model, make_windows):
    layers, windows = prunable_layers(model), make_windows()
    with FactorCapture(layers).hooked() as capture:
        for batch in windows.batches(2):
            model(input_ids=batch.input_ids).logits.sum().backward()
    shared = {}
    for layer in layers:
        shared.setdefault(id(capture.inputs[layer.name]), set()).add(layer.name)
        assert capture.inputs[layer.name].tokens == 45
        assert capture.gradients[layer.name].tokens == 45
        assert capture.gradients[layer.name].second.shape == (layer.shape[0],) * 2
    expected = {
        frozenset(layer.name for layer in layers if block in layer.name and layer.name.endswith(group))
        for block in (".0.", ".1.")
        for group in GROUPS[family]
    }
    assert {frozenset(names) for names in shared.values()} == expected


class Readers(nn.Module):
    """Two linear layers that read what ``second_view`` makes of one tensor."""

    def __init__(self, second_view):
        super().__init__()
        self.first, self.second, self.second_view = nn.Linear(4, 3), nn.Linear(4, 2), second_view

    def forward(self, x):
        return self.first(x).sum() + self.second(self.second_view(x)).sum()


@pytest.mark.parametrize(
    ("view", "shared"), [(lambda x: x, True), (torch.clone, False), (lambda x: 2 * x, False)], ids="xcd"
)
def test_equal_values_in_different_tensors_are_not_shared(near, view, shared):
    net, x = Readers(view), randn(5, 4, dtype=torch.float32)
    with FactorCapture([Layer("first", net.first), Layer("second", net.second)]).hooked() as capture:
        for _ in range(3):
            net(x.clone()).backward()
    first, second = capture.inputs["first"], capture.inputs["second"]
    assert (first is second) == shared
    assert first.tokens == second.tokens == 15
    near(first.second, 3 * x.T @ x, FLOAT32)
    near(second.second, 3 * view(x).T @ view(x), FLOAT32)


def test_readers_that_part_ways_are_an_error():
    net = Readers(lambda x: x)
    with FactorCapture([Layer("first", net.first), Layer("second", net.second)]).hooked():
        net(randn(5, 4, dtype=torch.float32))
        net.second_view = torch.clone
        with pytest.raises(RuntimeError, match="second read the same tensor as first"):
            net(randn(5, 4, dtype=torch.float32))


def test_a_layer_used_twice_counts_both_uses(near):
    layer = nn.Linear(4, 4, bias=False).double()
    x = randn(5, 4)
    with FactorCapture([Layer("twice", layer)]).hooked() as capture:
        y = layer(x)
        (3 * layer(y)).sum().backward()
    both = torch.cat([x, y.detach()])
    outer = torch.cat([3 * layer.weight.sum(0).expand(5, 4), torch.full((5, 4), 3.0)]).detach()
    assert capture.inputs["twice"].tokens == capture.gradients["twice"].tokens == 10
    near(capture.inputs["twice"].second, both.T @ both, FLOAT32)
    near(capture.gradients["twice"].second, outer.T @ outer, FLOAT32)


def test_the_fisher_of_a_layer_used_twice_is_the_sum_over_its_uses(near, make_model, make_windows):
    """Of one block in two places, beside two equal blocks in these places: the same function of the text."""
    model, windows = make_model("llama"), make_windows(lengths=(9, 3, 1, 7, 2))
    blocks = model.model.layers
    blocks[1] = copy.deepcopy(blocks[0])
    apart = estimate_factors(model, prunable_layers(model), windows)
    blocks[1] = blocks[0]
    shared = estimate_factors(model, prunable_layers(model), windows)
    assert len(shared.layers) == len(apart.layers) // 2
    for name, found in shared.layers.items():
        first, second = (apart.layers[name.replace(".0.", f".{i}.")] for i in range(2))
        near(found.g, first.g + second.g, FLOAT32)
        near(found.a, (first.a + second.a) / 2, FLOAT32)


# --- failures that name the layer -------------------------------------------------------------------------------


def test_a_layer_that_is_never_called_is_named(model, make_windows):
    model.spare = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"layer spare took no part.*--ignore 'spare'"):
        estimate_factors(model, prunable_layers(model), make_windows())


def test_a_layer_whose_output_is_not_used_is_named(make_model, make_windows):
    model = make_model("opt")
    fc2 = model.get_submodule("model.decoder.layers.1.fc2")
    model.spare = nn.Linear(fc2.in_features, 3)
    fc2.register_forward_hook(lambda module, args, output: (model.spare(args[0]), output)[1])
    with pytest.raises(InputError, match="layer spare took no part"):
        estimate_factors(model, prunable_layers(model), make_windows())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_activations_that_are_not_finite_name_the_layer(make_model, make_windows, value):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[2] = value
    layers = prunable_layers(model, include=["*.1.self_attn.k_proj"])
    with pytest.raises(InputError, match=r"layer model\.layers\.1\.self_attn\.k_proj: its inputs hold NaN or infinity"):
        estimate_factors(model, layers, make_windows())


def test_gradients_that_are_not_finite_name_the_layer(make_model, make_windows):
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[2] = math.nan
    with pytest.raises(InputError, match=r"layer model\.layers\.0\.self_attn\.q_proj: its output gradients hold NaN"):
        estimate_factors(model, prunable_layers(model), make_windows())


def test_windows_that_are_all_padding_are_refused(make_model, make_windows):
    model, windows = make_model("llama"), make_windows(2, 5)
    empty = Windows(windows.input_ids, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="no token"):
        estimate_factors(model, prunable_layers(model), empty)


def test_rows_that_do_not_fit_the_mask_are_an_error():
    layer = nn.Linear(4, 3)
    with FactorCapture([Layer("odd", layer)]).hooked() as capture:
        capture.token_mask = torch.tensor([[True, True, False]])
        with pytest.raises(InputError, match="layer odd sees 2 rows where the batch has 3 positions"):
            layer(torch.ones(1, 2, 4))


def test_detached_activations_are_an_error():
    layer = nn.Linear(4, 3).requires_grad_(False)
    with FactorCapture([Layer("cut", layer)]).hooked(), pytest.raises(InputError, match="layer cut: no gradient"):
        layer(torch.ones(2, 4))


# --- exactness of K-FAC (Martens & Grosse 2015) -----------------------------------------------------------------


def captured(net, x, cotangents):
    """K-FAC's (A, G) of every linear layer as sums: over rows of x, and over rows and cotangents."""
    layers = [Layer(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    with FactorCapture(layers).hooked() as capture:
        output = net(x)
        for cotangent in cotangents:
            output.backward(cotangent, retain_graph=True)
    assert all(moments.tokens == x[..., 0].numel() for moments in capture.inputs.values())
    return {layer.name: (capture.inputs[layer.name].second, capture.gradients[layer.name].second) for layer in layers}


def gauss_newton(net, x, name, output_hessian):
    """Σ over rows of x of Jᵀ H J for the weight of one layer: [out*in, out*in]; output_hessian maps z to H."""
    key = f"{name}.weight"
    weight = net.get_parameter(key).detach()
    total = weight.new_zeros(weight.numel(), weight.numel())
    for row in x.reshape(-1, x.shape[-1]):
        jacobian = jacrev(lambda w, row=row: functional_call(net, {key: w}, (row,)))(weight).flatten(1)
        total += (jacobian.T @ output_hessian(net(row).detach()) @ jacobian).detach()
    return total


def softmax_hessian(z):
    p = z.softmax(0)
    return p.diag() - torch.outer(p, p)


def softmax_cotangents(z):
    """√p_y (p − e_y) for every label y: their outer products sum to the exact expectation over labels."""
    p = z.detach().softmax(-1)
    return [p[..., y : y + 1].sqrt() * (p - F.one_hot(torch.tensor(y), p.shape[-1])) for y in range(p.shape[-1])]


def small_net(*sizes, activation=None, bias=False):
    torch.manual_seed(0)
    steps = []
    for a, b in itertools.pairwise(sizes):
        steps += [nn.Linear(a, b, bias=bias, dtype=torch.float64)] + ([activation()] if activation else [])
    return nn.Sequential(*(steps[:-1] if activation else steps))


@pytest.mark.parametrize("sizes", [(3, 5), (1, 2), (7, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_kfac_is_exact_for_one_softmax_layer_and_one_datum(near, sizes, bias):
    net, x = small_net(*sizes, bias=bias), randn(1, sizes[0])
    ((a, g),) = captured(net, x, softmax_cotangents(net(x))).values()
    near(torch.kron(g, a), gauss_newton(net, x, "0", softmax_hessian), FLOAT32)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU], ids=["tanh", "silu"])
def test_kfac_is_exact_for_one_datum_in_any_layer(near, activation):
    net, x = small_net(4, 5, 3, 6, activation=activation, bias=True), randn(1, 4)
    for name, (a, g) in captured(net, x, softmax_cotangents(net(x))).items():
        near(torch.kron(g, a), gauss_newton(net, x, name, softmax_hessian), FLOAT32)


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 4)], ids=["rows", "sequences"])
def test_kfac_is_exact_for_deep_linear_networks_with_squared_loss(near, shape):
    net, x = small_net(4, 5, 3, 6), randn(*shape)
    tokens, outputs = x[..., 0].numel(), 6
    cotangents = [F.one_hot(torch.tensor(k), outputs).double().expand(*shape[:-1], outputs) for k in range(outputs)]
    for name, (a, g) in captured(net, x, cotangents).items():
        exact = gauss_newton(net, x, name, lambda z: torch.eye(outputs, dtype=z.dtype))
        near(torch.kron(g / tokens, a / tokens), exact / tokens, FLOAT32)


def test_kfac_is_not_exact_for_several_data_and_a_softmax(near):
    net, x = small_net(3, 5), 2 * randn(6, 3)
    ((a, g),) = captured(net, x, softmax_cotangents(net(x))).values()
    kfac, exact = torch.kron(g / 6, a / 6).double(), gauss_newton(net, x, "0", softmax_hessian) / 6
    assert (kfac - exact).norm() > 0.05 * exact.norm()
    near(a / 6, x.T @ x / 6, FLOAT32)


# --- against an independent library -----------------------------------------------------------------------------


class ClassesSecond(nn.Module):
    """Logits as [B, vocabulary, T], as torch's cross entropy wants them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits.transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)  # the library knows no Conv1D
@pytest.mark.parametrize("batch_size", [2, 6])
def test_factors_equal_those_of_curvlinops(near, family, model, make_windows, batch_size):
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops, the independent oracle, is not installed")
    windows, layers = make_windows(6), prunable_layers(model)
    ours = estimate_factors(model, layers, windows, fisher="empirical")
    labels, has_label = next_token_labels(windows.input_ids, None)
    data = list(zip(windows.input_ids.split(batch_size), labels.where(has_label, -100).split(batch_size), strict=True))
    operator = curvlinops.KFACLinearOperator(
        ClassesSecond(model),
        nn.CrossEntropyLoss(reduction="sum"),
        [layer.module.weight for layer in layers],
        data,
        check_deterministic=False,
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        kfac_approx=curvlinops.KFACType.EXPAND,
    )
    operator.compute_kronecker_factors()
    assert operator._input_covariances.keys() == {f"model.{layer.name}" for layer in layers}
    for layer in layers:
        found, name = ours.layers[layer.name], f"model.{layer.name}"
        flat = family == "opt" and ".fc" in name  # reads [B*T, in], so the library takes its tokens for data
        near(found.a * (windows.input_ids.shape[1] if flat else 1), operator._input_covariances[name], FLOAT32)
        near(found.g * windows.tokens, operator._gradient_covariances[name], FLOAT32)


# --- the prediction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("opt", "model.decoder.layers.1.fc2"),
    ],
    indirect=["family"],
    ids=["llama", "gpt2", "opt"],
)
def test_the_quadratic_form_predicts_the_kl_in_nats_per_token(make_model, make_windows, family, name):
    model, dense, windows = make_model(family), make_model(family), make_windows(96, 16)
    layers = prunable_layers(model, include=[name])
    samples = [estimate_factors(model, layers, windows, seed=seed, batch_size=96).layers[name] for seed in range(4)]
    a, g = samples[0].a.double(), sum(sample.g.double() for sample in samples) / len(samples)
    change = 0.01 * randn(*layers[0].shape, seed=1)
    predicted = 0.5 * float((change * (g @ change @ a)).sum())
    layers[0].assign(layers[0].weight + change)
    measured = evaluate(model, windows, dense=dense, batch_size=96).kl
    assert 1e-4 < measured < 0.1  # small, and well above rounding
    assert 1 / 1.35 < predicted / measured < 1.35


# --- from factors to operators ----------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def factors(request):
    x, gradients = randn(50, 4, seed=1) + 2, randn(50, 3, seed=2)
    return LayerFactors(x.T @ x / 50, x.mean(0), gradients.T @ gradients / 50, tokens=50, has_bias=request.param)


def test_the_hierarchy_of_operators(near, factors):
    centred = factors.a - factors.has_bias * factors.mean[:, None] * factors.mean[None, :]
    damping = Damping(0.1)

    def damped(x):
        return x + 0.1 * x.trace() / len(x) * torch.eye(len(x), dtype=x.dtype)

    def operator(method):
        return factors.operator(method, damping, where="here", dtype=torch.float64)

    (identity, no_records), (diagonal, _) = operator("magnitude"), operator("obd")
    (layerwise, records), (kfac, both) = operator("layerwise"), operator("kfac")
    assert isinstance(identity, ScaledIdentity)
    assert isinstance(diagonal, Diagonal)
    assert isinstance(kfac, Kronecker)
    assert [len(no_records), len(records), len(both)] == [0, 1, 2]
    near(identity.to_dense(), torch.eye(12), 1e-12)
    near(diagonal.to_dense(), torch.kron(factors.g, factors.a).diagonal().diag(), 1e-12)
    near(layerwise.to_dense(), torch.kron(torch.eye(3, dtype=torch.float64), damped(centred)), 1e-12)
    near(kfac.to_dense(), torch.kron(damped(factors.g), damped(centred)), 1e-12)
    for found in (identity, diagonal, layerwise, kfac):
        assert found.shape == (3, 4)


def test_the_bias_is_eliminated_exactly(near, factors):
    """½⟨[D d], G [D d] Ã⟩ with Ã of the inputs and a one equals the centred quadratic plus bias_loss."""
    change, shift = randn(3, 4, seed=3), randn(3, seed=4)
    if not factors.has_bias:
        assert factors.bias_loss(change, shift) == 0
        return
    a = torch.cat([factors.a, factors.mean[None]])
    a = torch.cat([a, torch.cat([factors.mean, torch.ones(1)])[:, None]], 1)

    def augmented(d):
        whole = torch.cat([change, d[:, None]], 1)
        return 0.5 * torch.einsum("oi,op,pj,ij->", whole, factors.g, whole, a)

    centred = factors.a - torch.outer(factors.mean, factors.mean)
    quadratic = 0.5 * torch.einsum("oi,op,pj,ij->", change, factors.g, change, centred)
    near(quadratic + factors.bias_loss(change, shift), augmented(shift), 1e-12)
    best = factors.bias_update(change)
    near(augmented(best), quadratic, 1e-12)
    assert factors.bias_loss(change, best) == 0
    for direction in randn(5, 3, seed=5):
        assert augmented(best + 0.1 * direction) > augmented(best)
