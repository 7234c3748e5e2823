"""Extraction of many images, by several processes, and of streams: each image is read once, by one process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets, load_dataset

from concat_ensemble import extract_features, load_data
from concat_ensemble.data import images as data_images
from concat_ensemble.data.images import HASH_BYTES
from concat_ensemble.features import index as feature_index
from concat_ensemble.features import reading
from concat_ensemble.features.index import HashIndex, to_bytes, to_hashes
from concat_ensemble.features.store import Block, stored_blocks

SHARDS = "*/*.safetensors"


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    """Hashes of which many begin with the same bytes or end with zeros."""
    values = np.random.default_rng(seed).integers(0, 3, (count, HASH_BYTES), dtype=np.uint8)
    values[:, 4:12] = 0
    return to_hashes([row.tobytes() for row in values])


@pytest.mark.parametrize("longest", [8, 1 << 17])
def test_an_index_finds_what_a_dictionary_finds(longest, monkeypatch):
    monkeypatch.setattr(feature_index, "LONGEST", longest)
    monkeypatch.setattr(feature_index, "SMALL", 64)
    index, expected, rng = HashIndex(), {}, np.random.default_rng(1)
    for start in range(0, 3_000, 60):
        hashes = random_hashes(rng.integers(0, 120), seed=start)
        numbers = start + np.arange(len(hashes))
        index.add(hashes, numbers)
        expected |= dict(zip(to_bytes(hashes), numbers.tolist(), strict=True))
    sought = random_hashes(5_000, seed=7)
    assert index.find(sought).tolist() == [expected.get(image, -1) for image in to_bytes(sought)]
    assert HashIndex().find(sought[:2]).tolist() == [-1, -1]


def test_a_block_keeps_hashes_that_end_with_zeros_apart(tmp_path):
    images = [bytes([1]) + bytes(15), bytes(16), bytes([1, 0, 1]) + bytes(13)]
    block = Block(tmp_path)
    block.write(images, torch.arange(3.0)[:, None])
    assert block.refresh().missing([*images, bytes([1, 1]) + bytes(14)]) == {bytes([1, 1]) + bytes(14)}
    assert block.rows(images[::-1])[:].ravel().tolist() == [2, 1, 0]
    with pytest.raises(KeyError, match="1 images have no row"):
        block.rows([b"x" * 16])


class Reads:
    """Counts how often each image is read, and how many are decoded, within this process."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.read, self.decoded = [], 0
        read_encoded, processor_input = reading.read_encoded, reading.processor_input

        def count_read(encoded, row):
            self.read.append(row)
            return read_encoded(encoded, row)

        def count_decoded(*args):
            self.decoded += 1
            return processor_input(*args)

        patch.setattr(reading, "read_encoded", count_read)
        patch.setattr(reading, "processor_input", count_decoded)
        patch.setattr(data_images, "hash_image", lambda *_: pytest.fail("an image is hashed elsewhere"))


def test_each_image_is_read_once_and_decoded_only_where_it_is_missing(ensemble, digits, tmp_path, monkeypatch):
    total, batch = sum(map(len, digits.values())), 8
    for stored in (0, total):
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            extract_features(ensemble, digits, store=tmp_path, batch_size=batch, quiet=True)
        assert (len(reads.read), reads.decoded) == (total + batch * (not stored), total - stored)


def test_a_restart_decodes_only_what_is_missing(ensemble, digits, tmp_path, monkeypatch):
    expected = extract_features(ensemble, digits, store=tmp_path, batch_size=8, quiet=True)
    content = {path: path.read_bytes() for path in tmp_path.glob(SHARDS)}
    lost = sum(block["images"] for block in stored_blocks(tmp_path)) // 2
    for folder in tmp_path.iterdir():
        newest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        newest.unlink()
    lost -= min(block["images"] for block in stored_blocks(tmp_path))
    reads = Reads(monkeypatch)
    again = extract_features(ensemble, digits, store=tmp_path, batch_size=8, quiet=True)
    assert reads.decoded == again.extracted == lost > 0
    assert {path: path.read_bytes() for path in tmp_path.glob(SHARDS)} == content
    assert np.array_equal(again["train"].features, expected["train"].features)


def test_images_in_files_are_read_once(ensemble, digits, tmp_path, monkeypatch):
    for row, image in enumerate(digits["train"]):
        folder = tmp_path / "photos" / f"class-{image['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(image["image"]["bytes"])
    files = load_data(tmp_path / "photos")
    opened, opens = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or opens(path, *a, **k))
    extract_features(ensemble, files, store=tmp_path / "store", batch_size=4, quiet=True)
    pictures = [path for path in opened if path.suffix == ".png"]
    assert len(pictures) == sum(map(len, files.values())) + 4, "the first batch finds out that there is work to do"


def test_members_that_lack_different_images_get_the_features_of_a_fresh_run(ensemble, digits, tmp_path):
    """They wait for batches of their own, in one pass over the images."""
    some = DatasetDict({split: rows.select(range(3, 20)) for split, rows in digits.items()})
    extract_features(ensemble.export_active([1]), some, store=tmp_path / "store", quiet=True)
    table = extract_features(ensemble, digits, store=tmp_path / "store", batch_size=7, quiet=True)
    expected = extract_features(ensemble, digits, store=tmp_path / "fresh", batch_size=7, quiet=True)
    for split in expected:
        np.testing.assert_allclose(table[split].features, expected[split].features, atol=1e-5)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(digits, tmp_path_factory) -> dict[str, list[str]]:
    """Parquet files of the digits, of which a stream reads one after the other."""
    folder = tmp_path_factory.mktemp("tables")
    for split, rows in digits.items():
        for part in range(3):
            rows.shard(3, part, contiguous=True).to_parquet(str(folder / f"{split}-{part}.parquet"))
    return {split: sorted(map(str, folder.glob(f"{split}-*"))) for split in digits}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_table_of_the_loaded_dataset(num_workers, ensemble, digits, tables, tmp_path):
    expected = extract_features(ensemble, digits, store=tmp_path / "loaded", batch_size=7, quiet=True)
    stream = load_dataset("parquet", data_files=tables, streaming=True)
    settings = {"batch_size": 7, "num_workers": num_workers, "quiet": True}
    table = extract_features(ensemble, stream, store=tmp_path / "streamed", **settings)
    assert list(table) == list(expected) and table.class_names == expected.class_names
    for split in expected:
        assert np.array_equal(table[split].features, expected[split].features)
        assert table[split].labels.tolist() == expected[split].labels.tolist()
    assert extract_features(ensemble, stream, store=tmp_path / "loaded", quiet=True).extracted == 0


def test_a_stream_with_bad_images_names_them(ensemble, damaged, tmp_path):
    data = damaged(train=["null", "text.png"])
    stream = data["train"].remove_columns("group").to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match=r"2 of 32 images cannot be used: the train split, image 3: the row has no"):
        extract_features(ensemble, stream, store=tmp_path, quiet=True)
    table = extract_features(ensemble, stream, store=tmp_path, skip_bad=True, quiet=True)
    assert table.skipped == {"train": [3, 4]} and len(table["train"]) == 30


def test_streams_that_cannot_be_extracted_are_refused_before_the_first_image(ensemble, digits):
    stream = digits["train"].to_iterable_dataset()
    text = Dataset.from_dict({"image": [None, None], "label": ["a", "b"]}, features=None)
    text = text.cast_column("image", digits["train"].features["image"]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"labels of the train stream are string .*cast_column\('label', ClassLabel"):
        extract_features(ensemble, text, quiet=True)
    other = stream.cast_column("label", ClassLabel(names=["x", "y", "z"]))
    with pytest.raises(ValueError, match="the streams of the splits have different classes"):
        extract_features(ensemble, IterableDatasetDict({"train": stream, "test": other}), quiet=True)


def test_a_stream_with_hidden_labels_says_so(ensemble, digits, tmp_path):
    rows = digits["train"].select(range(4))
    hidden = rows.remove_columns("label").add_column("label", [0, 1, -1, 2]).cast(rows.features)
    stream = concatenate_datasets([rows, hidden]).to_iterable_dataset()
    with pytest.raises(ValueError, match="cannot read the train stream: row 6 has no label"):
        extract_features(ensemble, stream, store=tmp_path, quiet=True)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_shows_what_it_promises(tmp_path):
    """It exits with 1 unless all runs give the same features, the stream and the two nodes among them. Shares are of
    whole files, so that one may be larger than another by a file of 512 images.
    """
    rows, file, batch = 4000, 512, 64
    root = Path(__file__).parents[3]
    command = [sys.executable, root / "tests/benchmarks/extraction_at_scale.py", "--rows", str(rows), "--processes"]
    done = subprocess.run([*command, "1", "2", "--json", tmp_path / "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "json").read_text())
    for number, run in result["processes"].items():
        assert len(run) == int(number)
        assert all(each["read"]["images"] <= rows / len(run) + file + batch for each in run)
    for number, run in result["audited"].items():
        assert len(run) == int(number)
        assert all(each["read"]["images"] <= 2 * rows / len(run) + file + 200 for each in run), "to hash and to decode"
    assert rows <= sum(each["read"]["images"] for each in result["nodes"]) <= rows + 2 * batch
    assert sum(each["read"]["images"] for each in result["stream"]) == rows
    assert 0 < result["restart"][0]["extracted"] <= 3 / 4 * rows and result["again"][0]["extracted"] == 0
    assert "1 of 2 processes do not see the folder" in result["two disks"]
    assert "to a folder that all nodes share" in result["two disks"]
