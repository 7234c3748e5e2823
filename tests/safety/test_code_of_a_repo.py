"""With the package imported, no code in the folder of an ensemble is run, whichever class of transformers is asked to
load it, and also if the user trusts it. `world` sees whether any of it ran."""

import importlib
import json
from pathlib import Path

import pytest
import transformers
import wrapt
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    pipeline,
)

from concat_ensemble import ConcatEnsembleImageProcessor

TRUST = {"trust_remote_code": True}
CODE = "from pathlib import Path\nPath('../canary').touch()\nclass Evil: pass\n"
NAMES = ("Config", "Model", "ModelForImageClassification", "Backbone", "ImageProcessor", "ImageProcessorFast")
NAMES += ("FeatureExtractor", "Processor", "VideoProcessor")
AUTO_MAP = {f"Auto{name}": "evil.Evil" for name in NAMES} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
# Other classes than ours, so that transformers finds none of a third party and takes that of the `auto_map`.
OTHERS = {
    "preprocessor_config.json": {"image_processor_type": "ViTImageProcessor", "processor_class": "CLIPProcessor"},
    "processor_config.json": {"processor_class": "CLIPProcessor"},
    "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"},
    "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor"},
}
UNKNOWN = {name: dict.fromkeys(settings, "Evil") for name, settings in OTHERS.items()}
LOADERS = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForImageClassification": AutoModelForImageClassification.from_pretrained,
    "AutoImageProcessor": AutoImageProcessor.from_pretrained,
    "AutoProcessor": AutoProcessor.from_pretrained,
    "AutoFeatureExtractor": AutoFeatureExtractor.from_pretrained,
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "AutoVideoProcessor": AutoVideoProcessor.from_pretrained,
    "features": lambda folder, **flag: pipeline("image-feature-extraction", model=folder, **flag),
    "classes": lambda folder, **flag: pipeline("image-classification", model=folder, **flag),
    "a task of its own": lambda folder, **flag: pipeline("evil", model=folder, **flag),
    "a processor by name": lambda folder, **flag: pipeline(
        "image-feature-extraction", model=folder, image_processor=folder, tokenizer=folder, processor=folder, **flag
    ),
}


def edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def poison(folder, others, reference="evil.Evil"):
    """Every file of settings names code beside it."""
    (folder / "evil.py").write_text(f"# {folder}\n{CODE}")  # transformers runs the same code once in a process
    auto_map = json.loads(json.dumps(AUTO_MAP).replace("evil.Evil", reference))
    for name, settings in others.items():
        edit(folder / name, auto_map=auto_map, **settings)
    edit(folder / "config.json", auto_map=auto_map)


@pytest.mark.parametrize("others", [{name: {} for name in OTHERS}, OTHERS, UNKNOWN], ids=["none", "known", "unknown"])
@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_the_folder_of_an_ensemble(loader, others, folder):
    poison(folder, others)
    for flag in (TRUST, {}):
        try:
            loaded = LOADERS[loader](str(folder), **flag)
        except (KeyError, OSError, ValueError):  # refused: what `world` sees at its end is that nothing ran
            continue
        assert not type(loaded).__module__.startswith("transformers_modules.")


@pytest.mark.parametrize("flag", [TRUST, {}], ids=["trusted", "not"])
@pytest.mark.parametrize("named", ["ViTImageProcessor", "CLIPImageProcessorFast", "Evil", "", ["Evil"], {}, 5, None])
def test_the_image_processor_of_an_ensemble_is_ours(named, flag, folder):
    poison(folder, {"preprocessor_config.json": {"image_processor_type": named}})
    assert type(AutoImageProcessor.from_pretrained(folder, **flag)) is ConcatEnsembleImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, use_fast=False, **flag)) is ConcatEnsembleImageProcessor


PROCESSORS = ["AutoTokenizer", "AutoVideoProcessor", "AutoFeatureExtractor"]


@pytest.mark.parametrize("loader", PROCESSORS)
@pytest.mark.parametrize("broken", [{"custom_pipelines": {"evil": {"impl": "evil.Evil"}}}, {"members": 5}, {}])
def test_code_beside_a_config_that_is_refused(loader, broken, folder):
    poison(folder, OTHERS)  # a config that raises is passed over by transformers, and must be an ensemble's to us
    edit(folder / "config.json", **broken)
    with pytest.raises(ValueError, match=r"is an ensemble, and none of the code beside it is run; leave out"):
        LOADERS[loader](str(folder), **TRUST)


@pytest.mark.parametrize("reference", ["evil/repo--evil.Evil", "../outside--evil.Evil", "os--system.Evil"])
def test_code_elsewhere_that_the_folder_of_an_ensemble_names(reference, folder):
    poison(folder, OTHERS, reference)
    with pytest.raises(ValueError, match="none of the code beside it is run"):
        AutoTokenizer.from_pretrained(folder, **TRUST)


@pytest.mark.parametrize("name", [*LOADERS][:8])
def test_the_same_of_a_folder_that_is_no_ensembles_is_run(name, folder):
    """What the flag is for, and why README does not pass it: any other `model_type` is another model."""
    poison(folder, OTHERS)
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(Exception, match=r"Evil|evil"):  # its class has no methods
        LOADERS[name](str(folder), **TRUST)
    assert Path("../canary").exists()
    Path("../canary").unlink()


def test_all_doors_of_transformers_are_guarded():
    name, root = "get_class_from_dynamic_module", Path(transformers.__file__).parent
    files = [path for path in root.rglob("*.py") if f"{name}(" in path.read_text(errors="replace")]
    modules = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in files]
    modules = [module.removesuffix(".__init__") for module in modules]
    modules.remove("transformers.dynamic_module_utils")  # which has the function itself
    assert len(modules) > 6
    for module in modules:
        assert isinstance(getattr(importlib.import_module(module), name), wrapt.FunctionWrapper), module
