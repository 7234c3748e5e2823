"""Marks, styles and places of the small pictures: balanced, as stated, and the same for the same seed."""

import numpy as np
import pytest
import torch

from concat_ensemble.data.images import read_image
from concat_ensemble.data.scattered import Scatter
from concat_ensemble.experiments.pictures import (
    CANVAS,
    NO_MARK,
    STYLES,
    add_marks,
    draw_in_style,
    draw_marks,
    draw_parts,
    read_digits,
    scatter_pictures,
    to_dataset,
)

DIGITS, LABELS = read_digits()
FIRST = DIGITS[:40]


def test_parts_are_disjoint_and_have_as_many_of_each_class_as_asked():
    counts = [[72] * 10, [54] * 10, list(range(10))]
    parts = draw_parts(LABELS, counts, np.random.default_rng(3))
    assert [np.bincount(LABELS[rows], minlength=10).tolist() for rows in parts] == counts
    everything = np.concatenate(parts)
    assert len(set(everything.tolist())) == len(everything)
    again = draw_parts(LABELS, counts, np.random.default_rng(3))
    assert all(np.array_equal(*pair) for pair in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], draw_parts(LABELS, counts, np.random.default_rng(4))[0])


@pytest.mark.parametrize(("agreement", "agreeing"), [(0.95, 38), (1.0, 40), (0.0, 0), (0.1, 4)])
def test_in_every_class_the_stated_share_of_marks_agrees_and_the_others_are_spread_evenly(agreement, agreeing):
    labels = np.repeat(np.arange(10), 40)
    marks = draw_marks(labels, agreement, np.random.default_rng(0))
    table = np.zeros((10, 10), int)
    np.add.at(table, (labels, marks), 1)
    assert np.diag(table).tolist() == [agreeing] * 10
    others = table[~np.eye(10, dtype=bool)].reshape(10, 9)
    assert (others.max(1) - others.min(1) <= 1).all()
    if agreement == 0.1:  # without correlation: every mark equally often in every class
        assert (table == 4).all()


def test_a_mark_is_a_bar_in_the_frame_and_leaves_the_digit_alone():
    pictures = add_marks(DIGITS[:11], np.array([*range(10), NO_MARK]))
    assert np.array_equal(pictures[:, 1:-1, 1:-1], DIGITS[:11])
    frames = pictures.copy()
    frames[:, 1:-1, 1:-1] = 0
    assert frames.sum((1, 2)).tolist() == [2] * 10 + [0]
    assert frames[3, 6:8, 0].tolist() == [1, 1] and frames[9, 8:, -1].tolist() == [1, 1]
    assert len({frame.tobytes() for frame in frames}) == 11


def test_styles_are_what_their_names_say():
    rng = np.random.default_rng(0)
    drawn = {style: draw_in_style(FIRST, style, rng) for style in STYLES}
    plain = 1 - drawn["inverted"]
    assert all(each.shape == (40, 16, 16, 3) and 0 <= each.min() <= each.max() <= 1 for each in drawn.values())
    assert np.isclose(plain.mean(), FIRST.mean(), atol=0.01), "only turned over, and enlarged"
    assert (drawn["thick"] >= plain).all() and drawn["thick"].mean() > 1.2 * plain.mean()
    textured, background = drawn["textured"], plain == 0
    assert textured[background].max() <= 0.5 and textured[background].std() > 0.1 and (textured >= plain - 1e-6).all()
    colored = drawn["colored"].astype(float)
    darkest, whitest = (pick(plain[..., 0].reshape(40, -1), axis=1) for pick in (np.argmin, np.argmax))
    flat, rows = colored.reshape(40, -1, 3), np.arange(40)
    assert (plain.reshape(40, -1, 3)[rows, whitest] > 0.7).all()
    assert np.abs(flat[rows, whitest] - flat[rows, darkest]).min() > 0.3 * 0.7
    assert np.ptp(flat, axis=2).max(1).min() > 0.02, "in color, not gray"


@pytest.mark.parametrize("style", STYLES)
def test_the_same_generator_draws_the_same_pictures(style):
    drawn = [draw_in_style(FIRST, style, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2]) == (style in ("thick", "inverted")), "these have no chance in them"


def test_pictures_are_placed_as_in_training_and_alike_for_the_same_seed():
    plain, marked = (scatter_pictures(add_marks(FIRST, np.full(40, mark)), seed=5) for mark in (NO_MARK, 0))
    differs = np.abs(marked - plain) > 0.01
    assert plain.shape == (40, CANVAS, CANVAS)
    assert 0 < differs.mean() < 0.1 and differs.any((1, 2)).all(), "the same places and noise: only the mark differs"
    assert not np.array_equal(plain, scatter_pictures(add_marks(FIRST, np.full(40, NO_MARK)), seed=6))
    images = torch.from_numpy(add_marks(FIRST, np.full(40, NO_MARK)))[:, None]
    expected = Scatter(CANVAS, generator=torch.Generator().manual_seed(5))(images)
    assert np.array_equal(plain, expected[:, 0].numpy())


def test_each_channel_of_a_color_picture_is_placed_alike():
    gray = np.repeat(FIRST[..., None], 3, axis=-1)
    canvases = scatter_pictures(gray, seed=0)
    assert canvases.shape == (40, CANVAS, CANVAS, 3)
    assert np.corrcoef(canvases[..., 0].ravel(), canvases[..., 2].ravel())[0, 1] > 0.9, "up to the noise"


def test_a_dataset_holds_the_pictures_in_8_bits():
    canvases = scatter_pictures(FIRST, seed=0)
    split = to_dataset(canvases, LABELS[:40], [str(digit) for digit in range(10)])
    assert split["label"][:] == LABELS[:40].tolist()
    stored = np.stack([np.asarray(read_image(split, row)) for row in range(40)])
    assert np.array_equal(stored, np.round(canvases * 255)), "a canvas is in 8 bits already"
