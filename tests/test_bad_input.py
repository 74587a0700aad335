"""Thousands of malformed recipes, options, models, texts and artefacts: exit code 2, one line, nothing written."""

import dataclasses
import json
import os
import pickle
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from letters import LETTERS, save_llama
from test_cli import listing

from kfac_prune import inputs, measurement, models
from kfac_prune.cli import build_parser, main
from kfac_prune.config import Recipe
from kfac_prune.errors import InputError
from kfac_prune.store import load_artifact, save_artifact

#: Malformed inputs that reach the command functions; good ones are drawn again and not counted.
CASES = {"fields": 700, "yaml": 350, "options": 600, "texts": 250, "configurations": 90, "tokenizers": 60, "weights": 30}
FIELDS = [f.name for f in dataclasses.fields(Recipe)]
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
    for module in (inputs, measurement):  # the same one thousands of times
        monkeypatch.setattr(module, "load_tokenizer", cache(models.load_tokenizer))
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
    "[1, 2]", "[a, [b]]", "{a: 1}", "{}", "[]", "null", "~", "", "true", "no", "text", "'1'", "1.5", "-0.5", ".nan", ".inf",
    "-.inf", "-1", "0", "1", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000, "0x" + "f" * 5000, "[0x" + "f" * 5000 + "]",
    "1_0", "0o7", "07", "1:30:00", "2:4", "4:2", "0:0", "2020-01-01", "2020-99-99", "!!python/name:os.system",
    "!!python/object/apply:os.system ['touch pwned']", "!!python/object:builtins.dict {}", "!!binary aGk=", "!!set {a}",
    "!!int x", "!!float x", "!!timestamp x", "!!unknown 1", "&a [*a]", "*a", "'a\\0b'", '"a\\0b"', '"\\ud800"', "'", '"', "@",
    "%", "`", "[" * DEEP, "[" * DEEP + "]" * DEEP, "{a: " * DEEP + "1" + "}" * DEEP, "? a", "- a", "a: b: c", "x" * 5000,
    "kfac", "KFAC", "ffn,ffn", "ffn,heads", "../..", "~nobody-of-this-name/x", "/dev/null/x", "é", "\u2028", "1 # c",
    "{? [a, b] : c}", "{{a: b}: c}",
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
                data[at:at] = rng.choice((b"\t", b": ", b"- ", b"[", b"{", b"&a ", b"*a ", b"!!x ", b"\0", b"\xff", b"'", b"#"))
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
    "nan", "inf", "-inf", "-1", "0", "1", "1e400", "9" * 30, "9" * 5000, "-" + "9" * 30, "", "  ", "a\0b", "\udcff", "x" * 300, "x" * 5000,
    "2:4", "4:2", "1:99", "0:4", "True", "[1]", "--", "-", "\n", "é", "../..", "~nobody-of-this-name/x", "/dev/null/x",
    "None", "1,5", "0.5", "50%", "nan%", "kfac", "kfac:owl", "magnitude:", ":", "ffn", "ffn,heads", "meta", "cuda:99",
    "cuda:-1", "xla", "vulkan", "privateuseone", "cpu:x", "*.nonsense", "[", "\x1b[31m", "kept", "text.txt", "text.txt/x", "nowhere.txt",
)  # fmt: skip
#: A command of these that is not refused would run for a minute.
OUTS = ("kept", "text.txt", "text.txt/x", "a\0b", "\udcff", "", " ", "x" * 300, "~nobody-of-this-name/x", "/dev/null/x", "kept/..")
COMMANDS = {
    "prune": ["model", "--data", "empty.txt", "--out", "out"],
    "compare": ["model", "--data", "empty.txt", "--out", "out"],
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
        options = [a for a in parsers[command]._actions if a.dest not in ("help", "overwrite", "trust_remote_code", "resume")]
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
            named(line, action.dest, flag or "model", value[:50].strip() or action.dest, "unrecognized arguments", "layer pattern")
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
    rows = ['{"txt": "a"}', '{"text": 1}', '{"text": null}', '{"text": ["a"]}', "1", "null", "[]", "true", "NaN", "{", "]", "a",
            "'a'", '{"text": "a"', '{"text": "\\ud800"}', "9" * 5000, "[" * deep, '{"a":' * deep, '{"text": "a"} {"text": "b"}',
            '"\\x"', '"a\tb"', "\x00", "--", "Infinity", "{1: 2}", '{"text": {"text": "a"}}', '{"": "a"}']  # fmt: skip
    kind = rng.choice(("txt", "jsonl", "jsonl", "jsonl", "ndjson", "json", "json", "folder"))
    good = ['{"text": "abc"}'] * rng.randrange(4)
    if kind == "txt":
        junk = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80"))
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
