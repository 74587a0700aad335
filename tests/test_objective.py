"""Objectives other than the next token: encoders, masked language models, classifiers."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.func import functional_call, jacrev
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import kfac_prune
from kfac_prune.block_training import Reconstruction
from kfac_prune.config import Recipe
from kfac_prune.curvature import estimate
from kfac_prune.curvature.estimate import estimate_factors, participants
from kfac_prune.data import Document, Windows, sequence_windows
from kfac_prune.errors import InputError
from kfac_prune.export import save_side_files
from kfac_prune.inputs import check_runs, choose_texts
from kfac_prune.inspect_model import describe
from kfac_prune.loading import load_config
from kfac_prune.measurement import measure
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.objective import Classes, Embedding, Tokens, find_objective, neighbours_kept
from kfac_prune.obs import NM
from kfac_prune.pipeline import run
from kfac_prune.plan import make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.problems import PlannedLayer
from kfac_prune.quality import evaluate
from kfac_prune.reconstruction import reconstruct_sparse

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
HEADS = {"embedding": BertModel, "masked": BertForMaskedLM, "classes": BertForSequenceClassification}
OBJECTIVES = {"embedding": Embedding(), "masked": Tokens(causal=False), "classes": Classes()}
POOLING = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def tiny(kind="embedding", layers=1, dtype=torch.float32):
    config = BertConfig(
        vocab_size=len(WORDS) + len(SPECIAL),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = HEADS[kind](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval().to(dtype)


def tokenizer():
    core = Tokenizer(WordLevel({t: i for i, t in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, 40, (n,), generator=generator).tolist()) for n in lengths]


def padded(count, seed=0):
    return sequence_windows(tokenizer(), sentences(count, seed), 12)


@pytest.fixture
def folder(tmp_path):
    def save(kind="embedding", sidecars=False, layers=1):
        path = tmp_path / kind
        tiny(kind, layers).save_pretrained(path)
        tokenizer().save_pretrained(path)
        if sidecars:
            (path / "1_Pooling").mkdir()
            (path / "modules.json").write_text(json.dumps(MODULES))
            (path / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
            (path / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
            (path / "config_sentence_transformers.json").write_text('{"prompts": {}}')
        (tmp_path / "text.txt").write_text("\n".join(sentences(300)))
        return str(path), str(tmp_path / "text.txt")

    return save


# --- data -----------------------------------------------------------------------------------------------------------


def test_sequences_have_special_tokens_and_padding_on_the_right():
    windows = sequence_windows(tokenizer(), ["w0 w1", "w2 w3 w4 w5 w6 w7"], 6)
    assert windows.input_ids.tolist() == [[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]]
    assert windows.attention_mask.sum(1).tolist() == [4, 6]


def test_texts_are_disjoint_seeded_and_counted():
    documents = [Document(text, True) for text in sentences(50) + sentences(50)]  # each one twice
    fit, held = choose_texts(documents, None, (20, 8), 3, 0.2)
    assert len(set(fit)) == 20
    assert len(set(held)) == 8
    assert not set(fit) & set(held)
    assert (fit, held) == choose_texts(documents, None, (20, 8), 3, 0.2)
    same = choose_texts(documents, documents, (20, 50), 3, 0.2)
    assert not set(same[0]) & set(same[1])
    with pytest.raises(InputError, match=r"separates documents.*--separator"):
        choose_texts([Document("one running text", False)], None, (20, 8), 3, 0.1)


# --- the Fisher -----------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """An embedding table and one linear layer whose single token's output is the sentence vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.linear = nn.Embedding(30, 5), nn.Linear(5, 4, bias=False)
        self.device = torch.device("cpu")
        self.config = type("C", (), {"get_text_config": lambda self: type("T", (), {"hidden_size": 4})()})()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None):
        return type("O", (), {"last_hidden_state": self.linear(self.table(input_ids))})()


def test_one_token_sequences_have_the_gaussian_fisher_exactly():
    """K-FAC is exact there: G = E[ε εᵀ] = I up to the sampling error, and the prediction is the loss itself."""
    model = OneLayer().double()
    windows = Windows(torch.arange(3000).remainder(30).view(-1, 1))
    objective = Embedding("mean", normalise=False)
    layers = [Layer("linear", model.linear)]
    found = estimate_factors(model, layers, windows, objective=objective, batch_size=500).layers["linear"]
    assert float((found.g - torch.eye(4)).abs().max()) < 5 * (2 / 3000) ** 0.5  # five standard errors
    change = 0.1 * torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = model.linear.weight.detach().clone()
    with torch.no_grad():
        dense = objective.output(model, windows.input_ids, None)
        model.linear.weight.add_(change)
        exact = float(objective.divergence(dense, objective.output(model, windows.input_ids, None)).mean())
        model.linear.weight.copy_(before)
    a, g = found.a.double(), torch.eye(4, dtype=torch.float64)
    assert 0.5 * float(torch.trace(change.T @ g @ change @ a)) == pytest.approx(exact, rel=1e-5)
    sampled = 0.5 * float(torch.trace(change.T @ found.g.double() @ change @ a))
    assert sampled == pytest.approx(exact, rel=5 * (2 / 3000) ** 0.5)


def jacobian_fisher(model, name, windows, objective, output_fisher):
    """Mean over sequences of Jᵀ F J for one weight matrix, dense, from the Jacobian: [out·in, out·in] float64."""
    weights = {k: v.detach() for k, v in model.named_parameters()}
    total = 0
    for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
        ids, mask = ids[mask][None], mask[mask][None]

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, ids=ids, mask=mask):
                return objective.output(self.inner, ids, mask)

        wrapped = Wrapped()
        rest = {f"inner.{k}": v for k, v in weights.items()}

        def output(w, wrapped=wrapped, rest=rest):
            return functional_call(wrapped, {**rest, f"inner.{name}.weight": w}).reshape(-1)

        j = jacrev(output)(weights[f"{name}.weight"]).flatten(1)
        shape = objective.output(model, ids, mask)
        total = total + j.T @ output_fisher(shape.detach()) @ j
    return total / len(windows)


def softmax_fisher(logits):
    """Block diagonal over rows: diag(p) − p pᵀ."""
    p = logits.reshape(-1, logits.shape[-1]).softmax(-1)
    return torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("embedding", "encoder.layer.0.output.dense"), ("classes", "bert.pooler.dense"),
     ("masked", "cls.predictions.transform.dense")],
)  # fmt: skip
def test_sampled_gradients_converge_to_the_fisher_of_the_jacobian(kind, layer):
    """The weight gradients of sampled cotangents, Σ_t g_t a_tᵀ, have the exact Fisher for their second moment."""
    torch.manual_seed(0)
    model, objective, windows = tiny(kind, dtype=torch.float64), OBJECTIVES[kind], padded(2)
    exact = jacobian_fisher(
        model, layer, windows, objective,
        (lambda f: torch.eye(f.numel(), dtype=f.dtype)) if kind == "embedding" else softmax_fisher,
    )  # fmt: skip
    weight = model.get_parameter(f"{layer}.weight")
    ids, mask = windows.input_ids, windows.attention_mask
    probe, rounds, squares = torch.randn(exact.shape[0], dtype=torch.float64), 600, []
    output = objective.output(model, ids, mask)
    for seed in range(rounds):
        draws = objective.draws(model, windows, seed)
        cotangent = objective.cotangent(output, draws, ids, mask, "sampled")
        for row in range(len(ids)):
            alone = torch.zeros_like(cotangent)
            alone[row] = cotangent[row]
            gradient = torch.autograd.grad(output, weight, alone, retain_graph=True)[0]
            squares.append(float(gradient.flatten() @ probe) ** 2)
    found = torch.tensor(squares, dtype=torch.float64)
    error = float(found.std()) / len(found) ** 0.5
    assert float(found.mean()) == pytest.approx(float(probe @ exact @ probe), abs=5 * error)


@pytest.mark.parametrize("kind", HEADS)
def test_factors_do_not_depend_on_batches_or_padding(kind):
    model, objective, windows = tiny(kind), OBJECTIVES[kind], padded(7)
    layers = participants(model, prunable_layers(model), windows, objective)
    one = estimate_factors(model, layers, windows, objective=objective, batch_size=1)
    all_ = estimate_factors(model, layers, windows, objective=objective, batch_size=7)
    ids = torch.where(windows.attention_mask, windows.input_ids, 9)  # other padding
    other = estimate_factors(model, layers, Windows(ids, windows.attention_mask), objective=objective, batch_size=3)
    for name, layer in one.layers.items():
        for found in (all_.layers[name], other.layers[name]):
            torch.testing.assert_close(found.g, layer.g, rtol=1e-4, atol=1e-5 * float(layer.g.abs().max()))
            torch.testing.assert_close(found.a, layer.a, rtol=1e-4, atol=1e-5 * float(layer.a.abs().max()))


@pytest.mark.parametrize("kind", ["embedding", "classes"])
def test_several_cotangents_a_sequence_are_averaged(kind, monkeypatch):
    model, windows = tiny(kind), padded(5)

    def factors(samples, seed):
        monkeypatch.setattr(estimate, "SEQUENCE_DRAWS", samples)
        objective = OBJECTIVES[kind]
        return estimate_factors(model, prunable_layers(model)[:4], windows, objective=objective, seed=seed)

    together, single = factors(3, 1), [factors(1, seed) for seed in (3, 4, 5)]
    for name, layer in together.layers.items():
        assert torch.equal(layer.a, single[0].layers[name].a)
        assert layer.tokens == windows.tokens
        mean = torch.stack([one.layers[name].g for one in single]).mean(0)
        torch.testing.assert_close(layer.g, mean, rtol=1e-5, atol=1e-6 * float(mean.abs().max()))


def test_only_layers_that_the_objective_needs_take_part():
    windows = padded(3)
    model = tiny()
    names = {layer.name for layer in participants(model, prunable_layers(model), windows, Embedding())}
    assert "pooler.dense" not in names
    assert len(names) == 6
    classifier = tiny("classes")
    layers = prunable_layers(classifier)
    assert "classifier" not in {layer.name for layer in layers}  # the head
    assert "bert.pooler.dense" in {one.name for one in participants(classifier, layers, windows, Classes())}


# --- quality --------------------------------------------------------------------------------------------------------


def test_neighbours_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(23, 6, generator=generator)
    b = a + 0.5 * torch.randn(23, 6, generator=generator)
    shares = []
    for i in range(23):
        near = []
        for x in (a, b):
            cosine = {j: float(x[i] @ x[j] / x[i].norm() / x[j].norm()) for j in range(23) if j != i}
            near.append(set(sorted(cosine, key=cosine.get, reverse=True)[:10]))
        shares.append(len(near[0] & near[1]) / 10)
    assert neighbours_kept(a, b) == pytest.approx(sum(shares) / 23)
    assert neighbours_kept(a, a) == 1
    assert neighbours_kept(a[:4], b[:4]) == 1  # three others, all of them neighbours


@pytest.mark.parametrize("kind", HEADS)
def test_divergence_is_that_of_single_sequences(kind):
    dense, pruned, windows, objective = tiny(kind), tiny(kind), padded(9), OBJECTIVES[kind]
    with torch.no_grad():
        next(layer for layer in prunable_layers(pruned)).weight.mul_(0.5)
    found = evaluate(pruned, windows, objective=objective, dense=dense, batch_size=4)
    total, count, vectors = 0.0, 0, []
    for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
        with torch.no_grad():
            p, q = (m(input_ids=ids[mask][None]) for m in (dense, pruned))
        if kind == "embedding":
            p, q = (x.last_hidden_state[0].double().mean(0) for x in (p, q))
            p, q = p / p.norm(), q / q.norm()
            total, count = total + float((p - q).square().sum()) / 2, count + 1
            vectors.append(float(p @ q))
        else:
            p, q = (x.logits[0].double().reshape(-1, x.logits.shape[-1]).softmax(-1) for x in (p, q))
            total, count = total + float((p * (p / q).log()).sum()), count + len(p)
            vectors.append(float(p.argmax(-1)[0] == q.argmax(-1)[0]))
    assert found.tokens == count
    assert found.kl == pytest.approx(total / count, rel=1e-3)
    assert found.loss is None
    if kind != "masked":
        name = "cosine" if kind == "embedding" else "agreement"
        assert found.likeness[name] == pytest.approx(sum(vectors) / 9, abs=1e-5)


def test_a_probe_of_sentences_of_many_lengths():
    """It starts at a layer's block from the stream of the dense model, whatever each batch is padded to."""
    model, windows = tiny(layers=2), padded(9)
    assert len({int(b.input_ids.shape[1]) for b in windows.batches(2)}) > 1
    layer = prunable_layers(model)[-2]
    assert layer.name.startswith("encoder.layer.1.")
    pruned = layer.weight * (torch.arange(layer.weight.shape[1]) % 2)
    planned = PlannedLayer(layer.name, pruned, layer.bias, pruned != 0, predicted=1.0, kkt=None, damping=())
    found = Probe(model, windows, 2, Embedding())([layer], [planned])
    dense = tiny(layers=2)
    layer.assign(pruned, layer.bias)
    assert found == pytest.approx(evaluate(model, windows, objective=Embedding(), dense=dense).kl, rel=1e-3)
    assert found > 0


# --- choice and refusals --------------------------------------------------------------------------------------------


def test_objective_is_the_checkpoints(folder):
    for kind, objective in OBJECTIVES.items():
        source, _ = folder(kind)
        assert find_objective("auto", source, load_config(source)) == (
            Embedding("mean", True) if kind == "embedding" else objective
        )
    source, _ = folder("classes")
    with pytest.raises(InputError, match=r"embedding does not fit .*BertForSequenceClassification.* classes"):
        find_objective("embedding", source, load_config(source))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Embedding("mean", True)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Embedding("cls", True)),
        ({"pooling_mode": "cls"}, Embedding("cls", True)),
        ({"pooling_mode_max_tokens": True}, "pools by mean, pooling_mode_max_tokens"),
    ],
)
def test_pooling_is_that_of_the_files(folder, change, expected):
    source, _ = folder(sidecars=True)
    (Path(source) / "1_Pooling" / "config.json").write_text(json.dumps(POOLING | change))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            find_objective("auto", source, load_config(source))
    else:
        assert find_objective("auto", source, load_config(source)) == expected
        (Path(source) / "modules.json").write_text(json.dumps(MODULES[:2]))
        assert not find_objective("auto", source, load_config(source)).normalise


def test_what_sentence_transformers_reads_is_an_encoder_whatever_head_is_named(folder, tmp_path):
    made = recipe(folder, tmp_path / "out", pattern="2:4", reconstruct=0, refit=False)
    settings = Path(made.model) / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    assert find_objective("auto", made.model, load_config(made.model)) == Embedding("mean", True)
    assert "encoder.layer.0.output.dense" in describe(made.model)
    record = run(made)
    assert record["head"] == "encoder"
    assert isinstance(kfac_prune.load(made.out), BertModel)
    (Path(made.model) / "modules.json").unlink()
    assert find_objective("auto", made.model, load_config(made.model)) == Tokens(causal=False)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_settings_under_older_names_are_kept(folder, tmp_path, kind):
    source, _ = folder(sidecars=True)
    (Path(source) / f"sentence_{kind}_config.json").write_text('{"max_seq_length": 24, "do_lower_case": true}')
    save_side_files(source, tmp_path / "out")
    name = f"sentence_{kind}_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (Path(source) / name).read_bytes()


def test_unknown_modules_are_refused(folder):
    source, _ = folder(sidecars=True)
    file = Path(source) / "modules.json"
    for entry, reason in (({"type": "x.Dense", "path": "3_Dense"}, "a module Dense"),
                          ({"type": "x.Pooling", "path": "../other"}, "not inside")):  # fmt: skip
        file.write_text(json.dumps([MODULES[0], entry]))
        with pytest.raises(InputError, match=reason):
            find_objective("auto", source, load_config(source))


def recipe(folder, out, kind="embedding", **options):
    source, text = folder(kind, sidecars=kind == "embedding", layers=2 if "structured" in options else 1)
    given = {"separator": "\n", "samples": 24, "eval_samples": 20, "seqlen": 12, "batch_size": 24, "reconstruct": 1}
    return Recipe(model=source, data=text, out=str(out), **{**given, **options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"objective": "tokens"}, "objective tokens does not fit"),
        ({"separator": None}, "separates documents"),
        ({"samples": 1000}, "needed are 1000"),
        ({"fisher": "empirical"}, "no labels"),
        ({"include": ("pooler.dense",)}, "depends on none"),
    ],
)
def test_refusals(folder, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        run(recipe(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_an_encoder_has_no_perplexity(folder, tmp_path):
    with pytest.raises(InputError, match=r"no loss or perplexity.*--dense"):
        measure(recipe(folder, tmp_path / "out"))


@pytest.mark.parametrize("kind", HEADS)
def test_the_last_block_is_reconstructed_on_the_objective(kind):
    """Layers behind it (pooler, transform) are pruned too; the dense outputs are those of the dense layers."""
    model, objective, windows = tiny(kind, layers=2), OBJECTIVES[kind], padded(33)
    layers = participants(model, prunable_layers(model), windows, objective)
    factors = estimate_factors(model, layers, windows, objective=objective)
    plan = make_plan(layers, factors, pattern=NM(2, 4), method="magnitude")
    dense = prune(layers, plan)
    settings = Reconstruction(2, objective=objective)
    last = reconstruct_sparse(model, plan, factors, windows, dense.swapped_in, settings)[-1]
    held = windows.split(3)[1]  # a tenth of eleven batches
    kl = evaluate(model, held, dense=dense.swapped_in, objective=objective).kl
    assert last.after == pytest.approx(kl, rel=1e-4)
    assert last.after < last.before


# --- whole runs -----------------------------------------------------------------------------------------------------

FIGURES = {"embedding": {"cosine", "neighbours_kept"}, "classes": {"agreement"}, "masked": set()}
TASKS = {"embedding": "sentence-similarity", "classes": "text-classification", "masked": "fill-mask"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("embedding", {"sparsity": 0.5}),
        ("embedding", {"pattern": "2:4"}),
        ("embedding", {"structured": "ffn", "sparsity": 0.2, "shots": 1}),
        ("classes", {"pattern": "2:4"}),
        ("masked", {"allocation": "uniform", "reconstruct": 0}),  # which would mean a refit
    ],
    ids=["half", "2:4", "ffn", "classes", "masked"],
)
def test_a_whole_run(folder, tmp_path, kind, options):
    lines = []
    made = recipe(folder, tmp_path / "out", kind, **options)
    record = run(made, echo=lines.append)
    assert record["pruned"].keys() == FIGURES[kind]
    assert "perplexity" not in "\n".join(lines)
    assert record["kl_measured"] > 0
    assert sum("no refit" in line for line in lines) == made.resolved().refit
    pruned = kfac_prune.load(made.out)
    assert isinstance(pruned, HEADS[kind])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {TASKS[kind]}" in card
    if kind == "embedding":
        assert any("do not depend" in line or "does not depend" in line for line in lines)
        for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (Path(made.model) / name).read_bytes()
        assert "SentenceTransformer" in card
    if "structured" in options:
        assert pruned.num_parameters() < kfac_prune.load(made.model).num_parameters()
    table = measure(Recipe(**{**vars(made), "model": made.out, "out": "unused"}), dense_source=made.model)
    assert re.search(r"nats/(sequence|token)\)", table)
    assert "perplexity" not in table
    if "structured" not in options:
        assert re.search(r"sparsity of linear layers +50\.0%", table)  # the pooler, which stays dense, does not count


def test_sentence_transformers_loads_it(folder, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    made = recipe(folder, tmp_path / "out", pattern="2:4")
    run(made)
    texts = sentences(5, seed=9)
    windows = sequence_windows(tokenizer(), texts, 12)
    with torch.no_grad():
        ours = Embedding().output(kfac_prune.load(made.out), windows.input_ids, windows.attention_mask)
    theirs = torch.tensor(library.SentenceTransformer(made.out, device="cpu").encode(texts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_classifier_that_reads_what_pads_it_is_refused():
    """A decoder looks for the last token by its configuration's padding, and the tokenizer pads with 0."""
    config = LlamaConfig(vocab_size=45, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=3, pad_token_id=0, eos_token_id=3)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    check_runs(model, padded(5), Classes())
    for wrong, message in ((3, "once it is padded: its config.json has pad_token_id 3"), (None, "padding token")):
        model.config.pad_token_id = wrong
        with pytest.raises(InputError, match=message):
            check_runs(model, padded(5), Classes())
