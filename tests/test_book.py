"""The book holds together, and the checker that says so sees what it should see."""
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs_check  # noqa: E402


def write_nb(path, *cells):
    cells = [dict(cell_type='markdown', id=f'c{i}', metadata={}, source=s) for i, s in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')


@pytest.fixture
def book(tmp_path):
    "A book of two chapters that refer to each other"
    for name in ('settings.ini', 'references.bib'): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'_quarto.yml').write_text('book: {chapters: [index.qmd, nbs/01_one.ipynb, nbs/02_two.ipynb]}\n')
    (tmp_path/'index.qmd').write_text('# A book\n\nSee [one](nbs/01_one.ipynb#sec-one).\n')
    write_nb(tmp_path/'nbs/01_one.ipynb', '# One\n\n> First', '## A section {#sec-one}\n\n$$ a = b $$ {#eq-a}\n\n@radford2021clip')
    write_nb(tmp_path/'nbs/02_two.ipynb', '# Two\n\n> Second', '::: {.callout-note}\n@eq-a, @sec-one, [one](01_one.ipynb#sec-one)\n:::')
    return tmp_path


def test_sound_book_passes(book, capsys):
    assert not docs_check.main(book), capsys.readouterr().out


def test_planted_faults_are_found(book, capsys):
    write_nb(book/'nbs/02_two.ipynb', '# Two\n\n> Second', 'Nobody wrote this [@nobody1999].', 'See @fig-none.', '$$ \\frac{a $$',
             'See [three](03_three.ipynb) and [one](01_one.ipynb#sec-none).', '## Again {#sec-one}', '::: {.callout-note}\nopen')
    write_nb(book/'nbs/04_four.ipynb', '# Four\n\n> Fourth')
    assert docs_check.main(book)
    out = capsys.readouterr().out
    for fault in ('nobody1999', '@fig-none is not defined', 'TeX math', 'link to 03_three.ipynb', 'link to 01_one.ipynb#sec-none',
                  'sec-one stands in 2 places', 'Div', 'nbs/04_four.ipynb is no chapter'):
        assert fault in out, f'{fault!r} not reported in:\n{out}'


def test_this_book(capsys):
    assert not docs_check.main(), capsys.readouterr().out
