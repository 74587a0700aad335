"""The GPU benchmark runs everywhere at toy sizes, and says so where no GPU is."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from kernels_harness import ROOT

from kfac_prune import backend, reference


def run(*arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "rows")
    assert done.returncode == 1
    assert "no GPU is visible" in done.stderr
    assert not (tmp_path / "rows").exists()


def test_tiny_run_writes_every_row(tmp_path):
    done = run("--out", tmp_path / "rows", "--tiny")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["what"] for row in rows} == {
        *(
            "floor",
            "kth_largest",
            "kth_largest_dual",
            "block_sweep",
            "admm_tail",
            "admm_tail_nm",
            "pcg_step",
            "covariance",
            "cholesky",
            "admm",
            "pcg",
            "sweep, mostly launches",
        ),
        *("model curvature", "model prune"),
    }
    assert all(row["device"] == "cpu" for row in rows)
    assert all(row["repeatable"] and row["went_on"] for row in rows if row["what"] == "pcg_step")
    assert all(row["relative_error"] < 1e-3 for row in rows if "relative_error" in row)
    exact = [row for row in rows if "mask_differs" in row and "pattern" not in row]  # the twin is the kernel here
    assert {row["what"] for row in exact} == {"admm_tail", "admm_tail_nm", "block_sweep"}
    assert all(row["mask_differs"] == row["relative_error"] == row.get("churn_differs", 0) == 0 for row in exact)
    code = "import json, sys; from performance_table import gpu_table; print(gpu_table(json.loads(sys.stdin.read())))"
    path = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", code]
    table = subprocess.run(command, input=json.dumps(rows), env=path, capture_output=True, text=True, check=True).stdout
    told = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert told == ["what", *(row["what"] for row in rows)]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark_gpu")


@pytest.mark.parametrize("fault", ["mask", "dual", "churn"])
def test_a_kernel_that_is_wrong_is_seen(fault, script, monkeypatch):
    def wrong(x, dual, mask, z, n, m, rho):
        churn = reference.admm_tail_nm(x, before := dual.clone(), mask, z, n, m, rho)
        if fault == "mask":
            mask.logical_not_()
        if fault != "dual":
            dual.copy_(before)
        return churn + (fault == "churn")

    generator = torch.Generator().manual_seed(0)
    x, dual = (torch.randn(8, 12, generator=generator) for _ in range(2))
    given = (x, dual, x > 0, torch.empty_like(x), 2, 4, 0.5)
    right = script.disagreement("admm_tail_nm", given, (1, 2, 3))
    assert set(right.values()) == {0.0}
    monkeypatch.setattr(backend, "admm_tail_nm", wrong)
    found = script.disagreement("admm_tail_nm", given, (1, 2, 3))
    name = {"mask": "mask_differs", "dual": "relative_error", "churn": "churn_differs"}[fault]
    assert {key for key, value in found.items() if value > 0} == {name}


def test_what_fails_is_a_row_and_the_rest_goes_on(script, tmp_path):
    bench = script.Bench(tmp_path / "rows", "cpu", 100)

    def fails():
        raise RuntimeError("out of registers")

    bench.attempt("first", fails)
    bench.stage("second", lambda: None)
    first, second = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert (first["what"], first["error"]) == ("first", "RuntimeError: out of registers")
    assert second["what"] == "second"
    assert bench.failed == ["first"]


def test_set_up_that_fails_costs_no_other_row(script, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(reference, "kth_largest_dual", fails)
    bench = script.Bench(tmp_path / "rows", "cpu", 100, "abc")
    script.kernels(bench, 64, float("nan"))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["what"]: "error" in row for row in rows} == {
        "kth_largest": False,
        "kth_largest_dual": True,
        "admm_tail": True,
        "admm_tail_nm": False,
        "block_sweep": False,
    }
    assert all(row["commit"] == "abc" and {"triton", "cuda", "driver"} <= set(row["versions"]) for row in rows)
    assert all(row["floor_ms"] is None for row in rows if "error" not in row)


def test_table_tells_devices_apart_and_keeps_the_latest(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    table = importlib.import_module("performance_table")
    row = {"what": "pcg_step", "n": 64, "ms": 1.0, "relative_error": 1e-6, "device": "one"}
    again, other = row | {"ms": 2.0, "relative_error": 2e-6}, row | {"device": "two", "ms": 3.0}
    told = table.gpu_table([row, other, again, row | {"n": 128, "ms": 4.0}, {"what": "x", "error": "e", "device": "d"}])
    one, two = told.split("\n\ntwo:\n")
    assert one.startswith("one:\n")
    assert [line.split("|")[3].strip() for line in one.splitlines()[4:]] == ["2", "4"]
    assert [line.split("|")[3].strip() for line in two.splitlines()[3:]] == ["3"]
