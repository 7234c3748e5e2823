"""The files of a Space on the Hub that shows an ensemble with a head: a page on which visitors drop an image.

A Space runs without this package, as anybody's program does that loads the ensemble: by the code in its repo, with
`trust_remote_code`, at the very commit that was pushed. So its requirements are what that code and the page import,
and it keeps working whatever a later version of the package does. Members that are probed alone and the nearest
training images need a dataset, which may not be anybody's to publish: `concat-ensemble app` shows them.
"""

from __future__ import annotations

from importlib.metadata import requires, version
from importlib.resources import files
from typing import TYPE_CHECKING

import yaml

from concat_ensemble.reporting.licenses import LICENSE, OTHER, joint_license, license_name, member_licenses
from concat_ensemble.reporting.rendering import one_line

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig

GRADIO, PYTHON = "6.31.0", "3.11"  # with which the page is tested
PAGE = "image_page.py"
MARK = "written by `concat-ensemble push --space`"  # in the app.py of a Space of ours
# What the code in an ensemble's repo imports.
IMPORTED = ("torch", "torchvision", "timm", "transformers", "huggingface_hub", "safetensors", "numpy", "Pillow")


def space_files(config: ConcatEnsembleConfig, repo_id: str, commit: str) -> dict[str, str]:
    """The texts of a Space's files by name, for the ensemble that was pushed to `repo_id` as this commit."""
    app = files("concat_ensemble.reporting").joinpath("templates/space_app.py.txt").read_text(encoding="utf-8")
    page = files("concat_ensemble.reporting").joinpath(PAGE).read_text(encoding="utf-8")
    return {
        "README.md": _readme(config, repo_id),
        "app.py": app.replace('"REPO_ID"', f'"{repo_id}"').replace('"COMMIT"', f'"{commit}"'),
        PAGE: page,
        "requirements.txt": "".join(f"{line}\n" for line in _requirements()),
    }


def _readme(config: ConcatEnsembleConfig, repo_id: str) -> str:
    """The card of the Space. Its metadata tell the Hub how to run it, and which model it shows."""
    licenses = member_licenses(config)
    license = joint_license(licenses)
    metadata = {
        "title": one_line(repo_id.partition("/")[2]),
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "models": [repo_id],
        "license": license,
    }
    address = f"https://huggingface.co/{repo_id}"
    if license == OTHER:
        metadata |= {"license_name": license_name(licenses), "license_link": f"{address}/blob/main/{LICENSE}"}
    text = (
        f"A page on which you drop an image and see its classes, as [{repo_id}]({address}) predicts them.\n"
        "The model is loaded by the code in its repo, at the commit that `app.py` names. If its repo is private,\n"
        "give this Space a secret `HF_TOKEN` that may read it.\n\n"
        f"Written by `concat-ensemble push --space`, version {version('concat-ensemble')}; the next one replaces it.\n"
    )
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{text}"


def _requirements() -> list[str]:
    """This package's own requirements of what the code in the repo imports."""
    lines = [line for line in requires("concat-ensemble") or [] if "extra ==" not in line]
    return [line for line in lines if line.split(">=")[0] in IMPORTED]
