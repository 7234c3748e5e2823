"""What may be said of the licence of several members together: never more than the least free of them allows."""

from collections.abc import Iterable

OTHER = "other"  # the Hub's word for a licence that it does not know, which needs a name and a link

_NOTICE = frozenset({"keep the notice"})
_NAMES = _NOTICE | {"do not use the names"}
_CHANGES = _NAMES | {"state changes"}
_CC_BY = _CHANGES | {"add no locks"}
_NC = _CC_BY | {"no commerce"}
_MPL = _CHANGES | {"source of files"}
_LGPL = _MPL | {"source of the library"}
_GPL = _LGPL | {"source of the whole"}

# What each of the Hub's licence ids asks of whoever passes the work on. One that asks for more than another covers both;
# two that each ask for something of their own cover neither.
ASKS = {
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
    """The most restrictive of the members' licences, as a Hub id, if it asks for all that the others ask for; else `other`:
    for licences in conflict, one that is unknown (`ASKS`) or not stated, and for no members.
    """
    named = set(licenses)
    if not named or not named <= ASKS.keys():
        return OTHER
    asked = frozenset().union(*(ASKS[name] for name in named))
    return min((name for name in named if ASKS[name] == asked), default=OTHER)
