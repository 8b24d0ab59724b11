"""The site: Sphinx reads the pages as Markdown (MyST) and the API from the docstrings. `make docs` builds it."""

import logging
import re
import warnings

from sk_plugins import __version__

# mmcv-lite and mmpretrain say what they lack as they are imported.
warnings.filterwarnings('ignore')
logging.getLogger('mmengine').setLevel(logging.ERROR)

project = 'sk-plugins'
author = 'the sk-plugins authors'
release = version = __version__
html_title = project

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build']
myst_heading_anchors = 3
myst_enable_extensions = ['attrs_block', 'colon_fence']

autodoc_default_options = {'members': True, 'show-inheritance': True, 'member-order': 'bysource'}
toc_object_entries_show_parents = 'hide'
autodoc_preserve_defaults = True
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# References to this package's public names must lead somewhere. Others' are names: the site is built without a network.
nitpick_ignore_regex = [('py:.*', r'(?!sk_plugins\.).*'), ('py:.*', r'sk_plugins\.(.*\.)?_.*')]

# The pages that are files from outside docs/. Pages link to the files, which a Git host shows as they are.
PAGES = {
    '../CHANGELOG.md': 'changelog.md',
    '../CONTRIBUTING.md': 'contributing.md',
    '../results/ablation/first/table.md': 'ablation_results.md',
    '../results/scenes/README.md': 'scenes.md',
    '../results/warm_start/table.md': 'warm_start_results.md',
}


def include_files(app, docname, source):
    """Put a file in the place of the link that is a paragraph of its own, and lead all other links to its page."""
    text = source[0]
    for link, path in re.findall(r'(?:\A|(?<=\n\n))(\[.+\]\((\.\./.+\.md)\))$', text, flags=re.MULTILINE):
        offset = 0 if text.startswith(link) else 2
        text = text.replace(link, f'```{{include}} {path}\n:heading-offset: {offset}\n:relative-images:\n```')
    for path, page in PAGES.items():
        text = text.replace(f']({path}', f']({page}')
    source[0] = text


def setup(app):
    app.connect('source-read', include_files)


html_theme = 'pydata_sphinx_theme'
html_static_path = ['_static']
html_css_files = ['site.css']
html_sidebars = {'models': []}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    'logo': {'text': project},
    'navigation_with_keys': False,
    'secondary_sidebar_items': {'**': ['page-toc'], 'models': []},
    'footer_start': ['copyright'],
    'footer_end': [],
    'show_toc_level': 2,
}
copyright = f'{author}, Apache-2.0'
