"""Hypothesis tries the same examples every time: a test that passed once passes again. Where pytest runs a worker on
each core, each keeps to its own.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, here or in what a test starts
    os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

LONGEST_FILES = ("test_docs.py", "test_compare.py", "test_pretrain_members.py", "test_wheel.py")


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)
