"""The recipe: validation, patterns, YAML."""

import dataclasses
import itertools
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_prune.config import ALLOCATIONS, BASELINES, METHODS, RECONSTRUCT, SEQUENCE_METHODS, Recipe, parse_pattern
from kfac_prune.errors import InputError
from kfac_prune.recipe_file import read_recipe

PATHS = {"model": "m", "data": "d", "out": "o"}
FIELDS = [f.name for f in dataclasses.fields(Recipe)]
TEXTS = ("model", "data", "out", "text_field", "pattern", "method", "fisher", "device", "dtype")
TEXTS += ("reconstruct_unit", "streams", "objective")
OPTIONAL_TEXTS = ("eval_data", "separator", "allocation", "structured", "widths")
COUNTS = ("samples", "eval_samples", "seqlen", "batch_size", "seed", "recover_epochs")
LISTS = ("include", "ignore")
SWITCHES = ("offload", "skip_bad_batches", "overwrite", "resume", "trust_remote_code")
OPTIONAL_SWITCHES = ("refit", "permute")
OPTIONAL_COUNTS = ("target_params", "multiple", "shots", "reconstruct", "own_text")
OPTIONAL_NUMBERS = ("sparsity", "damping", "target_latency", "max_memory")
GROUPS = (TEXTS, OPTIONAL_TEXTS, COUNTS, LISTS, SWITCHES, OPTIONAL_SWITCHES, OPTIONAL_COUNTS, OPTIONAL_NUMBERS)


def recipe(**fields):
    return Recipe(**{**PATHS, **fields})


# --- types and ranges


def test_every_field_is_in_one_of_the_groups_above():
    assert sorted(name for group in GROUPS for name in group) == sorted(FIELDS)


WRONG_TYPES = (
    [(name, value) for name in TEXTS for value in (None, 3, 0.5, True, ["a"], ("a",), b"a", {})]
    + [(name, value) for name in OPTIONAL_TEXTS for value in (3, 0.5, False, ["a"], ("a",))]
    + [(name, value) for name in COUNTS for value in (None, "8", 8.0, True, [8], math.nan)]
    + [(name, value) for name in OPTIONAL_COUNTS for value in ("8", 8.0, True, [8], math.nan)]
    + [(name, value) for name in OPTIONAL_NUMBERS for value in ("0.5", True, [0.5], {}, 1j)]
    + [(name, value) for name in LISTS for value in (None, "*.mlp.*", ["*"], (1,), ("a", None), 3)]
    + [(name, value) for name in SWITCHES for value in (None, "yes", 1, 0, [True])]
    + [(name, value) for name in OPTIONAL_SWITCHES for value in ("yes", 1, 0, [True])]
)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda value: repr(value))
def test_wrong_type_names_field_and_value(name, value):
    with pytest.raises(InputError, match=f"^{name} is {re.escape(repr(value))}; it must be of type "):
        recipe(**{name: value})


OUT_OF_RANGE = (
    [(name, value) for name in ("samples", "eval_samples", "batch_size") for value in (0, -1, -(10**30))]
    + [("seqlen", value) for value in (1, 0, -5)]
    + [("own_text", value) for value in (-1, 101, -(10**30))]
    + [("seed", value) for value in (-1, 2**63, 10**40)]
    + [("sparsity", value) for value in (1, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf, 10**400)]
    + [("damping", value) for value in (0, 0.0, -0.03, 1.1, math.nan, math.inf, -math.inf)]
)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda value: repr(value)[:20])
def test_value_out_of_range_names_field_value_and_range(name, value):
    with pytest.raises(InputError, match=f"^{name} is {re.escape(str(value))}; it must be (at least|above) "):
        recipe(**{name: value})


@pytest.mark.parametrize("name", ["method", "fisher", "dtype", "allocation", "widths"])
@pytest.mark.parametrize("value", ["", "KFAC", "sampled ", "int8", "automatic"])
def test_unknown_choice_lists_the_choices(name, value):
    choices = next(f for f in dataclasses.fields(Recipe) if f.name == name).metadata["choices"]
    with pytest.raises(InputError, match=f"^{name} is {value!r}; choose one of {', '.join(choices)}$"):
        recipe(**{name: value})


@pytest.mark.parametrize("name", ["model", "data", "out"])
@pytest.mark.parametrize("value", ["", " ", "\t\n"])
def test_empty_path_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} is empty"):
        recipe(**{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": 1, "eval_samples": 1, "seqlen": 2, "batch_size": 1, "seed": 0},
        {"sparsity": 0},
        {"sparsity": 0.0},
        {"sparsity": 1 - 1e-9},
        {"damping": 1},
        {"damping": 1e-30},
        {"seed": 2**63 - 1},
        {"include": ("a", "*"), "ignore": ("b",)},
        {"separator": "\n\n", "eval_data": "e", "text_field": "story"},
    ],
    ids=str,
)
def test_values_at_the_limits_are_accepted(fields):
    made = recipe(**fields)
    assert all(getattr(made, name) == value for name, value in fields.items())


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().sparsity = 0.9


# --- patterns


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("unstructured", None),
        ("2:4", (2, 4)),
        ("1:2", (1, 2)),
        ("4:8", (4, 8)),
        ("1:64", (1, 64)),
        ("63:64", (63, 64)),
        ("02:04", (2, 4)),
    ],
)
def test_good_pattern(text, pair):
    assert parse_pattern(text) == pair
    assert recipe(pattern=text).pattern == text


BAD_PATTERNS = (
    "",
    ":",
    "2",
    "2:",
    ":4",
    "2:4:8",
    "2/4",
    "2-4",
    "2 :4",
    " 2:4",
    "2:4 ",
    "2:4\n",
    "a:b",
    "2:b",
    "-1:4",
    "2:-4",
    "+2:4",
    "2.0:4",
    "1e0:4",
    "0:4",
    "0:0",
    "4:4",
    "5:4",
    "2:65",
    "64:65",
    "2:1000",
    "9999:99999",
    "²:4",
    "٢:٤",
    "Unstructured",
    "unstructured ",
    "none",
)


@pytest.mark.parametrize("text", BAD_PATTERNS, ids=repr)
def test_bad_pattern_is_quoted(text):
    with pytest.raises(InputError, match=r"^pattern ") as caught:
        parse_pattern(text)
    assert text in str(caught.value) or repr(text) in str(caught.value)
    with pytest.raises(InputError, match=r"^pattern "):
        recipe(pattern=text)


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(st.text() | st.from_regex(r"[0-9]{0,3}:[0-9]{0,3}") | st.builds("{}:{}".format, st.integers(), st.integers()))
def test_any_text_is_a_valid_pattern_or_refused(text):
    try:
        pair = parse_pattern(text)
    except InputError:
        return
    if pair is None:
        assert text == "unstructured"
    else:
        assert 1 <= pair[0] < pair[1] <= 64


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.6), ("1:4", 0.76), ("2:4", 0.99), ("2:3", 0.334)])
def test_sparsity_above_the_pattern_is_refused(pattern, sparsity):
    with pytest.raises(
        InputError, match=f"pattern {pattern} removes .* but sparsity is {sparsity}; leave sparsity out"
    ):
        recipe(pattern=pattern, sparsity=sparsity)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.4), ("1:4", 0.5), ("2:4", 0), ("2:3", 0.333)])
def test_sparsity_below_the_pattern_leaves_layers_dense(pattern, sparsity):
    made = recipe(pattern=pattern, sparsity=sparsity)
    assert (made.resolved().sparsity, made.resolved().allocation) == (sparsity, "curves")
    assert made.resolved().resolved() == made.resolved()
    assert recipe(pattern=pattern, sparsity=sparsity, allocation="curves").resolved() == made.resolved()
    for allocation in ("uniform", "global"):
        with pytest.raises(InputError, match=f"pattern {pattern} leaves layers dense; allocation can only be curves"):
            recipe(pattern=pattern, sparsity=sparsity, allocation=allocation)
    for method in METHODS[1:]:
        with pytest.raises(InputError, match=f"^sparsity {sparsity} is less .* method {method} has none; use kfac"):
            recipe(pattern=pattern, sparsity=sparsity, method=method)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("2:3", 1 / 3), ("2:3", 0.3333333)])
def test_sparsity_that_repeats_the_pattern_is_accepted(pattern, sparsity):
    assert recipe(pattern=pattern, sparsity=sparsity).resolved().sparsity == pytest.approx(sparsity, abs=1e-6)


# --- allocation


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["curves", "uniform", "global"])
def test_allocation_follows_the_table(method, allocation):
    if allocation in ALLOCATIONS[method]:
        assert recipe(method=method, allocation=allocation).resolved().allocation == allocation
    else:
        with pytest.raises(InputError, match=rf"allocation {allocation} .* method {method} .*{ALLOCATIONS[method][0]}"):
            recipe(method=method, allocation=allocation)


def test_only_the_full_curvature_has_every_allocation():
    assert ALLOCATIONS.keys() == set(METHODS)
    assert [m for m in METHODS if "curves" in ALLOCATIONS[m]] == ["kfac"]
    assert "global" not in ALLOCATIONS["layerwise"]
    assert all("uniform" in allowed for allowed in ALLOCATIONS.values())


@pytest.mark.parametrize("more", [{}, {"structured": "ffn"}], ids=str)
def test_permute_needs_a_pattern(more):
    with pytest.raises(
        InputError, match=r"^permute reorders the groups of an n:m pattern, and pattern is unstructured"
    ):
        recipe(permute=True, **more)
    assert recipe(permute=True, pattern="2:4").permute


def test_permutation_is_on_for_kfac_with_a_pattern():
    assert recipe(pattern="2:4").resolved().permute is True
    assert recipe(pattern="2:4", permute=False).resolved().permute is False
    assert recipe(pattern="2:4", method="layerwise").resolved().permute is False
    assert recipe().resolved().permute is recipe(structured="ffn").resolved().permute is False


@pytest.mark.parametrize("allocation", ["curves", "global"])
def test_pattern_allows_only_uniform_allocation(allocation):
    with pytest.raises(InputError, match="pattern 2:4 fixes every layer's sparsity"):
        recipe(pattern="2:4", allocation=allocation)


@pytest.mark.parametrize(
    ("fields", "sparsity", "allocation"),
    [
        ({}, 0.5, "curves"),
        ({"sparsity": 0.7}, 0.7, "curves"),
        ({"sparsity": 0.0}, 0.0, "curves"),
        ({"allocation": "global"}, 0.5, "global"),
        ({"method": "layerwise"}, 0.5, "uniform"),
        ({"method": "obd"}, 0.5, "uniform"),
        ({"method": "magnitude"}, 0.5, "uniform"),
        ({"method": "magnitude", "allocation": "global"}, 0.5, "global"),
        ({"pattern": "1:4"}, 0.75, "uniform"),
        ({"pattern": "4:8", "sparsity": 0.5, "allocation": "uniform"}, 0.5, "uniform"),
    ],
    ids=str,
)
def test_resolved_fills_in_what_was_left_open_only(fields, sparsity, allocation):
    made = recipe(**fields)
    epochs = RECONSTRUCT if made.method in ("kfac", "layerwise") else 0  # the methods that compensate
    filled = {"sparsity": sparsity, "allocation": allocation, "refit": False, "reconstruct": epochs, "damping": 0.03}
    filled["permute"] = made.pattern != "unstructured" and made.method == "kfac"
    assert made.resolved() == dataclasses.replace(made, **filled)
    assert made.resolved().resolved() == made.resolved()


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_refit_that_was_chosen_stays(method, refit):
    assert recipe(method=method, refit=refit).resolved().refit is refit


# --- structured pruning


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("ffn", ("ffn",)),
        ("heads", ("heads",)),
        ("ffn,heads", ("ffn", "heads")),
        ("heads,ffn", ("heads", "ffn")),
        (" ffn , heads ", ("ffn", "heads")),
    ],
)
def test_kinds(text, kinds):
    assert recipe(structured=text).kinds == kinds


@pytest.mark.parametrize("text", ["", " ", ",", "FFN", "mlp", "ffn heads", "ffn;heads", "ffn,ffn", "ffn,layers"])
def test_bad_kinds_are_quoted(text):
    with pytest.raises(InputError, match=f"^structured is {re.escape(repr(text))}; it must be 'ffn', 'heads' or "):
        recipe(structured=text)


def test_without_structured_there_are_no_kinds():
    assert recipe().kinds == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("target_params", 1000), ("target_latency", 2.5), ("widths", "uniform"), ("multiple", 8)],
)
def test_options_of_structured_pruning_need_it(name, value):
    with pytest.raises(InputError, match=f"^{name} is an option of structured pruning; add structured"):
        recipe(**{name: value})
    assert getattr(recipe(structured="ffn", **{name: value}), name) == value


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"kfac"}))
def test_shots_of_a_sparse_model_need_the_curvature_of_its_loss(method):
    assert recipe(shots=3, pattern="2:4").shots == 3
    assert recipe(shots=1, method=method).shots == 1
    with pytest.raises(InputError, match=f"^shots is 3, and method {method} does not correct a sparse model"):
        recipe(shots=3, method=method)


@pytest.mark.parametrize("structured", [None, "ffn"])
def test_there_is_at_least_one_shot(structured):
    with pytest.raises(InputError, match=r"^shots is 0; it must be above 0"):
        recipe(shots=0, structured=structured)


@pytest.mark.parametrize("shots", [1001, 10**400])
@pytest.mark.parametrize("structured", [None, "ffn"])
def test_there_is_a_limit_to_shots(structured, shots):
    assert recipe(shots=1000, structured=structured).shots == 1000
    with pytest.raises(InputError, match=r"^shots is 10*1?; it must be above 0 and at most 1000"):
        recipe(shots=shots, structured=structured)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pattern": "2:4"}, "pattern 2:4"),
        ({"pattern": "2:4", "sparsity": 0.5}, "pattern 2:4"),
        ({"allocation": "curves"}, "allocation curves"),
        ({"allocation": "uniform"}, "allocation uniform"),
    ],
    ids=str,
)
def test_options_of_sparse_weights_are_refused(fields, named):
    with pytest.raises(InputError, match=f"^{named} is for sparse weights, structured removes whole units; drop one"):
        recipe(structured="ffn", **fields)


@pytest.mark.parametrize("method", BASELINES + SEQUENCE_METHODS)
def test_methods_for_single_weights_remove_no_units(method):
    with pytest.raises(
        InputError, match=rf"^method {method} prunes single weights, .*; use kfac or layerwise or obd or"
    ):
        recipe(structured="ffn", method=method)


TARGETS = {"sparsity": 0.3, "target_params": 1000, "target_latency": 2.5}


@pytest.mark.parametrize("names", [c for n in (2, 3) for c in itertools.combinations(TARGETS, n)], ids="-".join)
def test_only_one_target(names):
    with pytest.raises(InputError, match=f"^{' and '.join(names)} each say how much to remove; give one of them"):
        recipe(structured="ffn", **{name: TARGETS[name] for name in names})


@pytest.mark.parametrize(
    ("fields", "refit", "epochs"),
    [
        ({}, False, RECONSTRUCT),
        ({"samples": 15}, True, 0),
        ({"refit": True}, True, 0),
        ({"refit": True, "reconstruct": 3}, True, 3),
        ({"reconstruct": 0}, True, 0),
        ({"reconstruct": 0, "refit": False}, False, 0),
        ({"method": "magnitude"}, False, 0),
        ({"method": "magnitude", "reconstruct": 3}, False, 3),
        ({"structured": "ffn"}, False, RECONSTRUCT),
        ({"structured": "ffn", "samples": 15}, True, 0),
        ({"structured": "ffn", "refit": True}, True, 0),
        ({"structured": "ffn", "refit": False}, False, RECONSTRUCT),
        ({"structured": "ffn", "refit": True, "reconstruct": 3}, True, 3),
        ({"structured": "ffn", "reconstruct": 0}, True, 0),
        ({"structured": "ffn", "method": "magnitude"}, False, 0),
    ],
    ids=str,
)
def test_models_are_refitted_or_reconstructed(fields, refit, epochs):
    made = recipe(**fields).resolved()
    assert (made.refit, made.reconstruct) == (refit, epochs)
    assert made.resolved() == made


def test_reconstruct_needs_windows_to_hold_out():
    with pytest.raises(InputError, match=r"^reconstruct holds a tenth of the windows out and needs at least 10"):
        recipe(reconstruct=1, samples=9)
    with pytest.raises(InputError, match=r"^reconstruct is -1; it must be at least 0$"):
        recipe(reconstruct=-1)
    with pytest.raises(InputError, match=r"^recover_epochs holds a tenth of the windows out and needs at least 10"):
        recipe(recover_epochs=1, samples=9)
    with pytest.raises(InputError, match=r"^recover_epochs is -1; it must be at least 0$"):
        recipe(recover_epochs=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("target_params", "multiple", "shots") for value in (0, -1, -(10**30))]
    + [("target_latency", value) for value in (0, 0.0, -2.5, math.nan, math.inf, -math.inf)],
)
def test_structured_value_out_of_range(name, value):
    with pytest.raises(InputError, match=f"^{name} is {re.escape(str(value))}; it must be above 0"):
        recipe(structured="ffn", **{name: value})


@pytest.mark.parametrize(
    ("fields", "sparsity"),
    [
        ({}, 0.5),
        ({"sparsity": 0.0}, 0.0),
        ({"sparsity": 0.2}, 0.2),
        ({"target_params": 1000}, None),
        ({"target_latency": 2.5}, None),
        ({"method": "layerwise", "widths": "per-layer", "shots": 3, "multiple": 16}, 0.5),
        ({"method": "magnitude"}, 0.5),
    ],
    ids=str,
)
def test_resolved_leaves_structured_targets_alone(fields, sparsity):
    made = recipe(structured="ffn,heads", **fields)
    filled = {"sparsity": sparsity, "allocation": None, "damping": 0.001, "permute": False}
    repaired = made.method in ("kfac", "layerwise")
    filled |= {"refit": False, "reconstruct": RECONSTRUCT if repaired else 0}
    assert made.resolved() == dataclasses.replace(made, **filled)
    assert made.resolved().resolved() == made.resolved()


@pytest.mark.parametrize("structured", [None, "ffn"])
@pytest.mark.parametrize("damping", [0.03, 0.001, 0.2, 1])
def test_damping_that_was_chosen_stays(structured, damping):
    assert recipe(structured=structured, damping=damping).resolved().damping == damping


# --- YAML


def round_trip(made, folder):
    path = folder / "recipe.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    return Recipe(**read_recipe(str(path)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "2:4"},
        {"pattern": "1:10", "sparsity": 0.9},
        {"sparsity": 1e-7, "damping": 1e-30},
        {"sparsity": 0, "damping": 1},
        {"separator": "\n\n", "include": ("*.mlp.*", "yes"), "ignore": ("null", "1", "1e3", "- x: y")},
        {"model": "../Grüße 模型", "data": "no", "out": "~", "eval_data": "2024-01-01", "text_field": "0x10"},
        {"structured": "ffn,heads", "target_latency": 2.5, "widths": "per-layer", "multiple": 16, "shots": 2},
        {"structured": "heads", "target_params": 10**12},
        {"overwrite": True, "trust_remote_code": True, "seed": 2**62, "dtype": "bfloat16", "device": "cuda:1"},
    ],
    ids=str,
)
def test_yaml_round_trip(fields, tmp_path):
    made = recipe(**fields)
    assert round_trip(made, tmp_path) == made
    assert round_trip(made.resolved(), tmp_path) == made.resolved()


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(text=st.text(min_size=1), patterns=st.lists(st.text()), number=st.floats(0, 1, exclude_min=True))
def test_yaml_round_trip_of_any_text(text, patterns, number, tmp_path_factory):
    made = recipe(text_field=text, separator=text, include=tuple(patterns), damping=number)
    assert round_trip(made, tmp_path_factory.getbasetemp()) == made


def test_a_partial_recipe_sets_only_its_fields(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("sparsity: 0.7\ninclude: ['*.mlp.*', b]\noverwrite: true\neval_data:\n")
    assert read_recipe(str(path)) == {
        "sparsity": 0.7,
        "include": ("*.mlp.*", "b"),
        "overwrite": True,
        "eval_data": None,
    }


@pytest.mark.parametrize("text", ["2:4", "'2:4'", '"2:4"'])
def test_pattern_needs_no_quotes_in_yaml(text, tmp_path):
    """YAML 1.1 reads 2:4 as a number to base 60, 124."""
    path = tmp_path / "r.yaml"
    path.write_text(f"pattern: {text}  # half\n")
    assert read_recipe(str(path)) == {"pattern": "2:4"}


def test_recipe_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"the recipe .*absent\.yaml cannot be read"):
        read_recipe(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match=r"the recipe .* cannot be read"):
        read_recipe(str(tmp_path))


def test_recipe_in_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("seed: 3")
    assert read_recipe("~/r.yaml") == {"seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\xff\x00", "cannot be read"),
        (b"\x00\x01\x02", "is not valid YAML"),
        (b"", "must be a mapping"),
        (b"- sparsity: 0.5", "must be a mapping"),
        (b"sparsity", "must be a mapping"),
        (b"0.5", "must be a mapping"),
        (b"sparsity: 0.5: 3", "is not valid YAML"),
        (b"sparsity: [0.5", "is not valid YAML"),
        (b"\tsparsity: 0.5", "is not valid YAML"),
        (b"seed: *nowhere", "is not valid YAML"),
        (b"seed: " + b"9" * 5000, "is not valid YAML"),
        (b"data: 2024-13-45", "is not valid YAML"),
        (b"data: " + b"[" * 5000, "is not valid YAML"),
        (b"sparsitty: 0.5", "has an unknown field 'sparsitty'; the fields are model, data, out"),
        (b"1: 2", "has an unknown field 1"),
        (b"null: 2", "has an unknown field None"),
        (b"seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"seed: !!python/name:os.system", "is not valid YAML"),
        (b"!!python/object:kfac_prune.config.Recipe {model: m}", "is not valid YAML"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
)
def test_unusable_recipe_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_recipe(str(path))
    assert str(caught.value).startswith(f"the recipe {path} ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- anything at all


def test_random_values_give_a_valid_recipe_or_an_input_error():
    rng = random.Random(0)
    numbers = (0, 1, -1, 2, 64, 2**31, 2**63, 2**64, -(2**70), 10**400)
    reals = (0.0, -0.0, 0.5, 0.75, 1.0, 1.5, -0.1, 1e-320, 1e308, math.nan, math.inf, -math.inf)
    texts = (
        "",
        " ",
        "2:4",
        "4:2",
        "kfac",
        "magnitude",
        "uniform",
        "curves",
        "cpu",
        "ffn",
        "heads,ffn",
        "\0",
        "é\n",
        "%s{}",
        "x" * 10_000,
    )

    def anything(depth=0):
        kind = rng.randrange(8 if depth < 2 else 5)
        if kind == 0:
            return rng.choice(numbers)
        if kind == 1:
            return rng.choice(reals)
        if kind == 2:
            return rng.choice(texts)
        if kind == 3:
            return rng.choice([None, True, False])
        if kind == 4:
            return rng.uniform(-1, 2)
        items = [anything(depth + 1) for _ in range(rng.randrange(4))]
        return {5: list, 6: tuple, 7: lambda i: dict(enumerate(i))}[kind](items)

    valid = refused = 0
    for trial in range(3000):
        # one field at a time gets past the others' checks; several at once reach the checks between fields
        names = [FIELDS[trial % len(FIELDS)]] if trial % 2 else rng.sample(FIELDS, rng.randint(1, 3))
        fields = {name: anything() for name in names}
        try:
            made = recipe(**fields).resolved()
        except InputError:
            refused += 1
        else:
            valid += 1
            assert 0 < made.damping <= 1, fields
            if made.structured is None:
                assert 0 <= made.sparsity < 1, fields
                assert made.allocation in ALLOCATIONS[made.method], fields
            else:
                assert set(made.kinds) <= {"ffn", "heads"}, fields
            assert min(made.samples, made.eval_samples, made.batch_size, made.seqlen - 1, made.seed + 1) >= 1, fields
    assert valid > 100
    assert refused > 500
