"Statistics of the comparison, against definitions written out."
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from clipprompt.evidence import (agreement, gain_table, gains, hits_of, means, ranks, redrawn,
                                 show_gains, stored, variance_shares)
from clipprompt.figures import colour
from clipprompt.protocols import harmonic_mean, pack_hits, unpack_hits
from helpers import one_line


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hits_round_trip(hits): assert unpack_hits(pack_hits(torch.tensor(hits))).tolist() == hits


def table(block, score='base', names='abcdef'): # [M, T, S][N] hits -> rows
    packed = lambda h: pack_hits(torch.tensor(np.array(h, bool)))
    return pd.DataFrame([
        {'method': names[m], 'task': f't{t}', 'seed': s+1, score: 100*np.mean(h),
         f'hits_{score}': packed(h)}
        for m, tasks in enumerate(block) for t, seeds in enumerate(tasks)
        for s, h in enumerate(seeds)])


@pytest.fixture
def halves():
    "Two methods, three tasks of different size, two seeds; base and new"
    g = np.random.default_rng(0)
    sizes = dict(base=(30, 50, 20), new=(25, 45, 15))
    made = []
    for score, chance in (('base', (.6, .8)), ('new', (.7, .5))):
        block = [[[g.random(n) < p for _ in range(2)] for n in sizes[score]] for p in chance]
        made.append(table(block, score))
    return made[0].merge(made[1], on=['method', 'task', 'seed'])


def test_a_draw_is_a_comparison_of_what_was_drawn(halves):
    "Lists of drawn things and no weights: the same mean and the same spread"
    g, methods = np.random.default_rng(1), ['a', 'b']
    blocks = [hits_of(here)[1] for _, here in halves.groupby('task')]
    slow = []
    for _ in range(3000):
        parts = []
        for t in g.integers(3, size=3):
            _, S, N = blocks[t].shape
            s, n = g.integers(S, size=S), g.integers(N, size=N)
            parts.append(100*blocks[t][:, s][:, :, n].mean((1, 2)))
        slow.append(np.mean(parts, 0))
    fast = redrawn(halves, ['base'], draws=3000)['base']
    assert list(fast) == methods
    assert np.allclose(fast.mean(), np.mean(slow, 0), atol=.5)
    assert np.allclose(fast.std(), np.std(slow, 0), rtol=.08)
    difference = np.subtract(*np.array(slow).T)
    assert np.isclose((fast.a-fast.b).std(), difference.std(), rtol=.08)


def test_base_and_new_share_their_draw(halves):
    "A task that is drawn counts on both sides, so H is a harmonic mean of one comparison"
    swapped = halves.assign(hits_new=halves.hits_base, new=halves.base)
    drawn = redrawn(swapped, draws=4000)
    assert np.corrcoef(drawn['base'].a, drawn['new'].a)[0, 1] > .3
    assert drawn['h'].a[7] == pytest.approx(harmonic_mean(drawn['base'].a[7], drawn['new'].a[7]))
    assert redrawn(halves, draws=9, seed=1)['h'].equals(redrawn(halves, draws=9, seed=1)['h'])


def test_gains_are_differences_of_means(halves):
    lines = gains(halves, 'a', draws=500).set_index('score')
    measured = means(halves)
    assert list(lines.index) == ['base', 'new', 'h']
    for score in lines.index:
        line = lines.loc[score]
        assert line.method == 'b' and line.low < line.difference < line.high
        assert line.difference == pytest.approx(measured[score].b-measured[score].a)
    by_hand = [halves[(halves.method == 'b') & (halves.task == t)].base.mean()
               for t in halves.task.unique()]
    assert lines.loc['base', 'mean'] == pytest.approx(np.mean(by_hand))


def test_pairing_is_what_makes_it_sharp():
    "Equal errors on equal images say more than equal accuracies"
    g = np.random.default_rng(1)
    hard = g.random(400) < .5
    better = hard | (g.random(400) < .04)
    rows = table([[[hard]], [[better]], [[g.permutation(hard)]]])
    line = gains(rows, 'a', ['base']).set_index('method')
    assert line.loc['b', 'low'] > 0
    width = line['high'] - line['low']
    assert width['c'] > 3*width['b']


def test_what_is_the_same_differs_by_nothing():
    line = gains(table([[[[1, 0]]], [[[1, 0]]]]), 'a', ['base']).iloc[0]
    assert (line.low, line.difference, line.high) == (0, 0, 0)


def test_who_has_no_hits_on_a_side_is_left_out_there(halves):
    probe = halves[halves.method == 'b'].assign(method='probe', new=np.nan, hits_new=None)
    lines = gains(pd.concat([halves, probe]), 'a', draws=50)
    assert lines[lines.method == 'probe'].score.tolist() == ['base']
    assert lines[lines.method == 'b'].score.tolist() == ['base', 'new', 'h']


def test_gaps_are_errors(halves):
    no_seed = halves[~((halves.method == 'b') & (halves.seed == 2) & (halves.task == 't1'))]
    with pytest.raises(ValueError) as e: gains(no_seed, 'a')
    one_line(e, 'b lacks seed 2 of t1', 'run it')
    no_task = halves[~((halves.method == 'b') & (halves.task == 't1'))]
    with pytest.raises(ValueError) as e: gains(no_task, 'a')
    one_line(e, 'b lacks task t1', 'run it')
    with pytest.raises(ValueError) as e: gains(halves, 'zero-shot')
    one_line(e, "no row is of 'zero-shot'", 'a, b')


LINES = pd.DataFrame([
    dict(method='vpt', score='base', difference=2.34, low=-.06, high=5.),
    dict(method='vpt', score='h', difference=-1.25, low=-3., high=-.5),
    dict(method='coop', score='base', difference=0., low=0., high=0.)])


def test_gains_in_words():
    "In the order of the lines, signs always there, a dash for what a method lacks"
    said = gain_table(LINES)
    assert list(said) == ['method', 'base', 'h'] and said.method.tolist() == ['vpt', 'coop']
    assert said.base.tolist() == ['+2.3 [-0.1, +5.0]', '+0.0 [+0.0, +0.0]']
    assert said.h.tolist() == ['-1.2 [-3.0, -0.5]', '–']


def test_gains_drawn():
    "A dot and a bar for each line of the table, where its numbers say"
    fig = show_gains(LINES, 'coop')
    assert [ax.get_title(loc='left') or ax.get_title() for ax in fig.axes] == ['base', 'H']
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['vpt', 'coop']
    assert 'more than coop' in fig.get_supxlabel()
    base, h = (ax.containers for ax in fig.axes)
    assert len(base) == 2 and len(h) == 1
    dot, _, (bar,) = base[0].lines
    assert dot.get_color() == colour('vpt')
    assert dot.get_xydata().tolist() == [[2.34, 0.]]
    assert np.allclose(bar.get_segments()[0], [[-.06, 0], [5, 0]])
    low, high = fig.axes[0].get_ylim()
    assert low > high                                  # the first method on top
    plt.close(fig)


def test_stored_rows_are_there():
    main = stored()
    assert set(main.part) == {'main'} and len(main) == len(main.drop_duplicates('run'))
    some = stored('main', ['coop', 'zero-shot'], [2])
    assert some.groupby('method').size().to_dict() == {'coop': 11, 'zero-shot': 11}
    assert set(some.seed) == {2} and some.index.tolist() == list(range(22))
    assert len(stored(methods=[])) == 0
    hits = unpack_hits(some.hits_base[0])
    assert 100*hits.mean() == pytest.approx(some.base[0], abs=.01)


def test_rows_that_are_not_stored_are_named():
    with pytest.raises(ValueError) as e: stored('mian')
    one_line(e, "part 'mian'", 'the parts are main, controls')
    with pytest.raises(ValueError) as e: stored('controls', ['coop-published', 'coop'])
    one_line(e, "part 'controls' has no row of 'coop'")


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


def test_variance_is_split_by_hand():
    "In a full table the parts are variances of means"
    g = np.random.default_rng(2)
    x = g.normal(size=(4, 5, 3))+3*g.normal(size=(4, 1, 1))+g.normal(size=(1, 5, 1))
    rows = pd.DataFrame([dict(task=t, method=m, seed=s, h=x[t, m, s])
                         for t in range(4) for m in range(5) for s in range(3)])
    task, method = x.mean((1, 2)).var(), x.mean((0, 2)).var()
    together = x.mean(2).var()-task-method
    rest = x.var()-task-method-together
    found = variance_shares(rows)
    assert list(found.index) == ['task', 'method', 'task and method together', 'rest']
    assert np.allclose(found, 100*np.array([task, method, together, rest])/x.var())
    assert np.allclose(variance_shares(rows.rename(columns=dict(h='base')), 'base'), found)


def test_agreement_by_hand():
    ours = pd.Series(dict(a=1., b=2., c=3., d=4., only_here=9., nan=np.nan))
    theirs = pd.Series(dict(d=8., c=9., b=5., a=1., only_there=0., nan=1.))
    said = agreement(ours, theirs)
    assert said['methods'] == 4
    assert said['rho'] == pytest.approx(1-6*2/(4*15))       # one swap: d squared is 2
    assert said['p'] == pytest.approx(4/24)                 # the order itself and three swaps
    assert 'low' not in said
    drawn = pd.DataFrame(np.tile([1., 2, 3, 4], (10, 1)), columns=list('abcd'))
    sure = agreement(ours, theirs, drawn)
    assert sure['low'] == sure['high'] == pytest.approx(said['rho'])
    with pytest.raises(ValueError) as e: agreement(ours[:2], theirs)
    one_line(e, 'needs three methods, not 2')
