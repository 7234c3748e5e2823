"""Publishing and loading by the real client, in processes of their own, with a Hub on loopback."""

import hashlib
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from concat_ensemble import ConcatEnsembleModel, assemble
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.studies.results import Results
from tests.clients import COMMAND, Client
from tests.hub_server import TOKEN, HubServer


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), part_size=8_000) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """`client(token, package)`: a process that tests with the same arguments share; `fresh=True` starts a new one."""
    started = {}

    def client(token=TOKEN, package=True, fresh=False) -> Client:
        key = object() if fresh else (token, package)
        if key not in started:
            started[key] = Client(hub, tmp_path_factory.mktemp("client") / "home", token, package)
        return started[key]

    yield client
    for made in started.values():
        assert TOKEN not in made.transcript
        made.process.kill()
        made.process.wait()


@pytest.fixture(scope="module")
def publisher(client):
    return client()


@pytest.fixture(scope="module")
def visitor(client):
    """Without this package and without a token."""
    visitor = client(token=None, package=False)
    visitor("import importlib.util; assert importlib.util.find_spec('concat_ensemble') is None")
    return visitor


@pytest.fixture
def grown(backbone, folder, study):
    """`folder` in small shards with a card and a result, and another folder with one more member."""
    pair = ConcatEnsembleModel.from_pretrained(folder)
    pair.save_pretrained(folder, max_shard_size=10_000)
    (folder / "results").mkdir()
    hashes = [member["provenance"]["weights_sha256"] for member in pair.config.members]
    study(hashes=hashes, **{"pair": [0.9], "raw pixels": [0.5]}).save(folder / "results" / "digits.json")
    write_card(folder)
    triple = assemble([folder, backbone(2)])
    triple.save_pretrained(folder.with_name("triple"), max_shard_size=10_000)
    write_card(folder.with_name("triple"))
    return folder, folder.with_name("triple")


def pushed_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_is_one_commit_and_the_next_push_sends_only_new_weights(publisher, hub, grown):
    pair, triple = grown
    (pair / ".git").mkdir()
    (pair / ".git" / "config").write_text("of this machine")
    first = publisher.push(pair, "me/pair")
    shutil.rmtree(pair / ".git")
    assert hub.commits("me/pair") == [first["commit"]]
    assert set(hub.files("me/pair")) == {*pushed_files(pair), ".gitattributes"}
    assert all(hub.read("me/pair", name) == content for name, content in pushed_files(pair).items())
    assert len([name for name in hub.files("me/pair") if name.startswith("member-")]) == 14

    sent = len(hub.uploads)
    assert publisher.push(pair, "me/pair") == first
    assert hub.commits("me/pair") == [first["commit"]] and len(hub.uploads) == sent

    upload = "upload_file(path_or_fileobj=b'x', path_in_repo='NOTICE', repo_id='me/pair')"
    publisher(f"from huggingface_hub import HfApi; HfApi().{upload}")
    before = hub.files("me/pair")
    second = publisher.push(triple, "me/pair")
    after = hub.files("me/pair")
    changed = {name for name, file in after.items() if before.get(name) != file}
    new = {path.name for path in triple.glob("member-02-*")}
    assert len(new) == 7 and changed == {
        *new,
        "config.json",
        "model.safetensors.index.json",
        "README.md",
        "LICENSE.md",
    }
    assert set(hub.uploads[sent:]) == {after[name]["sha256"] for name in new}
    assert set(before) - set(after) == {"results/digits.json", "figures/digits.png"}  # they belong to other weights
    assert "NOTICE" in after and hub.commits("me/pair")[0] == second["commit"]

    whole = ConcatEnsembleModel.from_pretrained(triple)
    whole.save_pretrained(triple)  # in one file per member
    publisher.push(triple, "me/pair")
    shards = {name for name in hub.files("me/pair") if name.endswith(".safetensors")}
    assert shards == {"member-00.safetensors", "member-01.safetensors", "member-02.safetensors"}


def test_only_what_is_ours_and_what_is_included_is_uploaded(publisher, hub, grown):
    pair, _ = grown
    ours = pushed_files(pair)
    for name in ("id_rsa", "token.txt", "optimizer.pt", "notes/a.md", "notes/b.md", "figures/mine.png", ".env"):
        (pair / name).parent.mkdir(exist_ok=True)
        (pair / name).write_text("mine")
    _, said, code = publisher.run(COMMAND.format(words=["push", str(pair), "me/chosen"]))
    left_out = "figures/mine.png, id_rsa, notes/ (2 files), optimizer.pt, token.txt"
    assert code is None and said == f"not uploaded: {left_out}; --include GLOB uploads them, too\n"
    assert set(hub.files("me/chosen")) == {*ours, ".gitattributes"}
    publisher.push(pair, "me/chosen", "--include", "notes/*", "--include", "figures/*")
    included = {"notes/a.md", "notes/b.md", "figures/mine.png"}
    assert set(hub.files("me/chosen")) == {*ours, *included, ".gitattributes"}
    (pair / "results/digits.json").unlink()
    publisher.push(pair, "me/chosen", "--quiet")
    gone = {"results/digits.json", "figures/digits.png"}
    assert set(hub.files("me/chosen")) == {*ours, *included, ".gitattributes"} - gone


LOAD = """
import torch
from transformers import AutoImageProcessor, AutoModel
from PIL import Image
def features(**which):
    model = AutoModel.from_pretrained("me/loaded", trust_remote_code=True, **which)
    processor = AutoImageProcessor.from_pretrained("me/loaded", trust_remote_code=True, revision=which.get("revision"))
    pixels = processor(Image.new("L", (32, 32), 77), return_tensors="pt").pixel_values
    with torch.no_grad():
        return model(pixels).pooler_output[0].tolist()
"""


def test_without_the_package_current_and_older_revisions_load(publisher, visitor, hub, grown):
    pair, triple = grown
    first = publisher.push(pair, "me/loaded")["commit"]
    publisher.push(triple, "me/loaded")
    visitor(LOAD)
    with torch.no_grad():
        pixels = torch.full((1, 1, 32, 32), (77 / 255 - 0.5) / 0.5)
        expected = ConcatEnsembleModel.from_pretrained(triple)(pixels).pooler_output[0]
    before = len(hub.requests)
    last = visitor.ask("features(active_members=[2])")
    fetched = {path.rpartition("/")[2] for method, path in hub.requests[before:] if path.startswith("/cdn/")}
    assert fetched == {file["sha256"] for name, file in hub.files("me/loaded").items() if name.startswith("member-02")}
    assert torch.allclose(torch.tensor(last), expected[32:], atol=1e-6)
    assert torch.allclose(torch.tensor(visitor.ask("features()")), expected, atol=1e-6)
    pinned = visitor.ask(f"features(revision={first!r})")
    assert torch.allclose(torch.tensor(pinned), expected[:32], atol=1e-6)


def test_pushing_again_after_an_interruption_sends_only_the_missing_files(publisher, client, hub, backbone, tmp_path):
    assemble([backbone(5), backbone(6)]).save_pretrained(tmp_path / "cut", max_shard_size=10_000)
    victim = client(fresh=True)
    victim("import concat_ensemble.hub")
    names = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    digests = {name: hashlib.sha256((tmp_path / "cut" / name).read_bytes()).hexdigest() for name in names}
    missing = {digests[names[0]], digests[names[3]], digests[names[13]]}  # two in several parts, one in one part
    hub.hold(missing)
    victim.send(COMMAND.format(words=["push", str(tmp_path / "cut"), "me/cut"]))
    others = set(digests.values()) - missing
    deadline = time.monotonic() + 300
    while not all(map(hub.has, others)):
        assert time.monotonic() < deadline and victim.process.poll() is None
        time.sleep(0.05)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    hub.release()
    assert hub.commits("me/cut") == [] and not any(map(hub.has, missing))

    sent = len(hub.uploads)
    publisher.push(tmp_path / "cut", "me/cut")
    assert set(hub.uploads[sent:]) == missing
    assert len(hub.commits("me/cut")) == 1
    assert all(hub.read("me/cut", name) == (tmp_path / "cut" / name).read_bytes() for name in names)


@pytest.mark.slow
def test_two_gigabytes_in_small_shards(tmp_path):
    """Two ViT-L with random weights, 2.4 GB in files of up to 200 MB and parts of 64 MB, are pushed and loaded."""
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub", part_size=64 << 20) as hub:
        publisher = Client(hub, tmp_path / "publisher", TOKEN, package=True)
        publisher(
            "import torch; from concat_ensemble import assemble",
            "model = assemble(['random:vit_large_patch16_224'] * 2)",
            "model.save_pretrained('giant', max_shard_size='200MB')",
        )
        pixels = "torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)"
        features = f"[float(x) for x in model({pixels}).pooler_output[0, ::256].double()]"
        expected = publisher.ask(features)
        publisher.push("giant", "me/giant")
        shards = [file for name, file in hub.files("me/giant").items() if name.endswith(".safetensors")]
        assert len(shards) > 12 and max(shard["size"] for shard in shards) <= 200e6
        assert sum(shard["size"] for shard in shards) > 2.4e9
        sent = len(hub.uploads)
        publisher.push("giant", "me/giant")
        assert len(hub.uploads) == sent
        publisher.process.kill()
        visitor = Client(hub, tmp_path / "visitor", None, package=False)
        visitor("import torch; from transformers import AutoModel")
        visitor("model = AutoModel.from_pretrained('me/giant', trust_remote_code=True)")
        assert visitor.ask(features) == pytest.approx(expected, rel=1e-5)
        visitor.process.kill()


def test_a_commit_that_somebody_else_makes_meanwhile_is_not_lost(publisher, hub, folder, backbone):
    publisher.push(folder, "me/busy")
    assemble([folder, backbone(9)]).save_pretrained(folder)
    digest = hashlib.sha256((folder / "member-02.safetensors").read_bytes()).hexdigest()
    hub.hold([digest])
    publisher.send(COMMAND.format(words=["push", str(folder), "me/busy"]))
    while not any(digest in path for _, path in hub.requests):
        time.sleep(0.05)
    repo = hub.repo("models", "me/busy")
    files = hub.files("me/busy") | {"NOTICE": hub.store(b"of somebody else")}
    theirs = hub.write("models", "me/busy", repo, "refs/heads/main", files, "NOTICE", hub.commits("me/busy")[0])
    hub.release()  # the client tries again
    _, error, code = publisher.answer()
    assert code == 2 and "A commit has happened since" in error
    assert hub.commits("me/busy")[0] == theirs
    publisher.push(folder, "me/busy")
    assert hub.read("me/busy", "NOTICE") == b"of somebody else" and len(hub.commits("me/busy")) == 3


def test_a_branch_and_a_pull_request(publisher, visitor, hub, grown):
    pair, triple = grown
    publisher.push(pair, "me/parts")
    main = hub.commits("me/parts")
    opened = publisher.push(triple, "me/parts", "--create-pr")
    assert opened["pull_request"].endswith("/me/parts/discussions/1")
    assert hub.commits("me/parts") == main and hub.commits("me/parts", "refs/pr/1") == [opened["commit"], *main]
    publisher.push(triple, "me/parts", "--revision", "three")
    assert hub.commits("me/parts") == main and len(hub.commits("me/parts", "three")) == 2
    publisher("from huggingface_hub import list_repo_refs")
    requests = publisher.ask("list_repo_refs('me/parts', include_pull_requests=True).pull_requests[0].ref")
    assert requests == "refs/pr/1"
    visitor("from transformers import AutoConfig")
    members = "AutoConfig.from_pretrained('me/parts', trust_remote_code=True, revision={!r}).members"
    for revision, number in {"main": 2, "refs/pr/1": 3, "three": 3}.items():
        assert visitor.ask(f"len({members.format(revision)})") == number


def test_a_private_repo_needs_a_token_and_no_message_shows_it(publisher, visitor, hub, folder):
    publisher.push(folder, "me/secret", "--private")
    publisher.push(folder, "me/secret", "--private")
    assert hub.repo("models", "me/secret")["private"]
    visitor("from transformers import AutoModel; from huggingface_hub import model_info")
    for code in ("model_info('me/secret')", "AutoModel.from_pretrained('me/secret', trust_remote_code=True)"):
        error = visitor.run(code)[2]
        assert "RepositoryNotFoundError: 401 Client Error" in error and "make sure you are authenticated" in error

    def refusal(*words):
        _, error, code = publisher.run(COMMAND.format(words=["push", str(folder), *words]))
        assert code == 2 and len(error.strip().splitlines()) == 1, error
        return error

    publisher.push(folder, "me/public")
    assert "me/public is public already" in refusal("me/public", "--private")
    error = refusal("me/public", "--token", "hf_somebodyElse")
    assert "401" in error and "log in with hf auth login" in error and "hf_somebody" not in publisher.transcript
    for odd in ("hf_odd\nToken", "hf_oddTokén"):
        assert "hf auth login" in refusal("me/public", "--token", odd)
    assert "hf_odd" not in publisher.transcript


def test_verify_measures_the_numbers_of_a_published_card_again(publisher, hub, run, folder):
    """Also from the Hub's cache, whose files are links, and at a revision."""
    few = ["--dataset", "digits", "--classes", "0-2", "--limit", "60", "--controls", "none", "--quiet"]
    assert run("probe", "pair", *few)[0] == 0
    good = publisher.push(folder, "me/measured")["commit"]
    verify = partial(COMMAND.format, words=["verify", "me/measured", "--json"])
    checks = json.loads(publisher(verify()))
    assert len(checks) == 5 and all(check["holds"] and check["again"] == check["card"] for check in checks)

    (path,) = (folder / "results").glob("*.json")
    results = Results.load(path)
    results["pair"].runs[0].metrics["top1"] = 0.01  # not what was measured
    results.save(path)
    write_card(folder)
    publisher.push(folder, "me/measured")
    _, error, code = publisher.run(verify())
    assert code == 2 and "1 of 5 numbers are not confirmed: pair on digits" in error
    publisher(COMMAND.format(words=["verify", "me/measured", "--revision", good, "--quiet"]))


def test_push_to_hub_uploads_the_card_and_the_processor(publisher, client, hub, grown):
    pair, triple = grown
    publisher("from concat_ensemble import ConcatEnsembleModel; from transformers import AutoModel")
    publisher(f"model = ConcatEnsembleModel.from_pretrained({str(pair)!r})")
    publisher("model.push_to_hub('me/python', max_shard_size=10_000)")
    assert all(hub.read("me/python", name) == content for name, content in pushed_files(pair).items())
    publisher("AutoModel.from_pretrained('me/python').push_to_hub('me/python', max_shard_size=10_000)")
    assert len(hub.commits("me/python")) == 1  # the repo's card belongs to these weights
    publisher(f"model = ConcatEnsembleModel.from_pretrained({str(triple)!r}).export_active([2, 0])")
    publisher("model.push_to_hub('me/python')")
    assert hub.read("me/python", "README.md").decode().count("resnet10t") >= 2
    assert not any(name.startswith(("results", "figures")) or "-of-" in name for name in hub.files("me/python"))

    other = client(token=None, package=False)
    other("from transformers import AutoModel")
    other("model = AutoModel.from_pretrained('me/python', trust_remote_code=True)")
    card = hub.read("me/python", "README.md")
    other("model.members['0'].conv1[0].weight.data += 1")
    other(f"model.push_to_hub('me/python', token={TOKEN!r})")
    other(f"model.push_to_hub('me/alone', private=True, token={TOKEN!r})")
    assert hub.read("me/python", "README.md") == card and len(hub.commits("me/python")) == 3
    assert {"preprocessor_config.json", "modeling_concat_ensemble.py"} < set(hub.files("me/alone"))
    assert "README.md" not in hub.files("me/alone")  # and not an empty one


def test_without_the_package_the_card_of_the_folder_is_pushed_and_stale_weights_are_removed(visitor, hub, grown):
    pair, _ = grown
    visitor("from transformers import AutoModel")
    visitor(f"model = AutoModel.from_pretrained({str(pair)!r}, trust_remote_code=True)")
    visitor(f"model.push_to_hub('me/plain', token={TOKEN!r}, max_shard_size=10_000)")
    assert {name: hub.read("me/plain", name) for name in pushed_files(pair)} == pushed_files(pair)
    visitor(f"model.push_to_hub('me/plain', token={TOKEN!r}, commit_message='Fewer files', revision='v1')")
    shards = {name for name in hub.files("me/plain", "v1") if name.endswith(".safetensors")}
    assert shards == {"member-00.safetensors", "member-01.safetensors"}
    assert hub.read("me/plain", "README.md", "v1") == (pair / "README.md").read_bytes()
    assert len(hub.commits("me/plain")) == 1
    assert "is public" in visitor.run(f"model.push_to_hub('me/plain', private=True, token={TOKEN!r})")[2]
    assert "pip install concat-ensemble" in visitor.run("model.fold_batchnorm()")[2]


def test_results_are_pushed_when_the_head_is_not(publisher, hub, run, folder):
    few = ["--dataset", "digits", "--classes", "0-2", "--limit", "30"]
    assert run("probe", "pair", *few, "--save-head", "--quiet")[0] == 0
    publisher("from concat_ensemble import ConcatEnsembleModel")
    publisher(f"ConcatEnsembleModel.from_pretrained({str(folder)!r}).push_to_hub('me/headless')")
    names = set(hub.files("me/headless"))
    assert "results/digits-classes-0-2-limit-30.json" in names and "head.safetensors" not in names
    assert "AutoModelForImageClassification" not in hub.read("me/headless", "README.md").decode()
    publisher(COMMAND.format(words=["verify", "me/headless", "--quiet"]))


def test_members_from_the_hub_record_their_commit(publisher, hub, folder):
    first = publisher.push(folder, "me/member")["commit"]
    publisher("import timm; from huggingface_hub import HfApi; from concat_ensemble import assemble")
    publisher("timm.models.save_for_hf(timm.create_model('test_vit'), 'timm'); HfApi().create_repo('me/timm')")
    publisher("HfApi().upload_folder(repo_id='me/timm', folder_path='timm')")
    publisher("HfApi().create_branch('me/member', branch='old')")
    publisher("HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='NOTICE', repo_id='me/member')")
    publisher("model = assemble(['hf-hub:me/member@old', 'hf-hub:me/timm'])")
    ours, _, timms = publisher.ask("[member['provenance'] for member in model.config.members]")
    assert (ours["taken_from"], ours["taken_from_revision"]) == ("me/member", first)
    assert (timms["hub_id"], timms["revision"]) == ("me/timm", hub.commits("me/timm")[0])


def test_features_are_a_dataset(publisher, visitor, hub):
    publisher(
        "import numpy as np; from concat_ensemble import push_features;"
        "from concat_ensemble.features.table import FeatureTable;"
        "a = np.arange(6000, dtype=np.float32).reshape(1500, 4);"
        "b = np.arange(3000, dtype=np.float16).reshape(1500, 2);"
        "t = FeatureTable({'train': [a, b], 'test': [a[:2], b[:2]]},"
        "{'train': np.arange(1500) % 2, 'test': np.array([0, 1])}, ['cat', 'dog'])"
    )
    publisher("push_features(t, 'me/features', private=True)")
    assert hub.repo("datasets", "me/features")["private"] and len(hub.commits("me/features", kind="datasets")) == 1
    publisher("push_features(t, 'me/open')")
    assert "me/open is public already" in publisher.run("push_features(t, 'me/open', private=True)")[2]
    visitor("from datasets import load_dataset; data = load_dataset('me/open')")
    visitor("train = data['train'].with_format('numpy')[:]")
    assert visitor.ask("train['member_00'].ravel().tolist()") == list(range(6000))
    assert visitor.ask("train['member_01'].shape") == [1500, 2]
    assert visitor.ask("[data['test']['label'][:], data['train'].features['label'].names]") == [
        [0, 1],
        ["cat", "dog"],
    ]


def test_a_bad_folder_or_bad_options_are_refused_before_anything_is_sent(refused, folder, tmp_path):
    refused(["push", folder.parent, "me/x"], "holds no ensemble", "concat-ensemble build")
    refused(["push", folder, "me/x", "--create-pr", "--revision", "v1"], "leave out revision='v1'")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "key").write_text("secret")
    (folder / "notes").symlink_to(tmp_path / "key")
    refused(["push", folder, "me/x"], "notes is a link")
    (folder / "notes").unlink()
    (folder / "member-01.safetensors").unlink()
    refused(["push", folder, "me/x"], "lacks member-01.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(["push", folder, "me/x"], "no whole ensemble")
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    refused(["push", folder, "me/x"], "'resnet', not an ensemble")


def test_a_processor_is_pushed_alone_with_its_code(publisher, hub, client, folder, tmp_path):
    publisher("import concat_ensemble; from transformers import AutoImageProcessor")
    publisher(f"processor = AutoImageProcessor.from_pretrained({str(folder)!r})")
    publisher("processor.push_to_hub('me/processor')")
    publisher(f"processor.save_pretrained({str(tmp_path / 'saved')!r}, push_to_hub=True, repo_id='me/saved')")
    other = client(token=None, package=False)
    other("from transformers import AutoImageProcessor")
    for name in ("me/processor", "me/saved"):
        assert "image_processing_concat_ensemble.py" in hub.files(name)
        other(f"assert AutoImageProcessor.from_pretrained({name!r}, trust_remote_code=True).geometries")
    other("from transformers import AutoProcessor")
    other("assert AutoProcessor.from_pretrained('me/saved', trust_remote_code=True).size")


def put_folder(hub: HubServer, folder: Path, repo: str) -> str:
    """Store a folder's files as a repo, and return its commit."""
    hub.create("models", repo, private=False)
    files = {path.name: hub.store(path.read_bytes(), lfs=True) for path in folder.iterdir()}
    return hub.write("models", repo, hub.repo("models", repo), "refs/heads/main", files, "add")


def test_a_repo_of_transformers_timm_wrapper_is_a_member(publisher, hub, tmp_path):
    model_args = {"depth": 1, "img_size": 32, "global_pool": "avg"}
    settings = {"model_args": model_args, "id2label": {0: "ant", 1: "bee", 2: "cat"}}
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="vit_tiny_patch16_224", **settings))
    wrapper.save_pretrained(tmp_path, max_shard_size="200KB")
    commit = put_folder(hub, tmp_path, "org/wrapped")
    publisher("from concat_ensemble import assemble", "wrapped = assemble(['hf-hub:org/wrapped'])")
    expected = assemble([tmp_path]).config.members[0]
    expected["provenance"] |= {"source": "hf-hub:org/wrapped", "hub_id": "org/wrapped", "revision": commit}
    assert publisher.ask("wrapped.config.members[0]") == expected
    assert expected["model_args"] == model_args and expected["provenance"]["label_names"] == ["ant", "bee", "cat"]


def test_channels_and_size_that_only_a_timm_repos_pretrained_cfg_has_are_kept(publisher, hub, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=80, in_chans=1, num_classes=0).eval()
    save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {"depth": 1}  # older versions of timm saved only what a user named
    (tmp_path / "config.json").write_text(json.dumps(config))
    put_folder(hub, tmp_path, "org/old")
    publisher(
        "from concat_ensemble import ConcatEnsembleModel, assemble",
        "assemble(['hf-hub:org/old']).save_pretrained('o')",
    )
    publisher("pixels = __import__('torch').ones(1, 1, 80, 80)", "loaded = ConcatEnsembleModel.from_pretrained('o')")
    model_args = {"depth": 1, "in_chans": 1, "img_size": [80, 80]}
    features = publisher.ask("loaded(pixels).pooler_output.tolist()")
    with torch.no_grad():
        assert torch.equal(torch.tensor(features), network(torch.ones(1, 1, 80, 80)))
    assert publisher.ask("loaded.config.members[0]['model_args']") == model_args
    assert assemble([tmp_path]).config.members[0]["model_args"] == model_args


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("test_vit", {"img_size": 96, "in_chans": 4, "global_pool": "avg"}),
        ("test_resnet", {"in_chans": 1, "global_pool": "max"}),
    ],
)
def test_pretrained_weights_are_adapted_to_arguments_as_timm_does(architecture, model_args, publisher, hub, tmp_path):
    torch.manual_seed(0)
    name = f"timm/{architecture}.r160_in1k"
    network = timm.create_model(architecture)
    save_for_hf(network, tmp_path, safe_serialization=True)
    put_folder(hub, tmp_path, name)
    publisher("import timm, torch", "from concat_ensemble import assemble", f"arguments = {model_args}")
    publisher(f"expected = timm.create_model('{architecture}', pretrained=True, num_classes=0, **arguments).eval()")
    for source in (f"{architecture}.r160_in1k", f"hf-hub:{name}"):
        publisher(f"ensemble = assemble('{source}', model_args=arguments)")
        member = publisher.ask("ensemble.config.members[0]")
        channels, side = model_args["in_chans"], model_args.get("img_size", 160)
        assert member["preprocessing"]["input_size"] == [channels, side, side]
        assert member["model_args"].items() >= model_args.items()
        publisher(f"pixels = torch.randn(2, {channels}, {side}, {side})")
        publisher("with torch.no_grad(): assert torch.equal(ensemble.members['0'](pixels), expected(pixels))")
    failed = publisher.run(f"assemble('{architecture}', model_args={{'nonsense': 3}})")[2]
    assert "ValueError" in failed and "nonsense" in failed


def test_arguments_to_which_timm_cannot_adapt_weights_are_refused(publisher, hub, tmp_path):
    """timm leaves such layers random without a word."""
    network = timm.create_model("test_resnet", in_chans=2, num_classes=0)
    save_for_hf(network, tmp_path, safe_serialization=True, model_args={"in_chans": 2})
    put_folder(hub, tmp_path, "org/two-channels")
    publisher("from concat_ensemble import assemble")
    for name, value in {"layers": (1, 1, 1, 2), "width_factor": 9, "stem_width": 8}.items():
        failed = publisher.run(f"assemble('hf-hub:org/two-channels', model_args={{'{name}': {value}}})")[2]
        message = str(failed).strip().splitlines()[-1]
        assert message.startswith("ValueError: timm cannot") and name in message, f"{name}: {failed}"


def test_a_hub_that_cannot_be_reached_is_named(publisher, grown):
    words = ["push", str(grown[0]), "me/unreachable"]
    publisher(
        "from huggingface_hub import constants; kept, constants.ENDPOINT = constants.ENDPOINT, 'http://127.0.0.1:9'"
    )
    _, said, code = publisher.run(COMMAND.format(words=words))
    publisher("constants.ENDPOINT = kept")
    assert code == 2 and "me/unreachable: the connection to http://127.0.0.1:9 failed (" in said
    assert said.strip().endswith(". Push again: what has arrived is not sent a second time.")
