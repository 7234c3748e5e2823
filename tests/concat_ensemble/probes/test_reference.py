"""The protocol against torch's own modules and optimizer, one decay at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from concat_ensemble import ReferenceProbe
from concat_ensemble.features.table import TableSplit
from tests.concat_ensemble.probes.test_linear import clouds


def train_modules(X, y, decay, batch_size, seed=0):
    """A function that returns the logits of the trained modules in evaluation mode."""
    X, y = torch.from_numpy(X).float(), torch.from_numpy(y)
    norm, linear = nn.BatchNorm1d(X.shape[1]), nn.Linear(X.shape[1], int(y.max()) + 1)
    torch.manual_seed(seed)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    groups = [
        {"params": norm.parameters(), "weight_decay": 0},
        {"params": linear.parameters(), "weight_decay": decay},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    for epoch in range(28):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.1 ** sum(epoch >= step for step in (8, 16, 24))
        for numbers in torch.randperm(len(X)).split(batch_size):
            if len(numbers) > 1:
                loss = nn.functional.cross_entropy(linear(norm(X[numbers])), y[numbers])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return lambda new: linear(norm.eval()(torch.from_numpy(new).float())).detach().numpy()


@pytest.mark.parametrize(
    "batch_size", [32, 11, 256]
)  # 144 = 4 * 32 + 16; 144 = 13 * 11 + 1, and the last row is skipped
def test_equals_torchs_modules_decay_by_decay(batch_size):
    (X, y), (X_held, y_held), (new, _) = clouds(144, spread=3), clouds(60, spread=3, seed=1), clouds(20, seed=2)
    decays = (0.5, 0.1, 1e-2, 1e-4)
    probe = ReferenceProbe(decays, batch_size=batch_size).fit(X, y, validation=(X_held, y_held))
    path = {decay: np.mean(train_modules(X, y, decay, batch_size)(X_held).argmax(1) == y_held) for decay in decays}
    assert probe.path_ == pytest.approx(path)
    assert probe.l2_strength_ == max(path, key=path.get)
    chosen = train_modules(np.vstack([X, X_held]), np.concatenate([y, y_held]), probe.l2_strength_, batch_size)
    np.testing.assert_allclose(probe.logits(new), chosen(new), atol=2e-4)


def test_the_defaults_are_the_papers():
    assert ReferenceProbe().get_params() == {
        "l2_strengths": (5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4),
        "epochs": 28,
        "milestones": (8, 16, 24),
        "lr": 0.01,
        "momentum": 0.9,
        "batch_size": 256,
        "in_memory": None,
        "seed": 0,
        "metric": "top1",
        "class_weight": None,
    }


def test_float16_and_mapped_table_splits_stream_to_the_same(tmp_path):
    X, y = clouds(90)
    half = X.astype(np.float16)
    np.save(tmp_path / "block.npy", half[:, 4:])
    split = TableSplit([half[:, :4], np.load(tmp_path / "block.npy", mmap_mode="r")], y)
    train, held = split.select(np.arange(60)), split.select(np.arange(60, 90))
    in_memory, streamed = (
        ReferenceProbe(batch_size=16, in_memory=m).fit(train, validation=held) for m in (True, False)
    )
    single = half.astype(np.float32)
    plain = ReferenceProbe(batch_size=16).fit(single[:60], y[:60], validation=(single[60:], y[60:]))
    for probe in (streamed, plain):
        np.testing.assert_array_equal(probe.coef_, in_memory.coef_)
        assert probe.path_ == in_memory.path_
    assert in_memory.score(split) == plain.score(single, y)


def test_the_seed_decides_weights_and_batches():
    X, y = clouds(60)
    with torch.no_grad():  # a caller may have switched gradients off
        first, again, other = (ReferenceProbe((1e-3,), seed=seed).fit(X, y) for seed in (0, 0, 1))
    assert np.array_equal(first.coef_, again.coef_) and not np.array_equal(first.coef_, other.coef_)
    assert first.path_ == {} and first.l2_strength_ == 1e-3  # one decay: nothing to choose


def test_a_class_of_the_validation_rows_only_is_learned():
    X, y = clouds(60)
    probe = ReferenceProbe().fit(X[y < 2], y[y < 2], validation=(X, y))
    assert probe.classes_.tolist() == [0, 1, 2] and probe.coef_.shape == (3, 6)


@pytest.mark.parametrize(
    ("settings", "message"), [({"batch_size": 1}, "batch_size=1"), ({"l2_strengths": ()}, r"l2_strengths=\(\)")]
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReferenceProbe(**settings).fit(*clouds(30))


def test_nan_in_a_table_is_refused():
    X, y = clouds(30)
    X[3, 2] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        ReferenceProbe().fit(TableSplit([X], y))
