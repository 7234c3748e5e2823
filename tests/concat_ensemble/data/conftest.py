"""Datasets whose images are never opened: an image is the bytes of a number."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value


@pytest.fixture(scope="session")
def numbered():
    """`numbered(images, labels)`: a row for each number of an image and each label, with `group` if wanted."""

    def make(images, labels, group=None, names=None) -> Dataset:
        names = names or [f"c{number}" for number in range(max(labels) + 1)]
        features = Features(image=Image(decode=False), label=ClassLabel(names=names))
        columns = {"image": [{"bytes": b"%d" % image, "path": None} for image in images], "label": list(labels)}
        if group is not None:
            features["patient"] = Value("string" if isinstance(group[0], str) else "int64")
            columns["patient"] = list(group)
        return Dataset.from_dict(columns, features=features)

    return make
