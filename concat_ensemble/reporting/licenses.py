"""The licences of members, and of several together: at least as restrictive as each of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from concat_ensemble.members.provenance import read_provenances
from concat_ensemble.reporting.rendering import Markdown, format_code, one_line

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig

LICENSE = "LICENSE.md"
OTHER = "other"  # the Hub's id for a licence that it does not know, which needs a name and a link

_NOTICE = frozenset({"keep the notice"})
_NAMES = _NOTICE | {"do not use the names"}
_CHANGES = _NAMES | {"state changes"}
_CC_BY = _CHANGES | {"no technical restrictions"}
_NC = _CC_BY | {"no commercial use"}
_MPL = _CHANGES | {"source of files"}
_LGPL = _MPL | {"source of the library"}
_GPL = _LGPL | {"source of the whole"}

# What each of the Hub's licence ids requires of those who pass the work on. A licence whose requirements include
# another's covers both works; where each of two requires something that the other does not, neither covers both.
REQUIREMENTS = {
    "cc0-1.0": frozenset(),
    "unlicense": frozenset(),
    "mit": _NOTICE,
    "isc": _NOTICE,
    "bsd-2-clause": _NOTICE,
    "bsd-3-clause": _NAMES,
    "apache-2.0": _CHANGES,
    "mpl-2.0": _MPL,
    "lgpl-3.0": _LGPL,
    "gpl-3.0": _GPL,
    "agpl-3.0": _GPL | {"source over a network"},
    "cc-by-4.0": _CC_BY,
    "cc-by-sa-4.0": _CC_BY | {"share alike"},
    "cc-by-nc-4.0": _NC,
    "cc-by-nc-sa-4.0": _NC | {"share alike, without commerce"},
    "cc-by-nd-4.0": _CC_BY | {"no changes"},
    "cc-by-nc-nd-4.0": _NC | {"no changes"},
}


def joint_license(licenses: Iterable[str | None]) -> str:
    """The Hub id of the member licence that requires all that the others require.

    `other` where there is none: for conflicting licences, for one that is not stated or not in `REQUIREMENTS`, and
    without members.
    """
    ids = set(licenses)
    requirements = {name: required for name, required in REQUIREMENTS.items() if name in ids}
    if not ids or len(requirements) < len(ids):
        return OTHER
    required = frozenset().union(*requirements.values())
    return min((name for name in requirements if requirements[name] == required), default=OTHER)


def member_licenses(config: ConcatEnsembleConfig) -> list[str | None]:
    """The licence of each built member from its provenance; None where it is not stated."""
    licenses = [provenance.license for provenance in read_provenances(config)]
    return [None if license is None else one_line(license) for license in licenses]


def license_name(licenses: list[str | None]) -> str:
    """A name for licences that the Hub has no id for: the only one there is, `mixed` or `not-stated`."""
    names = set(licenses)
    if names <= {None}:
        return "not-stated"
    return re.sub(r"[^a-z0-9.-]+", "-", str(*names).lower()).strip("-") if len(names) == 1 else "mixed"


def license_sentence(licenses: list[str | None]) -> Markdown:
    joint = joint_license(licenses)
    if joint == OTHER:
        return Markdown(f"No known licence covers all members. Each keeps its own; [{LICENSE}]({LICENSE}) lists them.")
    reason = ", the most restrictive licence of a member" if len(set(licenses)) > 1 else ""
    return Markdown(f"Licence of the whole: {format_code(joint)}{reason}.")
