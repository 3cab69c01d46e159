"""Which names the chapters define, and where: for anchors, links and the list of names."""
import ast
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent


class Name(NamedTuple):
    notebook: str    # file name of the chapter that defines it
    module: str
    line: int        # in the module's file
    kind: str        # class, function or value
    doc: str         # first line of its documentation

    @property
    def source(self):
        "Address of the line that defines it"
        branch = get_config(path=ROOT).branch
        return f'{repository()}/blob/{branch}/clipprompt/{self.module}.py#L{self.line}'


def repository():
    "Address of the project's repository"
    return get_config(path=ROOT).git_url.rstrip('/')


def default_exp(txt):
    "The module that a notebook, given as the text of its file, exports to"
    found = re.search(r'#\| default_exp (\w+)', txt)
    return found and found[1]


@lru_cache
def modules(root=ROOT):
    "Module and notebook, in the order of the book"
    by_notebook = {
        p.name: default_exp(p.read_text(encoding='utf-8'))
        for p in sorted((root/'nbs').glob('[!_]*.ipynb'))
    }
    return {module: name for name, module in by_notebook.items() if module}


def assigned(node):
    "The names that a statement gives a value"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def defined(tree):
    "(name, statement, kind) of each public class, function and value at the top level of `tree`"
    for node in tree.body:
        if isinstance(node, ast.ClassDef): found = [(node.name, 'class')]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = [(node.name, 'function')]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found = [(n, 'value') for n in assigned(node)]
        else: continue
        for name, kind in found:
            if not name.startswith('_'): yield name, node, kind


def first_line(node, kind):
    "What the documentation of a class or function begins with"
    doc = ast.get_docstring(node) if kind != 'value' else ''
    return (doc or '').split('\n\n')[0].replace('\n', ' ')


@lru_cache
def names(root=ROOT):
    "{name: its definitions} for every public name of the package"
    out = {}
    for module, notebook in modules(root).items():
        tree = ast.parse((root/'clipprompt'/f'{module}.py').read_text(encoding='utf-8'))
        for name, node, kind in defined(tree):
            if name in {d.module for d in out.get(name, [])}: continue
            out.setdefault(name, []).append(
                Name(notebook, module, node.lineno, kind, first_line(node, kind)))
    return out
