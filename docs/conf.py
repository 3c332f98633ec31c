"""How the documentation is built: `make docs`, or `sphinx-build -W -c docs . build/docs` from the root.

The sources are the pages that are read on GitHub, so the root of the repository is where Sphinx looks for pages, and a
link means the same there and here. What only the site has stands in a comment, `<!-- site … -->`.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

from site_parts import chooser, commands, reference, scripts  # noqa: E402

import pushforward  # noqa: E402

project = "Pushforward"
author = copyright = "the Pushforward authors"
version = release = pushforward.__version__
html_title = "Pushforward"

extensions = [
    "myst_parser",
    "site_parts.mathml",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]

root_doc = "docs/index"
include_patterns = ["docs/**.md", "docs/**.rst", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md"]
exclude_patterns = ["**/.*", ".venv", "build", "demo"]
default_role = "code"  # single backticks, as in Markdown

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["chooser.js"]
html_extra_path = ["_root"]
html_math_renderer = "mathml"
html_theme_options = {
    "source_repository": "https://github.com/pushforward/pushforward",
    "source_branch": "main",
    "source_directory": "",
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "build/examples",
    "gallery_dirs": "docs/examples",
    "filename_pattern": "/(" + "|".join(scripts.ARGUMENTS) + r")\.py$",
    "image_scrapers": (scripts.Pictures(),),
    "reset_argv": "site_parts.scripts.arguments",
    "min_reported_time": 1e9,
    "write_computation_times": False,  # a page for nobody, which loads scripts of others
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
    "copyfile_regex": "",
    "within_subsection_order": "FileNameSortKey",
}


def uncover(app: Sphinx, page: str, source: list[str]) -> None:
    """Let in what stands in comments for the site only."""
    text = re.sub(r"^<!-- site\n(.*?)^-->$", r"\1", source[0], flags=re.MULTILINE | re.DOTALL)
    source[0] = text.replace("<!-- chooser -->", chooser.html(ROOT / "benchmarks" / "results"))


def setup(app: Sphinx) -> None:
    scripts.write_scripts(ROOT / "examples", ROOT / "build" / "examples")
    reference.write_pages(ROOT / "docs" / "api")
    commands.write_page(ROOT / "docs" / "commands.rst")
    app.connect("source-read", uncover)
    app.connect("autodoc-process-docstring", reference.as_rst)
