#!/usr/bin/env python3
"""Check the book without Quarto: `python tools/docs_check.py` prints every fault and exits 1 if
there are any.

Each notebook goes through tools/nbfilter.py, as in a render, and then through Pandoc, whose
every warning counts (open divs, unknown citations, bad TeX). Then cross references, links, the
form of chapters and their list are compared with what exists. `tools/pages.py` makes pages of
the same Markdown; themes are seen only with Quarto itself.
"""
import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pypandoc
import yaml

import nbfilter

ROOT = Path(__file__).resolve().parent.parent
LABEL = r'(?:fig|tbl|sec|eq|lst)-[\w-]+'
DRAWN = {'image/svg+xml': 'svg', 'image/png': 'png'}
WIDE = 100   # characters of a line of code that fit beside its prose

# Chapters that measure: each number in their prose is one that the notebook computed
MEASURED = re.compile(r'(07c|09|1\d|2[03]|31)')

# What pages showed once and must not show again: documentation without an object, addresses in
# memory, links in code
ARTEFACTS = ('LNone', ' at 0x', 'Call self as a function', 'OptionInfo', 'str(object=', '<factory>')


def text(s):
    "nbformat allows a string or a list of lines"
    return s if isinstance(s, str) else ''.join(s or '')


def fence(s, lang=''):
    "A code block that no backticks inside it can close"
    ticks = '`' * max([3] + [len(m)+1 for m in re.findall('`{3,}', s)])
    return f'{ticks}{lang}\n{s.rstrip()}\n{ticks}'


PARSING = Lock()   # Python 3.11 cannot always parse code in two threads at once


def filtered(path):
    "The notebook at `path` as the book shows it"
    nb = path.read_text(encoding='utf-8')
    with PARSING: return json.loads(nbfilter.filter_nb(nb, path.name))


def options(src):
    "(Quarto's options of a cell, its code)"
    lines = src.splitlines()
    opts = {k: yaml.safe_load(v) for k, v in re.findall(r'^#\|\s*([\w-]+):\s*(.+)$', src, re.M)}
    return opts, '\n'.join(l for l in lines if not l.startswith('#|'))


def outputs(cell, opts, save):
    "Markdown of what a cell gave"
    label, alt = opts.get('label', ''), str(opts.get('fig-alt', ''))
    caption = opts.get('fig-cap') or opts.get('tbl-cap') or ''
    for i, o in enumerate(cell.get('outputs') or []):
        data = o.get('data') or {}
        kind = next((k for k in DRAWN if k in data), None)
        if 'text/markdown' in data:
            table = text(data['text/markdown'])
            if label.startswith('tbl-'): table = f'::: {{#{label}}}\n{table}\n\n: {caption}\n:::'
            yield table
        elif kind:
            file = save(f'{cell["id"]}-{i}.{DRAWN[kind]}', data[kind])
            safe = alt.replace('"', "'")
            attributes = f'{{#{label} alt="{safe}"}}' if label else ''
            yield f'![{caption}]({file}){attributes}'
        elif o.get('output_type') != 'error':
            shown = text(o.get('text') or data.get('text/plain'))
            yield '::: {.cell-output}\n' + fence(shown) + '\n:::'


def nb2md(nb, save=None):
    """Markdown of a filtered notebook; `save(name, data)` stores a picture and returns its
    address. Without it no pictures or labels"""
    out = []
    for c in nb['cells']:
        src = text(c.get('source'))
        if not src: continue
        if c['cell_type'] != 'code':
            out.append(src)
            continue
        opts, code = options(src)
        if opts.get('include') is False: continue
        if opts.get('echo') is not False and code.strip():
            block = fence(code, 'python')
            fold = opts.get('code-fold')
            summary = opts.get('code-summary', 'Code')
            out.append(f'<details><summary>{summary}</summary>\n\n{block}\n\n</details>' if fold is
                       True else block)
        if opts.get('output') is False: continue
        if save: out += outputs(c, opts, save)
        else: out += [m for m in outputs(c, {}, lambda name, data: '') if not m.startswith('![')]
    return '\n\n'.join(out)


def pandoc(md, bib, *args, at={}):
    """HTML that Pandoc makes of `md`, and its warnings; `at` says on which page a label is that is
    not on this one"""
    # Quarto's labels of equations and its cross references are not Pandoc's
    md = re.sub(r'(\$\$(?:(?!\$\$).)+\$\$)\s*\{#(eq-[\w-]+)\}', r'[\1]{#\2}', md, flags=re.S)
    md = re.sub(rf'(?<![\w`])@({LABEL})', lambda m: f'[{m[1]}]({at.get(m[1], "")}#{m[1]})', md)
    command = [
        pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html', '-s', '--mathml', '--citeproc',
        '--bibliography', bib, *args
    ]
    if not md.startswith('---\n'): command += ['--metadata', 'title=clipprompt']
    r = subprocess.run(command, input=md, capture_output=True, text=True, encoding='utf-8')
    return r.stdout, [l for l in r.stderr.splitlines() if l.strip()]


def page(path, bib):
    "(markdown, ids, faults) of one notebook"
    try: md = nb2md(filtered(path), save=lambda name, data: 'x.png')
    except (ValueError, SyntaxError) as e:
        return '', set(), [f'{path.name}: the filter failed: {e}']
    html, warns = pandoc(md, bib)
    ids = re.findall(r'\sid="([^"]+)"', html)
    twice = [f'{path.name}: two places have the name {i}' for i, n in Counter(ids).items() if n > 1]
    return md, set(ids), [f'{path.name}: pandoc: {w}' for w in warns] + twice


def prose(md):
    "`md` without code, where nothing is a reference or a link"
    md = re.sub(r'^(`{3,}).*?^\1`*$', '', md, flags=re.M | re.S)
    return re.sub(r'(`+)[^`\n]+\1', '', md)


def there(path, root=ROOT):
    "Does a file of the site exist? The page that draws is written at a render, from data/live"
    if path.parent == root/'live': path = root/'data'/'live'/path.name
    return path.exists()


def dead_links(path, md, ids):
    "Relative links in `md`, the text of `path`, to files or anchors that do not exist"
    for link in sorted(set(re.findall(r'\]\(([^)\s]+)', prose(md)))):
        if re.match(r'[a-z]+:|x\.png$', link): continue
        file, _, anchor = link.partition('#')
        to = (path.parent/file).resolve() if file else path
        if not there(to) or (anchor and to in ids and anchor not in ids[to]):
            yield f'{path.name}: link to {link}, which does not exist'


def wide_lines(code):
    "Lines of `code` that no page shows whole; addresses can't be shorter, captions stand elsewhere"
    return [
        l for l in code.splitlines() if len(l) > WIDE and 'http' not in l and not l.startswith('#|')
    ]


def form(path):
    "What a chapter's cells must not have"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        src, where = text(c['source']), f'{path.name}: cell {c.get("id")}'
        if re.search(r'(?<!\w)[Cc]hapters? \d', src):
            yield f'{where} names a chapter by its number; use its name, and in prose a link'
        if c['cell_type'] != 'code': continue
        for l in wide_lines(src):
            yield f'{where} has a line of {len(l)} characters: {l.strip()[:50]}...'
        opts, _ = options(src)
        given = c.get('outputs') or []
        label = str(opts.get('label', ''))
        if label and len(given) > 1:
            yield f'{where}: {label} has {len(given)} outputs; give the others a cell of their own'
        if label.startswith('fig-') and 'fig-cap' not in opts:
            yield f'{where}: {label} has no caption'
        if label.startswith('tbl-') and 'tbl-cap' not in opts:
            yield f'{where}: {label} has no caption'
        for o in given:
            data = o.get('data') or {}
            shown = text(o.get('text') or data.get('text/plain'))
            if 'text/html' in data:
                yield f'{where} shows a table that needs scripts; use clipprompt.figures.Table'
            if 'image/png' in data and 'width' not in o.get('metadata', {}).get('image/png', {}):
                yield (f'{where} has a picture that is not sharp on a fine screen; '
                       'call clipprompt.figures.style() first')
            if data.keys() & DRAWN.keys() and not label:
                yield f'{where} shows a figure without a label'
            if 'text/markdown' not in data:
                for l in wide_lines(shown):
                    yield f'{where} prints a line of {len(l)} characters: {l[:50]}...'
    first = text(nb['cells'][0]['source'])
    if re.match(r'# [\d.]+ ', first):
        yield f'{path.name}: the title has a number; Quarto gives it one'


def numbers(said):
    "Numbers with decimals, as they are written"
    found = re.findall(r'(?<![\w.])\d*\.\d+(?!\w|\.\d)', said)
    return ['0'+n if n.startswith('.') else n for n in found]


def strays(path):
    "Numbers in the prose of a chapter that measures which stand in no cell and no output of it"
    if not MEASURED.match(path.name): return
    nb, computed = json.loads(path.read_text(encoding='utf-8')), set()
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        computed |= {*numbers(text(c['source']))}
        for o in c.get('outputs') or []:
            data = o.get('data') or {}
            shown = [o.get('text'), *(part for kind, part in data.items() if 'text/' in kind)]
            computed |= {n for part in shown for n in numbers(text(part))}
    for c in nb['cells']:
        if c['cell_type'] != 'markdown': continue
        formal = r'\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)'
        ours = re.sub(formal, '', text(c['source']), flags=re.S)
        for line in ours.splitlines():
            if '*Theirs' in line or '@' in line or 'et al' in line: continue   # a paper's numbers
            for n in numbers(line):
                if n in computed: continue
                yield (f'{path.name}: cell {c.get("id")} says {n}, which no cell computed: '
                       f'{line[:60]}...')


def artefacts(path, md):
    "Traces of tools in the text of a page"
    for a in ARTEFACTS:
        if a in md: yield f'{path.name}: the page shows "{a}"'
    for block in re.findall(r'^(`{3,}).*?\n(.*?)^\1`*$', md, flags=re.M | re.S):
        if re.search(r'\]\(\d\d_', block[1]):
            yield f'{path.name}: a link stands in code: {block[1][:60]}'


def main(root=ROOT):
    "Print the faults of the book at `root`; true if there are any"
    root = Path(root).resolve()
    nbs = sorted((root/'nbs').glob('[!_]*.ipynb'))
    config = (root/'_quarto.yml').read_text(encoding='utf-8')
    listed = set(re.findall(r'[\w./-]+\.(?:ipynb|qmd)', config))
    errs = [f'_quarto.yml: {p} does not exist' for p in sorted(listed) if not (root/p).exists()]
    # nbs/index.ipynb is the source of the README and of the book's home page, not a chapter
    errs += [
        f'_quarto.yml: nbs/{p.name} is no chapter' for p in nbs
        if p.name != 'index.ipynb' and f'nbs/{p.name}' not in listed
    ]

    with ThreadPoolExecutor(2) as ex:
        res = dict(zip(nbs, ex.map(lambda p: page(p, root/'references.bib'), nbs)))
    for p, (md, _, faults) in res.items():
        errs += [*faults, *form(p), *strays(p), *artefacts(p, md)]
    labels = Counter(l for md, _, _ in res.values() for l in re.findall(rf'\{{#({LABEL})', md))
    errs += [f'label {l} stands in {n} places' for l, n in labels.items() if n > 1]
    ids = {p: i for p, (_, i, _) in res.items()}
    pages = {p: md for p, (md, _, _) in res.items()}
    others = [root/'README.md', root/'index.qmd', *sorted((root/'site').glob('*.qmd'))]
    pages.update({p: p.read_text(encoding='utf-8') for p in others if p.exists()})
    for p, md in pages.items():
        errs += [
            f'{p.name}: @{r} is not defined'
            for r in sorted(set(re.findall(rf'@({LABEL})', prose(md))))
            if r not in labels
        ]
        errs += dead_links(p, md, ids)

    print('\n'.join(errs + [f'{len(nbs)} notebooks, {len(errs)} faults']))
    return bool(errs)


if __name__ == '__main__': sys.exit(main())
