"""Hypothesis tries the same examples every time: a test that passed once passes again. Where pytest runs a worker on
each core, each keeps to its own.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, here or in what a test starts
    os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

# The longest first.
LONGEST_FILES = [
    "test_docs.py",
    "test_hub.py",
    "test_app.py",
    "test_notebooks.py",
    "test_pretrain_members.py",
    "test_probing.py",
    "test_remote_code.py",
    "test_compare.py",
    "test_flows.py",
    "test_wheel.py",
    "test_rebuilding.py",
    "test_kills.py",
    "test_prediction.py",
    "test_trainer.py",
    "test_select.py",
]


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would start the files with the most tests first, not the longest


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that none of them runs alone at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
