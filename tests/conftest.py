"""Hypothesis tries the same examples every time: a test that passed once passes again. Where pytest runs a worker on
each core, each keeps to its own.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, here or in what a test starts
    os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
