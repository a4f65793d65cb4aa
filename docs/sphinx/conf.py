import os
import sys
from importlib.metadata import version as installed

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "_ext"))

project = "trio_uring"
author = "The trio_uring contributors"
copyright = "The trio_uring contributors"
version = release = installed("trio-uring")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib_trio", "source_tables"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"trio_uring\._.*")]  # private names in signatures

# Links into other projects need their inventories, and those need a network.
if os.environ.get("TRIO_URING_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
        "anyio": ("https://anyio.readthedocs.io/en/stable", None),
    }
else:
    nitpick_ignore_regex.append((r"py:.*", r"(?!trio_uring\b).*"))
