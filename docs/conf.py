"""Sphinx's settings, for the pages that build.py prepares. The site needs no network to be read: it uses the reader's
fonts, and equations are MathML, which browsers render."""

from docutils import nodes
from latex2mathml.converter import convert

import fastbn

project = "fastbn"
copyright = "fastbn authors"
version = release = fastbn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "fastbn"
html_static_path = ["theme"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "default", "github-dark"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

default_role = "py:obj"
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autoclass_content = "class"
add_module_names = False
toc_object_entries_show_parents = "hide"


def visit_math(translator, node):
    is_block = isinstance(node, nodes.math_block)
    mathml = convert(node.astext(), display="block" if is_block else "inline")
    translator.body.append(f'<div class="equation">{mathml}</div>' if is_block else mathml)
    raise nodes.SkipNode


html_math_renderer = "mathml"


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
