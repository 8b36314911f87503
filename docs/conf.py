"""Sphinx: ``sphinx-build -W -b html docs docs/_build``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "srlora_pl"
author = "the srlora_pl authors"
copyright = "the srlora_pl authors"
release = metadata.version("srlora_pl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "from_docstrings"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"srlora_pl {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

napoleon_use_ivar = True
default_role = "code"  # docstrings write `Adaptation` for a name
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = True
