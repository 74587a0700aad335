"""Channel permutations: the function stays, factors follow, and the search finds what brute force finds."""

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from conftest import random_windows
from families import COUPLED, FAMILIES, HIDDEN, Family, random_model
from transformers import AutoModelForCausalLM, LlamaConfig

from kfac_prune import permute
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.permute import find_permutation, kept_score, permute_model
from kfac_prune.plan import make_plan, prune
from kfac_prune.structure.spaces import KINDS, Axis, find_spaces

TEXT_FAMILIES = {name: f for name, f in FAMILIES.items() if f.auto is AutoModelForCausalLM} | {"olmo2": COUPLED}
WIDE_HEADS = {"llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"}  # width 4
WINDOWS = random_windows(3, 9)


def heavy(rows, columns, seed):
    """Scores [rows, columns] that differ by column and by weight."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread).square()


def kept_by_hand(scores, order, n, m):
    """The sum of the n largest of every m, row by row."""
    rows = scores[:, order].tolist()
    return sum(sum(sorted(row[i : i + m])[-n:]) for row in rows for i in range(0, len(row), m))


# --- the search


@pytest.mark.parametrize("seed", range(8))
def test_search_against_all_ways_to_split_eight_channels(seed):
    """Never above the best of the 35 splits; for one or two rows swaps always reach it."""
    for rows in (1, 2, 7):
        scores = heavy(rows, 8, seed)
        splits = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
        orders = [[*first, *(i for i in range(8) if i not in first)] for first in splits]
        best = max(kept_by_hand(scores, order, 2, 4) for order in orders)
        found = find_permutation([scores], NM(2, 4), seed=seed)
        kept = kept_by_hand(scores, found, 2, 4)
        assert sorted(found.tolist()) == list(range(8))
        assert kept_by_hand(scores, list(range(8)), 2, 4) <= kept <= best * (1 + 1e-12)
        assert rows > 2 or kept == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 20), (2, 4, 23), (1, 2, 10), (4, 8, 32), (3, 4, 13), (1, 4, 12)])
def test_no_single_swap_improves_the_result(n, m, width):
    scores = heavy(5, width, width)
    found = find_permutation([scores[:2], scores[2:]], NM(n, m)).tolist()
    whole = width - width % m
    assert sorted(found) == list(range(width))
    assert found[whole:] == list(range(whole, width))  # a shorter last group stays
    kept = kept_by_hand(scores, found, n, m)
    assert kept == pytest.approx(kept_score(scores[:, found], NM(n, m)), rel=1e-12)
    assert kept > kept_by_hand(scores, list(range(width)), n, m)
    for i, j in itertools.combinations(range(whole), 2):
        swapped = list(found)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert kept_by_hand(scores, swapped, n, m) <= kept * (1 + 1e-12)


@pytest.mark.parametrize(
    "scores", [torch.ones(3, 12), torch.zeros(3, 12), torch.eye(12)[:3], torch.ones(2, 7)], ids=str
)
def test_ties_zeros_and_a_single_group(scores):
    found = find_permutation([scores], NM(2, 4))
    assert sorted(found.tolist()) == list(range(scores.shape[1]))
    assert kept_score(scores[:, found], NM(2, 4)) >= kept_score(scores, NM(2, 4))


def test_little_work_still_never_loses():
    scores = heavy(6, 64, 0)
    kept = [kept_score(scores[:, find_permutation([scores], NM(2, 4), work=w)], NM(2, 4)) for w in (0, 1e5, 1e8)]
    assert kept_score(scores, NM(2, 4)) <= kept[0] < kept[1] <= kept[2]


# --- models


@pytest.fixture
def all_float64(monkeypatch):
    """Norms and factors, which compute in float32 whatever the model's dtype is, compute in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def logits(model):
    with torch.no_grad():
        return model(WINDOWS.input_ids).logits


def ties(model):
    """Names that share a tensor."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return sorted(map(sorted, names.values()))


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_function_factors_and_ties_stay(name, all_float64, monkeypatch, tmp_path):
    model = random_model(TEXT_FAMILIES[name], torch.float64)
    layers, pattern = prunable_layers(model), NM(2, 4)
    factors, expected, shared = estimate_factors(model, layers, WINDOWS), logits(model), ties(model)
    old = {layer.name: layer.weight.clone() for layer in layers}
    made = permute_model(model, layers, factors, pattern, WINDOWS)
    counts = {kind: sum(one.kind == kind for one in made) for kind in KINDS}
    assert counts == {"ffn": 2, "heads": 6 if name in WIDE_HEADS else 0, "stream": 1}
    assert all(sorted(one.permutation.tolist()) == list(range(len(one.permutation))) for one in made)
    assert all(one.after >= one.before for one in made)
    assert all(one.after > one.before for one in made if one.kind != "heads")
    assert any(not torch.equal(layer.weight, old[layer.name]) for layer in layers)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert ties(model) == shared
    again = estimate_factors(model, layers, WINDOWS)
    for block, g in factors.streams.items():
        torch.testing.assert_close(g, again.streams[block], rtol=1e-9, atol=1e-12 * float(g.abs().max()))
    for layer in layers:
        one, other = factors.layers[layer.name], again.layers[layer.name]
        for field in ("a", "g", "mean"):
            want = getattr(other, field)
            torch.testing.assert_close(getattr(one, field), want, rtol=0, atol=1e-11 * float(want.abs().max()))
    monkeypatch.undo()
    prune(layers, make_plan(layers, factors, pattern=pattern))
    assert all(pattern.is_valid(layer.weight != 0) for layer in layers)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert ties(loaded) == shared


def test_kept_shares_are_those_of_the_scores(all_float64):
    """``before`` and ``after`` from the weights and factors themselves, for an FFN."""
    model = random_model(FAMILIES["llama"], torch.float64)
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, WINDOWS)
    down = next(layer for layer in layers if layer.name == "model.layers.1.mlp.down_proj")

    def share():
        operator, _ = factors.layers[down.name].operator("kfac", Damping(), where="", dtype=torch.float64)
        root = [(f.diagonal() / f.inverse().diagonal()) ** 0.5 for f in (operator.g, operator.a)]
        scores = down.weight.square() * torch.outer(*root)
        return kept_by_hand(scores, list(range(40)), 2, 4) / float(scores.sum())

    before = share()
    made = permute_model(model, layers, factors, NM(2, 4), WINDOWS, kinds=["ffn"])
    assert (made[1].before, made[1].after) == pytest.approx((before, share()), rel=1e-6)


def test_the_heads_of_an_attention_share_its_curvature(monkeypatch):
    """It is factored once, and every group of heads is scored as if it had been factored for that group."""
    done, factored, scores = [], [], permute._scores

    def counted(layer, factors, **options):
        factored.append(layer.name)
        return scores(layer, factors, **options)

    monkeypatch.setattr(permute, "_scores", counted)
    for cached in (lru_cache, lambda size: lambda function: function):
        monkeypatch.setattr(permute, "lru_cache", cached)
        factored.clear()
        model = random_model(FAMILIES["llama"])
        layers = prunable_layers(model)
        factors = estimate_factors(model, layers, WINDOWS)
        done.append((permute_model(model, layers, factors, NM(1, 2), WINDOWS, kinds=["heads"]), list(factored)))
    (once, first), (anew, second) = done
    outputs = [f"model.layers.{block}.self_attn.o_proj" for block in range(2)]
    assert first == outputs
    assert second == sorted(outputs * 6)  # both query heads of three groups
    assert any(one.after > one.before for one in once)
    for mine, theirs in zip(once, anew, strict=True):
        assert torch.equal(mine.permutation, theirs.permutation)
        assert mine.after == pytest.approx(theirs.after, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_readers_that_are_pruned_count(kind):
    model = random_model(FAMILIES["llama"])
    layers = prunable_layers(model, include=["*.k_proj"])  # reads the stream and nothing else
    factors = estimate_factors(model, layers, WINDOWS)
    made = permute_model(model, layers, factors, NM(2, 4), WINDOWS, kinds=[kind])
    assert [one.kind for one in made] == (["stream"] if kind == "stream" else [])


def test_a_space_that_changes_the_function_is_undone(monkeypatch, caplog):
    """Rotary embeddings forbid to permute rows of queries alone."""
    model = random_model(FAMILIES["llama"])
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, WINDOWS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a = {name: layer.a.clone() for name, layer in factors.layers.items()}
    real = find_spaces

    def wrong(model, kind, m):
        query = Axis(next(layer for layer in layers if "q_proj" in layer.name), 0)
        return [replace(s, axes=(*s.axes, query)) if s.kind == "stream" else s for s in real(model, kind, m)]

    monkeypatch.setattr(permute, "find_spaces", wrong)
    made = permute_model(model, layers, factors, NM(2, 4), WINDOWS, kinds=["stream"])
    assert made == []
    assert "stream is left as it was" in caplog.text
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(layer.a, a[name]) for name, layer in factors.layers.items())


def test_a_stream_with_an_unknown_reader_stays():
    model = random_model(FAMILIES["llama"])
    model.model.layers[0].mlp.extra = torch.nn.Linear(HIDDEN, HIDDEN)
    assert find_spaces(model, "stream", 4) == []
    assert len(find_spaces(model, "ffn", 4)) == 2


def test_heads_that_hold_no_whole_groups_stay():
    narrow = Family(lambda: LlamaConfig(vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                        num_attention_heads=4), "", {}, ())  # fmt: skip
    assert find_spaces(random_model(narrow), "heads", 4) == []
    assert len(find_spaces(random_model(narrow), "heads", 3)) == 8
