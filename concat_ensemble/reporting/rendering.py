"""The templates' environments, in which all text is escaped unless it is Markdown or HTML that we wrote ourselves.

Names of results, datasets, classes and members come from strangers' files. No template and no caller escapes them: the
environment does, wherever a template writes a value.
"""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from concat_ensemble.console import printable

# What means something in Markdown. The interval [-1.5, +2.0] is no link, <0.001 no tag, and snake_case not emphasized;
# they stay as they are.
SYMBOLS = re.compile(
    r"\[[-+.,\d ]+\](?![(\[:])"
    r"|([\\`*\[\]>|$~]|<(?=[a-zA-Z/!?]|$)|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
    r"|^#|(?<=\s)#(?=#*$)|^[-+](?=\s|$)|^-(?=-)|^=(?==*$))"
)
NUMBERED = re.compile(r"^(\d+)(?=[.)](?:\s|$))")  # an item of a list, where a line begins with it


class Markdown(str):
    """Markdown that we wrote ourselves, in which names are escaped already; any other text is escaped."""


def make_markdown_environment() -> jinja2.Environment:
    """The environment of the Markdown templates: a value is written as text, without any meaning in Markdown or HTML.

    Filters write it as something else: `code` as inline code, `code_line` as a line of a block of code, `url` as the
    target of a link, `table` as a table.
    """
    environment = _make_environment(finalize=escape_text)
    environment.filters |= {
        "code": format_code,
        "code_line": escape_code_line,
        "url": escape_url,
        "table": format_table,
    }
    return environment


def make_html_environment() -> jinja2.Environment:
    """The environment of the HTML templates."""
    return _make_environment(
        autoescape=True, finalize=lambda value: value if isinstance(value, Markup) else printable(value)
    )


def _make_environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("concat_ensemble.reporting", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def one_line(value: Any) -> str:
    """`printable` text, with single spaces between its words."""
    return " ".join(printable(value).split())


def escape_text(value: Any) -> Markdown:
    """One line without a meaning in Markdown or HTML; Markdown stays as it is."""
    if isinstance(value, Markdown):
        return value
    text = SYMBOLS.sub(lambda match: f"\\{match[1]}" if match[1] else match[0], one_line(value))
    return Markdown(NUMBERED.sub(r"\1\\", text))


def format_code(value: Any) -> Markdown:
    """Inline code, also in the cell of a table."""
    return Markdown("`{}`".format(one_line(value).replace("`", "'").replace("|", "\\|")))


def escape_code_line(value: Any) -> Markdown:
    """A line that does not end the block of code around it."""
    return Markdown(one_line(value).replace("```", "'''"))


def escape_url(value: Any) -> Markdown:
    """The target of a link: a relative path, or an address."""
    return Markdown(quote(str(value), safe="/", errors="surrogateescape"))


def format_table(rows: Sequence[Sequence[Any]]) -> Markdown:
    """A table, the headings first."""
    lines = [f"| {' | '.join(map(escape_text, cells))} |" for cells in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return Markdown("\n".join(lines))
