"""A smaller model is the masked model, is saved as what it is, and loads as what was saved."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, GROUPED, example, groups_of, logits, random_model, remove
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralForCausalLM

from kfac_prune.errors import InputError
from kfac_prune.export import save_model, verify_saved
from kfac_prune.loading import load, load_model
from kfac_prune.structure.shrink import Cut, accepted_heads, base_class, shrink

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}  # of the largest logit
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ALL = pytest.mark.parametrize("name", FAMILIES)
WITH_HEADS = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.heads])
GROUPED_QUERIES = [name for name, family in FAMILIES.items() if family.counts == (3, 2)]
PLAIN_HEADS = pytest.mark.parametrize("name", [*GROUPED_QUERIES, "vit"])
CAUSAL = pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.auto is AutoModelForCausalLM])


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies the code that comes with a model; imports of it end with the test."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for module in [m for m in sys.modules if m.startswith("transformers_modules")]:
        del sys.modules[module]


def own_heads(family):
    """Counts that differ between the blocks, or none."""
    return {(3, 2): ((2, 1), (3, 1)), (4, 1): ((2, 1), (3, 1)), (0, 0): ()}[family.counts]


def with_own_widths(name, dtype=torch.float32, **options):
    """(family, removal, smaller model) whose blocks differ in every way that the family allows."""
    family = FAMILIES[name]
    model = random_model(family, dtype, **options)
    smaller = remove(model, family, (24, 16), own_heads(family))
    return family, smaller, shrink(model, smaller.cuts)


def assert_same_tensors(model, state):
    actual = model.state_dict()
    assert actual.keys() == state.keys()
    for name, tensor in state.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def assert_is(model, family, smaller, near):
    """``model`` has the tensors sliced by name, and computes what the masked model computes."""
    assert_same_tensors(model, smaller.state)
    assert not model.training
    dtype = model.dtype
    inputs = example(family, dtype)
    near(logits(model, inputs), logits(smaller.masked, inputs), TOLERANCE[dtype])


def assert_reloads(model, family, folder):
    """Saving and loading changes neither class nor configuration, tensors or outputs."""
    save_model(model, None, folder)
    inputs = example(family, model.dtype)
    expected = logits(model, inputs)
    loaded = [family.auto.from_pretrained(folder, dtype="auto", trust_remote_code=True)]
    if family.auto is AutoModelForCausalLM:
        verify_saved(model, folder)
        loaded += [load(folder, dtype="auto"), load_model(str(folder))]
    for other in loaded:
        assert type(other).__name__ == type(model).__name__
        assert base_class(other) is base_class(model)
        assert_same_tensors(other, model.state_dict())
        assert torch.equal(logits(other.eval(), inputs), expected)


@DTYPES
@ALL
def test_one_width_for_all_blocks_gives_a_plain_model(name, dtype, near):
    family = FAMILIES[name]
    model = random_model(family, dtype)
    smaller = remove(model, family, (24, 24))
    shrunk = shrink(model, smaller.cuts, plain=True)
    assert type(shrunk) is type(model)
    assert getattr(shrunk.config, family.width_field) == 24
    assert not hasattr(shrunk.config, "pruned_shapes")
    assert not hasattr(shrunk.config, "auto_map")
    assert_is(shrunk, family, smaller, near)


@DTYPES
@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (1, 2), (2, 1)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", GROUPED_QUERIES)
def test_the_same_heads_in_all_blocks_give_a_plain_model(name, counts, dtype, near):
    family = FAMILIES[name]
    model = random_model(family, dtype)
    smaller = remove(model, family, (7, 7), (counts, counts))
    shrunk = shrink(model, smaller.cuts, plain=True)
    assert type(shrunk) is type(model)
    config = shrunk.config
    assert (config.num_key_value_heads, config.num_attention_heads) == (counts[0], counts[0] * counts[1])
    assert (config.head_dim, config.hidden_size, config.intermediate_size) == (4, 24, 7)
    assert not hasattr(config, "pruned_shapes")
    assert_is(shrunk, family, smaller, near)


@DTYPES
def test_heads_of_a_vision_transformer_give_a_plain_model(dtype, near):
    family = FAMILIES["vit"]
    model = random_model(family, dtype)
    smaller = remove(model, family, heads=((3, 1), (3, 1)))
    shrunk = shrink(model, smaller.cuts, plain=True)
    assert type(shrunk) is type(model)
    assert (shrunk.config.num_attention_heads, shrunk.config.intermediate_size) == (3, 40)
    assert_is(shrunk, family, smaller, near)


@DTYPES
@ALL
def test_widths_of_their_own(name, dtype, near):
    family, smaller, shrunk = with_own_widths(name, dtype)
    base = base_class(shrunk)
    assert type(shrunk).__name__ == f"Pruned{base.__name__}"
    assert type(shrunk) is not base
    assert isinstance(shrunk, base)
    assert shrunk.config.auto_map == {family.auto.__name__: f"pruned_model.Pruned{base.__name__}"}
    assert getattr(shrunk.config, family.width_field) == 40  # of the model that it came from
    assert_is(shrunk, family, smaller, near)


@DTYPES
@WITH_HEADS
def test_heads_of_one_block(name, dtype, near):
    """The other block, and every FFN, keep all."""
    family = FAMILIES[name]
    model = random_model(family, dtype)
    smaller = remove(model, family, heads=(None, (1, 1)))
    shrunk = shrink(model, smaller.cuts)
    assert type(shrunk).__name__ == f"Pruned{type(model).__name__}"
    assert list(shrunk.config.pruned_head_counts.values()) == [[1, 1]]
    assert_is(shrunk, family, smaller, near)


@ALL
def test_units_of_one_block(name, near):
    family = FAMILIES[name]
    model = random_model(family, torch.float64)
    smaller = remove(model, family, (1, None))
    shrunk = shrink(model, smaller.cuts)
    assert type(shrunk).__name__ == f"Pruned{type(model).__name__}"
    assert_is(shrunk, family, smaller, near)
    with pytest.raises(InputError, match="width 1 with the rest as it is"):
        shrink(model, smaller.cuts, plain=True)


@pytest.mark.parametrize("heads", [((2, 2), None), ((2, 1), (2, 1))], ids=["one-block", "both-blocks"])
def test_whichever_heads_stay(heads, near):
    family = FAMILIES["llama"]
    model = random_model(family, torch.float64)
    for seed in range(4):
        smaller = remove(model, family, heads=heads, seed=seed)
        assert_is(shrink(model, smaller.cuts), family, smaller, near)


@ALL
def test_a_plain_model_reloads(name, tmp_path):
    family = FAMILIES[name]
    model = random_model(family)
    heads = ((2, 1), (2, 1)) if name in GROUPED_QUERIES else ()
    shrunk = shrink(model, remove(model, family, (24, 24), heads).cuts, plain=True)
    assert_reloads(shrunk, family, tmp_path / "model")
    assert not (tmp_path / "model" / "pruned_model.py").exists()
    plain = family.auto.from_pretrained(tmp_path / "model")  # in particular without remote code
    assert_same_tensors(plain, shrunk.state_dict())


@ALL
def test_a_model_with_widths_of_its_own_reloads(name, tmp_path, modules_cache):
    family, _, shrunk = with_own_widths(name)
    assert_reloads(shrunk, family, tmp_path / "model")
    code = (tmp_path / "model" / "pruned_model.py").read_text()
    assert "@BASE@" not in code
    assert "kfac_prune" not in code.split('"""')[2]  # needs nothing of ours
    assert list(modules_cache.rglob("pruned_model.py"))


def test_half_precision_and_attention_implementation_stay(tmp_path):
    family = FAMILIES["llama"]
    model = random_model(family, torch.bfloat16)
    model.set_attn_implementation("eager")
    for widths in ((24, 24), (24, 16)):
        shrunk = shrink(model, remove(model, family, widths).cuts)
        assert {p.dtype for p in shrunk.parameters()} == {torch.bfloat16}
        assert shrunk.config._attn_implementation == "eager"
        folder = tmp_path / str(widths[1])
        save_model(shrunk, None, folder)
        verify_saved(shrunk, folder)


def test_two_models_in_folders_of_one_name(tmp_path, modules_cache):
    """The code of the first is not taken for that of the second."""
    for name in ("llama", "gpt2", "bert"):
        family, _, shrunk = with_own_widths(name)
        assert_reloads(shrunk, family, tmp_path / name / "model")


FRESH = """
import sys
import torch
import transformers

assert torch.get_num_threads() == {threads}
for folder, auto in {folders}:
    inputs, expected = torch.load(folder + "/expected.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__.startswith("Pruned"), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=1e-6)
assert not [name for name in sys.modules if name.startswith("kfac_prune")]
print("equal")
"""


def test_a_fresh_process_needs_only_transformers(tmp_path):
    folders = []
    for name in ("llama", "phi3", "gpt2", "vit"):
        family, _, shrunk = with_own_widths(name)
        folder = tmp_path / name
        save_model(shrunk, None, folder)
        inputs = example(family)
        torch.save((inputs, logits(shrunk, inputs)), folder / "expected.pt")
        folders.append((str(folder), family.auto.__name__))
    threads = torch.get_num_threads()
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(folders=folders, threads=threads)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "opt"])
def test_generation_with_a_smaller_cache(name, cache):
    family, smaller, own = with_own_widths(name, torch.float64)
    model = random_model(family, torch.float64)
    models = [(own, [2, 3], smaller.masked)]
    if name in GROUPED_QUERIES:
        even = remove(model, family, (24, 24), ((1, 2), (1, 2)))
        models.append((shrink(model, even.cuts), [1, 1], even.masked))
    for shrunk, groups, masked in models:
        told = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        out = shrunk.generate(example(family), **told, cache_implementation=cache)
        expected = masked.generate(example(family), **told)
        assert out.sequences.shape == (2, 11)
        assert torch.equal(out.sequences, expected.sequences)
        layers = out.past_key_values.layers
        assert [layer.keys.shape[1] for layer in layers] == groups
        assert [layer.values.shape[1] for layer in layers] == groups
        assert {layer.keys.shape[-1] for layer in layers} == {family.head_dim}


MANY = {"num_attention_heads": 6, "num_key_value_heads": 6}  # 5 of them do not divide the hidden size of 24
SIX_BY_ONE = {"was": [(6, 1), (6, 1)]}
LONG = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "llama3": {**LONG, "rope_theta": 500.0, "original_max_position_embeddings": 8},
}


@DTYPES
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_heads_that_llama_refuses_are_a_mistral(rope, tied, dtype, tmp_path, near):
    family = FAMILIES["llama"]
    model = random_model(family, dtype, **MANY, rope_parameters=ROPES[rope], tie_word_embeddings=tied)
    smaller = remove(model, family, (24, 24), ((5, 1), (5, 1)), **SIX_BY_ONE)
    with pytest.raises(Exception, match="not a multiple"):
        LlamaConfig(**{**GROUPED, "num_attention_heads": 5, "num_key_value_heads": 5})
    shrunk = shrink(model, smaller.cuts, plain=True)
    assert type(shrunk) is MistralForCausalLM
    assert shrunk.config.sliding_window is None
    assert shrunk.config.num_attention_heads == shrunk.config.num_key_value_heads == 5
    assert shrunk.config.model_type == "mistral"
    assert_is(shrunk, family, smaller, near)
    save_model(shrunk, None, tmp_path)
    verify_saved(shrunk, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is MistralForCausalLM
    assert loaded.config.architectures == ["MistralForCausalLM"]
    near(logits(loaded, example(family)), logits(smaller.masked, example(family)), 5e-6)  # RoPE is float32 again


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}], ids=["attention", "ffn"])
def test_a_llama_with_biases_is_no_mistral(biases, near):
    family = FAMILIES["llama-biased" if "attention_bias" in biases else "llama"]
    model = random_model(family, torch.float64, **MANY, **biases)
    smaller = remove(model, family, heads=((5, 1), (5, 1)), **SIX_BY_ONE)
    fits = ", ".join(f"{n} in {n} KV groups" for n in (1, 2, 3, 4, 6))
    with pytest.raises(InputError, match=rf"llama .* cannot hold 5 heads in 5 KV groups; it can hold {fits}$"):
        shrink(model, smaller.cuts, plain=True)
    shrunk = shrink(model, smaller.cuts)
    assert type(shrunk).__name__ == "PrunedLlamaForCausalLM"
    assert_is(shrunk, family, smaller, near)


def test_a_refused_count_names_those_that_fit(near):
    family = FAMILIES["gemma2"]
    model = random_model(family, torch.float64, num_attention_heads=12, num_key_value_heads=6)
    smaller = remove(model, family, heads=((5, 2), (5, 2)), was=[(6, 2), (6, 2)])
    fits = [(g, q) for g in range(1, 7) for q in (1, 2) if 24 % (g * q) == 0]
    with pytest.raises(InputError, match=r"gemma2 .* cannot hold 10 heads in 5 KV groups") as raised:
        shrink(model, smaller.cuts, plain=True)
    assert str(raised.value).endswith(", ".join(f"{g * q} in {g} KV groups" for g, q in fits))
    assert_is(shrink(model, smaller.cuts), family, smaller, near)


def test_opt_holds_no_other_count():
    family = FAMILIES["opt"]
    model = random_model(family)
    with pytest.raises(InputError, match=r"cannot hold 2 heads in 2 KV groups; it can hold 4 in 4 KV groups$"):
        shrink(model, remove(model, family, heads=((2, 1), (2, 1))).cuts, plain=True)


@ALL
def test_plain_refuses_widths_that_differ(name):
    family = FAMILIES[name]
    model = random_model(family)
    with pytest.raises(InputError, match=f"{model.config.model_type} configuration holds one width for all blocks"):
        shrink(model, remove(model, family, (24, 16)).cuts, plain=True)


def attention_of(model):
    return next(group for group in groups_of(model).values() if hasattr(group, "head_dim"))


@pytest.mark.parametrize("name", [*GROUPED_QUERIES, "opt", "vit"])
def test_accepted_heads(name):
    family = FAMILIES[name]
    model = random_model(family)
    every = {(g, q) for g in range(1, family.counts[0] + 1) for q in range(1, family.counts[1] + 1)}
    assert accepted_heads(model, attention_of(model)) == ({(4, 1)} if name == "opt" else every)


@pytest.mark.parametrize("biased", [False, True], ids=["mistral", "llama"])
def test_accepted_heads_of_llama(biased):
    model = random_model(FAMILIES["llama"], **MANY, attention_bias=biased)
    accepted = accepted_heads(model, attention_of(model))
    assert accepted == {(g, 1) for g in range(1, 7) if not biased or 24 % g == 0}


@PLAIN_HEADS
def test_every_accepted_count_can_be_had(name, near):
    family = FAMILIES[name]
    model = random_model(family, torch.float64)
    for counts in accepted_heads(model, attention_of(model)):
        smaller = remove(model, family, heads=(counts, counts))
        assert_is(shrink(model, smaller.cuts, plain=True), family, smaller, near)


@pytest.mark.parametrize("widths", [(24, 24), (24, 16)], ids=["plain", "own"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "gemma", "bert"])
def test_ties_stay(name, widths, tmp_path):
    family = FAMILIES[name]
    model = random_model(family)
    shrunk = shrink(model, remove(model, family, widths).cuts)
    save_model(shrunk, None, tmp_path)
    loaded = family.auto.from_pretrained(tmp_path) if widths == (24, 24) else None
    again = load(tmp_path) if family.auto is AutoModelForCausalLM else loaded
    for one in filter(None, (shrunk, loaded, again)):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert one.num_parameters() == shrunk.num_parameters() == sum(p.numel() for p in one.parameters())


def test_an_untied_head_stays_untied(tmp_path):
    _, _, shrunk = with_own_widths("llama")
    save_model(shrunk, None, tmp_path)
    for one in (shrunk, load(tmp_path)):
        assert not torch.equal(one.get_output_embeddings().weight, one.get_input_embeddings().weight)


@ALL
def test_the_dense_model_stays(name):
    family = FAMILIES[name]
    model = random_model(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config, output = copy.deepcopy(model.config.to_dict()), logits(model, example(family))
    for widths, heads in (((24, 24), ()), ((24, 16), own_heads(family))):
        cuts = remove(model, family, widths, heads).cuts
        shrunk = shrink(model, cuts)
        for cut in cuts:  # what is new is not shared either
            cut.weight.zero_()
        for cut in cuts:
            consumer, producer = (
                shrunk.get_submodule(layer.name).weight.data for layer in (cut.group.consumer, cut.group.producers[0])
            )
            assert consumer.any()
            consumer.zero_()
            producer.zero_()
    assert_same_tensors(model, before)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, example(family)), output)


@ALL
def test_cuts_that_keep_all_change_only_the_consumers(name):
    family = FAMILIES[name]
    model = random_model(family)
    cuts = [
        Cut(g, g.everything(), g.consumer.weight.clone(), None if g.consumer.bias is None else g.consumer.bias.clone())
        for g in groups_of(model).values()
    ]
    for shrunk in (shrink(model, cuts), shrink(model, [])):
        assert type(shrunk) is type(model)
        assert_same_tensors(shrunk, model.state_dict())


@pytest.mark.parametrize("which", ["mlp", "self_attn"])
def test_a_group_that_would_lose_everything_is_named(which):
    model = random_model(FAMILIES["llama"])
    group = groups_of(model)[f"model.layers.1.{which}"]
    nothing = group.everything()[:0]
    with pytest.raises(InputError, match=rf"model\.layers\.1\.{which} would lose all of its units"):
        shrink(model, [Cut(group, nothing, group.consumer.weight[:, :0], None)])


@DTYPES
@pytest.mark.parametrize("reload", [False, True], ids=["in-memory", "reloaded"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "opt", "gpt2"])
def test_a_model_with_widths_of_its_own_is_cut_again(name, reload, dtype, tmp_path, near):
    family, _, shrunk = with_own_widths(name, dtype)
    if reload:
        save_model(shrunk, None, tmp_path / "first")
        shrunk = load(tmp_path / "first", dtype="auto").eval()
    was = own_heads(family)
    again = remove(shrunk, family, (11, 9), [(2, 1), (1, 1)] if was else (), was=was, seed=5)
    other = shrink(shrunk, again.cuts)
    assert type(other).__name__ == type(shrunk).__name__
    assert type(other).__mro__[1] is base_class(shrunk)
    assert_is(other, family, again, near)
    save_model(other, None, tmp_path / "second")
    verify_saved(other, tmp_path / "second")


@DTYPES
@pytest.mark.parametrize(
    ("widths", "heads"), [((None, 9), ()), ((), (None, (1, 1))), ((), ())], ids=["an-ffn", "an-attention", "nothing"]
)
@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_what_is_not_cut_again_stays_small(name, widths, heads, dtype, near):
    family, _, shrunk = with_own_widths(name, dtype)
    again = remove(shrunk, family, widths, heads, was=own_heads(family), seed=5)
    assert_is(shrink(shrunk, again.cuts), family, again, near)


@DTYPES
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_cut_again_to_one_width_it_is_plain(name, dtype, tmp_path, near):
    family, _, shrunk = with_own_widths(name, dtype)
    was = own_heads(family)
    again = remove(shrunk, family, (9, 9), [(2, 1), (2, 1)] if was else (), was=was, seed=5)
    other = shrink(shrunk, again.cuts, plain=True)
    assert type(other) is base_class(shrunk)
    for field in ("pruned_shapes", "pruned_head_counts", "auto_map"):
        assert not hasattr(other.config, field)
    assert_is(other, family, again, near)
    save_model(other, None, tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is base_class(shrunk)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "pruned_shapes")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_of_other_widths_is_refused(name, tmp_path):
    _, _, shrunk = with_own_widths(name)
    layer = next(iter(shrunk.config.pruned_shapes))
    shrunk.config.pruned_shapes[layer] = [23, 24]
    save_model(shrunk, None, tmp_path)
    with pytest.raises(InputError, match=rf"has {layer}\.(weight|bias) as"):
        load_model(str(tmp_path))
