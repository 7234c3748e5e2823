"""The page of `concat-ensemble report`: its content, that it needs no other file, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from concat_ensemble.reporting.html_report import write_report
from concat_ensemble.studies.overlap_results import Overlap, Relation, Subject
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection_results import Contribution, Selection, Subset

SCRIPT = '<script>document.title = "evil"</script>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Tags, attributes and the cells of the tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def two(study, tmp_path):
    """Folders of two ensembles on two datasets, one with a selection and an overlap."""
    for name, dataset in (("one", "digits"), ("two", "digits"), ("two", "flowers")):
        study({"name": dataset}, pair=[0.9], cat1=[0.8], **{"raw pixels": [0.123]}).save(
            tmp_path / name / f"results/{dataset}.json"
        )
    selection = Selection(
        names=["resnet18"],
        feature_dims=[512],
        costs=[Cost(1.5, 2)],
        subsets=[Subset((0,), 0.75, 0.1, Cost(1.5, 2))],
        contributions=[Contribution(0, True, 0.25, (0.2, 0.3), None, None)],
        similarity=[[1.0]],
        best=(0,),
        greedy_order=[],
        n_train=9,
        n_held_out=9,
        probe={},
    )
    selection.save(tmp_path / "two/selection/digits.json")
    relation = Relation((1,), "b", 0, 0.5, 0.97, 0.1, [0.97], 0.11, (0.05, 0.2))
    relations = [relation, replace(relation, sources=(0,), source_name="a", target=1, r2=0.12)]
    overlap = Overlap([Subject("a", 1, 0.0, 1.0, 0.8), Subject("b", 1, 0.0, 1.0, 0.7)], relations, 0.1, 9, 9, 9)
    overlap.save(tmp_path / "two/overlap/digits.json", dataset={"name": "digits"})
    (tmp_path / "one/config.json").write_text("{}")
    return [tmp_path / "one", tmp_path / "two"]


def test_the_page_has_every_row_and_what_members_add_and_predict(two, tmp_path):
    text = write_report(two, tmp_path / "page/x.html").read_text()
    rows = Page(text).rows
    assert len(rows) == 1 + 6 + 1 + 3 + 2 + 3  # headings and results on two datasets, selection, overlap
    (heading, *digits), (alone, *flowers) = rows[:7], rows[7:11]
    assert heading[:4] == alone[:4] == ["", "top-1", "95% interval", "ensemble minus it, paired"]
    assert {tuple(row[:2]) for row in digits} == {
        (f"{folder.name}: {name}", top1)
        for folder in two
        for name, top1 in (("pair", "90.0"), ("cat1", "80.0"), ("raw pixels", "12.3"))
    }
    assert [row[0] for row in flowers] == ["pair", "cat1", "raw pixels"], "the best first"
    assert ["0: resnet18", "yes", "+25.0 [+20.0, +30.0]", ""] in rows
    assert ["a", "b", "0.97", "0.10", "0.50", "11.0"] in rows and "a repeats b: R2 0.97" in text
    assert write_report(two, tmp_path / "again.html").read_text() == text


def test_a_page_is_made_of_files_of_version_1(two, tmp_path):
    """The files beside the tests of `studies` were written by 0.1.0."""
    for kind in ("selection", "overlap"):
        source = Path(__file__).parents[1] / "studies" / f"{kind}-version-1.json"
        shutil.copy(source, two[1] / kind / "digits.json")
    text = write_report(two, tmp_path / "x.html").read_text()
    assert "1: parity" in text and "copy repeats halves: R2 1.00" in text


def test_the_page_loads_nothing_and_runs_one_script(two, tmp_path):
    text = write_report(two, tmp_path / "x.html").read_text()
    elements = Page(text).tags
    assert [tag for tag, _ in elements].count("script") == 1 and [tag for tag, _ in elements].count("svg") == 2
    for tag, attributes in elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in text and "url(" not in re.sub(r"url\(#\w+\)", "", text)


def tags(page):
    """The tags outside of the figures, which have a panel for each dataset."""
    return [tag for tag, _ in Page(re.sub("(?s)<svg.*?</svg>", "<svg></svg>", page)).tags]


@pytest.mark.parametrize(
    "text", [SCRIPT, '" onmouseover="alert(1)', "</table></svg><h1>", "{{ 7 * 7 }}", r"$\frac{1}$", "&lt;"]
)
def test_names_from_strangers_are_text(text, two, tmp_path):
    def rename(text, page, *names):
        for path in two[1].rglob("*.json"):
            path.write_text(re.sub("|".join(map(json.dumps, names)), lambda _: json.dumps(text), path.read_text()))
        return write_report(two, tmp_path / page).read_text()

    clean = rename("harmless", "x.html", "digits", "pair", "resnet18", "b")
    page = rename(text, "y.html", "harmless")
    assert tags(page) == tags(clean)
    assert (
        any(text.split()[0] in cell for row in Page(page).rows for cell in row) and "49" not in page.split("<svg")[0]
    )


@pytest.mark.parametrize("name", ["results", "selection", "overlap"])
def test_a_file_that_is_broken_is_named_and_nothing_is_written(name, two, run, tmp_path):
    path = next((two[1] / name).glob("*.json"))
    content = json.loads(path.read_text())
    content[{"results": "rows", "selection": "contributions", "overlap": "relations"}[name]] = [5]
    path.write_text(json.dumps(content))
    code, _, err = run("report", *two, "--output", "x.html")
    assert code == 2 and str(path) in err and not (tmp_path / "x.html").exists()


def test_the_command_writes_the_page_once(two, run, tmp_path):
    code, out, _ = run("report", *two, "--output", "x.html")
    assert code == 0 and "x.html" in out
    assert run("report", *two, "--output", "x.html")[0] == 2
    (tmp_path / "empty").mkdir()
    code, _, err = run("report", "empty", "--output", "y.html")
    assert code == 2 and "empty has no results" in err


# Sorts by top-1 twice, as a reader would, and reports what it sees.
DRIVER = """<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe").contentDocument;
  const head = [...frame.querySelectorAll("th button")].find((button) => button.textContent === "top-1");
  const column = () => [...frame.querySelector("tbody").rows].map((row) => row.cells[1].textContent).join(" ");
  head.click(); const up = column(); head.click(); const down = column();
  const fits = frame.documentElement.scrollWidth <= frame.documentElement.clientWidth;
  document.title = `${frame.title}|${up}|${down}|${fits}`;
});
</script><iframe src="x.html" style="width: 360px; height: 640px; border: 0"></iframe>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_sorts_and_fits_it_on_a_phone(two, tmp_path):
    write_report(two, tmp_path / "x.html")
    (tmp_path / "driver.html").write_text(DRIVER)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [BROWSER, *options, (tmp_path / "driver.html").as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title, up, down, fits = re.search("<title>(.*?)</title>", process.stdout)[1].split("|")
    assert title == "Ensembles compared" and fits == "true"
    assert up.split() == sorted(up.split(), key=float) and down.split() == up.split()[::-1] and len(up.split()) == 6
    assert "CONSOLE" not in process.stderr, process.stderr
