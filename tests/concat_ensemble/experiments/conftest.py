"""The scripts' fixtures serve the library beneath them, too."""

from tests.training.conftest import own_accelerator, script

__all__ = ["own_accelerator", "script"]
