"""What figures and tables share, and what the cards say of the methods."""
import re
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from clipprompt.cards import CARDS, EVERY, RIVAL_CARDS, card, drawing, facts, overview, rows_of
from clipprompt.evidence import gains, stored
from clipprompt.figures import LOOK, Sketch, Table, cell, colour, has_pixels, marker, style
from clipprompt.methods import BOOK, RIVALS, methods
from clipprompt.protocols import unpack_hits
from helpers import tiny_clip, works

ROOT = Path(__file__).resolve().parent.parent


def rows(table):
    return [[c.strip()
             for c in line.strip('|').split('|')]
            for line in table._repr_markdown_().splitlines()]


def test_every_method_has_a_look_of_its_own():
    assert set(LOOK) == {cls.method for cls in BOOK}
    assert len({(colour(m), marker(m)) for m in LOOK}) == len(LOOK)
    assert colour('somebody-elses') == '#404040' and marker('somebody-elses') == 'o'


@pytest.mark.parametrize('value, digits, text', [
    (12345, 1, '12,345'), (1.25, 1, '1.2'), (-0.04, 2, '-0.04'), (float('nan'), 1, '–'),
    (None, 1, '–'), (True, 1, 'yes'), (np.float32(2.5), 0, '2'), (np.int64(7), 3, '7'),
    ('1.0 ± 0.2', 1, '1.0\u00a0±\u00a00.2'), ('a|b', 1, 'a\\|b'), ((1, 2), 1, '(1, 2)')])
def test_cells(value, digits, text): assert cell(value, digits) == text


def test_tables():
    frame = pd.DataFrame({'lr': [.002], 'n': [1000], 'what': ['x']},
                         index=pd.Index(['coop'], name='method'))
    assert rows(Table(frame, digits={'lr': 4})) == [
        ['method', 'lr', 'n', 'what'],
        [':---------', '-------:', '------:', ':-------'],
        ['coop', '0.0020', '1,000', 'x']]
    two = pd.DataFrame([[1., 2.]],
                       columns=pd.MultiIndex.from_tuples([('icons', 'base'), ('icons', 'new')]))
    # no counter, levels in a line
    assert rows(Table(two))[0] == ['icons base', 'icons new']
    assert rows(Table(frame.iloc[:0]))[0] == ['method', 'lr', 'n', 'what']  # nothing measured yet
    # what was given stays as it is
    assert frame.shape == (1, 3) and list(frame.index) == ['coop']


def test_style_and_sketch():
    with mpl.rc_context():
        style()
        assert mpl.rcParams['axes.prop_cycle'].by_key()['color'][2] == colour('coop')
        s = Sketch(4, 2, 10, (-1, 1))
        s.box(1, 0, 2, .5, 'box', fill=colour('coop'))
        s.arrow((1, 0), (4, 0), dashed=True)
        assert s.ax.get_xlim() == (0, 10) and s.ax.get_ylim() == (-1, 1) and len(s.ax.patches) == 1
        assert not has_pixels(s.ax.figure)
        plt.close('all')


def test_cards_name_papers_of_the_bibliography():
    known = (ROOT/'references.bib').read_text(encoding='utf-8')
    for name, c in EVERY.items():
        key = re.search(r'(?:abs|pii|html)/(\S+)$', c.url)[1]
        assert key in known, f'{name}: {c.url} is not in references.bib'
        assert (ROOT/'nbs'/c.chapter).exists()
        assert {len(c.text), len(c.image)} <= {5, 6} and set(c.text+c.image) <= set('fcmdtbk.')
        assert set(c.text[5:] + c.image[5:]) <= set('bk')      # behind the last block is no slot
        assert c.arrows in ('down', 'up', 'both', 'shared', '')


def test_every_method_that_learns_or_is_a_rival_has_a_card():
    learning = [cls.method for cls in BOOK if cls.recipe().epochs]
    assert list(CARDS) == learning and list(RIVAL_CARDS) == [cls.method for cls in RIVALS]
    clip = tiny_clip()
    for name, c in EVERY.items():
        learner = methods()[name](clip, ['cat', 'dog'])
        assert learner.learns_image == (c.image[:5] != '.....'), name
        assert learner.learns_text == (c.text != '.....'), name
        assert c.text + c.image != '.'*10


def test_cards_say_what_the_rows_say():
    "Means over tasks and seeds, counted from hits and not from scores; the cost from seconds"
    told = facts(tiny_clip())
    for name in CARDS:
        rows = stored(methods=[name])
        base, new = (np.mean([100*unpack_hits(h).mean() for h in rows[f'hits_{s}']])
                     for s in ('base', 'new'))
        said = card(name, told.loc[name])
        assert f'base {base:.1f}, new {new:.1f} (11 tasks, 3 seeds)' in said
        times = rows.seconds.mean()/stored(methods=['coop']).seconds.mean()
        assert (f'Run\n: {times:.2g} times CoOp' in said) == (name != 'coop')
    gained = gains(stored(methods=['zero-shot', *CARDS]))
    here = gained[gained.score == 'h'].set_index('method')
    assert told.gain.equals(here.difference[told.index].rename('gain'))
    assert f'{here.low["vpt"]:+.1f}, {here.high["vpt"]:+.1f}]' in card('vpt', told.loc['vpt'])


def test_cards_of_rivals_say_what_the_rows_say():
    told = facts(tiny_clip(), RIVAL_CARDS)
    rows = rows_of(RIVAL_CARDS)
    assert set(told.index[told.base.notna()]) == set(rows.method) - {'zero-shot', 'coop'}
    for name, fact in told.iterrows():
        here, said = rows[rows.method == name], card(name, fact)
        assert ('Ours' in said) == ('Run' in said) == bool(len(here))
        assert ('Gain' in said) == bool(len(here) and here.new.notna().all())
        if len(here) and 'Gain' not in said: assert 'new – (' in said
        assert 'nan' not in said
    E, shots = tiny_clip().embed_dim, 16
    assert told.kept.to_dict() == dict.fromkeys(told.index, 0) | {'tip-adapter': shots*E}
    each = {name: n for name, n in told.each.items() if n}
    assert each == {'tip-adapter-f': shots*E, 'taskres': E, 'lp-plus-plus': E+2, 'dept': E+1}
    assert f'nothing; {shots*E:,} numbers kept' in card('tip-adapter', told.loc['tip-adapter'])


def test_drawings_are_svg():
    import xml.etree.ElementTree as xml
    for name in EVERY: assert xml.fromstring(drawing(name)).tag.endswith('svg')
    for some in (CARDS, RIVAL_CARDS):
        assert len(xml.fromstring(overview(some)).findall('{*}svg')) == len(some)
    assert 'kept' in overview(RIVAL_CARDS) and 'kept' not in overview()


def test_pages_of_reference_are_up_to_date():
    sys.path.insert(0, str(ROOT/'tools'))
    import reference
    for name, page in dict(api=reference.api(), cli=reference.cli()).items():
        file = ROOT/'site'/f'{name}.qmd'
        assert file.read_text(encoding='utf-8') == page, 'run tools/reference.py'
    assert '`--task`' in page and '–task' not in page


def test_help_and_manual_agree():
    shown = set(re.findall(r'--[a-z][a-z-]+', works('train', '--help').out)) - {'--help'}
    manual = (ROOT/'site/cli.qmd').read_text(encoding='utf-8')
    manual = manual.split('## train')[1].split('\n## ')[0]
    told = set(re.findall(r'--[a-z][a-z-]+', manual))
    assert len(shown) > 5 and shown <= told, 'run tools/reference.py'
