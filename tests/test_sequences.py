"""Gradients of whole sequences and the curvatures made of them: against direct computations, invariances, commands."""

import copy
import json
import random

import pytest
import torch
from conftest import CONFIGS, build, random_windows
from letters import LETTERS, save_llama
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from kfac_prune import compare as comparing
from kfac_prune import pipeline
from kfac_prune.cli import main
from kfac_prune.config import ALLOCATIONS, SEQUENCE_METHODS, Recipe
from kfac_prune.curvature import sequences as under_test
from kfac_prune.curvature.estimate import SEQUENCE_DRAWS, estimate_factors
from kfac_prune.curvature.sequences import STATISTICS, SequenceFisher, check_memory, sequence_gradients
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.objective import CAUSAL, Classes
from kfac_prune.obs import NM
from kfac_prune.operators import Damping, DampingRecord, Kronecker
from kfac_prune.plan import make_plan
from kfac_prune.protocol import COMPARED, Comparison

FLOAT32 = 3e-5  # behind two layers, relative to the largest entry
LENGTHS = (9, 4, 1, 7, 9)
DAMPING = Damping(0.5)
K_PROJ = "model.layers.1.self_attn.k_proj"  # 12 x 24


def gradients_of(model, layers, windows, **options):
    """By name, [m, out, in]."""
    passes = list(sequence_gradients(model, layers, windows, **options))
    return {layer.name: torch.stack([found[i] for found in passes]) for i, layer in enumerate(layers)}


def by_hooks(model, layers, windows, seed):
    """``Dᵀ X`` of every layer in float64, from one batch of all padded windows."""
    model, seen = copy.deepcopy(model).double(), {}
    for layer in layers:

        def watch(module, args, output, name=layer.name):
            output.retain_grad()
            seen[name] = args[0].detach(), output

        model.get_submodule(layer.name).register_forward_hook(watch)
    ids, mask = windows.input_ids, windows.attention_mask
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = (logits.softmax(-1).cumsum(-1) < uniforms.unsqueeze(-1)).sum(-1)
    (F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask).sum().backward()
    return {name: y.grad.reshape(*ids.shape, -1).mT @ x.reshape(*ids.shape, -1) for name, (x, y) in seen.items()}


def setting(**padded):
    """A tiny Llama, its layers, windows and factors, and one layer of it."""
    model, windows = build("llama"), random_windows(**padded)
    layers = prunable_layers(model)
    layer = next(one for one in layers if one.name == K_PROJ)
    return model, layers, windows, estimate_factors(model, layers, windows), layer


def undamped(curvature, relative):
    """F from ``F + D mean(diag F) I``, float64."""
    h = curvature.to_dense().double()
    return h - relative / (1 + relative) * float(h.diagonal().mean()) * torch.eye(len(h), dtype=h.dtype)


def dense_fisher(gradients, count):
    flat = gradients.double().flatten(1)
    return flat.T @ flat / count


# --- gradients


@pytest.mark.parametrize("padded", [{}, {"lengths": LENGTHS}], ids=["full", "padded"])
def test_gradients_are_those_of_each_sequence(model, padded, near):
    layers, windows = prunable_layers(model), random_windows(**padded)
    found, expected = gradients_of(model, layers, windows, seed=3), by_hooks(model, layers, windows, seed=3)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        near(gradient, expected[name], FLOAT32)


def test_neither_padding_nor_company_changes_a_gradient(model, near):
    """With the text's labels: sampled ones are drawn by a window's place."""
    layers, windows = prunable_layers(model), random_windows(lengths=LENGTHS)
    wider = Windows(F.pad(windows.input_ids, (0, 3), value=2), F.pad(windows.attention_mask, (0, 3)))
    together, padded = (gradients_of(model, layers, w, fisher="empirical") for w in (windows, wider))
    for n, length in enumerate(LENGTHS):
        alone = Windows(windows.input_ids[n : n + 1, :length])
        for name, gradient in gradients_of(model, layers, alone, fisher="empirical").items():
            near(gradient[0], together[name][n], FLOAT32)
            assert torch.equal(padded[name][n], together[name][n])


def test_the_same_labels_as_for_the_factors(near):
    """One sequence of one token: the gradient is an outer product, and the Fisher G ⊗ A itself."""
    model, layers, windows, _, layer = setting(count=1, length=1)
    for seed in (0, 1):
        factors = estimate_factors(model, layers, windows, seed=seed).layers[layer.name]
        gradient = gradients_of(model, layers, windows, seed=seed)[layer.name]
        near(dense_fisher(gradient, 1), torch.kron(factors.g, factors.a), FLOAT32)


def test_flags_and_mode_are_as_before():
    model = build("llama").train()
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    next(sequence_gradients(model, prunable_layers(model), random_windows()))  # given up half-way
    list(sequence_gradients(model, prunable_layers(model), random_windows()))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_without_part_has_gradient_zero():
    model = build("llama")
    idle = Layer("idle", torch.nn.Linear(3, 2))
    found = gradients_of(model, [idle, *prunable_layers(model)], random_windows(2))["idle"]
    assert found.shape == (2, 2, 3)
    assert not found.any()


# --- the operators against the dense Fisher


@pytest.mark.parametrize("padded", [{}, {"lengths": LENGTHS}], ids=["full", "padded"])
def test_m_fac_is_the_whole_fisher(padded, near):
    model, layers, windows, factors, layer = setting(**padded)
    curvature, records = SequenceFisher("m-fac", model, layers, factors, windows).operator(layer, DAMPING)
    expected = dense_fisher(by_hooks(model, layers, windows, 0)[layer.name], windows.tokens)
    near(undamped(curvature, 0.5), expected, FLOAT32)
    assert records == [DampingRecord("H", 0.5)]


@pytest.mark.parametrize("size", [7, 24, 64])
def test_woodfisher_is_its_blocks(size, near, monkeypatch):
    """Of whole rows with size 24 and above, and with rests of 3 weights with 7."""
    monkeypatch.setattr(under_test, "BLOCK", size)
    monkeypatch.setattr(under_test, "AT_A_TIME", 2)
    model, layers, windows, factors, layer = setting(lengths=LENGTHS)
    curvature, records = SequenceFisher("woodfisher", model, layers, factors, windows).operator(layer, Damping(0.08))
    expected = dense_fisher(by_hooks(model, layers, windows, 0)[layer.name], windows.tokens)
    row, column = torch.arange(12 * 24) // 24, torch.arange(12 * 24) % 24
    together = (row == row[:, None]) & (column // size == (column // size)[:, None])
    near(undamped(curvature, 0.8), expected * together, FLOAT32)
    assert records == [DampingRecord("H", 0.8)]
    with_more, records = SequenceFisher("woodfisher", model, layers, factors, windows).operator(layer, DAMPING)
    near(undamped(with_more, 1.0), expected * together, FLOAT32)
    assert records == [DampingRecord("H", 1.0)]


def test_ek_fac_is_the_nearest_with_k_facs_eigenvectors(near):
    model, layers, windows, factors, layer = setting(lengths=LENGTHS)
    curvature, records = SequenceFisher("ek-fac", model, layers, factors, windows).operator(layer, DAMPING)
    fisher = dense_fisher(by_hooks(model, layers, windows, 0)[layer.name], windows.tokens)
    one = factors.layers[layer.name]
    basis = torch.kron(*(torch.linalg.eigh(f.double()).eigenvectors.contiguous() for f in (one.g, one.a)))
    near(undamped(curvature, 0.5), basis * (basis.T @ fisher @ basis).diagonal() @ basis.T, 10 * FLOAT32)
    kfac = Kronecker(one.a.double(), one.g.double()).to_dense()
    assert (undamped(curvature, 0.5) - fisher).norm() < (kfac - fisher).norm()
    assert records == [DampingRecord("H", 0.5)]


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval(), "bert.encoder.layer.0.attention.self.value", Classes()


@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_its_quadratic_is_the_kl_in_nats_per_unit(kind):
    """½⟨D, F D⟩ over many labels, and the KL that small changes of the weights cause, tokens counted over lengths."""
    model, name, objective = (build("llama"), K_PROJ, CAUSAL) if kind == "tokens" else tiny_bert()
    few = random_windows(2, 8, lengths=(8, 3))
    draws = 60 // (1 if kind == "tokens" else SEQUENCE_DRAWS)
    many = Windows(few.input_ids.repeat(draws, 1), few.attention_mask.repeat(draws, 1))
    layers = [layer for layer in prunable_layers(model) if layer.name == name]
    factors = estimate_factors(model, layers, few, objective=objective)
    fisher = SequenceFisher("m-fac", model, layers, factors, many, objective=objective)
    fisher = fisher.operator(layers[0], Damping(1e-6))[0]
    double = copy.deepcopy(model).double()
    weight = double.get_submodule(name).weight
    dense, predicted, measured = weight.data.clone(), 0.0, 0.0

    @torch.no_grad()
    def outputs():
        logits = double(input_ids=few.input_ids, attention_mask=few.attention_mask).logits.log_softmax(-1)
        return logits[few.attention_mask] if kind == "tokens" else logits

    p = outputs()
    for seed in range(12):
        change = 1e-3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weight.data = dense + change
        measured += float((p.exp() * (p - outputs())).sum(-1).mean())
        predicted += 0.5 * float((change * fisher.apply(change.float())).sum())
    assert predicted == pytest.approx(measured, rel=0.3)


# --- groups of layers, and the limit


@pytest.mark.parametrize("method", STATISTICS)
def test_groups_change_nothing(method, near, monkeypatch):
    model, layers, windows, factors, _ = setting()
    groups, original = [], under_test.sequence_gradients

    def noted(model, group, *rest, **options):
        groups.append(len(group))
        return original(model, group, *rest, **options)

    monkeypatch.setattr(under_test, "sequence_gradients", noted)
    one = SequenceFisher(method, model, layers, factors, windows)
    expected = [one.operator(layer, DAMPING)[0].diagonal() for layer in layers]
    assert groups == [len(layers)]
    largest = max(under_test._bytes(method, layer, windows, CAUSAL) for layer in layers)
    monkeypatch.setattr(under_test, "BUDGET", largest)
    several = SequenceFisher(method, model, layers, factors, windows)
    for layer, diagonal in zip(layers, expected, strict=True):
        near(several.operator(layer, DAMPING)[0].diagonal(), diagonal, 1e-6)
    assert sum(groups[1:]) == len(layers)
    assert len(groups) > 3


def test_a_process_passes_for_its_own_layers_alone(near, monkeypatch):
    model, layers, windows, factors, _ = setting()
    alone = SequenceFisher("woodfisher", model, layers, factors, windows)
    expected = [alone.operator(layer, DAMPING)[0].diagonal() for layer in layers]
    groups, original = [], under_test.sequence_gradients

    def noted(model, group, *rest, **options):
        groups.append([layer.name for layer in group])
        return original(model, group, *rest, **options)

    monkeypatch.setattr(under_test, "sequence_gradients", noted)
    monkeypatch.setattr(under_test, "owners", lambda layers: [i % 2 for i in range(len(layers))])
    shared = SequenceFisher("woodfisher", model, layers, factors, windows)
    for layer, diagonal in list(zip(layers, expected, strict=True))[::2]:
        near(shared.operator(layer, DAMPING)[0].diagonal(), diagonal, 1e-6)
    assert groups == [[layer.name for layer in layers[::2]]]
    near(shared.operator(layers[1], DAMPING)[0].diagonal(), expected[1], 1e-6)  # any layer may be asked for


@pytest.mark.parametrize("method", STATISTICS)
def test_a_layer_beyond_the_budget_is_named(method, monkeypatch):
    model, layers, windows, factors, _ = setting()
    check_memory(method, layers, windows, CAUSAL)
    monkeypatch.setattr(under_test, "BUDGET", 2**12)
    first = rf"for layer {layers[0].name} \[24, 24\], and its limit is .* GiB; "
    remedy = rf"{'lower --samples .now 5., ' if method == 'm-fac' else ''}leave the layer out with --ignore"
    with pytest.raises(InputError, match=rf"^method {method} would keep .* GiB {first}{remedy}"):
        check_memory(method, layers, windows, CAUSAL)
    with pytest.raises(InputError, match="would keep"):
        SequenceFisher(method, model, layers, factors, windows)


# --- plans


@pytest.mark.parametrize(("family", "method"), list(zip(CONFIGS, STATISTICS, strict=True)))
def test_a_plan_takes_it_as_any_curvature(family, method):
    model = build(family)
    layers, windows = prunable_layers(model), random_windows(12)
    factors = estimate_factors(model, layers, windows)
    sequences = SequenceFisher(method, model, layers, factors, windows)
    for options in ({"pattern": NM(2, 4)}, {"sparsity": 0.6, "allocation": "global"}):
        plan = make_plan(layers, factors, method=method, sequences=sequences, **options)
        assert plan.sparsity == pytest.approx(options.get("sparsity", 0.5), abs=2e-3)
        for made, layer in zip(plan.layers, layers, strict=True):
            assert not made.weight[~made.mask].any()
            assert made.kkt < 0.2  # conjugate gradients end where the objective has settled
            assert made.damping == (DampingRecord("H", 0.3 if method == "woodfisher" else 0.03),)
            assert made.bias is layer.bias or torch.equal(made.bias, layer.bias)
    assert len({layer.sparsity for layer in plan.layers}) > 1


def test_a_plan_without_gradients_is_refused():
    model, layers, windows, factors, _ = setting()
    other = SequenceFisher("ek-fac", model, layers, factors, windows)
    for sequences in (None, other):
        with pytest.raises(InputError, match=r"^method m-fac needs the gradients of whole sequences"):
            make_plan(layers, factors, method="m-fac", sequences=sequences, allocation="uniform")


def test_the_options_know_the_same_methods():
    assert set(SEQUENCE_METHODS) == STATISTICS.keys()
    assert {ALLOCATIONS[method] for method in SEQUENCE_METHODS} == {("uniform", "global")}
    assert not set(COMPARED) & set(SEQUENCE_METHODS)


# --- commands


OPTIONS = ["--data", "text.txt", "--samples", "20", "--eval-samples", "8", "--seqlen", "16", "--out", "out"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a model and a text in it."""
    save_llama(tmp_path / "model")
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(rng.choices(LETTERS[:12] + "  ", k=4000)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "more"),
    [("ek-fac", ["--pattern", "2:4"]), ("woodfisher", ["--pattern", "2:4"]), ("m-fac", ["--sparsity", "0.6"])],
    ids=str,
)
def test_prune_writes_a_checkpoint(here, method, more):
    assert main(["prune", "model", *OPTIONS, "--method", method, *more]) == 0
    pruned = AutoModelForCausalLM.from_pretrained("out")
    for layer in prunable_layers(pruned):
        if "--pattern" in more:
            assert ((layer.weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
        else:
            assert int((layer.weight == 0).sum()) == pytest.approx(0.6 * layer.weight.numel(), abs=1)
    record = json.loads((here / "out" / "kfac_prune.json").read_text())
    assert (record["method"], record["allocation"], record["reconstruction"]) == (method, "uniform", [])
    assert all(entry["damping"][0]["factor"] == "H" for entry in record["layers"].values())


def test_reconstruction_and_permutation_can_be_asked_for(here):
    options = ["--method", "ek-fac", "--pattern", "2:4", "--permute", "--reconstruct", "1"]
    assert main(["prune", "model", *OPTIONS, *options]) == 0
    record = json.loads((here / "out" / "kfac_prune.json").read_text())
    assert record["reconstruction"]
    assert record["permuted"]


def test_compare_takes_them_as_methods(here, monkeypatch):
    monkeypatch.setattr(comparing, "picture", lambda *cells, **title: False)  # matplotlib is slow to import
    few = {"include": ("*.down_proj", "*.k_proj"), "samples": 20, "eval_samples": 8, "seqlen": 16}
    recipe = Recipe(model="model", data="text.txt", out="out", **few)
    methods = [*STATISTICS, "ek-fac:global"]
    rows = comparing.compare(Comparison(recipe, methods, ["50%"]), echo=lambda text: None)
    assert [(row["method"], row["allocation"]) for row in rows] == [
        *((method, "uniform") for method in STATISTICS),
        ("ek-fac:global", "global"),
    ]
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-3) for row in rows)
    alone = pipeline.run(Recipe(model="model", data="text.txt", out="alone", method="m-fac", **few))
    same = next(row for row in rows if row["method"] == "m-fac")
    assert alone["kl_measured"] == pytest.approx(same["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--structured", "ffn"], "method {} prunes single weights, structured removes units; use kfac"),
        (["--allocation", "curves"], "allocation curves needs loss curves, which method {} does not give; use uniform"),
        (["--allocation", "owl"], "allocation owl is not for method {}"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "sparsity 0.3 is less than pattern 2:4 removes"),
        (["--shots", "2"], "shots is 2, and method {} does not correct a sparse model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("method", STATISTICS)
def test_refusals(capsys, method, options, told):
    assert main(["prune", "model", *OPTIONS, "--method", method, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kfac-prune: error: " + told.format(method))


@pytest.mark.parametrize("command", ["prune", "compare"])
def test_what_is_too_large_is_refused_before_long_work(here, capsys, monkeypatch, command):
    monkeypatch.setattr(under_test, "BUDGET", 2**12)
    for name in ("estimate_factors", "evaluate"):
        monkeypatch.setattr(pipeline, name, lambda *a, **k: pytest.fail("the work began"))
    choice = ["--method", "m-fac"] if command == "prune" else ["--methods", "magnitude", "m-fac:global"]
    assert main([command, "model", *OPTIONS, *choice]) == 2
    assert "method m-fac would keep" in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "out").exists()
