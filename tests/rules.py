"Rules of the layout as functions of source text that return the faults in it, so that bad examples can be tried"
import ast
import json
import re


# --- imports --------------------------------------------------------------------------------------------------------
def imports(source, module):
    """What `module` imports anywhere, in functions too, as `(line, what, name, here)` with relative imports resolved

    `from what import name` as `here`; `name` is None for `import what`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for o in node.names: yield node.lineno, o.name, None, o.asname or o.name
        if isinstance(node, ast.ImportFrom):
            base = module.split('.')[:-node.level] if node.level else []
            what = '.'.join([*base, node.module] if node.module else base)
            for o in node.names: yield node.lineno, what, o.name, o.asname or o.name


def imported_module(what, name, house):
    "The module of `house` that `from what import name` or `import what` is about, None for none"
    return next((o for o in (f'{what}.{name}', what) if o in house), None)


def climbing(source, module, house):
    """Imports of `module` that do not go down, where `house` gives the place of each: `(package, floor, notebook)`

    Down is to a lower floor, or to an earlier notebook of the room; into another package to `paddy_multi.core` alone.
    As places are in order and every import leads to a lower one, imports that pass hold no circle."""
    package, *place = house[module]
    room = module.rpartition('.')[0]

    def goes_down(what, name):
        target = imported_module(what, name, house)
        if target is None: return what == room or (what == package and name == '__version__')
        if house[target][0] == package: return list(house[target][1:]) < place
        return target.startswith('paddy_multi.core.')

    packages = {pack for pack, *_ in house.values()}
    return [f'{module}:{line} imports {imported_module(what, name, house) or what}'
            for line, what, name, _ in imports(source, module)
            if what.partition('.')[0] in packages and not goes_down(what, name)]


def private(name): return name.startswith('_') and not re.fullmatch('__.*__', name)


def prying(source, module, house):
    "Names with a leading underscore that `module` imports from others of `house`, or reads as their attributes"
    packages = {pack for pack, *_ in house.values()}
    faults, modules = [], set()
    for line, what, name, here in imports(source, module):
        if what.partition('.')[0] not in packages: continue
        if name and private(name): faults.append(f'{module}:{line} imports {what}.{name}')
        if imported_module(what, name, house) == (f'{what}.{name}' if name else what): modules.add(here)
    attributes = [o for o in ast.walk(ast.parse(source)) if isinstance(o, ast.Attribute) and private(o.attr)]
    used = [o for o in attributes if ast.unparse(o.value) in modules]
    return faults + [f'{module}:{o.lineno} uses {ast.unparse(o)}' for o in used]


# --- lines ----------------------------------------------------------------------------------------------------------
def wide(source, limit):
    "Lines above `limit` characters; not that of `__all__`, which nbdev wraps"
    return [f'line {i}: {len(line)} characters' for i, line in enumerate(source.splitlines(), 1)
            if len(line) > limit and not line.startswith('__all__ = ')]


# --- cells ----------------------------------------------------------------------------------------------------------
def code_cells(path):
    "Sources of the code cells of a notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def directives(source): return [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]


def exports(source): return any(o.startswith('export') for o in directives(source))


def is_read(source):
    "Do readers of the page see the code of this cell?"
    return not exports(source) and not {'hide', 'echo: false', 'include: false'} & set(directives(source))


def lines_of_code(source): return len([o for o in source.splitlines() if o.strip() and not o.startswith('#|')])


def public_definitions(source):
    "Functions and classes that a cell defines for others, patched methods included"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [o.name for o in ast.parse(source).body if isinstance(o, kinds) and not o.name.startswith('_')]


def shows(source):
    "Does a cell assert something, call something for its effect, or end in a value that is shown?"
    if exports(source) or 'nbdev_export' in source: return False
    try: tree = ast.parse(source)
    except SyntaxError: return True  # a command of the shell
    return any(isinstance(o, (ast.Assert, ast.Expr)) for o in ast.walk(tree))


def checks_after(cells):
    """For each exporting cell with a public definition: its first name, and how many cells later one checks or shows

    None if there is no such cell before the next exporting one but one."""
    found = []
    for i, cell in enumerate(cells):
        if not exports(cell) or not public_definitions(cell): continue
        passed, distance = 0, None
        for n, later in enumerate(cells[i+1:], 1):
            passed += exports(later)
            if passed == 2: break
            if shows(later):
                distance = n
                break
        found.append((public_definitions(cell)[0], distance))
    return found


def compares_lengths(cells):
    """Is the `test_close` of a notebook that of `paddy_multi.core.checks`, if it calls one?

    That of fastcore, which comes with star imports of fastai, compares as many items as the shorter side has."""
    lines = '\n'.join(cells).splitlines()
    if not any(re.search(r'\btest_close\(', o) and not o.startswith('def ') for o in lines): return True
    stars = [i for i, o in enumerate(lines) if re.match(r'from (fastai|fastcore)[\w.]* import \*', o)]
    ours = [i for i, o in enumerate(lines) if re.match(r'from paddy_multi\.core\.checks import .*\btest_close\b', o)]
    return bool(ours) and max(ours) > max(stars, default=-1)


def silences(cells):
    """Lines that hide every warning for good, also in the notebooks that are tested next in this process

    A filter with a message or a category of Python's own, or one inside `warnings.catch_warnings`, is fine."""
    return [o for cell in cells for o in cell.splitlines()
            if re.match(r'(?=\S).*warnings\.(simplefilter|filterwarnings)\(.ignore.(, category=UserWarning)?\)', o)]
