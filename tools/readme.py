"""Write README.md from the home page, nbs/index.ipynb: its example is the one that ran, and its output what came out.

python tools/readme.py [--check]: with --check nothing is written, and a README that differs ends in an error."""
import base64
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
images = root/'nbs'/'images'
notice = '<!-- Made by `make docs` from nbs/index.ipynb: edit that notebook. -->'
notebook_link = re.compile(r'\]\(((?:\w+/)*)(?:\d+\w*?_)?(\w+)\.ipynb\)')


def markdown(cell:dict) -> str:
    "A prose cell, with its links to notebooks as links to the rendered docs"
    return notebook_link.sub(r'](docs/\1\2.html)', ''.join(cell['source']))


def code(cell:dict, pictures:list) -> str:
    "A code cell and its outputs; pictures are added to `pictures`"
    lines = ''.join(cell['source']).split('\n')
    hidden = any(line.startswith('#| echo: false') for line in lines)
    source = '\n'.join(line for line in lines if not line.startswith('#|')).strip()
    parts = [] if hidden else [f'```python\n{source}\n```']
    return '\n\n'.join(parts + [out for o in cell['outputs'] if (out := output(o, pictures))])


def output(out:dict, pictures:list) -> str:
    data = out.get('data', {})
    if 'image/png' in data:
        pictures.append(base64.b64decode(''.join(data['image/png'])))
        return f'![The result of the example](nbs/images/readme_{len(pictures)}.png)'
    text = ''.join(out.get('text') or data.get('text/plain', []))
    return f'```text\n{text.strip()}\n```' if text.strip() else ''


def readme() -> tuple:
    "Text of the README, and its pictures"
    cells = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    shown, pictures = [c for c in cells if '#| hide' not in ''.join(c['source'])], []
    parts = [markdown(c) if c['cell_type'] == 'markdown' else code(c, pictures) for c in shown]
    return '\n\n'.join([notice] + [p for p in parts if p]) + '\n', pictures


def main(check:bool):
    text, pictures = readme()
    files = {root/'README.md': text.encode(), **{images/f'readme_{i}.png': png for i, png in enumerate(pictures, 1)}}
    if check:
        if stale := [str(p.relative_to(root)) for p, data in files.items() if not p.exists() or p.read_bytes() != data]:
            sys.exit(f'{stale} differ from nbs/index.ipynb: run make docs')
        return
    images.mkdir(exist_ok=True)
    for path, data in files.items(): path.write_bytes(data)


if __name__ == '__main__': main('--check' in sys.argv[1:])
