"""How Sphinx builds these pages: `make docs`."""

import re
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import sphinx_argparse_cli._logic
from docutils.nodes import SkipNode, math, math_block
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

from bayesian_lora_kernels import LaplaceConfig, __version__

project = "bayesian_lora_kernels"
version = release = __version__
copyright = "the authors of bayesian_lora_kernels, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "attrs_block"]
myst_heading_anchors = 4
numfig = True
math_numfig = False
html_math_renderer = "mathml"
math_eqref_format = "({number})"

add_module_names = False
smartquotes_action = "D"  # dashes; quotes stay as they are typed
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["laplace"]  # of a peer, that need not be installed
napoleon_use_ivar = True
napoleon_use_rtype = False
# A function that a page names and that is not there is an error; types of signatures are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|exc|obj|attr)", ".*"), ("py:.*", r"(?!bayesian_lora_kernels\.).*")]

copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Of the command line's help: JSON and quoted words are code. The extension's own patterns find quotes inside JSON.
sphinx_argparse_cli._logic._HELP_SUBSTITUTIONS[:] = [
    (re.compile(r"""(\{.+?\}|(?<!\w)'[^']+?'(?!\w)|(?<!\w)"[^"]+?"(?!\w))"""), r"``\1``")
]

# Files outside this folder that have pages here, which include them.
HERE = Path(__file__).parent
OUTSIDE = re.compile(
    r"\((?:\.\./)+(?:benchmarks/(results)/(?:[\w-]+/)?([\w-]+)|(CONTRIBUTING|CHANGELOG)|(examples)/README)\.md"
)


def _make_results(app: Sphinx) -> None:
    """A page in `results/` for each file of results."""
    (HERE / "results").mkdir(exist_ok=True)
    for file in (HERE.parent / "benchmarks" / "results").rglob("*.md"):
        title = "" if file.read_text(encoding="utf-8").startswith("# ") else f"# {file.stem}\n\n"
        text = f"{title}```{{include}} ../../{file.relative_to(HERE.parent)}\n```\n"
        page = HERE / "results" / file.name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _link_inside(app: Sphinx, docname: str, source: list[str]) -> None:
    """A link to such a file, which is right on GitHub, becomes one to its page."""
    up = "../" * docname.count("/")
    source[0] = OUTSIDE.sub(lambda x: f"({up}{f'results/{x[2]}' if x[1] else (x[3] or x[4]).lower()}.md", source[0])


def _as_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings have `code` in single backticks, and bars that are no substitutions; settings describe themselves."""
    if name.endswith(".LaplaceConfig"):
        lines += ["", "Args:", *(f"    {one.name}: {one.metadata['help']}" for one in fields(LaplaceConfig))]
    for i, line in enumerate(lines):
        parts = re.split(r"(``.+?``|`[^`]+`)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
        lines[i] = "".join(parts)
    # napoleon takes what stands before a colon in the first line of these for a type; a blank line of markup has none.
    starts = [i + 1 for i, line in enumerate(lines) if line.strip() in ("Returns:", "Yields:")]
    for i in reversed([0, *starts] if what == "property" else starts):
        lines.insert(i, " " * (len(lines[i]) - len(lines[i].lstrip())) + "\\ ")


# Equations are MathML, which browsers show by themselves, without a network. What it cannot read is an error.
MATHML = LatexToMathML(annotation=True)


def _inline(self: HTML5Translator, node: math) -> NoReturn:
    self.body.append(MATHML.convert_with_local_state(node.astext(), displaystyle=False))
    raise SkipNode


def _displayed(self: HTML5Translator, node: math_block) -> NoReturn:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(f"{MATHML.convert_with_local_state(node.astext(), displaystyle=True)}</div>\n")
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))
    app.connect("builder-inited", _make_results)
    app.connect("source-read", _link_inside)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon reads them
