"""Tuning: everybody gets the same trials, and nothing that is judged later is seen."""
import math
from collections import Counter

import pytest
import torch

from clipprompt.coop import CoOp
from clipprompt.data import SUITE
from clipprompt.hooks import Curve
from clipprompt.learner import Recipe
from clipprompt.methods import BOOK, methods
from clipprompt.pictures import DataError
from clipprompt.protocols import Method, base_to_new, inside_base, tuning
from clipprompt.records import record
from clipprompt.sets import load_dataset
from clipprompt.tuning import HIGH, LOW, TRIALS, trials, tuning_runs, tuning_tasks
from clipprompt.zeroshot import LinearProbe
from helpers import tiny_clip

TRAINED = [cls for cls in BOOK if cls.recipe().epochs]


@pytest.fixture(scope='module')
def data(): return load_dataset(task='signs')


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.mark.parametrize('cls', TRAINED, ids=lambda cls: cls.method)
def test_everybody_tries_as_often_and_as_far(cls):
    tried = trials(cls)
    rates = [t.recipe.lr/cls.recipe('base-to-new', 16).lr for t in tried]
    assert len(tried) == TRIALS and rates[0] == 1
    assert all(2**LOW*.94 <= r <= 2**HIGH*1.06 for r in rates)
    assert min(rates[1:]) < 1 and max(rates) > 8
    assert len(cls.tries) == 3
    for choice in cls.tries: # all three come up, each with two rates or more
        used = [t for t in tried[1:] if choice.items() <= t.hparams.items()]
        assert len(used) >= 2
    same = [t.recipe.batch_size for t in tried] + [t.recipe.epochs for t in tried]
    assert len(set(same)) <= 2


def test_all_have_the_same_luck():
    factors = {cls.method: [t.recipe.lr/cls.recipe('base-to-new', 16).lr for t in trials(cls)]
               for cls in TRAINED}
    first = factors.pop('coop')
    for name, other in factors.items(): assert other == pytest.approx(first, rel=.1), name
    assert trials('coop', seed=1)[1].recipe.lr != trials('coop')[1].recipe.lr


def test_nothing_to_try_without_steps():
    assert all(trials(name) == [] for name in ('zero-shot', 'zero-shot-best', 'linear-probe'))
    learning = {name for name, cls in methods().items() if cls.affordable().epochs}
    assert {r.name for r in tuning_runs()} == learning > {cls.method for cls in TRAINED}


def test_three_tasks_with_most_pictures_to_choose_on():
    size = {t: len(load_dataset(task=t).val) for t in SUITE if t != 'general'}
    chosen = tuning_tasks()
    assert len(chosen) == 3 and 'general' not in chosen
    assert min(size[t] for t in chosen) >= max(n for t, n in size.items() if t not in chosen)


def test_no_new_class_and_no_test_picture(data):
    base = data.base()
    tested = {i.path for i in data.test}
    seen = Counter()
    for mine, other in inside_base(data, 16, 1):
        names = mine.classnames + other.classnames
        assert sorted(names) == base.classnames and not set(names) & set(data.new().classnames)
        for part in (mine.train, mine.test, other.test):
            assert part and not tested & {i.path for i in part}
        assert not {i.path for i in mine.train} & {i.path for i in mine.test + other.test}
        seen.update(mine.classnames)
    assert set(seen) == set(base.classnames) and set(seen.values()) == {1}


def test_a_set_without_validation_pictures_is_refused():
    with pytest.raises(DataError, match='no validation pictures'):
        inside_base(load_dataset(task='pixels'), 16, 1)


def test_scores_are_over_all_pictures_of_both_halves(clip, data):
    method = Method(TRAINED[0], dict(n_ctx=2), Recipe(epochs=2))
    row = tuning(method, clip, data, 4, 1)
    base = data.base()
    assert row['hits_base'].startswith(f'{len(base.val)}:')
    assert row['hits_new'].startswith(f'{len(base.val) + len(base.train)}:')
    assert row['protocol'] == 'tuning' and [p['epoch'] for p in row['curve']] == [1, 2]
    assert 'curve' not in tuning(method, clip, data, 4, 1, curve=False)


@pytest.mark.parametrize('cls', TRAINED, ids=lambda cls: cls.method)
def test_a_curve_changes_nothing(clip, data, cls):
    "Asking along the way gives the same prompts and, at its end, the same accuracies"
    recipe = Recipe(epochs=3, batch_size=16, lr=.01)
    method = Method(cls, None, recipe)
    small = data.few_shot(2, 1)
    with torch.random.fork_rng():
        plain = base_to_new(method, clip, small, 2, 1)
        told = base_to_new(method, clip, small, 2, 1, curve=True)
    same = ('base', 'new', 'h', 'hits_base', 'hits_new')
    assert {k: plain[k] for k in same} == {k: told[k] for k in same}
    curve = told['curve']
    assert [p['epoch'] for p in curve] == [1, 2, 3]
    assert curve[-1]['base'] == round(told['base'], 2)
    assert [p['images'] for p in curve] == sorted(p['images'] for p in curve)
    assert all(a['seconds'] < b['seconds'] for a, b in zip(curve, curve[1:]))


def test_a_curve_survives_a_stop(clip, data, tmp_path):
    small, cls = data.few_shot(2, 1).base(), TRAINED[0]
    recipe = Recipe(epochs=4, lr=.01)
    def go(hooks, **how):
        return Method(cls, None, recipe).train(clip, small, 1, hooks=hooks, **how)
    whole = Curve(lambda learner: dict(first=learner.ctx.tokens.flatten()[0].item()))
    go([whole])

    class Stops(Curve):
        def after_epoch(self, run, epoch):
            super().after_epoch(run, epoch)
            if epoch == 3: raise KeyboardInterrupt
    class Same(Curve): pass
    Stops.__name__ = Same.__name__ = 'Curve'
    file = tmp_path/'c.safetensors'
    with pytest.raises(KeyboardInterrupt): go([Stops(whole.score)], checkpoint=file)
    again = Same(whole.score)
    go([again], checkpoint=file)
    drop = lambda points: [{k: v for k, v in p.items() if k != 'seconds'} for p in points]
    assert drop(again.points) == drop(whole.points)


def test_a_curve_is_kept_in_a_record(clip, data):
    recipe = Recipe(epochs=1)
    small = data.few_shot(1, 1)
    rec = record(Method(TRAINED[0], None, recipe), 'base-to-new', clip, small, 1, 1, curve=True)
    assert rec['curve'][0]['epoch'] == 1


@pytest.mark.parametrize('method', [Method(CoOp, dict(n_ctx=2, csc=True), Recipe(epochs=2)),
                                    Method(LinearProbe, None)], ids=['csc', 'probe'])
def test_prompts_that_belong_to_their_classes_have_no_new_ones(clip, data, method):
    row = tuning(method, clip, data, 2, 1)
    assert 0 <= row['base'] <= 100 and math.isnan(row['new']) and math.isnan(row['h'])
    assert all('new' not in point for point in row['curve'])
    small = base_to_new(method, clip, data, 2, 1, curve=True)
    assert math.isnan(small['new']) and all('base' in point for point in small['curve'])
