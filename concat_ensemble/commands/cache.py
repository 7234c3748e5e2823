"""`cache`: the stored features."""

import json
import shutil
import sys
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson
from concat_ensemble.console import out


def cache(
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard; damaged ones are removed.")] = False,
    prune: Annotated[int | None, typer.Option(min=0, help="Remove what was not read for this many days.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the stored features of each member, and verify or prune them.

    concat-ensemble cache --prune 90
    """
    from concat_ensemble.features.store import default_store, stored_blocks

    table = Table("architecture", "images", "width", "MB", "days since read", "key")
    found = stored_blocks(default_store(), verify=verify)
    for block in found:
        if removed := prune is not None and block["idle_days"] >= prune:
            shutil.rmtree(default_store() / block["key"])
        block["removed"] = removed
        note = " (removed)" if removed else f" ({block['damaged']} damaged shards removed)" if block["damaged"] else ""
        size = (block["architecture"], f"{block['images']:,}", f"{block['num_features']:,}", f"{block['bytes'] / 1e6:,.1f}")
        table.add_row(*size, f"{block['idle_days']:.0f}", block["key"] + note)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        out.print(table)
        out.print(f"{sum(block['bytes'] for block in found) / 1e6:,.1f} MB in {default_store()}", soft_wrap=True)
