"""`push`: an ensemble's folder on the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import AsJson, Quiet, tell


def push(
    folder: Annotated[Path, typer.Argument(help="An ensemble's folder, with its card and results.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="For you and your organisation alone.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, made where there is none; main when left out.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    token: Annotated[
        str | None,
        typer.Option(help="In place of HF_TOKEN or hf auth login, which other users of this machine cannot see."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish an ensemble: weights, config, code, card, results and figures, in one commit.

    What is on the Hub already is not sent again: run it once more after an upload that was cut off.

    concat-ensemble push two-resnets me/two-resnets --private
    """
    from huggingface_hub.utils import disable_progress_bars

    from concat_ensemble.hub import push_ensemble

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    asked = {"private": private or None, "revision": revision, "create_pr": create_pr, "token": token}
    commit = push_ensemble(folder, repo_id, **asked)
    facts = {"repo": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}  # fmt: skip
    tell(commit.pr_url or commit.commit_url, facts, as_json, quiet)
