#!/usr/bin/env python3
"""Prepare one notebook for the book: Quarto pipes its JSON in and takes what this prints (`ipynb-filters`).

nbdev's own processors, with four changes that a book needs:

- exported cells stay visible (nbdev replaces `#| export` cells by their documentation; here the code is the text, and
  the documentation of its names, in their order, stands before it);
- nothing but `show_doc` runs, with the names of the exported module (nbdev runs exported cells, which then cannot
  name later ones in their annotations, and every cell that has an import in it, training included);
- names in backticks link to this package only, not to whichever nbdev libraries are installed;
- those links are relative, to the notebook that defines the name, so they work offline and in previews.

Runs in the notebook's folder.
"""
import importlib
import os
import re
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from execnb.nbio import dict2nb, nb2str
from fastcore.xtras import loads
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_links, exec_show_docs, mv_exports


def show_exports(nb):
    "`#| export` means `#| exports` on the page: documentation of the names, then the code"
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'^#\|\s*export(?=\s|$)', '#| exports', c.source, flags=re.M)


def relink(md, base, pages):
    "Turn `{base}/backbone.html#x` into `01_backbone.ipynb#x`, which Quarto resolves to that notebook's page"
    def to_nb(m): return pages[m[1]] + (m[2] or '') if m[1] in pages else m[0]
    # a method has no heading of its own: `#class.method` leads to the class
    return re.sub(re.escape(base) + r'/?([\w.-]+\.html)(#\w+)?(?:\.\w+)*', to_nb, md)


def own_links(cell):
    "Link names of this package in prose and in documentation"
    cfg = get_config()
    look = NbdevLookup(incl_libs=cfg.lib_name)
    base = cfg.doc_host.rstrip('/') + cfg.doc_baseurl.rstrip('/')
    # nbdev names a page after its notebook, less the number in front
    pages = {re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem)+'.html': p.name for p in nbglob(as_path=True)}
    if cell.cell_type == 'markdown' and cell.source:
        cell.source = relink(look.linkify(cell.source), base, pages)
    for o in cell.get('outputs') or []:
        md = (o.get('data') or {}).get('text/markdown')
        if md: o['data']['text/markdown'] = [relink(look.link_line(s), base, pages) for s in ([md] if isinstance(md, str) else md)]


class ExecDocs(exec_show_docs):
    "Run `show_doc`, with the names of the module that the notebook exports"
    def begin(self):
        super().begin()
        mod = next((c.directives_['default_exp'][0] for c in self.nb.cells if 'default_exp' in getattr(c, 'directives_', {})), None)
        if mod is None: return
        names = vars(importlib.import_module(f'{get_config().lib_name}.{mod}'))
        self.k.user_ns.update({k: v for k, v in names.items() if not k.startswith('__')})

    def __call__(self, cell):
        if cell.cell_type == 'code' and 'show_doc(' in (cell.source or ''): super().__call__(cell)


class DocsFirst(Processor):
    "The documentation of all names of a cell, then its code (nbdev moves only one of them)"
    def begin(self):
        cells, out = list(self.nb.cells), []
        while cells:
            code, docs = cells.pop(0), []
            if code.cell_type == 'code' and 'exports' in code.directives_:
                while cells and getattr(cells[0], 'has_sd', False): docs.insert(0, cells.pop(0))
            out += docs + [code]
        self.nb.cells[:] = out


class BookFilter(FilterDefaults):
    def base_procs(self):
        ours = {add_links: own_links, exec_show_docs: ExecDocs, mv_exports: DocsFirst}
        return [ours.get(p, p) for p in super().base_procs()]


def filter_nb(txt, path):
    nb = dict2nb(loads(txt))
    nb.path_ = path
    show_exports(nb)
    BookFilter()(nb)
    return nb2str(nb)


if __name__ == '__main__':
    os.environ['IN_TEST'] = '1'  # a cell that calls nbdev_export() does nothing
    warnings.simplefilter('ignore')
    sys.path.insert(0, str(get_config().config_path))  # this checkout's package, whatever is installed
    txt = sys.stdin.read()
    # Quarto does not say which notebook it sends
    path = next((p for p in sorted(Path.cwd().glob('*.ipynb')) if p.read_text(encoding='utf-8') == txt), None)
    if path is None: sys.exit(f'nbfilter: no notebook in {Path.cwd()} has the text on stdin')
    with open(os.devnull, 'w') as null, redirect_stdout(null): res = filter_nb(txt, path)
    print(res)
