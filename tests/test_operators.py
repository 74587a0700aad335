"""Every curvature keeps the contract of ``Curvature``, against its dense form."""

from contextlib import suppress

import pytest
import torch
from oracles import DTYPE_IDS, DTYPES, assert_close, dense_matrix, eye, normal, quadratic, spd

from kfac_prune import linalg
from kfac_prune.costs.work import Product, counted
from kfac_prune.curvature.capture import add_gram
from kfac_prune.linalg import (
    approximate_products,
    exact_products,
    inverse_from_cholesky,
    kth_largest,
    product,
    shifted,
)
from kfac_prune.obs import compensate
from kfac_prune.operators import (
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    DirectSum,
    EigenKronecker,
    Kronecker,
    LowRank,
    Scaled,
    ScaledIdentity,
    quadratic_loss,
)

SHAPES = [(1, 1), (1, 7), (5, 1), (7, 5), (4, 6)]
CONDITION = 1e2  # of each factor
RHO = 0.3


class CurvatureContract:
    """Supply ``make``: an operator in a dtype, and its float64 dense form, entry for entry the same numbers."""

    separable = False
    exact_shift = True
    condition = CONDITION

    def make(self, shape, dtype) -> tuple[Curvature, torch.Tensor]:
        raise NotImplementedError

    @pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
    def shape(self, request):
        return request.param

    @pytest.fixture(params=DTYPES, ids=DTYPE_IDS)
    def dtype(self, request):
        return request.param

    @pytest.fixture
    def pair(self, shape, dtype):
        return self.make(shape, dtype)

    def close_after_inversion(self, actual, expected):
        """Inverses are computed in float64 whatever the dtype, so that is where the condition number counts."""
        assert_close(actual, expected, condition=self.condition, working=torch.float64)

    def test_shape(self, pair, shape):
        assert pair[0].shape == shape

    def test_separable(self, pair):
        operator, h = pair
        assert operator.separable is self.separable
        if self.separable:
            assert torch.equal(h, torch.diag(h.diagonal()))

    def test_to_dense(self, pair, dtype):
        operator, h = pair
        assert operator.to_dense().dtype == dtype
        assert_close(operator.to_dense(), h)

    def test_apply_is_the_dense_product(self, pair, shape, dtype):
        operator, h = pair
        x = normal(*shape, seed=1, dtype=dtype)
        assert_close(operator.apply(x), (h @ x.double().reshape(-1)).reshape(shape))

    def test_apply_takes_transposed_storage(self, pair, shape, dtype):
        operator, h = pair
        x = normal(*shape[::-1], seed=1, dtype=dtype).T
        assert_close(operator.apply(x), (h @ x.double().reshape(-1)).reshape(shape))

    def test_columns_are_those_of_the_dense_form_and_symmetric(self, pair, shape, dtype):
        operator, h = pair
        matrix = dense_matrix(operator.apply, shape, dtype)
        assert_close(matrix, h)
        assert_close(matrix, matrix.T)

    def test_diagonal(self, pair, shape):
        operator, h = pair
        assert_close(operator.diagonal(), h.diagonal().reshape(shape))

    def test_inverse_diagonal(self, pair, shape, dtype):
        operator, h = pair
        assert operator.inverse_diagonal().dtype == dtype
        self.close_after_inversion(operator.inverse_diagonal(), torch.linalg.inv(h).diagonal().reshape(shape))

    def test_equilibrated_is_the_scaled_operator(self, pair, shape):
        operator, h = pair
        equilibrated, scale = operator.equilibrated()
        assert equilibrated.shape == scale.shape == shape
        s = scale.double().reshape(-1)
        assert_close(equilibrated.to_dense(), torch.diag(1 / s) @ h @ torch.diag(1 / s))

    def test_equilibrated_has_mean_diagonal_one(self, pair):
        equilibrated, _ = pair[0].equilibrated()
        assert_close(equilibrated.diagonal().mean(), 1.0)

    def test_equilibrated_weighs_the_operator_and_its_inverse_alike(self, pair):
        operator, h = pair
        equilibrated, scale = operator.equilibrated()
        ratio = scale.double().reshape(-1) ** 4 * torch.linalg.inv(h).diagonal() / h.diagonal()
        self.close_after_inversion((ratio / ratio[0]).to(scale.dtype), torch.ones_like(ratio))
        after = equilibrated.diagonal() / equilibrated.inverse_diagonal()
        assert_close(after / after[0, 0], torch.ones(operator.shape), condition=self.condition)  # of rounded entries

    def test_shifted_inverse_is_symmetric_positive_definite(self, pair, shape, dtype):
        p = dense_matrix(pair[0].shifted_inverse(RHO), shape, dtype)
        assert p.dtype == dtype
        assert_close(p, p.T)
        assert float(torch.linalg.eigvalsh(p.double())[0]) > 0

    def test_preconditioned_gives_the_step_and_h_times_it(self, pair, shape, dtype):
        operator, h = pair
        r = normal(*shape, seed=5, dtype=dtype)
        p, hp = operator.preconditioned(RHO)(r)
        condition = torch.linalg.cond(h).item() / RHO  # the difference of R and its shifted parts cancels
        assert_close(p, operator.shifted_inverse(RHO)(r), condition=condition)
        assert_close(hp, (h @ p.double().reshape(-1)).reshape(shape), condition=condition)

    def test_shifted_inverse_is_never_more_than_the_inverse(self, pair, shape, dtype):
        operator, h = pair
        p = dense_matrix(operator.shifted_inverse(RHO), shape, dtype).double()
        exact = torch.linalg.inv(h + RHO * eye(len(h)))
        if self.exact_shift:
            self.close_after_inversion(p.to(dtype), exact)
        else:
            margin = torch.linalg.eigvalsh(exact - (p + p.T) / 2)
            assert float(margin[0]) >= -1e-6 * float(exact.abs().max())

    def test_shifted_inverse_at_zero_is_the_inverse(self, pair, shape, dtype):
        operator, h = pair
        self.close_after_inversion(dense_matrix(operator.shifted_inverse(0.0), shape, dtype), torch.linalg.inv(h))

    def test_quadratic_loss(self, pair, shape, dtype):
        operator, h = pair
        change = normal(*shape, seed=2, dtype=dtype)
        loss = torch.tensor(quadratic_loss(operator, change), dtype=dtype)
        assert_close(loss, quadratic(h, change), size=len(h))
        assert quadratic_loss(operator, torch.zeros(shape, dtype=dtype)) == 0

    def test_a_change_of_the_wrong_shape_is_refused(self, dtype):
        operator, _ = self.make((4, 6), dtype)
        with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
            operator.apply(torch.ones(5, 7, dtype=dtype))


class TestScaledIdentity(CurvatureContract):
    separable = True

    def make(self, shape, dtype):
        value = torch.tensor(0.37, dtype=dtype)
        return ScaledIdentity(value, shape), value.double() * eye(shape[0] * shape[1])


class TestDiagonal(CurvatureContract):
    separable = True

    def make(self, shape, dtype):
        h = normal(*shape, seed=3).exp().to(dtype)
        return Diagonal(h), torch.diag(h.double().reshape(-1))


class TestKronecker(CurvatureContract):
    exact_shift = False
    condition = CONDITION**2

    def make(self, shape, dtype):
        a = spd(shape[1], condition=CONDITION, seed=4, dtype=dtype, largest=3.0)
        g = spd(shape[0], condition=CONDITION, seed=5, dtype=dtype, largest=0.2)
        return Kronecker(a, g), torch.kron(g.double(), a.double())

    def test_shifted_inverse_inverts_the_factors_shifted_by_the_root(self, shape, dtype):
        operator, _ = self.make(shape, dtype)
        a, g = operator.a.double(), operator.g.double()
        left, right = (torch.linalg.inv(f + RHO**0.5 * eye(len(f))) for f in (g, a))
        expected = torch.kron(left, right)
        self.close_after_inversion(dense_matrix(operator.shifted_inverse(RHO), shape, dtype), expected)

    def test_dense_form_is_the_kronecker_product_exactly(self, shape, dtype):
        operator, _ = self.make(shape, dtype)
        assert torch.equal(operator.to_dense(), torch.kron(operator.g, operator.a))


class TestKroneckerWithoutG(CurvatureContract):
    def make(self, shape, dtype):
        a = spd(shape[1], condition=CONDITION, seed=4, dtype=dtype, largest=3.0)
        blocks = [a.double()] * shape[0]
        return Kronecker(a, None, out_features=shape[0]), torch.block_diag(*blocks)


class TestDense(CurvatureContract):
    def make(self, shape, dtype):
        h = spd(shape[0] * shape[1], condition=CONDITION, seed=6, dtype=dtype)
        return Dense(h, shape), h.double()


def gradients(m, shape, *, seed, dtype=torch.float64):
    """[m, out, in] of very different sizes along the weights, as real ones are."""
    return (normal(m, *shape, seed=seed) * normal(*shape, seed=seed + 1).exp()).to(dtype)


def outer_products(g):
    """(1/m) Σ vec(g) vec(g)ᵀ, one sample after the other."""
    return sum(torch.outer(x.double().reshape(-1), x.double().reshape(-1)) for x in g) / len(g)


class TestBlockDiagonalOfRows(CurvatureContract):
    size = 3
    along = "rows"

    def spans(self, shape):
        """The positions of each block in vec(W)."""
        lines, length = (shape[0], shape[1]) if self.along == "rows" else (1, shape[0] * shape[1])
        for line in range(lines):
            for start in range(0, length, self.size):
                yield range(line * length + start, line * length + min(start + self.size, length))

    def make(self, shape, dtype):
        spans = list(self.spans(shape))
        blocks = torch.stack([spd(self.size, condition=CONDITION, seed=7 + i, dtype=dtype) for i in range(len(spans))])
        h = torch.zeros(shape[0] * shape[1], shape[0] * shape[1], dtype=torch.float64)
        for span, block in zip(spans, blocks, strict=True):
            h[span.start : span.stop, span.start : span.stop] = block[: len(span), : len(span)]
        return BlockDiagonal(blocks, shape, self.along), h

    def test_fisher_is_the_blocks_of_the_outer_products(self, shape, dtype):
        g = gradients(4, shape, seed=8, dtype=dtype)
        whole, h = outer_products(g), 0.3 * eye(shape[0] * shape[1])
        for span in self.spans(shape):
            part = slice(span.start, span.stop)
            h[part, part] += whole[part, part]
        operator = BlockDiagonal.fisher(g, self.size, 0.3, self.along)
        assert operator.blocks.dtype == dtype
        assert_close(operator.to_dense(), h)


class TestBlockDiagonalOfTheWholeMatrix(TestBlockDiagonalOfRows):
    size = 4
    along = "vec"


class TestLowRank(CurvatureContract):
    m = 3

    def make(self, shape, dtype):
        d, u = normal(*shape, seed=9).exp().to(dtype), normal(self.m, *shape, seed=10, dtype=dtype)
        return LowRank(d, u), torch.diag(d.double().reshape(-1)) + len(u) * outer_products(u)


class TestLowRankOfMoreThanFullRank(TestLowRank):
    m = 50


class TestEigenKronecker(CurvatureContract):
    def make(self, shape, dtype):
        out, width = shape
        basis_a, basis_g = (torch.linalg.qr(normal(n, n, seed=n)).Q.to(dtype) for n in (width, out))
        moments = normal(*shape, seed=11).exp().to(dtype)
        basis = torch.kron(basis_g.double(), basis_a.double())
        return EigenKronecker(basis_a, basis_g, moments), basis @ torch.diag(moments.double().reshape(-1)) @ basis.T

    def close_after_inversion(self, actual, expected):
        """The basis is orthogonal only to the rounding of its own dtype."""
        assert_close(actual, expected, condition=self.condition)


class TestScaled(CurvatureContract):
    exact_shift = False
    condition = 1e4

    def make(self, shape, dtype):
        h = spd(shape[0] * shape[1], condition=CONDITION, seed=6, dtype=dtype)
        scale = (0.3 * normal(*shape, seed=12)).exp().to(dtype)
        s = scale.double().reshape(-1)
        return Scaled(Dense(h, shape), scale), h.double() / torch.outer(s, s)

    def close_after_inversion(self, actual, expected):
        """Scaled in its own dtype."""
        assert_close(actual, expected, condition=10)

    def test_shifted_inverse_is_never_more_than_the_inverse(self, shape, dtype):
        """It need not be: the shift is the mean of a scale that varies. It is the inverse that the docstring states."""
        operator, _ = self.make(shape, dtype)
        s = operator.scale.double().reshape(-1)
        h = operator.inner.to_dense().double() + RHO * float((s**2).mean()) * eye(len(s))
        expected = torch.linalg.inv(h) * torch.outer(s, s)
        self.close_after_inversion(dense_matrix(operator.shifted_inverse(RHO), shape, dtype), expected)


class TestDirectSum(CurvatureContract):
    exact_shift = False
    condition = 1e4

    @pytest.fixture(params=[(1, 1), (1, 7), (1, 41)], ids=lambda s: f"{s[0]}x{s[1]}")
    def shape(self, request):
        return request.param

    def make(self, shape, dtype):
        if shape == (4, 6):
            shape = (1, 24)
        sizes = {1: [(1, 1)], 7: [(2, 3), (1, 1)], 24: [(4, 5), (2, 2)], 41: [(5, 7), (3, 2)]}[shape[1]]
        parts = [TestKronecker().make(sizes[0], dtype), *(TestDiagonal().make(size, dtype) for size in sizes[1:])]
        return DirectSum([part for part, _ in parts]), torch.block_diag(*(h for _, h in parts))

    def close_after_inversion(self, actual, expected):
        """An equilibrated sum is rescaled in its own dtype."""
        assert_close(actual, expected, condition=self.condition if actual.dtype == torch.float64 else 10)


def test_a_sum_of_separable_parts_is_separable():
    assert DirectSum([Diagonal(torch.ones(2, 3)), ScaledIdentity(torch.ones(()), (1, 2))]).separable
    assert not DirectSum([Diagonal(torch.ones(2, 3)), Kronecker(torch.eye(2), torch.eye(2))]).separable


class TestHierarchy:
    """Where two approximations must be the same matrix, and where theory gives an order."""

    shape = (4, 6)
    damping = 0.2

    @pytest.fixture
    def sample(self):
        return gradients(9, self.shape, seed=13)

    def test_blocks_of_one_weight_are_the_diagonal(self, sample):
        block = BlockDiagonal.fisher(sample, 1, self.damping)
        diagonal = Diagonal(sample.square().mean(0) + self.damping)
        assert_close(block.to_dense(), diagonal.to_dense())
        x = normal(*self.shape, seed=14)
        assert_close(block.shifted_inverse(RHO)(x), diagonal.shifted_inverse(RHO)(x))
        assert_close(block.inverse_diagonal(), diagonal.inverse_diagonal())

    @pytest.mark.parametrize("m", [9, 60], ids="m={}".format)
    def test_one_block_and_low_rank_are_the_dense_fisher(self, m):
        sample = gradients(m, self.shape, seed=13)
        dense = Dense(outer_products(sample) + self.damping * eye(24), self.shape)
        block = BlockDiagonal.fisher(sample, 24, self.damping, "vec")
        low = LowRank.fisher(sample, self.damping)
        condition = float(torch.linalg.cond(dense.h))
        for other in (block, low):
            assert_close(other.to_dense(), dense.h)
            assert_close(other.inverse_diagonal(), dense.inverse_diagonal(), condition=condition)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("m", [1, 3, 200], ids="m={}".format)
    def test_eigen_kronecker_is_never_farther_from_the_fisher_than_kronecker(self, m, seed):
        a, g = normal(300, 6, seed=seed), normal(300, 4, seed=seed + 10)
        a, g = a.T @ a / 300, g.T @ g / 300
        sample = gradients(m, self.shape, seed=seed + 20)
        fisher = outer_products(sample)
        corrected = EigenKronecker.fisher(a, g, sample, 0.0)
        error = torch.linalg.matrix_norm(corrected.to_dense() - fisher)
        kronecker = torch.linalg.matrix_norm(Kronecker(a, g).to_dense() - fisher)
        assert error <= kronecker * (1 + 1e-12)
        own = EigenKronecker(
            corrected.basis_a, corrected.basis_g, corrected.moments * (1 + 0.1 * normal(*self.shape, seed=3))
        )
        assert error < torch.linalg.matrix_norm(own.to_dense() - fisher)  # the best of all with these eigenvectors

    def test_eigen_kronecker_with_the_factors_eigenvalues_is_kronecker(self):
        a, g = spd(6, seed=1), spd(4, seed=2)
        (values_a, basis_a), (values_g, basis_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
        operator = EigenKronecker(basis_a, basis_g, torch.outer(values_g, values_a))
        assert_close(operator.to_dense(), torch.kron(g, a))

    def test_kronecker_and_its_correction_are_exact_for_independent_rank_one_gradients(self):
        """g aᵀ over all pairs of some g and some a: the Fisher is G ⊗ A itself."""
        vectors_a, vectors_g = normal(5, 6, seed=3), normal(7, 4, seed=4)
        sample = torch.stack([torch.outer(g, a) for g in vectors_g for a in vectors_a])
        a, g = vectors_a.T @ vectors_a / 5, vectors_g.T @ vectors_g / 7
        fisher = outer_products(sample)
        assert_close(Kronecker(a, g).to_dense(), fisher)
        assert_close(EigenKronecker.fisher(a, g, sample, 0.0).to_dense(), fisher)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Diagonal(torch.ones(3)), "1 dimensions"),
        (lambda: Diagonal(torch.ones(2, 3, 4)), "3 dimensions"),
        (lambda: Dense(torch.eye(5), (2, 3)), "needs 6 squared"),
        (lambda: Dense(torch.ones(6, 5), (2, 3)), "needs 6 squared"),
        (lambda: Kronecker(torch.ones(2, 3), torch.eye(2)), "A must be a square matrix"),
        (lambda: Kronecker(torch.eye(2), torch.ones(2, 3)), "G must be a square matrix"),
        (lambda: Kronecker(torch.ones(2), None, out_features=2), "A must be a square matrix"),
        (lambda: Kronecker(torch.eye(2), None), "out_features"),
        (lambda: BlockDiagonal(torch.ones(3, 2, 2), (2, 3)), "need 4 blocks of 2 x 2"),
        (lambda: LowRank(torch.ones(2, 3), torch.ones(4, 3, 2)), r"needs \[m, out, in\]"),
        (lambda: EigenKronecker(torch.eye(2), torch.eye(2), torch.ones(2, 3)), "U_A is"),
        (lambda: Scaled(Diagonal(torch.ones(2, 3)), torch.ones(3, 2)), "the scale is"),
        (lambda: DirectSum([]), "at least one"),
    ],
    ids=[
        "diagonal-1d",
        "diagonal-3d",
        "dense-size",
        "dense-rectangular",
        "a-rect",
        "g-rect",
        "a-1d",
        "no-rows",
        "blocks",
        "low",
        "eigen",
        "scale",
        "none",
    ],
)
def test_wrong_shapes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_indefinite_matrix_has_no_inverse():
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_from_cholesky(torch.diag(torch.tensor([1.0, -1.0])))


def test_shifted_leaves_its_argument_alone():
    matrix = spd(3)
    before = matrix.clone()
    assert_close(shifted(matrix, 0.5), before + 0.5 * torch.eye(3))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("k", [1, 2, 6], ids="k={}".format)
def test_kth_largest(k):
    values = torch.tensor([[3.0, -1.0], [7.0, 3.0], [0.0, 2.0]]).T
    assert float(kth_largest(values, k)) == sorted([3.0, -1.0, 7.0, 3.0, 0.0, 2.0], reverse=True)[k - 1]


def test_approximate_products_end_with_their_block():
    a, b = normal(64, 48, seed=0, dtype=torch.float32), normal(48, 64, seed=1, dtype=torch.float32)
    exact, before = a @ b, torch.get_float32_matmul_precision()
    with suppress(ZeroDivisionError), approximate_products():
        error = float((a @ b - exact).norm() / exact.norm())
        raise ZeroDivisionError
    assert error <= 2**-7  # two factors of bfloat16; zero where the device has no units for it
    assert torch.equal(a @ b, exact)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("rounds", [False, True])
def test_product_rounds_large_factors_of_float32_alone_and_only_within_the_block(monkeypatch, rounds):
    monkeypatch.setattr(linalg, "bfloat16_units", lambda: "vector" if rounds else None)
    monkeypatch.setattr(linalg, "WORTH_ROUNDING", 64 * 48 * 32)
    a, b = normal(64, 48, seed=0, dtype=torch.float32), normal(48, 32, seed=1, dtype=torch.float32)
    exact = a @ b
    with suppress(ZeroDivisionError), approximate_products():
        found = product(a, b)
        assert found.dtype == torch.float32
        error = float((found - exact).norm() / exact.norm())
        assert error <= 2**-7  # two factors and a result of bfloat16
        assert not rounds or error > 2**-12
        assert torch.equal(product(a[:63], b), a[:63] @ b)
        assert torch.equal(product(a.double(), b.double()), a.double() @ b.double())
        with counted() as work:  # whatever this CPU has, on the meta device nothing is rounded
            product(a.to("meta"), b.to("meta"))
        assert [kind.precision for kind in work.counts if isinstance(kind, Product)] == ["approximate"]
        raise ZeroDivisionError
    assert torch.equal(product(a, b), exact)


def units_of(precision):
    """What torch multiplies float32 with on a GPU and on a CPU, after its own switch is set."""
    torch.set_float32_matmul_precision(precision)
    return [switch.fp32_precision for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.fixture
def precision():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("products", [approximate_products, exact_products])
def test_an_inherited_precision_stays_inherited(products, precision):
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    for switch in switches:
        switch.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    with products():
        assert {switch.fp32_precision for switch in switches} != {"none"}
    assert [switch.fp32_precision for switch in switches] == ["tf32"] * 2
    torch.backends.fp32_precision = "ieee"
    assert [switch.fp32_precision for switch in switches] == ["ieee"] * 2


@pytest.mark.parametrize("products", [approximate_products, exact_products])
@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_a_precision_that_was_set_comes_back(name, products, precision):
    before = units_of(name)
    with products():
        pass
    assert [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision] == before
    assert torch.get_float32_matmul_precision() == name


def test_exact_products_are_so_within_approximate_ones(monkeypatch):
    monkeypatch.setattr(linalg, "bfloat16_units", lambda: "vector")
    monkeypatch.setattr(linalg, "WORTH_ROUNDING", 0)
    a, b = normal(64, 48, seed=0, dtype=torch.float32), normal(48, 32, seed=1, dtype=torch.float32)
    exact = a @ b
    with approximate_products():
        with exact_products():
            assert torch.equal(product(a, b), exact)
        assert not torch.equal(product(a, b), exact)


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_sums_and_told_losses_are_exact_whatever_the_process_has_set(name, precision, monkeypatch):
    """Told by the switches, too, which a CPU without such units does not follow."""
    seen, before = [], units_of(name)

    def watched(function):
        def call(*arguments):
            switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            seen.append([switch.fp32_precision for switch in switches])
            return function(*arguments)

        return call

    w, change = normal(300, 64, seed=0, dtype=torch.float32) + 3, normal(64, 64, seed=1, dtype=torch.float32)
    total = torch.zeros(64, 64)
    add_gram(total, w)
    assert_close(total, w.double().T @ w.double(), size=300)
    h = Kronecker(total, total)
    monkeypatch.setattr(Kronecker, "apply", watched(Kronecker.apply))
    loss = quadratic_loss(h, change)
    assert loss == pytest.approx(quadratic_loss(Kronecker(h.a.double(), h.g.double()), change.double()), rel=1e-5)
    compensate(change, h, change > 0, tolerance=1e-12, max_iterations=3)
    assert len(seen) == 2 + 1 + 3
    assert all(switch == ["ieee"] * 2 for switch in seen)
    assert [switch.fp32_precision for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)] == before
