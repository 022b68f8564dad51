"Hand-written nbdev hooks, named in pyproject.toml: one distribution, one package per folder of `nbs`."
from configparser import ConfigParser
from inspect import Parameter, Signature
from pathlib import Path

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
    pkg, *rest = nb.relative_to(nbs).parts
    if rest and pkg in packages: return pkg
    folders = ' or '.join(f'nbs/{p}' for p in packages)
    raise ValueError(f'{nb.relative_to(nbs.parent)} has export cells but stands in no package: move it to {folders}')


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
        docs = getattr(self.dm, 'dm', {})
        shown = {n: d for n, d in docs.items() if n not in ('self', 'cls')
                 and (n != 'return' or d.get('docment') or d.get('anno') not in _empty)}
        parts = ['---', f'{"#"*self.title_level} {self.nm}']
        if get_config().git_url: parts.append(f'[source]({NbdevLookup().code(self.fn)})')
        if self.sig is not None: parts.append(f'```python\n{self.nm}{_bare(self.sig)}\n```')
        if self.docs: parts.append(self.docs)
        if shown: parts.append('\n'.join(['| | Type | Default | Details |', '|---|---|---|---|'] + [_row(*o) for o in shown.items()]))
        return '\n\n'.join(parts)


def _bare(sig):
    "`sig` without types: those stand in the table"
    return Signature([p.replace(annotation=Parameter.empty) for n, p in sig.parameters.items() if n != 'self'])


def _row(name, doc):
    def code(o, show): return '' if o is Parameter.empty else '`' + show(o).replace('|', r'\|') + '`'
    label = '**Returns**' if name == 'return' else f'`{name}`'
    details = (doc.get('docment') or '').replace('\n', ' ')
    anno = doc.get('anno')
    return f"| {label} | {'' if anno is None else code(anno, _type)} | {code(doc.get('default', Parameter.empty), repr)} | {details} |"


def _type(anno):
    return anno.__name__ if isinstance(anno, type) and not hasattr(anno, '__args__') else str(anno).replace('typing.', '')
