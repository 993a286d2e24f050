"""The documentation as a site: `make docs` builds it into build/docs. Nothing on it is fetched from elsewhere."""

from __future__ import annotations

import re
from importlib import metadata
from pydoc import locate
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

project = "VMamba"
author = "the VMamba maintainers"
copyright = "2026, the VMamba maintainers"
release = metadata.version("vmamba")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["images"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Docstrings mark names of any kind by backticks: those that are ours become links, the others are code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A link to a name of this package must lead somewhere; the other packages' pages are not ours to check.
nitpick_ignore_regex = [("py:.*", r"(?!vmamba\.).*")]
suppress_warnings = ["ref.python"]  # one name, described by the class and by the module that hands it on

html_theme = "furo"
html_title = f"VMamba {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}


def _as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let a docstring, which is written to be read as plain text, be read as reStructuredText too.

    Outside backticks, characters that it would take for markup stand for themselves; an indented block after a colon
    is code.
    """
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [_plain(part, first=index == 0) for index, part in enumerate(parts[::2])]
        lines[number] = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "".join(parts))
    for number in range(len(lines) - 2):
        line, following = lines[number], lines[number + 2]
        indent = len(line) - len(line.lstrip())
        if line.endswith(":") and not lines[number + 1].strip() and following.startswith(" " * (indent + 4)):
            lines[number] += ":"


def _plain(text: str, first: bool) -> str:
    head = re.match(r"\s*(?:\*{1,2}\w+:|[-*] )", text) if first else None  # an argument, or an item of a list
    kept = head[0] if head else ""
    return kept + re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", lambda found: f"\\{found[0]}", text[len(kept) :])


def _elsewhere(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    """Where a name is described that a package hands on: `vmamba.nn.SS2D` is vmamba.nn.ss2d.SS2D."""
    name = re.match(r"[\w.]*", node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not name or not name[0].startswith("vmamba"):
        return None
    found: Any = locate(name[0])
    if found is None:
        return None
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    domain = env.domains.python_domain
    link = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, contnode)
    return link or contnode  # it is there, but has no place of its own in the reference


def _mathml(node: nodes.math | nodes.math_block, as_block: bool) -> str:
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("an equation cannot be drawn: %s", error, location=node)
        return ""


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Equations as MathML, which browsers draw themselves; docstrings as they are."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("missing-reference", _elsewhere)
    app.connect("autodoc-process-docstring", _as_rst, priority=100)  # before napoleon
