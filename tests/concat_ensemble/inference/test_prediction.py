"""Predictions: the probabilities of transformers' pipeline, for images from anywhere, in a CSV file of any reader."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import AutoModel, pipeline

from concat_ensemble import ConcatEnsembleForImageClassification, load_data
from concat_ensemble.inference.image_sources import open_images
from concat_ensemble.inference.prediction import Prediction, load_classifier, predict_images
from concat_ensemble.inference.prediction_file import escape_name, escape_path, unique_names, write_predictions

STRANGE = ['a, "quoted".png', "=CMD()|'calc'!A0.png", "line\nbreak.png", "ünïcode 图.png", "-1.png", "+x/@y.png"]


@pytest.fixture
def photos(tmp_path):
    """`photos(names)`: a folder with a noisy colour image under each name."""

    def make(names, folder="photos"):
        rng = np.random.default_rng(0)
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)
        return tmp_path / folder

    return make


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


def test_probabilities_are_those_of_the_pipeline(saved, photos):
    folder = photos([f"{k}.png" for k in range(7)])
    predictions = predict_images(saved, folder, batch_size=3, quiet=True)
    classify = pipeline("image-classification", model=str(saved), top_k=3)
    for name, predicted, shares in zip(
        predictions.names, predictions.predicted, predictions.probabilities, strict=True
    ):
        expected = {each["label"]: each["score"] for each in classify(str(folder / name))}
        assert dict(zip(predictions.class_names, shares, strict=True)) == pytest.approx(expected, abs=1e-5)
        assert predicted == max(expected, key=lambda label: expected[label])


def test_the_command_writes_the_same_probabilities_and_any_file_name(saved, photos, run):
    folder = photos(["plain.png", "deep/er/x.PNG", *STRANGE])
    code, out, err = run("predict", saved, folder, "--output", "deep/predictions.csv")
    assert code == 0 and "deep/predictions.csv: 8 images" in out and "8 of 8 images" in err
    header, *rows = read(Path("deep/predictions.csv").read_bytes().decode())
    assert header == ["file", "predicted", "cat", "dog", "emu"]
    expected = predict_images(saved, folder, quiet=True)
    assert sorted(expected.names) == sorted(["plain.png", "deep/er/x.PNG", *STRANGE])
    for row, name, predicted, shares in zip(
        rows, expected.names, expected.predicted, expected.probabilities, strict=True
    ):
        assert (folder / row[0]).samefile(folder / name) and row[1] == predicted
        assert list(map(float, row[2:])) == pytest.approx(shares.tolist(), rel=1e-5, abs=1e-5)
        assert row[0] == name or (row[0] == f"./{name}" and name[0] in "=+-@")


def test_no_cell_begins_as_a_formula(make_classifier, photos, tmp_path, run):
    make_classifier(['=HYPERLINK("x")', "@SUM(1)", "-1"]).save_pretrained(tmp_path / "evil")
    run("predict", "evil", photos(STRANGE), "--output", "x.csv", "-q")
    cells = [cell for row in read(Path("x.csv").read_text()) for cell in row]
    assert '\'=HYPERLINK("x")' in cells and "-1" in cells, "a number is no formula"
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@", "\t", "\r")]


@given(st.text(min_size=1))
def test_escaped_names_are_no_formulas_and_end_in_the_name(name):
    path, text = escape_path(name), escape_name(name)
    assert path[:1] not in tuple("=+-@\t\r\n") and text[:1] not in tuple("=+@\t\r\n")
    assert path.removeprefix("./") == name.encode("utf-8", "backslashreplace").decode().removeprefix("./")
    assert text in (name, f"'{name}") or "\\u" in text


@settings(max_examples=50)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=5), st.integers(0, 2**31), st.data())
def test_any_names_and_probabilities_come_back_from_the_file(tmp_path_factory, names, seed, data):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("any") / "x.csv"
    shares = rng.dirichlet(np.ones(len(names)), 4).astype(np.float32)
    files = data.draw(st.lists(st.text(alphabet='a,"\n\r;é\t', min_size=1, max_size=6), min_size=4, max_size=4))
    summary = write_predictions(path, "file", names, [*map(Prediction, files, shares)])
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert len(header) == len(names) + 2 and summary.num_images == 4
    assert [row[0].removeprefix("./") for row in rows] == files
    assert np.array([row[2:] for row in rows], float) == pytest.approx(shares, rel=1e-5)
    assert [row[1] for row in rows] == [escape_name(names[k]) for k in shares.argmax(axis=1)]


def test_classes_of_one_name_have_columns_of_their_own():
    assert unique_names(["crane", "owl", "crane", "file"], taken=["file"]) == [
        "crane (class 0)",
        "owl",
        "crane (class 2)",
        "file (class 3)",
    ]


def test_top_writes_the_most_probable_classes(saved, photos, run):
    folder = photos(["a.png", "b.png"])
    full = predict_images(saved, folder, quiet=True)
    code, out, _ = run("predict", saved, folder, "--top", "2", "-q")
    header, *rows = read(out)
    assert code == 0 and header == ["file", "predicted", "probability", "predicted_2", "probability_2"]
    for row, shares in zip(rows, full.probabilities, strict=True):
        order = np.argsort(-shares)
        assert [row[1], row[3]] == [full.class_names[k] for k in order[:2]]
        assert [float(row[2]), float(row[4])] == pytest.approx(shares[order[:2]].tolist(), rel=1e-5)
    assert len(read(run("predict", saved, folder, "--top", "9", "-q")[1])[0]) == 7, "no more than there are"


def test_without_an_output_the_csv_goes_to_stdout_alone(saved, photos, run):
    folder = photos(["a.png"])
    (folder / "notes.txt").write_text("no image")
    code, out, err = run("predict", saved, folder)
    assert code == 0 and [row[0] for row in read(out)] == ["file", "a.png"] and "notes.txt (1 in all)" in err
    assert run("predict", saved, folder, "--output", "-", "-q") == (0, out, "")


def test_json_says_the_same(saved, photos, run):
    folder = photos(["a.png", "b.png"])
    full = predict_images(saved, folder, quiet=True)
    printed = json.loads(run("predict", saved, folder, "--json", "-q")[1])
    assert printed["classes"] == full.class_names
    for image, name, predicted, shares in zip(
        printed["images"], full.names, full.predicted, full.probabilities, strict=True
    ):
        assert (image["file"], image["predicted"]) == (name, predicted)
        assert image["probabilities"] == pytest.approx(dict(zip(full.class_names, map(float, shares), strict=True)))
    facts = json.loads(run("predict", saved, folder, "--json", "--output", "x.csv", "-q")[1])
    assert facts["file"] == "x.csv" and facts["images"] == 2 and sum(facts["predicted"].values()) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_all_unreadable_images_are_named_and_nothing_is_written(workers, saved, photos, refused, run):
    folder = photos([f"{k}.png" for k in range(6)])
    (folder / "1.png").write_text("text")
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes()[:200])
    PILImage.new("L", (1, 1)).save(folder / "5.png")
    words = ["predict", saved, folder, "--batch-size", "2", "--workers", workers, "-q"]
    refused([*words, "--output", "x.csv"], "3 images cannot be read", "1.png", "4.png", "5.png", "--skip-bad")
    refused(words, "3 images cannot be read")
    code, out, _ = run(*words, "--skip-bad")
    rows = read(out)[1:]
    assert code == 0 and [row[0] for row in rows] == [f"{k}.png" for k in range(6)]
    assert [k for k, row in enumerate(rows) if row[1:] == [""] * 4] == [1, 4, 5]
    predictions = predict_images(saved, folder, skip_bad=True, quiet=True)
    assert set(predictions.problems) == {"1.png", "4.png", "5.png"}
    assert [k for k, name in enumerate(predictions.predicted) if name is None] == [1, 4, 5]
    assert np.isnan(predictions.probabilities[[1, 4, 5]]).all() and "3 unreadable" in repr(predictions)


def test_many_unreadable_images_are_counted(saved, tmp_path):
    (tmp_path / "bad").mkdir()
    for k in range(25):
        (tmp_path / "bad" / f"{k:02}.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"25 images cannot be read: 00.jpg .*19.jpg .*and 5 more") as error:
        predict_images(saved, tmp_path / "bad", quiet=True)
    assert "20.jpg" not in str(error.value) and "\n" not in str(error.value)
    predictions = predict_images(saved, tmp_path / "bad", skip_bad=True, quiet=True)
    assert predictions.predicted == [None] * 25


def test_hidden_files_and_other_files_are_left_out(photos):
    folder = photos(["b/2.png", "a/1.png", "._a.png", ".cache/x.png", "z.TIFF", "y.webp"])
    (folder / "figure.eps").write_text("%!PS")  # which PIL would hand to another program
    source = open_images(folder)
    assert source.names == ["a/1.png", "b/2.png", "y.webp", "z.TIFF"] and source.ignored == ["figure.eps"]
    assert open_images(f"imagefolder:{folder}").names == source.names
    assert open_images(folder / "z.TIFF").names == ["z.TIFF"]


def test_lists_of_paths_and_of_images(saved, photos):
    folder = photos(["a.png", "b.png"])
    paths = [folder / "b.png", folder / "a.png"]
    by_path, by_image = predict_images(saved, paths), predict_images(saved, [PILImage.open(path) for path in paths])
    assert by_path.names == list(map(str, paths)) and by_image.names == ["0", "1"] and by_image.heading == "row"
    assert np.array_equal(by_path.probabilities, by_image.probabilities)


def test_a_dataset_needs_no_labels(saved, digits, tmp_path, run):
    data = DatasetDict({kind: split.remove_columns("label") for kind, split in digits.items()})
    data.save_to_disk(tmp_path / "data")
    expected = predict_images(saved, digits["test"], quiet=True).probabilities
    header, *rows = read(run("predict", saved, "data", "--split", "test", "-q")[1])
    assert header[0] == "row" and [row[0] for row in rows] == [str(k) for k in range(len(digits["test"]))]
    assert np.array([row[2:] for row in rows], float) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    part = predict_images(saved, data, split="train[:4]", quiet=True)
    assert len(part) == 4 and part.heading == "row"
    by_default = predict_images(saved, data, quiet=True)
    assert np.array_equal(by_default.probabilities, expected), "the test split"


def test_a_missing_image_of_a_dataset_is_named(saved, digits):
    rows = Dataset.from_dict({"image": [digits["test"][0]["image"], None]}, features=None)
    rows = rows.cast_column("image", digits["test"].features["image"])
    with pytest.raises(ValueError, match="image 1 cannot be read: the row has no image"):
        predict_images(saved, rows, quiet=True)


def test_a_loaded_model_predicts_as_it_is_and_stays_so(saved, photos):
    folder = photos(["a.png", "b.png"])
    model = ConcatEnsembleForImageClassification.from_pretrained(saved).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probabilities = predict_images(model, folder, quiet=True).probabilities
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert probabilities == pytest.approx(predict_images(saved, folder, quiet=True).probabilities, abs=1e-5)


def test_a_classifier_is_folded(saved):
    from concat_ensemble.inference.folding import FoldedBatchNorm

    assert any(isinstance(module, FoldedBatchNorm) for module in load_classifier(saved).modules())


def test_models_that_do_not_predict_a_class_are_refused(folder, make_classifier, photos, tmp_path, refused):
    images = photos(["a.png"])
    refused(
        ["predict", "pair", images], "pair has no classification head", "concat-ensemble probe pair", "--save-head"
    )
    refused(["predict", images, images], "holds no model", "concat-ensemble build")
    refused(["predict", "no-such-model", images], "no such folder: no-such-model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "resnet"}')
    refused(["predict", "other", images], "'resnet', not an ensemble")
    several = {"problem_type": "multi_label_classification"}
    make_classifier(["a", "b"], **several).save_pretrained(tmp_path / "several")
    refused(["predict", "several", images], "multi_label_classification", "one of two or more classes")
    with pytest.raises(ValueError, match="no classification head"):
        predict_images(AutoModel.from_pretrained(folder), images)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonesuch"], ["no dataset 'nonesuch'"]),
        (["empty"], ["empty has no image", "name a folder of images"]),
        (["texts"], ["no image among 1 files"]),
        (["texts/x.txt"], ["x.txt is a .txt", "give a folder of images"]),
        (["photos", "--split", "test"], ["split go with a dataset"]),
        (["data", "--split", "holdout"], ["holdout", "train"]),
        (["data", "--image-column", "photo"], ["no column 'photo'"]),
        (["photos", "--output", "photos"], ["photos is a folder"]),
        (["photos", "--output", "photos", "--overwrite"], ["photos is a folder"]),
    ],
)
def test_images_that_are_none_are_refused(words, said, saved, photos, digits, tmp_path, refused):
    photos(["a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("x")
    digits.save_to_disk(tmp_path / "data")
    refused(["predict", saved, *words, "-q"], *said)


def test_an_output_that_is_there_is_kept_without_overwrite(saved, photos, run, refused):
    folder = photos(["a.png"])
    Path("x.csv").write_text("mine")
    refused(["predict", saved, folder, "--output", "x.csv"], "x.csv is there already", "--overwrite")
    assert run("predict", saved, folder, "--output", "x.csv", "--overwrite", "-q")[0] == 0
    assert Path("x.csv").read_text().startswith("file,")


SLOW = """
import sys, time
from concat_ensemble.console import be_quiet
be_quiet()  # as the command does before it imports the libraries
from concat_ensemble.inference import prediction
predict = prediction._predict
def slowly(model, pixels):
    print("batch", flush=True, file=sys.stderr)
    time.sleep(0.5)
    return predict(model, pixels)
prediction._predict = slowly
from concat_ensemble.commands.app import main
main()
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_kill_leaves_no_half_written_file(signal_number, saved, photos, tmp_path):
    folder = photos([f"{k:02}.png" for k in range(40)])
    (tmp_path / "x.csv").write_text("before")
    words = ["predict", saved, folder, "--batch-size", "1", "--output", "x.csv", "--overwrite", "-q"]
    program = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler)\n{SLOW}"]
    process = subprocess.Popen([*program, *map(str, words)], cwd=tmp_path, stderr=subprocess.PIPE, env=os.environ)
    lines = [process.stderr.readline() for _ in range(3)]
    process.send_signal(signal_number)
    rest = process.communicate(timeout=60)[1].decode()
    assert lines[0] == b"batch\n" and (tmp_path / "x.csv").read_text() == "before"
    if signal_number == signal.SIGINT:
        assert process.returncode == 130 and "x.csv: nothing was written" in rest and "Traceback" not in rest
        assert "stopped; the same command begins again" in rest
        assert not list(tmp_path.glob(".x.csv*"))


def test_scattered_digits_are_those_of_load_data():
    source, expected = open_images("scattered:digits"), load_data("scattered:digits")["test"]
    assert len(source) == len(expected) and source.heading == "row"
    assert np.array_equal(source.read(5), PILImage.open(io.BytesIO(expected[5]["image"]["bytes"])))
