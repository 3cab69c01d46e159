"""The small worlds are what their chapter says: families apart, no twins, and the rule holds."""
import numpy as np
import pandas as pd
import pytest

from clipprompt import suite as S
from clipprompt.backbone import assets
from clipprompt.data import SUITE
from clipprompt.pretrain import PRETRAIN, fingerprint, ink_map, shrink
from clipprompt.sets import load_dataset


@pytest.fixture(scope='module')
def table(): return pd.read_csv(assets()/'suite.csv', keep_default_na=False)


def test_what_ships(table):
    assert set(table.task) == set(SUITE)
    assert not table.duplicated(['task', 'file']).any()
    assert (table.groupby('family').split.nunique() == 1).all()
    assert not set(table.family) & PRETRAIN
    shipped = (assets()/'suite.sha256').read_text().split()[0]
    assert shipped == fingerprint(assets()/'suite.zip')


@pytest.mark.parametrize('task', SUITE)
def test_nobody_has_a_twin(task):
    data = load_dataset(task=task)
    items = [*data.train, *data.val, *data.test]
    ink = np.stack([ink_map(shrink(np.asarray(data.source(i.path)))) for i in items])
    assert (ink @ ink.T - 2*np.eye(len(ink))).max() <= S.TWIN + 1e-4


def test_every_label_and_every_rejection_is_one_of_the_names(table):
    names = S.names_of_tasks()
    assert set(zip(table.task, table['class'])) <= set(zip(names.task, names['class']))
    out = pd.read_csv(assets()/'suite-left-out.csv', keep_default_na=False)
    left = set(zip(out.task, out.set, out.name))
    drawn = table.file.str.removesuffix('.png').str.split('--', expand=True)
    assert not left & set(zip(table.task, drawn[0], drawn[1]))


# ---- its steps, on made-up drawings --------------------------------------------------------------

def rows(task, cls, families, n=1):
    made = [dict(task=task, family=f, set=f, name=f'{cls}-{k}', concept=cls)
            for f in families for k in range(n)]
    return pd.DataFrame(made).assign(**{'class': cls})


def test_an_icon_needs_a_name_a_new_family_and_a_plain_style():
    known = dict(style='', concept='sun')
    icons = pd.DataFrame([
        dict(set='a', family='a', name='sun', **known),
        dict(set='tabler', family='tabler', name='sun', **known),    # picto-clip read it
        dict(set='noto', family='noto', name='sun', **known),        # emoji
        dict(set='b', family='b', name='sun-duotone', **known),
        dict(set='b', family='b', name='zebra', style='', concept='zebra'),
    ])
    many = pd.concat([icons.assign(set=icons.set + str(i)*(i > 0)) for i in range(12)])
    drawn = S.drawings(many)
    assert set(drawn.concept) == {'sun'} and set(drawn.task) == {'weather'}
    assert not set(drawn.family) & {'tabler', 'b'}
    assert len(S.drawings(icons)) == 0                               # fewer than twelve


def test_a_copy_a_twin_and_a_drawing_with_two_names_go():
    few = pd.concat([rows('a', 'redo', 'fgh'), rows('a', 'refresh', 'fg'), rows('b', 'loop', 'f')],
                    ignore_index=True).assign(key=list('012345'))
    angles = np.deg2rad([0, 90, 45, 47, 20, 47])
    inks = np.stack([np.cos(angles), np.sin(angles)], 1)
    def read_inks(places): return inks[:1] if len(places) else inks[:0]
    left = S.told_apart(few, inks, np.array(['redo']), read_inks)
    # 0 is a copy; 2 and 3 are each other's twins by two names; another task does not matter
    assert sorted(left.index) == [1, 4, 5]


def test_at_most_four_of_a_family_and_class():
    many = rows('a', 'sun', 'f', 9).assign(key=[str(i) for i in range(9)])
    assert len(S.told_apart(many, np.eye(9), np.array(['x']), lambda at: np.zeros((0, 9)))) == 4


def made(themes, families=60):
    "Themes with so many classes, each drawn once by every family"
    all_of = [f'f{i}' for i in range(families)]
    return pd.concat([rows(t, f'{t}{c}', all_of) for t, n in themes.items() for c in range(n)],
                     ignore_index=True).assign(key='')


def test_the_rule(monkeypatch):
    monkeypatch.setattr(S, 'DEALS', 5)
    themes = {f't{i:02}': 12+i for i in range(12)} | dict(general=3, small=11)
    dealt = S.split_suite(made(themes))
    # the ten with most test pictures, here those with most classes
    assert set(dealt.task) == {'general', *(f't{i:02}' for i in range(2, 12))}
    assert (dealt.groupby('family').split.nunique() == 1).all()
    share = dealt.drop_duplicates('family').split.value_counts(normalize=True)
    assert abs(share.test-.31) < .03 and abs(share.val-.15) < .03


def test_a_class_without_enough_pictures_is_no_class(monkeypatch):
    monkeypatch.setattr(S, 'DEALS', 3)
    rare = rows('t', 'rare', ['f1', 'f2'])
    dealt = S.split_suite(pd.concat([made(dict(t=12, general=2)), rare], ignore_index=True))
    assert 'rare' not in set(dealt['class']) and dealt.task.nunique() == 2


def test_the_first_deal_wins_among_equals(monkeypatch):
    monkeypatch.setattr(S, 'DEALS', 4)
    some = made(dict(t=12, general=2))
    first = S.deal(some.groupby('family').size(), 0)
    assert (some.family.map(first) == S.split_suite(some).split).all()
