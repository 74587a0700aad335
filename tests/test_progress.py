"""Progress of long work where there is no terminal."""

import sys
import time

import pytest

from kfac_prune import progress as module
from kfac_prune.progress import progress


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)


def test_lines_where_there_is_no_terminal(quick, capsys):
    for _ in progress(range(5), desc="outer", unit="layer"):
        for _ in progress(range(2), desc="inner", unit="step"):
            time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("outer: ") and "/5 [" in line and "layer" in line for line in lines)
    assert any(line.startswith("inner: ") for line in lines)
    assert all(line.strip() and line.isprintable() for line in lines)


def test_short_work_prints_nothing(capsys):
    for _ in progress(range(100), desc="short"):
        pass
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(2), desc="bar"):
        pass
    assert "\rbar: 100%" in capsys.readouterr().err


def test_nothing_where_it_is_not_wanted(quick, capsys):
    for _ in progress(range(5), disable=True):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""
