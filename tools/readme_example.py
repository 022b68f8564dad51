"""Run the first example of a README as a newcomer would: python tools/readme_example.py README.md

The first ```python block runs as a script, with the Python that runs this file, in an empty folder, and without the
checkout on the path: what is installed there is what is tested. It must end well and print what the ```text block below
it shows."""
import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from outputs import on_terminal

# Losses and error rates depend on the processor's arithmetic and times on its speed, so of a number with a decimal
# point, and of a time, only the place is compared. Words, column names, whole numbers and the order of the lines must
# be those of the README.
measured = re.compile(r'\d+:\d\d(?::\d\d)?|\d+\.\d+(?:e[+-]?\d+)?')


def block(readme:str, language:str) -> str:
    "The first fenced block of `language` in `readme`"
    if m := re.search(rf'^```{language}\n(.*?)^```$', readme, re.M | re.S): return m[1]
    sys.exit(f'expected a ```{language} block in the README, found none')


def comparable(text:str) -> list:
    "Lines of `text` as they are compared: without spacing, and with # for what is measured"
    return [' '.join(measured.sub('#', line).split()) for line in text.splitlines() if line.strip()]


def run(code:str) -> str:
    "What `code` prints, run in an empty folder that is removed afterwards"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder)/'example.py'
        script.write_text(code, encoding='utf-8')
        done = subprocess.run([sys.executable, '-I', script], cwd=folder, stdout=subprocess.PIPE)  # -I: no PYTHONPATH
    printed = on_terminal(done.stdout.decode())
    print(printed)
    if done.returncode: sys.exit(f'the example of the README ended with exit code {done.returncode}')
    return printed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('readme', type=Path)
    readme = parser.parse_args().readme.read_text(encoding='utf-8')
    code, shown = block(readme, 'python'), comparable(block(readme, 'text'))
    difference = list(difflib.unified_diff(shown, comparable(run(code)), 'README', 'printed', lineterm=''))
    if difference: sys.exit('\n'.join(['the example prints something else than the README shows:', *difference]))
    print('the example of the README runs, and prints what the README shows')


if __name__ == '__main__': main()
