"""The theory command in small, and the claims that its page makes."""

import builtins
import json
import re

import pytest
import torch
from oracles import assert_close, normal

from kfac_prune.cli import main
from kfac_prune.curvature.hessian import MAX_WEIGHTS, exact_hessian
from kfac_prune.errors import InputError
from kfac_prune.obs import surgeon
from kfac_prune.operators import DirectSum, Kronecker
from kfac_prune.theory import run
from kfac_prune.theory.network import CLASSES, Network, fisher_samples, sampled_gradients
from kfac_prune.theory.pictures import PICTURES
from kfac_prune.theory.run import Size, run_theory
from kfac_prune.theory.small import four_weights, two_weights
from kfac_prune.theory.studies import damping_study, lottery, rewound, snip_mask, spectrum
from kfac_prune.theory.sweep import NAMES, Row, Trust, curvature, sweep, sweep_with_gradient

SMALL = Size(
    images=100,
    hidden=3,
    levels=(0.5, 0.8),
    early_levels=(0.5,),
    start_levels=(0.5, 0.8),
    converged=60,
    early=8,
    retraining=10,
    shifts=(1e-4, 1e-2),
)


def toy(*, pixels=6, hidden=4, images=40, decay=1e-2):
    """Classes that a linear map of random images decides, with noise."""
    x, noise = normal(images, pixels, seed=1), normal(images, CLASSES, seed=2)
    y = (x @ normal(pixels, CLASSES, seed=3) + noise).argmax(1)
    return Network(x, y, x, y, hidden, decay)


@pytest.fixture(scope="module")
def network():
    return toy()


@pytest.fixture(scope="module")
def trained(network):
    return network.train(network.initial(0), 2000)


class TestNetwork:
    def test_training_ends_at_a_minimum(self, network, trained):
        assert float(network.gradient(trained).norm()) < 1e-7
        assert float(network.loss(trained)) < float(network.loss(network.initial(0)))

    def test_gradient_is_that_of_finite_differences(self, network):
        w, step = network.initial(1), 1e-6
        units = torch.eye(network.size, dtype=w.dtype)
        expected = [(network.loss(w + step * e) - network.loss(w - step * e)) / (2 * step) for e in units]
        assert torch.allclose(network.gradient(w), torch.stack(expected), atol=1e-8)

    def test_masked_weights_stay_zero(self, network):
        mask = normal(network.size, seed=4) > 0
        w = network.train(network.initial(0), 20, mask)
        assert not w[~mask].any()
        assert w[mask].all()

    def test_fisher_is_the_sum_over_images_and_classes(self, network):
        w = network.initial(0)
        expected = torch.zeros(network.size, network.size, dtype=torch.float64)
        for x in network.x:
            log_p = torch.func.jacrev(lambda v, x=x: network.logits(v, x[None])[0].log_softmax(0))(w)
            p = network.logits(w, x[None])[0].softmax(0)
            expected += sum(p[c] * torch.outer(log_p[c], log_p[c]) for c in range(CLASSES)) / len(network.x)
        assert_close(fisher_samples(network, w).dense, expected)

    def test_factors_are_the_second_moments(self, network):
        samples = fisher_samples(network, network.initial(0))
        a, g = samples.factors(0)
        assert_close(a, sum(torch.outer(x, x) for x in network.x) / len(network.x))
        # E[ggᵀ] E|a|² is what E[(g aᵀ)(g aᵀ)ᵀ] becomes if the two are independent; with one input they are
        one = fisher_samples(toy(images=1), toy(images=1).initial(0))
        a, g = one.factors(1)
        h = DirectSum([Kronecker(a, g)]).to_dense()
        rows = one.gradients[1].flatten(1)
        assert_close(h, rows.T @ rows / len(rows))

    def test_sampled_gradients_have_the_fisher_as_their_mean(self):
        small = toy(pixels=2, hidden=2, images=3)
        w = small.initial(0)
        draws = torch.cat([sampled_gradients(small, w, 3, seed) for seed in range(400)])
        fisher = fisher_samples(small, w).dense
        mean = draws.T @ draws / len(draws)
        spread = float((draws.square().sum(1).square().mean() / len(draws)).sqrt())  # of the mean, in Frobenius norm
        assert float(torch.linalg.matrix_norm(mean - fisher)) < 2 * spread


class TestExactHessian:
    def test_of_a_quadratic(self):
        h = normal(7, 7, seed=1)
        assert_close(exact_hessian(lambda w: 0.5 * w @ (h + h.T) @ w, normal(7, seed=2)), h + h.T)

    def test_is_the_fisher_plus_the_decay_where_every_residual_vanishes_on_average(self, network, trained):
        """With labels drawn from the network itself the second term of the Hessian has mean zero."""
        p = network.logits(trained, network.x).softmax(1)

        def expected_loss(w):
            own = -(p * network.logits(w, network.x).log_softmax(1)).sum(1).mean()
            return own + 0.5 * network.decay * w.square().sum()

        fisher = fisher_samples(network, trained).dense
        fisher = fisher + network.decay * torch.eye(network.size, dtype=fisher.dtype)
        assert_close(exact_hessian(expected_loss, trained), fisher)

    def test_too_many_weights_are_refused(self):
        with pytest.raises(InputError, match="at most 5,000"):
            exact_hessian(torch.sum, torch.ones(MAX_WEIGHTS + 1))


def test_the_four_weights_and_the_two():
    four, two = four_weights(), two_weights()
    assert (four["removed_by_magnitude"], four["removed_by_obd"]) == (1, 2)
    assert four["loss_magnitude"] == pytest.approx(0.10, rel=1e-12)
    assert four["loss_obd"] == pytest.approx(0.045, rel=1e-12)
    assert two["loss_without_move"] == pytest.approx(0.5)
    assert two["loss_compensated"] == pytest.approx(0.5 * (1 - 0.81))
    assert two["compensated"] == pytest.approx([0.0, 2.1])


@pytest.fixture(scope="module")
def rows(network, trained):
    return list(sweep(network, trained, TestSweep.levels))


class TestSweep:
    levels = (0.3, 0.5)

    def one(self, rows, **wanted):
        (row,) = [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
        return row

    def test_every_rule_at_every_level(self, rows):
        assert {row.method for row in rows} == set(NAMES)
        assert {row.sparsity for row in rows} == set(self.levels)
        assert all(row.loss > 0 and row.predicted > 0 for row in rows)

    @pytest.mark.parametrize("name", ["magnitude", "obd"])
    def test_separable_rules_move_nothing(self, rows, name):
        for level in self.levels:
            none, own = (
                self.one(rows, method=name, mask="saliency", compensation=how, sparsity=level)
                for how in ("none", "own")
            )
            assert own.loss == none.loss

    @pytest.mark.parametrize("name", NAMES)
    def test_the_full_move_is_the_best_under_the_full_curvature(self, rows, name):
        for level in self.levels:
            full = self.one(rows, method=name, mask="saliency", compensation="full", sparsity=level)
            surgeon = self.one(rows, method="exact", mask="greedy", sparsity=level)
            joint = self.one(rows, method="exact", mask="joint", compensation="own", sparsity=level)
            assert min(surgeon.predicted, joint.predicted) <= full.predicted * (1 + 1e-6)

    def test_a_small_loss_is_predicted_by_the_exact_hessian(self, network, trained):
        path = surgeon(trained, network.hessian(trained), (1,))
        assert float(path.losses[0]) == pytest.approx(
            float(network.loss(path.weights[0]) - network.loss(trained)), rel=0.05
        )

    def test_the_predicted_loss_is_that_of_the_stand_in(self, network, trained):
        samples = fisher_samples(network, trained)
        for name in NAMES:
            h = curvature(name, network, trained, samples).to_dense()
            assert float(torch.linalg.eigvalsh(h)[0]) >= network.decay * 0.99


@pytest.fixture(scope="module")
def found():
    network = toy(pixels=10, hidden=6, images=200)
    early = network.train(network.initial(0), 5)
    assert float(network.gradient(early).norm()) > 0.01
    return list(sweep_with_gradient(network, early, (0.2, 0.3)))


class TestStoppedEarly:
    """The gradient term beats the plain form in true loss, under every curvature, where the quadratic holds."""

    @pytest.mark.parametrize("name", ["obd", "kfac", "exact"])
    def test_it_beats_the_plain_form(self, found, name):
        rows = [row for row in found if isinstance(row, Row) and row.method == name]
        for level in (0.2, 0.3):
            loss = {(row.mask, row.gradient): row.loss for row in rows if row.sparsity == level}
            plain = min(loss["saliency", False], loss["saliency, damped", False])
            assert loss["saliency", True] < plain
            assert loss["saliency", True] < 0

    def test_the_newton_step_gains_half_of_what_it_predicts(self, found):
        trusts = [row for row in found if isinstance(row, Trust)]
        assert [t.method for t in trusts] == ["obd", "kfac", "exact"]
        assert all(t.true >= 0.5 * t.predicted > 0 for t in trusts)


class TestStart:
    def test_snip_keeps_the_initial_weights_with_the_largest_linear_term(self, network):
        initial = network.initial(0)
        gradient = network.gradient(initial)
        mask = snip_mask(initial, gradient, 0.7)
        scores = (initial * gradient).abs()
        assert int((~mask).sum()) == round(0.7 * network.size)
        assert scores[mask].min() >= scores[~mask].max()
        start = rewound(initial, mask)
        assert torch.equal(start[mask], initial[mask])
        assert not start[~mask].any()

    def test_rewinding_restores_the_initial_weights_exactly(self, network, monkeypatch):
        initial, starts = network.initial(0), []
        train = Network.train

        def watched(self, start, iterations, mask=None):
            starts.append((start.clone(), mask))
            return train(self, start, iterations, mask)

        monkeypatch.setattr(Network, "train", watched)
        tickets = list(lottery(network, initial, (0.3, 0.6, 0.8), 15))
        for start, mask in starts:
            assert torch.equal(start, torch.where(mask, initial, 0))
        previous = torch.ones_like(tickets[0][1])
        for level, mask in tickets:
            assert int((~mask).sum()) == round(level * network.size)
            assert not (mask & ~previous).any(), "a weight came back"
            previous = mask

    def test_the_mask_comes_from_the_trained_weights(self, network):
        initial = network.initial(0)
        ((_, mask),) = lottery(network, initial, (0.5,), 200)
        trained = network.train(initial, 200).abs()
        assert trained[mask].min() >= trained[~mask].max()


class TestDampingStudy:
    def test_a_large_shift_is_magnitude(self, network):
        early = network.train(network.initial(0), 8)
        h, found = spectrum(network, early, "early")
        assert_close(torch.tensor(found["eigenvalues"]), torch.linalg.eigvalsh(h), condition=1e9)
        study = damping_study(network, early, h, (1e-3, 1e6), 0.5)
        assert study["rows"][-1]["with_magnitude"] == 1.0
        assert study["rows"][0]["with_smallest_shift"] == 1.0
        assert study["rows"][-1]["loss_compensated"] == pytest.approx(study["rows"][-1]["loss_mask_only"], rel=1e-3)

    def test_the_start_of_training_is_refused_and_its_end_is_not(self, network, trained):
        found = spectrum(network, network.initial(0), "at the start")[1]
        assert found["negative"] > 0
        assert found["added"] is None
        assert "at the start: the Hessian's eigenvalues" in found["refused"]
        end = spectrum(network, trained, "at the end")[1]
        assert end["refused"] is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("sklearn")
    out, said = tmp_path_factory.mktemp("theory") / "out", []
    run_theory(str(out), size=SMALL, echo=said.append)
    return out, "\n".join(said)


class TestCommand:
    def test_it_writes_what_it_says(self, finished):
        out, said = finished
        assert {file.name for file in out.iterdir()} == {"index.html", "theory.json", *(f"{n}.png" for n in PICTURES)}
        assert all(file.name in said for file in out.iterdir())
        assert all((out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in PICTURES)

    def test_the_page_is_whole(self, finished):
        page = (finished[0] / "index.html").read_text(encoding="utf-8")
        assert "$" not in re.sub(r"base64,[^\"]*", "", page)
        assert page.count("data:image/png;base64,") == len(PICTURES)
        assert "http" not in re.sub(r"base64,[^\"]*", "", page), "the page needs no network"
        assert "0.10" in page
        assert "0.045" in page

    def test_the_figures_are_json_and_complete(self, finished):
        record = json.loads((finished[0] / "theory.json").read_text(), parse_constant=pytest.fail)
        assert {row["method"] for row in record["sweep"]} == set(NAMES)
        assert {row["sparsity"] for row in record["sweep"]} == set(SMALL.levels)
        assert len(record["start"]) == 6 * len(SMALL.start_levels)
        assert set(record["states"]) == {"at initialisation", "stopped early", "converged"}

    def test_a_folder_that_is_none_of_its_own_is_refused(self, tmp_path, capsys):
        (tmp_path / "mine.txt").write_text("keep me")
        assert main(["theory", "--out", str(tmp_path)]) == 2
        assert "not empty" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize(("module", "name"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
    def test_a_missing_library_is_named_before_the_work(self, tmp_path, monkeypatch, capsys, module, name):
        monkeypatch.setattr(run, "find_spec", lambda wanted: None if wanted == module else wanted)
        assert main(["theory", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"needs {name}" in error
        assert 'pip install "kfac-prune[theory]"' in error
        assert not (tmp_path / "out").exists()

    def test_the_network_names_it_too(self, monkeypatch):
        real = builtins.__import__

        def without(name, *rest):
            if name.startswith("sklearn"):
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(InputError, match="scikit-learn"):
            Network.digits(images=10, hidden=2, decay=0.1)
