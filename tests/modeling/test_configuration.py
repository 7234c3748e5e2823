"""Which values a configuration accepts, which it refuses, and what it stores."""

import copy
import json

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleImageProcessor, ConcatEnsembleModel
from concat_ensemble.modeling.configuration_concat_ensemble import (
    AUTO_MAP,
    MAX_NUMBER,
    PLAIN_NAME,
    REFUSED_MODEL_ARGS,
)

RGB = {
    "input_size": [3, 32, 32],
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "image_mode": "RGB",
}
GREY = {**RGB, "input_size": [1, 32, 32], "mean": [0.5], "std": [0.25], "image_mode": "L"}


def member(**changes) -> dict:
    plain = {"architecture": "resnet18", "model_args": {}, "num_features": 512, "preprocessing": RGB, "provenance": {}}
    return {**plain, **changes}


def pixels(**changes) -> dict:
    return member(preprocessing={**RGB, **changes})


def test_the_error_for_an_unknown_architecture_names_the_member_and_similar_names():
    with pytest.raises(ValueError, match=r"members\[1\].*'resnet81'.*did you mean .*resnet18.*timm.list_models"):
        ConcatEnsembleConfig(members=[member(), member(architecture="resnet81")])


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k", "", None, 18])
def test_an_architecture_that_would_fetch_weights_or_is_not_a_name_is_refused(name):
    with pytest.raises(ValueError, match=r"members\[0\].*architecture"):
        ConcatEnsembleConfig(members=[member(architecture=name)])


@pytest.mark.parametrize("name", REFUSED_MODEL_ARGS)
def test_model_args_that_reach_files_network_or_other_outputs_are_refused(name):
    with pytest.raises(ValueError, match=rf"members\[0\]: model_args may not hold '{name}'"):
        ConcatEnsembleConfig(members=[member(model_args={name: True})])


def test_refused_model_args_are_those_of_the_design():
    assert {"pretrained", "checkpoint_path", "cache_dir", "features_only", "num_classes"} <= set(REFUSED_MODEL_ARGS)
    assert {"pretrained_cfg", "pretrained_cfg_overlay"} <= set(REFUSED_MODEL_ARGS)


@pytest.mark.parametrize("field", ["model_args", "provenance"])
@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", float("nan"), float("inf"), object, 1j, {3: "a key"}, [[{"x": set()}]]]
)
def test_values_that_json_cannot_hold_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"members\[0\]: {field} holds .* plain JSON"):
        ConcatEnsembleConfig(members=[member(**{field: {"depth": value}})])


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"input_size": [3, 32]}, r"input_size=\[3, 32\]"),
        ({"input_size": [2, 32, 32]}, r"input_size=\[2, 32, 32\]"),
        ({"input_size": [3, 32, 0]}, r"input_size=\[3, 32, 0\]"),
        ({"input_size": [3, 32.0, 32]}, r"input_size=\[3, 32.0, 32\]"),
        ({"input_size": 32}, "input_size=32"),
        ({"crop_pct": 0}, "crop_pct=0"),
        ({"crop_pct": "0.9"}, "crop_pct='0.9'"),
        ({"crop_pct": True}, "crop_pct=True"),
        ({"crop_mode": "middle"}, "crop_mode='middle'"),
        ({"crop_mode": ["center"]}, "crop_mode="),
        ({"interpolation": "random"}, "interpolation='random'"),
        ({"mean": [0.5]}, r"mean=\[0.5\]"),
        ({"mean": [0.5, 0.5, "0.5"]}, "mean="),
        ({"mean": [0.5, 0.5, float("nan")]}, "nan"),
        ({"std": [1, 1, 0]}, r"std=\[1, 1, 0\]"),
        ({"std": [1, 1, 1, 1]}, r"std=\[1, 1, 1, 1\]"),
        ({"image_mode": "L"}, "image_mode='L'"),
        ({"image_mode": "CMYK"}, "image_mode='CMYK'"),
        ({"size": 32}, "size"),
    ],
)
def test_the_error_for_bad_preprocessing_names_the_member_and_the_value(changes, value):
    with pytest.raises(ValueError, match=rf"members\[1\]: .*{value}"):
        ConcatEnsembleConfig(members=[member(), pixels(**changes)])


@pytest.mark.parametrize("missing", RGB)
def test_incomplete_preprocessing_is_refused(missing):
    partial = {key: value for key, value in RGB.items() if key != missing}
    with pytest.raises(ValueError, match=rf"members\[0\]: preprocessing .*exactly the keys .*{missing}"):
        ConcatEnsembleConfig(members=[member(preprocessing=partial)])


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        ("resnet18", "'resnet18'"),
        ({"architecture": "resnet18"}, "architecture"),
        (member(weights="x"), "weights"),
        (member(num_features=0), "num_features=0"),
        (member(num_features="512"), "num_features='512'"),
        (member(num_features=True), "num_features=True"),
        (member(model_args=["in_chans"]), "model_args="),
        (member(preprocessing=GREY), r"\[1, 32, 32\].*3 channels"),
        (member(model_args={"in_chans": 1}), r"\[3, 32, 32\].*1 channels"),
    ],
)
def test_the_error_for_a_bad_member_names_the_member_and_the_value(bad, value):
    with pytest.raises(ValueError, match=rf"members\[0\]: .*{value}"):
        ConcatEnsembleConfig(members=[bad])


@pytest.mark.parametrize("active", [[2], [-1], [0, 0], [], [True], ["0"], "0", 0])
def test_active_members_out_of_range_twice_or_none_are_refused(active):
    with pytest.raises(ValueError, match=r"active_members=.*from 0 to 1"):
        ConcatEnsembleConfig(members=[member(), member()], active_members=active)


def test_active_members_set_later_are_refused_by_the_model():
    config = ConcatEnsembleConfig(members=[member()])
    config.active_members = [1]
    with pytest.raises(ValueError, match=r"active_members=\[1\]"):
        ConcatEnsembleModel(config)


def test_a_model_needs_at_least_one_member():
    # transformers makes empty configurations to find the values that differ from the defaults.
    with pytest.raises(ValueError, match="members is empty"):
        ConcatEnsembleModel(ConcatEnsembleConfig())


def test_the_config_copies_the_members_it_is_made_from():
    members = [member(model_args={"channels": (8, 16, 32, 64)})]
    before = copy.deepcopy(members)
    config = ConcatEnsembleConfig(members=members)
    config.members[0]["provenance"]["seed"] = 1
    assert members == before and config.members[0]["model_args"] == {"channels": [8, 16, 32, 64]}


def test_num_features_counts_only_the_active_members():
    members = [member(num_features=n) for n in (1, 20, 300)]
    assert ConcatEnsembleConfig(members=members).num_features == 321
    part = ConcatEnsembleConfig(members=members, active_members=[2, 0])
    assert (part.num_features, part.built_members) == (301, [2, 0])


def test_members_share_a_geometry_whatever_their_mean_and_std():
    config = ConcatEnsembleConfig(members=[pixels(), pixels(mean=[0, 0, 0], std=[1, 1, 1])])
    assert config.geometries == [RGB] and config.pixel_shape == (3, 32, 32)


def test_in_border_mode_the_mean_is_part_of_the_geometry_as_it_fills_the_border():
    border = [pixels(crop_mode="border", mean=[m] * 3) for m in (0.0, 1.0, 0.0)]
    config = ConcatEnsembleConfig(members=border)
    assert [config.geometry_index(k) for k in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    "other", [{"crop_pct": 0.9}, {"crop_mode": "squash"}, {"interpolation": "bilinear"}, {"input_size": [3, 16, 64]}]
)
def test_another_size_crop_or_interpolation_is_another_geometry(other):
    config = ConcatEnsembleConfig(members=[pixels(), pixels(**other), pixels()])
    assert [config.geometry_index(k) for k in range(3)] == [0, 1, 0]
    assert config.pixel_shape == (2, 3, 32, 64 if "input_size" in other else 32)


def test_geometries_are_numbered_over_all_members_whichever_are_active():
    grey = member(model_args={"in_chans": 1}, preprocessing=GREY)
    members = [member(), grey, pixels(input_size=[3, 48, 16])]
    config = ConcatEnsembleConfig(members=members, active_members=[2])
    assert config.geometry_index(2) == 2 and config.pixel_shape == (3, 3, 48, 32)


def test_a_configuration_without_a_head_has_no_labels(tmp_path):
    config = ConcatEnsembleConfig(members=[member()])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [saved.get(key) for key in ("id2label", "label2id", "num_labels")] == [None] * 3
    assert saved["auto_map"] == AUTO_MAP
    assert not ConcatEnsembleConfig.from_pretrained(tmp_path).id2label
    assert ConcatEnsembleConfig.from_pretrained(tmp_path, num_labels=3).num_labels == 3


def test_num_labels_none_means_no_head():
    assert ConcatEnsembleConfig(members=[member()], num_labels=None).id2label is None


@pytest.mark.parametrize("names", [["cat"], ["cat", "dog"], ["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_labels_survive_saving(tmp_path, names):
    # transformers leaves out two labels with the names that it gives by default.
    id2label = dict(enumerate(names))
    label2id = {name: n for n, name in id2label.items()}
    ConcatEnsembleConfig(members=[member()], id2label=id2label, label2id=label2id).save_pretrained(tmp_path)
    again = ConcatEnsembleConfig.from_pretrained(tmp_path)
    assert (again.id2label, again.label2id, again.num_labels) == (id2label, label2id, len(names))


def test_label_numbers_may_be_strings_as_in_transformers_example_scripts(tmp_path):
    names = {"cat": "0", "dog": "1"}
    config = ConcatEnsembleConfig(members=[member()], num_labels=2, id2label={"0": "cat", "1": "dog"}, label2id=names)
    config.save_pretrained(tmp_path)
    again = ConcatEnsembleConfig.from_pretrained(tmp_path)
    assert (again.id2label, again.label2id) == ({0: "cat", 1: "dog"}, names)
    with pytest.raises(ValueError, match="label2id"):
        ConcatEnsembleConfig(members=[member()], num_labels=2, label2id={"cat": "first"})


numbers = st.floats(allow_nan=False, allow_infinity=False)
keys = st.text(max_size=5) | st.sampled_from(["dtype", "source", "seed", "quantization_config", "_name_or_path"])
words = st.from_regex(PLAIN_NAME, fullmatch=True)


def nested(numbers, texts, names):
    return st.recursive(
        st.none() | st.booleans() | numbers | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=6,
    )


plain = nested(st.integers() | numbers, st.text(max_size=5), keys)
arguments = nested(st.integers(-MAX_NUMBER, MAX_NUMBER) | st.floats(-MAX_NUMBER, MAX_NUMBER), words, keys)


@st.composite
def valid_members(draw):
    channels = draw(st.sampled_from([1, 3]))
    each = st.lists(st.floats(0.01, 1), min_size=channels, max_size=channels)
    model_args = draw(
        st.dictionaries(words.filter(lambda key: key not in (*REFUSED_MODEL_ARGS, "in_chans")), arguments, max_size=2)
    )
    return {
        "architecture": draw(st.sampled_from(["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])),
        "model_args": {**model_args, **({"in_chans": 1} if channels == 1 else {})},
        "num_features": draw(st.integers(1, 4096)),
        "preprocessing": {
            "input_size": [channels, draw(st.integers(1, 512)), draw(st.integers(1, 512))],
            "crop_pct": draw(st.floats(0.1, 1)),
            "crop_mode": draw(st.sampled_from(["center", "squash", "border"])),
            "interpolation": draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])),
            "mean": draw(each),
            "std": draw(each),
            "image_mode": {1: "L", 3: "RGB"}[channels],
        },
        "provenance": draw(st.dictionaries(keys, plain, max_size=3)),
    }


@settings(max_examples=60)
@given(members=st.lists(valid_members(), min_size=1, max_size=4), data=st.data(), labels=st.sampled_from([0, 1, 2, 3]))
def test_every_valid_configuration_survives_json_and_gives_a_processor(tmp_path_factory, members, data, labels):
    some = st.lists(st.sampled_from(range(len(members))), min_size=1, unique=True)
    active = data.draw(st.none() | some)
    config = ConcatEnsembleConfig(members=members, active_members=active, **({"num_labels": labels} if labels else {}))
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    again = ConcatEnsembleConfig.from_pretrained(folder)
    assert again.members == config.members == members
    assert (again.active_members, again.num_features) == (active, config.num_features)
    assert again.id2label == config.id2label and (again.num_labels or 0) == labels
    assert ConcatEnsembleImageProcessor.from_config(again).geometries == config.geometries


def test_every_architecture_of_timm_is_accepted():
    names = timm.list_models()
    assert all(ConcatEnsembleConfig(members=[member(architecture=name)]).num_features == 512 for name in names)
