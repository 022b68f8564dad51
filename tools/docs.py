"""Build docs/ from the notebooks: nbdev's processors, then MyST-NB and Sphinx.

Outputs are those saved in the notebooks; the API is read from the exported modules, so that nothing is executed twice.
`--check` says where docs/ and the notebooks differ."""
import argparse
import json
import re
import shutil
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

from bs4 import BeautifulSoup
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.process import NBProcessor
from nbdev.processors import (add_show_docs, clean_magics, filter_stream_, hide_, hide_line, mv_exports, rm_export,
                              rm_header_dash, strip_ansi)
from nbdev.showdoc import show_doc
from sphinx.cmd.build import main as sphinx

from paddy_multi._nbdev import rooms, settings

warnings.filterwarnings('ignore', message='`torch.jit.script`', category=FutureWarning)  # fastai's, at import
TOOLS = Path(__file__).parent
PROCESSORS = [add_show_docs, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_,
              mv_exports]
TAGS = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output', ('code-fold', ''): 'hide-input'}


def plan() -> dict:
    "The rooms of each package, lowest floor first"
    return rooms(settings(get_config()))


def packages() -> list: return list(plan())


# --- one notebook -> one page ---------------------------------------------------------------------------------------
class Page:
    "A notebook as MyST cells; `labels` are what it documents, written `package.module.symbol` in lower case"
    def __init__(self, path:Path, nbs:Path):
        self.notebook = path.relative_to(nbs)
        self.name = nbpath2html(self.notebook).with_suffix('').as_posix()
        self.labels = set()
        processor = NBProcessor(path, PROCESSORS)
        self.module = self._module(processor.nb.cells)
        processor.process()
        self.cells = [new for cell in processor.nb.cells if (new := self._cell(cell))]

    def _module(self, cells):
        names = [c.directives_['default_exp'] for c in cells if 'default_exp' in c.directives_]
        return import_module(f'{self.notebook.parts[0]}.{names[0]}') if names else None

    def _cell(self, cell):
        if cell.cell_type == 'markdown': return markdown(cell.source)
        if cell.cell_type != 'code' or cell.directives_.get('include') == 'false': return None
        if self.module and cell.source.startswith('show_doc('): return self._api(cell.source)
        return code(cell)

    def _api(self, call):
        doc = eval(call, vars(self.module) | {'show_doc': show_doc})
        if doc is None: return None  # nbdev has nothing to show for a dispatched function
        label = f'{self.module.__name__}.{doc.nm}'.lower()
        self.labels.add(label)
        return markdown(f'({label})=\n{classed(doc._repr_markdown_())}')

    def save(self, folder:Path):
        "Write the page as a notebook for Sphinx"
        cells = [cell | {'id': f'c{i}'} for i, cell in enumerate(self.cells)]
        metadata = dict(language_info=dict(name='python', pygments_lexer='ipython3'))
        path = folder/f'{self.name}.ipynb'
        path.parent.mkdir(parents=True, exist_ok=True)
        nb = dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)
        path.write_text(json.dumps(nb), encoding='utf-8')


def classed(md):
    "Signature and table of parameters with names that site.css knows"
    md = re.sub('^```python$', '```{code-block} python\n:class: signature', md, count=1, flags=re.M)
    return re.sub(r'^\| Parameter .*(?:\n\|.*)+', ':::{table}\n:class: parameters\n\n\\g<0>\n:::', md, flags=re.M)


def markdown(source): return dict(cell_type='markdown', metadata={}, source=source)


def code(cell):
    outputs = [out for o in cell.outputs if (out := terminal(o))]
    if not cell.source.strip() and not outputs: return None
    tags = [tag for (key, value), tag in TAGS.items() if cell.directives_.get(key) == value]
    source = cell.source.strip('\n')
    return dict(cell_type='code', metadata=dict(tags=tags), execution_count=None, outputs=outputs, source=source)


def terminal(output):
    "What stays of printed text on a terminal, where a progress bar overwrites itself"
    if output.output_type != 'stream': return output
    text = re.sub(r'.*\r(?!\n)', '', ''.join(output.text))
    return output | {'text': text} if text.strip() else None


# --- links ----------------------------------------------------------------------------------------------------------
class Linker:
    "Turns symbols in backticks, and links between notebooks, into links that Sphinx resolves"
    def __init__(self, labels:set):
        self.labels = labels
        self.ours = re.compile(rf'\[(`[^`]+`)\]\([^)\s]*?/((?:{"|".join(packages())})/[\w/]+)\.html#([\w.]+)\)')

    def page(self, page:Page):
        folder = page.notebook.parts[0]
        # `predict` on a page of one package is not that of the other
        self.known = [folder] if folder in packages() else packages()
        lookup = NbdevLookup(strip_libs=' '.join(sorted(packages(), key=lambda p: p != folder)))
        for cell in page.cells:
            if cell['cell_type'] == 'markdown': cell['source'] = self.text(cell['source'], lookup)
            for out in cell.get('outputs', []):
                if 'text/markdown' in (data := out.get('data', {})):
                    data['text/markdown'] = self.text(''.join(data['text/markdown']), lookup)

    def text(self, md, lookup):
        md = self.ours.sub(self._symbol, lookup.linkify(md) or '')
        return re.sub(r'\]\(([\w./-]+)\.ipynb(#[^)]*)?\)', self._notebook, md)

    def _symbol(self, match):
        "To the symbol, else to the class it belongs to, else no link"
        text, page, anchor = match.groups()
        label = f'{page}.{anchor}'.replace('/', '.').lower()
        while label and label not in self.labels: label = label.rpartition('.')[0]
        if page.partition('/')[0] not in self.known: return text
        return f'[{text}](#{label})' if label else text

    def _notebook(self, match):
        return f']({nbpath2html(match[1]).with_suffix(".ipynb").as_posix()}{match[2] or ""})'


# --- the site -------------------------------------------------------------------------------------------------------
def floor(page:Page, plan:dict) -> int:
    "The floor of the room that `page` stands in; pages without one come last"
    package, *folders = page.notebook.parts[:-1] or ['']
    rooms = plan.get(package, [])
    return rooms.index(folders[0]) if folders and folders[0] in rooms else len(rooms)


def navigation(pages:list) -> dict:
    "Tables of contents for the home page: tutorials, the packages floor by floor, then the rest"
    rooms = plan()
    folders = {name: [] for name in ('tutorials', *rooms)}
    for page in sorted(pages, key=lambda o: floor(o, rooms)):
        folder = page.notebook.parts[0] if len(page.notebook.parts) > 1 else 'more'
        if page.name != 'index': folders.setdefault(folder, []).append(page.name)
    tables = [toctree('', ['Home <self>'])]
    for folder, names in folders.items():
        caption = folder if folder in rooms else folder.capitalize()
        if names: tables.append(toctree(f':caption: {caption}', names))
    return markdown('\n'.join(tables))


def toctree(option, entries): return '\n'.join(['```{toctree}', ':hidden:', option, '', *entries, '```'])


def build(dest:Path, nbs:Path=None, strict:bool=False):
    "Write the site to `dest`; `strict` stops at Sphinx's warnings"
    nbs = nbs or get_config().nbs_path
    pages = [Page(path, nbs) for path in nbglob(nbs, as_path=True).sorted()]
    linker = Linker(set().union(*(p.labels for p in pages)))
    for page in pages: linker.page(page)
    next(p for p in pages if p.name == 'index').cells.append(navigation(pages))
    with tempfile.TemporaryDirectory() as work:
        source, html = Path(work)/'source', Path(work)/'html'
        shutil.copytree(nbs, source, ignore=shutil.ignore_patterns('*.ipynb', '.*', '_*'))  # pictures
        for page in pages: page.save(source)
        options = ['-q', '-c', TOOLS, '-d', Path(work)/'doctrees'] + ['-W', '--keep-going']*strict
        if failed := sphinx([str(o) for o in [*options, source, html]]): sys.exit(failed)
        tidy(html)
        shutil.rmtree(dest, ignore_errors=True)
        shutil.move(html, dest)


def tidy(html:Path):
    "Remove what no page loads"
    for name in ('.buildinfo', 'objects.inv'): (html/name).unlink(missing_ok=True)
    used = ''.join(p.read_text(encoding='utf-8') for p in html.rglob('*') if p.suffix in ('.html', '.css', '.js'))
    for path in (html/'_static').rglob('*'):
        unused = path.is_file() and path.name not in used and 'LICENSE' not in path.name
        if path.suffix == '.map' or unused: path.unlink()
    (html/'.nojekyll').touch()  # GitHub Pages would leave out folders with an underscore


# --- docs/ against the notebooks ------------------------------------------------------------------------------------
def content(path:Path) -> str:
    "What a page shows (text, and where links and pictures lead) without its markup"
    soup = BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
    targets = [(e.get('href') or e.get('src', '')).partition('?')[0] for e in soup.body(['a', 'img'])]
    return '\n'.join([*soup.body.stripped_strings, *targets])


def files(site:Path) -> set: return {p.relative_to(site).as_posix() for p in site.rglob('*') if p.is_file()}


def differences(fresh:Path, kept:Path) -> list:
    "How the site `kept` differs from the `fresh` one, a line each; bytes count only for our own static files"
    made, found = files(fresh), files(kept)
    own = {f'_static/{name}' for name in files(TOOLS/'static')}
    lines = [f'missing: {f}' for f in made - found] + [f'not made from a notebook: {f}' for f in found - made]
    for f in made & found:
        if (fresh/f).read_bytes() == (kept/f).read_bytes(): continue
        if f in own or f.endswith('.html') and content(fresh/f) != content(kept/f): lines.append(f'differs: {f}')
    return sorted(lines)


def check(kept:Path, nbs:Path=None) -> list:
    with tempfile.TemporaryDirectory() as work:
        build(Path(work)/'docs', nbs, strict=True)
        return differences(Path(work)/'docs', kept)


def main():
    parser = argparse.ArgumentParser(description='Build docs/ from the notebooks')
    parser.add_argument('-W', '--strict', action='store_true', help="fail at Sphinx's warnings")
    parser.add_argument('--check', action='store_true', help='build elsewhere, strictly, and list where docs/ differs')
    args, docs = parser.parse_args(), get_config().doc_path
    if not args.check: return build(docs, strict=args.strict)
    if lines := check(docs):
        sys.exit('\n'.join([*lines, 'docs/ does not hold what the notebooks say: run `make docs` and commit docs/']))
    print('docs/ holds what the notebooks say')


if __name__ == '__main__': main()
