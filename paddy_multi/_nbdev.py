"Hand-written nbdev hooks, named in pyproject.toml: one distribution, one package per folder of `nbs`."
import re
from configparser import ConfigParser
from enum import Enum, EnumType
from inspect import Parameter, Signature, formatannotation
from os.path import relpath
from pathlib import Path
from textwrap import fill

from fastcore.docments import ann_parts, docments
from nbdev.config import add_init, get_config, set_version
from nbdev.doclinks import NbdevLookup, _build_modidx
from nbdev.export import nb_export
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

_empty = (Parameter.empty, None)


def settings(cfg):
    "The metadata in settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(cfg.config_path/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def package_of(nb:Path, nbs:Path, packages:list) -> str:
    "The package that the exporting notebook `nb` writes to: the folder of `nbs` it stands in"
    for package in packages:
        if nb.is_relative_to(nbs/package): return package
    folders = ' or '.join(f'nbs/{p}' for p in packages)
    raise ValueError(f'{relpath(nb, nbs.parent)} has export cells but stands in no package: move it to {folders}')


class Route(Processor):
    "Export `nbs/<package>/*.ipynb` to `<package>/`, since nbdev's `lib_path` knows one package only"
    def begin(self):
        directives = {d for c in self.nb.cells for d in c.directives_}
        self.exports = any(d.startswith('export') or d == 'default_exp' for d in directives)
        if not self.exports: return
        cfg, nb = get_config(), Path(self.nb.path_).resolve()
        ini = settings(cfg)
        self.dest = cfg.config_path/package_of(nb, cfg.nbs_path.resolve(), ini['packages'].split())
        nb_export(nb, lib_path=self.dest)
        set_version(self.dest, ini['version'])

    def cell(self, cell):
        if self.exports and cell.cell_type == 'code': cell.cell_type = 'raw'  # leaves nothing for nbdev's own exporter

    def end(self):
        if not self.exports: return
        add_init(self.dest)
        _build_modidx(self.dest)


class DocTable(BasicMarkdownRenderer):
    "`show_doc` as a signature, the docstring, and a table of parameters made from docments"
    def _repr_markdown_(self):
        table = self._table()
        parts = [f'{"#"*self.title_level} {_code(self.nm)}']
        if (source := NbdevLookup().code(self.fn)) and get_config().git_url: parts.append(f'[source]({source})')
        if self.sig is not None: parts.append(f'```python\n{self._signature(types=not table)}\n```')
        return '\n\n'.join(parts + [part for part in (self.docs, table) if part])

    def _signature(self, types):
        "One line or more, with `types` unless they stand in the table; the members of an Enum"
        if isinstance(self.sym, EnumType): return '\n'.join(f'{self.nm}.{o.name}' for o in self.sym)
        def shown(anno): return _Shown(_type(anno)) if types and _type(anno) else Parameter.empty
        params = [p.replace(default=p.default if p.default is p.empty else _Shown(_value(p.default)), annotation=shown(p.annotation))
                  for n, p in self.sig.parameters.items() if n != 'self']
        line = f'{self.nm}{Signature(params, return_annotation=shown(self.sig.return_annotation))}'
        return fill(line, 90, subsequent_indent=' '*4, break_long_words=False, break_on_hyphens=False)

    def _table(self):
        "A row per parameter if one is documented, without columns that stay empty"
        docs = {n: d for n, d in docments(self.sym, full=True, args_kwargs=True).items() if n not in ('self', 'cls')}
        for d in docs.values(): d.anno, d.docment = _unannotated(d.anno, d.docment)
        if not any(d.docment for d in docs.values()): return ''
        if not docs['return'].docment and docs['return'].anno in _empty: del docs['return']
        columns = list(zip(['Parameter', 'Type', 'Default', 'Details'], *(_row(n, d) for n, d in docs.items())))
        rows = list(zip(*(c for c in columns if any(c[1:]))))
        return '\n'.join(f'| {" | ".join(r)} |' for r in [rows[0], ['---']*len(rows[0]), *rows[1:]])


class _Shown(str):
    "Text that stands in a signature as it is"
    __repr__ = str.__str__


def _row(name, doc):
    stars = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}.get(doc.get('kind'), '')
    return ('**Returns**' if name == 'return' else _code(stars + name),
            _code(_type(doc.anno), space=''),
            '' if doc.default is Parameter.empty else _code(_value(doc.default)),
            _cell(doc.docment or ''))


def _unannotated(anno, doc):
    "The type in an `Annotated`, and the help that a typer option in it gives"
    anno, extras = ann_parts(anno)
    return anno, doc or next((o.help for o in extras if getattr(o, 'help', None)), None)


def _value(default):
    "A default as a reader would write it: functions and classes by name, no memory addresses"
    if isinstance(default, Enum): return str(default)
    return getattr(default, '__name__', None) or re.sub(r' at 0x[0-9a-f]+', '', repr(default))


def _type(anno):
    "`anno` without module names; nothing for the type of a None that stands as a default"
    anno, _ = ann_parts(anno)
    if anno in (*_empty, type(None)): return ''
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', formatannotation(anno)).strip("'")


def _code(text, space=' '):
    "`text` as code; between spaces, which Markdown drops, nbdev does not take it for a symbol to link"
    return f'`{space}{_cell(text)}{space}`' if text else ''


def _cell(text): return text.replace('\n', ' ').replace('|', r'\|')
