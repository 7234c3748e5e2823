import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concat_ensemble import LinearProbe
from concat_ensemble.features import standardized
from concat_ensemble.features.standardized import StandardizedFeatures, kernel, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes import logistic


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(0, 10**6),
)
def test_chunks_are_the_standardized_rows_in_order(lengths, dtype, seed):
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=(n, 5)) * 10.0 ** np.arange(-2, 3) + 3).astype(dtype) for n in lengths]
    split = TableSplit.concatenate([TableSplit([a[:, :2], a[:, 2:]], np.zeros(len(a))) for a in arrays])
    mean, scale = moments(split)
    whole = np.vstack(arrays).astype(np.float64)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(scale, np.where(whole.std(0) > 1e-6, whole.std(0), scale), rtol=1e-4)
    for in_memory in (True, False):
        rows = StandardizedFeatures(split, mean, scale, in_memory=in_memory)
        for _ in range(2):  # the second pass reads the cached chunks
            chunks = list(rows.chunks())
            result = torch.cat([chunk for _, chunk in chunks])
            np.testing.assert_allclose(result.numpy(), (whole - mean) / scale, rtol=2e-3, atol=1e-3)
            assert chunks[0][0].start == 0 and chunks[-1][0].stop == len(whole)
    assert rows.dtype == (torch.float64 if dtype == np.float64 else torch.float32)


def test_a_constant_column_has_scale_one():
    X = np.tile(np.array([[0.1, 7e5, 0.0]], np.float32), (1000, 1))
    mean, scale = moments(TableSplit([X], np.zeros(1000)))
    assert scale.tolist() == [1.0, 1.0, 1.0] and mean == pytest.approx([0.1, 7e5, 0.0])


def scales(X, sample_weight=None):
    return moments(TableSplit([X], np.zeros(len(X))), sample_weight)[1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nearly_constant_features_have_scale_one(dtype):
    """Rounding around a large mean, a unit that is as good as dead beside others, and near-duplicates of constants."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1_000, 40))
    X[:, 0] = 1 + 1e-5 * X[:, 0]
    X[:, 1] = 1e-5 * X[:, 1]
    X[:, 2] = 0.3 + 1e-6 * rng.integers(0, 2, 1_000)
    X[0, 3], X[1:, 3] = 1e-4, 0.0
    X = X.astype(dtype)
    assert scales(X)[:4].tolist() == [1.0] * 4
    np.testing.assert_allclose(scales(X)[4:], X[:, 4:].astype(float).std(0), rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_change_of_a_nearly_constant_feature_stays_small_in_any_unit(unit):
    """On test rows the feature moves by 0.04 of what the others deviate, which was a |z| of thousands."""
    rng = np.random.default_rng(0)
    X = unit * rng.normal(size=(1_000, 40))
    X[:, 0] = unit * (1 + 1e-5 * rng.normal(size=1_000))
    mean, scale = moments(TableSplit([X], np.zeros(1_000)))
    assert abs((unit * 1.04 - mean[0]) / scale[0]) < 0.1
    np.testing.assert_allclose(scale[1:], X[:, 1:].std(0))


def test_features_that_vary_keep_their_scale():
    """ReLU units that one row in a thousand activates, and a member whose features are a millionth of another's."""
    rng = np.random.default_rng(0)
    rare = np.zeros((5_000, 3))
    rare[::1_000] = rng.uniform(0.3, 1, (5, 3))
    X = np.hstack([rng.normal(size=(5_000, 30)), rare, 20 + 0.05 * rng.normal(size=(5_000, 2))])
    np.testing.assert_allclose(scales(X), X.std(0))
    tiny = 1e-6 * rng.normal(size=(5_000, 20))
    both = moments(TableSplit([X, tiny], np.zeros(5_000)))[1]
    np.testing.assert_allclose(both, np.concatenate([X.std(0), tiny.std(0)]))


@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([np.float32, np.float64]))
def test_weighted_moments_are_those_of_repeated_rows(seed, number, dtype):
    rng = np.random.default_rng(seed)
    X, counts = (rng.normal(size=(number, 4)) * 5 + 100).astype(dtype), rng.integers(0, 4, number)
    counts[:2] = 1, 2
    repeated = np.repeat(X, counts, axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standardized, "CHUNK", 7)  # some chunks have no weight at all
        pairs = zip(moments(TableSplit([X], X), counts), moments(TableSplit([repeated], repeated)), strict=True)
    for weighted, plain in pairs:
        np.testing.assert_allclose(weighted, plain, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_gram_matrices_keep_what_lies_beside_a_feature_of_large_values():
    """In float32, a |z| of 3,867 hid the differences of other features that are nearly the same."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 30)).astype(np.float32)
    X[:, 1] = X[:, 0] + 1e-3 * X[:, 1]
    X[:, 2] = 3_867
    exact = X.astype(np.float64).T @ X.astype(np.float64) / 600
    rows = StandardizedFeatures(TableSplit([X], np.zeros(600)))
    np.testing.assert_allclose(rows.gram().numpy(), exact, rtol=1e-12)
    np.testing.assert_allclose(kernel(torch.from_numpy(X)).numpy(), X.astype(float) @ X.T.astype(float), rtol=1e-9)
    assert torch.linalg.eigvalsh(rows.gram())[0] == pytest.approx(np.linalg.eigvalsh(exact)[0], rel=0.02)


def test_a_row_with_nan_or_infinity_is_named():
    X = np.ones((40, 3), np.float32)
    X[17, 2] = np.inf
    with pytest.raises(ValueError, match=r"row 17 .*NaN or inf"):
        LinearProbe().fit(TableSplit([X], np.arange(40) % 2))
    probe = LinearProbe().fit(TableSplit([np.ones((40, 3), np.float32)], np.arange(40) % 2))
    with pytest.raises(ValueError, match=r"row 17 .*NaN or inf"):
        probe.score(TableSplit([X], np.arange(40) % 2))


def test_streamed_rows_give_the_same_probe_as_rows_in_memory(monkeypatch):
    """Small chunks and a small sample, so that 700 rows are streamed as a million rows are."""
    monkeypatch.setattr(standardized, "CHUNK", 64)
    monkeypatch.setattr(logistic, "SAMPLE", 100)
    rng = np.random.default_rng(0)
    y = np.arange(700) % 4
    X = (rng.normal(size=(4, 10))[y] + 1.5 * rng.normal(size=(700, 10))).astype(np.float32)
    settings = {"l2_strengths": (1.0, 0.1, 0.01), "tol": 1e-8}
    streamed, cached = (LinearProbe(in_memory=way, **settings).fit(TableSplit([X], y)) for way in (False, True))
    assert streamed.path_ == cached.path_
    np.testing.assert_allclose(streamed.coef_, cached.coef_, atol=2e-3)


def test_products_and_gram_are_those_of_the_rows():
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    rows, matrix = StandardizedFeatures.from_tensor(X), torch.ones(6, 2)
    torch.testing.assert_close(rows @ matrix, X @ matrix)
    torch.testing.assert_close(rows.gram().float(), X.T @ X / 50)
