"""Names of files, rows, datasets, classes and members, and what a provenance says, are text wherever they are shown:
on a card, a page, a figure and a terminal. What has an evil name has the structure of what has a plain one.
"""

import csv
import io
import json
import logging
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.table import Table

from concat_ensemble import console
from concat_ensemble.commands import build, cache, compare, options, probe
from concat_ensemble.commands.app import main
from concat_ensemble.console import PlainConsole, be_quiet, describe_progress, printable, show_progress, stack_lines
from concat_ensemble.inference.prediction_file import write_predictions
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.reporting import model_card
from concat_ensemble.reporting.card_index import index_text
from concat_ensemble.reporting.error_figures import plot_class_recall, plot_confusion_matrix
from concat_ensemble.reporting.error_page import write_error_page
from concat_ensemble.reporting.figures import plot_accuracy_against_members
from concat_ensemble.reporting.html_report import write_report
from concat_ensemble.reporting.rendering import escape_text, make_html_environment, make_markdown_environment, one_line
from concat_ensemble.studies.overlap_results import Overlap, Relation, Subject
from concat_ensemble.studies.results import Cost, Results

PLAIN = "a plain name"
NAMES = {
    "a tag": "<img src=x onerror=alert(1)>",
    "a script": "</td></tr></table><script>alert(1)</script>",
    "a comment": "--> <!-- x",
    "a link": "a](javascript:x)",
    "an image": "![x](javascript:1)",
    "an automatic link": "<javascript:x> <a@b.c>",
    "a definition": "[x]: javascript:1",
    "a pipe": "a | b",
    "a row of a table": "|---|---|",
    "backticks": "```\n`x` ``y``",
    "tildes": "~~~",
    "a heading": "# x #",
    "a line under a heading": "===",
    "a rule": "---",
    "front matter": "---\nlicense: mit\n---",
    "an item": "- x",
    "a numbered item": "1. x",
    "a quotation": "> x",
    "emphasis": "_x_ __y__ *z* **w** ~~v~~",
    "an entity": "&lt;script&gt; &#60;b&#62;",
    "backslashes": "\\<img src=x>\\ \\",
    "maths": "$\\frac{",
    "maths of the Hub": "$$x$$ \\(y\\)",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "lines": "a\n\n# forged\n\nerror: forged",
    "a carriage return": "a\rerror: forged",
    "other line ends": "a\x0bb\x0cc\x85d\u2028e\u2029f",
    "rich's markup": "[bold red]x[/] [link=javascript:x]y[/link] [/] [",
    "an emoji code": ":skull: [not bold]",
    "escape sequences": "\x1b]8;;http://evil.example\x1b\\x\x1b[2J\x1b[1;1H\x07",
    "C1 controls": "\x9b31mx\x90y\x9c\x84",
    "another direction": "\u202egnp.exe \u2066x\u200f",
    "invisible letters": "\U000e0041\u200b\u2060x\ufeff\x7f",
    "nothing": "\0\x01 x",
    "no Unicode": "caf\udce9",
    "a YAML tag": "!!python/object/apply:os.system [x]",
}
EVERY_NAME = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
STRANGE = ("$\\frac{", "caf\udce9", NAMES["lines"], NAMES["escape sequences"], NAMES["nothing"], NAMES["C1 controls"])
IN_FILES = {kind: name for kind, name in NAMES.items() if "/" not in name and "\0" not in name}


def is_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


# --- Markdown


def describe(folder: Path, name: str) -> dict[str, str]:
    """The texts of the ensemble's files, all of whose names are `name`, by the names of the files."""
    config, studies = model_card._read(folder)
    for number, key in enumerate(config.built_members):
        keys = ("source", "license", "pretraining_data", "command", "ensemble_recipe", "revision")
        own = dict.fromkeys(keys, name) | {"hub_id": "org/name" if number else name, "recipe": {"dataset": name}}
        config.members[key]["provenance"] |= own
    study = studies["digits"]
    study.ensemble, study.rows[0].name, study.rows[1].name = name, name, f"{name}, member 0 alone"
    study.rows[1].kind, study.rows[1].cost = "member", Cost(1.0, 2.0, 0.1)
    study.dataset |= {"name": name, "config": name, "classes": [name, name], "revision": name}
    study.command, study.hardware, study.versions = name, name, {name: name}
    study.audit = {
        "classes": {name: {"train": 1, "test": 9}, "b": {"train": 8, "test": 1}},
        "num_images": {"train": 9},
    }
    texts = model_card._render_files(folder, name, config, {"digits": study})
    return {path.name: text for path, text in texts.items()}


def body(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def shape(text: str) -> list[tuple[str, str, str]]:
    """What a renderer makes of Markdown: types, tags and links of all tokens; pieces of text are one."""
    tokens = []
    for block in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        for token in [block, *(block.children or [])]:
            kind = (token.type, token.tag, str(token.attrs.get("href", token.attrs.get("src", ""))))
            if token.type != "text" or tokens[-1:] != [kind]:
                tokens.append(kind)
    return tokens


def words(text: str) -> str:
    """The text that a renderer shows."""
    blocks = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return "\n".join("".join(token.content for token in block.children) for block in blocks if block.children)


@EVERY_NAME
def test_text_that_would_be_more_than_text_on_a_card(name, folder):
    evil, plain = describe(folder, name), describe(folder, PLAIN)
    assert evil.keys() == plain.keys() == {"README.md", "LICENSE.md"}
    for file, text in evil.items():
        assert shape(body(text)) == shape(body(plain[file]))
        assert is_plain(text)
    shown = words(body(evil["README.md"]))
    assert shown.split("\n")[0] == one_line(name), "the title is shown as it is"
    assert shown.count(one_line(name)) >= 15
    front, expected = (ModelCard(texts["README.md"]).data.to_dict() for texts in (evil, plain))
    assert front.keys() == expected.keys() and front["license"] == "other"
    assert front["model-index"][0]["name"] == one_line(name)


@EVERY_NAME
def test_a_title_is_read_again_as_it_was_written(name, folder):
    (folder / "README.md").write_text(describe(folder, name)["README.md"], encoding="utf-8")
    config, studies = model_card._read(folder)
    again = model_card._render_files(folder, None, config, studies)[folder / "README.md"]
    assert words(body(again)).split("\n")[0] == one_line(name)


def test_files_of_results_of_any_name(folder):
    content = (folder / "results/digits.json").read_text()
    names = "<img src=x>", "a](javascript:x)", "|", "`", "a\nb", "%2e%2e", "x' onload='", "caf\udce9", "#?&"
    for name in names:
        (folder / f"results/{name}.json").write_text(content)
    text = model_card.write_card(folder).read_text(encoding="utf-8")
    model_card.check_card(folder)
    sources = [link for kind, _, link in shape(body(text)) if kind == "image"]
    figures = {str(path.relative_to(folder)) for path in (folder / "figures").iterdir()}
    assert len(sources) == 10 and {unquote(link, errors="surrogateescape") for link in sources} == figures
    assert all(re.fullmatch(r"figures/[\w.%~-]+", link) for link in sources), "neither address nor markup"


def test_an_index_of_folders_of_any_name(folder, world):
    for kind, name in IN_FILES.items():
        os.renames(os.fspath(copy(folder, world / "copies")), world / "all" / name)
        plain = shape(index_text(world / "all")) if kind == "a tag" else None
        if plain:
            first = len(plain)
    text = index_text(world / "all")
    assert is_plain(text) and sum(kind == "tr_open" for kind, _, _ in shape(text)) > len(IN_FILES)
    links = [link for kind, _, link in shape(text) if kind == "link_open"]
    assert len(links) == len(IN_FILES) and first
    assert {Path(unquote(unquote(link), errors="surrogateescape")).name for link in links} == {"README.md"}
    assert not [link for link in links if ":" in link]
    assert [tag for tag, _, _ in shape(text) if tag.startswith("html")] == ["html_block"], "our own comment"


def copy(folder: Path, target: Path) -> Path:
    (target / "results").mkdir(parents=True)
    (target / "results/digits.json").write_text((folder / "results/digits.json").read_text())
    return target


def test_a_template_that_forgets_to_escape_cannot():
    for name in NAMES.values():
        template = make_markdown_environment().from_string(
            "# {{ name }}\n\n{{ name }}\n\n- {{ name }}\n\n[{{ name }}](x)"
        )
        assert shape(template.render(name=name)) == shape(template.render(name=PLAIN)), name
        page = make_html_environment().from_string("<p title='{{ name }}'>{{ name }}</p>")
        assert is_plain(page.render(name=name)) and page.render(name=name).count("<") == 2
    for text in ("vit_tiny_patch16", "<0.001", "+12.5 [-19.3, +44.3]", "C#", "R&D", "a-b", "3 x 4", "1.5 points"):
        assert escape_text(text) == text, "what means nothing stays readable"


# --- HTML


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple] = []
        self.texts: list[str] = []
        self.feed(re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *sorted(name for name, _ in attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def report(world: Path, names: list[str]) -> str:
    """A report on ensembles in folders of these names, with rows and datasets of these names."""
    folders = []
    for number, name in enumerate(names):
        folder = world / f"report-{number}" / re.sub(r"[/\0]", "", name)
        content = Results.load(world / "pair/results/digits.json")
        content.dataset["name"], content.rows[1].name, content.ensemble = names[0], name, name
        content.rows[0].name = f"{name}, 1"
        content.save(folder / "results/x.json")
        folders.append(folder)
    return write_report(folders, world / "page.html").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_names_on_a_report(folder, world):
    names = [name for name in NAMES.values() if "\udce9" not in name]  # msgspec reads no such file
    page, plain = report(world, names), report(world, [f"plain {n}" for n in range(len(names))])
    assert Tags(page).tags == Tags(plain).tags
    assert is_plain(page) and "<script>alert" not in page
    shown = " ".join("".join(Tags(page).texts).split())
    assert all(one_line(name) in shown for name in names)


def test_names_on_a_page_of_errors(world):
    def write(names: list[str]) -> str:
        count = len(names)
        images = [{"bytes": b"no image", "path": name} for name in names]
        labels, probabilities = np.arange(count), np.roll(np.eye(count), 1, axis=1)
        return write_error_page(world / "x.html", images, labels, probabilities, names, count).read_text(
            encoding="utf-8"
        )

    page, plain = write(list(NAMES.values())), write([f"plain {n}" for n in range(len(NAMES))])
    assert Tags(page).tags == Tags(plain).tags and is_plain(page) and "<script" not in page


# --- figures


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_on_figures(world, folder):
    names = list(NAMES.values())
    confusion = np.eye(len(names), dtype=np.int64)
    for k, name in enumerate(names):  # the lowest recalls are shown
        confusion[k, 0] += name in STRANGE
    plot_class_recall(confusion, names, world / "recall.png")
    plot_confusion_matrix(confusion, names, world / "confusion.png")
    results = Results.load(folder / "results/digits.json")
    for name in ("$\\frac{", "a\x1b[31m\u202eb\n\r\x01c"):
        results.ensemble = results.rows[0].name = results.rows[1].name = results.dataset["name"] = name
        plot_accuracy_against_members(results, world / "members.png")
    assert len(list(world.glob("*.png"))) == 3


# --- the terminal


@EVERY_NAME
def test_names_on_a_terminal(name, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    text, plain = print_everything(name), print_everything(PLAIN)
    assert is_plain(text) and text.count("\n") == plain.count("\n")
    assert text.count(printable(name).strip()) >= 7


def print_everything(name: str) -> str:
    screen = PlainConsole(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    table = Table(name, "plain", title=name, caption=name)
    table.add_column(stack_lines(name, "below"))
    table.add_row(name, name, "x")
    screen.print(table)
    screen.print(name)
    screen.print(f"found: {name}", soft_wrap=True)
    screen.print(Path(name), [name], ValueError(name))
    return screen.file.getvalue()


def test_what_the_commands_print(folder, capsys):
    results = Results.load(folder / "results/digits.json")
    config = ConcatEnsembleConfig.from_pretrained(folder)
    for name in NAMES.values():
        results.ensemble = results.rows[0].name = results.dataset["name"] = name
        results.rows[1].name = f"{name} "
        probe.print_results(results, wide=True)
        probe.print_recipes({name: results})
        config.members[0]["provenance"] |= {"source": name, "weights": name}
        options.print_written(build.member_table(Path(name), config.members), {}, False, False)
        block = dict.fromkeys(("images", "num_features", "bytes", "idle_days", "damaged"), 0)
        console.out.print(cache.block_table([block | {"architecture": name, "key": name, "removed": False}]))
        relation = Relation((1,), name, 0, 0.5, 0.97, 0.1, [0.97], 0.11, (0.05, 0.2))
        overlap = Overlap(
            [Subject(name, 1, 0.0, 1.0, 0.8), Subject("b", 1, 0.0, 1.0, 0.7)],
            [relation, replace(relation, target=1)],
            0.1,
            9,
            9,
            9,
        )
        options.print_table(compare.overlap_table(overlap))
        for sentence in overlap.verdict:
            console.out.print(sentence, soft_wrap=True)
        text = capsys.readouterr().out
        assert is_plain(text) and one_line(name)[:20].strip() in " ".join(text.split()), name


def test_a_json_file_is_printed_in_ascii(world, capsys):
    Path("x.json").write_text(json.dumps(NAMES["another direction"] + "\x9b", ensure_ascii=False), encoding="utf-8")
    options.print_file(Path("x.json"))
    assert capsys.readouterr().out.isascii()


COMMANDS = {
    "card": ["card", "NAME"],
    "index": ["card", "NAME", "--index"],
    "export": ["export", "NAME", "--output", "x.onnx"],
    "report": ["report", "NAME"],
    "push": ["push", "NAME", "me/x"],
    "build": ["build", "NAME", "--output", "out"],
    "build a file": ["build", "resnet10t=NAME.pth", "--output", "out"],
    "build with arguments": ["build", "random:test_vit", "--model-arg", "NAME", "--output", "out"],
    "probe": ["probe", "random:NAME", "--dataset", "digits"],
    "a dataset": ["probe", "random:test_vit", "--dataset", "NAME.csv"],
    "predict": ["predict", "NAME", "x"],
    "an argument too many": ["card", "pair", "NAME"],
    "an option": ["card", "pair", "--NAME"],
    "a choice": ["reproduce", "NAME"],
    "a number": ["cache", "--prune", "NAME"],
    "a command": ["NAME"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_error_lines_hold_no_commands_for_a_terminal(words, folder, monkeypatch, capsys):
    for kind in (
        "escape sequences",
        "C1 controls",
        "another direction",
        "a carriage return",
        "lines",
        "rich's markup",
    ):
        typed = [word.replace("NAME", NAMES[kind]) for word in words]
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *typed])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err, typed
        assert is_plain(printed.err) and is_plain(printed.out), typed
        if printed.err.startswith("error: "):  # else a mistake in the options, which is shown with their usage
            assert printed.err.count("\n") == 1, printed.err


def test_warnings_and_progress_are_plain(capsys):
    be_quiet()
    for name in NAMES.values():
        record = logging.LogRecord("concat_ensemble.x", logging.WARNING, "x.py", 1, "%s: ignored", (name,), None)
        logging.lastResort.emit(record)
        with show_progress(name, 2, unit="images") as advance:
            advance(2)
        console.errors.print(describe_progress(name, 1, 2, unit="images", seconds=1.0), soft_wrap=True)
        assert is_plain(text := capsys.readouterr().err) and text.count("\n") == 4, name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_predictions_on_a_terminal_are_plain_and_in_a_pipe_are_whole(monkeypatch):
    names = [name for name in NAMES.values() if "\udce9" not in name]
    predictions = [(name, np.eye(len(names))[k], None) for k, name in enumerate(names)]
    monkeypatch.setattr(sys, "stdout", Terminal())
    write_predictions(None, "file", names, predictions, top=1)
    assert is_plain(sys.stdout.getvalue()) and "a | b" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    write_predictions(None, "file", names, predictions, top=1)
    rows = list(csv.reader(io.StringIO(sys.stdout.getvalue(), newline="")))
    assert [row[0].removeprefix("./") for row in rows[1:]] == names


# --- YAML


def test_results_on_a_benchmark_are_yaml(folder):
    for name in NAMES.values():
        study = Results.load(folder / "results/digits.json")
        study.dataset |= {"name": name, "benchmark": name, "revision": name}
        (entry,) = yaml.safe_load(yaml.safe_dump(model_card.benchmark_entries(study)))
        assert entry["dataset"] == {"id": name, "task_id": name, "revision": name}
