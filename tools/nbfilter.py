#!/usr/bin/env python3
"""Prepare one notebook for the book: Quarto pipes its JSON in and takes what this prints 
(`ipynb-filters`).

The code is the text here. nbdev's own processors replace exported cells by documentation made
from them, and lose what stands in a title's cell below the title; a book shows both. So this
takes nbdev's directives and goes its own way:

- the title becomes the page's, all below it stays; links to the notebook's source, file and
  Colab follow the title;
- hidden cells go, exported cells stay, each once, under the names that it defines: these are
  what others link to;
- cells of imports are folded, flagged cells say what the flag means;
- names in backticks link to the chapter that defines them, relative, so that links work offline
  and in previews;
- a figure's caption is also its alternative text.
"""
import ast
import json
import re
import sys
from pathlib import Path

import yaml
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import extract_directives

sys.path.insert(0, str(Path(__file__).parent))
from names import default_exp, defined, names, repository  # noqa: E402

HIDDEN = {'hide', 'default_exp'}
FLAGS = {
    'slow': 'slow: runs for minutes on two cores; the output below is stored',
    'gpu': 'gpu: needs a CUDA device; the output below is stored',
}
# Names of other chapters link only where they can't be mistaken: with a capital or an underscore,
# or one of these.
PLAIN = {'fit', 'evaluate', 'compare', 'sweep', 'assets'}
# open_clip's and PyTorch's, whatever chapters define
NOT_OURS = {'encode_text', 'encode_image', 'state_dict'}

# Where the page that draws shows a chapter's methods (tools/live.py has the names)
CARDS = {
    '10_zeroshot.ipynb': 'zero-shot', '11_coop.ipynb': 'coop', '12_cocoop.ipynb': 'coop',
    '13_deep.ipynb': 'maple', '14_mudpt.ipynb': 'mudpt', '15_provp.ipynb': 'provp-ref',
    '16_metaprompt.ipynb': 'metaprompt', '17_map_dafe.ipynb': 'map-dafe',
    '18_variational.ipynb': 'variational-coop',
}

BACKTICKS = re.compile(r'(?<![\[`\w])`([A-Za-z_]\w*)((?:\.\w+)*)(\(\))?`(?![`\]])')


def markdown(text, cell_id): return dict(cell_type='markdown', id=cell_id, metadata={}, source=text)


def source(cell):
    return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


def page_links(notebook):
    "Where a reader gets the chapter itself"
    branch = get_config().branch
    colab = repository().replace('https://github.com', 'https://colab.research.google.com/github')
    links = {
        'View source': f'{repository()}/blob/{branch}/nbs/{notebook}',
        'Download notebook': f'{repository()}/raw/{branch}/nbs/{notebook}',
        'Open in Colab': f'{colab}/blob/{branch}/nbs/{notebook}',
        'Edit': f'{repository()}/edit/{branch}/nbs/{notebook}',
    }
    if notebook in CARDS:
        links = {'Draw, and see it answer': f'../live/index.html#card-{CARDS[notebook]}'} | links
    listed = '\n'.join(f'[{text}]({url})' for text, url in links.items())
    return '::: {.page-links}\n' + listed + '\n:::'


def title(cells, notebook):
    "Title and subtitle of the first cell as the page's own; what follows them stays text"
    head = re.match(r'# (?P<title>.+)\n*(?:> (?P<subtitle>.+)\n*)?', source(cells[0]))
    if cells[0]['cell_type'] != 'markdown' or not head: return cells
    meta = {k: v for k, v in head.groupdict().items() if v}
    said = yaml.safe_dump(meta, allow_unicode=True, width=1000, sort_keys=False)
    front = dict(cell_type='raw', id='front', metadata={}, source=f'---\n{said}---')
    rest = source(cells[0])[head.end():]
    intro = markdown(page_links(notebook) + '\n\n' + rest, cells[0].get('id', 'intro'))
    return [front, intro, *cells[1:]]


def only_imports(code):
    "Does a cell do nothing but import?"
    statements = ast.parse(code).body
    return bool(statements) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements)


def heads(code, module, seen):
    """Anchors of the names that an exported cell defines first, each with a link to its line in
    the package"""
    found = []
    for name, _, _ in defined(ast.parse(code)):
        here = [d for d in names().get(name, []) if d.module == module]
        if not here or name in seen: continue
        seen.add(name)
        found.append(f'[`{name}`]{{#{name}}} [source]({here[0].source}){{.source}}')
    return '::: {.defines}\n' + '\n'.join(found) + '\n:::' if found else ''


def alternative(caption):
    "A caption as plain text in quotes"
    plain = re.sub(r'@(?:fig|tbl|eq|sec)-[\w-]+', 'its own place', caption)
    plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', plain).replace('`', '').replace('*', '')
    return json.dumps(plain, ensure_ascii=False)


def code_cell(cell, module, seen):
    "The cells that a page shows for one cell of code; `seen` are the names that have an anchor"
    mine = mk_cell(source(cell), 'code')
    directives = extract_directives(mine)
    if HIDDEN & directives.keys(): return []
    options = re.match(r'(?:#\|.*\n?)*', mine.source)[0]
    code = mine.source[len(options):]
    before = [
        markdown(f'[{text}]{{.flag}}', f'{cell["id"]}-{flag}')
        for flag, text in FLAGS.items()
        if flag in directives
    ]
    if {'export', 'exporti', 'exports'} & directives.keys():
        anchors = heads(code, module, seen)
        if anchors: before.append(markdown(anchors, f'{cell["id"]}-names'))
    is_code = not re.search(r'^\s*[%!]', code, re.M)
    if is_code and only_imports(code): options += '#| code-fold: true\n#| code-summary: "Imports"\n'
    caption = re.search(r'^#\| fig-cap:\s*(.*)$', options, re.M)
    if caption and 'fig-alt:' not in options:
        options += f'#| fig-alt: {alternative(yaml.safe_load(caption[1]))}\n'
    return [*before, dict(cell, source=options + code)]


def target(name, notebook):
    "The chapter that a name in backticks means, as a link; None if it may mean something else"
    found = names().get(name, [])
    if any(d.notebook == notebook for d in found): return f'#{name}'
    unmistakable = name in PLAIN or '_' in name or not name.islower()
    if len(found) != 1 or not unmistakable or name in NOT_OURS: return None
    return f'{found[0].notebook}#{name}'


def link(match, notebook):
    """A name in backticks, linked if it is ours; what stands behind a dot may belong to a class,
    else to a file's name"""
    to = target(match[1], notebook) if not match[2] or match[1][0].isupper() else None
    return f'[{match[0]}]({to})' if to else match[0]


def heading(line, notebook):
    "A heading of one word that is also a name of this page: the name keeps the address"
    word = re.fullmatch(r'#+ `?(\w+)`?', line.strip())
    here = word and any(d.notebook == notebook
                        for n in (word[1], word[1].lower())
                        for d in names().get(n, []))
    return f'{line.rstrip()} {{#about-{word[1].lower()}}}' if here else line


def linked(md, notebook):
    "Markdown whose names link, outside of headings, links and fenced code"
    out, fence = [], ''
    for line in md.splitlines():
        ticks = re.match(r'\s*(`{3,}|~{3,})', line)
        if ticks and not fence: fence = ticks[1]
        elif ticks and fence and ticks[1].startswith(fence): fence = ''
        elif not fence and line.startswith('#'): line = heading(line, notebook)
        elif not fence: line = BACKTICKS.sub(lambda m: link(m, notebook), line)
        out.append(line)
    return '\n'.join(out)


def filter_nb(txt, notebook):
    "The notebook `txt`, whose file has the name `notebook`, as the book shows it"
    nb = json.loads(txt)
    module = default_exp(txt)
    cells, seen = [], set()
    for cell in title(nb['cells'], notebook):
        if cell['cell_type'] == 'code': cells += code_cell(cell, module, seen)
        elif cell['cell_type'] == 'markdown':
            cells.append(dict(cell, source=linked(source(cell), notebook)))
        else: cells.append(dict(cell, source=source(cell)))
    if re.search(r'(?<![\w`])@\w+\d{4}', txt):
        cells.append(markdown('## References {.unnumbered}\n\n::: {#refs}\n:::', 'references'))
    # Quarto loses the ends of one long string
    for cell in cells: cell['source'] = cell['source'].splitlines(keepends=True)
    return json.dumps(dict(nb, cells=cells), ensure_ascii=False)


def main():
    txt = sys.stdin.read()
    # Quarto does not say which notebook it sends
    path = next(
        (p for p in sorted(Path.cwd().glob('*.ipynb')) if p.read_text(encoding='utf-8') == txt),
        None)
    if path is None: sys.exit(f'nbfilter: no notebook in {Path.cwd()} has the text on stdin')
    print(filter_nb(txt, path.name))


if __name__ == '__main__': main()
