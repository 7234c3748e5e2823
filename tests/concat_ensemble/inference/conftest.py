"""Folders of photographs."""

import numpy as np
import pytest
from PIL import Image as PILImage


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """`class_folders(names)`: a folder with ten noisy images in a folder of each name, brighter the later it comes."""

    def make(names):
        rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("classes")
        for level, name in enumerate(names):
            (folder / name).mkdir()
            for k in range(10):
                pixels = rng.integers(60 * level, 60 * level + 60, (24, 24, 3)).astype(np.uint8)
                PILImage.fromarray(pixels).save(folder / name / f"{k}.png")
        return folder

    return make
