"""`push`: an ensemble's folder on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import AsJson, Quiet, print_written


def push(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of an ensemble with its card and results.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub; created where it does not exist.")],
    include: Annotated[
        list[str] | None,
        typer.Option(help="Other files to publish, such as 'notes/*'; may be repeated."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For you and your organization only.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, created where it does not exist; main when left out.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    space: Annotated[
        bool,
        typer.Option("--space", help="Publish a Space of the same name, too, on which visitors drop an image."),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            help="Hub token. HF_TOKEN and hf auth login are safer: other users of this machine can see this option."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish an ensemble: weights, config, code, card, results and figures, in one commit, and no other files unless
    --include names them.

    Files that are on the Hub already are not sent again: run it once more after an upload that was cut off.

    concat-ensemble push two-resnets me/two-resnets --private

    concat-ensemble push two-resnets me/two-resnets --space
    """
    from concat_ensemble.hub import push_ensemble

    options = {"private": private or None, "revision": revision, "create_pr": create_pr, "token": token}
    commit = push_ensemble(folder, repo_id, include=include or [], quiet=quiet, space=space, **options)
    facts = {"repo": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}
    facts |= {"space": commit.repo_url.repo_id} if space else {}
    print_written(commit.pr_url or commit.commit_url, facts | {"pull_request": commit.pr_url}, as_json, quiet)
