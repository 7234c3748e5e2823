import numpy as np
import pytest

from concat_ensemble.feature_table import FeatureTable
from concat_ensemble.projection import principal_projection, random_projection


@pytest.fixture
def wide():
    """Ten training, five validation and four test rows of two blocks, the columns of very different sizes."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    blocks, labels = {}, {}
    for kind, number in {"train": 10, "validation": 5, "test": 4}.items():
        rows = (rng.normal(size=(number, 6)) @ mix * 10.0 ** np.arange(6) + 3).astype(np.float32)
        blocks[kind], labels[kind] = [rows[:, :2], rows[:, 2:]], np.arange(number) % 2
    return FeatureTable(blocks, labels, ["a", "b"])


def test_principal_projection_is_pca_of_the_standardised_training_half(wide):
    fitted = np.vstack([wide["train"].features, wide["validation"].features]).astype(np.float64)
    standard = {kind: (wide[kind].features - fitted.mean(0)) / fitted.std(0) for kind in wide}
    directions = np.linalg.svd(np.vstack([standard["train"], standard["validation"]]), full_matrices=False)[2][:3]
    table = principal_projection(wide, 3)(wide)
    assert table.widths == [3] and table.class_names == ["a", "b"] and list(table) == ["train", "validation", "test"]
    for kind in table:
        # up to the sign of each direction
        np.testing.assert_allclose(
            np.abs(table[kind].features), np.abs(standard[kind] @ directions.T), rtol=1e-3, atol=1e-4
        )
        assert table[kind].labels.tolist() == wide[kind].labels.tolist()


def test_principal_projection_learns_nothing_from_the_test_rows(wide):
    other = FeatureTable(
        wide.blocks | {"test": [block * 100 + 7 for block in wide.blocks["test"]]}, wide.labels, wide.class_names
    )
    assert np.array_equal(
        principal_projection(wide, 3)(wide)["train"].features, principal_projection(other, 3)(other)["train"].features
    )


def test_principal_projection_to_its_own_width_keeps_all_distances(wide):
    table = principal_projection(wide, 6)(wide)
    fitted = np.vstack([wide["train"].features, wide["validation"].features])
    standard = (wide["test"].features - fitted.mean(0)) / fitted.std(0)
    apart = [np.linalg.norm(rows[0] - rows[3]) for rows in (table["test"].features, standard)]
    assert apart[0] == pytest.approx(apart[1], rel=1e-4)
    assert principal_projection(wide, 50)(wide).widths == [6], "no wider than the table"


def test_random_projection_keeps_distances_on_average(wide):
    """Of standardised rows; 2,000 columns of variance 1 / 2,000 keep a length to a few per cent."""
    fitted = np.vstack([wide["train"].features, wide["validation"].features])
    standard = (wide["test"].features - fitted.mean(0)) / fitted.std(0)
    table = random_projection(wide, 2000, seed=0)(wide)
    assert table.widths == [2000]
    apart = [np.linalg.norm(rows[0] - rows[3]) for rows in (table["test"].features, standard)]
    assert apart[0] == pytest.approx(apart[1], rel=0.1)
    again, other = (random_projection(wide, 3, seed)(wide)["test"].features for seed in (0, 1))
    assert np.array_equal(random_projection(wide, 3, 0)(wide)["test"].features, again) and not np.array_equal(
        again, other
    )
