"""Quality on really trained models and real text, where the reference folder is at hand.

Every bound is below what the best published one-shot method with a valid mask (ALPS) reaches on the same data.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows, read_documents, token_stream
from kfac_prune.loading import context_length, load_model, load_tokenizer
from kfac_prune.models import prunable_layers
from kfac_prune.obs import NM
from kfac_prune.plan import make_plan, prune

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference models and texts (../shared/reference) are not on this machine"
)

STORIES = ("tinystories_train.txt", "tinystories_test.json", "\n\n")
#: model -> training text, test text, separator; greatest increase of the test loss, nats per token, by level
MODELS = {
    "chargpt-shakespeare-gpt2": (("shakespeare_train.txt", "shakespeare_test.txt", None), {0.5: 0.058, "2:4": 0.12}),
    "stories260K": (STORIES, {0.5: 0.60, "2:4": 1.45}),
    "babyllama-tok361": (STORIES, {"2:4": 0.25}),
}


class Bench:
    """One model with its factors and test windows; measures the increase of the test loss that a plan costs."""

    def __init__(self, name):
        train, test, separator = MODELS[name][0]
        folder, text = str(REFERENCE / "models" / name), REFERENCE / "text"
        tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, dtype="float32")
        length = min(context_length(self.model), 256)
        stream = token_stream(tokenizer, read_documents(str(text / train), separator=separator))
        torch.manual_seed(0)
        starts = torch.randint(0, len(stream) - length, (128,))
        calibration = Windows(torch.stack([stream[s : s + length] for s in starts]))
        held_out = token_stream(tokenizer, read_documents(str(text / test)))
        self.test = held_out[: 200 * length].view(200, length)
        self.layers = prunable_layers(self.model)
        self.factors = estimate_factors(self.model, self.layers, calibration, batch_size=8)
        self.dense_loss = self.loss()

    @torch.inference_mode()
    def loss(self):
        parts = [
            cross_entropy(self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for ids in self.test.split(8)
        ]
        return float(torch.stack(parts).double().mean())

    @cache  # noqa: B019  # a bench lives as long as its module's tests
    def increase(self, level, method="kfac"):
        groups = {"pattern": NM(*map(int, level.split(":")))} if isinstance(level, str) else {"sparsity": level}
        allocation = "curves" if method == "kfac" else "uniform"
        plan = make_plan(self.layers, self.factors, method=method, allocation=allocation, **groups)
        assert plan.sparsity == pytest.approx(0.5, abs=1e-3)
        dense = prune(self.layers, plan)
        try:
            return self.loss() - self.dense_loss
        finally:
            dense.restore()


@pytest.fixture(scope="module", params=MODELS)
def bench(request):
    return request.param, Bench(request.param)


def test_loss_increase_is_within_its_bound(bench):
    name, measured = bench
    for level, bound in MODELS[name][1].items():
        increase = measured.increase(level)
        print(f"{name} {level}: {increase:.4f} of {bound}")
        assert 0 < increase <= bound, f"{name} at {level}: {increase:.4f}, the bound is {bound}"


def test_curvature_pays(bench):
    """At 2:4, where every method has the same sparsity in every layer."""
    name, measured = bench
    increase = {method: measured.increase("2:4", method) for method in ("kfac", "layerwise", "magnitude")}
    print(name, {method: round(value, 4) for method, value in increase.items()})
    assert increase["kfac"] < increase["layerwise"] < increase["magnitude"], increase
