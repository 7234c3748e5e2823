"""What `pip install` brings: one top-level name, with the Hub payload, the card's template and the recipes in it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words, **options) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its working files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("concat_ensemble", "modeling", "training", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder of installed packages that has the wheel alone."""
    place = tmp_path_factory.mktemp("installed") / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel)
    return place


def test_it_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["concat_ensemble"]
        assert {name.split("/")[0] for name in names} == {"concat_ensemble", info}
        assert f"{info}/licenses/LICENSE" in names
        assert (
            "concat-ensemble = concat_ensemble.commands.app:main" in archive.read(f"{info}/entry_points.txt").decode()
        )


def test_it_holds_every_source_file_the_template_and_the_recipes(wheel):
    expected = {
        f"concat_ensemble/{path.relative_to(ROOT / 'concat_ensemble')}"
        for path in ROOT.glob("concat_ensemble/**/*.py")
    }
    expected |= {f"concat_ensemble/modeling/{path.name}" for path in ROOT.glob("modeling/*.py")}
    for pattern in ("*.py", "*.yaml"):
        expected |= {
            f"concat_ensemble/training/recipes/{path.name}" for path in ROOT.glob(f"training/recipes/{pattern}")
        }
    for kind in ("*.jinja", "*.yaml", "*.txt", "py.typed"):
        expected |= {str(path.relative_to(ROOT)) for path in ROOT.glob(f"concat_ensemble/**/{kind}")}
    assert len(expected) >= 15
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("concat_ensemble/")} == expected


# Runs the installed console script twice in one process, since importing takes seconds, and says whose code it was.
BUILD = """
import runpy, sys
program = sys.argv[1]
for words in (["--help"], ["build", "random:test_vit", "--output", "one", "--quiet"]):
    sys.argv = [program, *words]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop
from concat_ensemble import modeling
from concat_ensemble.commands import app
print(app.__file__, modeling.__path__[0])
"""
# ... and one that does not find it, but the folder that it wrote.
LOAD = """
import importlib.util
from transformers import AutoModel
assert importlib.util.find_spec("concat_ensemble") is None
model = AutoModel.from_pretrained("one", trust_remote_code=True)
print(type(model).__name__, model.config.num_features)
"""


def test_installed_it_builds_an_ensemble_that_loads_without_it(site, tmp_path):
    assert (site / "concat_ensemble" / "reporting" / "templates" / "card.md.jinja").is_file()
    # -S leaves out the environment's own packages and with them its editable install; the dependencies come by path.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    with_it, without = (
        environment | {"PYTHONPATH": os.pathsep.join(map(str, paths))} for paths in ([site, packages], [packages])
    )
    shown = run(sys.executable, "-S", "-c", BUILD, site / "bin" / "concat-ensemble", cwd=tmp_path, env=with_it)
    assert all(command in shown for command in ("build", "probe", "card"))
    assert shown.split()[-2:] == [
        str(site / "concat_ensemble" / "commands" / "app.py"),
        str(site / "concat_ensemble" / "modeling"),
    ]
    assert "Written by `concat-ensemble card`" in (tmp_path / "one" / "README.md").read_text()
    assert run(sys.executable, "-S", "-c", LOAD, cwd=tmp_path, env=without).split() == ["ConcatEnsembleModel", "64"]


TYPED = """
from concat_ensemble import ConcatEnsembleModel, LinearProbe, assemble, extract_features, load_data

model: ConcatEnsembleModel = assemble(["random:resnet18"])
table = extract_features(model, load_data("digits", limit=100))
score: float = LinearProbe().fit(table["train"], validation=table["validation"]).score(table["test"])
features: int = model.config.num_features
wrong: str = score
"""


@pytest.mark.parametrize("install", ["wheel", pytest.param("editable", marks=pytest.mark.slow)])
def test_a_file_outside_the_repository_type_checks(install, site, tmp_path):
    """Type checkers see the package both installed and as an editable install: one error, in the wrong line."""
    (tmp_path / "user.py").write_text(TYPED)
    settings = {"typeCheckingMode": "basic"}
    if install == "wheel":
        settings["extraPaths"] = [str(site)]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    words = ["pyright", "--outputjson", "--pythonpath", sys.executable, "user.py"]
    done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
    errors = [(one["range"]["start"]["line"], one["message"]) for one in json.loads(done.stdout)["generalDiagnostics"]]
    assert [line for line, _ in errors] == [7], errors  # counted from 0
    assert '"float" is not assignable to' in errors[0][1]
