import json

import pytest
from transformers import AutoModelForCausalLM

from kfac_prune import demo
from kfac_prune.cli import main
from kfac_prune.obs import NM


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo at its last level alone, on fewer windows; the folder and what was said."""
    out, said = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "LEVELS", {"2:4": NM(2, 4)})
        patch.setattr(demo, "WINDOWS", 64)
        patch.setattr(demo, "HELD_OUT", 24)
        demo.run_demo(str(out), echo=said.append)
    return out, said


def test_kfac_loses_least_and_magnitude_most(finished):
    out, _ = finished
    record = json.loads((out / "demo.json").read_text())
    loss = {row["method"]: row["loss"] for row in record["rows"]}
    assert record["dense"]["loss"] < loss["kfac"] < loss["layerwise"] < loss["magnitude"]
    for row in record["rows"]:
        assert row["sparsity"] == pytest.approx(0.5)
        assert 0 < row["kl_predicted"] < 10
        assert 0 < row["kl_measured"] < 10


def test_the_saved_model_is_the_last_one(finished):
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "kfac-2-4")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert NM(2, 4).is_valid(module.weight != 0)
            assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_it_tells_what_it_wrote(finished):
    out, said = finished
    text = "\n".join(said)
    for file in out.iterdir():
        assert file.name in text
    assert "KL predicted" in text
    assert (out / "loss_vs_sparsity.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_that_is_no_demo_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
