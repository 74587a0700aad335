"""Every curvature keeps the contract of ``Curvature``, against its dense form."""

import pytest
import torch
from oracles import DTYPE_IDS, DTYPES, assert_close, dense_matrix, eye, normal, quadratic, spd

from kfac_prune.linalg import inverse_from_cholesky, kth_largest, shifted
from kfac_prune.operators import Curvature, Dense, Diagonal, Kronecker, ScaledIdentity, quadratic_loss

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
    ],
    ids=["diagonal-1d", "diagonal-3d", "dense-size", "dense-rectangular", "a-rect", "g-rect", "a-1d", "no-rows"],
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
