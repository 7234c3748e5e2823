"""What the experiments share: names, recipes, processes, exit codes."""

import subprocess
import sys

import numpy as np
import pytest
import yaml

from concat_ensemble.experiments import budget_curve, desk, names


def test_names_load_nothing_large_and_match_the_studies():
    program = "import sys, concat_ensemble.experiments.names; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "matplotlib"} & set(done.stdout.split())
    assert set(names.STUDIES) < set(desk.STUDIES)


@pytest.mark.parametrize("study", desk.STUDIES)
def test_every_study_has_an_installed_recipe_of_its_dataset(study):
    recipe = desk.training_recipe_path(f"{study}_{desk.STUDIES[study].recipe}")
    assert yaml.safe_load(recipe.read_text())["dataset"] == desk.STUDIES[study].dataset
    assert not desk.training_recipe_path(f"{study}_none").exists()


def test_a_process_that_fails_ends_with_its_last_lines():
    with pytest.raises(RuntimeError, match=r"(?s)read failed with exit code 2.*missing\.json"):
        desk.run_module("json.tool", ["missing.json"], "read")


def test_a_mistake_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["budget_curve", "scattered_digits", "--repeats", "1"])
    with pytest.raises(SystemExit) as stop:
        desk.run_script(budget_curve.main)
    assert stop.value.code == 2 and "--repeats 1 must be at least 2" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        desk.run_script(main)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shares", [[0.99, 0.88], [0.01, 0.12], [1.0, 1.0, 0.9999999999999999], [1.0, 1.0], [0.5, 0.6, 0.55]]
)
def test_error_bars_stay_within_0_and_100_and_none_is_negative(shares):
    """Two repeats of 88 and 99% have an interval that is far longer below than above."""
    values = np.array(shares)
    (mean,), ((below,), (above,)) = desk.error_bars([values])
    assert mean == pytest.approx(100 * values.mean()) and below >= 0 and above >= 0
    assert mean - below >= -1e-9 and mean + above <= 100 + 1e-9
    assert (mean - below, mean + above) == pytest.approx(desk.mean_and_interval(values)[1:])
