"""The view's script: the files beside this one, joined into one module that needs no other.

Each file is an ES module. Joined, each is a function of its own that returns what it exports, and
an import takes names out of what another has returned::

    const dom = (() => { ...; return { el, svg }; })();
    const grid = (() => { const { el } = dom; ...; return { Grid }; })();

``_PARTS`` is the order in which each takes from those before it. The style sheet and the colours
come first, as constants: the colours are those of ``rankflow.report.palette``, written down nowhere
else.
"""

import json
import re
from functools import cache
from importlib import resources
from typing import Final

from rankflow.report.view.colours import view_colours
from rankflow.report.view.data import encode

_PARTS: Final = (
    "dom",
    "format",
    "source",
    "run",
    "quantities",
    "selection",
    "colours",
    "ground",
    "chart",
    "budget",
    "legend",
    "grid",
    "card",
    "summary",
    "controls",
    "main",
)
_IMPORT: Final = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?:const|function|class) (\w+)", re.MULTILINE)


@cache
def view_script() -> str:
    """Return the whole script; the one name that it exports is ``render``."""
    style = json.dumps(_read("style.css"))
    colours = encode(view_colours()).decode()
    parts = [_enclose(part, _read(f"{part}.js")) for part in _PARTS]
    head = f"const STYLE = {style};\nconst COLOURS = {colours};\n"
    return "\n".join([head, *parts, "export const { render } = main;\n"])


def _enclose(name: str, source: str) -> str:
    exports = ", ".join(_EXPORT.findall(source))
    body = _IMPORT.sub(r"const \1 = \2;", source).replace("\nexport ", "\n")
    return f"const {name} = (() => {{\n{body}\nreturn {{ {exports} }};\n}})();\n"


def _read(name: str) -> str:
    return resources.files("rankflow.report.view").joinpath(name).read_text("utf-8")
