"""The command line: help, exit codes, one-line errors, and what the commands print."""

import argparse
import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from letters import LETTERS, save_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from kfac_prune import loading, pipeline
from kfac_prune.cli import build_parser, main
from kfac_prune.config import Recipe
from kfac_prune.demo import LEVELS
from kfac_prune.recipe_file import from_anywhere

COMMANDS = ("prune", "estimate", "compare", "eval", "inspect", "demo", "theory")
SMALL = ("--seqlen", "16", "--samples", "32", "--eval-samples", "8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a model and a text in it."""
    save_llama(tmp_path / "model")
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(rng.choices(LETTERS[:12] + "  ", k=6000)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder):
    return {p.relative_to(folder).as_posix(): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


# --- help and version


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_says_what_holds_for_the_command(capsys):
    assert not [command for command in COMMANDS if "%%" in help_of(command, capsys)]
    demo, compare = help_of("demo", capsys), help_of("compare", capsys)
    assert [name for name in LEVELS if name.rstrip("%") not in demo] == []
    assert "--structured" not in compare
    assert "--overwrite begin anew" in compare
    assert "only prune" not in help_of("inspect", capsys)
    prune = help_of("prune", capsys)
    assert "0 = off; default: 0 --streams" in prune
    assert "dropped, unless there is --resume" in prune


def subparsers(parser):
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]], ids=" ".join
)
def test_help_and_version_load_neither_torch_nor_transformers(arguments):
    code = (
        "import sys\n"
        "from kfac_prune.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print('loaded:', *sorted({'torch', 'transformers', 'numpy', 'triton'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.stderr == ""


def test_version_of_the_module():
    command = [sys.executable, "-W", "error", "-m", "kfac_prune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"kfac-prune \d+\.\d+\.\d+\S*\n", done.stdout)


def test_exit_code_of_the_module():
    command = [sys.executable, "-m", "kfac_prune", "prune", "nowhere", "--data", "d", "--out", "o", "--sparsity", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "kfac-prune: error: sparsity is 2.0; it must be at least 0 and below 1 (2 % is 0.02)\n"


def test_these_are_the_commands():
    assert tuple(subparsers(build_parser())) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_optional_option_states_its_default(command):
    for action in subparsers(build_parser())[command]._actions:
        if action.option_strings and not action.required and not isinstance(action, argparse._HelpAction):
            assert "default: " in action.help or action.dest in ("data", "out", "recipe"), action.option_strings
        assert action.help, action.option_strings


def test_stated_defaults_are_the_recipes():
    for action in subparsers(build_parser())["prune"]._actions:
        stated = re.search(r"; default: (\S+)$", action.help or "")
        if stated and stated[1] not in ("off", "all", "none"):
            field = next(f for f in dataclasses.fields(Recipe) if f.name == action.dest)
            assert stated[1] == str(field.default), action.dest


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_and_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for action in subparsers(build_parser())[command]._actions if command else ():
        assert (action.option_strings or [action.dest])[-1] in out


# --- errors


def no_config(here):
    (here / "model" / "config.json").unlink()


def broken_config(here):
    (here / "model" / "config.json").write_text("{nonsense")


def edit_config(here, **changes):
    path = here / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bert(here):
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(config).save_pretrained(here / "model")


def encoder_decoder(here):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(here / "model")


def quantised(here):
    edit_config(here, quantization_config={"quant_method": "gptq", "bits": 4})


def unknown_type(here):
    edit_config(here, model_type="no_such_type")


def broken_weight(value):
    def prepare(here):
        path = here / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return prepare


def truncated(here):
    path = here / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights(here):
    (here / "model" / "model.safetensors").unlink()


def sharded(here):
    """The weights in two files; returns the second."""
    model = AutoModelForCausalLM.from_pretrained(here / "model")
    no_weights(here)
    model.save_pretrained(here / "model", max_shard_size="40KB")
    return here / "model" / "model-00002-of-00002.safetensors"


def no_shard(here):
    sharded(here).unlink()


def half_shard(here):
    path = sharded(here)
    path.write_bytes(path.read_bytes()[:-1000])


def text_folder(here):
    (here / "texts").mkdir()
    (here / "text.txt").rename(here / "texts" / "text.txt")


def other_shapes(here):
    edit_config(here, intermediate_size=64)


def missing_tensor(here):
    path = here / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def no_tokenizer(here):
    for path in (here / "model").glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(here):
    (here / "model" / "tokenizer.json").write_text("{}")


def small_vocabulary(here):
    save_llama(here / "model", vocab_size=8)


def write_text(text):
    return lambda here: (here / "text.txt").write_bytes(text)


def short_eval_data(here):
    (here / "e.txt").write_text("abc")


def short_data(here):
    (here / "text.txt").write_text("a" * 12)
    (here / "e.txt").write_text("a" * 100)


def full_output(here):
    (here / "out").mkdir()
    (here / "out" / "precious.txt").write_text("mine")


def file_output(here):
    (here / "out").write_text("mine")


def file_parent(here):
    (here / "parent").write_text("mine")


def recipe_file(text):
    return lambda here: (here / "r.yaml").write_text(text)


def nothing(here):
    pass


# id: what is wrong, further arguments, what the message must hold, the last stage that may be told
ERRORS = {
    "model-missing": (nothing, ["./nowhere"], ["./nowhere", "no model folder ./nowhere in /"], None),
    "model-missing-deep": (nothing, ["a/b/c"], ["a/b/c", "no model folder"], None),
    "model-missing-slash": (nothing, ["nowhere/"], ["nowhere/", "no model folder"], None),
    "model-is-a-file": (nothing, ["text.txt"], ["text.txt", "no config.json"], None),
    "model-empty": (nothing, [" "], ["model is empty"], None),
    "no-config": (no_config, [], ["model", "no config.json"], None),
    "config-broken": (broken_config, [], ["model/config.json", "cannot be read"], None),
    "config-unknown-type": (unknown_type, [], ["model/config.json", "no_such_type"], None),
    "bert": (bert, [], ["model", "not a causal language model", "bert"], None),
    "t5": (encoder_decoder, [], ["model", "not a causal language model", "t5"], None),
    "quantised": (quantised, [], ["model", "quantised"], None),
    "weights-nan": (broken_weight(float("nan")), [], ["model.layers.1.mlp.up_proj.weight", "NaN"], "load"),
    "weights-inf": (broken_weight(float("inf")), [], ["model.layers.1.mlp.up_proj.weight", "infinity"], "load"),
    "weights-truncated": (truncated, [], ["cannot be loaded: model.safetensors is not whole", "fetch"], "load"),
    "weights-missing": (no_weights, [], ["weights of model", "no file named model.safetensors", "fetch"], "load"),
    "weights-other-shapes": (other_shapes, [], ["model.layers.0.mlp.down_proj.weight as [32, 48]", "[32, 64]"], "load"),
    "shard-missing": (no_shard, [], ["cannot be loaded", "model-00002-of-00002.safetensors; ", "fetch"], "load"),
    "shard-truncated": (half_shard, [], ["model-00002-of-00002.safetensors is not whole", "incomplete: fetch"], "load"),
    "tensor-missing": (missing_tensor, [], ["model.layers.1.mlp.up_proj.weight; fetch it again, whole"], "load"),
    "tokenizer-missing": (no_tokenizer, [], ["tokenizer: its files are missing", "(tokenizer.json and "], "load"),
    "tokenizer-broken": (broken_tokenizer, [], ["model", "no usable tokenizer"], "load"),
    "vocabulary": (small_vocabulary, [], ["token", "the model knows 8", "do not belong together"], "load"),
    "data-missing": (nothing, ["--data", "absent.txt"], ["absent.txt", "no such file"], "load"),
    "data-empty": (write_text(b""), [], ["text.txt", "holds no text"], "load"),
    "data-blank": (write_text(b" \n\n \t"), [], ["text.txt", "holds no text"], "load"),
    "data-binary": (write_text(b"abc\xff\xfe" * 99), [], ["text.txt", "not UTF-8", "byte 3"], "load"),
    "data-short": (write_text(b"a" * 100), [], ["text.txt", "10 tokens", "16"], "load"),
    "data-short-calibration": (short_data, ["--eval-data", "e.txt"], ["text.txt", "12 tokens"], "load"),
    "eval-data-missing": (nothing, ["--eval-data", "absent.txt"], ["absent.txt", "no such file"], "load"),
    "eval-data-short": (short_eval_data, ["--eval-data", "e.txt"], ["e.txt", "3 tokens", "add text, or lower"], "load"),
    "seqlen-over-context": (nothing, ["--seqlen", "65"], ["--seqlen is 65", "context is 64"], "load"),
    "seqlen-1": (nothing, ["--seqlen", "1"], ["seqlen is 1;"], None),
    "samples-0": (nothing, ["--samples", "0"], ["samples is 0;"], None),
    "seed-huge": (nothing, ["--seed", "99999999999999999999"], ["seed is 99999999999999999999;"], None),
    "sparsity-1": (nothing, ["--sparsity", "1.0"], ["sparsity is 1.0;"], None),
    "sparsity-percent": (nothing, ["--sparsity", "50%"], ["--sparsity: invalid number: '50%'; 50% is 0.5;"], None),
    "sparsity-of-100": (nothing, ["--sparsity", "50"], ["sparsity is 50.0; it must be", "(50 % is 0.5)"], None),
    "sparsity-negative": (nothing, ["--sparsity", "-0.1"], ["sparsity is -0.1;"], None),
    "sparsity-nan": (nothing, ["--sparsity", "nan"], ["sparsity is nan;"], None),
    "damping-0": (nothing, ["--damping", "0"], ["damping is 0.0;"], None),
    "pattern": (nothing, ["--pattern", "2of4"], ["pattern '2of4'"], None),
    "pattern-4:2": (nothing, ["--pattern", "4:2"], ["pattern 4:2"], None),
    "pattern-and-sparsity": (nothing, ["--pattern", "2:4", "--sparsity", "0.7"], ["2:4", "0.7"], None),
    "allocation": (nothing, ["--method", "layerwise", "--allocation", "global"], ["global", "layerwise"], None),
    "include": (nothing, ["--include", "*.nonsense.*"], ["'*.nonsense.*'", "14 linear layers"], "load"),
    "ignore": (nothing, ["--ignore", "*.nonsense.*"], ["'*.nonsense.*'", "14 linear layers"], "load"),
    "ignore-all": (nothing, ["--ignore", "*"], ["no layer", "--ignore"], "load"),
    "out-full": (full_output, [], ["--out out", "not empty", "--overwrite"], None),
    "out-in-model": (nothing, ["--out", "model/sub"], ["--out model/sub lies within the model model"], None),
    "out-in-data": (text_folder, ["--data", "texts", "--out", "texts/a/b"], ["lies within the data texts"], None),
    "out-is-a-file": (file_output, [], ["--out out is a file"], None),
    "out-below-a-file": (file_parent, ["--out", "parent/out"], ["--out parent/out cannot be created"], None),
    "device-unknown": (nothing, ["--device", "abacus"], ["device 'abacus'"], None),
    "device-absent": (nothing, ["--device", "cuda:97"], ["device 'cuda:97'"], None),
    "recipe-missing": (nothing, ["--recipe", "absent.yaml"], ["absent.yaml", "cannot be read"], None),
    "recipe-field": (recipe_file("sparsitty: 1"), ["--recipe", "r.yaml"], ["r.yaml", "'sparsitty'"], None),
    "recipe-type": (recipe_file("sparsity: much"), ["--recipe", "r.yaml"], ["sparsity is 'much'"], None),
    "recipe-yaml": (recipe_file("a: b: c"), ["--recipe", "r.yaml"], ["r.yaml", "not valid YAML"], None),
    "separator-empty": (nothing, ["--separator", ""], ["separator is empty"], "load"),
}  # fmt: skip


def refused(arguments, capsys):
    """Run the command; it must exit with 2 and one line on stderr. Returns that line and stdout."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("kfac-prune: error: ")
    print(lines[0])  # shown by pytest -rP, to read all messages together
    return lines[0], captured.out


@pytest.mark.parametrize("name", ERRORS)
def test_prune_refuses(name, here, capsys):
    prepare, further, expected, last = ERRORS[name]
    prepare(here)
    before = listing(here)
    given = further if further and not further[0].startswith("-") else ["model", *further]
    message, out = refused(["prune", *given[:1], "--data", "text.txt", "--out", "out", *SMALL, *given[1:]], capsys)
    for part in expected:
        assert part in message
    assert listing(here) == before
    assert re.findall("^- (.*)", out, re.M) == ([last] if last else [])


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "COMMAND"),
        (["shrink"], "shrink"),
        (["prune", "m", "--no-such-option"], "--no-such-option"),
        (["prune", "m", "--samples", "many"], "--samples"),
        (["prune", "m", "--samples", "1.5"], "--samples"),
        (["prune", "m", "--sparsity", "half"], "--sparsity"),
        (["prune", "m", "--method", "lottery"], "--method"),
        (["prune", "m", "--allocation", "even"], "--allocation"),
        (["prune", "m", "--dtype", "int8"], "--dtype"),
        (["prune", "m", "extra"], "extra"),
        (["eval", "m"], "--data"),
        (["eval"], "model"),
        (["inspect"], "model"),
        (["prune", "m", "--out"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_unusable_arguments_exit_with_2(arguments, culprit, capsys):
    message, out = refused(arguments, capsys)
    assert culprit in message
    of = "kfac-prune prune --help" if culprit == "extra" else "--help"  # it parses but for that
    assert f"{of} lists the options" in message
    assert out == ""


@pytest.mark.parametrize(("left_out", "name"), [("model", "model"), ("--data", "data"), ("--out", "out")])
def test_prune_needs_model_data_and_out(left_out, name, here, capsys):
    arguments = {"model": ["model"], "--data": ["--data", "text.txt"], "--out": ["--out", "out"]}
    del arguments[left_out]
    message, _ = refused(["prune", *itertools.chain(*arguments.values())], capsys)
    assert f"error: {name} is empty" in message


def test_unreachable_hub_model(here, capsys, monkeypatch):
    """Stands in for a hub without network: the call fails as it would, at once."""
    calls = []

    def unreachable(source, **options):
        calls.append(source)
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
    for arguments in (["prune", "someone/some-model", "--out", "out"], ["eval", "someone/some-model"]):
        message, out = refused([*arguments, "--data", "text.txt"], capsys)
        assert "someone/some-model is neither a local model folder nor a hub model to be had" in message
        assert "couldn't connect" in message
        assert f"no such folder in {Path.cwd()}" in message
        assert out == ""
    refused(["inspect", "someone/some-model"], capsys)
    assert calls == ["someone/some-model"] * 3
    assert not (here / "out").exists()


def test_offline_hub_model_is_refused_at_once(here):
    """With the hub's own offline switch, in a process that has not imported it yet."""
    code = "import sys; from kfac_prune.cli import main; sys.exit(main(['inspect', 'someone/some-model']))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "cache"), "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("kfac-prune: error: someone/some-model is neither a local model folder nor a hub model")


def test_interrupt_is_one_line(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "estimate_factors", interrupted)
    assert main(["prune", "model", "--data", "text.txt", "--out", "out", *SMALL]) == 130
    said = "nothing was written to --out; with --resume the same command goes on from OUT.work"
    assert capsys.readouterr().err == f"kfac-prune: interrupted; {said}\n"
    assert sorted(p.name for p in here.iterdir()) == ["model", "text.txt"]


def test_error_of_several_lines_becomes_one(here, capsys):
    message, _ = refused(["prune", "a\nb/c/d", "--data", "text.txt", "--out", "out"], capsys)
    assert "a b/c/d" in message


# --- prune


def test_prune_prints_plan_and_figures_and_nothing_on_stderr(here, capsys):
    assert main(["prune", "model", "--data", "text.txt", "--out", "out", *SMALL]) == 0
    captured = capsys.readouterr()
    record = json.loads((here / "out" / "kfac_prune.json").read_text())
    assert all(name in captured.out for name in record["layers"])
    assert f"{record['kl_measured']:.4f}" in captured.out
    assert captured.out.endswith("saved to out\n")
    assert captured.err == ""


def test_options_reach_the_recipe(here):
    options = {
        "--pattern": "1:4",
        "--method": "layerwise",
        "--allocation": "uniform",
        "--damping": "0.1",
        "--fisher": "empirical",
        "--seed": "7",
        "--batch-size": "3",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--separator": r"\n\t",
        "--eval-data": "text.txt",
        "--text-field": "story",
        "--objective": "tokens",
        "--reconstruct": "0",
        "--streams": "device",
    }
    lists = ["--include", "*.mlp.*", "--include", "*q_proj", "--ignore", "*.0.*"]
    given = [part for option in options.items() for part in option]
    assert (
        main(
            [
                "prune",
                "model",
                "--data",
                "text.txt",
                "--out",
                "out",
                *SMALL,
                *given,
                *lists,
                "--overwrite",
                "--offload",
                "--max-memory",
                "0.5",
                "--skip-bad-batches",
                "--no-refit",
            ]
        )
        == 0
    )
    recipe = yaml.safe_load((here / "out" / "recipe.yaml").read_text())
    assert recipe == {
        "model": str(here / "model"),
        "data": str(here / "text.txt"),
        "out": str(here / "out"),
        "eval_data": str(here / "text.txt"),
        "separator": "\n\t",
        "text_field": "story",
        "objective": "tokens",
        "samples": 32,
        "eval_samples": 8,
        "seqlen": 16,
        "batch_size": 3,
        "sparsity": 0.75,
        "pattern": "1:4",
        "permute": False,
        "structured": None,
        "target_params": None,
        "target_latency": None,
        "widths": None,
        "multiple": None,
        "shots": None,
        "reconstruct": 0,
        "reconstruct_unit": "block",
        "own_text": 0,
        "recover_epochs": 0,
        "resume": False,
        "streams": "device",
        "method": "layerwise",
        "allocation": "uniform",
        "refit": False,
        "include": ["*.mlp.*", "*q_proj"],
        "ignore": ["*.0.*"],
        "damping": 0.1,
        "fisher": "empirical",
        "seed": 7,
        "device": "cpu",
        "dtype": "bfloat16",
        "offload": True,
        "max_memory": 0.5,
        "skip_bad_batches": True,
        "overwrite": False,  # whoever repeats it says so again
        "trust_remote_code": False,
    }


def test_recipe_repeats_a_run_and_options_win_over_it(here):
    assert main(["prune", "model", "--data", "text.txt", "--out", "one", *SMALL, "--pattern", "2:4"]) == 0
    assert main(["prune", "--recipe", "one/recipe.yaml", "--out", "two"]) == 0
    assert main(["prune", "--recipe", "one/recipe.yaml", "--out", "three", "--seed", "1"]) == 0
    one, two, three = ((here / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    assert json.loads((here / "three" / "kfac_prune.json").read_text())["seed"] == 1


def test_recipe_repeats_a_run_from_another_folder(here, monkeypatch):
    assert main(["prune", "model", "--data", "text.txt", "--out", "one", *SMALL, "--pattern", "2:4"]) == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert main(["prune", "--recipe", "../one/recipe.yaml", "--out", "two"]) == 0
    one, two = (Path(name, "model.safetensors").read_bytes() for name in ("../one", "two"))
    assert one == two


def test_a_recipe_keeps_names_of_the_hub(here):
    made = from_anywhere(Recipe(model="someone/some-model", data="someone/texts:part", out="out"))
    assert (made.model, made.data, made.out) == ("someone/some-model", "someone/texts:part", str(here / "out"))
    assert made.eval_data is None


def test_abbreviated_and_repeated_options(here):
    assert main(["prune", "model", "--data", "text.txt", "--out=out", *SMALL, "--seed", "1", "--seed", "2"]) == 0
    assert json.loads((here / "out" / "kfac_prune.json").read_text())["seed"] == 2


# --- eval


def figures(out):
    """The table of eval: name -> value."""
    return {row[:28].strip(): row[28:].strip() for row in out.splitlines()}


def test_eval_of_a_pruned_folder_repeats_the_record(here, capsys):
    (here / "held.txt").write_text((here / "text.txt").read_text()[::-1])
    assert main(["prune", "model", "--data", "text.txt", "--eval-data", "held.txt", "--out", "out", *SMALL]) == 0
    record = json.loads((here / "out" / "kfac_prune.json").read_text())
    capsys.readouterr()
    window = ("--data", "held.txt", "--seqlen", "16", "--eval-samples", "8")
    assert main(["eval", "out", "--dense", "model", *window]) == 0
    captured = capsys.readouterr()
    shown = figures(captured.out)
    assert captured.err == ""
    assert shown == {
        "loss (nats/token)": f"{record['pruned']['loss']:.4f}",
        "perplexity": f"{record['pruned']['perplexity']:.3f}",
        "sparsity of linear layers": f"{record['sparsity']:.1%}",
        "tokens": f"{record['evaluation_tokens']:,}",
        "loss increase (nats/token)": f"{record['loss_increase']:.4f}",
        "KL (nats/token)": f"{record['kl_measured']:.4f}",
    }
    assert record["kl_measured"] > 0.01  # so that four decimals say something


def test_eval_without_dense_model_shows_no_kl(here, capsys):
    assert main(["eval", "model", "--data", "text.txt", "--seqlen", "16"]) == 0
    shown = figures(capsys.readouterr().out)
    assert shown.keys() == {"loss (nats/token)", "perplexity", "sparsity of linear layers", "tokens"}
    assert shown["sparsity of linear layers"] == "0.0%"
    assert shown["tokens"] == f"{64 * 15:,}"


def test_eval_of_a_model_against_itself_has_no_kl(here, capsys):
    assert main(["eval", "model", "--dense", "model", "--data", "text.txt", "--seqlen", "16"]) == 0
    shown = figures(capsys.readouterr().out)
    assert float(shown["KL (nats/token)"]) == float(shown["loss increase (nats/token)"]) == 0


def test_eval_does_not_depend_on_the_batch_size(here, capsys):
    tables = []
    for size in ("1", "3", "64"):
        assert main(["eval", "model", "--data", "text.txt", "--seqlen", "16", "--batch-size", size]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["./nowhere"], "./nowhere"),
        (["model", "--dense", "./nowhere"], "./nowhere"),
        (["model", "--data", "absent.txt"], "absent.txt"),
        (["model", "--seqlen", "65"], "--seqlen is 65"),
        (["model", "--seqlen", "0"], "seqlen is 0"),
        (["model", "--eval-samples", "0"], "eval_samples is 0"),
        (["model", "--device", "abacus"], "device 'abacus'"),
        (["model", "--data", "short.txt"], "short.txt"),
        (["model", "--dense", "other", "--seqlen", "16"], "model knows 40 tokens and --dense other "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_eval_refuses(arguments, expected, here, capsys):
    (here / "short.txt").write_text("abc")
    save_llama(here / "other", vocab_size=48)
    message, out = refused(["eval", *arguments[:1], "--data", "text.txt", *arguments[1:]], capsys)
    assert expected in message
    assert out == ""


# --- inspect


def test_inspect_lists_layers_without_weights(here, capsys):
    (here / "model" / "model.safetensors").unlink()
    assert main(["inspect", "model"]) == 0
    captured = capsys.readouterr()
    rows = [row for row in captured.out.splitlines() if row.startswith("model.layers.")]
    groups = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [row.split()[0] for row in rows[14:]] == groups
    assert rows[6].split() == ["model.layers.0.mlp.down_proj", "32", "x", "48", "1,536", "no", "yes"]
    assert "14 layers hold 15,360 of 16,800 parameters (91.4%)" in captured.out
    assert "model.embed_tokens.weight [40, 32]" in captured.out
    assert captured.err == ""


def test_inspect_tells_what_does_not_fit_and_filters(here, capsys):
    save_llama(here / "wide", intermediate_size=50)
    assert main(["inspect", "wide", "--include", "*.mlp.*", "--ignore", "*up*"]) == 0
    out = capsys.readouterr().out
    assert "FFN units cannot be removed" in out
    assert "heads cannot be removed" in out
    rows = [row.split() for row in out.splitlines() if row.startswith("model.layers.")]
    assert [(row[0].split(".", 2)[2], row[-1]) for row in rows] == [
        ("0.mlp.gate_proj", "yes"),
        ("0.mlp.down_proj", "no"),
        ("1.mlp.gate_proj", "yes"),
        ("1.mlp.down_proj", "no"),
    ]


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (nothing, ["./nowhere"], "./nowhere"),
        (nothing, ["model", "--include", "*.nonsense"], "'*.nonsense'"),
        (nothing, ["model", "--ignore", "*"], "no layer"),
        (bert, ["model"], "not a causal language model"),
        (quantised, ["model"], "quantised"),
        (lambda here: edit_config(here, hidden_size="wide"), ["model"], "hidden_size"),
        (lambda here: edit_config(here, num_attention_heads=0), ["model"], "model"),
    ],
    ids=["missing", "include", "ignore-all", "bert", "quantised", "config-type", "config-zero"],
)
def test_inspect_refuses(prepare, arguments, expected, here, capsys):
    prepare(here)
    message, out = refused(["inspect", *arguments], capsys)
    assert expected in message
    assert out == ""


# --- demo


def test_demo_refuses_a_folder_that_is_not_a_demos(here, capsys):
    full_output(here)
    before = listing(here)
    message, out = refused(["demo", "--out", "out"], capsys)
    assert "--out out exists and is not empty" in message
    assert out == ""
    assert listing(here) == before
