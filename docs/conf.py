"""The documentation site: Sphinx reads Markdown by MyST, and API pages from docstrings.

Build it with ``python -m sphinx -W --keep-going docs out/docs``. Nothing is fetched while it is
built, and no package of EdgeForge is imported: `sphinx-autoapi` reads the source text.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "EdgeForge"
author = "The EdgeForge contributors"
copyright = "The EdgeForge contributors, Apache-2.0"

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# autosummary, which autoapi loads, wants to know of .rst; there is no such page.
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

# Headings get anchors, so that a link to a section is checked as a link to a page is.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "EdgeForge"
html_copy_source = False

# API pages name what they show; nothing is generated for modules that no page names.
autoapi_dirs = [str(ROOT / name) for name in ("edgeforge", "device_harness", "exporters", "quant")]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_keep_files = False
autoapi_python_class_content = "class"
autodoc_typehints = "signature"

# Constants that are assigned several at a time are found by no static reader; none has a page.
suppress_warnings = ["autoapi.python_import_resolution"]

# Docstrings name modules and functions in single backticks; shown as code, linked to nothing.
default_role = "code"
maximum_signature_line_length = 80  # longer ones get a line for each parameter
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
