"""Whole runs on tiny models: what is written, what it holds, and that it can be repeated."""

import dataclasses
import inspect
import json
import math
import random
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from letters import LETTERS, letter_tokenizer
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import kfac_prune
from kfac_prune import block_training, inputs, pipeline, ranks
from kfac_prune.config import BASELINES, METHODS, SEQUENCE_METHODS, Recipe
from kfac_prune.curvature import estimate
from kfac_prune.errors import InputError
from kfac_prune.inputs import load_data
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.pipeline import run
from kfac_prune.recipe_file import read_recipe

SHARED = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
WRITTEN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | {
    "recipe.yaml",
    "kfac_prune.json",
    "README.md",
}


def llama(**changes):
    """Grouped-query attention, gated FFN, tied embeddings, no biases."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**SHARED, **(options | changes)))


def gpt2():
    """Conv1D layers, whose weight is [in, out], with biases, tied."""
    return GPT2LMHeadModel(GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2))


def opt():
    """nn.Linear with biases, tied, ReLU."""
    options = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(**SHARED, **options, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2, dropout=0.0)
    )


def save(build, folder, seed=0):
    """A model with random weights (and biases, which start at zero) and its tokenizer."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders llama, gpt2 and opt, and text.txt of 11,000 letters."""
    root = tmp_path_factory.mktemp("inputs")
    for build in (llama, gpt2, opt):
        save(build, root / build.__name__)
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS[:12], k=rng.randint(2, 6))) for _ in range(40)]
    (root / "text.txt").write_text(" ".join(rng.choices(words, k=2200)), encoding="utf-8")
    return root


@pytest.fixture
def recipe(place, tmp_path):
    """Makes small recipes that write to tmp_path."""

    def make(model="llama", **fields):
        default = {"model": str(place / model), "data": str(place / "text.txt"), "out": str(tmp_path / "out")}
        compensates = fields.get("method", "kfac") in ("kfac", "layerwise")
        if compensates and not fields.get("refit") and fields.get("samples", 48) >= 16:
            default["reconstruct"] = 1  # epoch, which is enough here
        return Recipe(**{**default, "samples": 48, "eval_samples": 16, "seqlen": 16, **fields})

    return make


def matrices(model):
    """Every block-linear weight as [out, in], by name; found without the library."""
    return {
        name: module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"
    }


def group_counts(weight, m):
    """Non-zeros of every group of m in a row, the last group perhaps shorter."""
    return torch.cat([(part != 0).sum(1) for part in weight.split(m, dim=1)])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


# --- every architecture, method and pattern


CASES = [
    (model, method, pattern)
    for model in ("llama", "gpt2", "opt")
    for method in METHODS
    for pattern in ("unstructured", "2:4")
    if method not in (*BASELINES, *SEQUENCE_METHODS) or model == "opt"  # whose biases they leave alone
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, place, tmp_path_factory):
    """One finished run and both models, loaded from their folders."""
    model, method, pattern = request.param
    out = tmp_path_factory.mktemp("run") / "out"
    lines = []
    made = Recipe(
        model=str(place / model),
        data=str(place / "text.txt"),
        out=str(out),
        method=method,
        pattern=pattern,
        permute=False,  # compared with the dense model position by position
        samples=48,
        eval_samples=16,
        seqlen=16,
        reconstruct=1 if method in ("kfac", "layerwise") else None,
    )
    record = run(made, echo=lines.append)
    return SimpleNamespace(
        recipe=made, record=record, out=out, lines=lines, dense=load(place / model), pruned=load(out)
    )


def test_folder_is_complete_and_plain(case):
    assert WRITTEN <= {file.name for file in case.out.iterdir()}
    assert [file.name for file in case.out.parent.iterdir()] == ["out"]
    config = json.loads((case.out / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()
    before = json.loads((Path(case.recipe.model) / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "_name_or_path"} == before
    assert json.loads((case.out / "kfac_prune.json").read_text()) == case.record
    words = "the cat sat."
    assert AutoTokenizer.from_pretrained(case.out)(words).input_ids == letter_tokenizer()(words).input_ids


def test_sparsity_is_what_was_asked(case):
    weights = matrices(case.pruned)
    assert weights.keys() == case.record["layers"].keys()
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    for name, weight in weights.items():
        entry = case.record["layers"][name]
        assert entry["shape"] == list(weight.shape)
        assert zeros[name] == round(entry["sparsity"] * weight.numel())
        if case.record["allocation"] == "uniform":
            assert zeros[name] == weight.numel() // 2
    total = sum(w.numel() for w in weights.values())
    # every layer rounds to whole weights
    assert abs(sum(zeros.values()) - total / 2) <= len(weights) / 2
    assert case.record["sparsity"] == pytest.approx(sum(zeros.values()) / total, abs=1e-12)
    assert case.record["parameters_covered"] == pytest.approx(total / case.dense.num_parameters())


def test_groups_are_valid_on_every_layer(case):
    if case.recipe.pattern == "2:4":
        for name, weight in matrices(case.pruned).items():
            assert (group_counts(weight, 4) == 2).all(), name
            assert case.record["layers"][name]["groups_fit"] is True


def test_everything_else_is_untouched(case):
    compensated = case.recipe.method in ("kfac", "layerwise", "llm-surgeon")
    layers = case.record["layers"]
    dense, pruned = case.dense.state_dict(), case.pruned.state_dict()
    assert dense.keys() == pruned.keys()
    for name, value in dense.items():
        layer, _, kind = name.rpartition(".")
        changed = not torch.equal(value, pruned[name])
        assert pruned[name].dtype == value.dtype
        assert changed == (layer in layers and (kind == "weight" or compensated)), name


def test_ties_are_kept(case):
    for model in (case.dense, case.pruned):
        assert model.config.tie_word_embeddings
        assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    stored = load_file(case.out / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored.keys() == load_file(Path(case.recipe.model) / "model.safetensors").keys()


def held_out(made, tokenizer):
    """The first windows of the last tenth: [N, T]."""
    ids = tokenizer(Path(made.data).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    held = ids[len(ids) - len(ids) // 10 :]
    count = min(made.eval_samples, len(held) // made.seqlen)
    return torch.tensor(held[: count * made.seqlen]).view(count, made.seqlen)


@torch.no_grad()
def loss_and_kl(model, dense, ids):
    """In float64 from the logits, in nats per predicted token."""
    q, p = (one(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for one in (model, dense))
    loss = cross_entropy(q.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss), float((p.exp() * (p - q)).sum(-1).mean())


def test_recorded_figures_are_those_of_the_saved_model(case):
    ids = held_out(case.recipe, AutoTokenizer.from_pretrained(case.out))
    loss, kl = loss_and_kl(case.pruned, case.dense, ids)
    dense_loss, _ = loss_and_kl(case.dense, case.dense, ids)
    record = case.record
    assert record["evaluation_tokens"] == ids[:, 1:].numel()
    assert record["pruned"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["dense"]["loss"] == pytest.approx(dense_loss, rel=1e-5)
    assert record["loss_increase"] == pytest.approx(loss - dense_loss, abs=1e-5)
    assert record["pruned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert record["kl_measured"] == pytest.approx(kl, rel=1e-3)


def test_predictions_are_finite_and_solutions_near_optimal(case):
    layers = case.record["layers"].values()
    assert all(math.isfinite(entry["predicted_loss"]) and entry["predicted_loss"] >= 0 for entry in layers)
    assert case.record["kl_predicted"] == pytest.approx(sum(entry["predicted_loss"] for entry in layers))
    assert case.record["kl_predicted"] > 0
    if case.recipe.method in BASELINES:  # their weights solve no problem
        assert all(entry["kkt_residual"] is None for entry in layers)
        return
    assert all(0 <= entry["kkt_residual"] <= 0.2 for entry in layers)
    if case.recipe.method in ("obd", "magnitude"):  # nothing couples the weights: nothing to compensate
        assert all(entry["kkt_residual"] == 0 for entry in layers)


def test_stages_are_told_in_order(case):
    assert [line[2:] for line in case.lines if line.startswith("- ")] == list(case.record["stages"])
    repaired = ["reconstruct"] if case.recipe.method in ("kfac", "layerwise") else []
    assert list(case.record["stages"]) == [
        "load",
        "curvature",
        "plan",
        "measure dense",
        *repaired,
        "measure pruned",
        "save",
    ]
    assert case.lines[-1] == f"saved to {case.out}"


def test_model_card_tells_what_was_done(case):
    card = (case.out / "README.md").read_text()
    assert max(map(len, card.splitlines())) <= 120
    assert card.startswith("---\n")
    assert f"method `{case.recipe.method}`" in card
    assert ("in the pattern 2:4" in card) == (case.recipe.pattern == "2:4")
    assert f"{case.record['kl_measured']:.4f}" in card


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_more_curvature_costs_less(model, pattern, recipe):
    """On held-out text, K-FAC and the layer-wise method beat magnitude; under its own curvature K-FAC beats all."""
    methods = [m for m in METHODS if m not in (*BASELINES, *SEQUENCE_METHODS)]
    plain = {"pattern": pattern, "permute": False, "reconstruct": 0, "refit": False, "overwrite": True}
    records = {m: run(recipe(model, method=m, **plain)) for m in methods}
    measured = {m: r["kl_measured"] for m, r in records.items()}
    predicted = {m: r["kl_predicted"] for m, r in records.items()}
    assert measured["kfac"] < measured["layerwise"] < measured["magnitude"]
    assert min(predicted, key=predicted.get) == "kfac"


# --- the simple methods against a few lines of torch


def kept_of(scores, pattern):
    """The best half of a layer, or of every group of four."""
    if pattern == "2:4":
        order = scores.reshape(-1, 4).argsort(dim=1).argsort(dim=1)
        return (order >= 2).reshape(scores.shape)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[: scores.numel() // 2]] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_magnitude_is_layerwise_magnitude(model, pattern, recipe):
    made = recipe(model, method="magnitude", pattern=pattern)
    run(made)
    pruned = matrices(load(made.out))
    for name, weight in matrices(load(made.model)).items():
        assert torch.equal(pruned[name], weight * kept_of(weight.abs(), pattern)), name


def test_global_magnitude_has_one_threshold(recipe):
    made = recipe(method="magnitude", allocation="global", sparsity=0.6)
    record = run(made)
    dense, pruned = (torch.cat([w.flatten() for w in matrices(load(f)).values()]) for f in (made.model, made.out))
    smallest = dense[pruned != 0].abs().min()
    assert record["sparsity"] == pytest.approx(0.6, abs=1e-3)
    # layers round to whole weights, so a weight on either side of the threshold may be on the wrong one
    assert int((dense[pruned == 0].abs() > smallest).sum()) <= len(record["layers"])
    assert len({round(entry["sparsity"], 2) for entry in record["layers"].values()}) > 1


def test_one_threshold_where_many_weights_are_equal(place, recipe):
    """Half of the weights are zero already, and the threshold is among them."""
    model = load(place / "llama")
    with torch.no_grad():
        for weight in matrices(model).values():
            weight[:, ::2] = 0
    model.save_pretrained(place / "half")
    letter_tokenizer().save_pretrained(place / "half")
    record = run(recipe("half", method="magnitude", allocation="global", sparsity=0.3))
    assert record["kl_measured"] == 0
    assert record["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert record["layers"].keys() == {name for name in matrices(model)}


def test_a_model_that_cannot_be_saved_is_refused_at_once(place, recipe, monkeypatch):
    shutil.copytree(place / "llama", place / "unsaved")
    config = json.loads((place / "unsaved" / "config.json").read_text())
    (place / "unsaved" / "config.json").write_text(json.dumps(config | {"output_attentions": True}))
    monkeypatch.setattr(pipeline, "estimate_factors", lambda *a, **k: pytest.fail("long work has begun"))
    with pytest.raises(
        InputError, match=r"the config\.json of .*unsaved can be loaded and not saved: .*output_attentions"
    ):
        run(recipe("unsaved"))


def diagonal_scores(model, windows):
    """w² · E[g²] · E[a²] from the gradients of the text's own labels, up to one constant per layer."""
    seen = {}

    def watch(name):
        def hook(module, args, output):
            a = args[0].detach().flatten(0, -2).double().square().sum(0)
            output.register_hook(lambda g: seen.__setitem__(name, (a, g.flatten(0, -2).double().square().sum(0))))

        return hook

    layers = matrices(model)
    for name in layers:
        model.get_submodule(name).register_forward_hook(watch(name))
    logits = model(input_ids=windows).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    return {name: w.double().square() * torch.outer(seen[name][1], seen[name][0]) for name, w in layers.items()}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_obd_removes_the_smallest_diagonal_saliencies(model, pattern, recipe):
    made = recipe(model, method="obd", pattern=pattern, fisher="empirical")
    run(made)
    dense, pruned = load(made.model), matrices(load(made.out))
    calibration, _ = load_data(made, AutoTokenizer.from_pretrained(made.model))
    for name, scores in diagonal_scores(dense, calibration.input_ids).items():
        mask = pruned[name] != 0
        assert torch.equal(pruned[name], matrices(dense)[name] * mask), name  # nothing is compensated
        parts = [(scores, mask)]
        if pattern == "2:4":
            parts = zip(scores.reshape(-1, 4), mask.reshape(-1, 4), strict=True)
        for part, kept in parts:
            assert part[~kept].max() <= part[kept].min() * (1 + 1e-4), name


# --- repeating a run


def bytes_of(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_same_seed_gives_same_bytes(model, pattern, recipe, tmp_path):
    first = recipe(model, pattern=pattern, seed=3, own_text=1)
    one = run(first)
    torch.manual_seed(99)  # the global generator has no part in it
    two = run(dataclasses.replace(first, out=str(tmp_path / "again")))
    assert bytes_of(first.out) == bytes_of(tmp_path / "again")
    for record in (one, two):
        del record["stages"]
        assert all(part.pop("seconds") > 0 for part in record["reconstruction"])
    assert one == two
    run(dataclasses.replace(first, out=str(tmp_path / "other"), seed=4))
    assert bytes_of(first.out) != bytes_of(tmp_path / "other")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "1:4", "ignore": ("*.0.*",), "damping": 0.1, "fisher": "empirical"},
        {"method": "magnitude", "allocation": "global", "sparsity": 0.3, "eval_samples": 3},
        {"method": "layerwise", "dtype": "bfloat16", "separator": ".", "include": ("*.mlp.*", "*o_proj")},
    ],
    ids=str,
)
def test_the_recipe_beside_the_result_repeats_it(fields, recipe, tmp_path):
    made = recipe(**fields)
    run(made)
    again = Recipe(**{**read_recipe(str(Path(made.out) / "recipe.yaml")), "out": str(tmp_path / "again")})
    decided = {"device": again.device, "own_text": 0}  # by the machine, and since one epoch sees no more text
    assert dataclasses.replace(again, out=made.out) == dataclasses.replace(made.resolved(), **decided)
    run(again)
    assert bytes_of(made.out) == bytes_of(tmp_path / "again")


# --- structured pruning


@pytest.fixture(scope="module", params=["uniform", "per-layer"])
def shrunk(request, place, tmp_path_factory):
    """One finished structured run, and both models, loaded from their folders."""
    out, lines = tmp_path_factory.mktemp("structured") / "out", []
    options = {"samples": 48, "eval_samples": 16, "seqlen": 16, "sparsity": 0.4, "shots": 1}
    made = Recipe(
        model=str(place / "llama"),
        data=str(place / "text.txt"),
        out=str(out),
        structured="ffn,heads",
        widths=request.param,
        **options,
    )
    record = run(made, echo=lines.append)
    return SimpleNamespace(
        recipe=made,
        record=record,
        out=out,
        lines=lines,
        dense=load(place / "llama"),
        pruned=kfac_prune.load(out).eval(),
    )


def test_structured_folder_is_complete_and_smaller(shrunk):
    own_code = {"pruned_model.py"} if shrunk.recipe.widths == "per-layer" else set()
    found = {file.name for file in shrunk.out.iterdir()}
    assert found >= WRITTEN | own_code
    assert own_code or "pruned_model.py" not in found
    assert json.loads((shrunk.out / "kfac_prune.json").read_text()) == shrunk.record
    before, after = (folder / "model.safetensors" for folder in (Path(shrunk.recipe.model), shrunk.out))
    assert after.stat().st_size < 0.75 * before.stat().st_size


def test_structured_record_tells_what_is_gone(shrunk):
    record, dense, pruned = shrunk.record, matrices(shrunk.dense), matrices(shrunk.pruned)
    left, had = (sum(w.numel() for w in weights.values()) for weights in (pruned, dense))
    assert record["structured"] == "ffn,heads"
    assert record["sparsity"] == pytest.approx(1 - left / had)
    assert record["sparsity"] >= 0.4
    assert record["parameters"] == {"dense": shrunk.dense.num_parameters(), "pruned": shrunk.pruned.num_parameters()}
    assert record["widths"] == shrunk.recipe.widths
    assert record["shots"] == 1
    assert record["other_plans"] == []
    assert record["damping"] == 0.001
    assert record["refit"] is False  # reconstructed instead
    assert record["kl_predicted"] > 0
    assert record["kl_calibration"] > 0
    for i in range(2):
        ffn = record["groups"][f"model.layers.{i}.mlp"]
        assert (ffn["before"], ffn["after"]) == ([48], [pruned[f"model.layers.{i}.mlp.down_proj"].shape[1]])
        heads = record["groups"][f"model.layers.{i}.self_attn"]
        groups, per_group = heads["after"]
        assert heads["before"] == [2, 2]
        assert pruned[f"model.layers.{i}.self_attn.k_proj"].shape[0] == 8 * groups
        assert pruned[f"model.layers.{i}.self_attn.o_proj"].shape[1] == 8 * groups * per_group
    for name in ("dense", "pruned"):
        assert all(ms > 0 for ms in record["speed"][name].values())


def test_structured_checkpoint_reloads_as_what_was_measured(shrunk):
    ids = held_out(shrunk.recipe, AutoTokenizer.from_pretrained(shrunk.out))
    loss, kl = loss_and_kl(shrunk.pruned, shrunk.dense, ids)
    assert shrunk.record["pruned"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert shrunk.record["kl_measured"] == pytest.approx(kl, rel=1e-3)
    config = json.loads((shrunk.out / "config.json").read_text())
    assert ("pruned_shapes" in config) == (shrunk.recipe.widths == "per-layer")
    if shrunk.recipe.widths == "uniform":  # transformers alone loads it
        with torch.no_grad():
            plain = load(shrunk.out)(input_ids=ids).logits
            torch.testing.assert_close(plain, shrunk.pruned(input_ids=ids).logits)


def test_structured_model_card_tells_how_to_load(shrunk):
    card = (shrunk.out / "README.md").read_text()
    assert f"{shrunk.record['parameters']['pruned']:,} of" in card
    assert f"{shrunk.record['kl_measured']:.4f}" in card
    assert "zeros" not in card
    assert ("trust_remote_code=True" in card) == (shrunk.recipe.widths == "per-layer")
    assert ("kfac_prune.load" in card) == (shrunk.recipe.widths == "per-layer")
    assert ("plain checkpoint" in card) == (shrunk.recipe.widths == "uniform")


def test_structured_stages_are_told_in_order(shrunk):
    stages = ["load", "shrink", "measure dense", "reconstruct", "measure pruned", "measure speed", "save"]
    assert [line[2:] for line in shrunk.lines if line.startswith("- ")] == list(shrunk.record["stages"]) == stages
    assert shrunk.lines[-1] == f"saved to {shrunk.out}"
    table = next(line for line in shrunk.lines if line.startswith("group"))
    assert [row.split()[0] for row in table.splitlines()[1:]] == list(shrunk.record["groups"])


def test_a_smaller_model_is_refitted_where_it_is_not_reconstructed(recipe):
    fields = {"structured": "ffn", "sparsity": 0.3, "reconstruct": 0, "overwrite": True}
    refitted, plain = run(recipe("llama", **fields)), run(recipe("llama", **fields, refit=False))
    assert (refitted["refit"], plain["refit"]) == (True, False)
    assert "reconstruct" not in {**refitted["stages"], **plain["stages"]}
    assert refitted["kl_calibration"] < plain["kl_calibration"]


@pytest.mark.parametrize("model", ["gpt2", "opt"])
def test_structured_run_repeats_to_the_byte(model, recipe, tmp_path):
    made = recipe(model, structured="ffn", sparsity=0.3, shots=2)
    one = run(made)
    again = Recipe(**{**read_recipe(str(Path(made.out) / "recipe.yaml")), "out": str(tmp_path / "again")})
    two = run(again)
    assert bytes_of(made.out) == bytes_of(tmp_path / "again")
    for record in (one, two):
        del record["stages"], record["speed"]
        assert all(part.pop("seconds") > 0 for part in record["reconstruction"])
    assert one == two
    assert {one["widths"], one["other_plans"][0]["widths"]} == {"uniform", "per-layer"}
    assert one["kl_calibration"] <= one["other_plans"][0]["kl_calibration"]


@pytest.mark.parametrize(
    "fields",
    [{"pattern": "2:4"}, {"structured": "ffn", "sparsity": 0.3, "shots": 1}],
    ids=["sparse", "smaller"],
)
def test_recovery_is_told_apart_from_the_figure_before(fields, recipe):
    lines = []
    plain = run(recipe("llama", **fields))
    record = run(recipe("llama", **fields, recover_epochs=2, overwrite=True), echo=lines.append)
    assert plain["recovery"] is None
    told = record["recovery"]
    assert told["before"] == {**plain["pruned"], "kl": plain["kl_measured"]}
    assert told["held_out"]["after"] < told["held_out"]["before"]
    assert record["kl_measured"] != plain["kl_measured"]
    card = (Path(recipe().out) / "README.md").read_text()
    for text in (lines[-2], card):
        assert f"{plain['kl_measured']:.4f}" in text
        assert f"{plain['pruned']['loss']:.4f}" in text
    assert "end-to-end distillation" in card
    assert [name for name in record["stages"] if "recover" in name] == ["measure before recovery", "recover"]
    if "pattern" in fields:
        assert all(NM(2, 4).is_valid(layer.weight != 0) for layer in prunable_layers(load(Path(recipe().out))))


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_reconstruction_of_a_sparse_model(unit, recipe):
    plain = run(recipe("llama", pattern="2:4", reconstruct=0))
    made = recipe("llama", pattern="2:4", reconstruct=2, reconstruct_unit=unit, overwrite=True)
    record = run(made)
    assert plain["reconstruction"] == []
    parts = record["reconstruction"]
    assert len(parts) == (2 if unit == "block" else 4)
    assert all(part["after"] <= part["before"] for part in parts)
    assert list(record["stages"])[-3:] == ["reconstruct", "measure pruned", "save"]
    model = load(made.out)
    assert all(NM(2, 4).is_valid(layer.weight != 0) for layer in prunable_layers(model))


@pytest.mark.parametrize(
    "fields", [{"pattern": "2:4"}, {"structured": "ffn", "sparsity": 0.3, "shots": 1}], ids=["sparse", "smaller"]
)
def test_a_killed_run_is_resumed_to_the_same_bytes(fields, recipe, tmp_path, monkeypatch):
    whole = recipe("opt", reconstruct=2, **fields)
    run(whole)
    made = dataclasses.replace(whole, out=str(tmp_path / "other"), resume=True)
    solve, calls = block_training.BlockTraining.solve, []

    def dies(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments[0].part.name)
        return solve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(block_training.BlockTraining, "solve", dies)
        with pytest.raises(KeyboardInterrupt):
            run(made)
        assert not Path(made.out).exists()
        left = [file.name for file in (tmp_path / "other.work").iterdir()]
        assert sum(name.startswith("reconstruction-") for name in left) == 1
        assert ("plan-all-layers.safetensors" in left) == ("structured" not in fields)
        patch.setattr(block_training.BlockTraining, "solve", lambda *a: calls.append(a[0].part.name) or solve(*a))
        run(made)
    assert bytes_of(whole.out) == bytes_of(made.out)
    assert len(set(calls)) == len(calls) == 2
    assert not (tmp_path / "other.work").exists()
    assert "resume: false" in (Path(made.out) / "recipe.yaml").read_text()


def test_the_recipe_of_a_result_replaces_nothing_and_asks_for_no_other_device(recipe, tmp_path):
    made = recipe(overwrite=True, device="auto")
    run(made)
    again = Recipe(**read_recipe(str(Path(made.out) / "recipe.yaml")))
    assert (again.overwrite, again.device) == (False, "auto")


def test_a_refit_instead(recipe):
    record = run(recipe("llama", pattern="2:4", refit=True))
    assert record["reconstruction"] == []
    assert len(record["refit"]) == 4
    assert all(one["loss_after"] < one["loss_before"] for one in record["refit"].values())
    assert list(record["stages"])[-4:] == ["refit", "shots", "measure pruned", "save"]
    assert record["shots"] == 1 + sum(one["step"] > 0 for one in record["corrections"])


@pytest.mark.parametrize("fields", [{"sparsity": 0.7}, {"pattern": "2:4"}], ids=["unstructured", "2:4"])
def test_further_shots(recipe, fields):
    """One shot is what there was before, more are no worse, keep the pattern, and repeat to the same bytes."""
    one = run(recipe("llama", reconstruct=0, refit=False, **fields, shots=1))
    assert one["shots"] == 1
    assert one["corrections"] == []
    assert "shots" not in one["stages"]
    made = recipe("llama", reconstruct=0, refit=False, **fields, overwrite=True)
    record = run(made)
    assert one["kl_predicted"] == record["kl_predicted"] > 0.05
    taken = [c["step"] > 0 for c in record["corrections"]]
    assert taken[0]
    assert record["shots"] == 1 + sum(taken)
    assert all(c["kl_after"] <= c["kl_before"] for c in record["corrections"])
    assert record["corrections"][-1]["kl_after"] < record["corrections"][0]["kl_before"]
    for name, layer in record["layers"].items():
        assert layer["sparsity"] == one["layers"][name]["sparsity"]
    model = load(made.out)
    if "pattern" in fields:
        assert all(NM(2, 4).is_valid(layer.weight != 0) for layer in prunable_layers(model))
    first = bytes_of(made.out)
    run(made)
    assert bytes_of(made.out) == first
    assert f"in {record['shots']} shots, without training" in (Path(made.out) / "README.md").read_text()


def test_further_shots_need_the_curvature_of_all_layers_at_a_time(recipe, monkeypatch):
    """Where a GPU has no room for it there is one shot, and more that are asked for are refused before the work."""
    monkeypatch.setattr(estimate, "_half_of_free", lambda device: 4 * (32**2 + 48**2))  # the largest layer alone
    fields = {"sparsity": 0.7, "reconstruct": 0, "refit": False}
    told = []
    record = run(recipe("llama", **fields), echo=told.append)
    assert record["kl_predicted"] > 0.05
    assert record["shots"] == 1
    assert any(line.startswith("one shot: the curvature of all layers") for line in told)
    told.clear()
    with pytest.raises(InputError, match=r"shots is 3, and the curvature of all layers at a time .* use shots 1"):
        run(recipe("llama", **fields, shots=3, overwrite=True), echo=told.append)
    assert "- curvature" not in told


def test_a_user_who_says_how_much_memory_there_is_is_believed(recipe, monkeypatch):
    """Half of what is free would hold no layer."""
    monkeypatch.setattr(estimate, "_half_of_free", lambda device: 4)
    assert run(recipe("llama", max_memory=1.0))["shots"] == 1


def test_too_few_windows_for_the_processes_are_noticed_before_the_work(recipe, monkeypatch):
    monkeypatch.setattr(ranks, "join", lambda *processes: None)
    monkeypatch.setattr(ranks, "count", lambda: 16)
    told = []
    with pytest.raises(InputError, match=r"16 processes take 16 of the 24 per step; add --samples, start fewer"):
        run(recipe("llama", samples=24), echo=told.append)
    assert "- curvature" not in told


def test_a_reconstruction_follows_one_shot(recipe):
    record = run(recipe("llama"))
    assert record["shots"] == 1
    assert record["corrections"] == []


def test_permuted_run(recipe):
    """The dense figures are those of the model as it was, and the result loads and is valid."""
    plain = run(recipe("llama", pattern="2:4", permute=False))
    made = recipe("llama", pattern="2:4", overwrite=True)
    record = run(made)
    assert plain["permuted"] == []
    assert record["dense"]["loss"] == pytest.approx(plain["dense"]["loss"], rel=1e-5)
    assert [one["kind"] for one in record["permuted"]] == ["ffn"] * 2 + ["heads"] * 4 + ["stream"]
    assert all(0 < one["kept_before"] <= one["kept_after"] <= 1 for one in record["permuted"])
    assert list(record["stages"])[:4] == ["load", "curvature", "permute", "plan"]
    model = load(made.out)
    assert all(NM(2, 4).is_valid(layer.weight != 0) for layer in prunable_layers(model))


def test_parameters_that_were_asked_for(recipe):
    dense = llama().num_parameters()
    record = run(recipe(structured="ffn,heads", target_params=int(0.7 * dense), multiple=1))
    assert record["parameters"]["dense"] == dense
    assert 0.65 * dense < record["parameters"]["pruned"] <= 0.7 * dense


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("gpt2", {"structured": "heads"}, "use --structured ffn"),
        ("llama", {"structured": "ffn", "ignore": ("*.down_proj",)}, "no FFN of LlamaForCausalLM"),
        ("llama", {"structured": "ffn", "target_params": 10**6}, "--target-params is 1,000,000"),
        (
            "llama",
            {"structured": "ffn", "target_params": 100},
            r"-params must be \d,\d\d\d at least; ask for that",
        ),
        ("llama", {"structured": "ffn", "sparsity": 0.9}, r"so --sparsity can be 0\.5\d* at most; ask for that"),
    ],
    ids=["heads", "ffn", "parameters", "few parameters", "sparsity"],
)
def test_structured_runs_are_refused_before_the_work(model, fields, message, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "evaluate", lambda *a, **k: pytest.fail("the work began"))
    with pytest.raises(InputError, match=message):
        run(recipe(model, **fields))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"sparsity": 0.9}, r"--sparsity can be ([\d.]+) at most"),
        ({"target_params": 99}, r"params must be ([\d,]+) at least"),
    ],
    ids=["sparsity", "parameters"],
)
def test_the_limit_that_is_told_can_be_reached(fields, most, recipe):
    made = {"structured": "ffn", "reconstruct": 0, "shots": 1, "refit": False}
    with pytest.raises(InputError) as refused:
        run(recipe("llama", **made, **fields))
    number = re.search(most, str(refused.value))[1].replace(",", "")
    record = run(recipe("llama", **made, **{name: type(value)(number) for name, value in fields.items()}))
    assert record["parameters"]["pruned"] < record["parameters"]["dense"]


def test_what_was_cut_keeps_its_code_when_it_is_pruned(recipe, tmp_path):
    """The model card of a sparse model whose blocks have widths of their own tells how to load it."""
    run(recipe("llama", structured="ffn,heads", sparsity=0.4, widths="per-layer", shots=1))
    made = recipe(str(tmp_path / "out"), out=str(tmp_path / "again"))
    record = run(made)
    assert record["own_code"]
    card = (tmp_path / "again" / "README.md").read_text()
    assert 'from_pretrained("THIS_FOLDER", trust_remote_code=True)' in card
    model = AutoModelForCausalLM.from_pretrained(made.out, trust_remote_code=True)
    assert all(bool((layer.weight == 0).any()) for layer in prunable_layers(model))


def test_what_flatters_the_figures_is_told(recipe, place, tmp_path):
    told = []
    (tmp_path / "short.txt").write_text((place / "text.txt").read_text()[:100])
    text = str(tmp_path / "short.txt")
    run(recipe(data=text, eval_data=text, samples=2, reconstruct=0), echo=told.append)
    assert "data and eval_data are one text: the model is measured on what it is calibrated on" in told
    few = [line for line in told if "fewer than model.layers.0.mlp.down_proj has inputs (48)" in line]
    assert len(few) == 1
    assert "the calibration has 32 tokens" in few[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_data": "nowhere.txt"}, r"nowhere\.txt"),
        ({"ignore": ("nothing.*",)}, r"the layer pattern 'nothing\.\*' matches none"),
        ({"seqlen": 4096}, r"--seqlen is 4096, and the model's context is 256"),
    ],
    ids=["text", "pattern", "context"],
)
def test_what_needs_no_tokens_is_checked_before_there_are_any(fields, message, recipe, monkeypatch):
    monkeypatch.setattr(inputs, "token_stream", lambda *a: pytest.fail("the text was tokenised"))
    with pytest.raises(InputError, match=message):
        run(recipe(**fields))


# --- options


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_seed_draws_the_labels_too(fisher, recipe, place, tmp_path):
    """A text of 17 tokens has one window of 16, so only sampled labels can differ from seed to seed."""
    (tmp_path / "short.txt").write_text("abcd efgh jkl abc")
    made = recipe(data=str(tmp_path / "short.txt"), eval_data=str(place / "text.txt"), fisher=fisher, samples=4)
    results = []
    for seed in (0, 1):
        run(dataclasses.replace(made, out=str(tmp_path / f"seed{seed}"), seed=seed))
        results.append(bytes_of(tmp_path / f"seed{seed}"))
    assert (results[0] == results[1]) == (fisher == "empirical")


def test_damping_reaches_every_factor(recipe, tmp_path):
    results = []
    for damping in (0.03, 0.3):
        out = str(tmp_path / str(damping))
        record = run(recipe(pattern="2:4", damping=damping, out=out))
        used = [(d["factor"], d["relative"]) for entry in record["layers"].values() for d in entry["damping"]]
        assert used == [("A", damping), ("G", damping)] * len(record["layers"])
        results.append(bytes_of(out))
    assert results[0] != results[1]


@pytest.mark.parametrize("pattern", ["2:4", "3:7", "1:50"])
def test_width_that_is_no_multiple_of_m_is_reported_and_valid(pattern, recipe, tmp_path):
    n, m = map(int, pattern.split(":"))
    folder = save(lambda: llama(intermediate_size=50), tmp_path / "wide")
    lines = []
    made = recipe(model=str(folder), pattern=pattern)
    record = run(made, echo=lines.append)
    for name, weight in matrices(load(made.out)).items():
        entry, width = record["layers"][name], weight.shape[1]
        assert entry["groups_fit"] == (width % m == 0), name
        assert width == (50 if "down_proj" in name else 32)
        counts = group_counts(weight, m)
        assert int(counts.max()) <= n, name
        # full groups keep exactly n, the last one what it can
        assert int(counts.sum()) == weight.shape[0] * (width // m * n + min(width % m, n)), name
    table = next(line for line in lines if line.startswith("layer"))
    noted = [row.split()[0] for row in table.splitlines() if "no multiple of m" in row]
    assert noted == [name for name, entry in record["layers"].items() if not entry["groups_fit"]]
    assert noted


def test_ignored_layers_stay_bit_identical(recipe):
    made = recipe(ignore=("*.mlp.*", "model.layers.1.self_attn.q_proj"))
    record = run(made)
    dense, pruned = matrices(load(made.model)), matrices(load(made.out))
    for name, weight in dense.items():
        ignored = ".mlp." in name or name == "model.layers.1.self_attn.q_proj"
        assert (name not in record["layers"]) == ignored
        assert torch.equal(weight, pruned[name]) == ignored, name
    assert record["sparsity"] == pytest.approx(0.5, abs=1e-3)  # of the layers that take part


def test_include_and_ignore_together(recipe):
    record = run(recipe(include=("*.mlp.*",), ignore=("*down*",)))
    assert sorted(record["layers"]) == [f"model.layers.{i}.mlp.{k}_proj" for i in (0, 1) for k in ("gate", "up")]


@pytest.mark.parametrize(
    ("method", "refit"), [*((method, None) for method in METHODS), ("kfac", True), ("layerwise", True)]
)
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_sparsity_zero_changes_no_bit(model, method, refit, recipe):
    made = recipe(model, sparsity=0, method=method, refit=refit)
    record = run(made)
    assert bytes_of(made.out) == bytes_of(made.model)
    assert record["kl_measured"] == record["kl_predicted"] == record["sparsity"] == 0


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_a_pattern_may_leave_layers_dense(model, recipe):
    made = recipe(model, pattern="2:4", sparsity=0.4)
    record = run(made)
    pruned = matrices(load(made.out))
    sizes = {name: weight.numel() for name, weight in pruned.items()}
    untouched = [name for name, weight in pruned.items() if (weight != 0).all()]
    for name, weight in pruned.items():
        assert name in untouched or (group_counts(weight, 4) == 2).all()
        assert record["layers"][name]["sparsity"] == (0 if name in untouched else 0.5)
        assert (record["layers"][name]["predicted_loss"] == 0) == (name in untouched)
    assert untouched
    assert record["allocation"] == "curves"
    assert record["sparsity"] == pytest.approx(0.5 - sum(sizes[n] for n in untouched) / 2 / sum(sizes.values()))
    assert 0.4 <= record["sparsity"] < 0.5
    assert f"in the pattern 2:4, {len(untouched)} of them dense" in (Path(made.out) / "README.md").read_text()
    again = dataclasses.replace(Recipe(**read_recipe(str(Path(made.out) / "recipe.yaml"))), overwrite=True)
    assert run(again)["layers"] == record["layers"]


@pytest.mark.parametrize("sparsity", [0.01, 0.9, 0.99])
def test_extreme_sparsities(sparsity, recipe):
    record = run(recipe(sparsity=sparsity))
    assert record["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert all(entry["sparsity"] < 1 for entry in record["layers"].values())
    assert math.isfinite(record["kl_measured"])


def test_sixteen_bit_model_is_saved_in_sixteen_bits(recipe, tmp_path):
    made = recipe(dtype="bfloat16", pattern="2:4")
    record = run(made)
    stored = load_file(Path(made.out) / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all((group_counts(w, 4) <= 2).all() for w in matrices(load(made.out)).values())
    assert record["sparsity"] == 0.5
    # and from a checkpoint that is in bfloat16 already, "auto" keeps it
    run(recipe(model=made.out, out=str(tmp_path / "second"), pattern="2:4", method="magnitude"))
    assert bytes_of(tmp_path / "second") == bytes_of(made.out)  # what is 2:4 stays as it is


# --- output folders


def listing(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_existing_output_needs_overwrite(recipe, tmp_path):
    made = recipe(method="magnitude")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        run(made)
    with pytest.raises(InputError, match=r"holds no kfac_prune\.json"):
        run(dataclasses.replace(made, overwrite=True))
    assert listing(tmp_path) == {"out/precious.txt": b"mine"}
    (tmp_path / "out" / "kfac_prune.json").write_text("{}")
    run(dataclasses.replace(made, overwrite=True))
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} >= WRITTEN
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_empty_folder_and_missing_parents_are_fine(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    run(recipe(method="magnitude"))
    run(recipe(method="magnitude", out=str(tmp_path / "a" / "b" / "c")))
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {"c"}


@pytest.mark.parametrize("stage", ["save_model", "verify_saved", "model_card"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_failure_while_saving_leaves_everything_as_it_was(stage, error, existing, recipe, tmp_path, monkeypatch):
    if existing:
        (tmp_path / "out").mkdir()
        for name in ("kfac_prune.json", "precious.txt"):
            (tmp_path / "out" / name).write_text("mine")
    before = listing(tmp_path)
    original = getattr(pipeline, stage)

    def fails(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    monkeypatch.setattr(pipeline, stage, fails)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        run(recipe(method="magnitude", overwrite=True))
    after = {name: content for name, content in listing(tmp_path).items() if not name.startswith("out.work/plan-")}
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.work"][0 if existing else 1 :]


@contextmanager
def full_disk(limit=4096):
    """No file can become larger, which fails as a full disk does, only with another reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", ["save_model", "make_plan", "write_factors", "write_planned", "reconstruct_sparse"])
def test_a_full_disk_loses_nothing(stage, recipe, tmp_path, monkeypatch):
    made = recipe("llama", reconstruct=1, pattern="2:4")
    run(made)
    where = pipeline.resume if stage.startswith("write_") else pipeline
    before, original = listing(tmp_path), getattr(where, stage)

    def fails(*args, **kwargs):
        with full_disk():
            return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, stage, fails)
        with pytest.raises(InputError, match=r"cannot be written \(.*File too large.*--resume goes on"):
            run(dataclasses.replace(made, overwrite=True))
    after = listing(tmp_path)
    assert {name: content for name, content in after.items() if not name.startswith("out.work")} == before
    assert not any(name.endswith(".partial") for name in after)
    run(dataclasses.replace(made, overwrite=True, resume=True))
    assert bytes_of(made.out) == before["out/model.safetensors"]


def test_a_checkpoint_that_does_not_reload_is_not_kept(recipe, tmp_path, monkeypatch):
    original = pipeline.save_model

    def loses_a_bit(model, tokenizer, folder):
        original(model, tokenizer, folder)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(bytes(data))

    monkeypatch.setattr(pipeline, "save_model", loses_a_bit)
    with pytest.raises(RuntimeError, match=r"differs in .* after reloading"):
        run(recipe(method="magnitude"))
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]


def test_full_disk_is_noticed_before_the_work(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(pipeline, "estimate_factors", lambda *a, **k: pytest.fail("the work began"))
    with pytest.raises(InputError, match="GB free; make room"):
        run(recipe())
    assert list(tmp_path.iterdir()) == []


# --- data


@pytest.mark.parametrize("length", [330, 331, 339, 1000, 12_345])
def test_without_eval_data_the_last_tenth_is_held_out(length, recipe, monkeypatch):
    monkeypatch.setattr(inputs, "token_stream", lambda *args: torch.arange(length))  # a token is its position
    calibration, held = load_data(recipe(samples=500, eval_samples=10_000), letter_tokenizer())
    used, kept = set(calibration.input_ids.flatten().tolist()), held.input_ids.flatten().tolist()
    assert not used & set(kept)
    assert max(used) < min(kept)
    assert kept == list(range(length - length // 10, length - length // 10 + len(kept)))
    assert len(kept) == length // 10 // 16 * 16


def test_held_out_text_never_reaches_the_factors(recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 900 + "wxyz" * 100)
    made = recipe(data=str(text), eval_samples=1000)
    calibration, held = load_data(made, letter_tokenizer())
    letters = [{LETTERS[i - 3] for i in w.input_ids.unique().tolist()} for w in (calibration, held)]
    assert letters == [set("abcd"), set("wxyz")]
    assert held.input_ids.numel() == 400
    assert run(made)["calibration"]["sha256"] == calibration.sha256()


def test_with_eval_data_all_of_data_calibrates(recipe, tmp_path):
    (tmp_path / "train.txt").write_text("a" * 990 + "b" * 10)
    (tmp_path / "test.jsonl").write_text(json.dumps({"story": "wxyz" * 40}) + "\n")
    made = recipe(data=str(tmp_path / "train.txt"), eval_data=str(tmp_path / "test.jsonl"), text_field="story",
                  samples=2000)  # fmt: skip
    calibration, held = load_data(made, letter_tokenizer())
    vocabulary = letter_tokenizer().get_vocab()
    assert vocabulary["b"] in calibration.input_ids
    assert held.input_ids[0].tolist()[:5] == [1, *(vocabulary[c] for c in "wxyz")]


# --- the Python interface


def test_quick_start_of_the_docstring_runs(place, tmp_path, monkeypatch):
    shutil.copytree(place / "llama", tmp_path / "folder")
    shutil.copy(place / "text.txt", tmp_path / "train.txt")
    monkeypatch.chdir(tmp_path)
    code = [line[4:] for line in kfac_prune.__doc__.splitlines() if line.startswith("    ")]
    assert len(code) == 9
    names = {name: getattr(kfac_prune, name) for name in kfac_prune.__all__} | {"Path": Path}
    before = bytes_of("folder")
    plan_made = next(i for i, line in enumerate(code) if "make_plan" in line)
    exec("\n".join(code[: plan_made + 1]), names)
    dense = matrices(load("folder"))
    assert all(torch.equal(layer.weight, dense[layer.name]) for layer in names["layers"])  # nothing has changed yet
    exec("\n".join(code[plan_made + 1 :]), names)
    assert bytes_of("folder") == before
    weights = matrices(load("pruned"))
    assert sum(int((w == 0).sum()) for w in weights.values()) == pytest.approx(
        sum(w.numel() for w in weights.values()) / 2, abs=len(weights)
    )
    for layer in prunable_layers(load("pruned")):
        assert torch.equal(layer.weight != 0, names["plan"].layers[list(weights).index(layer.name)].mask)


def test_run_needs_only_model_data_and_out(place, tmp_path):
    """The docstring's one-line form, with every default."""
    made = Recipe(model=str(place / "llama"), data=str(place / "text.txt"), out=str(tmp_path / "out"), seqlen=64)
    record = kfac_prune.run(made)
    assert record["kl_measured"] > 0
    assert record["calibration"]["tokens"] == 128 * 64


@pytest.mark.parametrize("name", kfac_prune.__all__)
def test_public_names_resolve(name):
    assert not inspect.ismodule(getattr(kfac_prune, name))
    assert getattr(kfac_prune, name).__name__ == name


def test_public_names_are_listed_once_and_others_are_refused():
    assert len(set(kfac_prune.__all__)) == len(kfac_prune.__all__)
    assert set(kfac_prune.__all__) == set(kfac_prune._HOME)
    with pytest.raises(AttributeError, match="'kfac_prune' has no attribute 'nonsense'"):
        _ = kfac_prune.nonsense


def test_importing_the_package_loads_no_torch():
    code = "import sys, kfac_prune; print(*sorted({'torch', 'transformers', 'yaml', 'triton'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""
