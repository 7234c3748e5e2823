"""docs/api.md, from the docstrings of what `concat_ensemble` gives.

python docs/make_api.py
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import concat_ensemble
from concat_ensemble.features.ntk import NTK

PAGE = Path(__file__).with_name("api.md")
NOTE = "<!-- Written by `python docs/make_api.py`. -->"
# In the order in which a reader meets them; what is not here is at the end.
FIRST = ["assemble", "load_data", "extract_features", "ConcatEnsembleModel", "ConcatEnsembleForImageClassification", "ConcatEnsembleConfig", "ConcatEnsembleImageProcessor"]  # fmt: skip


def page() -> str:
    names = [*FIRST, *(name for name in concat_ensemble.__all__ if name not in FIRST)]
    found = {name: getattr(concat_ensemble, name) for name in names} | {"ntk.NTK": NTK}
    parts, told = (
        [f"{NOTE}\n\n# API\n\n`import concat_ensemble` gives these; `concat_ensemble.features.ntk` the last."],
        set(),
    )
    for name, thing in found.items():
        parts.append(f"## `{name}`\n\n{documented(name, thing)}")
        for method, function in methods(thing).items():
            if function not in told:  # two classes share some
                parts.append(f"### `{name}.{method}`\n\n{documented(method, function)}")
                told.add(function)
    return "\n\n".join(parts) + "\n"


def methods(thing) -> dict:
    """Of ours, the public ones that say what they do."""
    ours = (
        [base for base in inspect.getmro(thing) if base.__module__.startswith("concat_ensemble")]
        if inspect.isclass(thing)
        else []
    )
    found = {name: value for base in reversed(ours) for name, value in vars(base).items() if not name.startswith("_")}
    return {name: value for name, value in found.items() if inspect.isfunction(value) and value.__doc__}


def documented(name: str, thing) -> str:
    shown = inspect.signature(thing)
    if dataclasses.is_dataclass(thing):  # of a config, transformers' own fields are left out
        own = [value for key, value in shown.parameters.items() if key in vars(thing)["__annotations__"]]
        shown = shown.replace(parameters=own)
    # Annotations that are text, and modules, look different from version to version.
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(shown))
    signature = re.sub(r"\b(?:[A-Za-z_]+\.)+([A-Za-z])", r"\1", signature)
    text = inspect.getdoc(thing) or ""
    return f"```text\n{name}{signature}\n\n{text}\n```"


if __name__ == "__main__":
    sys.stdout.write(page()) if "--print" in sys.argv else PAGE.write_text(page())
