#!/usr/bin/env python3
"""Check the book without Quarto: `python tools/docs_check.py` prints every fault and exits 1 if there are any.

Each notebook goes through tools/nbfilter.py, as in a render, and then through Pandoc, whose every warning counts
(open divs, unknown citations, bad TeX). Then cross references, links and the list of chapters are compared with
what exists. Layout and themes are seen only with Quarto itself.
"""
import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pypandoc
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILTER = Path(__file__).with_name('nbfilter.py')
LABEL = r'(?:fig|tbl|sec|eq|lst)-[\w-]+'


def text(s):
    "nbformat allows a string or a list of lines"
    return s if isinstance(s, str) else ''.join(s or '')


def fence(s, lang=''):
    "A code block that no backticks inside it can close"
    ticks = '`' * max([3] + [len(m)+1 for m in re.findall('`{3,}', s)])
    return f'{ticks}{lang}\n{s.rstrip()}\n{ticks}'


def filtered(path):
    "The notebook at `path` as the book shows it"
    r = subprocess.run([sys.executable, FILTER], input=path.read_text(encoding='utf-8'), cwd=path.parent,
                       capture_output=True, text=True, encoding='utf-8')
    if r.returncode: raise RuntimeError(f'{path.name}: nbdev processing failed: {r.stderr[-1000:]}')
    return json.loads(r.stdout)


def nb2md(nb, plain=False):
    "Markdown of a filtered notebook, as Quarto would hand it to Pandoc with pictures as `x.png`; `plain` has no pictures or labels"
    out = []
    for c in nb['cells']:
        src = text(c.get('source'))
        if not src: continue
        if c['cell_type'] != 'code':
            out.append(src)
            continue
        opts = {k: str(yaml.safe_load(v)) for k, v in re.findall(r'^#\|\s*([\w-]+):\s*(.+)$', src, re.M)}
        code = '\n'.join(l for l in src.splitlines() if not l.startswith('#|'))
        if opts.get('include') == 'False': continue
        if opts.get('echo') != 'False' and code.strip(): out.append(fence(code, 'python'))
        outputs = [] if opts.get('output') == 'False' else c.get('outputs') or []
        label = opts.get('label', '')
        if label and not plain:  # what Quarto can refer to: a figure, a table, a listing
            caption = opts.get('fig-cap') or opts.get('tbl-cap') or opts.get('lst-cap') or ''
            out.append(f'::: {{#{label}}}\n{caption}\n:::')
        for o in outputs:
            d = o.get('data') or {}
            if 'text/markdown' in d: out.append(text(d['text/markdown']))
            elif any(k.startswith('image/') for k in d): out += [] if plain else ['![](x.png)']
            elif o.get('output_type') != 'error': out.append(fence(text(o.get('text') or d.get('text/plain'))))
    return '\n\n'.join(out)


def pandoc(md, bib):
    "HTML that Pandoc makes of `md`, and its warnings"
    # Quarto's cross references look like citations to Pandoc
    md = re.sub(rf'(?<![\w`])@({LABEL})', r'ref-\1', md)
    r = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html', '-s', '--mathml', '--citeproc',
                        '--bibliography', bib, '--metadata', 'title=x'],
                       input=md, capture_output=True, text=True, encoding='utf-8')
    return r.stdout, [l for l in r.stderr.splitlines() if l.strip()]


def page(path, bib):
    "(markdown, ids, faults) of one notebook"
    try: md = nb2md(filtered(path))
    except RuntimeError as e: return '', set(), [str(e)]
    html, warns = pandoc(md, bib)
    return md, set(re.findall(r'\bid="([^"]+)"', html)), [f'{path.name}: pandoc: {w}' for w in warns]


def prose(md):
    "`md` without code, where nothing is a reference or a link"
    md = re.sub(r'^(`{3,}).*?^\1`*$', '', md, flags=re.M | re.S)
    return re.sub(r'(`+)[^`\n]+\1', '', md)


def dead_links(path, md, ids):
    "Relative links in `md`, the text of `path`, to files or anchors that do not exist"
    for link in sorted(set(re.findall(r'\]\(([^)\s]+)', prose(md)))):
        if re.match(r'[a-z]+:|x\.png$', link): continue
        file, _, anchor = link.partition('#')
        to = (path.parent/file).resolve() if file else path
        if not to.exists() or (anchor and to in ids and anchor not in ids[to]):
            yield f'{path.name}: link to {link}, which does not exist'


def main(root=ROOT):
    "Print the faults of the book at `root`; true if there are any"
    root = Path(root).resolve()
    nbs = sorted((root/'nbs').glob('*.ipynb'))
    config = (root/'_quarto.yml').read_text(encoding='utf-8')
    listed = set(re.findall(r'[\w./-]+\.(?:ipynb|qmd)', config))
    errs = [f'_quarto.yml: {p} does not exist' for p in sorted(listed) if not (root/p).exists()]
    # nbs/index.ipynb is the source of the README and of the book's home page, not a chapter
    errs += [f'_quarto.yml: nbs/{p.name} is no chapter' for p in nbs if p.name != 'index.ipynb' and f'nbs/{p.name}' not in listed]

    with ThreadPoolExecutor(2) as ex: res = dict(zip(nbs, ex.map(lambda p: page(p, root/'references.bib'), nbs)))
    for _, _, faults in res.values(): errs += faults
    labels = Counter(l for md, _, _ in res.values() for l in re.findall(rf'\{{#({LABEL})', md))
    errs += [f'label {l} stands in {n} places' for l, n in labels.items() if n > 1]
    ids = {p: i for p, (_, i, _) in res.items()}
    pages = {p: md for p, (md, _, _) in res.items()}
    pages.update({p: p.read_text(encoding='utf-8') for p in (root/'README.md', root/'index.qmd') if p.exists()})
    for p, md in pages.items():
        errs += [f'{p.name}: @{r} is not defined' for r in sorted(set(re.findall(rf'@({LABEL})', prose(md)))) if r not in labels]
        errs += dead_links(p, md, ids)

    print('\n'.join(errs + [f'{len(nbs)} notebooks, {len(errs)} faults']))
    return bool(errs)


if __name__ == '__main__': sys.exit(main())
