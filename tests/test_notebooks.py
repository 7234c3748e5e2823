"""The notebooks of examples/ run on a few images, and what is stored in them is fit to be shown.

They run as they are, but for the constants of the cell that is tagged `parameters`. Their backbones come from a Hub on
loopback, with random weights, and see small images.
"""

import base64
import itertools
import re
from pathlib import Path

import nbformat
import pytest
import timm
import torch
from nbformat import NotebookNode

from tests.hub_server import HubServer
from tests.run_notebooks import NOTEBOOKS, publish_backbones, run_notebook, text_of

ROOT = Path(__file__).parents[1]
SIZE = (3, 48, 48)
SMALL_IMAGES = f"""
from timm.models import _registry

for name, cfg in _registry._model_pretrained_cfgs.items():
    if name.startswith("tf_efficientnet_lite"):
        cfg.input_size, cfg.test_input_size = {SIZE}, None
"""
MAX_FIGURE = 150_000  # bytes
LOCAL = re.compile(r"/tmp|/home|/root|/work|/Users|site-packages|dist-packages|127\.0\.0\.1|localhost")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    torch.manual_seed(0)
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        options = {"pretrained_cfg_overlay": {"input_size": SIZE}}
        publish_backbones(
            server, tmp_path_factory.mktemp("backbones"), lambda name: timm.create_model(name, **options)
        )
        yield server


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return list(itertools.chain.from_iterable(cell.outputs for cell in code_cells(notebook)))


def all_text(notebook: NotebookNode) -> str:
    return "\n".join(text for output in outputs(notebook) for text in text_of(output).values())


def figures(notebook: NotebookNode) -> list[bytes]:
    found = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [base64.b64decode(figure) for figure in found if figure]


def tables(notebook: NotebookNode) -> list[list[list[str]]]:
    """The rows of each data frame that is shown, below its heading: the index and the cells."""
    bodies = re.findall(r"<tbody>(.*?)</tbody>", all_text(notebook), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL) for body in bodies]
    return [[re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in each] for each in rows]


def test_which_backbones_compares_all_combinations(hub, tmp_path):
    datasets = {"DATASET": "digits", "ANOTHER_DATASET": "scattered:digits"}
    names = ["random:test_efficientnet", "random:test_resnet", "random:test_vit"]  # with fewer features, it is quick
    path, parameters = NOTEBOOKS["which_backbones"], {"LIMIT": 24, "BACKBONES": names, **datasets}
    notebook = run_notebook(path, tmp_path, hub, parameters=parameters)
    combinations, pairs, chosen, other = tables(notebook)
    expected = {" + ".join(part) for size in (1, 2, 3) for part in itertools.combinations(names, size)}
    assert {row[1] for row in combinations} == expected
    assert {row[1] for row in pairs} == {name for name in expected if name.count("+") == 1}
    for rows in (chosen, other):
        assert {"chosen", "untrained members", "raw pixels", "majority class"} <= {row[0] for row in rows}
    text = all_text(notebook)
    assert "gain:" in text and all(f"member {k} ({name})" in text for k, name in enumerate(names))
    assert len(figures(notebook)) == 2


def test_publish_and_load_gives_the_same_features(hub, tmp_path):
    path, parameters = NOTEBOOKS["publish_and_load"], {"LIMIT": 24, "DATASET": "digits"}
    notebook = run_notebook(path, tmp_path, hub, parameters=parameters, before=SMALL_IMAGES)
    text = all_text(notebook)
    assert "transformers_modules" in text and "2560 features" in text
    assert float(re.search(r"largest difference of a feature: (\S+)", text)[1]) < 1e-5
    update, first = hub.commits("me/two-efficientnets")
    assert all(f"{hub.url}/me/two-efficientnets/commit/{commit}" in text for commit in (first, update))
    assert "Intended use" in hub.read("me/two-efficientnets", "README.md").decode()
    predicted, confirmed = tables(notebook)
    assert len(predicted) == 3
    assert confirmed and {row[-1] for row in confirmed} == {"yes"}


def test_paper_in_ten_minutes_compares_all_systems(hub, tmp_path):
    path = NOTEBOOKS["paper_in_ten_minutes"]
    notebook = run_notebook(path, tmp_path, hub, parameters={"REPEATS": 2, "SMOKE": True})
    costs, results = tables(notebook)
    assert [row[:3] for row in costs] == [
        ["CAT1", "1", "64"],
        ["CAT2", "2", "128"],
        ["CAT4", "4", "256"],
        ["W2", "1", "128"],
    ]
    names = {"raw pixels", "CAT4 untrained", "W2", "CAT1", "CAT2", "CAT4, PCA", "CAT4"}
    assert {row[0] for row in results} == names
    assert all(0 <= float(row[column]) <= 100 for row in results for column in (1, 4))
    assert len(figures(notebook)) == 2 and "20 repeats" in all_text(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_the_stored_outputs_are_fit_to_be_shown(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        for text in text_of(output).values():
            assert not LOCAL.search(text), text
            assert all(letter.isprintable() or letter in "\n\t" for letter in text), text
    assert figures(notebook) and all(len(figure) < MAX_FIGURE for figure in figures(notebook))
    assert path.name in (ROOT / "examples/README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_cells_are_short_and_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(len(cell.source.splitlines()) <= 35 for cell in code_cells(notebook))
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https://)([^)#]+)", prose):
        assert (path.parent / target).exists(), target
    (tagged,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    assert all(re.fullmatch(r"[A-Z_]+ = .*", line) for line in tagged.source.splitlines())
