"The committed site against its notebooks, and in a real Chromium, over http and from files. Run: make test-docs"
import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urldefrag

import pytest
import typer
from bs4 import BeautifulSoup

from paddy_multi._nbdev import DocTable

IGNORED = 'ignore:.*:PendingDeprecationWarning', 'ignore:.*torch.jit:FutureWarning'
pytestmark = [pytest.mark.docs, pytest.mark.filterwarnings(*IGNORED)]
ROOT = Path(__file__).parents[1]
DOCS = ROOT/'docs'
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob('*.html'))
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
PHONE, DESKTOP = dict(width=390, height=844), dict(width=1280, height=900)


# --- the site and the notebooks -------------------------------------------------------------------------------------
@pytest.fixture(scope='session')
def docs():
    spec = importlib.util.spec_from_file_location('docs_tool', ROOT/'tools/docs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_hold_what_the_notebooks_say(docs):
    assert docs.check(DOCS) == []


def test_changed_notebooks_are_noticed(docs, tmp_path):
    nbs = shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    data = nbs/'paddy_multi/data/00_digits.ipynb'
    text = data.read_text(encoding='utf-8')
    phrase = 'real handwritten digits (8 by 8 pixels'
    assert text.count(phrase) == 1
    data.write_text(text.replace(phrase, phrase.replace('digits', 'letters')), encoding='utf-8')
    (nbs/'paddy_multi/data/99_more.ipynb').write_text(notebook(dict(cell_type='markdown', source='# One more page')))
    found = docs.check(DOCS, nbs)
    assert 'differs: paddy_multi/data/digits.html' in found and 'missing: paddy_multi/data/more.html' in found


@pytest.mark.parametrize('change, found', [
    (lambda site: (site/'index.html').unlink(), 'missing: index.html'),
    (lambda site: (site/'_images/old.png').touch(), 'not made from a notebook: _images/old.png'),
    (lambda site: (site/'_static/site.css').write_text('body {}'), 'differs: _static/site.css'),
    (lambda site: edit(site/'index.html', '</article>', 'a word</article>'), 'differs: index.html'),
    (lambda site: edit(site/'paddy_multi/data/digits.html', '#paddy-multi-data-digits-sample-digits', '#elsewhere'),
     'differs: paddy_multi/data/digits.html')])
def test_every_kind_of_difference_is_listed(docs, tmp_path, change, found):
    site = shutil.copytree(DOCS, tmp_path/'docs')
    assert docs.differences(DOCS, site) == []
    change(site)
    assert docs.differences(DOCS, site) == [found]


def test_markup_alone_is_no_difference(docs, tmp_path):
    site = shutil.copytree(DOCS, tmp_path/'docs')
    edit(site/'index.html', '<article', '<article data-other="1"')
    assert docs.differences(DOCS, site) == []


def edit(path, old, new):
    text = path.read_text(encoding='utf-8')
    assert old in text
    path.write_text(text.replace(old, new), encoding='utf-8')


def test_symbols_link_to_their_own_api():
    "`name` leads to the section of `name`, or of the class that a method belongs to"
    seen = set()
    for page in PAGES:
        soup = BeautifulSoup((DOCS/page).read_text(encoding='utf-8'), 'html.parser')
        for code in soup.select('article a.reference.internal code'):
            anchor = urldefrag(code.find_parent('a')['href'])[1]
            names = code.text.removesuffix('()').lower().split('.')
            slugs = ['-'.join(names[:n]).replace('_', '-').strip('-') for n in (len(names), 1)]
            if not re.match('(paddy-multi|collab-deep)-', anchor): continue
            assert any(anchor.endswith(f'-{slug}') for slug in slugs), f'{page}: `{code.text}` leads to {anchor}'
            folder = page.partition('/')[0].replace('_', '-')
            at_home = folder not in ('paddy-multi', 'collab-deep') or anchor.startswith(folder)
            assert at_home, f'{page}: `{code.text}` leads to the other package'
            seen.add(anchor)
    assert {'paddy-multi-targets-slices-combined-loss', 'collab-deep-models-embedding-embedding'} <= seen, seen


def notebook(*cells):
    cells = [dict(id=f'c{i}', metadata={}, **cell) for i, cell in enumerate(cells)]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def test_the_sidebar_goes_up_floor_by_floor(docs):
    "Tutorials, then each package in the order of its rooms, and the notebooks of a room by number"
    soup = BeautifulSoup((DOCS/'index.html').read_text(encoding='utf-8'), 'html.parser')
    sidebar = soup.select_one('.sidebar-tree')
    assert [o.text for o in sidebar.select('.caption')] == ['Tutorials', *docs.packages(), 'More']
    links = [o['href'].removesuffix('.html') for o in sidebar.select('a.reference.internal')]
    for package, rooms in docs.plan().items():
        found = [link for link in links if link.startswith(f'{package}/')]
        paths = [path for room in rooms for path in sorted((ROOT/'nbs'/package/room).glob('*.ipynb'))]
        assert found == [f'{package}/{path.parent.name}/{path.stem[3:]}' for path in paths]


def test_what_a_page_shows(docs, tmp_path):
    nbs = shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    def md(source): return dict(cell_type='markdown', source=source)
    def code(source, out):
        outputs = [dict(output_type='stream', name='stdout', text=out)]
        return dict(cell_type='code', execution_count=1, source=source, outputs=outputs)
    path = nbs/'tutorials/01_trial.ipynb'
    path.parent.mkdir(exist_ok=True)
    path.write_text(notebook(
        md('# A trial'),
        md('See [the folder](../paddy_multi/data/00_digits.ipynb#the-folder), `combined_loss`, '
           '`CombinedLoss.n_none`, `CombinedLoss.forward` and `nothing`.'),
        code('print("seen")', '10%\r50%\rfinished\n'), code('print("no more")', '10%\r100%\r'),
        code('#| echo: false\nprint("only out")', 'alone'), code('#| output: false\nprint("only code")', 'unseen'),
        code('#| hide\nprint("secret")', 'unseen'), code('#| code-fold: true\nprint("folded")', 'from the fold')))
    docs.build(tmp_path/'docs', nbs, strict=True)
    page = BeautifulSoup((tmp_path/'docs/tutorials/trial.html').read_text(encoding='utf-8'), 'html.parser').article
    links = {a.text: a['href'] for a in page.select('a.reference.internal')}
    slices = '../paddy_multi/targets/slices.html#paddy-multi-targets-slices-'
    assert links == {'the folder': '../paddy_multi/data/digits.html#the-folder',
                     'combined_loss': f'{slices}combined-loss', 'CombinedLoss.forward': f'{slices}combinedloss'}
    assert [o.text.strip() for o in page.select('.cell_output')] == ['finished', 'alone', 'from the fold']
    seen = [f'print("{o}")' for o in ('seen', 'no more', 'only code', 'folded')]
    assert [o.text.strip() for o in page.select('.cell_input')] == seen
    assert 'print("folded")' in page.select_one('details').text


class Kind(Enum): a = 1


def test_api_table():
    def f(
        x:str|Path, # one | two
        f:Callable[[int], float]=len, # a function
        y=None, # of no type
        *args:int, # many
        kind:Kind=Kind.a, o=object(),
        **kwargs, # more
    )->dict: # by name
        "What it does"
    def command(out:Annotated[Path, typer.Option(help='File to write')]): pass
    def plain(x, y:Path=None)->int: "No table"

    assert DocTable(f, name='f')._repr_markdown_() == """### ` f `

```python
f(x, f=len, y=None, *args, kind=Kind.a, o=<object object>, **kwargs)
```

What it does

| Parameter | Type | Default | Details |
| --- | --- | --- | --- |
| ` x ` | `str \\| Path` |  | one \\| two |
| ` f ` | `Callable[[int], float]` | ` len ` | a function |
| ` y ` |  | ` None ` | of no type |
| ` *args ` | `int` |  | many |
| ` kind ` | `Kind` | ` Kind.a ` |  |
| ` o ` | `object` | ` <object object> ` |  |
| ` **kwargs ` |  |  | more |
| **Returns** | `dict` |  | by name |"""
    assert DocTable(command)._repr_markdown_().endswith('| ` out ` | `Path` | File to write |')
    assert 'plain(x, y: Path = None) -> int\n' in DocTable(plain, name='plain')._repr_markdown_()
    assert '```python\nKind.a\n```' in DocTable(Kind, name='Kind')._repr_markdown_()


# --- in the browser -------------------------------------------------------------------------------------------------
@pytest.fixture(scope='session')
def browser():
    from playwright.sync_api import sync_playwright
    assert CHROMIUM, 'no Chromium found: run tools/chromium.sh'
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)  # headless, in a new empty user folder
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def serve():
    "Give the address of a folder over http or as files"
    servers = []
    def address(folder, scheme):
        if scheme == 'file': return folder.as_uri()
        server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
        servers.append(server)
        return f'http://127.0.0.1:{server.server_port}'
    yield address
    for server in servers:
        server.shutdown()
        server.server_close()


def watched(browser, base, faults, **options):
    "A new tab that notes errors, failed requests and requests to others in `faults`"
    tab = browser.new_page(viewport=DESKTOP, color_scheme='light', **options)
    def on_request(r):
        if not r.url.startswith((f'{base}/', 'data:')): faults.append(f'asks {r.url}')
    tab.on('console', lambda m: m.type == 'error' and faults.append(f'console: {m.text}'))
    tab.on('pageerror', lambda e: faults.append(f'script: {e}'))
    tab.on('request', on_request)
    # Aborted is what the browser itself gives up when a page is left before all of it is there, as after a search
    tab.on('requestfailed', lambda r: r.failure != 'net::ERR_ABORTED' and faults.append(f'failed: {r.url} {r.failure}'))
    tab.on('response', lambda r: r.status >= 400 and faults.append(f'{r.status}: {r.url}'))
    return tab


@dataclass
class Visit:
    "What one page did and holds"
    faults: list
    links: list
    ids: set


IDS = '[...document.querySelectorAll("[id]")].map(e => e.id)'
LINKS = '[...document.links].map(a => a.href)'
BROKEN_IMAGES = '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)'
PLAIN_MATHS = '''[...document.querySelectorAll(".math")]
    .filter(e => !e.querySelector(".katex") || e.querySelector(".katex-error")).map(e => e.textContent)'''
BACKGROUND = '''getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g)
    .slice(0, 3).reduce((a, b) => a + +b, 0)/3'''
# Furo hides what is too wide for the page in boxes that scroll as a whole: ask each of them
WIDTH = 'Math.max(...[...document.querySelectorAll("html, body, .page, .main, .content")].map(e => e.scrollWidth))'


def visit(browser, base, name):
    faults = []
    tab = watched(browser, base, faults)
    tab.goto(f'{base}/{name}')
    tab.evaluate('document.fonts.ready.then(() => 0)')
    faults += [f'image: {src}' for src in tab.evaluate(BROKEN_IMAGES)]
    faults += [f'maths not rendered: {tex}' for tex in tab.evaluate(PLAIN_MATHS)]
    for size in (DESKTOP, PHONE):
        tab.set_viewport_size(size)
        width = tab.evaluate(WIDTH)
        if width > size['width']: faults.append(f'{width} px wide on a screen of {size["width"]}')
    light = tab.evaluate(BACKGROUND)
    tab.emulate_media(color_scheme='dark')
    dark = tab.evaluate(BACKGROUND)
    if light <= 240 or dark >= 40: faults.append(f'dark mode: background {light:.0f}, then {dark:.0f}')
    result = Visit(faults, tab.evaluate(LINKS), set(tab.evaluate(IDS)))
    tab.close()
    return result


def faults_of(visits, base, folder):
    "All that is wrong with the visited pages, their links into the site included"
    lines = [f'{name}: {fault}' for name, v in visits.items() for fault in v.faults]
    for name, v in visits.items():
        for link in v.links:
            if not link.startswith(f'{base}/'): continue
            target, anchor = map(unquote, urldefrag(link.removeprefix(f'{base}/')))
            target = target.partition('?')[0]
            if not (folder/target).is_file(): lines.append(f'{name}: no page for {link}')
            elif anchor and target in visits and anchor not in visits[target].ids:
                lines.append(f'{name}: no anchor for {link}')
    return lines


@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_every_page(browser, serve, scheme):
    base = serve(DOCS, scheme)
    visits = {name: visit(browser, base, name) for name in PAGES}
    assert faults_of(visits, base, DOCS) == []
    assert {'index.html', 'search.html', 'paddy_multi/data/digits.html'} <= visits.keys()
    assert 'paddy_multi/targets/slices.html' in visits


@pytest.mark.parametrize('scheme', ['http', 'file'])
@pytest.mark.parametrize('html, fault', [
    ('<script>forgotten()</script>', 'forgotten is not defined'),
    ('<script>console.error("out of order")</script>', 'console: out of order'),
    ('<script src="gone.js"></script>', 'gone.js'),
    ('<img src="gone.png">', 'image: '),
    ('<a href="gone.html">read on</a>', 'no page for '),
    ('<a href="#nowhere">read on</a>', 'no anchor for '),
    ('<a href="paddy_multi/data/digits.html#nowhere">read on</a>', 'no anchor for '),
    ('<link rel="stylesheet" href="https://fonts.example/a.css">', 'asks https://fonts.example/a.css'),
    ('<div style="width: 500px">wide</div>', 'px wide on a screen of 390'),
    ('<span class="math">x^2</span>', 'maths not rendered: x^2'),
    ('<style>body { background: white !important }</style>', 'dark mode: ')])
def test_a_broken_page_is_noticed(browser, serve, tmp_path, scheme, html, fault):
    site = shutil.copytree(DOCS, tmp_path/'docs')
    edit(site/'index.html', '</article>', f'{html}</article>')
    base = serve(site, scheme)
    visits = {name: visit(browser, base, name) for name in ('index.html', 'paddy_multi/data/digits.html')}
    found = [line for line in faults_of(visits, base, site) if fault in line]
    assert found and all(line.startswith('index.html: ') for line in found)


FOUND = '''document.querySelector("#search-results p.search-summary")
    ?.textContent.match(/finished|did not match/)'''


@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_search(browser, serve, scheme):
    base, faults = serve(DOCS, scheme), []
    tab = watched(browser, base, faults)
    def results(words):
        tab.goto(f'{base}/index.html')
        tab.fill('.sidebar-search', words)
        tab.press('.sidebar-search', 'Enter')
        tab.wait_for_function(FOUND)
        return tab.evaluate('[...document.querySelectorAll("#search-results li a")].map(a => a.href.split("?")[0])')
    found = [url.partition('#')[0] for url in results('combined_loss')]
    assert f'{base}/paddy_multi/targets/slices.html' in found[:2]
    assert f'{base}/paddy_multi/data/digits.html' in [url.partition('#')[0] for url in results('handwritten ink')]
    assert results('zyzzyva') == []
    assert faults == []
    tab.close()


@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_the_button_turns_dark_mode_on_and_it_stays_on(browser, serve, scheme):
    base = serve(DOCS, scheme)
    tab = watched(browser, base, [])
    tab.goto(f'{base}/index.html')
    assert tab.evaluate(BACKGROUND) > 240
    button = tab.locator('.theme-toggle:visible').first
    for _ in range(3):
        if tab.evaluate(BACKGROUND) > 240: button.click()
    assert tab.evaluate(BACKGROUND) < 40
    tab.goto(f'{base}/paddy_multi/data/digits.html')
    assert tab.evaluate(BACKGROUND) < 40
    tab.close()


def test_maths_is_set_in_its_own_fonts(browser, serve):
    base = serve(DOCS, 'file')
    tab = watched(browser, base, [])
    tab.goto(f'{base}/paddy_multi/data/digits.html')
    assert tab.locator('.math .katex').count() > 3
    loaded = '''document.fonts.ready.then(
        f => [...f].filter(x => x.family == "KaTeX_Math" && x.status == "loaded").length)'''
    assert tab.evaluate(loaded) > 0
    tab.close()
