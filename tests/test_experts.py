"""Experts as linear layers: the same function and checkpoint, their curvature, few tokens or none, whole runs."""

import copy
import dataclasses
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from families import GROUPED, Family, random_model
from letters import LETTERS, letter_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    HunYuanMoEV1Config,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kfac_prune import pipeline
from kfac_prune.cli import main
from kfac_prune.curvature import estimate
from kfac_prune.curvature.estimate import draw_all, estimate_factors, participants
from kfac_prune.curvature.few_tokens import intensity, shrink_
from kfac_prune.data import Windows
from kfac_prune.experts import ExpertLinear, routers, split_experts, whole_experts
from kfac_prune.export import save_model, verify_saved
from kfac_prune.inspect_model import describe
from kfac_prune.loading import load
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.objective import CAUSAL
from kfac_prune.obs import NM
from kfac_prune.operators import Damping, quadratic_loss
from kfac_prune.plan import experts_told, make_plan, prune
from kfac_prune.quality import evaluate
from kfac_prune.refitting import dense_pass
from kfac_prune.shots import correct
from kfac_prune.stream import BlockStack

FLOAT32 = 5e-5
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def family(config, **options):
    return Family(lambda **more: config(**{**GROUPED, **options, **more}), "", {}, ())


MODELS = {
    "mixtral": family(MixtralConfig, **LOCAL),
    "qwen2_moe": family(Qwen2MoeConfig, **QWEN, shared_expert_intermediate_size=24),
    "qwen3_moe": family(Qwen3MoeConfig, **QWEN),
    "phimoe": family(PhimoeConfig, **LOCAL),
    "hunyuan": family(HunYuanMoEV1Config, num_experts=4, moe_topk=2),
}


@pytest.fixture(params=["mixtral", "qwen2_moe", "qwen3_moe"])
def model(request):
    return random_model(MODELS[request.param])


def text(count=8, length=10, seed=0):
    return Windows(torch.randint(3, 48, (count, length), generator=torch.Generator().manual_seed(seed)))


def logits(model, windows=None):
    with torch.no_grad():
        return model(input_ids=(windows or text()).input_ids, use_cache=False).logits


def experts_of(layers):
    return [layer for layer in layers if isinstance(layer.module, ExpertLinear)]


# --- the split


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name, dtype):
    model = random_model(MODELS[name], dtype)
    if dtype == torch.float64:  # transformers' other implementations know no double
        model.set_experts_implementation("eager")
    before, parameters = logits(model), model.num_parameters()
    assert len(split_experts(model)) == 2
    assert not any(p.ndim > 2 for p in model.parameters())
    assert model.num_parameters() == parameters
    torch.testing.assert_close(logits(model), before)
    assert split_experts(model) == []


def test_the_layers_are_views_in_the_order_of_the_parameters(model):
    whole = dict(model.named_parameters())
    stacks = {name: p for name, p in whole.items() if p.ndim == 3}
    split_experts(model)
    layers = {layer.name: layer for layer in experts_of(prunable_layers(model))}
    assert len(layers) == 2 * 2 * 4
    for name, stack in stacks.items():
        module, matrix = name.rsplit(".", 1)
        for number in range(4):
            weight = layers[f"{module}.{number}.{matrix}"].weight
            assert weight.data_ptr() == stack[number].data_ptr()
            assert weight.shape == stack[number].shape


def test_whole_again(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split_experts(model)
    layers = prunable_layers(model)
    dense = WeightSwap(layers)
    changed = experts_of(layers)[3]
    changed.assign(torch.zeros_like(changed.weight))
    module, number, matrix = changed.name.rsplit(".", 2)
    with whole_experts(model):
        state = model.state_dict()
        assert list(state) == list(before)
        assert not state[f"{module}.{matrix}"][int(number)].any()
    assert not changed.weight.any()
    assert model.get_submodule(changed.name) is changed.module
    dense.restore()
    with whole_experts(model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_copy_runs_its_own_experts(model):
    split_experts(model)
    before, twin = logits(model), copy.deepcopy(model)
    for layer in experts_of(prunable_layers(twin)):
        layer.assign(torch.zeros_like(layer.weight))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


@pytest.mark.parametrize("name", ["phimoe", "hunyuan", "qwen2_moe"])
def test_routers_that_are_linear_layers_stay_dense(name):
    model = random_model(MODELS[name])
    for _ in range(2):
        assert len(routers(model)) == 2
        assert not {id(layer.module) for layer in prunable_layers(model)} & {id(module) for module in routers(model)}
        split_experts(model)


def test_experts_of_another_form_stay_as_they_are(caplog):
    """GPT-OSS has biases, and gate and up interleaved."""
    model = random_model(family(GptOssConfig, **LOCAL))
    assert split_experts(model) == []
    model = random_model(MODELS["mixtral"])
    model.model.layers[1].mlp.experts._apply_gate = lambda x: x.chunk(2, dim=-1)[1]  # not what its class computes
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    before = logits(model)
    assert split_experts(model) == ["model.layers.0.mlp.experts"]
    assert "model.layers.1.mlp.experts" in caplog.text
    torch.testing.assert_close(logits(model), before)


def test_saved_and_loaded_as_any_other(model, tmp_path):
    split_experts(model)
    layers = experts_of(prunable_layers(model))
    with torch.no_grad():
        for layer in layers:
            layer.assign(layer.weight * (layer.weight.abs() > 0.2))
    save_model(model, None, tmp_path)
    verify_saved(model, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_inspect_counts_them(model, tmp_path):
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    said = describe(str(tmp_path))
    split_experts(model)
    assert all(f"\n{layer.name} " in said for layer in experts_of(prunable_layers(model)))
    assert "\nmodel.layers.1.mlp.experts " in said
    assert "three or more dimensions" not in said


# --- curvature


@pytest.fixture
def plain(monkeypatch):
    """Factors as they are, not shrunk."""
    monkeypatch.setattr(estimate, "shrink_", lambda second, count: 0.0)


def seen_by_the_interface(model, windows, seed, objective=CAUSAL):
    """Per block and expert, (x, d) of both matrices token by token, d a zero leaf: by transformers' own interface."""
    model = copy.deepcopy(model).double()
    seen, names = {}, {id(module): name for name, module in model.named_modules()}

    def forward(module, hidden, index, weights):
        rows = []
        for x, chosen, ws in zip(hidden, index.tolist(), weights, strict=True):
            y = 0 * x
            for number, w in zip(chosen, ws, strict=True):
                record = seen.setdefault(f"{names[id(module)]}.{number}", ([], []))
                up, down = module.gate_up_proj[number], module.down_proj[number]
                d = torch.zeros(len(up), dtype=x.dtype, requires_grad=True), torch.zeros_like(x, requires_grad=True)
                gate, value = (up @ x + d[0]).chunk(2)
                inner = module.act_fn(gate) * value
                y = y + w * (down @ inner + d[1])
                for side, a, leaf in zip(record, (x, inner), d, strict=True):
                    side.append((a.detach(), leaf))
            rows.append(y)
        return torch.stack(rows)

    ALL_EXPERTS_FUNCTIONS.register("one-by-one", forward)
    model.set_experts_implementation("one-by-one")
    mask = windows.attention_mask
    output = objective.output(model, windows.input_ids, mask)
    draws = draw_all(model, windows, objective, seed)[0]
    output.backward(objective.cotangent(output, draws, windows.input_ids, mask, "sampled"))
    return seen


@pytest.mark.parametrize("lengths", [None, (10, 4, 7, 10, 2, 9, 10, 5)], ids=["whole", "padded"])
def test_factors_are_those_of_the_tokens_that_each_expert_sees(model, plain, near, lengths):
    windows = text()
    if lengths:
        windows = Windows(windows.input_ids, torch.arange(10) < torch.tensor(lengths).unsqueeze(1))
    seen = seen_by_the_interface(model, windows, seed=3)
    split_experts(model)
    layers = experts_of(prunable_layers(model))
    factors = estimate_factors(model, layers, windows, seed=3, batch_size=3).layers
    for layer in layers:
        name, matrix = layer.name.rsplit(".", 1)
        pairs = seen[name][matrix == "down_proj"]
        found = factors[layer.name]
        if lengths is None:
            assert found.tokens == found.few.tokens == len(pairs)
            assert found.few.share == len(pairs) / windows.tokens
            near(found.a, torch.stack([torch.outer(a, a) for a, _ in pairs]).mean(0), FLOAT32)
        else:
            assert found.tokens <= len(pairs)  # an expert may be sent no padding
        g = torch.stack([d.grad for _, d in pairs])  # zero on padding
        near(found.g, g.T @ g / windows.tokens, FLOAT32)  # per token of the text
    assert sum(one.tokens for one in factors.values()) == 2 * 2 * 2 * windows.tokens  # blocks, matrices, experts each


def test_predicted_is_measured_loss(plain):
    """Of small changes: an expert that sees a fourth of the tokens costs a fourth of what its own tokens lose.

    In the last block: a change before a router sends some tokens elsewhere, which is no quadratic.
    """
    torch.manual_seed(0)
    model = random_model(MODELS["mixtral"])
    windows = text(64, 16)
    split_experts(model)
    layers = [layer for layer in experts_of(prunable_layers(model)) if ".layers.1." in layer.name]
    factors = estimate_factors(model, layers, windows).layers
    model.double()
    predicted = measured = 0.0
    for layer in layers:
        dense = WeightSwap([layer])
        change = 2e-2 * torch.randn_like(layer.weight)
        h, _ = factors[layer.name].operator("kfac", Damping(1e-6), where="", dtype=torch.float64)
        predicted += quadratic_loss(h, change)
        layer.assign(layer.weight + change)
        measured += evaluate(model, windows, dense=dense.swapped_in, batch_size=64).kl
        dense.restore()
    assert predicted == pytest.approx(measured, rel=0.2)


def test_experts_need_not_be_in_the_first_window(model):
    split_experts(model)
    one = Windows(text().input_ids[:1, :1])
    layers = prunable_layers(model)
    assert participants(model, layers, one, CAUSAL) == layers


# --- few tokens


@pytest.mark.parametrize("tokens", [3, 10, 100, 1000])
def test_shrinkage_lowers_the_error(tokens):
    """Against the truth it is better than the sample and nearly as good as the best multiple of the identity."""
    generator = torch.Generator().manual_seed(tokens)
    n, repeats = 20, 60
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    truth = basis @ torch.diag(torch.logspace(-1.5, 1.5, n)) @ basis.T
    root = torch.linalg.cholesky(truth)
    errors = torch.zeros(repeats, 2 + 21)
    for i in range(repeats):
        x = torch.randn(tokens, n, generator=generator) @ root.T
        sample = x.T @ x / tokens
        found = sample.clone()
        rho = shrink_(found, tokens)
        assert 0 < rho <= 1
        assert found.trace() == pytest.approx(float(sample.trace()), rel=1e-5)
        target = sample.trace() / n * torch.eye(n)
        fixed = [(1 - r) * sample + r * target for r in torch.linspace(0, 1, 21)]
        errors[i] = torch.stack([(s - truth).square().sum() for s in (found, sample, *fixed)])
    ours, sample, *fixed = errors.mean(0).tolist()
    assert ours < sample
    assert ours < 1.25 * min(fixed)


def test_shrinkage_vanishes_with_many_tokens_and_is_whole_for_one():
    s = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.1]))
    rhos = [intensity(s, n) for n in (1, 10, 100, 10_000, 1_000_000)]
    assert rhos == sorted(rhos, reverse=True)
    assert rhos[-1] < 1e-5
    assert intensity(torch.outer(s[0], s[0]), 1) == 1
    assert intensity(3 * torch.eye(4), 50) == 1
    assert [intensity(s * unit, 10) for unit in (1e-30, 1e30)] == pytest.approx([rhos[1]] * 2)
    assert torch.equal(s, torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.1])))  # left as it is


def test_few_tokens_are_shrunk_and_told(model):
    split_experts(model)
    layers = prunable_layers(model)
    few, many = (estimate_factors(model, layers, text(n)).layers for n in (4, 32))
    names = [layer.name for layer in experts_of(layers)]
    assert sum(few[n].few.shrinkage_a for n in names) > 2 * sum(many[n].few.shrinkage_a for n in names)
    assert all(0 < many[n].few.shrinkage_g < 1 for n in names)
    assert all(many[layer.name].few is None for layer in layers if layer.name not in names)
    plan = make_plan(layers, estimate_factors(model, layers, text(32)), sparsity=0.5, allocation="uniform")
    assert f"{many[names[0]].tokens} tokens" in plan.table()
    assert experts_told(plan, ["x"]).startswith("16 layers of experts saw ")
    assert experts_told(plan, ["x"]).endswith("routed to them: x")


@pytest.fixture
def ready():
    """A split model, its windows and its layers."""
    model = random_model(MODELS["mixtral"])
    split_experts(model)
    return SimpleNamespace(model=model, layers=prunable_layers(model), windows=text())


def without_tokens(model, number=3):
    """From now on the router of the second block never chooses one of the experts."""
    gate, forward = model.model.layers[1].mlp.gate, model.model.layers[1].mlp.gate.forward

    def avoiding(hidden):
        raw, scores, index = forward(hidden)
        return raw, scores, torch.where(index == number, 0 * index, index)

    gate.forward = avoiding


def test_an_expert_without_tokens_has_no_factors_and_stays_dense(ready):
    without_tokens(ready.model)
    factors = estimate_factors(ready.model, ready.layers, ready.windows)
    silent = [layer for layer in ready.layers if layer.name not in factors.layers]
    assert [layer.name for layer in silent] == [f"model.layers.1.mlp.experts.3.{m}_proj" for m in ("gate_up", "down")]


def test_a_further_shot_leaves_an_expert_that_lost_its_tokens(ready):
    factors = estimate_factors(ready.model, ready.layers, ready.windows)
    layers = [layer for layer in ready.layers if layer.name in factors.layers]
    plan = make_plan(layers, factors, sparsity=0.6, allocation="uniform")
    dense = prune(layers, plan)
    without_tokens(ready.model)
    after, _ = correct(ready.model, layers, plan, ready.windows, dense.swapped_in, 1)
    for before, made in zip(plan.layers, after.layers, strict=True):
        assert made.name == before.name
        if ".layers.1.mlp.experts.3." in made.name:
            assert torch.equal(made.weight, before.weight)


def test_the_order_of_a_block_holds_every_expert_whatever_the_batch(ready):
    without_tokens(ready.model)
    stack = BlockStack(ready.model, ready.windows, 4)
    order, _, _ = dense_pass(stack, 1, stack.inside(1), [], stack.entries)
    assert sorted(order) == sorted(layer.name for layer in stack.inside(1))


# --- whole runs


def save_mixtral(folder, width=24):
    """A model with letters for tokens, and text for it."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": width, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(
        vocab_size=40, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.3, **options, **LOCAL
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    letter_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "text.txt").write_text("".join(rng.choices(LETTERS[:12] + "  ", k=6000)), encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    save_mixtral(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ("--data", "text.txt", "--seqlen", "16", "--samples", "32", "--eval-samples", "8")


def pruned(*options):
    assert main(["prune", "model", *SMALL, "--out", "out", "--overwrite", *options]) == 0
    with open("out/kfac_prune.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize(
    "options",
    [
        ("--sparsity", "0.5"),
        ("--sparsity", "0.5", "--reconstruct", "0", "--shots", "2"),
        ("--sparsity", "0.5", "--reconstruct", "1", "--offload"),
        ("--pattern", "2:4", "--permute", "--reconstruct", "1"),
        ("--sparsity", "0.5", "--method", "ek-fac", "--allocation", "uniform"),
        ("--sparsity", "0.5", "--method", "llm-surgeon", "--reconstruct", "1", "--recover-epochs", "1"),
    ],
    ids=" ".join,
)
def test_by_the_command_line(here, options, capsys):
    record = pruned(*options)
    said = capsys.readouterr()
    assert "16 layers of experts saw" in said.out + said.err
    assert record["parameters_covered"] > 0.8
    assert record["sparsity"] == pytest.approx(0.5, abs=2e-3)
    counts = [layer["expert"]["tokens"] for name, layer in record["layers"].items() if name.endswith("down_proj")]
    assert sum(counts) == 2 * 2 * record["calibration"]["tokens"]
    assert record["experts_without_tokens"] == []
    model = AutoModelForCausalLM.from_pretrained("out")
    experts = [p for p in model.parameters() if p.ndim == 3]
    assert len(experts) == 4
    if "2:4" in options:
        for p in experts:
            assert (p.unflatten(-1, (-1, 4)) != 0).sum(-1).max() <= 2
    else:
        zeros = sum(int((p == 0).sum()) for p in experts) / sum(p.numel() for p in experts)
        assert 0.3 < zeros < 0.7
    assert main(["eval", "out", "--dense", "model", *SMALL[:4], "--eval-samples", "8"]) == 0
    assert re.search(r"sparsity of linear layers +(50\.|49\.9)", capsys.readouterr().out)


def test_an_expert_without_tokens_is_named_and_stays(here, monkeypatch, capsys):
    names = [f"model.layers.1.mlp.experts.3.{matrix}" for matrix in ("gate_up_proj", "down_proj")]

    def estimated(*arguments, **options):
        found = estimate_factors(*arguments, **options)
        return dataclasses.replace(found, layers={n: f for n, f in found.layers.items() if n not in names})

    monkeypatch.setattr(pipeline, "estimate_factors", estimated)
    record = pruned("--sparsity", "0.5", "--reconstruct", "1", "--recover-epochs", "1")
    assert record["experts_without_tokens"] == names
    assert not set(names) & record["layers"].keys()
    said = capsys.readouterr()
    assert f"no token of the calibration text was routed to them: {', '.join(names)}" in said.out + said.err
    before, after = (load(folder).model.layers[1].mlp.experts for folder in ("model", "out"))
    assert torch.equal(after.down_proj[3], before.down_proj[3])
    assert not torch.equal(after.down_proj[2], before.down_proj[2])


def test_resumed(here, monkeypatch, capsys):
    first = pruned("--reconstruct", "1")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "reconstruct_sparse", interrupted)
        assert main(["prune", "model", *SMALL, "--reconstruct", "1", "--out", "two"]) == 130
    assert main(["prune", "model", *SMALL, "--reconstruct", "1", "--out", "two", "--resume"]) == 0
    with open("two/kfac_prune.json", encoding="utf-8") as file:
        assert json.load(file)["layers"] == first["layers"]
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("out", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_structured_leaves_experts_alone(here):
    pruned("--structured", "heads", "--sparsity", "0.15", "--reconstruct", "0")
    experts = [{n: p for n, p in load(folder).named_parameters() if p.ndim == 3} for folder in ("model", "out")]
    assert len(experts[0]) == 4
    assert all(torch.equal(p, experts[1][name]) for name, p in experts[0].items())


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["50%", "2:4"])
def test_better_than_magnitude(pattern):
    model, windows = random_model(MODELS["mixtral"]), text(64, 16)
    split_experts(model)
    layers = experts_of(prunable_layers(model))
    factors, kl = estimate_factors(model, layers, windows), {}
    for method in ("magnitude", "kfac"):
        plan = make_plan(layers, factors, sparsity=0.5, pattern=pattern, method=method, allocation="uniform")
        dense = prune(layers, plan)
        kl[method] = evaluate(model, text(16, 16, seed=1), dense=dense.swapped_in).kl
        dense.restore()
    assert kl["kfac"] < 0.8 * kl["magnitude"], kl
