"""The book holds together, and the checker that says so sees what it should see."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs_check  # noqa: E402
import nbfilter  # noqa: E402
import names  # noqa: E402

NBS = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))


def cell(source, kind='markdown', outputs=(), **more):
    code = dict(outputs=list(outputs), execution_count=None) if kind == 'code' else {}
    return dict(cell_type=kind, metadata={}, source=source, **code, **more)


def write_nb(path, *cells):
    cells = [dict(cell(c) if isinstance(c, str) else c, id=f'c{i}') for i, c in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)),
                    encoding='utf-8')


# ---- Nothing is lost -----------------------------------------------------------------------------

def pieces(nb):
    """Every paragraph and every line of code that no directive hides, in order; the title's cell
    without its title"""
    for i, c in enumerate(nb['cells']):
        text = docs_check.text(c['source'])
        if c['cell_type'] == 'raw': continue
        if c['cell_type'] == 'markdown':
            paragraphs = [p.strip() for p in re.split(r'\n\s*\n', text) if p.strip()]
            if i == 0: paragraphs = [re.sub(r'^(# |> )', '', p) for p in paragraphs]
            yield from paragraphs
            continue
        flags = re.findall(r'^#\|\s*([\w-]+)', text, re.M)
        if {'hide', 'default_exp'} & set(flags) or re.search(r'^#\|\s*echo:\s*false', text, re.M):
            continue
        yield from (line for line in text.splitlines()
                    if line.strip() and not line.startswith('#|'))


def shown(nb):
    "The text of a filtered notebook, links of names undone"
    text = '\n'.join(docs_check.text(c['source']) for c in nb['cells'])
    text = re.sub(r"^(title|subtitle): '?(.*?)'?$", lambda m: m[2].replace("''", "'"), text,
                  flags=re.M)
    text = re.sub(r'\[(`[^`\n]+`)\]\((?:[\w.]+\.ipynb)?#\w+\)', r'\1', text)
    return re.sub(r' \{#about-\w+\}', '', text)


def lost(nb, filtered):
    "What of a notebook does not stand in its filtered form, or stands there out of order"
    text, at, out = shown(filtered), 0, []
    for piece in pieces(nb):
        plain = re.sub(r'\[(`[^`\n]+`)\]\((?:[\w.]+\.ipynb)?#\w+\)', r'\1', piece)
        found = text.find(plain, at)
        if found < 0: out.append(piece)
        else: at = found
    return out


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_filter_keeps_every_paragraph_and_line(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert len(list(pieces(nb))) > 5
    assert lost(nb, docs_check.filtered(path)) == []


def test_planted_losses_are_found():
    path = ROOT/'nbs/11_coop.ipynb'
    nb, filtered = json.loads(path.read_text(encoding='utf-8')), docs_check.filtered(path)
    cells = filtered['cells']
    for what in ('Hand-written templates', 'def text_features', '## The prompt'):
        at = next(i for i, c in enumerate(cells) if what in docs_check.text(c['source']))
        assert lost(nb, dict(filtered, cells=cells[:at] +
                             cells[at + 1:])), f'the missing cell of {what!r} was not seen'
    assert lost(nb, dict(filtered, cells=filtered['cells'][::-1])), 'another order was not seen'


def test_title_gives_way_and_nothing_else(tmp_path):
    write_nb(tmp_path/'a.ipynb',
             '# A: title\n\n> Sub: "quoted"\n\nFirst.\n\n- item: x\n\n# Not a title',
             cell('#| hide\nx = 1', 'code'), cell('#| exporti\ndef _f(): pass', 'code'),
             cell('#| echo: false\nplot()', 'code'), cell('#| slow\nrun()', 'code'),
             cell('import torch', 'code'))
    nb = json.loads(nbfilter.filter_nb((tmp_path/'a.ipynb').read_text(), 'a.ipynb'))
    texts = [docs_check.text(c['source']) for c in nb['cells']]
    assert "title: 'A: title'" in texts[0] and 'Sub: "quoted"' in texts[0]
    assert 'First.\n\n- item: x\n\n# Not a title' in texts[1]
    assert not any('x = 1' in t for t in texts) and 'def _f(): pass' in texts
    assert any('slow' in t and 'stored' in t for t in texts) and 'run()' in texts
    assert texts[-1].startswith('#| code-fold: true') and texts[-1].endswith('import torch')


def test_cells_are_lists_of_lines():
    "Quarto joins the lines of a cell that is one long string without their ends"
    assert all(isinstance(c['source'], list) for c in docs_check.filtered(NBS[1])['cells'])


# ---- Names and links -----------------------------------------------------------------------------

def test_sources_lead_to_their_lines():
    for name, found in names.names().items():
        for d in found:
            file = ROOT/'clipprompt'/f'{d.module}.py'
            line = file.read_text(encoding='utf-8').splitlines()[d.line - 1]
            assert name in line, f'{name}: line {d.line} of {d.module}.py is {line!r}'
            assert d.source.endswith(f'/clipprompt/{d.module}.py#L{d.line}')


def test_names_lead_to_their_own_page_first():
    assert nbfilter.linked('`fit` and `Fit`',
                           '06_training.ipynb') == '[`fit`](#fit) and [`Fit`](#Fit)'
    assert nbfilter.linked('`fit`', '11_coop.ipynb') == '[`fit`](06_training.ipynb#fit)'
    assert nbfilter.linked('`CoOp.recipe` and `CoOp()`',
                           '12_cocoop.ipynb').count('(11_coop.ipynb#CoOp)') == 2
    for text in ('`encode_text`', '`table`', '`domain`', '`compare.png`', '`clip`',
                 '[`fit`](x.ipynb)', '```\n`fit`\n```', '# `fit`'):
        notebook = '30_pretrain.ipynb' if text == '`fit`' else '02_prompts.ipynb'
        assert nbfilter.linked(text, notebook) == text


# ---- The form of a chapter -----------------------------------------------------------------------

@pytest.fixture
def book(tmp_path):
    "A book of two chapters that refer to each other"
    for name in ('settings.ini', 'references.bib'): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'_quarto.yml').write_text(
        'book: {chapters: [index.qmd, nbs/01_one.ipynb, nbs/02_two.ipynb]}\n')
    (tmp_path/'index.qmd').write_text('# A book\n\nSee [one](nbs/01_one.ipynb#sec-one).\n')
    write_nb(tmp_path/'nbs/01_one.ipynb', '# One\n\n> First',
             '## A section {#sec-one}\n\n$$ a = b $$ {#eq-a}\n\n@radford2021clip')
    write_nb(tmp_path/'nbs/02_two.ipynb', '# Two\n\n> Second',
             '::: {.callout-note}\n@eq-a, @sec-one, [one](01_one.ipynb#sec-one)\n:::')
    return tmp_path


def test_sound_book_passes(book, capsys):
    assert not docs_check.main(book), capsys.readouterr().out


def faults(book, capsys, *cells):
    write_nb(book/'nbs/02_two.ipynb', *cells)
    assert docs_check.main(book)
    return capsys.readouterr().out


def test_planted_faults_are_found(book, capsys):
    write_nb(book/'nbs/04_four.ipynb', '# Four\n\n> Fourth')
    out = faults(book, capsys, '# Two\n\n> Second', 'Nobody wrote this [@nobody1999].',
                 'See @fig-none.', '$$ \\frac{a $$',
                 'See [three](03_three.ipynb) and [one](01_one.ipynb#sec-none).',
                 '## Again {#sec-one}', '::: {.callout-note}\nopen')
    for fault in ('nobody1999', '@fig-none is not defined', 'TeX math', 'link to 03_three.ipynb',
                  'link to 01_one.ipynb#sec-none', 'sec-one stands in 2 places', 'Div',
                  'nbs/04_four.ipynb is no chapter'):
        assert fault in out, f'{fault!r} not reported in:\n{out}'


def test_numbers_that_nobody_computed_are_found(book, capsys):
    "In a chapter that measures: in prose, but in no cell, no output and no paper"
    name = '11_two.ipynb'
    config = (book/'_quarto.yml').read_text().replace('02_two', '11_two')
    (book/'_quarto.yml').write_text(config)
    (book/'nbs/02_two.ipynb').unlink()
    shown = dict(output_type='stream', name='stdout', text='accuracy 71.3\n')
    code = dict(cell_type='code', id='c', metadata={}, execution_count=None, outputs=[shown],
                source='rate = .002')
    here = 'It has 71.3 % at a rate of 0.002, $x = 9.9$, `1.5` and version 0.3.0.'
    theirs = '*Theirs.* 85.2 (table 1).'
    write_nb(book/'nbs'/name, '# Two\n\n> Second', code, here, theirs)
    assert not docs_check.main(book), capsys.readouterr().out
    write_nb(book/'nbs'/name, '# Two\n\n> Second', code, here.replace('71.3', '71.4'))
    assert docs_check.main(book)
    assert 'says 71.4, which no cell computed' in capsys.readouterr().out


def test_faults_of_form_are_found(book, capsys):
    stream = dict(output_type='stream', name='stdout', text='a'*101)
    html = dict(output_type='display_data', metadata={},
                data={'text/html': '<table></table>', 'text/plain': 'x'})
    coarse = dict(output_type='display_data', metadata={},
                  data={'image/png': 'AAAA', 'text/plain': 'x'})
    picture = dict(output_type='display_data', metadata={},
                   data={'image/svg+xml': '<svg></svg>', 'text/plain': '<x at 0x7f>'})
    out = faults(book, capsys, '# 2. Two\n\n> Second', 'As chapter 11 says, `LNone`.',
                 cell('x = 1  # ' + 'long '*30, 'code'), cell('f()', 'code', [stream]),
                 cell('g()', 'code', [html]), cell('h()', 'code', [picture]),
                 cell('#| label: fig-dots\n#| fig-cap: "Dots"\nh()', 'code', [coarse]),
                 cell('#| label: fig-two\nh()', 'code', [picture, stream]),
                 cell('#| label: tbl-two\ng()', 'code', [picture]))
    for fault in ('the title has a number', 'names a chapter by its number', 'shows "LNone"',
                  'a line of', 'prints a line of 101', 'a table that needs scripts',
                  'a figure without a label', 'fig-two has 2 outputs', 'fig-two has no caption',
                  'tbl-two has no caption', 'not sharp on a fine screen'):
        assert fault in out, f'{fault!r} not reported in:\n{out}'


def test_this_book(capsys):
    assert not docs_check.main(), capsys.readouterr().out


# ---- One symbol, one meaning ---------------------------------------------------------------------

SIZES = set('BCDEIJKLMNSTn')
WORDS = {
    'frac', 'tfrac', 'sum', 'log', 'exp', 'cos', 'sqrt', 'big', 'Big', 'left', 'right', 'quad',
    'qquad', 'text', 'mathrm', 'top', 'langle', 'rangle', 'lVert', 'rVert', 'Vert', 'in', 'le',
    'ge', 'mid', 'dots', 'sim', 'odot', 'times', 'cdot', 'infty', 'approx', 'propto', 'leftarrow',
    'begin', 'end', 'cases', 'aligned', 'prime', 'bar', 'tilde', 'hat', 'mathcal', 'mathbb',
    'operatorname', 'bigl', 'bigr', 'Bigl', 'Bigr', 'max', 'min', 'ell', 'pi', 'lVert', 'ne',
    'cdots', 'ldots', 'to', 'mapsto', 'circ', 'equiv', 'rule', 'vphantom', 'displaystyle',
    'textstyle', 'underbrace', 'overbrace', 'label', 'nonumber', 'forall', 'partial', 'nabla'
}


def symbols(tex):
    """The letters of a formula, Greek ones by name, script and blackboard letters with their
    alphabet"""
    tex = re.sub(r'\{#[\w-]+\}', '', tex)
    tex = re.sub(r'\\(?:text|mathrm|operatorname)\*?\{[^}]*\}|\\(?:begin|end)\{\w+\}', ' ', tex)
    script = set(re.findall(r'\\math(?:cal|bb)\s*\{?\s*[A-Z]', tex))
    tex = re.sub(r'\\math(?:cal|bb)\s*\{?\s*[A-Z]\}?', ' ', tex)
    greek = {w for w in re.findall(r'\\([A-Za-z]+)', tex)} - WORDS
    letters = set(re.findall(r'[A-Za-z]', re.sub(r'\\[A-Za-z]+', ' ', tex)))
    return letters | greek | {re.sub(r'[\s{]', '', s) for s in script}


def notation():
    "The symbols of the table of notation"
    first = re.findall(r'^\| (\$.*?) \|', (ROOT/'site/notation.qmd').read_text(encoding='utf-8'),
                       re.M)
    return set().union(*(symbols(f) for f in first))


def test_every_symbol_of_a_display_equation_is_in_the_notation():
    known = notation() | SIZES
    strange = {}
    for path in NBS:
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] != 'markdown': continue
            for tex in re.findall(r'\$\$(.*?)\$\$', docs_check.text(c['source']), re.S):
                for s in symbols(tex) - known: strange.setdefault(f'{path.stem}: {s}', tex.strip())
    assert not strange, '\n'.join(f'{k} in {v}' for k, v in strange.items())


def test_symbols_are_read_as_they_are_meant():
    assert symbols(r'\mathcal L_{\mathrm{ce}} = \tfrac1B\sum_i \lambda\,\tilde P_l') == {
        r'\mathcalL', 'B', 'i', 'lambda', 'P', 'l'
    }
