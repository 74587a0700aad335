"""A network small enough for its full Fisher and Hessian: handwritten digits, one hidden layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_prune.curvature.hessian import exact_hessian
from kfac_prune.errors import InputError
from kfac_prune.operators.direct_sum import join

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """``softmax(W_2 tanh(W_1 x))`` on images of digits, and its loss. All weights are one vector w [n]; no biases.

    The loss is the mean cross-entropy over the training images plus ``½ decay ‖w‖²``, in nats per image. The decay
    makes the minimum a point and belongs to the loss, so its ``decay · I`` is a true part of the Hessian.

    Attributes:
        x: training images [N, pixels], float64, centred.
        y: their classes [N].
        x_test: images for the accuracy [M, pixels].
        y_test: their classes [M].
        hidden: number of hidden units.
        decay: of the weights, > 0.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    hidden: int
    decay: float

    @classmethod
    def digits(cls, *, images: int, hidden: int, decay: float) -> Network:
        """On scikit-learn's 1,797 images of 8 x 8 pixels; the first ``images`` are learnt, the others tested.

        Raises:
            InputError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                'the digits data are part of scikit-learn, which is not installed; pip install "kfac-prune[theory]"'
            ) from error
        data = load_digits()
        x, y = torch.from_numpy(data.data).double() / 16, torch.from_numpy(data.target).long()
        x = x - x[:images].mean(0)
        return cls(x[:images], y[:images], x[images:], y[images:], hidden, decay)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out, in) of both layers."""
        return (self.hidden, self.x.shape[1]), (CLASSES, self.hidden)

    @property
    def size(self) -> int:
        """n, the number of weights."""
        return sum(out * width for out, width in self.shapes)

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(W_1, W_2) [out, in] from w [n]."""
        (out, width), second = self.shapes
        return w[: out * width].reshape(out, width), w[out * width :].reshape(second)

    def initial(self, seed: int) -> Tensor:
        """Normal weights of variance 1/in: w [n]."""
        generator = torch.Generator().manual_seed(seed)
        layers = [torch.randn(s, generator=generator, dtype=torch.float64) / s[1] ** 0.5 for s in self.shapes]
        return join(layers)[0]

    def logits(self, w: Tensor, x: Tensor) -> Tensor:
        """[N, classes]."""
        first, second = self.split(w)
        return torch.tanh(x @ first.T) @ second.T

    def loss(self, w: Tensor) -> Tensor:
        """Scalar, nats per image."""
        cross_entropy = torch.nn.functional.cross_entropy(self.logits(w, self.x), self.y)
        return cross_entropy + 0.5 * self.decay * w.square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        """Of the loss: [n]."""
        gradient: Tensor = torch.func.grad(self.loss)(w)
        return gradient

    def hessian(self, w: Tensor) -> Tensor:
        """Of the loss, exact: [n, n]."""
        return exact_hessian(self.loss, w)

    def accuracy(self, w: Tensor) -> float:
        """Fraction of the test images in the right class."""
        return float((self.logits(w, self.x_test).argmax(1) == self.y_test).double().mean())

    def train(self, start: Tensor, iterations: int, mask: Tensor | None = None) -> Tensor:
        """Full-batch L-BFGS on the weights that the mask [n] keeps, the others fixed at zero; deterministic."""
        kept = torch.ones_like(start, dtype=torch.bool) if mask is None else mask
        free = start[kept].clone().requires_grad_(True)

        def whole() -> Tensor:
            return torch.zeros_like(start).masked_scatter(kept, free)

        optimizer = torch.optim.LBFGS(
            [free],
            max_iter=iterations,
            max_eval=2 * iterations,
            tolerance_grad=1e-10,
            tolerance_change=0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.loss(whole())
            value.backward()
            return value

        optimizer.step(closure)
        return whole().detach()


@dataclass(frozen=True)
class FisherSamples:
    """The Fisher's sum over images and classes, term by term, with exact class probabilities instead of sampled labels.

    Attributes:
        gradients: per layer [N * classes, out, in], each times ``√(p · classes)``, so that the mean of their outer
            products is the Fisher of an image.
        inputs: a per layer [N, in].
        outputs: gradients at each layer's output [N * classes, out], weighted in the same way.
    """

    gradients: tuple[Tensor, Tensor]
    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]

    @cached_property
    def dense(self) -> Tensor:
        """The Fisher over both layers [n, n], the interaction between them included; it is the GGN of the loss."""
        rows = torch.cat([g.flatten(1) for g in self.gradients], dim=1)
        return rows.T @ rows / len(rows)

    def factors(self, layer: int) -> tuple[Tensor, Tensor]:
        """(A [in, in], G [out, out]) of a layer."""
        a, g = self.inputs[layer], self.outputs[layer]
        return a.T @ a / len(a), g.T @ g / len(g)


def fisher_samples(network: Network, w: Tensor) -> FisherSamples:
    """Of the cross-entropy at w; the decay is not in it."""
    first, second = network.split(w)
    h = torch.tanh(network.x @ first.T)  # [N, hidden]
    p = (h @ second.T).softmax(1)  # [N, C]
    root = (p * CLASSES).sqrt().unsqueeze(2)
    g2 = root * (p.unsqueeze(1) - torch.eye(CLASSES, dtype=p.dtype))  # [N, label, C]
    g1 = (g2 @ second) * (1 - h.square()).unsqueeze(1)  # [N, label, hidden]
    inputs, outputs = (network.x, h), (g1.flatten(0, 1), g2.flatten(0, 1))
    gradients = [
        g.unsqueeze(2) * a.repeat_interleave(CLASSES, dim=0).unsqueeze(1) for a, g in zip(inputs, outputs, strict=True)
    ]
    return FisherSamples((gradients[0], gradients[1]), inputs, outputs)


def sampled_gradients(network: Network, w: Tensor, count: int, seed: int) -> Tensor:
    """[count, n]: gradients of the cross-entropy of some images, each with one label drawn from the network."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(network.x), generator=generator)[:count]
    p = network.logits(w, network.x[chosen]).softmax(1)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)

    def one(w: Tensor, x: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(network.logits(w, x.unsqueeze(0)), label.unsqueeze(0))

    per_image: Callable[..., Tensor] = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    return per_image(w, network.x[chosen], labels)
