"""Small probes compute with one thread, and leave the number of threads as it was."""

import numpy as np
import pytest
import torch

from concat_ensemble import LinearProbe
from concat_ensemble.probes.threads import SMALL, pass_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Counting(LinearProbe):
    def _fit(self, train, validation):
        self.threads_ = torch.get_num_threads()
        super()._fit(train, validation)


@pytest.mark.parametrize(("rows", "threads"), [(60, 1), (SMALL // 20 + 2, 2)])
def test_a_fit_uses_more_than_one_thread_where_that_pays(rows, threads):
    y = np.arange(rows) % 2
    X = np.random.default_rng(0).normal(size=(rows, 10)) + y[:, None]
    probe = Counting(l2_strengths=[0.1]).fit(X, y)
    assert probe.threads_ == threads and probe.score(X, y) > 0.8
    assert torch.get_num_threads() == 2


def test_the_number_is_set_back_by_the_last_of_several_and_after_an_error():
    first, second = pass_threads(10, 10, 2), pass_threads(10, 10, 2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError), pass_threads(10, 10, 2):
        raise RuntimeError
    assert torch.get_num_threads() == 2
