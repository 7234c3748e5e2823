"""The scripts' fixtures serve the library beneath them, too."""

from tests.training.conftest import own_accelerator, script

__all__ = ["SMALL", "own_accelerator", "script"]

# Fields of a recipe that trains a network of a few thousand weights on 64 scattered digits.
SMALL = {
    "dataset": "digits",
    "limit": 64,
    "augmentation": "scatter",
    "architecture": "resnet10t",
    "model_args": {"in_chans": 1, "channels": [4, 4, 8, 8], "stem_width": 4},
    "input_size": [1, 32, 32],
    "members": [1],
}
