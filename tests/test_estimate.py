"""What a run is said to take, against counted operations, real tensors, and each other; nothing here measures time."""

import dataclasses
import importlib
import json
import time

import pytest
import torch
from letters import letter_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig

from kfac_prune.cli import main
from kfac_prune.config import Recipe
from kfac_prune.costs.dry_run import DryRun
from kfac_prune.costs.machine import CARDS, measured, named, rate
from kfac_prune.costs.stages import Setting
from kfac_prune.costs.work import Call, Factorisation, Move, Product, Transfer, Work, counted
from kfac_prune.curvature.estimate import estimate_factors, frozen
from kfac_prune.errors import InputError
from kfac_prune.estimate import estimate
from kfac_prune.inspect_model import empty_model
from kfac_prune.models import prunable_layers
from kfac_prune.objective import CAUSAL

LARGE = {
    "llama-7b": (lambda: LlamaConfig(), 6_738_415_616),
    "llama-8b": (
        lambda: LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
        8_030_261_248,
    ),
    "llama-70b": (
        lambda: LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8,
        ),
        68_976_648_192,
    ),
    "mixtral": (lambda: MixtralConfig(), 46_702_792_704),
}  # fmt: skip


def save(config, folder, name="LlamaForCausalLM"):
    config.architectures = [name]
    config.save_pretrained(folder)
    return str(folder)


estimate_module = importlib.import_module("kfac_prune.estimate")


@pytest.fixture
def source(tmp_path, model):
    """A folder with a configuration and nothing else."""
    return save(model.config, tmp_path, type(model).__name__)


def test_a_busy_machine_and_a_slow_dtype_are_told(tmp_path, monkeypatch):
    source = save(LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=40), tmp_path)
    card = named("h100")
    cpu = dataclasses.replace(card, gpu=False, host=card.memory)
    monkeypatch.setattr("kfac_prune.estimate.measured", lambda device, dtype: cpu)
    told = " ".join(estimate(recipe(source, device="cpu")).notes)
    assert "busy" not in told
    assert "--dtype" not in told
    slow = {**card.products, "bfloat16": [(64, 1e9)]}
    cpu = dataclasses.replace(cpu, busy=0.5, products=slow)
    told = " ".join(estimate(recipe(source, device="cpu")).notes)
    assert "50% of the processor was busy" in told
    assert "times slower than float32: add --dtype float32" in told


def dry(model):
    """The same model without weights."""
    return DryRun(empty_model("a test", model.config), CAUSAL)


def recipe(source, **fields):
    fields = {"samples": 32, "seqlen": 16, "eval_samples": 8, **fields}
    return Recipe(model=source, data="unused", out="unused", **fields)


def attention_flops(model, batch, length):
    """Of the scores and of what is made of them, as a full matrix; causal ones are counted by half."""
    config = model.config
    return 4 * config.num_hidden_layers * batch * length**2 * config.hidden_size


# --- operations


def test_forward_and_backward_against_counted_operations(model):
    """The operations of a real model on real tokens, by torch's own counter."""
    passes = dry(model).passes(3, 8)
    model.set_attn_implementation("eager")  # whose scores the counter sees
    ids = torch.zeros(3, 8, dtype=torch.long)
    with frozen(model), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            output = model(input_ids=ids, use_cache=False).logits
        with FlopCounterMode(display=False) as backward:
            output.backward(torch.ones_like(output))
    full = attention_flops(model, 3, 8)
    assert passes.forward.flops == pytest.approx(forward.get_total_flops() - full / 2, rel=1e-6)
    assert passes.backward.flops == pytest.approx(backward.get_total_flops() - 2 * full + 2.5 * full / 2, rel=1e-6)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_blocks_part_by_hand(model):
    weights = sum(layer.weight.numel() for layer in prunable_layers(model))
    passes = dry(model).passes(2, 8)
    assert passes.blocks.flops == 2 * 16 * weights + attention_flops(model, 2, 8) / 2
    head = 2 * 16 * model.config.vocab_size * model.config.hidden_size
    assert passes.forward.flops - passes.blocks.flops == pytest.approx(head, rel=0.01)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_training_step_has_the_gradients_of_weights_too(model):
    """Products by the weights in both directions, but for the readers of the stream, and for their gradients."""
    step = dry(model).step(2, 8)
    layers = prunable_layers(model)
    weights = sum(layer.weight.numel() for layer in layers)
    stream = sum(layer.weight.numel() for layer in layers if layer.name.endswith(("q_proj", "k_proj", "v_proj")))
    full = attention_flops(model, 2, 8) / 2
    assert step.train.flops == pytest.approx(2 * 16 * (3 * weights - stream) + 3.5 * full, rel=0.02)
    assert any(isinstance(o, Product) and o.precision == "approximate" for o in step.train.counts)


def test_operations_add_up_and_scale():
    work = Work({Product("float32", 2, 3, 5): 2, Factorisation("float64", 3, True): 1})
    work.move(1000)
    twice = work + work
    assert work.flops == 2 * 60 + 27
    assert (twice.flops, twice.moved) == (2 * work.flops, 2 * work.moved)
    assert work.moved == pytest.approx(1000)
    assert (work * 0.5).flops == work.flops / 2
    assert Work({Transfer("disk"): 7}).through("disk") == 7


def test_counting_on_the_meta_device():
    a, b = torch.empty(4, 6, device="meta"), torch.empty(6, 5, device="meta")
    with counted() as work:
        bool((a @ b).relu().sum() > 0)
    assert work.counts[Product("float32", 4, 6, 5)] == 1
    assert work.flops == 2 * 4 * 6 * 5
    assert work.counts[Call()] == 4
    assert any(isinstance(o, Move) for o in work.counts)


# --- memory


@pytest.mark.parametrize("size", [None, 3e-5], ids=["at once", "in groups"])
def test_factors_against_the_tensors_of_a_run(model, make_windows, size):
    layers, windows = prunable_layers(model), make_windows(4, 8)
    factors = estimate_factors(model, layers, windows)
    tensors = {id(t): t.nbytes for one in factors.layers.values() for t in (one.a, one.g)}
    dried = dry(model)
    room = None if size is None else size * 2**30
    setting = Setting(recipe("unused"), dried, 0.0, 4, False, room, {}, 0.0)
    assert setting.factor_bytes == sum(tensors.values())
    assert setting.stream_bytes == sum(t.nbytes for t in factors.streams.values())
    assert (setting.groups > 1) == (size is not None)


def test_activations_against_the_tensors_of_a_run(model):
    model.set_attn_implementation("sdpa")
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.zeros(4, 16, dtype=torch.long)
    with frozen(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, use_cache=False)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert dry(model).passes(4, 16).held == pytest.approx(real, rel=0.15)


def test_matrices_are_the_layers(model):
    assert [(m.name, m.shape) for m in dry(model).matrices] == [(x.name, x.shape) for x in prunable_layers(model)]


# --- large models, without weights


@pytest.mark.parametrize("name", LARGE)
def test_large_models_in_seconds(name, tmp_path):
    config, parameters = LARGE[name]
    source = save(config(), tmp_path, "MixtralForCausalLM" if name == "mixtral" else "LlamaForCausalLM")
    begin = time.process_time()
    found = estimate(recipe(source, seqlen=256, samples=128, dtype="bfloat16"), "h100")
    assert time.process_time() - begin < 60
    assert found.parameters == parameters
    assert found.weights > 0.85 * parameters
    assert found.machine.name == "h100"
    assert found.fits == (name not in ("llama-70b", "mixtral"))
    assert "--offload" in found.table() or found.fits


def test_experts_share_the_tokens():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    found = DryRun(empty_model("a test", config), CAUSAL)
    experts = [m for m in found.matrices if m.share < 1]
    assert len(experts) == 2 * 8 * 2
    assert {m.shape for m in experts} == {(96, 32), (32, 48)}
    assert {m.share for m in experts} == {0.25}
    dense = sum(m.weights * m.share for m in found.matrices) + 2 * 8 * 32  # and the routers
    assert found.passes(2, 16).blocks.flops == pytest.approx(2 * 32 * dense + 4 * 2 * 2 * 16**2 * 32 / 2, rel=1e-6)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_no_weight_is_made(source, monkeypatch):
    made = []
    real = empty_model

    def noted(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr("kfac_prune.estimate.empty_model", noted)
    before = torch.get_rng_state()
    estimate(recipe(source), "h100")
    (model,) = made
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


# --- the whole


def estimated(source, **fields):
    return estimate(recipe(source, **fields), "h100")


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"samples": 64}, {"samples": 32}),
        ({"seqlen": 16}, {"seqlen": 8}),
        ({"reconstruct": 8}, {"reconstruct": 2}),
        ({"reconstruct": 2}, {"reconstruct": 0, "refit": False}),
        ({"reconstruct": 5}, {"reconstruct": 5, "own_text": 0}),
        ({"eval_samples": 64}, {"eval_samples": 8}),
        ({"allocation": "curves"}, {"allocation": "uniform"}),
        ({"method": "kfac"}, {"method": "magnitude", "reconstruct": 8}),
        ({"max_memory": 1e-5}, {"max_memory": 1.0}),
    ],
    ids=str,
)
def test_more_takes_longer(source, more, less):
    assert estimated(source, **more).seconds > estimated(source, **less).seconds


def test_a_larger_model_takes_more_of_everything(tmp_path):
    found = [
        estimated(save(LlamaConfig(num_hidden_layers=4, hidden_size=n, intermediate_size=3 * n, vocab_size=512,
                                   num_attention_heads=8), tmp_path / str(n)))
        for n in (256, 512)
    ]  # fmt: skip
    small, large = found
    assert large.seconds > small.seconds
    assert large.device > small.device
    assert large.disk > small.disk


def test_dtype_offload_and_groups_take_less_memory(tmp_path):
    config = LlamaConfig(num_hidden_layers=8, hidden_size=512, intermediate_size=1024, vocab_size=512)
    source = save(config, tmp_path)
    plain = estimated(source, dtype="float32")
    assert estimated(source, dtype="bfloat16").device < plain.device
    assert estimated(source, dtype="float32", offload=True).device < plain.device
    grouped = estimated(source, dtype="float32", max_memory=0.02)
    assert grouped.groups > 1
    assert grouped.device < plain.device
    assert grouped.host > plain.host


def test_stages_are_those_of_a_run(source):
    names = [row.stage for row in estimated(source).rows]
    assert names == [
        "load", "curvature", "plan: curves, probe", "plan: solve", "measure dense", "reconstruct", "measure pruned",
        "save",
    ]  # fmt: skip
    with_pattern = [row.stage for row in estimated(source, pattern="2:4", reconstruct=0).rows]
    assert {"permute", "refit"} < set(with_pattern)
    assert "reconstruct" not in with_pattern


def test_a_tokenizer_that_is_there_is_timed(source, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("abc de " * 20000)
    text = dataclasses.replace(recipe(source), data=str(file), device="cpu")
    assert estimate_module._tokenizing(text) is None  # a configuration alone
    letter_tokenizer().save_pretrained(source)
    speed = estimate_module._tokenizing(text)
    assert speed > 1000
    monkeypatch.setattr(estimate_module, "_tokenizing", lambda recipe: speed)
    fast = estimate(text).machine
    assert fast.channels["text"] == speed
    assert estimate(dataclasses.replace(text, device="auto"), "h100").machine.channels["text"] != speed


def test_text_that_is_there_counts(source, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("words " * 20000)
    text = dataclasses.replace(recipe(source), data=str(file))
    assert estimate(text, "h100").rows[0].seconds > estimated(source).rows[0].seconds


# --- machines


@pytest.mark.parametrize("name", CARDS)
def test_a_named_card_is_below_its_public_figures(name):
    card, machine = CARDS[name], named(name.upper())
    assert machine.products["bfloat16"][-1][1] < card.bfloat16 * 1e12
    assert machine.bandwidth[0][1] < card.bandwidth * 1e12
    second = Work({Product("bfloat16", 4096, 4096, 4096): 1})
    assert machine.seconds(second) > second.flops / (card.bfloat16 * 1e12)


def test_a_device_that_is_not_known_is_not_taken_for_another():
    with pytest.raises(InputError, match="of mps cannot be measured"):
        measured("mps", torch.float32)


def test_rates_between_sizes():
    rates = ((64, 10.0), (256, 40.0))
    assert rate(rates, 128) == pytest.approx(20.0)
    assert (rate(rates, 1000), rate(rates, 256)) == (40.0, 40.0)
    assert rate(rates, 16) < 10.0


# --- the command


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_command(source, capsys, tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--for", "h100", "--seqlen", "16", "--samples", "32", "--json", str(file)]
    assert main(["estimate", source, *arguments]) == 0
    out = capsys.readouterr().out
    assert "fits: " in out
    record = json.loads(file.read_text())
    assert record["seconds"] == pytest.approx(sum(stage["seconds"] for stage in record["stages"].values()))
    assert record["peak_device_bytes"] == max(stage["peak_device_bytes"] for stage in record["stages"].values())
    assert record["fits"] is True


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_this_device(source, capsys):
    assert main(["estimate", source, "--seqlen", "16", "--samples", "32", "--device", "cpu"]) == 0
    assert "in main memory" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_figures_go_to_the_home_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["estimate", source, "--for", "h100", "--seqlen", "16", "--json=~/figures.json"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["fits"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_file_that_cannot_be_written_is_noticed_before_the_work(source, monkeypatch, capsys):
    monkeypatch.setattr(estimate_module, "estimate", lambda *a: pytest.fail("the work began"))
    assert main(["estimate", source, "--for", "h100", "--json", "no/such/folder/file.json"]) == 2
    assert "--json no/such/folder/file.json cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--for", "abacus"], "for is 'abacus'; choose one of h100"),
        (["--for", "h100", "--device", "cpu"], "give one of them"),
        (["--seqlen", "4096"], "the model's context is 16"),
        (["--samples", "0"], "samples is 0"),
        (["--method", "ek-fac", "--for", "h100"], "method is ek-fac"),
        (["--shots", "3", "--for", "h100"], "shots is 3"),
        (["--structured", "ffn"], "unrecognized arguments"),
        (["--ignore", "*.nothing", "--for", "h100"], "matches none"),
        (["--for", "h100", "--json", "no/such/folder/file.json"], "cannot be written"),
        (["--device", "abacus"], "cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses(arguments, expected, source, capsys):
    short = [] if "--seqlen" in arguments else ["--seqlen", "16"]
    assert main(["estimate", source, *short, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_what_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertLMHeadModel"]}')
    assert main(["estimate", str(tmp_path), "--for", "h100"]) == 2
    assert "not a causal language model" in capsys.readouterr().err
    assert main(["estimate", str(tmp_path / "nowhere"), "--for", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="model is empty"):
        Recipe(model="", data="x", out="x")


def test_a_recipe_of_prune_is_taken(source, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: text.txt\nsamples: 32\nseqlen: 16\nreconstruct: 0\n")
    assert main(["estimate", source, "--for", "h100", "--recipe", str(file)]) == 0
    assert "reconstruct" not in capsys.readouterr().out.split("fits")[0]
