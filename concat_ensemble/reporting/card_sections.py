"""The parts of a card: its metadata and its sections, and which of them a user wrote."""

import re
from pathlib import Path
from typing import Any

import yaml


def split_metadata(card: str, path: Path) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its text. Raises ValueError naming `path` if the metadata are not YAML."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if block is None:
        return {}, card
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its metadata are not YAML ({reason}); repair or delete it.") from error
    return metadata if isinstance(metadata, dict) else {}, card[block.end() :]


def keep_user_sections(text: str, earlier: str, template: str) -> str:
    """`text` with the sections of the `earlier` text that are not in `template`, each after the one it followed."""
    generated = [heading for heading, _ in split_sections(template)]
    sections, before = split_sections(text), ""
    for heading, section in split_sections(earlier):
        if heading not in generated:
            headings = [heading for heading, _ in sections]
            place = headings.index(before) + 1 if before in headings else len(sections)
            sections.insert(place, (heading, section))
        before = heading
    return "\n\n".join(section for _, section in sections) + "\n"


def split_sections(text: str) -> list[tuple[str, str]]:
    """Heading (`## ...`) and text of each section; the first has no heading. Lines of code are no headings."""
    sections, is_code = [("", [])], False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            sections.append((line.strip(), []))
        sections[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in sections]
