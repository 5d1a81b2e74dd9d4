"""Sphinx's configuration of the pages; `make docs` builds them."""
import smpconv_models

project = 'smpconv_models'
version = release = smpconv_models.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build']
highlight_language = 'none'
html_theme = 'furo'
html_title = f'smpconv_models {version}'
html_show_copyright = False
pygments_dark_style = 'monokai'

myst_heading_anchors = 3  # GitHub's, which links between pages use

default_role = 'code'
napoleon_numpy_docstring = False
napoleon_custom_sections = ['Numerics']
napoleon_use_ivar = True
autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_typehints_format = 'short'
python_use_unqualified_type_names = True
# Names of other packages and types of a Trainer's attributes have no entry here.
nitpick_ignore_regex = [('py:.*', r'(?!smpconv_models\.).*'), ('py:class', r'smpconv_models\.training\.\w+\.\w+')]
