"""Features are extracted once, survive kills and damage, and are never read for another member or image."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from optimum.quanto import freeze, qfloat8_e4m3fn, qint8, quantize
from peft import LoraConfig
from safetensors.torch import save_file
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from concat_ensemble import ConcatEnsembleImageProcessor, ConcatEnsembleModel, assemble, extract_features, load_data
from concat_ensemble.commands.app import main
from concat_ensemble.data.images import HASH_BYTES, image_hashes, read_image
from concat_ensemble.features import extraction
from concat_ensemble.features.store import Block, _checksum, stored_blocks

SHARDS = "*/*.safetensors"


@pytest.fixture
def extract(tmp_path):
    return lambda model, data, **options: extract_features(
        model, data, store=tmp_path / "store", quiet=True, **options
    )


def same(table, other) -> bool:
    return all(np.array_equal(table[kind].features, other[kind].features) for kind in table)


def test_a_second_extraction_reads_the_stored_features(extract, ensemble, digits):
    first, second = extract(ensemble, digits), extract(ensemble, digits)
    assert (first.extracted, second.extracted) == (sum(map(len, digits.values())), 0)
    assert same(first, second)


def test_an_ensemble_with_one_more_member_extracts_only_that_member(extract, ensemble, backbone, digits, tmp_path):
    extract(ensemble, digits)
    before = set((tmp_path / "store").glob(SHARDS))
    more = assemble([ensemble, backbone(9)])
    table = extract(more, digits)
    new = set((tmp_path / "store").glob(SHARDS)) - before
    assert len({path.parent for path in new}) == 1
    alone = extract_features(more, digits, store=tmp_path / "fresh", quiet=True)
    for kind in table:
        np.testing.assert_allclose(table[kind].features, alone[kind].features, atol=1e-6)


def test_a_limit_a_shuffle_and_another_split_find_their_rows(extract, ensemble):
    some = extract(ensemble, load_data("digits", limit=40))
    whole_data = load_data("digits")
    whole = extract(ensemble, whole_data)
    assert (some.extracted, whole.extracted) == (120, 1797 - 120)
    assert extract(ensemble, whole_data.shuffle(seed=3)).extracted == 0
    assert extract(ensemble, load_data("digits", test_size=0.2, seed=5)).extracted == 0


def test_changed_weights_are_extracted_again(extract, backbone, digits):
    model = assemble([backbone(1)])
    before = extract(model, digits)
    with torch.no_grad():
        next(model.members["0"].parameters()).mul_(2)  # its provenance still has the old hash
    after = extract(model, digits)
    assert after.extracted == before.extracted and not same(before, after)


def test_float16_and_bfloat16_are_kept_apart_from_float32(extract, ensemble, digits):
    full, half = extract(ensemble, digits), extract(ensemble, digits, storage="float16")
    coarse = extract(ensemble, digits, compute=torch.bfloat16)
    assert half.extracted == coarse.extracted == full.extracted
    np.testing.assert_allclose(half["test"].features, full["test"].features, rtol=1e-3, atol=1e-5)
    assert not same(half, full) and not same(coarse, full)


def quantized_by_torchao(model):
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quantized_by_torchao_with_activations(model):
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def quantized_by_quanto(model):
    quantize(model, weights=qint8)
    freeze(model)
    return model


def to_be_quantized_by_quanto(model):
    quantize(model, weights=qint8)
    return model


def to_be_quantized_by_quanto_to_float8(model):
    quantize(model, weights=qfloat8_e4m3fn)
    return model


def adapted(model, alpha=8):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["qkv"], init_lora_weights=False))
    return model


def adapted_with_another_scale(model):
    return adapted(model, alpha=32)


def with_an_adapter_turned_off(model):
    adapted(model).disable_adapters()
    return model


def with_another_adapter(model):
    adapted(model).add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False), "other")
    return model


def with_both_adapters_of_which_the_first_is_active(model):
    with_another_adapter(model).set_adapter("default")
    return model


CHANGES = [
    quantized_by_torchao,
    quantized_by_torchao_with_activations,
    quantized_by_quanto,
    to_be_quantized_by_quanto,
    to_be_quantized_by_quanto_to_float8,
    adapted,
    adapted_with_another_scale,
    with_an_adapter_turned_off,
    with_another_adapter,
    with_both_adapters_of_which_the_first_is_active,
]


@pytest.mark.filterwarnings("ignore")
def test_features_of_quantized_and_adapted_models_are_kept_apart(tmp_path, digits):
    settings = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **settings)
    assemble(vit).save_pretrained(tmp_path / "vit")
    images, keys = digits["test"], set()
    for change in (lambda model: model, *CHANGES):
        for _ in range(2):  # the second one reads what the first has stored
            model = change(ConcatEnsembleModel.from_pretrained(tmp_path / "vit"))
            table = extract_features(model, digits, store=tmp_path / "store", quiet=True)
        assert table.extracted == 0
        keys |= set(table.keys)
        pixels = ConcatEnsembleImageProcessor.from_config(model.config)([read_image(images, n) for n in range(8)])
        with torch.inference_mode():
            expected = model.eval()(**pixels).pooler_output
        np.testing.assert_allclose(table["test"].features[:8], expected, atol=1e-5)
    assert len(keys) == 1 + len(CHANGES)


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_quantization_is_refused(extract, digits):
    model = torch.ao.quantization.quantize_dynamic(assemble("random:vit_tiny_patch16_224"), {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"_packed_params=.* must be a tensor; to quantize a model, use torchao"):
        extract(model, digits)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_extracted_again(extract, ensemble, digits, tmp_path, damage):
    good = extract(ensemble, digits)
    shard = sorted((tmp_path / "store").glob(SHARDS))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.unlink()  # the first table still has it mapped
    shard.write_bytes({"flip": bytes(content), "truncate": content[: len(content) // 2], "empty": b""}[damage])
    again = extract(ensemble, digits)
    assert again.extracted > 0 and same(good, again)


def write_shard(path, features, images=None, **others):
    """A whole shard, with its checksum, in place of one."""
    images = (
        torch.arange(len(features) * HASH_BYTES).reshape(-1, HASH_BYTES).to(torch.uint8) if images is None else images
    )
    path.unlink(missing_ok=True)
    tensors = {"features": features, "images": images, **others}
    save_file(tensors, path, metadata={"checksum": _checksum(images, features)})


WHOLE_BUT_WRONG = {
    "another width": lambda path: write_shard(path, torch.ones(3, 5)),
    "another dtype": lambda path: write_shard(path, torch.ones(3, 16).half()),
    "more rows than images": lambda path: write_shard(path, torch.ones(3, 16), torch.zeros(2, HASH_BYTES).byte()),
    "no images": lambda path: save_file({"features": torch.ones(3, 16)}, path),
    "one row": lambda path: write_shard(path, torch.ones(16), torch.zeros(1, HASH_BYTES).byte()),
    "a number": lambda path: save_file({"features": torch.tensor(1.0), "images": torch.tensor(1.0)}, path),
    "shorter hashes": lambda path: write_shard(path, torch.ones(3, 16), torch.zeros(3, HASH_BYTES - 1).byte()),
    "whole numbers": lambda path: write_shard(path, torch.ones(3, 16, dtype=torch.int64)),
    "coarse numbers": lambda path: write_shard(path, torch.ones(3, 16, dtype=torch.bfloat16)),
    "more than that": lambda path: write_shard(path, torch.ones(3, 16), labels=torch.ones(3)),
}


@pytest.mark.parametrize("case", WHOLE_BUT_WRONG)
def test_a_whole_shard_that_is_no_shard_of_this_member_is_refused(case, tmp_path):
    shard = tmp_path / "key" / "0.safetensors"
    shard.parent.mkdir()
    WHOLE_BUT_WRONG[case](shard)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(shard))} .*; delete it, and its images are extracted again"
    ):
        Block(shard.parent, num_features=16, dtype=torch.float32).refresh()
    assert len(stored_blocks(tmp_path)) == 1, "the listing shows the block nevertheless"


def test_an_extraction_that_finds_such_a_shard_goes_on_when_it_is_deleted(extract, ensemble, digits, tmp_path):
    good = extract(ensemble, digits)
    shard = sorted((tmp_path / "store").glob(SHARDS))[0]
    write_shard(shard, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"has rows of 5 numbers in torch.float32 that must be 16 in torch.float32"):
        extract(ensemble, digits)
    shard.unlink()
    assert same(good, extract(ensemble, digits))


def test_shards_of_another_width_are_refused_where_nothing_tells_the_width(tmp_path):
    """Of a model that is no ensemble, the first shard does."""
    block = Block(tmp_path)
    block.write([bytes(HASH_BYTES)], torch.ones(1, 16))
    write_shard(tmp_path / "x.safetensors", torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"safetensors has rows of (5|16) numbers .* delete it"):
        Block(tmp_path).refresh()


def test_rows_of_another_width_are_not_stored(tmp_path):
    block = Block(tmp_path, "resnet10t", num_features=16, dtype=torch.float32)
    for rows in (torch.ones(1, 5), torch.ones(1, 16).half()):
        with pytest.raises(ValueError, match=r"resnet10t gives rows of .* that must be 16 in torch.float32"):
            block.write([bytes(HASH_BYTES)], rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 64, b"{}", b"PK\3\4" * 9, b"\x10" + b"\0" * 7 + b'{"features": 1}}']
)
def test_garbage_among_the_shards_is_removed(content, tmp_path):
    block, image = Block(tmp_path), bytes(HASH_BYTES)
    block.write([image], torch.ones(1, 16))
    garbage = tmp_path / "0.safetensors"
    garbage.write_bytes(content)
    (tmp_path / "folder.safetensors").mkdir()
    assert block.refresh().missing([image]) == set() and not garbage.exists()
    assert np.array_equal(block.rows([image])[:], np.ones((1, 16)))


def test_what_a_block_is_about_may_be_old_or_damaged(extract, ensemble, digits, tmp_path):
    """That of 0.1.0 states no format."""
    extract(ensemble, digits)
    for about in (
        b'{"architecture": "resnet10t"}',
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"architecture": []}',
        b"\xff",
    ):
        for block in (tmp_path / "store").iterdir():
            (block / "about.json").write_bytes(about)
        assert all(isinstance(block["architecture"], str) for block in stored_blocks(tmp_path / "store"))
        assert extract(ensemble, digits).extracted == 0
    with Block(block, "resnet10t").lock():
        assert json.loads((block / "about.json").read_text()) == {"architecture": "resnet10t", "format": 1}
        assert not list(block.glob(".*.tmp"))


def test_a_block_in_the_format_of_another_version_is_refused(extract, ensemble, digits, tmp_path):
    extract(ensemble, digits)
    block = next((tmp_path / "store").iterdir())
    (block / "about.json").write_text('{"architecture": "resnet10t", "format": 2}')
    with pytest.raises(ValueError, match=rf"{block.name} is in format 2 of another version .*; delete the folder"):
        extract(ensemble, digits)


def test_a_kill_leaves_either_about_file(tmp_path, monkeypatch):
    """It is written aside and renamed, by whoever holds the lock."""
    with Block(tmp_path, "old").lock():
        pass

    def killed(path, target):
        assert json.loads((tmp_path / "about.json").read_text())["architecture"] == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt), Block(tmp_path, "new").lock():
        pass
    assert json.loads((tmp_path / "about.json").read_text()) == {"architecture": "old", "format": 1}


def test_a_member_alone_gives_the_bits_that_it_gives_among_others(backbone, digits, tmp_path):
    """Unless another one has the same geometry with another mean or std: then they are the same up to rounding."""
    other = {"mean": (0.3,), "std": (0.2,)}
    members = [backbone(1), backbone(2), backbone(3, pixels={"input_size": (1, 24, 24)}), backbone(4, pixels=other)]
    model = assemble(members)
    together = extract_features(model, digits, store=tmp_path / "together", quiet=True)
    for k in range(4):
        alone = extract_features(model.export_active([k]), digits, store=tmp_path / f"{k}", quiet=True)
        expected, features = together.members([k])["test"].features, alone["test"].features
        assert alone.keys == (together.keys[k],)
        assert np.array_equal(features, expected) or k == 3
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_identical_images_are_stored_once(extract, ensemble, digits):
    twice = extract(ensemble, load_data(digits["train"].select([*range(20)] * 4), limit=80))
    assert twice.extracted == 20


def test_rows_can_be_read_in_slices(extract, ensemble, digits):
    split = extract(ensemble, digits)["train"]
    features, labels = split
    parts = [split.rows(slice(start, start + 7)) for start in range(0, len(split), 7)]
    assert np.array_equal(np.concatenate(parts), features) and len(labels) == len(split)


def test_float16_overflow_is_refused_and_not_stored(extract, backbone, digits, tmp_path):
    model = assemble([backbone(1)])
    with torch.no_grad():
        for parameter in list(model.parameters())[-4:]:
            parameter.mul_(1e6)
    with pytest.raises(ValueError, match=r"too large for float16 .*storage='float32'"):
        extract(model, digits, storage="float16")
    assert not list((tmp_path / "store").glob(SHARDS))


def test_an_unknown_storage_is_refused(extract, ensemble, digits):
    with pytest.raises(ValueError, match=r"storage='int8' .*float16"):
        extract(ensemble, digits, storage="int8")


CHILD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from concat_ensemble.features import extraction
from concat_ensemble import ConcatEnsembleModel, extract_features, load_data
extraction.SHARD_IMAGES = 64
print("ready", flush=True)
extract_features(ConcatEnsembleModel.from_pretrained(sys.argv[1]), load_data("digits"), store=Path(sys.argv[2]),
                 batch_size=32, quiet=True)
print("done", flush=True)
"""


def child(folder, store) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(store) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.glob(SHARDS)}


@pytest.fixture(scope="module")
def model(ensemble, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ensemble.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> dict[str, bytes]:
    """What a child writes that nothing stops."""
    store = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "SHARD_IMAGES", 64)
        loaded, data = ConcatEnsembleModel.from_pretrained(model), load_data("digits")
        extract_features(loaded, data, store=store, batch_size=32, quiet=True)
    return contents(store)


def killed_until_done(folder, store, seed: int, kills: int, within: float = 1.5) -> int:
    """Kill the child at random moments, at most `within` seconds after it is ready, then let it finish.

    Returns how many kills hit a running extraction.
    """
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        process = child(folder, store)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, within))
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = child(folder, store)
    assert process.wait(120) == 0, process.stderr.read()
    return hits


@pytest.mark.slow
def test_a_killed_extraction_continues_to_the_same_files(undisturbed, model, tmp_path):
    assert killed_until_done(model, tmp_path / "store", seed=0, kills=2, within=0.5) > 0
    assert contents(tmp_path / "store") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_thirty_kills_each_continue_to_the_same_files(undisturbed, model, tmp_path, seed):
    killed_until_done(model, tmp_path / "store", seed=seed, kills=1)
    assert contents(tmp_path / "store") == undisturbed


@pytest.mark.slow  # what two processes read and give is in test_processes.py and test_scale.py
def test_two_processes_share_one_extraction(undisturbed, model, tmp_path):
    script = tmp_path / "shared.py"
    head = "from accelerate import PartialState\nstate = PartialState(cpu=True)\nassert state.num_processes == 2\n"
    script.write_text(head + CHILD)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(script), str(model), str(tmp_path / "store")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr
    assert contents(tmp_path / "store") == undisturbed


@pytest.mark.slow
def test_two_extractions_at_once_write_the_same_files(undisturbed, model, tmp_path):
    both = [child(model, tmp_path / "store") for _ in range(2)]
    assert [process.wait(180) for process in both] == [0, 0]
    assert contents(tmp_path / "store") == undisturbed


def test_a_full_disk_leaves_stored_features_untouched(digits, tmp_path):
    """On a file system of 64 KiB, if this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        block = Block(disk / "block")
        images = image_hashes(digits["train"])
        with block.lock():
            block.write(images[:4], torch.ones(4, 16))
            with pytest.raises(OSError, match=r"free some space"):
                block.write(images[4:20], torch.ones(16, 4096))
        reopened = Block(disk / "block").refresh()
        assert reopened.missing(images[:5]) == {images[4]}
        assert np.array_equal(reopened.rows(images[:4])[:], np.ones((4, 16)))
        assert not list(disk.glob("block/*.tmp")) and not list(disk.glob("block/.*.tmp"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # lazily, since the rows are still mapped


def test_the_store_is_listed_and_verified(extract, ensemble, digits, tmp_path):
    extract(ensemble, digits)
    listed = stored_blocks(tmp_path / "store")
    assert [(block["architecture"], block["images"], block["num_features"]) for block in listed] == [
        ("resnet10t", sum(map(len, digits.values())), 16)
    ] * 2
    shard = sorted((tmp_path / "store").glob(SHARDS))[0]
    content = shard.read_bytes()[:-1]
    shard.unlink()
    shard.write_bytes(content)
    assert sorted(block["damaged"] for block in stored_blocks(tmp_path / "store", verify=True)) == [0, 1]


def test_the_cache_command_lists_blocks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["concat-ensemble", "cache", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("[")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
