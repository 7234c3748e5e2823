"""How the probes choose a setting: by which metric, on which rows, and what they do at the edge of a grid."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import KFold

from concat_ensemble import KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe
from concat_ensemble.data.naming import METRICS
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import (
    HeldOut,
    LabeledRows,
    best_of,
    search_l2_strengths,
    selection_pairs,
    stronger,
    weaker,
)
from concat_ensemble.probes.metrics import metric_value
from concat_ensemble.probes.ridge import RidgeSolver
from tests.concat_ensemble.probes.test_linear import clouds

CHOOSING = [KNNProbe, LinearProbe, ReferenceProbe, RidgeProbe]


def rare_class(number, seed=0, share=0.03, num_features=20):
    """A class with 3% of the rows in which the others' features are shifted a little."""
    rng = np.random.default_rng(seed)
    y = (np.arange(number) < share * number).astype(int)
    return rng.normal(size=(number, num_features)) + 0.5 * y[:, None], y


# --- by which metric -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_the_path_is_the_metric_of_scikit_learns_fits(metric, num_classes):
    (X, y), (X_held, y_held) = clouds(150, num_classes, spread=3), clouds(90, num_classes, spread=3, seed=1)
    X, X_held = (rows / 10.0 ** np.arange(-2, 4) for rows in (X, X_held))
    grid = (1.0, 0.1, 0.01)
    probe = LinearProbe(grid, standardize=False, tol=1e-10, metric=metric).fit(X, y, validation=(X_held, y_held))
    references = {
        "top1": lambda p: np.mean(p.argmax(1) == y_held),
        "mean_per_class": lambda p: balanced_accuracy_score(y_held, p.argmax(1)),
        "macro_f1": lambda p: f1_score(y_held, p.argmax(1), average="macro"),
        "auroc": lambda p: roc_auc_score(y_held, p if num_classes > 2 else p[:, 1], multi_class="ovr"),
        "average_precision": lambda p: average_precision_score(y_held, p if num_classes > 2 else p[:, 1]),
    }
    for l2_strength in grid:
        model = LogisticRegression(C=1 / (150 * l2_strength), max_iter=10_000, tol=1e-8).fit(X, y)
        expected = references[metric](model.predict_proba(X_held))
        assert probe.path_[l2_strength] == pytest.approx(expected, abs=1e-3)
    assert probe.path_[probe.l2_strength_] == max(probe.path_.values())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("probe", CHOOSING)
def test_every_probe_chooses_by_the_metric_on_the_validation_rows(probe, metric):
    """Recomputed from the scores of fits with each setting alone on the training rows."""
    (X, y), (X_held, y_held) = clouds(150, spread=4), clouds(80, spread=4, seed=1)
    fitted = probe(metric=metric).fit(X, y, validation=(X_held, y_held))
    assert fitted.selection_ == "validation rows"
    name = "ks" if probe is KNNProbe else "l2_strengths"
    for setting in list(fitted.path_)[:3]:
        alone = probe(**{name: (setting,)}).fit(X, y)
        scores = alone.logits(X_held) if probe is RidgeProbe else alone.predict_log_proba(X_held)
        assert fitted.path_[setting] == pytest.approx(metric_value(metric, scores, y_held), abs=0.02)
    chosen = fitted.k_ if probe is KNNProbe else fitted.l2_strength_
    assert fitted.path_[chosen] == max(fitted.path_.values())


def test_a_rare_class_is_ranked_better_if_auroc_chooses():
    """3% positives: every strong strength has 97% top-1 and is chosen as the strongest, however it ranks."""
    (X, y), (X_held, y_held), (new, labels) = (rare_class(n, seed) for n, seed in ((600, 0), (600, 1), (4000, 2)))
    by_top1, by_auroc = (LinearProbe(metric=m).fit(X, y, validation=(X_held, y_held)) for m in ("top1", "auroc"))
    assert set(by_top1.path_.values()) == {0.97} and by_top1.l2_strength_ == 10.0
    assert by_auroc.path_[by_auroc.l2_strength_] > by_auroc.path_[1e-4] + 0.02 > 0.93
    assert by_auroc.score(new, labels) == 0.97 and roc_auc_score(labels, by_auroc.decision_function(new)) > 0.9


def test_leave_one_out_of_ridge_gives_every_metric():
    X, y = rare_class(40, share=0.2, num_features=4)
    scores = {l2_strength: np.empty((40, 2)) for l2_strength in (1.0, 0.1)}
    for l2_strength, row in itertools.product(scores, range(40)):
        others = np.arange(40) != row
        fitted = RidgeProbe((l2_strength * 40 / 39,), standardize=False).fit(X[others], y[others])  # the same penalty
        scores[l2_strength][row] = fitted.logits(X[row : row + 1])[0]
    for metric in METRICS:
        solver = RidgeSolver(LabeledRows(TableSplit([X], y)), None, standardize=False, in_memory=None)
        expected = [metric_value(metric, of_rows, y) for of_rows in scores.values()]
        assert solver.leave_one_out(list(scores), metric) == pytest.approx(expected)


@pytest.mark.parametrize("probe", CHOOSING)
def test_an_unknown_metric_is_refused(probe):
    with pytest.raises(ValueError, match="metric='f1' must be one of top1, mean_per_class, macro_f1, auroc, average"):
        probe(metric="f1").fit(*clouds(30))


def test_nan_scores_are_refused():
    held_out = HeldOut("auroc", np.arange(2))
    held_out.add(np.array([[0.0, np.nan], [1.0, 0.0]]), np.arange(2), np.array([0, 1]), None)
    with pytest.raises(ValueError, match="NaN"):
        held_out.value()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("probe", CHOOSING)
def test_classes_that_training_or_validation_rows_lack(probe, metric):
    """Class 2 is in the validation rows alone, class 0 in the training rows alone."""
    (X, y), (X_held, y_held) = clouds(240), clouds(120, seed=1)
    fitted = probe(metric=metric).fit(X[y < 2], y[y < 2], validation=(X_held[y_held > 0], y_held[y_held > 0]))
    assert fitted.classes_.tolist() == [0, 1, 2] and np.isfinite(list(fitted.path_.values())).all()


@pytest.mark.parametrize("probe", CHOOSING)
def test_validation_rows_of_one_class_choose_by_metrics_of_predictions_only(probe):
    (X, y), (X_held, y_held) = clouds(240), clouds(90, seed=1)
    one_class = X_held[y_held == 1], y_held[y_held == 1]
    assert np.isfinite(list(probe(metric="mean_per_class").fit(X, y, validation=one_class).path_.values())).all()
    with pytest.raises(ValueError, match="need images of two classes, but all are of class 1"):
        probe(metric="auroc").fit(X, y, validation=one_class)


@pytest.mark.parametrize("probe", CHOOSING)
def test_equal_scores_everywhere_choose_the_simplest_setting(probe):
    """Features without information: each setting has an AUROC of about one half, and none is an error."""
    X, y = np.ones((60, 3)), np.arange(60) % 2
    fitted = probe(metric="auroc").fit(X, y)
    assert np.isfinite(fitted.logits(X)).all()


# --- on which rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "expected"), [(199, "5-fold cross-validation"), (200, "validation rows")])
@pytest.mark.parametrize("probe", CHOOSING)
def test_fewer_than_200_labeled_rows_are_chosen_on_by_cross_validation(probe, number, expected):
    X, y = clouds(number, spread=3)
    fitted = probe().fit(X[:150], y[:150], validation=(X[150:], y[150:]))
    assert fitted.selection_ == expected
    scored = number if expected.startswith("5") else number - 150
    assert all(round(value * scored, 6).is_integer() for value in fitted.path_.values())
    if expected.startswith("5"):  # how the rows were split into training and validation rows does not matter
        assert fitted.path_ == probe().fit(X, y).path_


def test_cross_validation_chooses_at_least_as_well_as_a_validation_half_of_small_data():
    """Mean top-1 on new images over 30 draws of 60 rows, of which 30 would be validation rows. Ridge for speed."""
    scores = []
    for seed in range(30):
        (X, y), (new, labels) = (clouds(n, spread=3, num_features=30, seed=s) for n, s in ((60, seed), (1000, 999)))
        half = {s: RidgeProbe((s,)).fit(X[:30], y[:30]).score(X[30:], y[30:]) for s in (10.0, 1.0, 0.1, 0.01, 1e-3)}
        by_half = RidgeProbe((best_of(half),)).fit(X, y)
        by_folds = RidgeProbe(tuple(half)).fit(X[:30], y[:30], validation=(X[30:], y[30:]))
        scores.append((by_folds.score(new, labels), by_half.score(new, labels)))
    folds, halves = np.mean(scores, axis=0)
    assert folds >= halves


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.booleans(), st.integers(0, 3))
def test_folds_hold_out_each_row_once_and_leave_classes_to_fit(labels, grouped, seed):
    y = np.array(labels)
    groups = np.random.default_rng(seed).integers(0, 12, len(y)) if grouped else None
    rows = LabeledRows(TableSplit([np.arange(len(y))[:, None] * 1.0], y, groups=groups))
    if len(np.unique(y)) < 2:
        return
    try:
        pairs = selection_pairs(rows, None, seed=seed).pairs
    except ValueError as error:
        assert grouped and "groups leave no rows" in str(error)
        return
    held_out = [score_on.split.features[:, 0].astype(int) for _, score_on in pairs]
    assert len(np.concatenate([*held_out, []])) == len({*np.concatenate([*held_out, []])})
    for fit_on, score_on in pairs:
        assert len(fit_on) + len(score_on) == len(y) and len(score_on) and len(np.unique(fit_on.labels)) > 1
        if grouped:
            assert not set(fit_on.split.groups) & set(score_on.split.groups)
        else:
            assert set(np.unique(fit_on.labels)) == set(np.unique(y))
    if not grouped and pairs:
        counts = np.bincount(y)
        assert len(np.concatenate(held_out)) == counts[counts > 1].sum()


@pytest.mark.parametrize("probe", CHOOSING)
@pytest.mark.parametrize("number", [120, 400])
def test_a_class_with_one_row_is_fitted_and_never_held_out(probe, number):
    X, y = clouds(number)
    y = np.where(np.arange(number) == 7, 5, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fitted = probe().fit(X, y)
    assert fitted.classes_.tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("probe", [*CHOOSING, PrototypeProbe])
@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, 0, 1], ["b", "a", "b"], [1, 0, 0, 1]])
def test_two_to_four_rows_are_enough(probe, labels):
    rng = np.random.default_rng(0)
    y = np.array(labels)
    X = rng.normal(size=(len(y), 3)) + 10 * (y == y[0])[:, None]
    fitted = probe().fit(X, y)
    assert np.isfinite(fitted.logits(X)).all() and set(fitted.predict(X)) <= set(labels)


def test_one_row_a_class_chooses_the_strongest():
    probe = LinearProbe().fit(np.eye(3), [0, 1, 2])
    assert probe.path_ == {} and probe.l2_strength_ == 10.0 and probe.l2_strengths_ == (10.0,)
    assert probe.selection_ == "nothing to choose on: each class has one row" and not probe.at_edge_


def leaking_groups(number, seed=0):
    """Groups of 5 rows with one class and features that say which group it is, and nothing about the class."""
    rng = np.random.default_rng(seed)
    groups = np.arange(number) // 5
    centers = rng.normal(size=(number // 5, 120)) * 3
    return centers[groups] + 0.1 * rng.normal(size=(number, 120)), groups % 2, groups


@pytest.mark.parametrize(
    ("number", "expected"),
    [(150, "5-fold cross-validation by group"), (400, "one fifth of the training rows by group")],
)
@pytest.mark.parametrize("probe", CHOOSING)
def test_rows_of_a_group_are_not_on_both_sides_where_a_setting_is_chosen(probe, number, expected):
    """Only what is known of other rows of its group tells the class of a row."""
    X, y, groups = leaking_groups(number)
    parameters = {"batch_size": 16} if probe is ReferenceProbe else {}
    grouped = probe(**parameters).fit(TableSplit([X], y, groups=groups))
    alone = probe(**parameters).fit(TableSplit([X], y))
    assert grouped.selection_ == expected
    assert max(alone.path_.values()) > 0.95 and max(grouped.path_.values()) < 0.8


def test_groups_of_training_and_validation_rows_are_kept_together():
    X, y, groups = leaking_groups(150)
    split = TableSplit([X], y, groups=groups)
    even, odd = split.select(np.arange(0, 150, 2)), split.select(np.arange(1, 150, 2))
    fitted = LinearProbe().fit(even, validation=odd)
    assert fitted.selection_ == "5-fold cross-validation by group" and max(fitted.path_.values()) < 0.85


@pytest.mark.parametrize("groups", [["a"] * 60, (np.arange(60) % 3).tolist()])
@pytest.mark.parametrize("probe", CHOOSING)
def test_groups_that_leave_nothing_to_hold_out_are_refused(probe, groups):
    """One group for all, or one for each class."""
    X, y = clouds(60)
    split = TableSplit([X], y, groups=np.array(groups))
    with pytest.raises(ValueError, match=r"groups leave no rows to choose .*pass validation rows of other groups"):
        probe().fit(split)
    probe((1,) if probe is KNNProbe else (0.1,)).fit(split)  # nothing to choose


def test_groups_that_leave_nothing_to_hold_out_of_small_data_leave_the_validation_rows():
    (X, y), (X_held, y_held) = clouds(60), clouds(30, seed=1)
    train, held = (TableSplit([rows], labels, groups=labels) for rows, labels in ((X, y), (X_held, y_held)))
    assert LinearProbe().fit(train, validation=held).selection_ == "validation rows"


def test_folds_of_every_kind_of_cv():
    X, y = clouds(60, spread=3)
    splitter = KFold(3, shuffle=True, random_state=0)
    by_splitter = LinearProbe(cv=splitter).fit(X, y)
    by_pairs = LinearProbe(cv=list(splitter.split(X))).fit(X, y)
    assert by_splitter.path_ == by_pairs.path_ and by_pairs.selection_ == "3-fold cross-validation"
    assert LinearProbe(cv=4).fit(X, y).selection_ == "4-fold cross-validation"
    for cv in (1, 21):
        with pytest.raises(ValueError, match=rf"cv={cv} must be from 2 to the number of images of a class \(20\)"):
            LinearProbe(cv=cv).fit(X, y)
    one_class = [(np.flatnonzero(y == 0), np.flatnonzero(y == 1))]
    with pytest.raises(ValueError, match="must leave two classes to fit on and rows to score; pair 0 does not"):
        LinearProbe(cv=one_class).fit(X, y)
    split = TableSplit([X], y, groups=np.arange(60) // 15)
    assert LinearProbe(cv=4).fit(split).selection_ == "4-fold cross-validation by group"
    with pytest.raises(ValueError, match=r"cv=5 must be from 2 to the number of groups \(4\)"):
        LinearProbe(cv=5).fit(split)


def test_folds_are_scored_together():
    """Leaving each of 5 positive rows out in turn leaves folds without an AUROC of their own."""
    rng = np.random.default_rng(0)
    y = (np.arange(40) < 5).astype(int)
    X = rng.normal(size=(40, 3)) + y[:, None]
    pairs = [(np.setdiff1d(np.arange(40), fold), fold) for fold in np.arange(40).reshape(8, 5)]
    pairs[0] = (pairs[0][0][5:], np.arange(5, 10))
    pairs = [(np.setdiff1d(np.arange(40), [k]), np.array([k])) for k in range(40)]
    probe = LinearProbe((1.0, 0.1), cv=pairs, metric="auroc").fit(X, y)
    for l2_strength in (1.0, 0.1):
        margins = [LinearProbe((l2_strength,)).fit(X[on], y[on]).decision_function(X[held])[0] for on, held in pairs]
        assert probe.path_[l2_strength] == pytest.approx(roc_auc_score(y, margins), abs=0.01)


# --- at the edge of a grid -------------------------------------------------------------------------------------------


def search(values, grid):
    """The search where the metric of each strength is known, and which strengths it evaluated."""
    evaluated = []

    def evaluate(l2_strengths):
        evaluated.extend(l2_strengths)
        return [values(s) for s in l2_strengths]

    return search_l2_strengths(grid, evaluate), evaluated


def peak_at(best):
    return lambda s: -abs(np.log10(s) - np.log10(best))


@pytest.mark.parametrize(
    ("best", "chosen", "tried", "at_edge"),
    [
        (0.1, 0.1, [], False),
        (1e-3, 1e-3, [1e-3, 1e-4], False),
        (1e-9, 1e-5, [1e-3, 1e-4, 1e-5], True),
        (10.0, 10.0, [10.0, 100.0], False),
        (1e9, 1000.0, [10.0, 100.0, 1000.0], True),
    ],
)
def test_a_grid_is_extended_until_the_best_strength_is_inside(best, chosen, tried, at_edge):
    grid = [1.0, 0.1, 0.01]
    found, evaluated = search(peak_at(best), grid)
    assert found.l2_strength == pytest.approx(chosen) and found.at_edge is at_edge
    assert evaluated[3:] == pytest.approx(tried)
    assert list(found.path) == sorted(found.path, reverse=True) and set(found.path) == set(evaluated)


@pytest.mark.parametrize(("values", "more"), [(lambda s: 1.0, 0), (lambda s: float(s < 0.5), 0)])
def test_a_tie_is_no_reason_to_extend(values, more):
    found, evaluated = search(values, [1.0, 0.1, 0.01])
    assert len(evaluated) == 3 + more and not found.at_edge
    assert found.l2_strength == (1.0 if values(1.0) else 0.1)


def test_a_stronger_tie_beyond_the_grid_is_chosen():
    """The metric rises up to 1.0 and stays: as within the grid, the strongest of equally good ones."""
    found, evaluated = search(lambda s: min(s, 1.0), [1.0, 0.1])
    assert evaluated == [1.0, 0.1, 10.0] and found.l2_strength == 10.0 and not found.at_edge


def test_steps_beyond_a_grid_are_its_last():
    assert weaker([10.0, 1.0, 0.5]) == [0.25, 0.125, 0.0625] and stronger([10.0, 1.0, 0.5]) == [100.0, 1e3, 1e4]
    assert weaker([1.0]) == stronger([1.0]) == []


def noisy_features(number, seed):
    """Many features with little information each, for which strong strengths are best."""
    rng = np.random.default_rng(seed)
    y = np.arange(number) % 2
    return rng.normal(size=(number, 300)) + 0.12 * (2 * y - 1)[:, None], y


def correlated_features(number, seed):
    """Two features with all information in their small difference, for which weak strengths are best."""
    rng = np.random.default_rng(seed)
    y, shared = np.arange(number) % 2, rng.normal(size=number)
    return np.stack([shared + 0.1 * y + 0.05 * rng.normal(size=number), shared], axis=1), y


@pytest.mark.parametrize("probe", [LinearProbe, RidgeProbe])
@pytest.mark.parametrize(("draw", "grid"), [(noisy_features, (0.1, 0.01)), (correlated_features, (100.0, 10.0))])
def test_a_grid_that_is_too_weak_or_too_strong_is_extended(probe, draw, grid):
    (X, y), (X_held, y_held) = draw(150, 0), draw(600, 1)
    fitted = probe(grid, metric="auroc").fit(X, y, validation=(X_held, y_held))
    alone = probe(grid[:1]).fit(X, y), probe(grid[1:]).fit(X, y)
    best = fitted.path_[fitted.l2_strength_]
    assert fitted.l2_strength_ not in grid and best == max(fitted.path_.values())
    assert best > max(roc_auc_score(y_held, single.decision_function(X_held)) for single in alone)


def test_one_strength_is_not_extended():
    X, y = clouds(60)
    for probe in (LinearProbe, RidgeProbe, ReferenceProbe):
        fitted = probe((0.1,)).fit(X, y)
        assert fitted.l2_strengths_ == (0.1,) and fitted.l2_strength_ == 0.1 and not fitted.at_edge_


def test_the_papers_decays_are_not_extended_but_their_edge_is_recorded():
    (X, y), (X_held, y_held) = noisy_features(150, 0), noisy_features(100, 1)
    fitted = ReferenceProbe((1e-3, 1e-5), metric="auroc").fit(X, y, validation=(X_held, y_held))
    assert fitted.l2_strengths_ == (1e-3, 1e-5)
    assert fitted.at_edge_ == (fitted.path_[1e-3] != fitted.path_[1e-5])


def test_a_solver_without_enough_steps_warns():
    X, y = clouds(60, spread=3)
    with pytest.warns(
        ConvergenceWarning, match="max_iter=1 Newton steps were not enough at l2_strength=0.0001; raise max_iter"
    ):
        LinearProbe((1e-4,), max_iter=1).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        LinearProbe((1e-4,)).fit(X, y)
