"""Models whose code comes with their checkpoint."""

import json
import random
import sys

import pytest
from letters import save_llama
from transformers import AutoModelForCausalLM

from kfac_prune.config import Recipe
from kfac_prune.errors import InputError
from kfac_prune.pipeline import run
from kfac_prune.structure import prune

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of a model whose code lies beside its weights; imports of the code end with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    save_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdef ", k=4000)), encoding="utf-8")

    def make(**fields):
        small = {"samples": 20, "eval_samples": 4, "seqlen": 16, "device": "cpu", "reconstruct": 0, "refit": False}
        paths = {"model": str(folder), "data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out")}
        return Recipe(**{**paths, **small, "trust_remote_code": True, **fields})

    yield make
    for module in [m for m in sys.modules if m.startswith("transformers_modules")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    "fields",
    [{"pattern": "2:4"}, {"structured": "ffn", "widths": "uniform"}, {"structured": "ffn", "sparsity": 0.3}],
    ids=["sparse", "uniform", "either"],
)
def test_the_result_is_loaded_with_the_same_code(recipe, tmp_path, fields):
    told = []
    record = run(recipe(**fields), echo=told.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for name in ("configuration_own.py", "modeling_own.py"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "model" / name).read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)' in card
    assert "widths of their own" not in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    if "structured" in fields:
        assert loaded.num_parameters() == record["parameters"]["pruned"] < record["parameters"]["dense"]
    plans = [line for line in told if "no per-layer plan: the code of OwnForCausalLM is not in transformers" in line]
    assert len(plans) == ("structured" in fields and "widths" not in fields)


def test_widths_per_layer_are_refused_before_any_work(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "estimate_factors", None)
    with pytest.raises(InputError, match=r"no per-layer plan: the code of OwnForCausalLM .* use --widths uniform"):
        run(recipe(structured="ffn", widths="per-layer"))
    with pytest.raises(InputError, match=r"--target-latency cannot time blocks: the code of Own.*; use --sparsity or"):
        run(recipe(structured="ffn", target_latency=1e-3))
    assert not (tmp_path / "out").exists()
