"""Run notebooks and keep outputs fit to be read: python tools/outputs.py [notebook ...]

nbdev runs the cells and saves what they print. Progress bars are then reduced to what they leave on a terminal, and
warnings of installed packages, which name paths of this machine, are dropped. `--check` runs nothing: it lists cells
that hold an error output or a machine's path, and exits with 1 if there are any."""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
bin_dir = Path(sys.executable).parent
package_warning = re.compile(r'^\S*site-packages\S*:\d+: \w+: .*\n?(?:  .*\n?)?', re.M)  # and the line of code below it
machine_path = re.compile(r'(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|var|mnt|private)/[\w.-]+')


def on_terminal(text:str) -> str:
    "What `text` leaves on a terminal: a carriage return starts its line again"
    def last(line): return next((part for part in reversed(line.split('\r')) if part.strip()), '')
    lines = [last(line) if '\r' in line else line for line in text.split('\n')]
    return '\n'.join(line.rstrip() for line in lines if not re.fullmatch(r'█|Epoch \d+/\d+ :', line.strip()))


def tidy_output(output:dict) -> dict|None:
    "`output` as it should be kept, None for nothing"
    if output['output_type'] != 'stream': return output
    text = package_warning.sub('', on_terminal(''.join(output['text'])))
    last = text.rsplit('\n', 1)[-1]
    if '|' in last and '%' in last: text = text[:-len(last)]  # a bar that nothing came after
    return {**output, 'text': text.splitlines(True)} if text.strip() else None


def tidy(path:Path):
    "Tidy all outputs of the notebook at `path`"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if 'outputs' in cell: cell['outputs'] = [o for o in map(tidy_output, cell['outputs']) if o]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf-8')


def strings(value):
    "All text in a JSON value"
    if isinstance(value, str): return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [s for child in children for s in strings(child)]


def faults(path:Path) -> list:
    "What a cell of the notebook at `path` must not hold"
    def of(i, cell):
        for o in cell.get('outputs', []):
            if o['output_type'] == 'error': yield f'{path.name}, cell {i}: an error output, {o["ename"]}'
        for text in strings(cell):
            if m := machine_path.search(text): yield f"{path.name}, cell {i}: a machine's path, {m[0]}"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [fault for i, cell in enumerate(cells) for fault in of(i, cell)]


def notebooks(): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path, help='all under nbs/ where none is named')
    parser.add_argument('--check', action='store_true', help='only look at the outputs that are there')
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or notebooks()
    for path in paths if not args.check else []:
        subprocess.run([bin_dir/'nbdev-test', path, '--save', '--timing'], check=True)
        tidy(path)
        subprocess.run([bin_dir/'nbdev-clean', '--fname', path], check=True)
    if found := [fault for path in paths for fault in faults(path)]: sys.exit('\n'.join(found))


if __name__ == '__main__': main()
