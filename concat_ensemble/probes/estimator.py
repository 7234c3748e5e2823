"""What all probes share: arrays or table splits in, labels of any kind, class scores out."""

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from concat_ensemble.features.standardized import CHUNK
from concat_ensemble.features.table import TableSplit


class FeatureProbe(ClassifierMixin, BaseEstimator):
    """A classifier on frozen features, after scikit-learn's contract.

    A probe adds `_fit(train, held)`, which learns from a split (`held` is None where no validation rows were given) and sets
    `classes_`, and `_logits(rows)`, which gives (n, C) scores for a chunk of rows.
    """

    def fit(self, X, y=None, *, validation=None):
        """
        Args:
            X: (N, D) array, or a split of a feature table, which brings its labels and may be larger than memory.
                float32 and float16 are computed with in float32, all else in float64.
            y: (N,) class numbers or names.
            validation: A table split or an (X, y) pair for what has to be chosen; cut off the rows when left out. What
                was chosen is then fitted on all rows.

        Raises:
            ValueError: for NaN or infinite features, one class only, labels that are not classes (one-hot, fractions),
                or validation rows of another width or of other members.
        """
        train = self._checked(X, y, reset=True)
        if len(np.unique(train.labels)) < 2:
            raise ValueError(f"a probe needs two classes; the training rows have the one class {train.labels[0]!r}.")
        pair = (validation,) if validation is None or isinstance(validation, TableSplit) else validation
        self._fit(train, None if validation is None else self._checked(*pair))
        return self

    def logits(self, X):
        """(N, C) scores, a column for each of `classes_`."""
        check_is_fitted(self)
        split = self._checked(X)
        chunks = [self._logits(split.rows(slice(n, n + CHUNK))) for n in range(0, split.blocks[0].shape[0], CHUNK)]
        return np.concatenate(chunks)

    def decision_function(self, X):
        """(N, C) scores, or (N,) for two classes: how much the second is preferred, as scikit-learn has it."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X):
        """(N,) of `classes_`."""
        chosen = self.logits(X).argmax(axis=1)
        return self.classes_[chosen]

    def score(self, X, y=None):
        """Top-1 accuracy, as a share. A class that was never seen in training is never predicted, so its rows count as
        wrong."""
        return float(np.mean(self.predict(X) == (X.labels if isinstance(X, TableSplit) else np.asarray(y))))

    def _checked(self, X, y=None, *, reset=False) -> TableSplit:
        if isinstance(X, TableSplit):
            keys, width = X.keys, X.num_features
            if reset:
                self.n_features_in_, self.table_keys_ = width, keys
            elif width != self.n_features_in_ or (self.table_keys_ and keys and self.table_keys_ != keys):
                raise ValueError(
                    f"the table has {width} columns of members {_named(keys)}; this probe was fitted on "
                    f"{self.n_features_in_} of {_named(self.table_keys_)}."
                )
            for start in range(0, len(X), CHUNK):
                bad = np.flatnonzero(~np.isfinite(X.rows(slice(start, start + CHUNK))).all(axis=1))
                if len(bad):
                    raise ValueError(
                        f"the features of row {start + bad[0]} hold NaN or infinity; leave it out, or extract in float32."
                    )
            return X
        shape = getattr(y, "shape", ())
        if len(shape) == 2 and shape[1] > 1:
            raise ValueError(
                f"labels have shape {tuple(shape)}, as one-hot ones do; give class numbers or names, (N,): y.argmax(axis=1)."
            )
        if reset:
            self.table_keys_ = None
            X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
            check_classification_targets(y)
        else:
            X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
            check_consistent_length(X, y)
        return TableSplit([X], None if y is None else np.asarray(y))

    def _cuts(self, train: TableSplit, held: TableSplit | None, folds: int | None = None, seed: int = 0):
        """The (fitted, validated) pairs on which something is chosen: the validation rows where there are any, else
        `folds` folds of the training rows, else a fifth of them, stratified where the classes allow it."""
        if held is not None:
            return [(train, held)]
        labels, numbers = train.labels, np.arange(len(train))
        counts = np.unique(labels, return_counts=True)[1]
        if folds is not None:
            if not 2 <= folds <= counts.max():
                raise ValueError(
                    f"cv={folds}: it must be 2 at least and at most the images of a class ({counts.max()})."
                )
            cuts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(numbers, labels)
        else:
            stratify = labels if counts.min() > 1 and len(labels) >= 5 * len(counts) else None
            cuts = [train_test_split(numbers, test_size=0.2, random_state=seed, stratify=stratify)]
        return [(train.select(np.sort(kept)), train.select(np.sort(cut))) for kept, cut in cuts]


class ProbabilityProbe(FeatureProbe):
    """A probe whose scores are logits: their softmax is what it believes."""

    def predict_proba(self, X):
        """(N, C) probabilities."""
        return softmax(self.logits(X), axis=1)


def _named(keys) -> str:
    return "unnamed" if keys is None else ", ".join(key[:8] for key in keys)
