"Statistics of the comparison, against definitions written out, and the one rule of its budgets."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from clipprompt.learner import Recipe
from clipprompt.protocols import pack_hits, unpack_hits
from clipprompt.report import METHODS, budget, colour, paired, plot, ranks
from helpers import one_line


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hits_round_trip(hits): assert unpack_hits(pack_hits(torch.tensor(hits))).tolist() == hits


def rows(**hits): # method -> one list of hits per seed
    packed = lambda h: pack_hits(torch.tensor(h, dtype=torch.bool))
    return pd.DataFrame([dict(task='t', shots=16, method=m, seed=s, hits_base=packed(h))
                         for m, hs in hits.items() for s, h in enumerate(hs, 1)])


def test_paired_averages_seeds_and_pairs_images():
    g = np.random.default_rng(0)
    a, b = g.random((2, 2, 300)) < [[[.7]], [[.5]]]
    line = paired(rows(ours=a.tolist(), theirs=b.tolist()), 'theirs').iloc[0]
    d = 100*(a.astype(float)-b).mean(0)
    assert line.difference == pytest.approx(d.mean()) and line.seeds == 2
    boot = [g.choice(d, len(d)).mean() for _ in range(4000)]
    assert np.allclose([line.low, line.high], np.quantile(boot, [.025, .975]), atol=.6)
    assert line.low < line.difference < line.high and line.high-line.low > 5


def test_pairing_is_what_makes_it_sharp():
    "Equal errors on equal images say more than equal accuracies"
    g = np.random.default_rng(1)
    hard = g.random(400) < .5
    better = hard | (g.random(400) < .04)
    line = paired(rows(a=[better.tolist()], b=[hard.tolist()], c=[g.permutation(hard).tolist()]),
                  'b').set_index('method')
    assert line.loc['a', 'low'] > 0
    width = line['high'] - line['low']
    assert width['c'] > 3*width['a']


def test_only_common_seeds_and_known_hits_count():
    r = rows(a=[[1, 0], [1, 1]], b=[[0, 0]], c=[[0, 1]])
    r.loc[r.method == 'c', 'hits_base'] = np.nan
    out = paired(r, 'b')
    assert out.method.tolist() == ['a']
    assert out.seeds.tolist() == [1]
    assert out.difference.tolist() == [50.]
    same = paired(rows(a=[[1, 0]], b=[[1, 0]]), 'b').iloc[0]
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_ranks_by_hand():
    h = pd.DataFrame([
        dict(task=t, method=m, seed=s, h=x + s)
        for t, scores in dict(u=(3, 2, 1), v=(1, 3, 2), w=(3, 1, 2)).items()
        for m, x in zip('abc', scores)
        for s in (1, 2)
    ])
    # no score on the other tasks: left out
    h = pd.concat([h, pd.DataFrame([dict(task='u', method='lost', seed=1, h=9.)])])
    r, cd, p = ranks(h)
    assert r.to_dict() == pytest.approx(dict(a=5/3, b=2., c=7/3))
    assert list(r.index) == ['a', 'b', 'c']
    assert cd == pytest.approx(2.343*(3*4/(6*3))**.5, rel=1e-3) and .5 < p < 1
    with pytest.raises(ValueError) as e: ranks(h[h.task == 'u'])
    one_line(e, 'two tasks')


@pytest.mark.parametrize('name', [n for n, m in METHODS.items() if m.recipe])
def test_every_budget_follows_the_rule(name):
    m = METHODS[name]
    ours, theirs = m.recipe, m.cls.recipe('base-to-new', 16)
    kinds = {
        'cocoop': (3, 8, 3, theirs.lr), 'variational-coop': (12, 32, 8, .1),
        'variational-cocoop': (2, 8, 2, .02)
    }
    image = 10, 32, None, theirs.lr if theirs.batch_size == 32 else .005
    expected = image if m.cls.learns_image else kinds.get(name, (50, 32, 8, theirs.lr))
    assert (ours.epochs, ours.batch_size, ours.views, ours.lr) == expected
    assert (ours.weight_decay, ours.momentum) == (theirs.weight_decay, theirs.momentum)
    assert ours.select == 'last'
    assert ours.source.startswith(theirs.source)
    assert ours.warmup_epochs == (0 if name == 'variational-cocoop' else theirs.warmup_epochs)
    assert isinstance(budget(m.cls), Recipe)


def test_each_method_has_a_colour_of_its_own():
    colours = [colour(m) for m in METHODS]
    assert len(set(colours)) == len(colours)
    assert all(len(c) == 7 for c in colours)
    assert colour('unknown') not in colours


def test_several_shots_make_a_curve():
    "One line per method through its means over seeds; with one number of shots a dot per seed"
    rows = pd.DataFrame([
        dict(task='t', method=m, shots=k, seed=s, accuracy=10*k + s)
        for m in ('coop', 'vpt')
        for k in (1, 2, 4)
        for s in (1, 2)
    ])
    # a probe has no new classes
    assert plot(rows.assign(new=rows.accuracy.where(rows.method == 'coop')))
    fig = plot(rows)
    ax, drawn = fig.axes[0], [line for line in fig.axes[0].lines if len(line.get_xdata())]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['coop', 'vpt']
    assert ax.get_xscale() == 'log'
    assert [line.get_color() for line in drawn] == [colour('coop'), colour('vpt')]
    for line in drawn:
        assert line.get_xdata().tolist() == [1, 2, 4]
        assert line.get_ydata().tolist() == [11.5, 21.5, 41.5]
    ax = plot(rows[rows.shots == 2]).axes[0]
    assert ax.get_title(loc='left') == 't, 2 shots: accuracy'
    assert [t.get_text() for t in ax.get_yticklabels()] == ['coop', 'vpt']
    dots, bars = ax.collections, [line.get_xdata() for line in ax.lines]
    assert [sorted(d.get_offsets()[:, 0].tolist()) for d in dots] == [[21, 22]]*2
    assert [b[np.isfinite(b)].tolist() for b in bars] == [[21.5]]*2
