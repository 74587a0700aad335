"""Text that a model writes itself: samples of its own distribution, whatever the batches, and what is learnt on it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import CONTEXT, build, random_windows
from letters import save_llama
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from kfac_prune import block_training, own_text, ranks, reconstruction
from kfac_prune.block_training import BlockTraining, Reconstruction
from kfac_prune.compare import compare
from kfac_prune.config import OWN_TEXT, Recipe
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.errors import InputError
from kfac_prune.experts import split_experts
from kfac_prune.fisher import sample_labels
from kfac_prune.models import prunable_layers
from kfac_prune.objective import CAUSAL, Tokens
from kfac_prune.obs import NM
from kfac_prune.own_text import PROMPT, continued, own_text_of
from kfac_prune.pipeline import run
from kfac_prune.plan import make_plan, prune
from kfac_prune.protocol import Comparison
from kfac_prune.reconstruction import reconstruct_sparse, with_own_text
from kfac_prune.structure.prune import Settings, prune_structured, weights_target
from kfac_prune.structure.repair import reconstruct_smaller

KEPT = CONTEXT // PROMPT


def written(model, windows, copies=2, **options):
    return continued(model, windows, copies, **options).input_ids


@torch.no_grad()
def by_hand(model, prompts, draws):
    """Token after token from whole forward passes, no keys and values kept."""
    ids = prompts
    for position in range(prompts.shape[1], draws.shape[1]):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, sample_labels(logits, draws[:, position])[:, None]], dim=1)
    return ids


def test_every_token_is_a_sample_of_the_model_given_those_before(family):
    model, windows = build(family, dtype=torch.float64), random_windows(5, CONTEXT)
    draws = torch.rand(5, 2, CONTEXT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    draws = draws.transpose(0, 1).flatten(0, 1)
    expected = by_hand(model, windows.input_ids[:, :KEPT].repeat(2, 1), draws)
    assert torch.equal(written(model, windows, seed=7), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [2, 3, 8, 9])
def test_short_windows_in_sixteen_bits(length, dtype):
    model, windows = build("llama", dtype=dtype), random_windows(4, length)
    text = written(model, windows, 3)
    assert text.shape == (12, length)
    assert torch.equal(text[:, :1], windows.input_ids[:, :1].repeat(3, 1))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name):
    family = families.FAMILIES[name]
    if family.auto is not AutoModelForCausalLM:
        pytest.skip("writes no text")
    model = families.random_model(family, dtype=torch.float64)
    split_experts(model)
    windows = random_windows(3, CONTEXT)
    draws = torch.rand(1, 3, CONTEXT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    expected = by_hand(model, windows.input_ids[:, :KEPT], draws)
    assert torch.equal(written(model, windows, 1), expected)


def test_neither_batches_nor_the_models_own_settings_matter(monkeypatch):
    model, windows = build("llama", dtype=torch.float64), random_windows(5, CONTEXT)
    expected = written(model, windows)
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=3.0, eos_token_id=list(range(40)))
    model.generation_config = own
    monkeypatch.setattr(own_text, "CACHE_BYTES", 1)  # one window at a time
    torch.manual_seed(5)
    assert torch.equal(written(model, windows), expected)
    assert model.generation_config is own
    assert not torch.equal(written(model, windows, seed=1), expected)


def test_every_window_is_continued_in_other_ways():
    model, windows = build("llama"), random_windows(4, CONTEXT)
    text = written(model, windows, 3)
    assert text.shape == (12, CONTEXT)
    assert torch.equal(text[:, :KEPT], windows.input_ids[:, :KEPT].repeat(3, 1))
    assert len({tuple(row) for row in text.tolist()}) == 12


def test_two_processes_write_what_one_would(monkeypatch):
    """Also where one would write for a window more."""
    model, windows = build("llama", dtype=torch.float64), random_windows(7, CONTEXT)
    alone = written(model, windows).view(2, 7, CONTEXT)[:, :6]
    windows = windows.chosen(range(6))
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "index", lambda rank=rank: rank)
        assert torch.equal(written(model, windows.every(2, rank)).view(2, 3, CONTEXT), alone[:, rank::2])


def test_what_is_held_out_is_not_continued():
    model, windows = build("llama"), random_windows(23, CONTEXT)
    found, further = with_own_text(model, windows, 2, Reconstruction(1, own_text=2))
    assert further == 2 * 11  # of twelve batches, the last of a single window, one is held out
    assert torch.equal(found.input_ids[44:], windows.input_ids)
    assert torch.equal(found.input_ids[:44, :KEPT], windows.input_ids[:22, :KEPT].repeat(2, 1))
    assert with_own_text(model, windows, 2, Reconstruction(1)) == (windows, 0)


def test_padding_of_windows_that_are_held_out_stays():
    windows = random_windows(12, 9, lengths=(9,) * 11 + (4,))
    found, further = with_own_text(build("llama"), windows, 1, Reconstruction(2, own_text=1))
    assert further == 11
    assert found.attention_mask[:22].all()
    assert torch.equal(found.attention_mask[11:], windows.attention_mask)


def test_epochs_take_no_more_steps_and_see_all_text_before_any_again(monkeypatch):
    parameter = torch.nn.Parameter(torch.zeros(1))
    part = SimpleNamespace(trained=[], metric=torch.eye(1))
    weights = SimpleNamespace(parameters=[parameter])
    monkeypatch.setattr(block_training, "MaskedParameters", lambda *arguments: weights)
    problem = BlockTraining(None, 0, part, list(range(60)), {}, further=40)
    assert (problem._train, problem._held, problem._steps) == (range(58), range(58, 60), 18)
    order = problem._order(0)
    seen = [next(order) for _ in range(116)]
    assert sorted(seen[:58]) == sorted(seen[58:]) == list(range(58))
    assert seen[:58] != seen[58:]


def test_it_learns_on_it(monkeypatch):
    """Steps are taken on both kinds of text, and the state is chosen on the held-out windows alone."""
    model, windows = build("llama"), random_windows(20, CONTEXT)
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, pattern=NM(2, 4), method="magnitude")
    dense = prune(layers, plan)
    loss, steps, looked = BlockTraining._loss, set(), set()

    def seen(self, batch):
        (steps if torch.is_grad_enabled() else looked).add(batch.number)
        return loss(self, batch)

    monkeypatch.setattr(BlockTraining, "_loss", seen)
    settings = Reconstruction(6, own_text=1)
    records = reconstruct_sparse(model, plan, factors, windows, dense.swapped_in, settings)
    assert steps == set(range(36))  # 18 batches of a window, and as many of the model's own
    assert looked == {36, 37}
    assert all(record.after < record.before for record in records)


def test_smaller_models_learn_on_text_of_the_dense_one(monkeypatch):
    model, windows = build("llama"), random_windows(20, CONTEXT)
    layers = prunable_layers(model)
    factors, writers = estimate_factors(model, layers, windows), []
    best, _ = prune_structured(model, layers, windows, weights_target(model, layers, 0.2), settings=Settings(shots=1))
    original = reconstruction.continued

    def seen(writer, *arguments, **options):
        writers.append(writer)
        return original(writer, *arguments, **options)

    monkeypatch.setattr(reconstruction, "continued", seen)
    records = reconstruct_smaller(model, best.model, layers, factors, windows, Reconstruction(4, own_text=2))
    assert writers == [model]
    assert all(record.after <= record.before for record in records)


# --- the option


def recipe(**fields):
    return Recipe(model="m", data="d", out="o", **fields).resolved()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OWN_TEXT),
        ({"reconstruct": 2}, 1),  # more would not be seen
        ({"reconstruct": 1}, 0),
        ({"own_text": 3}, 3),
        ({"own_text": 3, "reconstruct": 0}, 0),
        ({"own_text": 0}, 0),
        ({"reconstruct": 0}, 0),
        ({"samples": 15}, 0),
        ({"method": "wanda"}, 0),
        ({"method": "wanda", "reconstruct": 5}, OWN_TEXT),
        ({"offload": True}, 0),
        ({"structured": "ffn"}, OWN_TEXT),
    ],
    ids=str,
)
def test_by_default_causal_models_write_what_is_reconstructed_on(fields, expected):
    assert own_text_of(recipe(**fields), CAUSAL, writes=True) == expected


@pytest.mark.parametrize(("objective", "writes"), [(Tokens(causal=False), True), (CAUSAL, False)])
def test_models_that_write_no_text(objective, writes):
    assert own_text_of(recipe(), objective, writes=writes) == 0
    with pytest.raises(InputError, match=r"own_text is 2, and a model .* writes no text; use --own-text 0"):
        own_text_of(recipe(own_text=2), objective, writes=writes)


def test_offload_brings_no_block_for_every_token():
    with pytest.raises(InputError, match=r"own_text 1 needs the whole model there; drop one of them"):
        recipe(offload=True, own_text=1)
    assert recipe(offload=True, own_text=1, reconstruct=0).own_text == 1


def test_padded_text_is_not_continued():
    with pytest.raises(InputError, match=r"windows are padded, .* use --own-text 0"):
        continued(build("llama"), random_windows(2, 9, lengths=(9, 4)), 1)


def test_encoders_write_nothing():
    with pytest.raises(InputError, match="BertModel writes no text; use --own-text 0"):
        continued(AutoModel.from_config(families.FAMILIES["bert"].config()), random_windows(2, 9), 1)


def test_a_model_that_cannot_write_is_named_before_any_long_work(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc def " * 500)
    small = {"samples": 16, "eval_samples": 4, "seqlen": 16, "device": "cpu"}
    made = Recipe(model=str(tmp_path / "model"), data=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), **small)

    def fails(*arguments, **options):
        raise NotImplementedError("no cache")

    comparison = Comparison(made, levels=["50%"], methods=["kfac"])
    with monkeypatch.context() as patch:
        patch.setattr("transformers.GenerationMixin.generate", fails)
        patch.setattr("kfac_prune.pipeline.estimate_factors", None)
        with pytest.raises(InputError, match=r"LlamaForCausalLM cannot write text \(no cache\); use --own-text 0"):
            run(made)
        with pytest.raises(InputError, match=r"LlamaForCausalLM cannot write text \(no cache\); use --own-text 0"):
            compare(dataclasses.replace(comparison, recipe=dataclasses.replace(made, reconstruct=1)))
        patch.setattr("transformers.GenerationMixin.generate", lambda self, ids, **options: ids)
        with pytest.raises(InputError, match=r"cannot write text \(\[1, 1\] tokens instead of \[1, 9\]\); use"):
            run(made)
    plain = run(dataclasses.replace(made, reconstruct=0, own_text=2))
    assert plain["calibration"]["own_text"] == 0
    record = run(dataclasses.replace(made, reconstruct=3, overwrite=True))
    assert record["calibration"]["own_text"] == OWN_TEXT
    assert "calibration tokens, further text written by the dense model)" in (Path(made.out) / "README.md").read_text()
    assert "own_text: 2" in (Path(made.out) / "recipe.yaml").read_text()
