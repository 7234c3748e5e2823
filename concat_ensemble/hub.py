"""Publishing on the Hub: an ensemble's folder with its card, and features as a dataset."""

from __future__ import annotations

import filecmp
import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile

from concat_ensemble.console import errors
from concat_ensemble.errors import argument, describe_error, first_line
from concat_ensemble.files import check_regular_files
from concat_ensemble.modeling.configuration_concat_ensemble import PAYLOAD_FILES, ConcatEnsembleConfig
from concat_ensemble.modeling.weights_concat_ensemble import INDEX_NAME, SHARD_NAME, copy_card
from concat_ensemble.schema import check_type, decode_json
from concat_ensemble.studies.ensemble_folders import (
    MODEL_FILES,
    TRAINING_FIGURE,
    WRITTEN_BY,
    card_files,
    is_measured_on,
)
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS

if TYPE_CHECKING:
    from concat_ensemble.features.table import FeatureTable, TableSplit
    from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel

ROWS = 1024  # read from the table at a time
OTHER_FILES = ("README.md", "LICENSE.md", TRAINING_FIGURE, "adapter_config.json", "adapter_model.safetensors")
SECRET_NAME = re.compile(r"id_(rsa|dsa|ecdsa|ed25519).*|.*\.(pem|key|p12|pfx|jks)|.*(token|secret|credential|passw).*")
TOKEN = rb"\b(hf_|gh[oprsu]_|github_pat_)[A-Za-z0-9_]{30,}|\bAKIA[A-Z0-9]{16}"
SECRET = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|" + TOKEN)


class WeightIndex(TypedDict):
    """`model.safetensors.index.json`: names of the files with the weights, by key."""

    weight_map: dict[str, str]


def push_ensemble(folder: Path, repo_id: str, *, quiet: bool = False, space: bool = False, **options) -> CommitInfo:
    """Publish an ensemble's folder: weights, config, image processor, code, card, results and figures, in one commit.
    A folder without a card gets one. Unless `quiet`, stderr says first which other files are not published. With
    `space`, also publish a Space that shows the ensemble, which the card links; see `push_space`. Arguments and errors
    are those of `push_folder`, and ValueError if the folder holds no ensemble."""
    check_regular_files(folder)
    try:
        kind = check_type(decode_json(folder / "config.json"), dict[str, Any]).get("model_type")
    except (OSError, ValueError) as error:
        problem = f"{folder} holds no ensemble ({describe_error(error)})"
        raise ValueError(f"{problem}; make one with concat-ensemble build.") from error
    if kind != "concat_ensemble":
        raise ValueError(f"{folder} holds a model of type {kind!r}, not an ensemble; publish it with hf upload.")
    if space:
        _check_space(folder, **options)
        _refuse_other_space(HfApi(token=options.get("token"), library_name="concat-ensemble"), repo_id)
    _, others = choose_files(folder, options.get("include", ()))
    if others and not quiet:
        errors.print(f"not uploaded: {describe_names(others)}", soft_wrap=True)
    commit = push_folder(folder, repo_id, link_space=space, **options)
    if space:
        access = {"private": options.get("private"), "token": options.get("token")}
        push_space(ConcatEnsembleConfig.from_pretrained(folder), commit.repo_url.repo_id, commit.oid, **access)
    return commit


def push_model(
    model: ConcatEnsemblePreTrainedModel, repo_id: str, *, max_shard_size: Any = "50GB", **options
) -> CommitInfo:
    """Publish a model in one commit, with the image processor and the card. While the weights are those of the folder
    that the model was loaded from, that folder's card, results and figures go along. While they are those of the repo,
    the repo's card stays. Else a new card is written. `model` may be of a class that was loaded from a repo;
    `max_shard_size` is as in `save_pretrained`, and `options` are those of `push_folder`."""
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), Path(str(model.name_or_path))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if copy_card(source, folder) and not filecmp.cmp(source / INDEX_NAME, folder / INDEX_NAME):
            _write_card(folder, None)  # its card describes a head that this model does not have
        return push_folder(folder, repo_id, **options)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    include: Sequence[str] = (),
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    link_space: bool = False,
) -> CommitInfo:
    """Make a Hub repo hold an ensemble's folder, in one commit, or none if nothing changed.

    Weights that the repo has are not sent again, so pushing again after an interruption sends only the missing files.
    Weights that the folder does not have are removed in the same commit, and so are results with their figures if the
    folder has a card. Results of other weights are not published. The repo's other files stay. If the folder has no
    card and its weights are new to the repo, a card is written into the folder, on top of the repo's if it has one.

    Args:
        folder: As `save_pretrained` leaves it, with or without a card, results and figures. Other files stay behind.
        include: Patterns such as `notes/*` or `*.txt` of other files to publish. Of hidden files and of those whose
            name is that of a key, a token or a password, only the name itself is such a pattern.
        repo_id: `namespace/name`, made if there is none.
        private: Make the repo private. `revision`: A branch, made if there is none. `create_pr`: Open a pull request.
        link_space: Link the Space of the same name in the folder's card, if that is one of ours.

    Returns:
        The commit: the last one of the repo if nothing changed.

    Raises:
        ValueError: for arguments that do not go together, and, before anything is sent, with `private=True` for a repo
            that is public; for a pattern of no file; and for a file that holds a private key or an access token.
        OSError: for an incomplete folder, a symbolic link in it, a repo that somebody else has changed meanwhile, and
            if the Hub refuses the upload or cannot be reached.
    """
    if create_pr and revision is not None:
        raise ValueError(f"a pull request is made against main; leave out revision={revision!r} or create_pr.")
    _check_token(token)
    choose_files(folder, include)  # an incomplete one is refused before a repo is made
    api = HfApi(token=token, library_name="concat-ensemble")
    with _explain_failures(repo_id):
        repo_id = _prepare_repo(api, repo_id, private, revision)
        remote = _read_remote(api, repo_id, revision)
        return api.create_commit(
            repo_id,
            _plan_commit(api, folder, include, remote, repo_id if link_space else None),
            commit_message=commit_message or "Upload ensemble",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=remote.commit,
        )


def push_space(
    config: ConcatEnsembleConfig,
    repo_id: str,
    commit: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publish the Space of an ensemble that was pushed to `repo_id` as this commit, under the same name. The Hub
    builds it and runs it.

    Raises:
        ValueError: with `private=True` for a Space that is public, and for one with an app.py that is not ours.
        OSError: if the Hub refuses the upload or cannot be reached.
    """
    from concat_ensemble.reporting.space import space_files

    api = HfApi(token=token, library_name="concat-ensemble")
    with _explain_failures(repo_id):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if private and not api.space_info(repo_id).private:
            raise ValueError(_describe_public(f"the Space {repo_id}"))
        _refuse_other_space(api, repo_id)
        texts = space_files(config, repo_id, commit)
        operations = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        return api.create_commit(
            repo_id, operations, repo_type="space", commit_message=f"Show {repo_id} at {commit[:12]}"
        )


def _refuse_other_space(api: HfApi, repo_id: str) -> None:
    """Raise ValueError for a Space of this name with an app.py that is not ours."""
    from concat_ensemble.reporting.space import MARK

    with _explain_failures(repo_id):
        if not api.file_exists(repo_id, "app.py", repo_type="space"):
            return
        path = api.hf_hub_download(repo_id, "app.py", repo_type="space")
    if MARK not in Path(path).read_text(encoding="utf-8", errors="replace"):
        problem = f"the Space {repo_id} has an app.py of its own, which would be lost"
        raise ValueError(f"{problem}; rename that Space, or leave out {argument('space', True)}.")


def _check_space(folder: Path, *, create_pr: bool = False, **options) -> None:
    """Raise ValueError for an ensemble that a Space cannot show, before anything is sent."""
    if create_pr:
        problem = f"{argument('space', True)} shows what was merged"
        raise ValueError(f"{problem}; leave it out, or leave out {argument('create_pr', True)}.")
    if ConcatEnsembleConfig.from_pretrained(folder).architectures != ["ConcatEnsembleForImageClassification"]:
        problem = f"{argument('space', True)} shows classes, and {folder} has no classification head"
        raise ValueError(f"{problem}; fit one: concat-ensemble probe {folder} --dataset ... --save-head.")


def choose_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files of an ensemble's folder to publish, path by name in the repo, and the names of the others that are not
    hidden. Errors are those of `push_folder`."""
    own = _own_names(folder)
    missing = sorted(name for name in own.required if not (folder / name).is_file())
    if missing:
        raise OSError(f"{folder} lacks {', '.join(missing)}; save or build the ensemble again.")
    files, others, unused = {}, [], set(include)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        patterns = {pattern for pattern in include if _is_included(name, pattern)}
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        is_chosen = name in own.required | own.optional or bool(patterns)
        if path.is_symlink() and (is_chosen or not is_hidden or name == ".eval_results"):
            raise OSError(f"{path} is a link, and what it points to would be published; put the file in its place.")
        if path.is_file() and is_chosen:
            files[name] = path
            unused -= patterns
        elif path.is_file() and not is_hidden:
            others.append(name)
    if unused:
        problem = f"no file in {folder} has such a name, or only hidden ones, keys and tokens"
        raise ValueError(f"{argument('include', sorted(unused)[0])}: {problem}; give its whole name.")
    _refuse_secrets(path for name, path in files.items() if not SHARD_NAME.fullmatch(name))
    return files, others


@dataclass(frozen=True)
class _OwnNames:
    required: set[str]
    optional: set[str]


def _own_names(folder: Path) -> _OwnNames:
    """The names of what this package writes into an ensemble's folder. Results of other weights are not among them."""
    try:
        shards = set(check_type(decode_json(folder / INDEX_NAME), WeightIndex)["weight_map"].values())
        if wrong := [shard for shard in shards if not SHARD_NAME.fullmatch(shard)]:
            raise ValueError(f"{wrong[0]!r} is no name of a file of weights")
    except (ValueError, OSError) as error:
        reason = f"{INDEX_NAME}: {describe_error(error)}"
        raise OSError(f"{folder} holds no whole ensemble ({reason}); save or build it again.") from error
    hashes = members_sha256(ConcatEnsembleConfig.from_pretrained(folder))
    optional = {*OTHER_FILES, *PAYLOAD_FILES}
    for path in (folder / RESULTS).glob("*.json"):
        if is_measured_on(path, hashes):
            optional |= {f"{RESULTS}/{path.name}", *card_files(path.stem)}
    return _OwnNames({*MODEL_FILES, *shards} - set(PAYLOAD_FILES), optional)


def _is_included(name: str, pattern: str) -> bool:
    """Whether a pattern names a file: of one that is hidden or looks like a secret, only the whole name does."""
    if name == pattern:
        return True
    is_private = any(part.startswith(".") or SECRET_NAME.fullmatch(part.lower()) for part in name.split("/"))
    return not is_private and fnmatchcase(name, pattern + "*" * pattern.endswith("/"))


def _refuse_secrets(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if SECRET.search(content):
                    raise ValueError(f"{path} holds a private key or an access token; take that out of it.")


def describe_names(names: Sequence[str], limit: int = 20) -> str:
    """Names of files, several of a subfolder together, and how to publish them."""
    rooms: dict[str, list[str]] = {}
    for name in names:
        rooms.setdefault(name.split("/")[0], []).append(name)
    parts = [f"{room}/ ({len(files)} files)" if len(files) > 1 else files[0] for room, files in rooms.items()]
    more = f" and {len(parts) - limit:,} more" if len(parts) > limit else ""
    return f"{', '.join(parts[:limit])}{more}; --include GLOB uploads them, too"


@dataclass(frozen=True)
class _Remote:
    """A repo at the commit that the push is based on."""

    repo_id: str
    commit: str | None
    paths: list[str]
    shards: dict[str, str]  # SHA-256 by name


def _read_remote(api: HfApi, repo_id: str, revision: str | None) -> _Remote:
    commit = api.model_info(repo_id, revision=revision).sha
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    shards = {file.path: file.lfs.sha256 for file in files if file.lfs and SHARD_NAME.fullmatch(file.path)}
    return _Remote(repo_id, commit, [file.path for file in files], shards)


def _plan_commit(
    api: HfApi, folder: Path, include: Sequence[str], remote: _Remote, space: str | None = None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Upload the shards that changed and all other files; delete what is stale. A missing card is written first, and
    one of ours gets a link to the Space if there is one."""
    files, _ = choose_files(folder, include)
    shards = {name: CommitOperationAdd(name, path) for name, path in files.items() if SHARD_NAME.fullmatch(name)}
    digests = {name: shard.upload_info.sha256.hex() for name, shard in shards.items()}
    if "README.md" not in files and digests != remote.shards:
        _add_card(api, folder, remote, space)
        files, _ = choose_files(folder, include)
    elif space and "README.md" in files and WRITTEN_BY in files["README.md"].read_text(errors="replace"):
        _write_card(folder, None, space=space)
        files, _ = choose_files(folder, include)
    changed = [shard for name, shard in shards.items() if digests[name] != remote.shards.get(name)]
    others = [CommitOperationAdd(name, path) for name, path in files.items() if name not in shards]
    return [*changed, *others, *map(CommitOperationDelete, _find_stale(files, remote.paths))]


def _find_stale(files: dict[str, Path], remote_paths: list[str]) -> list[str]:
    """The repo's weights that the folder does not have and, if it has a card, the repo's other results with their
    figures."""
    results = [path for path in remote_paths if fnmatchcase(path, "results/*.json")] if "README.md" in files else []
    owned = {*results}.union(*(card_files(Path(path).stem) for path in results))
    absent = [path for path in remote_paths if path not in files]
    return [path for path in absent if SHARD_NAME.fullmatch(path) or path in owned]


def _add_card(api: HfApi, folder: Path, remote: _Remote, space: str | None) -> None:
    earlier = None
    if "README.md" in remote.paths:  # so that text written by hand stays
        earlier = Path(api.hf_hub_download(remote.repo_id, "README.md", revision=remote.commit)).read_text()
    _write_card(folder, remote.repo_id, earlier, space)


def _write_card(folder: Path, title: str | None, earlier: str | None = None, space: str | None = None) -> None:
    from concat_ensemble.reporting.model_card import write_card  # loads matplotlib

    write_card(folder, title, redraw=space is None, earlier=earlier, space=space)


def _check_token(token: str | bool | None) -> None:
    value = get_token() if token is None or token is True else token
    if value and not re.fullmatch(r"[!-~]+", value):  # the client would print it in its error
        raise ValueError("the token holds characters that no token has; copy it again, or log in with hf auth login.")


def _prepare_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make the repo and the branch if they are not there. Returns the repo's full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:  # create_repo ignores `private` for a repo that is there
        raise ValueError(_describe_public(repo_id))
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _describe_public(repo_id: str) -> str:
    return f"private=True: {repo_id} is public already; make it private on the Hub, or leave this out."


@contextmanager
def _explain_failures(repo_id: str) -> Iterator[None]:
    """Turn an error of the connection into an OSError that says to push again, and one of a token that is missing or
    wrong into one that says to log in; other answers of the Hub stay as they are."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        remedy = "log in with hf auth login, or set HF_TOKEN to a token that may write"
        raise OSError(f"{repo_id}: {first_line(error).rstrip('.')}; {remedy}.") from error
    except (HTTPError, RuntimeError) as error:
        problem = f"{repo_id}: the connection to {constants.ENDPOINT} failed ({first_line(error)})"
        raise OSError(f"{problem}. Push again: what has arrived is not sent a second time.") from error


def push_features(table: FeatureTable, repo_id: str, **options) -> CommitInfo | None:
    """Publish a table as a Hub dataset: a row per image, with a column of lists per member (`member_00`, ...) and the
    label. The table is never in memory as a whole.

    The repo `namespace/name` is made if there is none. `options` are those of `datasets.DatasetDict.push_to_hub`, such
    as `private`, `token`, `revision` and `create_pr`. Raises ValueError with `private=True` for a repo that is public.
    """
    if options.get("private"):  # which is ignored for a repo that is there already
        api = HfApi(token=options.get("token"), library_name="concat-ensemble")
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True).repo_id
        if not api.dataset_info(repo_id).private:
            raise ValueError(_describe_public(repo_id))
    blocks = table[next(iter(table))].blocks
    columns = {f"member_{k:02d}": List(Value(str(rows.dtype)), length=rows.shape[1]) for k, rows in enumerate(blocks)}
    features = Features(columns | {"label": ClassLabel(names=list(map(str, table.class_names)))})
    with tempfile.TemporaryDirectory() as folder:
        splits = DatasetDict()
        for name in table:
            path = Path(folder, f"{name}.arrow")
            _write_split(path, table[name], features)
            splits[name] = Dataset.from_file(str(path))
        return splits.push_to_hub(repo_id, **options)


def _write_split(path: Path, split: TableSplit, features: Features) -> None:
    with ArrowWriter(path=str(path), features=features) as writer:
        for start in range(0, len(split), ROWS):
            part = slice(start, start + ROWS)
            columns = [*(list(block[part]) for block in split.blocks), split.labels[part]]
            writer.write_batch(dict(zip(features, columns, strict=True)))
        writer.finalize()
