"""Comparisons of a tiny model: the figures, what is run again and what is not, what is refused."""

import json
import random
import re
import sys

import pytest
import torch
from letters import LETTERS, letter_tokenizer, save_llama
from transformers import BertConfig, BertForMaskedLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kfac_prune import compare as comparing
from kfac_prune.bench import Bench
from kfac_prune.block_training import Reconstruction
from kfac_prune.cli import main
from kfac_prune.compare import compare
from kfac_prune.compare_report import table
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.errors import InputError
from kfac_prune.inputs import load_data
from kfac_prune.loading import load_model, load_tokenizer
from kfac_prune.memory import peak_within
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.plan import make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.protocol import Comparison, Level
from kfac_prune.quality import evaluate
from kfac_prune.reconstruction import reconstruct_sparse

SMALL = {"samples": 20, "eval_samples": 10, "seqlen": 16}
OPTIONS = ["--data", "text.txt", "--samples", "20", "--eval-samples", "10", "--seqlen", "16", "--out", "out"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with two models and a text in it."""
    save_llama(tmp_path / "model")
    save_llama(tmp_path / "other", initializer_range=0.2)
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(rng.choices(LETTERS[:12] + "  ", k=6000)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def comparison(methods=("magnitude", "wanda"), levels=("50%", "2:4"), seeds=1, **fields):
    return Comparison(
        Recipe(**{"model": "model", "data": "text.txt", "out": "out", **SMALL, **fields}), methods, levels, seeds
    )


def timeless(rows):
    """What does not depend on the machine's mood."""
    moods = ("seconds", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in moods} for row in rows]


# --- figures


@pytest.mark.parametrize(
    ("method", "level", "repair"),
    [("wanda", "50%", "none"), ("magnitude:global", "70%", "none"), ("kfac", "60%", "none"), ("wanda", "2:4", "none"),
     ("kfac", "60%", "reconstruction")],
)  # fmt: skip
def test_a_cell_is_what_the_library_does_step_by_step(here, method, level, repair):
    epochs = 2 if repair == "reconstruction" else 0
    rows = compare(comparison([method], [level], reconstruct=epochs, seed=3), echo=lambda text: None)
    row = next(row for row in rows if row["repair"] == repair)
    recipe = Recipe(model="model", data="text.txt", out="out", seed=3, **SMALL)
    model, dense = load_model("model"), load_model("model")
    calibration, held_out = load_data(recipe, load_tokenizer("model"))
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, calibration, seed=3)
    name, _, allocation = method.partition(":")
    plan = make_plan(
        layers,
        factors,
        sparsity=None if level == "2:4" else float(level[:-1]) / 100,
        pattern=NM(2, 4) if level == "2:4" else None,
        method=name,
        allocation=allocation or ("curves" if name == "kfac" else "uniform"),
        probe=Probe.on(model, calibration) if name == "kfac" else None,
    )
    swap = prune(layers, plan)
    if epochs:
        reconstruct_sparse(
            model, plan, factors, calibration, swap.swapped_in, Reconstruction(epochs, seed=3, own_text=2)
        )
    quality = evaluate(model, held_out, dense=dense)
    assert row["loss"] == pytest.approx(quality.loss, rel=1e-5)
    assert row["perplexity"] == pytest.approx(quality.perplexity, rel=1e-4)
    assert row["kl"] == pytest.approx(quality.kl, rel=1e-4)
    assert row["kl_predicted"] == pytest.approx(plan.predicted, rel=1e-4)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    weights = sum(layer.weight.numel() for layer in layers)
    assert row["sparsity"] == pytest.approx(zeros / weights)
    parameters = sum(p.numel() for p in model.parameters())
    assert row["compression"] == pytest.approx(parameters / (parameters - zeros))
    products = weights + model.lm_head.weight.numel()
    assert row["speed_up"] == pytest.approx(products / (products - zeros))


def test_table_and_picture(here):
    said = []
    rows = compare(comparison(("magnitude", "kfac"), reconstruct=1, seeds=2), echo=said.append)
    assert [(r["seed"], r["level"], r["method"], r["repair"]) for r in rows] == [
        (seed, level, method, repair)
        for seed in (0, 1) for level in ("50%", "2:4") for method in ("magnitude", "kfac")
        for repair in ("none", "reconstruction")
    ]  # fmt: skip
    assert len({row["calibration_sha256"] for row in rows}) == 2
    text = (here / "out" / "table.txt").read_text()
    assert text.rstrip("\n") in "\n".join(said)
    dense = evaluate(load_model("model"), load_data(comparison().recipe, load_tokenizer("model"))[1])
    assert re.search(rf"^dense +0.0% +1.00x +1.00x +{dense.loss:.4f} +{dense.perplexity:.2f} ", text, re.M)
    for level in ("50%", "2:4"):
        for name in ("magnitude", "magnitude + reconstruction", "kfac", "kfac + reconstruction"):
            (line,) = re.findall(rf"^{level} +{re.escape(name)}  +.*$", text, re.M)
            repair = "reconstruction" if "+" in name else "none"
            one, two = (
                r["kl"] for r in rows if (r["level"], r["method"], r["repair"]) == (level, name.split()[0], repair)
            )
            assert f" {(one + two) / 2:.4f} ±{abs(one - two) / 2**0.5:.4f} " in line
    assert (here / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (here / "out").iterdir()) == ["cells.jsonl", "curves.png", "table.txt"]


def test_one_seed_shows_no_spread(here):
    rows = compare(comparison(), echo=lambda text: None)
    assert "±" not in table({"loss": 1.0, "perplexity": 2.7, "tokens": 3, "parameters": 4, "multiply_adds": 5}, rows)


def test_a_spread_is_shown_where_a_cell_has_several_seeds(here):
    compare(comparison(["wanda"], ["50%"], seeds=2), echo=lambda text: None)
    compare(comparison(["magnitude"], ["50%"]), echo=lambda text: None)
    text = (here / "out" / "table.txt").read_text()
    spread = {
        name: "±" in line for name in ("wanda", "magnitude") for line in re.findall(rf"^50% +{name} .*$", text, re.M)
    }
    assert spread == {"wanda": True, "magnitude": False}
    assert "Means of 1 or 2 seeds" in text


def test_other_epochs_are_no_further_seed(here):
    rows = [row for epochs in (1, 3) for row in compare(comparison(["kfac"], ["50%"], reconstruct=epochs), echo=str)]
    text = (here / "out" / "table.txt").read_text()
    assert "±" not in text
    for row in rows:
        name = "kfac" if row["repair"] == "none" else f"kfac + reconstruction ({row['epochs']})"
        (line,) = re.findall(rf"^50% +{re.escape(name)}  +\d.*$", text, re.M)
        assert f" {row['kl']:.4f} " in line


def test_experts_multiply_their_share_of_the_tokens(here):
    """Two of four experts per token: half of their weights are multiplied with a token."""
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained("experts")
    letter_tokenizer().save_pretrained("experts")
    (row,) = compare(comparison(["magnitude"], ["50%"], model="experts"), echo=str)
    attention, expert = 32 * (32 + 16 + 16 + 32), 3 * 32 * 32
    dense = 2 * (attention + 2 * expert) + 40 * 32
    assert json.loads((here / "out" / "cells.jsonl").read_text().splitlines()[0])["dense"]["multiply_adds"] == dense
    assert row["speed_up"] == pytest.approx(dense / (attention + 2 * expert + 40 * 32))


def test_without_matplotlib_the_table_is_made_and_the_remedy_told(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    compare(comparison(), echo=said.append)
    assert 'pip install "kfac-prune[plot]"' in said[-1]
    assert sorted(p.name for p in (here / "out").iterdir()) == ["cells.jsonl", "table.txt"]


def test_a_pattern_leaves_nothing_to_other_allocations(here):
    trials = comparison(("magnitude:global", "kfac", "magnitude:uniform"), ("60%", "2:4")).trials(0)
    assert [(t.method, t.level.name, t.recipe.allocation, t.recipe.permute) for t in trials] == [
        ("magnitude:global", "60%", "global", False),
        ("kfac", "60%", "curves", False),
        ("magnitude:uniform", "60%", "uniform", False),
        ("kfac", "2:4", "uniform", True),
        ("magnitude:uniform", "2:4", "uniform", False),
    ]


# --- going on


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_comparison_goes_on_cell_by_cell(here, monkeypatch, after):
    whole = compare(comparison(seeds=2, levels=["50%"], out="whole"), echo=lambda text: None)
    done, original = [], Bench.prune

    def counted(self, method, **options):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(method)
        return original(self, method, **options)

    monkeypatch.setattr(Bench, "prune", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(comparison(seeds=2, levels=["50%"]), echo=lambda text: None)
    lines = (here / "out" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 1 + after
    done.clear()
    after = 4
    rows = compare(comparison(seeds=2, levels=["50%"]), echo=lambda text: None)
    assert len(done) == 4 - (len(lines) - 1)
    assert timeless(rows) == timeless(whole)
    assert (here / "out" / "cells.jsonl").read_text().startswith("\n".join(lines) + "\n")


def test_the_reconstructed_half_of_a_trial_is_run_alone(here, monkeypatch):
    """What was finished in one shot is not written again when reconstruction is asked for, nor with other epochs."""
    first = compare(comparison(["magnitude"], ["50%"]), echo=lambda text: None)
    for epochs in (1, 2):
        rows = compare(comparison(["magnitude"], ["50%"], reconstruct=epochs), echo=lambda text: None)
        assert rows[0] == first[0]
        assert (rows[1]["repair"], rows[1]["epochs"]) == ("reconstruction", epochs)
    assert len((here / "out" / "cells.jsonl").read_text().splitlines()) == 4


def test_further_methods_and_levels_are_added(here, monkeypatch):
    compare(comparison(["wanda"], ["2:4"]), echo=lambda text: None)
    runs, original = [], comparing._run
    monkeypatch.setattr(
        comparing, "_run", lambda bench, trial, *rest: (runs.append(trial.method), original(bench, trial, *rest))
    )
    rows = compare(comparison(["magnitude", "wanda"], ["0.5", "2:4"]), echo=lambda text: None)
    assert runs == ["magnitude", "wanda", "magnitude"]
    assert [(r["level"], r["method"]) for r in rows] == [
        ("50%", "magnitude"), ("50%", "wanda"), ("2:4", "magnitude"), ("2:4", "wanda")
    ]  # fmt: skip
    compare(comparison(["magnitude"], ["0.5"]), echo=lambda text: None)
    table = (here / "out" / "table.txt").read_text()
    assert table.count("magnitude") == table.count("Wanda") + table.count("wanda") == 2  # nothing is lost


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": 12}, "samples (20, now 12)"),
        ({"damping": 0.1}, "damping (0.03, now 0.1)"),
        ({"ignore": ("*.0.*",)}, "ignore ([], now ['*.0.*'])"),
        ({"model": "other"}, "differs in model;"),
        ({"eval_samples": 5}, "differs in test text;"),
        ({"seqlen": 8}, "seqlen (16, now 8), test text;"),
        ({"data": "changed.txt", "eval_data": "held.txt"}, "calibrated on other text"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_another_protocol_is_refused_and_overwrite_begins_anew(here, change, told):
    (here / "held.txt").write_text((here / "text.txt").read_text()[:2000])
    (here / "changed.txt").write_text((here / "text.txt").read_text()[::-1])
    compare(comparison(["magnitude"], ["50%"], eval_data="held.txt"), echo=lambda text: None)
    before = (here / "out" / "cells.jsonl").read_bytes()
    other = comparison(["magnitude"], ["50%"], **{"eval_data": "held.txt", **change})
    with pytest.raises(InputError, match=re.escape(told)):
        compare(other, echo=lambda text: None)
    assert (here / "out" / "cells.jsonl").read_bytes() == before
    other = comparison(["magnitude"], ["50%"], overwrite=True, **{"eval_data": "held.txt", **change})
    assert len(compare(other, echo=lambda text: None)) == 1
    assert len((here / "out" / "cells.jsonl").read_text().splitlines()) == 2


# --- the command


def test_the_command(here, capsys):
    assert main(["compare", "model", *OPTIONS, "--methods", "magnitude", "--levels", "50%", "--overwrite"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert (here / "out" / "table.txt").read_text() in captured.out
    (row,) = map(json.loads, (here / "out" / "cells.jsonl").read_text().splitlines()[1:])
    assert f"{row['loss']:.4f}" in captured.out


def test_an_interrupt_says_what_is_kept(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "prune", interrupted)
    assert main(["compare", "model", *OPTIONS, "--methods", "magnitude"]) == 130
    expected = "kfac-prune: interrupted; finished cells are in --out, and the same command goes on\n"
    assert capsys.readouterr().err == expected


def foreign(here):
    (here / "out").mkdir()
    (here / "out" / "precious.txt").write_text("mine")


def broken(here):
    (here / "out").mkdir()
    (here / "out" / "cells.jsonl").write_text("{nonsense\n")


def bert(here):
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(here / "model")


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (None, ["--methods", "magic"], "methods: 'magic' is unknown"),
        (None, ["--methods", "wanda:curves"], "methods: 'wanda:curves': wanda allocates by uniform"),
        (None, ["--methods", "wanda:"], "methods: 'wanda:'"),
        (None, ["--methods", "kfac:global", "--levels", "2:4"], "levels: 2:4 fix every layer's sparsity"),
        (None, ["--levels", "100%"], "levels: 100% is out of range"),
        (None, ["--levels", "0"], "levels: 0 is out of range"),
        (None, ["--levels", "nan"], "levels: nan is out of range"),
        (None, ["--levels", "half"], "levels: 'half' is neither a sparsity"),
        (None, ["--levels", "4:2"], "levels: pattern 4:2"),
        (None, ["--seeds", "0"], "seeds is 0"),
        (None, ["--reconstruct", "-1"], "reconstruct is -1"),
        (None, ["--samples", "0"], "samples is 0"),
        (None, ["--data", "absent.txt"], "absent.txt"),
        (bert, [], "objective: model computes"),
        (foreign, [], "--out out holds other files than a comparison's; choose another folder"),
        (foreign, ["--overwrite"], "--out out holds other files than a comparison's; choose another folder"),
        (None, ["--out", "model/sub"], "--out model/sub lies within the model model"),
        (None, ["--out", "~no-such-user/out"], "--out ~no-such-user/out cannot be created"),
        (broken, [], "cells.jsonl cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_compare_refuses(prepare, arguments, expected, here, capsys):
    if prepare:
        prepare(here)
    assert main(["compare", "model", *OPTIONS, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kfac-prune: error: ")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "name", "sparsity", "pattern"),
    [
        ("70%", "70%", 0.7, "unstructured"),
        ("0.7", "70%", 0.7, "unstructured"),
        ("62.5%", "62.5%", 0.625, "unstructured"),
        ("1:4", "1:4", 0.75, "1:4"),
    ],
)
def test_levels(text, name, sparsity, pattern):
    level = Level.parse(text)
    assert (level.name, level.pattern) == (name, pattern)
    assert level.sparsity == pytest.approx(sparsity)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere peaks cannot begin anew")
def test_peaks_begin_anew():
    with peak_within() as large:
        held = bytearray(b"x") * 300_000_000
    del held
    with peak_within() as small:
        pass
    assert large.resident - small.resident > 200_000_000
