"""Studies by name, as a notebook calls them: files are written, and what is there is not measured again."""

import dataclasses

import pytest
from datasets import DatasetDict, concatenate_datasets

from concat_ensemble import LinearProbe, extract_features, load_data
from concat_ensemble.data.audit import audit_splits
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.reporting.verdicts import notes
from concat_ensemble.studies.claims import Check
from concat_ensemble.studies.compare_study import run_compare_study
from concat_ensemble.studies.controls import untrained_like
from concat_ensemble.studies.measuring import choose_metric
from concat_ensemble.studies.options import ProbeOptions, SelectOptions
from concat_ensemble.studies.outputs import check_file
from concat_ensemble.studies.overlap import split_for_choice
from concat_ensemble.studies.probe_study import run_probe_studies, run_probe_study
from concat_ensemble.studies.probing import probe_ensemble
from concat_ensemble.studies.results import Results
from concat_ensemble.studies.select_study import run_select_study
from concat_ensemble.studies.verification import verify_ensemble

DIGITS = DatasetOptions(name="digits", classes="0-2", limit=30)
QUIET = ExtractionOptions(quiet=True)


def test_a_probe_study_is_measured_once(folder, capsys):
    study = run_probe_study(str(folder), DIGITS)
    assert study.is_new and study.path == folder / "results" / "digits-classes-0-2-limit-30.json"
    assert study.results == Results.load(study.path) and study.results.command == ""
    again = run_probe_study(str(folder), DIGITS)
    assert not again.is_new and again.results == study.results
    assert "overwrite=True probes again" in capsys.readouterr().err


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


def test_untrained_members_are_the_same_in_all_repeats_so_that_they_run_once(folder, ensemble):
    options = DatasetOptions(name="digits", classes="0-2", limit=30, seed=3)
    study = run_probe_study(str(folder), options, ProbeOptions(repeats=2), QUIET)
    untrained = untrained_like(ensemble, 3)
    for run in study.results["untrained members"].runs:
        data = dataclasses.replace(options, seed=run.seed).load().data
        table = extract_features(untrained, data, quiet=True)
        assert table.extracted == 0, "the study has extracted all of them"
        expected = LinearProbe(seed=run.seed).fit(table["train"], validation=table["validation"]).score(table["test"])
        assert run.metrics["top1"] == expected
    assert "The untrained members are the same in all repeats." in notes(study.results)


def test_the_metric_of_the_first_repeat_is_that_of_all(folder, tmp_path, images):
    """Of 24 to 36 images a test split of 6 is imbalanced in some repeats and not in others."""
    splits = DatasetDict(train=images(["a"] * 20 + ["b"] * 12), test=images(["a"] * 34 + ["b"] * 18, seed=1))
    splits.save_to_disk(tmp_path / "data")
    options = DatasetOptions(name=str(tmp_path / "data"), limit=6)
    found = {choose_metric(None, None, dataclasses.replace(options, seed=seed).load().audit) for seed in range(6)}
    assert found == {"top1", "mean_per_class"}
    study = run_probe_study(str(folder), options, ProbeOptions(repeats=6, controls="none"), QUIET)
    assert study.results.repeats == 6 and study.results.metric == choose_metric(None, None, options.load().audit)


def test_results_with_more_controls_serve_and_those_with_fewer_do_not(folder):
    run_probe_study(str(folder), DIGITS, ProbeOptions(controls="quick"), QUIET)
    assert not run_probe_study(str(folder), DIGITS, ProbeOptions(controls="none"), QUIET).is_new
    with pytest.raises(ValueError, match=r"lacks .*controls.*overwrite=True"):
        run_probe_study(str(folder), DIGITS, extraction=QUIET)


# --- verification


def verified(folder, ensemble, **probe) -> dict[str, Check]:
    """Probe, and then verify: the checks by the names of the rows."""
    dataset = DatasetOptions(**probe.pop("dataset"))
    study = run_probe_study(str(folder), dataset, ProbeOptions(controls="none", **probe), QUIET)
    own = [dataset.name] if dataset.name != "digits" else []
    checks = {check.name: check for check in verify_ensemble(folder, ensemble, datasets=own, quiet=True)}
    assert set(checks) == {row.name for row in study.results.rows}
    assert all(check.holds and check.again == pytest.approx(check.card, abs=1e-12) for check in checks.values()), (
        checks
    )
    assert all(check.metric == study.results.metric for check in checks.values())
    return checks


@pytest.mark.parametrize("metric", ["top1", "mean_per_class", "average_precision"])
def test_numbers_in_any_metric_with_class_weights_are_confirmed(metric, folder, ensemble):
    dataset = {"name": "digits", "classes": "3,8", "limit": 40}
    verified(folder, ensemble, dataset=dataset, metric=metric, class_weight="balanced")


def test_numbers_on_data_with_copies_and_groups_are_confirmed(folder, ensemble, images, tmp_path, monkeypatch):
    """Copies of training images are left out of the test split, and no group is in two splits, both times."""
    monkeypatch.chdir(tmp_path)  # results record the name of the folder alone
    labels = ["a", "b"] * 30
    train, test = images(labels), images(labels, seed=1)
    patients = [f"p{n // 4}" for n in range(60)]
    train = train.add_column("patient", patients)
    mixed = concatenate_datasets([test.add_column("patient", [f"q{p}" for p in patients]), train.select(range(8))])
    DatasetDict(train=train, test=mixed).save_to_disk(tmp_path / "leaking")
    dataset = {"name": str(tmp_path / "leaking"), "group_column": "patient"}
    checks = verified(folder, ensemble, dataset=dataset)
    results = Results.load(next((folder / "results").glob("*.json")))
    assert results.audit["removed_from_test"] == 8 and results.num_groups == 15
    assert results.rows[0].runs[0].n_test == 60 and checks["pair"].interval == (0.99, 1.0)


def test_results_of_images_that_are_also_in_training_are_not_confirmed(folder, ensemble, images, tmp_path):
    """Those of 0.1.0, from before there was an audit."""
    train, test = images(["a", "b"] * 20), images(["a", "b"] * 20, seed=1)
    name = str(tmp_path / "leaking")
    DatasetDict(train=train, test=concatenate_datasets([test, train.select(range(30))])).save_to_disk(name)
    data = load_data(name)
    about = {"name": "pair", "controls": "none", "described": {"name": name, "test_images": 70}}
    results, _ = probe_ensemble(ensemble, data, audit=audit_splits(data).audit, **about, quiet=True)
    results.audit = None
    results.save(folder / "results" / "leaking.json")
    check, *_ = verify_ensemble(folder, ensemble, datasets=[name], quiet=True)
    assert {"n_test=70 where it is 40", "dataset.test_images=70 where it is 40"} <= set(check.differences)


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
    with pytest.raises(ValueError, match="overwrite=True"):
        run_compare_study([str(folder)], DIGITS, QUIET, output=tmp_path / "overlap")


def test_a_comparison_looks_at_no_test_image(folder, images, tmp_path):
    """Members are chosen by it; the test images are left for the probe of what was chosen. Others change nothing."""
    labels = ["a", "b"] * 40
    train, overlaps = images(labels), []
    for seed in (1, 2):
        name = str(tmp_path / f"tested-on-{seed}")
        DatasetDict(train=train, test=images(labels, seed=seed)).save_to_disk(name)
        options = DatasetOptions(name=name)
        overlaps.append(run_compare_study([str(folder)], options, QUIET, output=tmp_path / "overlap").overlap)
    assert overlaps[0] == overlaps[1]
    assert (overlaps[0].n_train, overlaps[0].n_validation, overlaps[0].n_test) == (32, 8, 40)


def test_no_group_is_on_two_sides_of_a_comparison(images, tmp_path):
    train = images(["a", "b"] * 30).add_column("patient", [f"p{n // 4}" for n in range(60)])
    test = images(["a", "b"] * 4, seed=1).add_column("patient", ["q"] * 8)
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "patients")
    splits = split_for_choice(load_data(str(tmp_path / "patients"), group_column="patient"))
    groups = [set(splits[name]["group"]) for name in ("train", "validation", "test")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 15
    assert sum(map(len, splits.values())) == 60


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file/x.json cannot be written .*another output"):
        check_file(tmp_path / "file" / "x.json", overwrite=False)
