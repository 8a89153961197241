"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))

import popdrop  # noqa: E402 - only now it can be found without being installed

project = "Popdrop"
author = "The Popdrop maintainers"
copyright = author  # the name that Sphinx wants
version = release = popdrop.__version__

extensions = ["popdrop_reference", "sphinx_click"]
exclude_patterns = ["_build"]
nitpicky = True
highlight_language = "none"

smartquotes_action = "qe"  # no dashes: help texts name options
html_theme = "furo"
html_title = f"Popdrop {release}"
html_copy_source = False
