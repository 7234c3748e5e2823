"""The parts of a card: its metadata and its sections, and which of them a user wrote."""

import re
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import ModelCardData

from concat_ensemble.files import parse_yaml
from concat_ensemble.schema import Text, check_type
from concat_ensemble.studies.ensemble_folders import WRITTEN_BY

MAX_METADATA = 500_000  # bytes; a card of fifty datasets has about 100,000
# With these keys `ModelCard.load` fails: they are arguments, and not keys of the metadata.
RESERVED_KEYS = {"self", "eval_results", "ignore_metadata_errors"}


class UserMetadata(TypedDict, total=False):
    """The keys of a card's metadata that this package or `huggingface_hub` reads; users may write others."""

    tags: list[Text] | None
    language: Text | list[Text] | None
    model_name: Text | None


def split_metadata(card: str, path: Path) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its text. Raises ValueError naming `path` for metadata that are not YAML, or
    have a key or a value that a model card's cannot have."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if block is None:
        return {}, card
    try:
        metadata = check_type(parse_yaml(block[1].encode(), MAX_METADATA) or {}, dict[str, Any])
        check_type(metadata, UserMetadata)
        if reserved := [key for key in metadata if key in RESERVED_KEYS or hasattr(ModelCardData, key)]:
            raise ValueError(f"{reserved[0]!r} is a name that huggingface_hub keeps for itself")
    except ValueError as error:
        raise ValueError(f"{path}: its metadata are not those of a model card ({error}); correct them.") from error
    return metadata, card[block.end() :]


def keep_user_sections(text: str, earlier: str, template: str) -> str:
    """`text` with the sections of the `earlier` text that are not in `template`, each after the one it followed."""
    generated, sections = {heading for heading, _ in split_sections(template)}, split_sections(text)
    kept: dict[str, list[str]] = {heading: [] for heading, _ in sections}
    before, own = "", split_sections(earlier)
    if WRITTEN_BY not in earlier and (lines := re.sub(r"^# .*", "", own[0][1]).strip()):
        own = [("## Notes", f"## Notes\n\n{lines}"), *own[1:]]  # what a user wrote in place of a card
    for heading, section in own:
        if heading in kept:
            before = heading
        elif heading not in generated:
            kept[before].append(section)
    parts = [part for heading, section in sections for part in (section, *kept.pop(heading, []))]
    return "\n\n".join(parts) + "\n"


def split_sections(text: str) -> list[tuple[str, str]]:
    """Heading (`## ...`) and text of each section; the first has no heading. Lines of code are no headings."""
    sections, is_code = [("", [])], False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            sections.append((line.strip(), []))
        sections[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in sections]
