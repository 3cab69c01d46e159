#!/usr/bin/env python3
"""Write the book's pages of reference: every name, every command, every change (site/*.qmd).

They come from the code and from CHANGELOG.md, so they can't lag behind: CI runs this and compares.
"""
import inspect
import re
from itertools import groupby
from typing import get_args, get_type_hints

import typer
from names import ROOT, names

MADE = '<!-- Made by tools/reference.py -->'


def escape(text):
    "Text as a cell of a table shows it"
    for c in '|*<[$@': text = text.replace(c, '\\' + c)
    return text


def first_sentence(text):
    return re.split(r'(?<=[^.]{3}[.;]) ', text)[0].rstrip('.;')


def chapter_title(notebook):
    "What a chapter is called, without what follows the colon"
    txt = (ROOT/'nbs'/notebook).read_text(encoding='utf-8')
    return re.search(r'"# ([^:"\\]+)', txt)[1].strip()


def row(name, made):
    "A name's line: what it is, where it is made"
    what = escape(first_sentence(made.doc)) or 'constant'
    chapter = f'[{chapter_title(made.notebook)}](../nbs/{made.notebook})'
    return f'| [`{name}`](../nbs/{made.notebook}#{name}) | {what} | {chapter} |'


def api():
    "Every public name by its letter: what it is, where it is made"
    found = [(name, d) for name, ds in names().items() for d in ds]
    found.sort(key=lambda x: (x[0].lower(), x[1].notebook))
    out = [
        '# Names {.unnumbered}', MADE,
        f'Every public name of the package: {len(found)}, by letter. '
        'A name leads to the place where its chapter makes it.'
    ]
    for letter, group in groupby(found, key=lambda x: x[0][0].upper()):
        rows = [row(name, d) for name, d in group]
        out.append('\n'.join([
            f'## {letter} {{.unnumbered}}', '', '| name | what it is | chapter |',
            '|:---|:---------|:---|', *rows
        ]))
    return '\n\n'.join(out) + '\n'


def parameters(command):
    """(how it is written in a shell, meaning, default) of each parameter of a command; arguments
    first"""
    hints = get_type_hints(command, include_extras=True)
    for name, param in inspect.signature(command).parameters.items():
        if hints[name] is typer.Context: continue   # what typer hands over, no option
        info = hints[name].__metadata__[0]
        if getattr(info, 'hidden', False): continue
        shell = name.replace('_', '-')
        is_argument = isinstance(info, typer.models.ArgumentInfo)
        kind = hints[name].__origin__
        if is_argument: spelled = f'`{(info.metavar or name).upper()}`'
        else: spelled = ' '.join(f'`{o}`' for o in declared(info) or [f'--{shell}'])
        if not is_argument and kind is not bool: spelled += f' `{value_of(kind)}`'
        nothing = param.default in (inspect.Parameter.empty, None, False, '')
        yield is_argument, spelled, info.help or '', '' if nothing else f'`{param.default}`'


def declared(option):
    """The spellings given to an option; inside Annotated Typer keeps the first where a default
    would be"""
    first = [option.default] if str(option.default).startswith('-') else []
    return [*first, *(option.param_decls or [])]


def value_of(kind):
    "What stands behind an option, in capitals"
    kinds = [k for k in get_args(kind) or [kind] if k is not type(None)]
    return {'int': 'NUMBER', 'float': 'NUMBER', 'Path': 'PATH'}.get(kinds[0].__name__, 'TEXT')


def parts(doc):
    "(what a command does, its examples)"
    about, _, examples = inspect.cleandoc(doc or '').replace('\b', '').partition('Examples:')
    paragraphs = re.split(r'\n\s*\n', about.strip())
    lines = [l.strip() for l in examples.splitlines() if l.strip()]
    return [' '.join(p.split()) for p in paragraphs], lines


def short(text):
    "A default that is a list of everything, cut"
    return text if len(text) < 40 else text[:36].rsplit(',', 1)[0] + ', ...`'


def section(name, command):
    "One command: usage, what it does, options, examples"
    about, examples = parts(command.__doc__)
    params = sorted(parameters(command), key=lambda p: not p[0])
    arguments = [spelled.strip('`') for is_argument, spelled, _, _ in params if is_argument]
    usage = ' '.join(['clipprompt', name, *arguments, '[OPTIONS]'])
    out = [f'## {name}', *map(escape, about), f'```bash\n{usage}\n```']
    rows = [
        f'| {spelled} | {escape(meaning)} | {short(default)} |'
        for _, spelled, meaning, default in params
    ]
    if rows:
        out.append('\n'.join(['| option | meaning | default |', '|:-----|:-------|:---|', *rows]))
    if examples: out += ['Examples:', '```bash\n' + '\n'.join(examples) + '\n```']
    return '\n\n'.join(out)


def cli():
    "The manual: every command as its --help has it"
    from clipprompt.cli import app
    out = [
        '# Commands {.unnumbered}', MADE,
        'What `clipprompt COMMAND --help` says, on one page. '
        'How the commands are built is told in the '
        '[chapter on the command line](../nbs/40c_cli.ipynb).'
    ]
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace('_', '-')
        out.append(section(name, command.callback))
    return '\n\n'.join(out) + '\n'


def changelog():
    "CHANGELOG.md as a page without a chapter's number"
    text = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    return text.replace('# Changelog\n', f'# Changelog {{.unnumbered}}\n\n{MADE}\n', 1)


def main():
    for name, page in dict(api=api(), cli=cli(), changelog=changelog()).items():
        (ROOT/'site'/f'{name}.qmd').write_text(page, encoding='utf-8')


if __name__ == '__main__': main()
