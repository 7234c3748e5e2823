"""The images of Figure 6, which all its repeats share, and how its claims are judged."""

from dataclasses import replace

import datasets
import numpy as np
import pytest

from concat_ensemble.experiments.desk import Setup
from concat_ensemble.experiments.time_concatenation import (
    Claim,
    Outcomes,
    Study,
    images_folder,
    judge_claims,
    write_images,
)
from concat_ensemble.studies.results import pack_bits


def test_other_seeds_have_other_test_images(tmp_path):
    first = Setup("scattered_digits", "digits", tmp_path, smoke=True)
    other = replace(first, first_seed=200)
    assert list(other.seeds(3)) == [200, 201, 202]
    tests = []
    for setup in (first, other, first):
        write_images(images_folder(setup), setup)
        path = str(images_folder(setup) / "unseen" / "test.parquet")
        tests.append(datasets.Dataset.from_parquet(path)["label"][:])
    assert tests[0] == tests[2] != tests[1]


def test_claims_are_judged_by_adjusted_p_values():
    rng = np.random.default_rng(0)
    shares = {"cat8": 0.9, "cat4": 0.6, "cat1": 0.6, "w2": 0.9}
    repeats = []
    for _ in range(8):
        right = {system: pack_bits(rng.random(400) < share) for system, share in shares.items()}
        repeats.append(Outcomes([], {"unseen": 400}, {"unseen": right}))
    study = Study(repeats)
    claims = [
        Claim("better", "unseen", "cat8", "cat1"),
        Claim("level", "unseen", "cat4", "cat1"),
        Claim("worse", "unseen", "cat4", "w2"),
        Claim("as good", "unseen", "cat4", "cat8", "as good"),
    ]
    judged = judge_claims(study, claims)
    assert [each.holds for each in judged] == [True, None, False, False]
    alone = [judge_claims(study, [claim])[0].p_value for claim in claims]
    assert [each.p_value for each in judged] == pytest.approx(holm(alone))


def holm(p_values):
    """As in Holm (1979): the k-th smallest of m is multiplied by m - k, and no larger than any that follows."""
    order = np.argsort(p_values)
    adjusted = np.maximum.accumulate([(len(order) - k) * p_values[i] for k, i in enumerate(order)])
    return np.minimum(adjusted, 1)[np.argsort(order)]
