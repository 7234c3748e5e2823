"""Fixtures of the training tests that the experiments need, too."""

from tests.training.conftest import own_accelerator, script

__all__ = ["own_accelerator", "script"]
