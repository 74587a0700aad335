import math
from itertools import pairwise

import pytest
import torch
from conftest import build, random_windows
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    Gemma2Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OPTConfig,
)

from kfac_prune import block_training, reconstruction
from kfac_prune.block_training import Reconstruction
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import prunable_layers
from kfac_prune.objective import Tokens
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.plan import make_plan, prune
from kfac_prune.quality import evaluate
from kfac_prune.reconstruction import metrics, reconstruct, reconstruct_sparse, step_windows
from kfac_prune.refitting import refit
from kfac_prune.stream import BlockStack, find_writers, observed
from kfac_prune.structure.prune import Settings, prune_structured, weights_target
from kfac_prune.structure.repair import reconstruct_smaller


class Job:
    """A model pruned to 2:4 by magnitude, and what its reconstruction needs."""

    def __init__(self, model, windows, batch_size=8, shelf="cpu"):
        self.model, self.windows = model, windows
        self.layers = prunable_layers(model)
        self.factors = estimate_factors(model, self.layers, windows)
        self.plan = make_plan(self.layers, self.factors, pattern=NM(2, 4), method="magnitude")
        self.stack = BlockStack(model, windows, batch_size, shelf)
        self.dense = prune(self.layers, self.plan)
        self.metric = metrics(self.factors, Damping(), "sublayer")

    def run(self, epochs=3, unit="block", seed=0, trained=None, folder=None):
        return reconstruct(
            self.stack,
            self.stack,
            self.metric,
            Reconstruction(epochs, unit, seed, folder),
            trained={layer.name for layer in self.layers} if trained is None else trained,
            masks={layer.name: layer.mask for layer in self.plan.layers},
            dense=self.dense.swapped_in,
        )

    def kl(self):
        return evaluate(self.model, self.windows, dense=self.dense.swapped_in).kl

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_the_stream_comes_nearer_and_the_mask_stays(model, make_windows, unit):
    job = Job(model, make_windows(count=32, length=12))
    before = job.kl()
    records = job.run(unit=unit)
    assert len(records) == (2 if unit == "block" else 4)
    assert all(record.after <= record.before for record in records)
    assert job.kl() < before
    for layer, planned in zip(job.layers, job.plan.layers, strict=True):
        assert bool((layer.weight[~planned.mask] == 0).all())


def test_dense_weights_can_be_put_back(model, make_windows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    job = Job(model, make_windows(count=24, length=8))
    job.run(epochs=1)
    job.dense.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(make_model, make_windows):
    results = []
    for seed in (0, 0, 1):
        job = Job(make_model("llama"), make_windows(count=32, length=8))
        job.run(seed=seed)
        results.append(job.tensors())
    first, again, other = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_masked_positions_do_not_count(model, make_windows):
    windows = make_windows(count=24, length=10, lengths=(10, 7, 4) * 8)
    changed = torch.where(windows.attention_mask, windows.input_ids, 5)
    results = []
    for ids in (windows.input_ids, changed):
        job = Job(model, Windows(ids, windows.attention_mask))
        job.run(epochs=1)
        results.append(job.tensors())
        job.dense.restore()
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_the_last_block_is_trained_on_the_kl_itself(model, make_windows, unit):
    windows = make_windows(count=32, length=10, lengths=(10, 7, 4, 2) * 8)
    job = Job(model, windows)
    start = job.tensors()
    records = job.run(unit=unit)
    held = windows.split(8)[1]
    last = job.stack.names[-1]
    assert records[-1].name == last
    assert records[-1].after == pytest.approx(evaluate(model, held, dense=job.dense.swapped_in).kl, rel=1e-5)
    model.load_state_dict(job.tensors() | {name: start[name] for name in start if name.startswith(f"{last}.")})
    entered = evaluate(model, held, dense=job.dense.swapped_in).kl  # the blocks before it are reconstructed
    if unit == "block":
        assert records[-1].before == pytest.approx(entered, rel=1e-5)
    assert records[-1].after < entered


def test_only_the_layers_that_may_change_do(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    before = job.tensors()
    chosen = {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    records = job.run(trained=chosen)
    assert [record.name for record in records] == ["model.layers.1"]
    changed = {name for name, tensor in job.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in chosen}


def test_a_linear_sub_block_reaches_least_squares(make_model, make_windows):
    """Only the last writer is trained and may use all of its weights: the optimum is a linear regression, for any G."""
    job = Job(make_model("llama", dtype=torch.float32), make_windows(count=32, length=12))
    name = "model.layers.0.mlp.down_proj"
    layer = next(layer for layer in job.layers if layer.name == name)
    job.plan = make_plan([layer], job.factors, sparsity=0.0, allocation="uniform")  # all of its weights may change
    (record,) = job.run(epochs=150, trained={name})
    inside = [x for x in job.layers if x.name.startswith("model.layers.0.")]
    h, target = [], []
    with torch.no_grad():
        for batch, entry in enumerate(job.stack.entries):
            with job.dense.swapped_in():
                goal = job.stack.run(0, batch, entry)
            with observed(inside) as seen:
                job.stack.run(0, batch, entry)
            before = entry + seen["model.layers.0.self_attn.o_proj"][1]
            h.append(seen[name][0].flatten(0, 1))
            target.append((goal - before).flatten(0, 1))
    g = job.metric["model.layers.0"]
    solution = torch.linalg.lstsq(torch.cat(h[:-1]), torch.cat(target[:-1])).solution
    residual = h[-1] @ solution - target[-1]
    best = 0.5 * float(((residual @ g) * residual).sum(-1).mean())
    assert record.after <= 1.1 * best + 1e-3 * record.before


def test_a_rate_that_diverges_changes_nothing(make_model, make_windows, monkeypatch):
    monkeypatch.setattr(block_training, "RATE", 1e300)
    monkeypatch.setattr(block_training, "LOWEST", 2e299)
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    before = job.tensors()
    records = job.run(epochs=1)
    assert all(record.learning_rate == 0 and record.after == record.before for record in records)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.tensors().items())


@pytest.mark.parametrize("first", [0.02, 3e3], ids=["helps", "diverges"])
def test_the_first_block_finds_the_rate_for_all(first, make_model, make_windows, monkeypatch):
    tried, trained = [], block_training.BlockTraining._descend

    def observed_training(self, rate, start, before, settings):
        loss, state = trained(self, rate, start, before, settings)
        tried.append((self.part.name, rate, settings.epochs, loss))
        return loss, state

    monkeypatch.setattr(block_training.BlockTraining, "_descend", observed_training)
    monkeypatch.setattr(block_training, "RATE", first)
    records = Job(make_model("llama"), make_windows(count=64, length=8)).run(epochs=2)
    trials = [(rate, loss) for _, rate, epochs, loss in tried if epochs == 1]
    assert [rate for rate, _ in trials] == [first / 2**i for i in range(len(trials))]
    losses = [loss for _, loss in trials if loss < math.inf]
    assert losses[-1] >= losses[-2] == min(losses)  # the first that brings no more ends the search
    best = min(2 * trials[-2][0], first)
    assert best < 1
    whole = tried[len(trials) :]
    assert [(name, rate, epochs) for name, rate, epochs, _ in whole] == [(r.name, best, 2) for r in records]
    assert [(r.learning_rate, r.after) for r in records] == [(best, loss) for *_, loss in whole]


def test_a_block_that_is_hard_to_help_lowers_the_rate_for_itself_alone(make_model, make_windows, monkeypatch):
    tried, names = [], {}
    factors = {
        "first": {(0.02, 1): 0.9, (0.01, 1): 0.8, (0.005, 1): 0.7, (0.0025, 1): 0.75, (0.01, 4): 0.5},
        "hard": {(0.01, 4): 1.2, (0.005, 4): 1.1, (0.0025, 4): 0.9},
        "hopeless": {(0.01 / 2**i, 4): 1.2 - i / 100 for i in range(7)},
        "easier": {(0.01, 4): 1.2, (0.005, 4): 0.93},
    }

    def stands_in(self, rate, start, before, settings):
        if self not in names:
            names[self] = list(factors)[len(names)]
        name = names[self]
        tried.append((name, rate, settings.epochs))
        return factors[name][rate, settings.epochs] * before, [torch.full_like(p, rate) for p in start]

    monkeypatch.setattr(block_training.BlockTraining, "_descend", stands_in)
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    weights = job.tensors()
    records = job.run(unit="sublayer", epochs=4)
    assert tried == [(name, *how) for name, hows in factors.items() for how in hows]
    assert [record.learning_rate for record in records] == [0.01, 0.0025, 0.0, 0.005]
    assert [record.after / record.before for record in records] == pytest.approx([0.5, 0.9, 1.0, 0.93])
    for name, kept in (("0.mlp.up_proj", 0.0025), ("0.self_attn.v_proj", 0.01), ("1.mlp.up_proj", 0.005)):
        assert bool((job.tensors()[f"model.layers.{name}.weight"] == kept).all())
    hopeless = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(job.tensors()[hopeless], weights[hopeless])


def test_no_training_is_repeated(make_model, make_windows, monkeypatch):
    losses = {0.02: 0.9, 0.01: 0.8, 0.005: 0.85}
    tried = []

    def stands_in(self, rate, start, before, settings):
        tried.append(rate)
        return losses[rate] * before, start

    monkeypatch.setattr(block_training.BlockTraining, "_descend", stands_in)
    first, second = Job(make_model("llama"), make_windows(count=24, length=8)).run(epochs=1)
    assert tried == [*losses, 0.01]  # in the first block a trial of one epoch is a whole training
    assert first.learning_rate == second.learning_rate == 0.01


def test_a_training_that_does_not_help_within_an_epoch_is_given_up(make_model, make_windows, monkeypatch):
    measured = []

    def stands_in(self):
        measured.append(self.part.name)
        return 1.0 if measured.count(self.part.name) == 1 else 1.01

    monkeypatch.setattr(block_training.BlockTraining, "_objective", stands_in)
    records = Job(make_model("llama"), make_windows(count=24, length=8)).run(epochs=4)
    rates = 8  # from RATE to LOWEST
    assert [(r.learning_rate, measured.count(r.name)) for r in records] == [(0, 1 + 2 * rates), (0, 1 + 2 * rates)]


def test_a_block_that_lost_nothing_is_left_as_it_is(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    job.dense.restore()
    later = [layer for layer in job.layers if layer.name.startswith("model.layers.1.")]
    job.plan = make_plan(later, job.factors, pattern=NM(2, 4), method="magnitude")
    job.dense = prune(later, job.plan)
    before = job.tensors()
    first, second = job.run()
    assert (first.before, first.after, first.learning_rate) == (0, 0, 0)
    assert second.after < second.before
    same = [name for name, tensor in job.tensors().items() if torch.equal(tensor, before[name])]
    assert {name for name in before if name.startswith("model.layers.0.")} <= set(same)


@pytest.mark.parametrize(
    ("count", "length", "windows"),
    [(128, 256, 2), (128, 48, 2), (64, 256, 1), (512, 64, 8), (128, 2048, 1), (16, 32, 1)],
)
def test_steps_are_small_and_many(count, length, windows):
    assert step_windows(Windows(torch.zeros(count, length, dtype=torch.int64))) == windows


def test_one_batch_is_too_few(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=8, length=8))
    with pytest.raises(InputError, match="there is one batch"):
        job.run()


def test_a_smaller_model_is_reconstructed_too(model, family, make_windows):
    windows = make_windows(count=48, length=10)
    layers = prunable_layers(model)
    kinds = ("ffn", "heads") if family == "llama" else ("ffn",)
    target = weights_target(model, layers, 0.2)
    best, _ = prune_structured(
        model, layers, windows, target, kinds=kinds, widths="per-layer", settings=Settings(shots=1, refit=False)
    )
    before = evaluate(best.model, windows, dense=model).kl
    factors = estimate_factors(model, layers, windows)
    reconstruct_smaller(model, best.model, layers, factors, windows, Reconstruction(3))
    assert evaluate(best.model, windows, dense=model).kl < before


def test_writers_end_the_sub_layers_and_the_block_the_last(make_model, make_windows):
    job = Job(make_model("opt"), make_windows(count=24, length=8))
    with job.dense.swapped_in():
        writers = find_writers(job.stack, 0, job.stack.entries[0], job.stack.inside(0))
    records = job.run(epochs=1, unit="sublayer")
    assert [record.name for record in records[:2]] == [writers[0].layer.name, job.stack.names[0]]


def test_a_block_that_normalises_its_sum_is_reconstructed_as_a_whole(make_windows, caplog):
    """Gemma 2 has no layers that write into the stream; its blocks have an end all the same."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    job = Job(AutoModelForCausalLM.from_config(config).eval(), make_windows(count=32, length=12))
    before = job.kl()
    assert [record.name for record in job.run(unit="sublayer")] == ["model.layers.0", "model.layers.1"]
    assert "trained as one" in caplog.text
    assert job.kl() < before


def test_an_identity_metric_is_plain_least_squares(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    job.metric = {name: torch.eye(len(g)) for name, g in job.metric.items() if name in job.stack.names}
    with job.dense.swapped_in():
        goals = [job.stack.run(0, batch, entry) for batch, entry in enumerate(job.stack.entries)]
    first = job.run()[0]
    held = len(job.stack.entries) - 1
    with torch.no_grad():
        difference = job.stack.run(0, held, job.stack.entries[held]) - goals[held]
    assert first.after == pytest.approx(0.5 * float(difference.square().sum(-1).mean()), rel=1e-5)


def test_where_streams_wait_changes_nothing(make_model, make_windows):
    results = []
    for shelf in ("cpu", "device", "disk"):
        job = Job(make_model("gpt2"), make_windows(count=24, length=8), shelf=shelf)
        job.run(epochs=1)
        results.append(job.tensors())
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(make_model, make_windows, tmp_path, monkeypatch, dtype):
    windows = make_windows(count=24, length=8)
    whole = Job(make_model("llama", dtype=dtype), windows)
    whole.run(unit="sublayer")
    job = Job(make_model("llama", dtype=dtype), windows)
    solve, calls = block_training.BlockTraining.solve, []

    def dies(problem, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(problem.part.name)
        return solve(problem, *arguments)

    monkeypatch.setattr(block_training.BlockTraining, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        job.run(unit="sublayer", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = Job(make_model("llama", dtype=dtype), windows)
    solved = []
    monkeypatch.setattr(block_training.BlockTraining, "solve", lambda *a: solved.append(a[0].part.name) or solve(*a))
    records = again.run(unit="sublayer", folder=tmp_path)
    assert [record.name for record in records] == calls + solved
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in whole.tensors().items())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is broken"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), r"is broken \(its content"),
    ],
    ids=["truncated", "changed"],
)
def test_a_bad_file_of_an_earlier_run_is_refused(make_model, make_windows, tmp_path, harm, message):
    windows = make_windows(count=24, length=8)
    Job(make_model("llama"), windows).run(epochs=1, folder=tmp_path)
    file = min(tmp_path.iterdir())
    harm(file)
    with pytest.raises(InputError, match=f"{file.name} {message}"):
        Job(make_model("llama"), windows).run(epochs=1, folder=tmp_path)


def test_blocks_under_another_metric_or_with_other_layers_are_trained_anew(make_model, make_windows, tmp_path):
    windows, results = make_windows(count=24, length=8), []
    for damping, trained in ((0.03, None), (1.0, None), (1.0, ["model.layers.1.mlp.up_proj"])):
        alone, job = (Job(make_model("llama"), windows) for _ in range(2))
        for one, folder in ((alone, None), (job, tmp_path)):
            one.metric = metrics(one.factors, Damping(damping), "block")
            one.run(epochs=1, folder=folder, trained=trained)
        assert all(torch.equal(tensor, alone.tensors()[name]) for name, tensor in job.tensors().items())
        results.append(job.tensors())
    assert all(any(not torch.equal(t, other[name]) for name, t in one.items()) for one, other in pairwise(results))


def test_a_layer_before_the_blocks_is_part_of_what_was_lost(make_windows):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=48, hidden_size=24, word_embed_proj_dim=16, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, do_layer_norm_before=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model, windows = AutoModelForCausalLM.from_config(config).eval(), make_windows(count=24, length=8)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    layers = prunable_layers(model)
    assert "model.decoder.project_in" in {layer.name for layer in layers}
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.6, allocation="uniform")
    dense = prune(layers, plan)
    records = reconstruct_sparse(model, plan, factors, windows, dense.swapped_in, Reconstruction(epochs=2))
    held_out = windows.split(2)[1]  # a batch is a window here
    assert records[-1].after == pytest.approx(evaluate(model, held_out, dense=dense.swapped_in).kl, rel=1e-4)
    _, refitted = refit(model, layers, plan, factors, windows, dense.swapped_in)
    assert all(one.after <= one.before for one in refitted)


def test_a_model_without_blocks_is_refused(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    job.stack.blocks = job.stack.names = []
    with pytest.raises(InputError, match="has no list of blocks to reconstruct; use --reconstruct 0"):
        job.run()


@pytest.mark.parametrize(("seed", "epochs"), [(1, 1), (0, 2)])
def test_blocks_of_other_options_or_another_model_are_trained_anew(
    seed, epochs, make_model, make_windows, tmp_path, caplog
):
    windows = make_windows(count=24, length=8)
    Job(make_model("llama"), windows).run(epochs=1, folder=tmp_path)
    alone, job = (Job(make_model("llama", seed=seed), windows) for _ in range(2))
    alone.run(epochs=epochs)
    job.run(epochs=epochs, folder=tmp_path)
    assert "2 blocks in" in caplog.text
    assert all(torch.equal(tensor, alone.tensors()[name]) for name, tensor in job.tensors().items())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("block", "message"),
    [(0, r"the residual stream after model.layers.0 is not finite"), (1, r"KL.* after model.layers.1 is not finite")],
)
def test_what_is_not_finite_is_named(make_model, make_windows, block, message):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    broken = next(layer for layer in job.layers if layer.name == f"model.layers.{block}.mlp.down_proj")
    broken.assign(torch.full_like(broken.weight, float("nan")))
    with pytest.raises(InputError, match=message):
        job.run(epochs=1)


def test_held_out_windows_without_a_next_token_are_refused(make_model, make_windows):
    lengths = (8,) * 16 + (1,) * 8
    job = Job(make_model("llama"), make_windows(count=24, length=8, lengths=lengths))
    with pytest.raises(InputError, match=r"no position .* held out .* next token"):
        job.run(epochs=1)


def test_a_layer_without_weights_still_learns_its_bias(make_model, make_windows):
    job = Job(make_model("gpt2"), make_windows(count=24, length=8))
    layer = next(layer for layer in job.layers if layer.name == "transformer.h.0.mlp.c_proj")
    mask = next(one for one in job.plan.layers if one.name == layer.name).mask
    mask.fill_(False)
    layer.assign(torch.zeros_like(layer.weight), layer.bias)
    before = layer.bias.clone()
    job.run(epochs=1)
    assert not layer.weight.any()
    assert not torch.equal(layer.bias, before)


def test_a_block_that_runs_several_times_is_refused(make_windows):
    """ALBERT: only the first call would be seen."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=48, embedding_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    windows = make_windows(count=24, length=8)
    model = AlbertForMaskedLM(config).eval()
    layers = prunable_layers(model)
    masked = Tokens(causal=False)
    factors = estimate_factors(model, layers, windows, objective=masked)
    plan = make_plan(layers, factors, pattern=NM(2, 4), method="magnitude")
    dense = prune(layers, plan)
    settings = Reconstruction(1, objective=masked)
    with pytest.raises(InputError, match=r"AlbertForMaskedLM runs .* several times per pass.*--reconstruct 0"):
        reconstruction.reconstruct_sparse(model, plan, factors, windows, dense.swapped_in, settings)
    with pytest.raises(InputError, match=r"several times per pass.*--no-refit"):
        refit(model, layers, plan, factors, windows, dense.swapped_in)


def test_llama_4_with_its_routers_and_sums_in_place(make_windows):
    """Its router is a linear layer that returns two tensors, and it adds to what its shared expert puts out."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "intermediate_size_mlp": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Llama4TextConfig(**sizes, **heads, **special, num_hidden_layers=2, num_local_experts=4,
                              interleave_moe_layer_step=2)  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    for _, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.0) + (parameter.ndim == 1)
    job = Job(model, make_windows(count=24, length=8))
    assert not any("router" in layer.name for layer in job.layers)
    assert any("shared_expert" in layer.name for layer in job.layers)
    before = job.kl()
    assert all(record.after < record.before for record in job.run(epochs=2))
    assert job.kl() < before


def test_a_block_without_layers_to_train_is_skipped(make_model, make_windows):
    job = Job(make_model("llama"), make_windows(count=24, length=8))
    records = job.run(epochs=1, trained={"model.layers.1.self_attn.q_proj"})
    assert [record.name for record in records] == ["model.layers.1"]


def of_two(rank):
    """Half of every batch in each of two processes (run by test_ranks.py)."""
    whole = Job(build("llama"), random_windows(count=32, length=8), batch_size=4)
    mine = Job(build("llama"), Windows(whole.windows.input_ids[rank::2]), batch_size=2)
    mine.plan, mine.metric = whole.plan, whole.metric
    records = mine.run(epochs=2)
    return mine.tensors(), records


def check_two(results):
    """What ``of_two`` returned in both processes is what one does alone."""
    tensors, records = results[0]
    job = Job(build("llama"), random_windows(count=32, length=8), batch_size=4)
    alone = job.run(epochs=2)
    for mine, theirs in zip(alone, records, strict=True):
        assert mine.before == pytest.approx(theirs.before, rel=1e-4)
        assert mine.after == pytest.approx(theirs.after, rel=1e-3)
    for name, tensor in job.tensors().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-3)
