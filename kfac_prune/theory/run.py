"""The ``theory`` command: small exact experiments, their pictures, and a page that derives the rules."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from kfac_prune.errors import InputError
from kfac_prune.store import check_output, earlier_result, new_folder


@dataclass(frozen=True)
class Size:
    """How much is computed; the default takes one to two minutes.

    Attributes:
        images: learnt by the network.
        hidden: its hidden units.
        decay: of its weights.
        levels: sparsities of the sweep, ascending.
        early_levels: sparsities for the network stopped early.
        start_levels: sparsities of the study of training before and after.
        converged: iterations of L-BFGS to the minimum.
        early: iterations of the network that is stopped early.
        retraining: iterations in the study of training before and after.
        shifts: added to ``−μ_min`` of the indefinite Hessian.
    """

    images: int = 1000
    hidden: int = 16
    decay: float = 1e-3
    levels: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    early_levels: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    start_levels: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    converged: int = 400
    early: int = 6
    retraining: int = 150
    shifts: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-12, 3))


#: Of the sparsity at which damping is studied, and of every random number.
STUDIED, SEED = 0.7, 0


def run_theory(out: str, *, size: Size | None = None, echo: Callable[[str], None] = print) -> dict[str, Any]:
    """Run everything and write ``out``: page, pictures, figures.

    Args:
        out: folder; an earlier result of this command in it is replaced.
        size: how much is computed; None is the default.
        echo: receives the lines meant for a person.

    Returns:
        The figures, as theory.json has them.

    Raises:
        InputError: scikit-learn or matplotlib is missing, or the folder cannot be written.
    """
    overwrite = earlier_result(out, ("theory.json", "index.html", "*.png"))
    check_output(out, overwrite=overwrite)
    for module in ("sklearn", "matplotlib"):
        if find_spec(module) is None:
            name = "scikit-learn" if module == "sklearn" else module
            raise InputError(f'the theory page needs {name}, which is not installed; pip install "kfac-prune[theory]"')
    begin = time.perf_counter()
    record = compute(size or Size(), echo)
    record["seconds"] = time.perf_counter() - begin
    from kfac_prune.theory.page import render
    from kfac_prune.theory.pictures import PICTURES

    with new_folder(out, overwrite=overwrite) as folder:
        for name, draw in PICTURES.items():
            draw(record, folder / f"{name}.png")
        (folder / "theory.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "index.html").write_text(render(record, folder), encoding="utf-8")
    echo(f"Done in {time.perf_counter() - begin:.0f} s. Written to {out}/:")
    echo("  index.html   derivations, tables and pictures on one page; open it in a browser")
    echo("  theory.json  every figure on it")
    echo(f"  {', '.join(f'{name}.png' for name in PICTURES)}")
    return record


def compute(size: Size, echo: Callable[[str], None]) -> dict[str, Any]:
    """All figures; deterministic."""
    from kfac_prune.theory import small
    from kfac_prune.theory.network import Network
    from kfac_prune.theory.studies import damping_study, spectrum, start_study
    from kfac_prune.theory.sweep import Row, sweep, sweep_with_gradient

    four, two = small.four_weights(), small.two_weights()
    echo(
        f"Four weights: magnitude removes w{four['removed_by_magnitude']} and loses {four['loss_magnitude']:.3f}, "
        f"OBD removes w{four['removed_by_obd']} and loses {four['loss_obd']:.3f}."
    )
    echo(
        f"Two coupled weights: removing one costs {two['loss_without_move']:.3f}, or {two['loss_compensated']:.3f} if "
        "the other moves."
    )
    network = Network.digits(images=size.images, hidden=size.hidden, decay=size.decay)
    initial = network.initial(SEED)
    early, trained = network.train(initial, size.early), network.train(initial, size.converged)
    echo(
        f"Digits: {network.size:,} weights, {size.images:,} images; loss {float(network.loss(trained)):.4f} at "
        f"the minimum (gradient {float(network.gradient(trained).norm()):.0e}), {float(network.loss(early)):.4f} "
        "stopped early."
    )
    states: dict[str, Any] = {}
    for name, w in (("at initialisation", initial), ("stopped early", early), ("converged", trained)):
        h, states[name] = spectrum(network, w, name)
        states[name]["accuracy"] = network.accuracy(w)
        if name == "stopped early":
            hessian = h
        echo(
            f"  exact Hessian {name}: {states[name]['negative']} of {network.size:,} eigenvalues negative, "
            f"{states[name]['smallest']:.2g} to {states[name]['largest']:.2g}"
            + ("; refused" if states[name]["refused"] else f"; damping {states[name]['added']:.2g}")
        )
    echo("  every rule along the sparsity axis ...")
    rows = [asdict(row) for row in sweep(network, trained, size.levels)]
    echo("  the network stopped early, with and without the gradient ...")
    mixed = list(sweep_with_gradient(network, early, size.early_levels))
    echo("  damping of the indefinite Hessian ...")
    damping = damping_study(network, early, hessian, size.shifts, STUDIED)
    echo("  masks from before and after training ...")
    start = [asdict(row) for row in start_study(network, initial, trained, size.start_levels, size.retraining)]
    return {
        "four_weights": four,
        "two_weights": two,
        "network": {"weights": network.size, **asdict(size), "seed": SEED},
        "states": states,
        "sweep": rows,
        "early": [asdict(row) for row in mixed if isinstance(row, Row)],
        "trust": [asdict(row) for row in mixed if not isinstance(row, Row)],
        "damping": damping,
        "start": start,
    }
