"""`make docs`: pages in Markdown, the interface from its docstrings, without the network."""

import gradproj

project, author, release = "gradproj", "the gradproj authors", gradproj.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "gradproj"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
exclude_patterns = ["examples"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which annotations do not
autodoc_member_order = "bysource"
napoleon_use_ivar = True
