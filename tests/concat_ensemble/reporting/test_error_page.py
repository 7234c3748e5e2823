"""The page of mistakes and its figures: the right mistakes and counts, and nothing that a stranger's text could do."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from concat_ensemble.data.images import encode_image
from concat_ensemble.reporting.confusion import class_recalls, confusion_matrix, shorten, shown_classes
from concat_ensemble.reporting.error_figures import plot_class_recall, plot_confusion_matrix
from concat_ensemble.reporting.error_page import write_error_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Tags with attributes, the texts of the mistakes, and the rows of the tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.mistakes, self.inside = [], [], [], []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "li":
            self.mistakes.append([])

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, "every element is closed"

    def handle_data(self, data):
        if self.inside and self.inside[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif "li" in self.inside and data.strip():
            self.mistakes[-1].append(data.strip())


def grey(level, side=8, path=None):
    return encode_image(np.full((side, side), level, np.uint8)) | {"path": path}


NAMES = ["cat", "dog", "owl"]
LABELS = np.array([0, 0, 1, 1, 2, 2])
PROBABILITIES = np.array(
    [[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.0, 1.0, 0.0], [0.15, 0.1, 0.75], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7]]
)


@pytest.fixture
def write(tmp_path):
    """`write(number, ...)`: the page of six images, of which 1, 3 and 4 are mistakes."""

    def write(number=10, names=NAMES, images=None, labels=LABELS, probabilities=PROBABILITIES):
        images = [grey(40 * k, path=f"/home/me/{k}.png") for k in range(6)] if images is None else images
        return Page(write_error_page(tmp_path / "errors.html", images, labels, probabilities, names, number))

    return write


def test_the_most_confident_mistakes_come_first_with_their_images(write):
    page = write()
    assert page.mistakes == [
        ["image 3 (3.png)", "predicted", "owl", "75.0%", "label", "dog 10.0%"],
        ["image 1 (1.png)", "predicted", "dog", "60.0%", "label", "cat 30.0%"],
        ["image 4 (4.png)", "predicted", "cat", "50.0%", "label", "owl 30.0%"],
    ]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    levels = [np.unique(PILImage.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))).tolist() for s in sources]
    assert levels == [[120], [40], [160]]
    assert "3 of 6 images are classified wrongly (50.0%)" in page.text
    assert write(2).mistakes == page.mistakes[:2] and write(0).mistakes == []
    assert "/home/me" not in page.text, "the folder may be private"


def test_recalls_confusions_and_the_matrix(write):
    confusions, recalls, matrix = write().tables
    assert sorted(confusions[1:]) == [
        ["cat", "dog", "1", "50.0"],
        ["dog", "owl", "1", "50.0"],
        ["owl", "cat", "1", "50.0"],
    ]
    interval = binomtest(1, 2).proportion_ci(method="wilson")
    texts = "50.0", f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]", "1 of 2"
    assert recalls[1:] == [[name, *texts] for name in NAMES]
    assert matrix == [["label", *NAMES], ["cat", "1", "1", ""], ["dog", "", "1", "1"], ["owl", "1", "", "1"]]


def test_a_page_without_mistakes(write):
    page = write(labels=PROBABILITIES.argmax(axis=1))
    assert page.mistakes == [] and "0 of 6 images" in page.text and len(page.tables) == 2


def test_many_classes_are_shown_in_part(tmp_path):
    labels = np.repeat(np.arange(250), 2)
    probabilities = np.eye(250)[np.where(np.arange(500) % 10 == 0, (labels + 1) % 250, labels)]
    page = Page(
        write_error_page(tmp_path / "x.html", [grey(0)] * 500, labels, probabilities, [f"c{k}" for k in range(250)], 3)
    )
    confusions, recalls, matrix = page.tables
    assert len(recalls) == 201 and "200 of 250 classes" in page.text and len(confusions) == 21
    assert len(matrix) == 31 and "30 classes of the lowest recall, of 250" in page.text
    for row in matrix[1:]:  # of each of these classes one image is right and one goes to another class
        assert sum(int(cell or 0) for cell in row[1:]) == 2 and len(row) == 32


EVIL = ["<script>alert(1)</script>", '" onerror="alert(1)', "</table></ul><h1>", "{{ 7 * 7 }}", "&lt;"]


@pytest.mark.parametrize("text", EVIL)
def test_names_from_strangers_are_text(text, write):
    def shape(page):
        return [(tag, sorted(attributes)) for tag, attributes in page.tags]

    clean = write(images=[grey(40 * k, path="x.png") for k in range(6)])
    images = [grey(40 * k, path=text.replace("/", "|")) for k in range(6)]
    page = write(names=[text, "dog", "owl"], images=images)
    assert shape(page) == shape(clean)
    assert page.tables[1][1][0] == text and page.mistakes[0][0] == f"image 3 ({text.replace('/', '|')})"


def test_a_name_that_is_not_unicode(write):
    page = write(images=[grey(0, path="caf\udce9.png")] * 6)
    assert page.mistakes[0][0] == "image 3 (caf\\udce9.png)"


def test_the_page_loads_nothing_and_runs_nothing(write):
    page = write()
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "a")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert tag != "img" or attributes["src"].startswith("data:image/")
    assert "default-src 'none'" in page.text and "url(" not in page.text and "@import" not in page.text
    assert "prefers-color-scheme: dark" in page.text and 'content="width=device-width' in page.text


def test_thumbnails_are_small_upright_and_without_the_place_where_they_were_taken(tmp_path):
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[:, :300] = 255  # white on the left; upright, on top
    exif, buffer = PILImage.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "SECRET PLACE"
    PILImage.fromarray(pixels).save(buffer, "jpeg", exif=exif)
    images = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": b"text", "path": "bad.png"}, None]
    text = write_error_page(
        tmp_path / "x.html", images, np.zeros(3, int), np.eye(2)[[1, 1, 1]], ["a", "b"], 3
    ).read_text()
    source = re.search(r'src="data:image/jpeg;base64,([^"]*)"', text)[1]
    image = PILImage.open(io.BytesIO(base64.b64decode(source)))
    assert image.size == (128, 256) and not image.getexif() and b"SECRET" not in base64.b64decode(source)
    assert np.asarray(image)[:120].min() > 200 and np.asarray(image)[136:].max() < 50
    assert text.count("cannot be read") == 2, "a page is written all the same"


def test_a_big_page_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    PILImage.fromarray(rng.integers(0, 255, (1500, 1500, 3)).astype(np.uint8)).save(buffer, "png")
    images = [{"bytes": buffer.getvalue(), "path": None}]
    path = write_error_page(tmp_path / "x.html", images, np.array([0]), np.array([[0.1, 0.9]]), ["a", "b"], 1)
    assert path.stat().st_size < 100_000 < len(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"number": -1}, "number=-1"),
        ({"labels": LABELS[:5]}, r"labels \(5,\)"),
        ({"names": ["a", "b"]}, "2 class names"),
        ({"labels": LABELS + 1}, "from 0 to 2"),
        ({"labels": LABELS / 1.0}, "class numbers"),
        ({"probabilities": np.where(PROBABILITIES == 0.9, np.nan, PROBABILITIES)}, "NaN"),
        ({"images": []}, "0 images"),
    ],
)
def test_what_does_not_go_together_is_named_and_nothing_is_written(change, said, write, tmp_path):
    with pytest.raises(ValueError, match=said):
        write(**change)
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
def test_counts_are_those_of_scikit_learn(num_classes, pairs):
    labels, predicted = np.array(pairs).T % num_classes
    confusion = confusion_matrix(labels, predicted, num_classes)
    assert np.array_equal(confusion, sklearn_confusion_matrix(labels, predicted, labels=range(num_classes)))
    recalls = class_recalls(confusion.diagonal(), confusion.sum(axis=1))
    assert {one.number for one in recalls} == set(labels.tolist())
    assert [one.recall for one in recalls] == sorted(one.recall for one in recalls)
    for one in recalls:
        assert one.recall == pytest.approx(np.mean(predicted[labels == one.number] == one.number))
        expected = binomtest(one.correct, one.images).proportion_ci(method="wilson")
        assert one.interval == pytest.approx((expected.low, expected.high), abs=1e-4)
        assert 0 <= one.interval[0] <= one.recall + 1e-9 and one.recall - 1e-9 <= one.interval[1] <= 1


def test_the_worst_classes_are_shown():
    recalls = class_recalls(np.array([5, 1, 0, 9]), np.array([10, 10, 0, 10]))
    assert [one.number for one in recalls] == [1, 0, 3], "a class without images has no recall"
    assert shown_classes(recalls, 4, 2) == [0, 1] and shown_classes(recalls, 4, 4) == [0, 1, 2, 3]


def test_long_names_keep_their_beginning_and_end():
    assert shorten("x" * 24) == "x" * 24 and shorten("Canada goose, male, in winter 17") == "Canada goose…n winter 17"
    assert len(shorten("a" * 300)) <= 24


@pytest.mark.parametrize("plot", [plot_confusion_matrix, plot_class_recall])
@pytest.mark.parametrize("num_classes", [1, 2, 15, 31, 120])
def test_figures_of_any_number_of_classes(plot, num_classes, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 400)
    confusion = confusion_matrix(labels, np.where(rng.random(400) < 0.7, labels, 0), num_classes)
    names = [r"$\frac{1}{$ & <b>", *(f"class {k}" for k in range(1, num_classes))]
    plot(confusion, names, tmp_path / "figures" / "x.png")
    image = np.asarray(PILImage.open(tmp_path / "figures" / "x.png").convert("RGB")).astype(int)
    assert max(image.shape) < 2500 and (np.ptp(image, axis=2) > 40).sum() > 300, "something blue"


def test_a_figure_shades_the_cell_of_the_true_row_and_the_predicted_column(tmp_path):
    """All dogs are taken for cats: the only dark cells are at (cat, cat) and (dog, cat), on the left."""
    plot_confusion_matrix(np.array([[4, 0], [6, 0]]), ["cat", "dog"], tmp_path / "x.png")
    image = np.asarray(PILImage.open(tmp_path / "x.png").convert("RGB")).astype(int)
    dark = np.abs(image - (8, 48, 107)).max(axis=2) < 12
    columns = np.flatnonzero(dark.sum(axis=0) > 0.5 * dark.sum(axis=0).max())
    assert columns.max() < image.shape[1] / 2


@pytest.mark.parametrize("plot", [plot_confusion_matrix, plot_class_recall])
def test_a_matrix_that_is_none_is_refused(plot, tmp_path):
    for confusion in (np.eye(3, dtype=int), np.eye(2), -np.eye(2, dtype=int), np.arange(2)):
        with pytest.raises(ValueError, match=r"must be \(2, 2\) numbers of images"):
            plot(confusion, ["a", "b"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no images"):
        plot_class_recall(np.zeros((2, 2), int), ["a", "b"], tmp_path / "x.png")


DRIVER = """<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe").contentDocument;
  const fits = frame.documentElement.scrollWidth <= frame.documentElement.clientWidth;
  const images = [...frame.images].every((image) => image.naturalWidth > 0 && image.width > 100);
  document.title = `${frame.title}|${fits}|${images}`;
});
</script><iframe src="errors.html" style="width: 390px; height: 800px; border: 0"></iframe>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_it_on_a_phone(write, tmp_path):
    write(names=["a" * 60, "dog", "owl"])
    (tmp_path / "driver.html").write_text(DRIVER)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [BROWSER, *options, (tmp_path / "driver.html").as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title, fits, images = re.search("<title>(.*?)</title>", process.stdout)[1].split("|")
    assert title == "Errors on the test images" and fits == images == "true"
    assert "CONSOLE" not in process.stderr, process.stderr
