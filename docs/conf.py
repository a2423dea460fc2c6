"""The documentation: `make docs` builds it into docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import rnnguard  # noqa: E402
from docs.pages import write_pages  # noqa: E402  (found through the line above)

project = "rnnguard"
version = release = rnnguard.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rnnguard {release}"


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir)))
