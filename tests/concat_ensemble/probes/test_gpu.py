"""The probes give the same results on a CUDA device and on the CPU."""

import numpy as np
import pytest
import torch

from concat_ensemble import KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import select_members


@pytest.mark.gpu
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe])
def test_a_probe_predicts_the_same_on_the_gpu(probe, in_memory, monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(600) % 5
    X = (rng.normal(size=(5, 40))[y] + 2 * rng.normal(size=(600, 40))).astype(np.float32)
    settings = {"in_memory": in_memory} if "in_memory" in probe().get_params() else {}
    on_gpu = probe(**settings).fit(X[:400], y[:400])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = probe(**settings).fit(X[:400], y[:400])
    assert np.mean(on_gpu.predict(X[400:]) == on_cpu.predict(X[400:])) >= 0.99


@pytest.mark.gpu
def test_subsets_are_scored_the_same_on_the_gpu(monkeypatch):
    rng = np.random.default_rng(0)
    y = {"train": np.arange(300) % 5, "validation": np.arange(200) % 5}

    def block(labels):
        return np.eye(5)[labels] @ np.ones((5, 8)) + rng.normal(size=(len(labels), 8))

    blocks = {split: [block(labels), block(labels)] for split, labels in y.items()}
    table = FeatureTable(blocks, y, list("abcde"))
    on_gpu = select_members(table, [Cost(1.0, 1.0)] * 2, list("ab"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = select_members(table, [Cost(1.0, 1.0)] * 2, list("ab"))
    assert [s.top1 for s in on_gpu.subsets] == pytest.approx([s.top1 for s in on_cpu.subsets], abs=0.01)
