"""Thousands of malformed recipes, options, models, texts and artefacts: exit code 2, one line, nothing written."""

import dataclasses
import json
import pickle
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from letters import LETTERS, save_llama
from test_cli import listing

from kfac_prune import cli, inputs, loading, measurement, reconstruction
from kfac_prune.cli import build_parser, main
from kfac_prune.config import Recipe
from kfac_prune.errors import InputError
from kfac_prune.store import load_artifact, save_artifact
from kfac_prune.structure import latency

#: Malformed inputs that reach the command functions; good ones are drawn again and not counted.
CASES = {
    "fields": 700,
    "yaml": 350,
    "options": 600,
    "texts": 250,
    "configurations": 90,
    "tokenizers": 60,
    "weights": 30,
}
FIELDS = [f.name for f in dataclasses.fields(Recipe)]
PARSER = cache(build_parser)
GOOD = {"model": "model", "data": "empty.txt", "out": "out"}


def test_there_are_thousands():
    assert sum(CASES.values()) >= 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, an empty text, and somebody's folder."""
    place = tmp_path_factory.mktemp("place")
    save_llama(place / "model")
    (place / "empty.txt").write_text("")
    (place / "text.txt").write_text("".join(random.Random(0).choices(LETTERS[:12] + "  ", k=3000)), encoding="utf-8")
    (place / "kept").mkdir()
    (place / "kept" / "precious.txt").write_text("mine")
    return place


@pytest.fixture
def attempt(folder, monkeypatch, capsys):
    """Runs a command; gives the line that refuses it, or None where the input was good after all.

    A good one gets as far as the empty text, or to the end of a command that writes nothing.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "build_parser", PARSER)
    for module in (inputs, measurement):  # the same one thousands of times
        monkeypatch.setattr(module, "load_tokenizer", cache(loading.load_tokenizer))
    (folder / "bad").mkdir(exist_ok=True)

    def run(*arguments, good="empty.txt holds no text"):
        before = listing(folder)
        try:
            code = main(arguments)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{type(error).__name__} from {arguments}: {error}") from error
        _, err = capsys.readouterr()
        assert listing(folder) == before, arguments
        if code == 0:
            return None
        assert code == 2, arguments
        lines = err.splitlines()
        assert len(lines) == 1, (arguments, err)
        assert lines[0].startswith("kfac-prune: error: ")
        assert len(lines[0]) < 2100
        return None if good in lines[0] else lines[0]

    yield run
    shutil.rmtree(folder / "bad")


def named(line, *names):
    """The line names one of these, a field also as the option that it is."""
    assert any(name in line or name.replace("_", "-") in line for name in names), (line, names)


# --- recipes


DEEP = 300
VALUES = (
    "[1, 2]", "[a, [b]]", "{a: 1}", "{}", "[]", "null", "~", "", "true", "no", "text", "'1'", "1.5", "-0.5", ".nan",
    ".inf", "-.inf", "-1", "0", "1", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000, "0x" + "f" * 5000,
    "[0x" + "f" * 5000 + "]", "1_0", "0o7", "07", "1:30:00", "2:4", "4:2", "0:0", "2020-01-01", "2020-99-99",
    "!!python/name:os.system", "!!python/object/apply:os.system ['touch pwned']", "!!python/object:builtins.dict {}",
    "!!binary aGk=", "!!set {a}", "!!int x", "!!float x", "!!timestamp x", "!!unknown 1", "&a [*a]", "*a", "'a\\0b'",
    '"a\\0b"', '"\\ud800"', "'", '"', "@", "%", "`", "[" * DEEP, "[" * DEEP + "]" * DEEP,
    "{a: " * DEEP + "1" + "}" * DEEP, "? a", "- a", "a: b: c", "x" * 5000, "kfac", "KFAC", "ffn,ffn", "ffn,heads",
    "../..", "~nobody-of-this-name/x", "/dev/null/x", "é", "\u2028", "1 # c", "{? [a, b] : c}", "{{a: b}: c}",
)  # fmt: skip


def test_fields_of_recipes(attempt):
    rng, counted, tried = random.Random(1), 0, 0
    while counted < CASES["fields"]:
        tried += 1
        name, value = rng.choice(FIELDS), rng.choice(VALUES)
        rest = "".join(f"{key}: {text}\n" for key, text in GOOD.items() if key != name)
        Path("bad/r.yaml").write_text(f"{rest}{name}: {value}\n", encoding="utf-8")
        line = attempt("prune", "--recipe", "bad/r.yaml")
        if line is not None:
            named(line, name, "bad/r.yaml", *([value[:50]] if name in ("model", "data", "eval_data", "out") else []))
            counted += 1
    assert tried < 2 * counted
    assert not Path("pwned").exists()


def test_recipes_of_any_bytes(attempt):
    rng, counted = random.Random(2), 0
    whole = Recipe(**GOOD, sparsity=0.5, damping=0.1, include=("*.mlp.*",)).to_yaml().encode()
    while counted < CASES["yaml"]:
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.choice((1, 3, 40))]
            elif kind == 2:
                data[at:at] = rng.choice(
                    (b"\t", b": ", b"- ", b"[", b"{", b"&a ", b"*a ", b"!!x ", b"\0", b"\xff", b"'", b"#")
                )
            else:
                lines = bytes(data).splitlines(keepends=True)
                data = bytearray(b"".join([*lines, rng.choice(lines)]))
        if rng.random() < 0.1:
            data = bytearray(whole.decode().encode(rng.choice(("utf-16", "utf-32", "utf-16-be", "utf-8-sig", "cp037"))))
        Path("bad/r.yaml").write_bytes(data)
        line = attempt("prune", "--recipe", "bad/r.yaml")
        if line is not None:
            named(line, "bad/r.yaml", *FIELDS)
            counted += 1


# --- options


WORDS = (
    "nan", "inf", "-inf", "-1", "0", "1", "1e400", "9" * 30, "9" * 5000, "-" + "9" * 30, "", "  ", "a\0b", "\udcff",
    "x" * 300, "x" * 5000, "2:4", "4:2", "1:99", "0:4", "True", "[1]", "--", "-", "\n", "é", "../..",
    "~nobody-of-this-name/x", "/dev/null/x", "None", "1,5", "0.5", "50%", "nan%", "kfac", "kfac:owl", "magnitude:",
    ":", "ffn", "ffn,heads", "meta", "cuda:99", "cuda:-1", "xla", "vulkan", "privateuseone", "cpu:x", "*.nonsense",
    "[", "\x1b[31m", "kept", "text.txt", "text.txt/x", "nowhere.txt",
)  # fmt: skip
#: A command of these that is not refused would run for a minute.
OUTS = (
    "kept",
    "text.txt",
    "text.txt/x",
    "a\0b",
    "\udcff",
    "",
    " ",
    "x" * 300,
    "~nobody-of-this-name/x",
    "/dev/null/x",
    "kept/..",
)
COMMANDS = {
    "prune": ["model", "--data", "empty.txt", "--out", "out", "--seqlen", "16"],
    "compare": ["model", "--data", "empty.txt", "--out", "out", "--seqlen", "16"],
    "eval": ["model", "--data", "empty.txt"],
    "inspect": ["model"],
    "theory": [],
    "demo": [],
}


def test_option_values(attempt):
    rng, counted, tried = random.Random(3), 0, 0
    parsers = next(a for a in build_parser()._actions if a.dest == "command").choices
    while counted < CASES["options"]:
        tried += 1
        command = rng.choice([*COMMANDS, "prune", "prune", "compare"])
        arguments, value = list(COMMANDS[command]), rng.choice(WORDS)
        options = [
            a for a in parsers[command]._actions if a.dest not in ("help", "overwrite", "trust_remote_code", "resume")
        ]
        action = rng.choice(options)
        flag = action.option_strings[0] if action.option_strings else None
        if command in ("theory", "demo"):
            value, flag = rng.choice(OUTS), rng.choice(("--out", "--out", "--nope"))
        elif command == "inspect" and flag is not None and value in ("--", "-"):
            continue
        if flag is None:
            arguments[0] = value
        elif action.nargs == 0:
            arguments += [flag, value]
        elif rng.random() < 0.5:
            arguments += [f"{flag}={value}"]
        else:
            arguments += [flag, value]
        line = attempt(command, *arguments)
        if line is not None:
            named(
                line,
                action.dest,
                flag or "model",
                value[:50].strip() or action.dest,
                "unrecognized arguments",
                "layer pattern",
            )
            counted += 1
    assert tried < 3 * counted


@pytest.mark.parametrize("arguments", [[], ["nope"], ["prune", "--nope"], ["eval"], ["--version=1"]], ids=str)
def test_arguments_that_do_not_parse(arguments, attempt):
    line = attempt(*arguments)
    assert line.endswith("--help lists the options")


# --- texts


def texts(rng):
    """A file name and its bytes, which hold no usable text."""
    deep = 100_000
    rows = [
        '{"txt": "a"}', '{"text": 1}', '{"text": null}', '{"text": ["a"]}', "1", "null", "[]", "true", "NaN", "{",
        "]", "a", "'a'", '{"text": "a"', '{"text": "\\ud800"}', "9" * 5000, "[" * deep, '{"a":' * deep,
        '{"text": "a"} {"text": "b"}', '"\\x"', '"a\tb"', "\x00", "--", "Infinity", "{1: 2}",
        '{"text": {"text": "a"}}', '{"": "a"}',
    ]  # fmt: skip
    kind = rng.choice(("txt", "jsonl", "jsonl", "jsonl", "ndjson", "json", "json", "folder"))
    good = ['{"text": "abc"}'] * rng.randrange(4)
    if kind == "txt":
        junk = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + rng.choice(
            (b"\xff", b"\xc3\x28", b"\xed\xa0\x80")
        )
        return "t.txt", rng.choice((junk, b" \n\t" * rng.randrange(9), "\ufeff \u2003".encode(), b"\x1f\x8b" + junk))
    if kind in ("jsonl", "ndjson"):
        lines = "\n".join([*good, rng.choice(rows), *good]).encode()
        return f"t.{kind}", rng.choice((lines, lines, lines, lines + b"\n\xff\xfe", lines.decode().encode("utf-16")))
    if kind == "json":
        row = rng.choice(rows)
        return "t.json", rng.choice((f"[{', '.join([*good, row])}]", row, "[" + ",".join(good), "")).encode()
    return "t", b""


def test_texts(attempt):
    rng, counted = random.Random(4), 0
    while counted < CASES["texts"]:
        name, data = texts(rng)
        path = Path("bad") / name
        if name == "t":
            path.mkdir()
            (path / rng.choice(("a.bin", ".hidden.txt", "b.csv", "c.txt"))).write_bytes(rng.choice((b"\xff", b" ")))
        else:
            path.write_bytes(data)
        option = rng.choice(("--data", "--eval-data"))
        if option == "--data":
            line = attempt("eval", "model", "--data", str(path), "--seqlen", "16")
        else:
            line = attempt("prune", "model", "--data", "text.txt", option, str(path), "--out", "out", "--seqlen", "16")
        if line is not None:
            named(line, str(path))
            counted += 1
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- models


SETTINGS = (
    None,
    "wide",
    -1,
    0,
    1.5,
    3,
    7,
    [],
    {},
    [1],
    "",
    10**30,
    -(10**30),
    True,
    "9" * 5000,
    float("nan"),
    float("inf"),
)
#: What the architecture needs; a number of layers that is only large would be built.
KEYS = ("model_type", "architectures", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "layer_types", "pad_token_id",
        "max_position_embeddings", "tie_word_embeddings", "dtype", "quantization_config", "auto_map", "pruned_shapes",
        "is_encoder_decoder", "attention_bias", "mlp_bias", "initializer_range")  # fmt: skip


def copy_model(*left_out):
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree("model", "bad", ignore=shutil.ignore_patterns(*left_out))
    return json.loads(Path("model/config.json").read_text(encoding="utf-8"))


def test_configurations(attempt):
    rng, counted = random.Random(5), 0
    config = copy_model("*.safetensors")
    while counted < CASES["configurations"]:
        key, value, kind = rng.choice(KEYS), rng.choice(SETTINGS), rng.randrange(8)
        if kind == 0:
            text = bytearray(json.dumps(config).encode())
            text[rng.randrange(len(text))] = rng.choice(b'\0\xff{}[],"')
        elif kind == 1:
            text = rng.choice(
                (b"", b"[]", b"null", b"3", b"[" * 10**5, b"{" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"9" * 5000)
            )
        elif kind == 2:
            text = json.dumps({k: v for k, v in config.items() if k not in ("model_type", key)}).encode()
        else:
            text = json.dumps({**config, key: value}).encode()
        Path("bad/config.json").write_bytes(text)
        line = attempt("inspect", "bad")
        if line is not None:
            named(line, "bad/config.json", "bad is", "bad holds", "which holds no weight")
            counted += 1


def broken(rng, data):
    """Bytes that are cut, changed at a place or replaced."""
    data, kind = bytearray(data), rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        return rng.choice(
            (b"", b"{}", b"[]", b"null", b"3", b"[" * 10**5, b'{"a":' * 10**5, b"\xff", pickle.dumps({"a": 1}))
        )
    data[rng.randrange(len(data))] = rng.choice((0, 255, *b'{}[],":'))
    return bytes(data)


def test_tokenizers(attempt, monkeypatch):
    for module in (inputs, measurement):
        monkeypatch.setattr(module, "load_tokenizer", loading.load_tokenizer)
    rng, counted, names = random.Random(6), 0, ("tokenizer.json", "tokenizer_config.json")
    copy_model("*.safetensors")
    while counted < CASES["tokenizers"]:
        name = rng.choice(names)
        for other in names:
            shutil.copy(f"model/{other}", f"bad/{other}")
        Path("bad", name).write_bytes(broken(rng, Path("model", name).read_bytes()))
        line = attempt("eval", "bad", "--data", "empty.txt")
        if line is not None:
            named(line, "bad has no usable tokenizer")
            counted += 1


def test_weights(attempt):
    rng, counted, whole = random.Random(7), 0, Path("model/model.safetensors").read_bytes()
    copy_model()
    header = 8 + int.from_bytes(whole[:8], "little")
    while counted < CASES["weights"]:
        data = bytearray(whole)
        if rng.random() < 0.5:
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        else:
            data = broken(rng, whole[: rng.choice((9, 100, header, len(whole)))])
        Path("bad/model.safetensors").write_bytes(data)
        line = attempt("eval", "bad", "--data", "text.txt", "--seqlen", "16", "--eval-samples", "1")
        if line is not None:
            named(line, "the weights of bad", "the checkpoint bad", "bad: weight")
            counted += 1


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("case", ["alone", "shard", "elsewhere", "in-disguise", "beside"])
def test_pickles_are_not_loaded(case, attempt):
    copy_model(*(["model.safetensors"] if case != "beside" else []))
    name = {"in-disguise": "model.safetensors"}.get(case, "pytorch_model.bin")
    Path("bad", name).write_bytes(pickle.dumps(Dangerous()))
    if case in ("shard", "elsewhere"):
        shutil.copy("model/model.safetensors", "bad/one.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "../bad/" * (case == "elsewhere") + name}}
        Path("bad/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    line = attempt("eval", "bad", "--data", "text.txt", "--seqlen", "16", "--eval-samples", "1")
    if case == "beside":
        assert line is None
    else:
        named(line, "bad holds its weights as", "bad/model.safetensors.index.json", "the weights of bad")
        assert (case == "in-disguise") or "pytorch_model.bin" in line
    assert not Path("executed").exists()


@pytest.mark.parametrize("command", ["inspect", "eval", "prune", "compare"])
def test_code_of_a_checkpoint_runs_only_when_allowed(command, attempt):
    config = copy_model()
    code = (
        "from pathlib import Path\nPath('executed').touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    )
    code += "class Own(LlamaConfig):\n    model_type = 'own'\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    Path("bad/code.py").write_text(code, encoding="utf-8")
    auto_map = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    Path("bad/config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": auto_map}), encoding="utf-8"
    )
    line = attempt(command, "bad", *COMMANDS[command][1:])
    named(line, "bad comes with code of its own, which runs only with --trust-remote-code")
    assert not Path("executed").exists()


# --- what runs leave and go on from


def test_artefacts(tmp_path):
    rng, path, refused, tried = random.Random(8), tmp_path / "a.safetensors", 0, 0
    tensors, record = {"weight": torch.randn(3, 5), "bias": torch.randn(3).bfloat16()}, {"after": 0.25, "seconds": 1.5}
    save_artifact(path, tensors, key="mine", record=record)
    whole = path.read_bytes()
    for at in [*range(len(whole)), *[-1] * 60]:
        data = bytearray(whole) if at >= 0 else broken(rng, whole)
        if at >= 0:
            data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        tried += 1
        reason = refusal(path)
        if reason is None:  # a bit that says nothing, such as a space's
            found, figures = load_artifact(path, "mine")
            assert figures == record
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        else:
            assert str(path) in reason
            assert "run with --overwrite instead of --resume" in reason
            refused += 1
    assert refused > 0.9 * tried


def refusal(path):
    try:
        load_artifact(path, "mine")
    except InputError as error:
        return str(error)
    return None


RUN = ("--data", "text.txt", "--out", "out", "--seqlen", "16", "--eval-samples", "2")


def test_resumed_from_broken_files(attempt, monkeypatch, capsys):
    """A run that stopped after one block leaves a file; broken or foreign it is refused by name."""
    run = ("prune", "model", *RUN, "--samples", "16", "--reconstruct", "1", "--method", "layerwise")
    table = reconstruction.Journal.write

    def stops(self, part, *rest):
        table(self, part, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction.Journal, "write", stops)
        assert main(run) == 130
    capsys.readouterr()
    (left,) = Path("out.work").iterdir()
    whole = left.read_bytes()
    try:
        for data in (
            whole[:-5],
            whole.replace(b'"key":"', b'"key":"x'),
            whole[:-1] + bytes([whole[-1] ^ 1]),
            pickle.dumps(1),
        ):
            left.write_bytes(data)
            named(attempt(*run, "--resume"), str(left))
    finally:
        shutil.rmtree("out.work")


def test_comparison_from_broken_cells(attempt):
    run = ("compare", "model", *RUN, "--samples", "8", "--methods", "magnitude", "--levels", "50%")
    assert main(run) == 0
    cells = Path("out/cells.jsonl")
    header, row = cells.read_text(encoding="utf-8").splitlines()
    try:
        broken_ones = ["[1]", "3", "{}", "{", "[" * 10**5, '{"protocol": 1, "dense": {}}', "\x00", f"{row}\n{header}"]
        broken_ones += [f"{header}\n{{}}", f"{header}\n[]", f"{header}\n{row.replace('kl', 'kj')}"]
        for lines in (*broken_ones, header.replace("loss", "lose"), header.replace("seqlen", "seqlenn")):
            cells.write_text(lines, encoding="utf-8")
            named(attempt(*run), "out/cells.jsonl", "--out out holds cells")
    finally:
        shutil.rmtree("out")


# --- one by one


def recipe(text):
    return {"bad/r.yaml": "model: model\ndata: empty.txt\nout: out\n" + text}, ["prune", "--recipe", "bad/r.yaml"]


NOBODY = "~nobody-of-this-name"
TWO = ["compare", "model", "--data", "d", "--out", "o"]
ONES = {
    "hexadecimal": (*recipe(f"samples: 0x{'f' * 5000}"), "samples has over a thousand digits"),
    "hexadecimal-in-a-list": (*recipe(f"include: [0x{'f' * 5000}]"), "include is a number of thousands of digits"),
    "alias": (*recipe("include: &a [x]\nignore: *a"), "a recipe has no aliases"),
    "bomb": (*recipe("include: &a [x,x]\nignore: &b [*a,*a]"), "a recipe has no aliases"),
    "twice": (*recipe("seed: 1\nseed: 2"), "'seed' is given twice"),
    "tag": (*recipe("seed: !!timestamp x"), "bad/r.yaml is not valid YAML"),
    "python": (*recipe("seed: !!python/object/apply:os.system [touch executed]"), "bad/r.yaml is not valid YAML"),
    "long": (*recipe("# " + "x" * 2**20), "the recipe bad/r.yaml has over 1,048,576 bytes"),
    "recipe-of-nobody": ({}, ["prune", "--recipe", f"{NOBODY}/r.yaml"], f"{NOBODY}/r.yaml cannot be read"),
    "nul": (*recipe('eval_data: "a\\0b"'), "eval_data is 'a\\x00b'; it must be"),
    "surrogate": (
        {},
        ["eval", "model", "--data", "d.txt", "--text-field", "\udcff"],
        "text_field is '\\udcff'; it must",
    ),
    "list-by-argparse": ({}, [*TWO, "--seeds=--"], "seeds is '--', which is no value"),
    "last-seed": ({}, [*TWO, "--seed", str(2**63 - 1), "--seeds", "2"], "seeds is 2 from seed 9223372036854775807 on"),
    "meta": ({}, ["eval", "model", "--data", "empty.txt", "--device", "meta"], "device 'meta' cannot be used"),
    "out-empty": ({}, ["theory", "--out", ""], "--out is empty"),
    "out-of-nobody": ({}, ["demo", "--out", f"{NOBODY}/x"], f"--out {NOBODY}/x cannot be created"),
    "out-too-long": ({}, ["theory", "--out", "x" * 300], "cannot be created"),
    "deep": ({"bad/t.jsonl": "\n" + "[" * 10**5}, ["eval", "model", "--data", "bad/t.jsonl"], "t.jsonl, line 2"),
    "digits": ({"bad/t.json": "9" * 5000}, ["eval", "model", "--data", "bad/t.json"], "t.json, line 1"),
}


@pytest.mark.parametrize("name", ONES)
def test_one(name, attempt):
    """Each of these was once a traceback, a silent choice, or ran out of memory."""
    files, arguments, expected = ONES[name]
    for file, content in files.items():
        Path(file).write_text(content, encoding="utf-8")
    assert expected in attempt(*arguments)
    assert not Path("executed").exists()


def test_a_foreign_latency_cache_counts_as_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kfac_prune").mkdir()
    for content in ("[]", "{", "[" * 10**5, "\0"):
        (tmp_path / "kfac_prune" / "latency.json").write_text(content, encoding="utf-8")
        assert latency._read_cache() == {}
    good = {"ffn": [[1, 0.5]], "heads": [[1, 2, 0.5]]}
    assert latency._is_entry(good)
    for entry in (
        None,
        [],
        {},
        {"ffn": []},
        good | {"ffn": [1]},
        good | {"heads": [[1, 2]]},
        good | {"ffn": [["1", 2]]},
    ):
        assert not latency._is_entry(entry)


# --- what is there stays


@pytest.mark.parametrize("source", ["model", "text.txt", "folder"])
def test_an_input_is_not_overwritten(source, attempt):
    Path("bad/texts").mkdir()
    Path("bad/texts/a.txt").write_text("abc", encoding="utf-8")
    model = "bad/model" if source == "model" else "model"
    data = "bad/texts" if source == "folder" else "bad/texts/a.txt"
    if source == "model":
        shutil.copytree("model", model)
    for out in {"model": ("bad/model", "bad"), "text.txt": ("bad/texts", "bad"), "folder": ("bad/texts", ".")}[source]:
        line = attempt("prune", model, "--data", data, "--out", out, "--overwrite")
        named(line, f"--out {out} is or holds the")


def test_a_run_writes_nothing_but_its_folder(attempt, folder, tmp_path, monkeypatch, capsys):
    """Neither beside it, nor in the home folder, nor among temporary files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = listing(folder)
    assert main(["prune", "model", *RUN, "--samples", "16", "--reconstruct", "1", "--method", "layerwise"]) == 0
    capsys.readouterr()
    shutil.rmtree("out")
    assert listing(folder) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "theory"])
def test_a_folder_with_more_than_a_result_is_not_replaced(command, attempt):
    Path("bad/own").mkdir()
    for name in (f"{command}.json", "thesis.txt"):
        Path("bad/own", name).write_text("mine", encoding="utf-8")
    named(attempt(command, "--out", "bad/own"), "--out bad/own exists and is not empty")


@pytest.mark.parametrize("command", ["eval", "prune"])
def test_a_model_that_cannot_run(command, attempt):
    """Three groups of keys for four heads of queries: every tensor loads, and no token passes."""
    copy_model()
    save_llama("bad", num_key_value_heads=3)
    out = () if command == "eval" else ("--out", "out")
    line = attempt(command, "bad", "--data", "text.txt", "--seqlen", "16", *out)
    named(line, "LlamaForCausalLM of bad fails on a window of text")
