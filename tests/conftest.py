"""Hypothesis tries the same examples every time: a test that passed once passes again."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
