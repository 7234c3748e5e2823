"""The options that name a dataset: what results record, and what the files are called."""

import dataclasses

import pytest

from concat_ensemble.data.options import DatasetOptions


def test_the_record_has_every_setting_in_the_order_of_earlier_results_files():
    options = DatasetOptions(name="digits", classes="0-2", shots=4, seed=7)
    assert list(options.record.items()) == [
        ("name", "digits"),
        ("config", None),
        ("revision", None),
        ("image_column", None),
        ("label_column", None),
        ("classes", [0, 1, 2]),
        ("train_split", None),
        ("validation_split", None),
        ("test_split", None),
        ("test_size", 0.5),
        ("limit", None),
        ("seed", 7),
        ("shots", 4),
    ]
    assert "shots" not in dataclasses.replace(options, shots=None).record
    described = options.describe(options.load())
    assert described == options.record | {"test_images": len(options.load().data["test"]), "on_hub": False}


@pytest.mark.parametrize(
    ("options", "stem"),
    [
        ({}, "scattered-digits"),
        ({"name": "digits", "classes": "0-2", "limit": 30, "shots": 4}, "digits-classes-0-2-limit-30-shots-4"),
        ({"name": "uoft-cs/cifar100", "config": "Main"}, "uoft-cs-cifar100-main"),
        ({"recipe": "cifar100", "limit": 200}, "cifar100-limit-200"),
    ],
)
def test_results_files_are_named_after_the_dataset(options, stem):
    assert DatasetOptions(**options).file_stem == stem


def test_a_recipe_records_its_dataset_and_metric_and_determines_the_columns():
    record = DatasetOptions(recipe="cifar100", limit=200).record
    expected = {"name": "uoft-cs/cifar100", "label_column": "fine_label", "recipe": "cifar100", "metric": "top1"}
    assert expected.items() <= record.items() and record["limit"] == 200
    with pytest.raises(ValueError, match=r"recipe='cifar100' .* label_column; leave one out"):
        DatasetOptions(recipe="cifar100", label_column="label")


def test_several_recipes_are_one_dataset_each():
    options = DatasetOptions(limit=10)
    assert [each.recipe for each in options.with_recipes(["dtd", "cifar10", "dtd"])] == ["dtd", "cifar10"]
    assert options.with_recipes([]) == [options]


@pytest.mark.parametrize(
    ("text", "classes"), [("3,eleven", [3, "eleven"]), ("5-9", [5, 6, 7, 8, 9]), ("cat", ["cat"]), (None, None)]
)
def test_classes_are_numbers_ranges_or_names(text, classes):
    assert DatasetOptions(classes=text).record["classes"] == classes


def test_classes_that_run_backwards_are_refused():
    with pytest.raises(ValueError, match=r"classes=.9-5. .* write 5-9"):
        DatasetOptions(classes="9-5")


def test_groups_and_folders_are_recorded_where_they_are_set():
    options = DatasetOptions(name="photos", group_column="patient", use_folders=True)
    plain = DatasetOptions(name="photos")
    assert {"group_column": "patient", "use_folders": True}.items() <= options.record.items()
    assert "group_column" not in plain.record and "use_folders" not in plain.record
    assert options.file_stem == "photos-groups-patient"
    assert options.is_recorded(options.record) and plain.is_recorded(plain.record | {"test_images": 5})
    assert not plain.is_recorded(options.record) and not options.is_recorded(plain.record)
    assert not plain.is_recorded(dataclasses.replace(plain, shots=5).record)


def test_a_recipe_takes_groups_too():
    assert DatasetOptions(recipe="camelyon17", group_column="patient").record["group_column"] == "patient"
