"""Files and keys that version 0.1.0 wrote, kept byte for byte: what it stored must be found, and what it wrote must
load, for ever.

`tests/golden/` was written by the code of 0.1.0 and is never written again.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleImageProcessor, assemble
from concat_ensemble.features.extraction import block_names
from concat_ensemble.features.extractor import PooledFeatures
from concat_ensemble.features.store import Block
from concat_ensemble.reporting.tables import row_texts
from concat_ensemble.studies.results import Results

GOLDEN = Path(__file__).parent / "golden"


def member(architecture: str, **model_args) -> torch.nn.Module:
    """Weights that depend on no random generator, so that they are the same on every processor."""
    model = timm.create_model(architecture, num_classes=0, **model_args)
    for place, tensor in enumerate(model.state_dict().values()):
        values = torch.arange(tensor.numel()).remainder(97).add(place % 7) / 128
        tensor.copy_(values.reshape(tensor.shape))
    return model.eval()


@pytest.fixture(scope="module")
def trio():
    """A ResNet, a grey ResNet and a ViT, of two geometries."""
    grey = member("resnet10t", in_chans=1, channels=(8, 8, 16, 16), stem_width=8)
    grey.pretrained_cfg |= {"input_size": (1, 32, 32), "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)}
    return assemble([member("resnet10t", channels=(8, 8, 16, 16), stem_width=8), grey, member("test_vit")])


def test_block_keys(trio):
    names = block_names(trio, None, PooledFeatures(), {"compute": "torch.float32", "storage": "torch.float32"})
    assert dict(zip("012", [key for key, _ in names], strict=True)) == json.loads(
        (GOLDEN / "block-keys.json").read_text()
    )


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_a_saved_ensemble_is_described_as_before(name, trio, tmp_path):
    trio.save_pretrained(tmp_path)
    written, golden = json.loads((tmp_path / name).read_text()), json.loads((GOLDEN / name).read_text())
    for content in (written, golden):
        content.pop("transformers_version", None)
    assert json.dumps(written, indent=1) == json.dumps(golden, indent=1)


def test_an_old_config_loads(trio):
    config = ConcatEnsembleConfig.from_pretrained(GOLDEN)
    assert config.members == trio.config.members and config.num_features == 16 + 16 + 64
    assert ConcatEnsembleImageProcessor.from_pretrained(GOLDEN).geometries == config.geometries


@pytest.mark.parametrize("name", ["results-repeats", "results-baselines", "results-one-run"])
def test_an_old_results_file_loads_with_the_same_numbers(name):
    results = Results.load(GOLDEN / f"{name}.json")
    assert numbers(results) == json.loads((GOLDEN / f"{name}-numbers.json").read_text())


def numbers(results: Results) -> dict:
    """What a reader of the results is shown, under the keys of 0.1.0."""
    keys = {key: key for key in ("top1", "interval", "paired", "p", "steps", "gflops")}
    keys |= {"draws": "deviation", "width": "num_features"}
    rows = [{old: row_texts(results, row)[new] for old, new in keys.items()} for row in results.rows]
    return {"protocol": results.protocol, "repeats": results.repeats, "rows": rows}


def test_an_old_shard_is_read(tmp_path):
    shutil.copytree(GOLDEN / "block", tmp_path / "block")
    block = Block(tmp_path / "block").refresh()
    images = [bytes([number] * 16) for number in (1, 2)]
    assert not block.missing(images)
    assert block.rows(images)[:].tolist() == [[1.0, -2.5, 0.125], [0.0, 3.0, 0.25]]
