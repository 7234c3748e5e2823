"""Studies by name, as a notebook calls them: files are written, and what is there is not measured again."""

import pytest

from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.studies.compare_study import run_compare_study
from concat_ensemble.studies.options import ProbeOptions, SelectOptions
from concat_ensemble.studies.outputs import check_file
from concat_ensemble.studies.probe_study import run_probe_studies, run_probe_study
from concat_ensemble.studies.results import Results
from concat_ensemble.studies.select_study import run_select_study

DIGITS = DatasetOptions(name="digits", classes="0-2", limit=30)
QUIET = ExtractionOptions(quiet=True)


def test_a_probe_study_is_measured_once(folder, capsys):
    study = run_probe_study(str(folder), DIGITS)
    assert study.is_new and study.path == folder / "results" / "digits-classes-0-2-limit-30.json"
    assert study.results == Results.load(study.path) and study.results.command == ""
    again = run_probe_study(str(folder), DIGITS)
    assert not again.is_new and again.results == study.results
    assert "--overwrite probes again" in capsys.readouterr().err


def test_a_dataset_that_fails_does_not_stop_the_others(folder):
    paths = []
    datasets = [DatasetOptions(name="nonesuch"), DIGITS]
    studies = run_probe_studies(
        str(folder), datasets, extraction=QUIET, on_study=lambda study: paths.append(study.path)
    )
    assert list(studies.failures) == ["nonesuch"] and "no dataset 'nonesuch'" in str(studies.failures["nonesuch"])
    assert [study.path for study in studies.finished.values()] == paths and len(paths) == 1
    with pytest.raises(ValueError, match="no dataset 'nonesuch'"):
        run_probe_study(str(folder), datasets[0])


def test_repeats_use_consecutive_seeds_and_the_record_has_the_first(folder):
    options = DatasetOptions(name="digits", classes="0-2", limit=30, seed=3)
    study = run_probe_study(str(folder), options, ProbeOptions(repeats=2), QUIET)
    assert [run.seed for run in study.results.rows[0].runs] == [3, 4] and study.results.dataset["seed"] == 3


def test_a_selection_is_reported_before_the_chosen_members_are_probed(folder, tmp_path):
    seen = []
    settings = SelectOptions(output=tmp_path / "chosen", command="by hand")
    study = run_select_study(
        str(folder), DIGITS, settings, QUIET, on_selection=lambda study: seen.append((study.selection, study.results))
    )
    assert seen == [(study.selection, None)] and study.path.is_file()
    saved = Results.load(tmp_path / "chosen" / "results" / f"{DIGITS.file_stem}.json")
    assert saved == study.results and saved.command == "by hand" and saved.ensemble == "chosen"
    assert not (tmp_path / "chosen" / "README.md").exists(), "cards are made by reporting"


def test_members_are_compared_and_the_file_is_not_replaced_by_mistake(folder, tmp_path):
    study = run_compare_study([str(folder)], DIGITS, QUIET, output=tmp_path / "overlap")
    assert study.path == tmp_path / "overlap" / f"{DIGITS.file_stem}.json" and len(study.overlap.subjects) == 2
    with pytest.raises(ValueError, match="--overwrite"):
        run_compare_study([str(folder)], DIGITS, QUIET, output=tmp_path / "overlap")


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file/x.json cannot be written .* --output"):
        check_file(tmp_path / "file" / "x.json", overwrite=False)
