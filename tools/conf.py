"Sphinx's settings for tools/docs.py"
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
meta = ini['DEFAULT']

project = html_title = meta['lib_name']
author = copyright = meta['author']
release = meta['version']

extensions = ['myst_nb', 'sphinxcontrib.katex', 'sphinx_copybutton']
katex_css_path = 'katex/katex.min.css'  # in static/, of the version whose script sphinxcontrib-katex brings: no CDN
nb_execution_mode = 'off'               # notebooks hold their outputs
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 4
suppress_warnings = ['myst.header']     # a page may go from its title to an API heading

smartquotes = False                     # options such as --out keep their dashes

html_theme = 'furo'
html_static_path, html_css_files, html_favicon = ['static'], ['site.css'], 'static/favicon.svg'
html_copy_source = html_show_sourcelink = html_show_sphinx = html_use_index = False
# Excerpts in search results are fetched, which a browser refuses to pages opened as files
no_excerpts = 'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false'
html_js_files = [(None, dict(body=no_excerpts, priority=800))]
