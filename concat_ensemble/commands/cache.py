"""`cache`: the stored features."""

import shutil
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, print_json
from concat_ensemble.console import out


def cache(
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and remove the damaged ones.")] = False,
    prune: Annotated[int | None, typer.Option(min=0, help="Remove what was not read for this many days.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the stored features of each member, and verify or prune them.

    concat-ensemble cache --prune 90
    """
    from concat_ensemble.features.store import default_store, stored_blocks

    blocks = stored_blocks(default_store(), verify=verify)
    for block in blocks:
        block["removed"] = prune is not None and block["idle_days"] >= prune
        if block["removed"]:
            shutil.rmtree(default_store() / block["key"])
    if as_json:
        print_json(blocks)
    else:
        out.print(block_table(blocks))
        out.print(f"{sum(block['bytes'] for block in blocks) / 1e6:,.1f} MB in {default_store()}", soft_wrap=True)


def block_table(blocks: list[dict]) -> Table:
    """One row for the stored features of each member."""
    table = Table("architecture", "images", "features", "MB", "days since read", "key")
    for block in blocks:
        note = f" ({block['damaged']} damaged shards removed)" if block["damaged"] else ""
        note = " (removed)" if block["removed"] else note
        size = f"{block['images']:,}", f"{block['num_features']:,}", f"{block['bytes'] / 1e6:,.1f}"
        table.add_row(block["architecture"], *size, f"{block['idle_days']:.0f}", block["key"] + note)
    return table
