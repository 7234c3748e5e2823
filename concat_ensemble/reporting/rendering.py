"""Templates, and the escaping of names that come from strangers' files."""

import dataclasses
import re
from typing import Any

import jinja2

from concat_ensemble.studies.results import Results


def make_environment(**options: Any) -> jinja2.Environment:
    """The environment of the templates in `templates/`, with filters that escape text for Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("concat_ensemble.reporting", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters |= {"text": escape_text, "code": escape_code, "command": escape_command}
    return environment


def one_line(value: Any) -> str:
    """On one line, without the characters that move a terminal's cursor."""
    return "".join(filter(str.isprintable, " ".join(str(value).split())))


def escape_text(value: Any) -> str:
    """One line without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(value))


def escape_code(value: Any) -> str:
    """One line that ends neither the inline code around it nor the cell of a table."""
    return one_line(value).replace("`", "'").replace("|", "\\|")


def escape_command(value: Any) -> str:
    """One line that does not end the block of code around it."""
    return one_line(value).replace("```", "'''")


def escape_names(study: Results) -> Results:
    """The same results with the names of the ensemble and of the rows escaped for Markdown."""
    rows = [dataclasses.replace(row, name=escape_text(row.name)) for row in study.rows]
    return dataclasses.replace(study, ensemble=escape_text(study.ensemble), rows=rows)
