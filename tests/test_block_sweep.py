"""The block sweep: the twin against algebra, the kernel against the twin, SparseGPT by either."""

import pytest
import torch
from kernels_harness import assert_equal, assert_fits, compile_kernels, interpret, needs_gpu, run_python
from oracles import assert_close, normal, spd

from kfac_prune import backend, reference
from kfac_prune.baselines.sparsegpt import sweep_by_leaves, sweep_fused
from kfac_prune.linalg import inverse_upper_cholesky
from kfac_prune.obs import NM, Unstructured

NAN = float("nan")
#: Registers a thread by alignment: 80 let a multiprocessor hold three programs of eight warps, 128 two.
REGISTERS = {True: 80, False: 128}
EXTRA = [{"rows": 4, "num_warps": 1}]
#: (rows, columns of W, first column, columns of the block)
BLOCKS = [(1, 1, 0, 1), (19, 70, 32, 38), (33, 131, 0, 128), (0, 5, 0, 5), (5, 9, 0, 0)]
FORMS = ["bits", "none", "all", "2:4", "3:7", "5:24"]
CASES = [(block, form) for block in BLOCKS for form in FORMS if block[3] < 128 or form not in ("none", "all")]


def make_case(block, form):
    """Arguments of block_sweep; what it overwrites is poisoned."""
    rows, columns, start, width = block
    weight = normal(rows, columns, seed=rows, dtype=torch.float32)
    u = inverse_upper_cholesky(spd(columns, condition=30.0, seed=columns).float()).contiguous()
    u += torch.ones(columns, columns).tril(-1) * 7  # what lies below the diagonal is not read
    error, kept = torch.full((width, rows), NAN), torch.ones(width, rows, dtype=torch.bool)
    if form in ("bits", "none", "all"):
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) < {"none": 0, "all": 2}.get(
            form, 0.5
        )
        return weight, u, error, kept, start, reference.pack_bits(mask), 0, 0
    n, m = map(int, form.split(":"))
    return weight, u, error, kept, start, None, n, m


def outcome(function, arguments, device="cpu"):
    """W, error and mask after a call on copies."""
    copies = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    function(*copies)
    return [copies[i].cpu() for i in (0, 2, 3)]


def test_packed_bits_are_the_columns_of_a_mask():
    mask = torch.rand(3, 70) < 0.5
    mask[:, 31] = True  # the sign bit
    words = reference.pack_bits(mask)
    assert words.shape == (3, 3)
    assert [[bool(int(words[r, c // 32]) >> (c % 32) & 1) for c in range(70)] for r in range(3)] == mask.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_twin_eliminates_one_column_after_another(form):
    """With the inverse Hessian eliminated step by step, as the paper writes it, in float64."""
    rows, columns = 6, 40
    arguments = make_case((rows, columns, 0, columns), form)
    h = spd(columns, condition=30.0, seed=columns)
    x, error, kept = outcome(reference.block_sweep, arguments)
    w, inverse = arguments[0].double(), torch.linalg.inv(h)
    for j in range(columns):
        step = torch.where(kept[j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= torch.outer(step, inverse[0])
        w[~kept[j], j] = 0
        assert_close(error[j], step * inverse[0, 0].sqrt(), condition=300.0, size=columns)
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    assert_close(x, w, condition=300.0)
    if ":" in form:
        n, m = map(int, form.split(":"))
        assert [int(g.sum(0).max()) for g in kept.split(m)] == [min(n, len(g)) for g in kept.split(m)]


REFUSED = {
    "strides": ({0: torch.ones(3, 2).T}, r"weight has strides \(1, 2\)"),
    "u": ({1: torch.ones(2, 2)}, r"u is torch.float32 \(2, 2\) on cpu; block_sweep needs torch.float32 \(3, 3\)"),
    "kept": ({3: torch.ones(3, 2)}, r"kept is torch.float32"),
    "start": ({4: 1}, r"the block is columns 1 to 4; .* at most 128 of the 3"),
    "two": ({6: 2, 7: 4}, "either bits or n:m"),
    "neither": ({5: None}, "either bits or n:m"),
    "group": ({5: None, 6: 2, 7: 64}, "2:64; block_sweep takes groups of at most 32"),
    "n": ({5: None, 6: 4, 7: 4}, "4:4; block_sweep needs 1 <= n < m"),
    "bits": ({5: torch.ones(2, 2, dtype=torch.int32)}, r"bits is .* \(2, 2\) .*needs torch.int32 \(2, 1\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked(changes, message):
    arguments = list(make_case((2, 3, 0, 3), "bits"))
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        reference.block_sweep(*arguments)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = [("block_sweep", make_case(*case), EXTRA if case[0][0] == 19 else []) for case in CASES]
    apart = list(make_case((5, 12, 0, 12), "3:7"))
    apart[0] = normal(5, 19, seed=1, dtype=torch.float32)[:, 3:15]
    strided = [torch.ones(3, 2).T, *make_case((2, 3, 0, 3), "bits")[1:]]
    calls += [("block_sweep", apart, []), ("block_sweep", strided, [])]
    *results, with_gaps, refusal = interpret(tmp_path_factory.mktemp("interpreted"), "block_sweep", calls)
    return dict(zip(CASES, results, strict=True)), (apart, with_gaps), refusal


def test_kernel_equals_the_twin(interpreted):
    results, (apart, with_gaps), _ = interpreted
    for arguments, runs, case in [
        *((make_case(*case), results[case], case) for case in CASES),
        (apart, with_gaps, "gaps"),
    ]:
        expected = outcome(reference.block_sweep, arguments)
        assert runs
        for after, _, margins_intact in runs:
            for name, found, wanted in zip(
                ("weight", "error", "kept"), [after[i] for i in (0, 2, 3)], expected, strict=True
            ):
                assert_equal(found, wanted, f"{case} {name}")
            assert margins_intact


def test_kernel_refuses_strides(interpreted):
    assert interpreted[2][0].startswith("weight has strides (1, 2)")


FAR_APART = """
import sys
import torch
from kfac_prune import reference
from kfac_prune_kernels.block_sweep import block_sweep

rows = torch.from_file(sys.argv[1], shared=True, size=3 * (2**31 + 8), dtype=torch.float32)
weight = rows.view(3, -1)[:, :5]
weight.copy_(torch.arange(15).view(3, 5))
small = weight.contiguous()
u = torch.eye(5) + torch.ones(5, 5).triu(1) / 4
for function, w in ((block_sweep, weight), (reference.block_sweep, small)):
    error, kept = torch.empty(5, 3), torch.empty(5, 3, dtype=torch.bool)
    function(w, u, error, kept, 0, None, 2, 4)
assert torch.equal(weight, small)
"""


def test_rows_may_lie_further_apart_than_32_bits_count(tmp_path):
    """A sparse file of 24 GiB, of which three pages exist."""
    run_python(FAR_APART, tmp_path / "sparse", TRITON_INTERPRET="1")


SPECIFICATIONS = """
from kfac_prune_kernels.block_sweep import BLOCK_COLUMNS, CONFIGS, SPAN, block_sweep_kernel
types = dict(w_ptr="*fp32", u_ptr="*fp32", inverse_ptr="*fp32", error_ptr="*fp32", kept_ptr="*u8", bits_ptr="*i32",
             n_rows="i32", width="i32", w_row_stride="i32", u_row_stride="i32", bits_row_stride="i32")
for _, config in CONFIGS:
    options = dict(num_warps=config.num_warps, enable_fp_fusion=True)
    for form, n, span, lanes in [("bits", 0, 32, 32), ("n:m", 2, 4, 4), ("n:m", 3, 7, 8)]:
        constants = dict(N=n, SPAN=span, LANES=lanes, WIDE=False, ROWS=config.rows, COLS=BLOCK_COLUMNS)
        rows += machine_code(block_sweep_kernel, types, constants, options, f"{form} {span} {config}")
"""


def test_kernel_compiles_without_spills(tmp_path):
    rows = compile_kernels(tmp_path, SPECIFICATIONS)
    assert len(rows) == 4 * 3
    assert_fits(rows, REGISTERS)
    for row in rows:
        assert ("div.rn.f32" in row["ptx"]) == (not row["label"].startswith("bits"))
        assert "div.full" not in row["ptx"]


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_the_gpu(case):
    arguments = make_case(*case)
    found, expected = (
        outcome(f, arguments, d) for f, d in [(backend.block_sweep, "cuda"), (reference.block_sweep, "cpu")]
    )
    assert float((found[2] != expected[2]).double().mean() if found[2].numel() else 0) < 1e-2
    if case[1] in ("bits", "none", "all"):
        assert_close(found[0], expected[0], condition=30.0)


@pytest.mark.parametrize("form", ["bits", "2:4"])
def test_operator_is_well_formed(form):
    torch.library.opcheck(backend.block_sweep, make_case((5, 40, 32, 8), form))


def test_operator_compiles_into_one_graph():
    def sweep(weight, u, error, kept, *rest):
        backend.block_sweep(weight, u * 1, error, kept, *rest)

    torch.compiler.reset()
    arguments = make_case((5, 9, 0, 9), "2:4")
    compiled = torch.compile(sweep, fullgraph=True, backend="aot_eager")
    for found, expected in zip(outcome(compiled, arguments), outcome(reference.block_sweep, arguments), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.6), NM(2, 4), NM(3, 7), NM(16, 24)], ids=str)
def test_sparsegpt_is_the_same_by_either_sweep(pattern):
    w = normal(9, 300, seed=3, dtype=torch.float32)
    u = inverse_upper_cholesky(spd(300, condition=50.0)).float()
    plain, kept = sweep_by_leaves(w.clone(), u, pattern)
    fused, mask = sweep_fused(w.clone(), u, pattern)
    assert torch.equal(mask, kept)
    assert_close(fused, plain, condition=50.0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5])
@pytest.mark.parametrize("grid", ["int4", "signs"])
def test_sparsegpt_removes_what_was_asked_for_where_scores_tie(grid, sparsity):
    """As weights on a coarse grid do under H = I."""
    w = normal(32, 256, seed=3, dtype=torch.float32)
    w = w.sign() if grid == "signs" else (w * 7 / w.abs().max()).round()
    u = torch.eye(256)
    plain, kept = sweep_by_leaves(w.clone(), u, Unstructured(sparsity))
    fused, mask = sweep_fused(w.clone(), u, Unstructured(sparsity))
    assert int((~mask).sum()) == 2 * round(sparsity * 32 * 128)
    assert torch.equal(mask, kept)
    assert torch.equal(fused, plain)
