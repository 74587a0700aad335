"""SNIP, lottery tickets and soft pruning: their choices against oracles, and that what they rewind is exactly there."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from kfac_prune.baselines import apply_masks, lottery_ticket, masked_training, snip, soft_pruning
from kfac_prune.errors import InputError


def network(seed=0):
    """Two layers with a batch norm between: parameters of one and two dimensions, and buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(count=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def training(module, steps=30, optimizer=torch.optim.AdamW):
    """A callable that trains a module, with momentum and weight decay."""

    def train():
        made = optimizer(module.parameters(), lr=0.05)
        for _ in range(steps):
            x, y = batch()
            made.zero_grad()
            cross_entropy(module(x), y).backward()
            made.step()

    return train


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class TestSnip:
    def test_keeps_what_a_gate_on_every_weight_says(self):
        """Sensitivities by finite differences of gates c, one at a time, in float64."""
        module = network().double().eval()
        x, y = batch()
        x = x.double()
        masks = snip(module, lambda: cross_entropy(module(x), y), 0.6)
        found = {}
        with torch.no_grad():
            for name in ("0.weight", "3.weight"):
                weight = module.get_parameter(name)
                for q in range(weight.numel()):
                    value, losses = float(weight.view(-1)[q]), []
                    for gate in (1 + 1e-6, 1 - 1e-6):
                        weight.view(-1)[q] = value * gate
                        losses.append(float(cross_entropy(module(x), y)))
                    weight.view(-1)[q] = value
                    found[name, q] = abs(losses[0] - losses[1]) / 2e-6
        most = sorted(found, key=found.get, reverse=True)[: round(0.4 * len(found))]
        assert {(n, q) for n, mask in masks.items() for q in mask.flatten().nonzero().flatten().tolist()} == set(most)

    @pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
    def test_changes_nothing(self, sparsity):
        module = network().train()  # its batch norm moves its statistics with every pass
        before = state(module)
        x, y = batch()
        masks = snip(module, lambda: cross_entropy(module(x), y), sparsity)
        assert same(before, state(module))
        assert all(p.grad is None for p in module.parameters())
        assert masks.keys() == {"0.weight", "3.weight"}
        assert kept(masks) == pytest.approx(1 - sparsity, abs=1 / 72)

    @pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
    def test_a_loss_that_says_nothing_is_refused(self, factor):
        module = network()
        x, _ = batch()
        with pytest.raises(InputError, match="check the loss and the batch"):
            snip(module, lambda: factor * module(x).sum(), 0.5)


class TestLottery:
    @pytest.mark.parametrize("together", [True, False])
    @pytest.mark.parametrize("rounds", [1, 3])
    def test_the_ticket_is_exactly_the_initialisation(self, rounds, together):
        module = network()
        before, train, trained = state(module), training(module), []

        def watched():
            trained.append(state(module))
            train()

        masks = lottery_ticket(module, watched, 0.7, rounds=rounds, together=together)
        assert len(trained) == rounds
        assert same(before, trained[0])
        for name, value in state(module).items():
            mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value[mask], before[name][mask])
            assert not value[~mask].any()
        assert kept(masks) == pytest.approx(0.3, abs=1 / 48)
        if not together:
            assert all(float(mask.float().mean()) == pytest.approx(0.3, abs=0.03) for mask in masks.values())

    def test_every_round_removes_the_same_share_of_the_smallest(self):
        module = network()
        train, begun, ended = training(module), [], []

        def watched():
            begun.append({n: t.clone() for n, t in state(module).items() if t.ndim > 1})
            train()
            ended.append({n: t.clone() for n, t in state(module).items() if t.ndim > 1})

        masks = lottery_ticket(module, watched, 0.784, rounds=3)  # 1 - 0.6³
        alive = [sum(int((t != 0).sum()) for t in weights.values()) for weights in begun]
        assert alive == [72, 43, 26]
        assert sum(int(mask.sum()) for mask in masks.values()) == 16
        following = [*[{n: t != 0 for n, t in weights.items()} for weights in begun[1:]], masks]
        for before, after, stay in zip(begun, ended, following, strict=True):
            candidates = torch.cat([after[n][before[n] != 0].abs() for n in after])
            chosen = torch.cat([stay[n][before[n] != 0] for n in after])
            assert float(candidates[chosen].min()) >= float(candidates[~chosen].max())

    def test_training_that_moves_pruned_weights_is_refused(self):
        module = network()

        def train():
            with torch.no_grad():
                for layer in (module[0], module[3]):
                    layer.weight.add_(1.0)

        with pytest.raises(InputError, match=r"training changed pruned weights of \d\.weight; make the optimizer"):
            lottery_ticket(module, train, 0.5, rounds=2)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_training_keeps_zeros_and_trains_the_rest(optimizer):
    module = network()
    masks = {"0.weight": torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5}
    before = state(module)
    with masked_training(module, masks):
        training(module, optimizer=optimizer)()
    after = state(module)
    assert not after["0.weight"][~masks["0.weight"]].any()
    assert (after["0.weight"] != before["0.weight"])[masks["0.weight"]].all()
    assert not module[0].weight._backward_hooks
    training(module, steps=1, optimizer=torch.optim.SGD)()
    assert module[0].weight[~masks["0.weight"]].any()  # free again


class TestSoft:
    def test_keeps_what_the_lasso_keeps(self):
        """Two features that share their work: the least-squares weights are both larger than the third's, which the
        lasso prefers. Its solution comes from proximal steps, which are no part of the library."""
        generator = torch.Generator().manual_seed(3)
        signal, noise = torch.randn(400, 1, generator=generator), torch.randn(400, 3, generator=generator)
        x = torch.cat([signal + 0.05 * noise[:, :1], signal + 0.05 * noise[:, 1:2], noise[:, 2:]], 1).double()
        y = x @ torch.tensor([[2.0], [-1.2], [0.5]], dtype=torch.float64)
        strength, module = 0.2, nn.Linear(3, 1, bias=False).double()
        lasso, step = torch.zeros(3, 1, dtype=torch.float64), 0.1
        for _ in range(5000):
            lasso = lasso - step * 2 * x.T @ (x @ lasso - y) / len(x)
            lasso = lasso.sign() * (lasso.abs() - step * strength).clamp_min(0)

        def train(penalty):
            for number in range(2000):
                loss = mse_loss(module(x), y) + penalty()
                (gradient,) = torch.autograd.grad(loss, module.weight)
                with torch.no_grad():
                    module.weight -= 0.2 / (1 + number / 150) * gradient

        masks = soft_pruning(module, train, 1 / 3, strength=strength)
        torch.testing.assert_close(module.weight.detach().T, lasso, atol=0.02, rtol=0)
        assert masks["weight"].flatten().tolist() == (lasso.flatten() != 0).tolist() == [True, False, True]
        with torch.no_grad():
            module.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
        plain = soft_pruning(module, lambda penalty: penalty(), 1 / 3, strength=0.0)
        assert plain["weight"].flatten().tolist() == [True, True, False]

    def test_masks_are_applied_apart(self):
        module = network()
        masks = soft_pruning(module, lambda penalty: training(module)(), 0.5, strength=1e-3)
        assert kept(masks) == 0.5
        assert all((module.get_parameter(name) != 0).all() for name in masks)
        apply_masks(module, masks)
        assert all(torch.equal(module.get_parameter(name) != 0, mask) for name, mask in masks.items())
