"What `import paddy_multi.all` adds to `import fastai.vision.all`: each in fresh processes, ours timed after fastai's"
import subprocess
import sys

from harness import Case, Variant, main

CHILD = '{before}\nfrom time import process_time\nstart = process_time()\n{code}\nprint(process_time() - start)'

def fresh(code, before=''):
    "Processor seconds that `code` takes in a new Python, after `before`"
    child = CHILD.format(before=before, code=code)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', child], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])

def cases(quick):
    theirs, ours = 'from fastai.vision.all import *', 'from paddy_multi.all import *'
    if quick: theirs, ours = 'import json', 'import csv'
    def variant(*code): return Variant(lambda: fresh(*code), measure=lambda seconds: dict(processor_seconds=seconds))
    def make(): return {'fastai.vision.all': variant(theirs), 'paddy_multi.all after it': variant(ours, theirs)}
    return [Case('a new process', make, rounds=6)]

if __name__ == '__main__': main('imports', 'Imports', 'How long does importing take?', cases)
