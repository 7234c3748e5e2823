"""Run the notebooks of examples/, and store their outputs in them.

    python -m tests.run_notebooks                       run all three, about twenty minutes on 2 cores
    python -m tests.run_notebooks publish_and_load      run one
    python -m tests.run_notebooks --weights FOLDER      read timm's weights from FOLDER/NAME.safetensors

Each notebook runs as it is, in a new kernel and an empty folder. Its Hub is a server on loopback (`hub_server`), so
that nothing is published. The server has the backbones that the notebooks name, with timm's own weights. In the
outputs that are stored, its address is replaced by the Hub's.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import timm
from nbclient import NotebookClient
from nbformat import NotebookNode
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
BACKBONES = ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite1.in1k")  # those of timm that the notebooks name


def run_notebook(
    path: Path,
    folder: Path,
    hub: HubServer,
    *,
    parameters: Mapping[str, Any] | None = None,
    before: str = "",
    features: Path | None = None,
) -> NotebookNode:
    """Run a notebook in a new kernel whose working directory is `folder`, and return it with its outputs.

    Args:
        parameters: Constants by name, in place of those in the cell with the tag `parameters`, as papermill does it.
        before: Code to run before the first cell.
        features: Folder of the stored features. Default: one in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails, with its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    constants = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for name, value in (parameters or {}).items():
        constants.source += f"\n{name} = {value!r}"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"{before}\n{first.source}".strip("\n")
    home = folder / "home"
    home.mkdir(parents=True)
    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=600,  # seconds, on a busy machine
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=kernel_environment(home, hub) | ({"HF_ASSETS_CACHE": str(features)} if features else {}))
    return notebook


def kernel_environment(home: Path, hub: HubServer) -> dict[str, str]:
    """An environment without the user's own cache and token, whose Hub is the server, and in which nothing shows
    progress bars, since a file cannot hold them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= hub.environment | {"HF_TOKEN": TOKEN, "HF_HOME": str(home), "IPYTHONDIR": str(home / "ipython")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    return environment | {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, about its progress bars


def publish_backbones(hub: HubServer, folder: Path, create: Callable[[str], nn.Module]) -> None:
    """Put the backbones, as `create` makes them from their names, where timm looks for its pretrained weights."""
    for name in BACKBONES:
        save_for_hf(create(name), folder / name, safe_serialization=True)
        repo = f"timm/{name}"
        hub.create("models", repo, private=False)
        files = {path.name: hub.store(path.read_bytes(), lfs=True) for path in (folder / name).iterdir()}
        hub.write("models", repo, hub.repo("models", repo), "refs/heads/main", files, "weights")


def load_pretrained(name: str, weights: Path | None) -> nn.Module:
    """A backbone with timm's weights, from a folder or from the Hub."""
    if weights is None:
        return timm.create_model(name, pretrained=True)
    model = timm.create_model(name)
    model.load_state_dict(load_file(weights / f"{name.partition('.')[0]}.safetensors"))
    return model


def text_of(output: NotebookNode) -> dict[str, str]:
    """The texts of an output: of a stream by the key `text`, of a result by the media type."""
    if output.output_type == "stream":
        return {"text": output.text}
    return {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}


def replace_text(notebook: NotebookNode, old: str, new: str) -> None:
    """Replace a text in all outputs."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        for key, text in text_of(output).items():
            place = output if output.output_type == "stream" else output.data
            place[key] = text.replace(old, new)


def drop_stderr(notebook: NotebookNode) -> None:
    """Leave out the warnings of other libraries, which name folders of this computer. An error ends the run."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--weights", type=Path, help="folder with timm's weights (default: the Hub)")
    parser.add_argument("--features", type=Path, help="folder that keeps the stored features for the next run")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NOTEBOOKS):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(NOTEBOOKS)}")
    for name in options.names or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as temporary, HubServer(Path(temporary, "hub")) as hub:
            publish_backbones(
                hub, Path(temporary, "backbones"), lambda backbone: load_pretrained(backbone, options.weights)
            )
            notebook = run_notebook(NOTEBOOKS[name], Path(temporary, "run"), hub, features=options.features)
            drop_stderr(notebook)
            replace_text(notebook, hub.url, "https://huggingface.co")
            notebook.metadata.language_info = {"name": "python"}  # without the version of this Python
            nbformat.write(notebook, NOTEBOOKS[name])
            print(f"examples/{name}.ipynb: {NOTEBOOKS[name].stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
