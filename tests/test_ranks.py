"""Several processes come to the result of one, in every stage; when one dies the others stop."""

import dataclasses
import importlib
import json
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_reconstruction
import test_recovery
import torch
from conftest import assert_near, build, forkserver, random_windows
from letters import LETTERS, save_llama
from safetensors.torch import load_file

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.capture import FactorCapture
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import prunable_layers
from kfac_prune.pipeline import run

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prune.py"
#: Between them every stage of the pipeline.
RUNS = {
    "diagonal": {"sparsity": 0.5, "method": "obd"},
    "refit": {"sparsity": 0.5, "refit": True, "shots": 2},
    "smaller": {"structured": "ffn", "sparsity": 0.3, "shots": 1, "reconstruct": 0},
    "reconstruct": {"pattern": "2:4", "reconstruct": 1, "samples": 195},
}
#: Bytes: the factors of two or three layers at a time.
SOME_LAYERS = 12_000
#: The reconstruction takes its steps on 3 of 195 windows; two processes would take theirs on 4.
DONE = {1: set(RUNS), 2: set(RUNS) - {"reconstruct"}, 3: {"diagonal", "reconstruct"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and text, where all processes leave their results."""
    root = tmp_path_factory.mktemp("ranks")
    save_llama(root / "model")
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS[:12], k=rng.randint(2, 6))) for _ in range(40)]
    (root / "text.txt").write_text(" ".join(rng.choices(words, k=2200)), encoding="utf-8")
    return root


def recipe(root, name, processes):
    out = str(root / f"{name}-{processes}")
    small = {"samples": 33, "eval_samples": 15, "seqlen": 16, "device": "cpu"}
    return Recipe(model=str(root / "model"), data=str(root / "text.txt"), out=out, **small | RUNS[name])


def factors_of(max_memory=None, count=7):
    model = build("opt")
    windows = random_windows(count=count, length=9, lengths=(9, 4, 7, 9, 2, 9, 5)[:count])
    return estimate_factors(model, prunable_layers(model), windows, batch_size=2, max_memory=max_memory)


def work(root, processes):
    """What every process does; the results of the first are looked at."""
    factors = factors_of()
    records = {name: run(recipe(root, name, processes)) for name in RUNS if name in DONE[processes]}
    grouped = dict(factors_of(max_memory=SOME_LAYERS).layers)
    single = [factors_of(most, count=1) for most in (None, SOME_LAYERS)]  # all others see no text
    return {
        "layers": factors.layers, "grouped": grouped, "streams": factors.streams, "records": records,
        "single": [(dict(f.layers), f.streams) for f in single],
    }  # fmt: skip


#: Modules that multiply approximately where the CPU has units for it; their rounding makes more of small differences.
APPROXIMATE = ("kfac_prune.obs.select", "kfac_prune.obs.compensate", "kfac_prune.products")


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """As in the processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in APPROXIMATE:
            patch.setattr(importlib.import_module(name), "approximate_products", nullcontext)
        yield


def begin(rank, root, processes):
    """As a launcher does it, with exact products."""
    for name in APPROXIMATE:
        importlib.import_module(name).approximate_products = nullcontext
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    store = torch.distributed.FileStore(f"{root}/store{processes}", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)


def one_of_several(rank, root, processes):
    begin(rank, root, processes)
    torch.save(work(root, processes), root / f"result-{processes}-{rank}")
    if processes == 2:
        torch.save(expert_seen_by_one(), root / f"expert-{rank}")
        torch.save(test_reconstruction.of_two(rank), root / f"reconstruction-{rank}")
        torch.save(test_recovery.of_two(), root / f"recovery-{rank}")
    torch.distributed.destroy_process_group()


def expert_seen_by_one():
    """Sums of a model with an expert of two layers that no token of the second process reaches."""
    torch.manual_seed(0)
    gate, up, always = (torch.nn.Linear(3, 4) for _ in range(3))
    layers = [SimpleNamespace(name=n, module=m, weight=m.weight, shape=(4, 3))
              for n, m in (("gate", gate), ("up", up), ("always", always))]  # fmt: skip
    capture = FactorCapture(layers)
    x = torch.ones(5, 3, requires_grad=True) * (1 + ranks.index())
    with capture.hooked():
        y = always(x)
        if ranks.leads():
            routed = 1 * x
            y = y + gate(routed) * up(routed)
        y.sum().backward()
    capture.add_up(torch.device("cpu"))
    return {name: (m.second, m.first, m.tokens) for name, m in capture.inputs.items()} | {
        f"{name}'": (m.second, m.tokens) for name, m in capture.gradients.items()
    }


@pytest.fixture(scope="module")
def alone(place):
    return work(place, 1)


@pytest.fixture(scope="module", params=(2, 3))
def several(request, place):
    """Results of all processes."""
    processes = request.param
    forkserver()
    torch.multiprocessing.start_processes(one_of_several, (place, processes), processes, start_method="forkserver")
    return [torch.load(place / f"result-{processes}-{rank}", weights_only=False) for rank in range(processes)]


class TestStages:
    @pytest.mark.parametrize("how", ["layers", "grouped"])
    def test_factors_are_those_of_one_process(self, alone, several, how):
        for mine in several:
            for name, expected in alone["layers"].items():
                found = mine[how][name]
                assert found.tokens == expected.tokens
                for part in ("a", "mean", "g"):
                    assert_near(getattr(found, part), getattr(expected, part), 1e-6)
            for name, expected in alone["streams"].items():
                assert_near(mine["streams"][name], expected, 1e-6)

    def test_a_process_may_see_no_text(self, alone, several):
        for mine in several:
            for (layers, streams), (expected, wanted) in zip(mine["single"], alone["single"], strict=True):
                for name, factors in expected.items():
                    assert_near(layers[name].a, factors.a, 1e-6)
                    assert_near(layers[name].g, factors.g, 1e-6)
                for name, g in wanted.items():
                    assert_near(streams[name], g, 1e-6)

    def test_all_processes_end_with_the_same(self, several):
        first, *others = several
        for other in others:
            assert other["records"] == first["records"]
            assert all(torch.equal(other["layers"][n].g, factors.g) for n, factors in first["layers"].items())

    @pytest.mark.parametrize("name", RUNS)
    def test_a_run_ends_as_that_of_one_process(self, name, place, alone, several):
        processes = len(several)
        if name not in DONE[processes]:
            pytest.skip("done by the other number of processes")
        expected, record = alone["records"][name], several[0]["records"][name]
        assert record["processes"] == processes
        # A and G differ by rounding, which decides between masks that are about as good, and so on from there
        tolerance = 1e-6 if name == "diagonal" else 5e-2
        assert record["dense"]["loss"] == pytest.approx(expected["dense"]["loss"], rel=1e-6)
        for figure in ("kl_measured", "kl_predicted"):
            if figure in expected:
                assert record[figure] == pytest.approx(expected[figure], rel=tolerance), figure
        tensors = load_file(place / f"{name}-{processes}" / "model.safetensors")
        for key, wanted in load_file(place / f"{name}-1" / "model.safetensors").items():
            assert tensors[key].shape == wanted.shape
            if name == "diagonal":
                assert torch.equal(tensors[key] == 0, wanted == 0), f"{key}: other zeros"

    def test_an_expert_may_be_seen_by_one_process_alone(self, place, several):
        if len(several) != 2:
            pytest.skip("once is enough")
        first, second = loaded(place, "expert")
        assert first.keys() == second.keys() == {"gate", "up", "always", "gate'", "up'", "always'"}
        for name, sums in first.items():
            for one, other in zip(sums, second[name], strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
            assert sums[-1] == (10 if name.startswith("always") else 5)
        assert torch.equal(first["gate"][0], torch.full((3, 3), 5.0))
        assert torch.equal(first["always"][0], torch.full((3, 3), 25.0))

    def test_reconstruction_takes_the_steps_of_one(self, place, several):
        if len(several) == 2:
            test_reconstruction.check_two(loaded(place, "reconstruction"))

    def test_recovery_takes_the_steps_of_one(self, place, several):
        if len(several) == 2:
            test_recovery.check_two(loaded(place, "recovery"))


def loaded(place, name):
    """What both of two processes have left."""
    return [torch.load(place / f"{name}-{rank}", weights_only=False) for rank in (0, 1)]


def dies_or_waits(rank, root):
    begin(rank, root, 2)
    if rank == 1:
        from kfac_prune import pipeline

        pipeline.make_plan = lambda *a, **k: os._exit(9)
    run(recipe(root, "reconstruct", 2))


def test_the_others_stop_when_one_dies(place):
    processes = [forkserver().Process(target=dies_or_waits, args=(rank, place / "dies")) for rank in (0, 1)]
    (place / "dies").mkdir()
    for file in ("model", "text.txt"):
        (place / "dies" / file).symlink_to(place / file)
    for process in processes:
        process.start()
    processes[1].join(120)
    assert processes[1].exitcode == 9
    died = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode not in (None, 0), f"still waiting after {time.monotonic() - died:.0f} s"
    assert not (place / "dies" / "reconstruct-2").exists()


class TestShares:
    @pytest.fixture
    def three(self, monkeypatch):
        monkeypatch.setattr(ranks, "count", lambda: 3)
        monkeypatch.setattr(ranks, "index", lambda: 1)

    def test_items_in_turn(self, three):
        assert ranks.share("abcdefgh") == ["b", "e", "h"]

    def test_owners_are_about_equally_busy(self, three):
        costs = [float(n) ** 3 for n in range(1, 30)]
        owners = ranks.owners(costs)
        busy = [sum(c for c, o in zip(costs, owners, strict=True) if o == process) for process in range(3)]
        assert max(busy) - min(busy) < 0.02 * sum(costs)

    def test_one_process_owns_everything(self):
        assert ranks.owners([3.0, 1.0]) == [0, 0]
        assert ranks.share([1, 2]) == [1, 2]
        assert ranks.gathered("x") == ["x"]

    def test_steps_are_whole(self, three):
        from kfac_prune.reconstruction import own_steps

        windows = Windows(torch.arange(40 * 64).reshape(40, 64))
        own, size = own_steps(windows)  # one window each makes 13 steps, and one is left over
        assert (len(own), size) == (13, 1)
        assert own.input_ids[:, 0].tolist() == [64 * row for row in range(1, 39, 3)]

    def test_too_few_windows_for_the_processes(self, three):
        from kfac_prune.reconstruction import own_steps

        with pytest.raises(InputError, match=r"3 processes take 3 of the 5 per step; add --samples"):
            own_steps(Windows(torch.zeros(5, 64, dtype=torch.int64)))


class TestJoin:
    def test_another_number_than_was_asked_for(self):
        with pytest.raises(InputError, match=r"--processes is 2, and the number of processes is 1; start them by"):
            ranks.join("cpu", 2)

    def test_one_is_as_asked_for(self):
        ranks.join("cpu", 1)

    def test_a_gpu_each(self, monkeypatch):
        assert ranks.device_of_process("cuda:1") == "cuda:1"
        monkeypatch.setattr(ranks, "_several", lambda: True)
        monkeypatch.setattr(ranks, "count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert ranks.device_of_process("cuda") == "cuda:1"
        assert ranks.device_of_process("cpu") == "cpu"
        with pytest.raises(InputError, match="2 processes, which need a GPU each"):
            ranks.device_of_process("cuda:0")

    def test_through_the_launcher(self, place):
        """torchrun with the script for pipelines: it prunes, writes once, and speaks in one line."""
        out = place / "launched"
        options = ["--data", str(place / "text.txt"), "--samples", "16", "--seqlen", "16", "--eval-samples", "4"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
        command += [str(place / "model"), *options, "--method", "magnitude", "--device", "cpu", "--processes", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("saved to") == 1
        (line,) = done.stdout.splitlines()
        record = json.loads(line)
        assert (record["out"], record["processes"], record["sparsity"]) == (str(out), 2, pytest.approx(0.5, abs=1e-3))


def test_a_recipe_is_the_same_for_any_number(place):
    one, two = (dataclasses.asdict(recipe(place, "refit", n)) for n in (1, 2))
    assert {k for k in one if one[k] != two[k]} == {"out"}


def test_connections_are_closed_before_the_interpreter_ends(tmp_path):
    """Otherwise a worker thread of gloo that still holds a tensor may abort a process that has finished."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s")), rank=0, world_size=1
    )
    ranks._leave()
    assert not torch.distributed.is_initialized()
    ranks._leave()  # nothing is left to close
    ranks.wait()
