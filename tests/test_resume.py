"""Runs that are killed at any moment go on to the same bytes; files of other runs, or broken ones, are refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import forkserver
from letters import save_llama
from safetensors import safe_open

from kfac_prune import curves, permute, pipeline, resume
from kfac_prune.config import Recipe
from kfac_prune.errors import InputError
from kfac_prune.obs import THOROUGH
from kfac_prune.pipeline import run
from kfac_prune.problems import Problems
from kfac_prune.store import work_folder

KILLS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    save_llama(root / "model")
    rng = random.Random(0)
    (root / "text.txt").write_text("".join(rng.choices("abcdef ", k=4000)), encoding="utf-8")
    return root


def recipe(place, out, **fields):
    small = {"samples": 20, "eval_samples": 4, "seqlen": 16, "device": "cpu", "pattern": "2:4", "reconstruct": 2}
    return Recipe(model=str(place / "model"), data=str(place / "text.txt"), out=str(out), **{**small, **fields})


def bytes_of(out):
    """Content of all files but the record, which holds seconds."""
    varying = ("kfac_prune.json", "README.md", "recipe.yaml")
    return {file.name: file.read_bytes() for file in Path(out).iterdir() if file.name not in varying}


def stopped(made, monkeypatch, at="evaluate"):
    def stops(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, at, stops)
        with pytest.raises(KeyboardInterrupt):
            run(made)


def attempt(made):
    torch.set_num_threads(1)
    run(made)


def test_a_run_killed_at_twenty_moments_ends_in_the_same_bytes(place, tmp_path):
    context = forkserver()

    def started(made):
        process = context.Process(target=attempt, args=(made,))
        process.start()
        return process

    started(recipe(place, tmp_path / "first")).join()  # pays for the imports
    begin = time.monotonic()
    whole = started(recipe(place, tmp_path / "whole"))
    whole.join()
    seconds = time.monotonic() - begin
    assert whole.exitcode == 0
    made, killed, left, draw = recipe(place, tmp_path / "killed", resume=True), 0, set(), random.Random(1)
    while killed < KILLS:
        begin, process = time.monotonic(), started(made)
        process.join(seconds * draw.random())
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL  # or it has just ended
        else:
            assert process.exitcode == 0
            seconds = min(seconds, time.monotonic() - begin)
        left |= {file.name for file in (tmp_path / "killed.work").glob("*")}
        if (tmp_path / "killed").exists():
            assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
    assert any(name.startswith("plan-") for name in left)
    final = started(made)
    final.join()
    assert final.exitcode == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "killed.work").exists()


@pytest.mark.parametrize(
    "fields", [{}, {"refit": True, "shots": 2, "reconstruct": 0}, {"reconstruct_unit": "sublayer"}]
)
def test_neither_curvature_nor_plan_is_made_twice(fields, place, tmp_path, monkeypatch):
    run(recipe(place, tmp_path / "whole", **fields))
    made = recipe(place, tmp_path / "other", resume=True, **fields)
    calls = []
    stopped(made, monkeypatch)
    with monkeypatch.context() as patch:
        for name in ("estimate_factors", "permute_model", "make_plan"):
            patch.setattr(pipeline, name, lambda *a, name=name, **o: calls.append(name))
        run(made)
    assert calls == []
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")


def test_with_both_options_a_run_goes_on_and_replaces_an_earlier_result(place, tmp_path, monkeypatch):
    run(recipe(place, tmp_path / "whole"))
    run(recipe(place, tmp_path / "out", method="magnitude", reconstruct=0))
    earlier = bytes_of(tmp_path / "out")
    stopped(recipe(place, tmp_path / "out", overwrite=True), monkeypatch)
    assert bytes_of(tmp_path / "out") == earlier
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_plan", None)
        run(recipe(place, tmp_path / "out", overwrite=True, resume=True))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole") != earlier
    run(recipe(place, tmp_path / "out", method="magnitude", reconstruct=0, overwrite=True, resume=True))  # none is left
    assert bytes_of(tmp_path / "out") == earlier


@pytest.mark.parametrize("fields", [{"pattern": "2:4"}, {"pattern": "unstructured", "refit": True}], ids=str)
def test_the_curvature_is_not_estimated_twice(fields, place, tmp_path, monkeypatch):
    run(recipe(place, tmp_path / "whole", **fields))
    made, calls = recipe(place, tmp_path / "other", resume=True, **fields), []
    stopped(made, monkeypatch, at="make_plan")
    order = {"plan-order.safetensors"} if fields["pattern"] == "2:4" else set()
    left = {file.name for file in (tmp_path / "other.work").iterdir()}
    assert left == {"plan-curvature.safetensors"} | order
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "estimate_factors", lambda *a, **o: calls.append(a))
        run(made)
    assert calls == []
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")


def test_large_curvature_is_estimated_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "CURVATURE_BYTES", 1000)
    stopped(recipe(place, tmp_path / "out"), monkeypatch)
    assert not (tmp_path / "out.work" / "plan-curvature.safetensors").exists()


def test_layers_solved_in_an_order_of_channels_are_not_mixed_with_another_order(place, tmp_path, monkeypatch):
    run(recipe(place, tmp_path / "whole"))
    made = recipe(place, tmp_path / "other", resume=True)
    stopped(made, monkeypatch, at="make_plan")
    with monkeypatch.context() as patch:  # as curvature that other hardware rounds otherwise may make it
        patch.setattr(permute, "find_permutation", lambda scores, *a, **o: torch.arange(scores[0].shape[1]).flip(0))
        run(made)
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("fields", [{"refit": True, "shots": 1, "reconstruct": 0}, {"reconstruct_unit": "sublayer"}])
def test_factors_that_wait_off_the_device_are_not_gathered_for_a_file(fields, place, tmp_path, monkeypatch):
    fields = {**fields, "max_memory": 2e-5, "pattern": "unstructured"}
    run(recipe(place, tmp_path / "whole", **fields))
    made = recipe(place, tmp_path / "other", resume=True, **fields)
    stopped(made, monkeypatch)
    (file,) = (tmp_path / "other.work").glob("plan-all-layers.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert not [name for name in tensors.keys() if name.split()[0] in ("a", "g")]
    run(made)
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_plan_goes_on_after_its_last_layer(place, tmp_path, monkeypatch, pattern):
    run(recipe(place, tmp_path / "whole", pattern=pattern))
    made, solved, original = recipe(place, tmp_path / "other", pattern=pattern, resume=True), [], curves.solve

    def curve(weight, operator, allowed, schedule):
        solved.append(("curve", weight.shape))
        return original(weight, operator, allowed, schedule)

    def one(self, layer, allowed, schedule=THOROUGH):
        solved.append((schedule is THOROUGH, layer.name))
        if schedule is THOROUGH and layer.name == "model.layers.1.mlp.up_proj" and not again:
            raise KeyboardInterrupt
        return own(self, layer, allowed, schedule)

    again, own = False, Problems.solve
    monkeypatch.setattr(curves, "solve", curve)
    monkeypatch.setattr(Problems, "solve", one)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    first = {name for kind, name in solved if kind is True} - {"model.layers.1.mlp.up_proj"}
    assert len(first) > 5
    solved.clear()
    again = True
    run(made)
    assert not first & {name for kind, name in solved if kind is True}
    assert not any(kind == "curve" for kind, _ in solved)
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")


def test_clearing_can_be_interrupted_anywhere(place, tmp_path, monkeypatch):
    """The run before has ended, and its result is gone: what is left of its work still leads to the same bytes."""
    made, left = recipe(place, tmp_path / "out", resume=True), []

    def stops(out):
        left.extend(sorted(work_folder(out).iterdir()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "clear_work", stops)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    whole = bytes_of(made.out)
    assert left[0].name == "plan-all-layers.safetensors"
    shutil.copytree(left[0].parent, tmp_path / "copy")
    for gone in (left[:1], left[:3]):
        shutil.rmtree(made.out)
        shutil.copytree(tmp_path / "copy", left[0].parent, dirs_exist_ok=True)
        for file in gone:
            file.unlink()
        run(made)
        assert bytes_of(made.out) == whole


def test_a_plan_that_has_lost_a_layer_is_refused(place, tmp_path, monkeypatch):
    stopped(recipe(place, tmp_path / "out"), monkeypatch)
    (tmp_path / "out.work" / "plan-layer-model.layers.0.mlp.up_proj.safetensors").unlink()
    with pytest.raises(InputError, match=r"out\.work has lost layer model\.layers\.0\.mlp\.up_proj of a plan"):
        run(recipe(place, tmp_path / "out", resume=True))


SMALLER = {"pattern": "unstructured", "structured": "ffn,heads", "sparsity": 0.3, "samples": 40}


@pytest.mark.parametrize(
    "fields", [{"widths": "per-layer"}, {"widths": "uniform"}, {"shots": 2, "reconstruct": 0}], ids=str
)
def test_a_smaller_model_is_not_made_twice(fields, place, tmp_path, monkeypatch):
    run(recipe(place, tmp_path / "whole", **SMALLER, **fields))
    made, calls = recipe(place, tmp_path / "other", resume=True, **SMALLER, **fields), []
    stopped(made, monkeypatch)
    assert [file.name for file in (tmp_path / "other.work").iterdir()] == ["shrink-model.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune_structured", lambda *a, **o: calls.append(a))
        record = run(made)
    assert calls == []
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "whole")
    assert record["groups"] == json.loads((tmp_path / "whole" / "kfac_prune.json").read_text())["groups"]
    assert not (tmp_path / "other.work").exists()
    stopped(recipe(place, tmp_path / "third", **SMALLER, **fields), monkeypatch)
    with pytest.raises(InputError, match=r"shrink-model.safetensors is from another run"):
        run(recipe(place, tmp_path / "third", resume=True, **SMALLER, **fields | {"shots": 3}))


def test_a_smaller_model_that_was_cut_for_other_repairs_is_not_taken(place, tmp_path, monkeypatch):
    """Without a reconstruction several shots are tried, before one a single shot is taken."""
    fields = {**SMALLER, "structured": "ffn", "refit": True}
    stopped(recipe(place, tmp_path / "out", **fields, reconstruct=0), monkeypatch)
    with pytest.raises(InputError, match=r"shrink-model.safetensors is from another run"):
        run(recipe(place, tmp_path / "out", **fields, reconstruct=1, resume=True))
    stopped(recipe(place, tmp_path / "two", **fields, reconstruct=1), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune_structured", None)
        run(recipe(place, tmp_path / "two", **fields, reconstruct=2, resume=True))
    run(recipe(place, tmp_path / "whole", **fields, reconstruct=2))
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "whole")


class TestFiles:
    @pytest.fixture(
        params=["plan-all-layers.safetensors", "plan-layer-model.layers.0.mlp.up_proj.safetensors"],
        ids=["plan", "layer"],
    )
    def interrupted(self, place, tmp_path, monkeypatch, request):
        """A file of a plan, of a run that was stopped behind it."""
        stopped(recipe(place, tmp_path / "out"), monkeypatch)
        return tmp_path / "out.work" / request.param

    def test_truncated(self, interrupted, place, tmp_path):
        interrupted.write_bytes(interrupted.read_bytes()[:-10])
        with pytest.raises(InputError, match=rf"{interrupted.name} is broken"):
            run(recipe(place, tmp_path / "out", resume=True))

    def test_a_flipped_bit(self, interrupted, place, tmp_path):
        content = bytearray(interrupted.read_bytes())
        content[-100] ^= 1
        interrupted.write_bytes(bytes(content))
        with pytest.raises(InputError, match=rf"{interrupted.name} is broken \(its content does not have the hash"):
            run(recipe(place, tmp_path / "out", resume=True))

    @pytest.mark.parametrize("changed", [{"seed": 1}, {"samples": 21}, {"damping": 0.1}, {"pattern": "1:4"}])
    def test_of_another_run(self, interrupted, place, tmp_path, changed):
        with pytest.raises(InputError, match=r"plan-[a-z.-]+ is from another run: other model, data or options"):
            run(recipe(place, tmp_path / "out", resume=True, **changed))

    def test_without_resume_it_goes_if_it_may(self, interrupted, place, tmp_path):
        interrupted.write_bytes(b"broken")
        left = len(list(interrupted.parent.iterdir()))
        message = (
            rf"out\.work holds {left} finished parts of an interrupted run; add --resume to go on with it, or --over"
        )
        with pytest.raises(InputError, match=message):
            run(recipe(place, tmp_path / "out"))
        assert interrupted.read_bytes() == b"broken"
        run(recipe(place, tmp_path / "out", overwrite=True))
        assert not interrupted.exists()

    def test_what_is_resumed_is_told(self, interrupted, place, tmp_path):
        told = []
        run(recipe(place, tmp_path / "new", resume=True), echo=told.append)
        assert told[0].startswith("nothing to resume in ")
        told.clear()
        left = len(list(interrupted.parent.iterdir()))
        run(recipe(place, tmp_path / "out", resume=True), echo=told.append)
        assert told[0] == f"going on from {left} finished parts in {interrupted.parent}"
