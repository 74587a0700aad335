"""Tiny models of many families: pruned to 50 % and 2:4, saved, reloaded, compared, with the share that is covered."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from families import BLOCKS, FAMILIES, GROUPED, IDS, TEXT, Family, random_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    FalconConfig,
    Gemma3TextConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.experts import split_experts
from kfac_prune.export import save_model, verify_saved
from kfac_prune.inputs import called_layers, reached_layers
from kfac_prune.inspect_model import coverage, describe
from kfac_prune.loading import load
from kfac_prune.models import prunable_layers
from kfac_prune.objective import Classes, find_objective
from kfac_prune.obs import NM
from kfac_prune.plan import make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.stream import BlockStack, find_writers

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
SMALL = {**TEXT, **BLOCKS, "num_attention_heads": 4, "intermediate_size": 40}


def text(config, auto=None):
    return Family(config, "", {}, (), **({"auto": auto} if auto else {}))


BERT = FAMILIES["bert"]
#: As of the models of version 2 (keys and queries of positions of their own) and 3 (shared with those of tokens).
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
MODELS = {
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt")},
    **{name: FAMILIES[name] for name in ("gpt2", "gpt_neox", "bert", "vit")},
    "gemma3": text(lambda: Gemma3TextConfig(**GROUPED)),
    "falcon": text(lambda: FalconConfig(**TEXT, **BLOCKS, num_attention_heads=4, ffn_hidden_size=40)),
    "mixtral": text(lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": text(lambda: Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3_moe": text(lambda: Qwen3MoeConfig(**GROUPED, **EXPERTS)),
    "mamba": text(lambda: MambaConfig(vocab_size=48, **BLOCKS, state_size=4, time_step_rank=4, **IDS)),
    "modernbert": text(lambda: ModernBertConfig(**SMALL, cls_token_id=0, sep_token_id=1), BERT.auto),
    "llama-classes": text(FAMILIES["llama"].config, AutoModelForSequenceClassification),
    "bert-classes": text(lambda: BertConfig(**SMALL), AutoModelForSequenceClassification),
    "bert-encoder": text(BERT.config, AutoModel),
    "deberta_v2": text(lambda: DebertaV2Config(**DEBERTA, share_att_key=False), BERT.auto),
    "deberta_v3-classes": text(
        lambda: DebertaV2Config(**DEBERTA, share_att_key=True, position_biased_input=False),
        AutoModelForSequenceClassification,
    ),
}

#: Share of all parameters of these tiny models that can be pruned. What is left out are embeddings, heads, norms and
#: biases, and what EXTRA names.
COVERED = {
    "llama": 0.792, "mistral": 0.792, "qwen2": 0.785, "qwen3": 0.791, "gemma2": 0.871, "gemma3": 0.869,
    "phi3": 0.792, "opt": 0.798, "gpt2": 0.801, "gpt_neox": 0.747, "falcon": 0.838, "mixtral": 0.910,
    "qwen2_moe": 0.883, "qwen3_moe": 0.868, "mamba": 0.752, "bert": 0.389, "vit": 0.614, 
    "modernbert": 0.891, "llama-classes": 0.875, "bert-classes": 0.803, "bert-encoder": 0.366,
    "deberta_v2": 0.624, "deberta_v3-classes": 0.578,
}  # fmt: skip
EXTRA = {
    "mixtral": r"mlp\.gate\.weight",
    "qwen2_moe": r"mlp\.(shared_expert_)?gate\.weight",
    "qwen3_moe": r"mlp\.gate\.weight",
    "mamba": r"mixer\.(A_log|conv1d\.weight|dt_proj\.weight)",
    "bert-encoder": r"pooler\.dense\.weight",
    "deberta_v2": r"self\.pos_(key|query)_proj\.weight",
    "deberta_v3-classes": r"self\.(key|query)_proj\.weight",
}
OUTSIDE = r"embed|\.wte\.|\.wpe\.|lm_head|classifier\.weight|score\.weight"


@dataclasses.dataclass(frozen=True)
class Pictures(Classes):
    """Classes of pictures, which are told by their numbers in the place of tokens."""

    pictures: torch.Tensor = dataclasses.field(default_factory=lambda: pictures())

    def output(self, model, ids, mask):
        return model(pixel_values=self.pictures[ids[:, 0]]).logits


def pictures():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model on disk and in memory with what pruning needs."""

    name: str
    model: torch.nn.Module
    folder: Path
    objective: object
    windows: Windows
    layers: list
    factors: object
    told: list


@pytest.fixture(scope="module", params=MODELS)
def subject(request, tmp_path_factory):
    name = request.param
    model, folder, told = random_model(MODELS[name]), tmp_path_factory.mktemp(name), []
    split_experts(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if name == "vit":
        windows, objective = Windows(torch.arange(8).unsqueeze(1)), Pictures()
    else:
        windows = Windows(torch.randint(3, 48, (8, 10), generator=torch.Generator().manual_seed(2)))
        objective = find_objective("auto", str(folder), model.config)
    layers = called_layers(model, prunable_layers(model), windows, objective, told.append)
    if objective.unit == "sequence":
        layers = reached_layers(model, layers, windows, objective, told.append)
    factors = estimate_factors(model, layers, windows, objective=objective)
    return Subject(name, model, folder, objective, windows, layers, factors, told)


def outputs(model, subject):
    with torch.no_grad():
        return subject.objective.output(model, subject.windows.input_ids, None)


def test_the_share_that_is_covered(subject):
    name, model = subject.name, subject.model
    names = {f"{layer.name}.weight" for layer in subject.layers}
    share = sum(layer.weight.numel() for layer in subject.layers) / sum(p.numel() for p in model.parameters())
    assert share == pytest.approx(COVERED[name], abs=6e-4)
    rest = [other for other, p in model.named_parameters() if other not in names and p.ndim > 1]
    expected = f"{OUTSIDE}|{EXTRA[name]}" if name in EXTRA else OUTSIDE
    assert [other for other in rest if not re.search(expected, other)] == []
    if name in EXTRA:
        assert {re.search(EXTRA[name], other) for other in rest} != {None}
    said = coverage(model, subject.layers)
    assert f"({share:.1%})" in said
    if name != "vit":
        assert ("three or more dimensions" in said) == (name == "mamba")
    assert [line.split(":")[0] for line in subject.told] == {
        "mamba": ["left dense, since MambaForCausalLM uses their weights without calling them"],
        "bert-encoder": ["left dense, since the objective embedding does not depend on them"],
        "deberta_v2": ["left dense, since DebertaV2ForMaskedLM also calls them on what does not depend on the text"],
        "deberta_v3-classes": [
            "left dense, since DebertaV2ForSequenceClassification also calls them on what does not depend on the text"
        ],
    }.get(name, [])


@pytest.mark.parametrize(
    "subject",
    ["gemma3", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "mamba", "modernbert", "bert-classes"],
    indirect=True,
)
def test_inspect_lists_what_is_covered(subject):
    said = describe(str(subject.folder))
    assert coverage(subject.model, prunable_layers(subject.model)) in said
    assert all(re.search(f"^{re.escape(layer.name)} ", said, re.M) for layer in subject.layers)


WRITERS = {
    "llama": ["o_proj", "down_proj"], "phi3": ["o_proj", "down_proj"], "opt": ["out_proj", "fc2"],
    "gpt2": ["c_proj", "c_proj"], "gpt_neox": ["dense", "dense_4h_to_h"], "falcon": ["dense", "dense_4h_to_h"],
    "mamba": ["out_proj"], "modernbert": ["Wo", "Wo"], "gemma2": [], "mixtral": [], "bert": [],
}  # fmt: skip


@pytest.mark.parametrize("subject", WRITERS, indirect=True)
def test_the_writers_into_the_residual_stream(subject):
    """Falcon adds one writer's output to the other's in place."""
    stack = BlockStack(subject.model, subject.windows, 4)
    for block in (0, 1):
        found = find_writers(stack, block, stack.entries[0], stack.inside(block))
        assert [writer.layer.name.rpartition(".")[2] for writer in found] == WRITERS[subject.name]
        assert [writer.factor for writer in found] == pytest.approx([1] * len(found), abs=1e-3)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["50%", "2:4"])
def test_pruned_saved_and_reloaded(subject, pattern, tmp_path):
    model, layers = subject.model, subject.layers
    before = outputs(model, subject)
    probe = None
    if pattern is not None and subject.name != "vit":
        probe = Probe.on(model, subject.windows, 4, subject.objective)
    plan = make_plan(layers, subject.factors, sparsity=0.5, pattern=pattern, allocation="uniform", probe=probe)
    dense = prune(layers, plan)
    try:
        save_model(model, None, tmp_path)
        if pattern is not None:  # which loads it too
            verify_saved(model, tmp_path)
        reloaded = load(tmp_path).eval()
        split_experts(reloaded)
        after = outputs(model, subject)
        assert torch.equal(after, outputs(reloaded, subject))
    finally:
        dense.restore()
    assert not torch.equal(after, before)
    assert torch.equal(outputs(model, subject), before)
    for made in plan.layers:
        module = reloaded.get_submodule(made.name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert not weight[~made.mask].any()
        assert made.mask.sum() == made.mask.numel() // 2
        if pattern is not None:
            assert (made.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert made.kkt < 0.2
