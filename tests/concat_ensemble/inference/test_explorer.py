"""What an ensemble and its members say of an image is what predictions, probes and cosines give one by one."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from concat_ensemble import LinearProbe, extract_features, predict_images
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.inference.explorer import NUM_NEIGHBORS, load_explorer

QUIET = ExtractionOptions(quiet=True)


@pytest.fixture(scope="module")
def photographs(class_folders):
    return class_folders(["a", "b", "c"])


@pytest.fixture(scope="module")
def dataset(photographs):
    return DatasetOptions(name=f"imagefolder:{photographs}")


@pytest.fixture(scope="module")
def explorer(saved, dataset):
    return load_explorer(str(saved), dataset, QUIET)


@pytest.fixture(scope="module")
def training(ensemble, dataset):
    """The splits, and the table of their features."""
    data = dataset.load().data
    return data, extract_features(ensemble, data, quiet=True)


def test_the_ensemble_says_what_predictions_say(explorer, saved, photographs):
    photo = photographs / "b" / "3.png"
    expected = predict_images(saved, photo, quiet=True)
    shares = dict(zip(expected.class_names, expected.probabilities[0], strict=True))
    opinion, *members = explorer.answer(photo)
    assert dict(opinion.classes) == pytest.approx(shares, abs=1e-5) and len(members) == 2
    assert opinion.classes == sorted(opinion.classes, key=lambda pair: -pair[1])
    (alone,) = load_explorer(str(saved)).answer(photo)
    assert dict(alone.classes) == pytest.approx(shares, abs=1e-5) and alone.neighbors == []


def test_each_member_says_what_its_own_probe_says(explorer, training, photographs):
    data, table = training
    photo = photographs / "c" / "1.png"
    split, row = _find(data, photo)
    for position, opinion in enumerate(explorer.answer(photo)[1:]):
        own = table.members([position])
        probe = LinearProbe().fit(own["train"], validation=own["validation"])
        shares = probe.predict_proba(own[split])[row]
        expected = {table.class_names[k]: share for k, share in zip(probe.classes_, shares, strict=True)}
        assert opinion.name == f"Member {position}" and "resnet10t" in opinion.detail
        assert dict(opinion.classes) == pytest.approx(expected, abs=1e-3)


def test_the_nearest_images_have_the_highest_cosines(explorer, training, photographs):
    data, table = training
    photo = photographs / "a" / "2.png"
    split, row = _find(data, photo)
    cosines = []
    for position in range(2):
        bank, query = (np.asarray(table.members([position])[name], np.float64) for name in ("train", split))
        bank, query = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, query))
        cosines.append(bank @ query[row])
    names = [table.class_names[label] for label in table["train"].labels]
    for opinion, expected in zip(explorer.answer(photo), [np.mean(cosines, axis=0), *cosines], strict=True):
        order = np.argsort(-expected)[:NUM_NEIGHBORS]
        found = [neighbor.cosine for neighbor in opinion.neighbors]
        assert found == pytest.approx(expected[order], abs=1e-4)
        assert [neighbor.label for neighbor in opinion.neighbors] == [names[k] for k in order]
        assert all(neighbor.image.startswith("data:image/png;base64,") for neighbor in opinion.neighbors)


def test_an_ensemble_without_a_head_gets_one_from_the_dataset(folder, training, dataset, photographs):
    with pytest.raises(ValueError, match=r"pair has no classification head; fit one .* --save-head"):
        load_explorer(str(folder))
    data, table = training
    photo = photographs / "b" / "7.png"
    split, row = _find(data, photo)
    probe = LinearProbe().fit(table["train"], validation=table["validation"])
    shares = probe.predict_proba(table[split])[row]
    opinion = load_explorer(str(folder), dataset, QUIET).answer(photo)[0]
    expected = dict(zip(table.class_names, shares, strict=True))
    assert dict(opinion.classes) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["cut.jpg", "text.png", "empty.png", "bomb.png", "dot.png", "nan.tif"])
def test_an_image_that_cannot_be_read_is_named(name, explorer, bad_images, tmp_path):
    (tmp_path / name).write_bytes(bad_images[name]["bytes"])
    with pytest.raises(ValueError, match=name) as error:
        explorer.answer(tmp_path / name)
    assert str(tmp_path) not in str(error.value)


def test_a_photograph_taken_sideways_is_set_upright(explorer, tmp_path):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3)).astype(np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture.save(tmp_path / "upright.png")
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    upright, sideways = (explorer.answer(tmp_path / f"{name}.png")[0] for name in ("upright", "sideways"))
    assert dict(upright.classes) == pytest.approx(dict(sideways.classes), abs=1e-6)


def _is_file(encoded: dict, photo: Path) -> bool:
    return encoded["bytes"] == photo.read_bytes() if encoded["bytes"] else Path(encoded["path"]) == photo


def _find(data, photo: Path) -> tuple[str, int]:
    """Split and row of a photograph."""
    places = [(split, row) for split in data for row, one in enumerate(data[split]["image"]) if _is_file(one, photo)]
    assert len(places) == 1
    return places[0]
