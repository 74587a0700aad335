"""The command line: ``kfac-prune prune | estimate | compare | eval | inspect | demo | theory``; torch loads late."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from kfac_prune.config import OWN_TEXT, Recipe
from kfac_prune.errors import InputError, shorten
from kfac_prune.options import check_text
from kfac_prune.protocol import COMPARED, LEVELS, Comparison
from kfac_prune.recipe_file import read_recipe

#: Characters of a message; what is quoted in it can be of any length.
MESSAGE = 2000
#: Stands in a recipe for text and output that a command does not use.
UNKNOWN = "unused"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 = done, 2 = the input cannot be used (one line on stderr says what and why), 130 = interrupted.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"  # as torchrun and accelerate launch set it
    who = f"kfac-prune (process {os.environ.get('RANK')})" if several else "kfac-prune"
    arguments = argparse.Namespace()
    try:
        arguments, unknown = build_parser().parse_known_args(argv)
        if unknown:
            of = f"kfac-prune {arguments.command} --help"
            raise InputError(f"unrecognized arguments: {' '.join(unknown)}; {of} lists the options")
        _check_texts(arguments)
        if several and arguments.command != "prune":
            raise InputError(f"{arguments.command} runs in one process; start it without a launcher")
        arguments.run(arguments)
    except InputError as error:
        message = " ".join(str(error).splitlines()).encode(errors="backslashreplace").decode()  # lone surrogates
        print(f"{who}: error: {shorten(message, MESSAGE)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kfac-prune: interrupted; {arguments.interrupted}", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Its errors are one line like all others, in the place of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise InputError(f"{message}; {self.prog} --help lists the options")


def _check_texts(arguments: argparse.Namespace) -> None:
    """Whatever was given can be a file's name and be written down."""
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list | tuple) and value else (value,):
            if text == []:  # what argparse makes of --option=--
                raise InputError(f"{name} is '--', which is no value")
            if isinstance(text, str):
                check_text(name, text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the options of ``prune`` are the fields of ``Recipe``."""
    parser = _Parser(
        prog="kfac-prune",
        description="One-shot pruning of transformers by the Optimal Brain Surgeon under a Kronecker-factored Hessian.",
    )
    parser.set_defaults(interrupted="nothing was written to --out")
    parser.add_argument("--version", action="version", version=f"kfac-prune {version('kfac-prune')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prune = commands.add_parser("prune", help="prune a model and save it", description="Prune a model and save it.")
    prune.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_field("model").metadata["help"])
    prune.add_argument("--recipe", help="YAML file with any of these options; options given here win")
    for field in dataclasses.fields(Recipe):
        if field.name != "model":
            _add_option(prune, field)
    prune.add_argument(
        "--processes", type=int, metavar="N",
        help="stop unless so many processes share the work, as torchrun or accelerate launch start them, each with the "
        "whole model and a GPU of its own; default: as many as there are",
    )  # fmt: skip
    prune.set_defaults(
        run=_prune, interrupted="nothing was written to --out; with --resume the same command goes on from OUT.work"
    )

    estimate = commands.add_parser(
        "estimate",
        help="tell time, memory and disk of a run of prune, from the model's configuration alone",
        description="Tell operations, seconds, peak memory and disk of every stage that prune would have with these "
        "options, on this device (measured for a second or two) or on a named GPU. Loads no weights and reads no text.",
    )
    estimate.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_field("model").metadata["help"])
    estimate.add_argument("--recipe", help="YAML file with any of these options; options given here win")
    estimate.add_argument(
        "--for",
        dest="card",
        metavar="GPU",
        help="a GPU by name, such as h100, from a table; default: --device, measured",
    )
    estimate.add_argument("--json", metavar="FILE", help="also write the figures to this file; default: none")
    for name in ("data", "eval_data", "separator", "objective", "samples", "eval_samples", "seqlen", "batch_size",
                 "sparsity", "pattern", "permute", "method", "allocation", "refit", "shots", "reconstruct",
                 "own_text", "streams", "include", "ignore", "device", "dtype", "offload", "max_memory",
                 "trust_remote_code"):  # fmt: skip
        _add_option(estimate, _field(name))
    estimate.set_defaults(run=_estimate)

    compare = commands.add_parser(
        "compare",
        help="measure many methods at many levels under one protocol: a table and trade-off curves",
        description="Prune a model by every method at every level and measure all on the same held-out text: loss, "
        "perplexity, KL, predicted KL, compression, theoretical speed-up, seconds and memory. Nothing is saved but the "
        "figures; finished cells are kept in --out, and the same command goes on where it was interrupted.",
    )
    compare.add_argument("model", help=_field("model").metadata["help"])
    compare.add_argument(
        "--methods", nargs="+", default=COMPARED, metavar="METHOD",
        help="each a value of prune's --method, alone or with an allocation, such as magnitude:global; default: "
        f"{' '.join(COMPARED)}",
    )  # fmt: skip
    compare.add_argument(
        "--levels", nargs="+", default=LEVELS, metavar="LEVEL",
        help=f"sparsities and n:m patterns; default: {' '.join(LEVELS)}".replace("%", "%%"),
    )  # fmt: skip
    compare.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="how many, from --seed on, for a spread: each has calibration windows of its own; default: 1",
    )  # fmt: skip
    compare.add_argument(
        "--reconstruct", type=int, default=0, metavar="N",
        help="measure every cell also after this many epochs of prune's --reconstruct; default: 0, one shot only",
    )  # fmt: skip
    for name in ("data", "out"):
        _add_option(compare, _field(name), required=True)
    own = {
        "own_text": "windows that the dense model writes itself, per calibration window, for --reconstruct to learn on "
        f"beside the text; default: {OWN_TEXT}",
        "damping": "added to each curvature factor, as a fraction of its mean diagonal, in (0, 1]; default: 0.03",
        "overwrite": "begin anew in the place of the cells that --out holds",
    }
    for name in ("eval_data", "separator", "text_field", "samples", "eval_samples", "seqlen", "batch_size",
                 "reconstruct_unit", "own_text", "include", "ignore", "damping", "fisher", "seed", "device", "dtype",
                 "overwrite", "trust_remote_code"):  # fmt: skip
        _add_option(compare, _field(name), text=own.get(name))
    compare.set_defaults(run=_compare, interrupted="finished cells are in --out, and the same command goes on")

    evaluate = commands.add_parser(
        "eval",
        help="loss, perplexity and sparsity of a model, and how far it is from its dense form",
        description="Measure a model on text: sparsity; loss in nats per token and perplexity of a causal language "
        "model; and against its dense form KL, for an embedding also cosine and nearest neighbours kept, for classes "
        "agreement.",
    )
    evaluate.add_argument("model", help="model to measure: a local folder or a hub id")
    evaluate.add_argument("--dense", help="the model before pruning, for KL(dense‖pruned); default: no KL")
    evaluate.add_argument("--data", required=True, help="text to measure on, of any kind that --data of prune takes")
    for name in ("objective", "separator", "text_field", "eval_samples", "seqlen", "batch_size", "device", "dtype",
                 "trust_remote_code"):  # fmt: skip
        _add_option(evaluate, _field(name))
    evaluate.set_defaults(run=_eval)

    inspect = commands.add_parser(
        "inspect",
        help="list what can be pruned in a model, from its configuration alone",
        description="List the layers that can be pruned and what share of the parameters they hold. Loads no weights.",
    )
    inspect.add_argument("model", help="model to look at: a local folder or a hub id")
    for name in ("include", "ignore", "trust_remote_code"):
        _add_option(inspect, _field(name))
    inspect.set_defaults(run=_inspect)

    demo = commands.add_parser(
        "demo",
        help="prune a small model that comes with the package by three methods and compare; needs no network",
        description="Prune the small packaged language model at 50, 60, 70 and 80 % and at 2:4 by magnitude, by the "
        "layer-wise method and by K-FAC, and write a table and a picture. Takes about a minute on two cores.",
    )
    demo.add_argument(
        "--out", default="kfac-prune-demo", help="folder for table, picture and model; default: %(default)s"
    )
    demo.set_defaults(run=_demo)

    theory = commands.add_parser(
        "theory",
        help="derive the rules of pruning and check them on problems small enough to be exact; needs no network",
        description="Write a page with the derivations, from magnitude to exact OBS, and with small exact experiments "
        "on handwritten digits: every curvature along the sparsity axis, predicted against true loss, networks stopped "
        "early, indefinite Hessians, pruning at initialisation and with rewinding. Takes one to two minutes. Needs "
        'scikit-learn and matplotlib: pip install "kfac-prune[theory]".',
    )
    theory.add_argument(
        "--out", default="kfac-prune-theory", help="folder for page, pictures and figures; default: %(default)s"
    )
    theory.set_defaults(run=_theory)
    return parser


def _field(name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(Recipe) if f.name == name)


def _number(text: str) -> float:
    """A number with a point; the type of an option."""
    try:
        return float(text)
    except ValueError as error:
        share = re.fullmatch(r"([0-9.]+) ?%", text)
        hint = f"; {text} is {float(share[1]) / 100:g}" if share and share[1].count(".") < 2 else ""
        raise argparse.ArgumentTypeError(f"invalid number: {text!r}{hint}") from error


def _add_option(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], *, required: bool = False, text: str | None = None
) -> None:
    """Add the option of a recipe field; without it the namespace stays without the name (recipe or default rule).

    ``text`` is its help where that is another than in ``prune``.
    """
    flag = "--" + field.name.replace("_", "-")
    text = (text or field.metadata["help"]).replace("%", "%%")
    kind = str(field.type).replace(" | None", "")
    if kind == "bool":
        if field.default is None:  # on or off by a rule that the help states
            action: Any = argparse.BooleanOptionalAction
        else:
            action, text = "store_true", f"{text}; default: off"
        parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        return
    if field.default not in ("", (), None):
        text += f"; default: {field.default}"
    extra: dict[str, Any] = {"choices": field.metadata["choices"]} if field.metadata["choices"] else {}
    if kind.startswith("tuple"):
        extra = {"action": "append", "metavar": "PATTERN"}
    elif kind in ("int", "float"):
        extra |= {"type": {"int": int, "float": _number}[kind], "metavar": "N" if kind == "int" else "X"}
    parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, required=required, help=text, **extra)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe fields that were given on the command line, in their own types."""
    names = {f.name for f in dataclasses.fields(Recipe)}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(arguments).items() if k in names
    }
    if "separator" in given:
        given["separator"] = given["separator"].replace(r"\n", "\n").replace(r"\t", "\t")
    return given


def _still() -> None:
    """No chatter from transformers and the hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # it reports every retry
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _echo(text: str) -> None:
    print(text, flush=True)


def _prune(arguments: argparse.Namespace) -> None:
    fields = read_recipe(arguments.recipe) if arguments.recipe else {}
    recipe = Recipe(**{**fields, **_given(arguments)})
    from kfac_prune.pipeline import run

    _still()
    run(recipe, processes=arguments.processes, echo=_echo, quiet=False)


def _estimate(arguments: argparse.Namespace) -> None:
    fields = read_recipe(arguments.recipe) if arguments.recipe else {}
    recipe = Recipe(**{"data": UNKNOWN, "out": UNKNOWN, **fields, **_given(arguments)})
    from kfac_prune.estimate import check_record, estimate, write_record

    _still()
    if arguments.json is not None:
        check_record(arguments.json)
    found = estimate(recipe, arguments.card)
    _echo(found.table())
    if arguments.json is not None:
        write_record(found, arguments.json)


def _compare(arguments: argparse.Namespace) -> None:
    recipe = Recipe(**_given(arguments))
    comparison = Comparison(recipe, arguments.methods, arguments.levels, arguments.seeds)
    from kfac_prune.compare import compare

    _still()
    compare(comparison, echo=_echo, quiet=False)


def _eval(arguments: argparse.Namespace) -> None:
    given = _given(arguments)
    recipe = Recipe(**{**given, "out": UNKNOWN})  # checks types and ranges
    from kfac_prune.measurement import measure

    _still()
    _echo(measure(recipe, dense_source=arguments.dense, quiet=False))


def _inspect(arguments: argparse.Namespace) -> None:
    given = _given(arguments)
    from kfac_prune.inspect_model import describe

    _still()
    _echo(describe(given["model"], given.get("include", ()), given.get("ignore", ()),
                   trust_remote_code=given.get("trust_remote_code", False)))  # fmt: skip


def _demo(arguments: argparse.Namespace) -> None:
    from kfac_prune.demo import run_demo

    _still()
    run_demo(arguments.out, echo=_echo, quiet=False)


def _theory(arguments: argparse.Namespace) -> None:
    from kfac_prune.theory.run import run_theory

    run_theory(arguments.out, echo=_echo)
