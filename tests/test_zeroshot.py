"""Learners whose sentences are written by hand, what they take from their data, and the probe that
is solved instead of trained."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from clipprompt.data import template_of
from clipprompt.learner import Recipe
from clipprompt.metaprompt import MetaPrompt, TwoPairs
from clipprompt.pictures import test_transform as tested
from clipprompt.protocols import Method
from clipprompt.provp import ProVP, ProVPRef
from clipprompt.sets import load_dataset
from clipprompt.evaluation import encode, evaluate
from clipprompt.training import fit
from clipprompt.zeroshot import (GAMMAS, BestTemplate, LinearProbe, Templated, ZeroShot, best_gamma,
                                 best_template, logistic_regression)
from helpers import one_line, shapes, tiny_clip

@pytest.fixture(scope='module')
def clip(): return tiny_clip()

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return load_dataset(shapes(tmp_path_factory.mktemp('photos')))

@pytest.fixture(scope='module')
def eurosat(photos): return replace(photos, name='eurosat', template=template_of('eurosat'))

SMALL = {ZeroShot: {}, ProVP: dict(n_visual=2), TwoPairs: dict(depth=1), MetaPrompt: dict(depth=1)}
SATELLITE = {ZeroShot: 'a centered satellite photo of {}.',
             ProVP: 'a centered satellite photo of {}.',
             TwoPairs: 'a centered satellite photo of {}',
             MetaPrompt: 'a centered satellite photo of {}'}
ONE = Recipe(lr=.01, epochs=1, batch_size=8)


# ---- what is taken from the data -----------------------------------------------------------------

@pytest.mark.parametrize('cls', SMALL, ids=lambda cls: cls.method)
def test_the_sentence_of_the_data(clip, photos, eurosat, cls, tmp_path):
    "In place; recorded, so that files and other classes keep it; new data bring their own"
    learner = cls(clip, photos.classnames, **SMALL[cls])
    usual = learner.templates
    assert usual == [template_of('', cls.paper)] and learner.hparams['templates'] is None
    assert learner.prepare(eurosat) is None
    assert learner.templates == [SATELLITE[cls]] == [learner.hparams['templates']]
    learner.save(tmp_path/'p.safetensors')
    loaded = cls.load(tmp_path/'p.safetensors', clip)
    assert loaded.hparams == learner.hparams and loaded.templates == learner.templates
    other = learner.for_classes(['river', 'forest'])
    assert other.templates == learner.templates
    learner.prepare(photos); other.prepare(photos)
    assert learner.templates == other.templates == usual


@pytest.mark.parametrize('cls', SMALL, ids=lambda cls: cls.method)
@pytest.mark.parametrize('given', ['{}', ['{} here', '{} there']], ids=['one', 'two'])
def test_a_given_sentence_stays(clip, photos, eurosat, cls, given):
    learner = cls(clip, photos.classnames, templates=given, **SMALL[cls])
    before = dict(learner.hparams)
    learner.prepare(eurosat)
    learner.for_classes(['river']).prepare(eurosat)
    assert learner.hparams['templates'] == given
    assert learner.hparams == before | ({'split': 'class'} if cls is MetaPrompt else {})


def test_split_follows_the_data(clip, photos):
    parts = replace(photos, by_domain=True)
    taken, given = (MetaPrompt(clip, photos.classnames, depth=1, split=s) for s in (None, 'class'))
    for learner in (taken, given): learner.prepare(parts)
    assert taken.hparams['split'] == 'domain' and taken.reads == ('frozen', 'domains')
    assert given.hparams['split'] == 'class' and given.reads == ('frozen',)
    taken.prepare(photos)
    assert taken.hparams['split'] == 'class'


@pytest.mark.parametrize('cls', [ProVP, ProVPRef, MetaPrompt], ids=lambda cls: cls.method)
def test_python_trains_what_a_method_trains(clip, eurosat, cls):
    "Bit by bit, sentence and split included"
    kw = dict(depth=1) if cls is MetaPrompt else dict(n_visual=2)
    ours = cls(clip, eurosat.classnames, **kw, seed=3)
    fit(ours, eurosat, ONE, seed=3, progress=False)
    theirs = Method(cls, kw, ONE).train(clip, eurosat, seed=3)
    assert ours.hparams == theirs.hparams
    assert ours.templates == [SATELLITE.get(cls, SATELLITE[ProVP])]
    assert cls is not MetaPrompt or ours.hparams['split'] == 'class'
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert torch.equal(evaluate(ours, eurosat).logits, evaluate(theirs, eurosat).logits)
    usual = cls(clip, eurosat.classnames, **kw, seed=3)
    fit(usual, replace(eurosat, name='photos'), ONE, seed=3, progress=False)
    assert not torch.equal(evaluate(ours, eurosat).logits, evaluate(usual, eurosat).logits)


def test_another_data_set_has_its_own_sentence(clip, photos, eurosat):
    learner = ZeroShot(clip, photos.classnames)
    fit(learner, photos, progress=False)
    assert learner.for_data(eurosat).templates == [SATELLITE[ZeroShot]]
    assert learner.for_data(eurosat).for_data(photos).templates == learner.templates
    assert ZeroShot(clip, photos.classnames, '{}').for_data(eurosat).templates == ['{}']
    for cls in (ProVP, MetaPrompt): # prompts keep the sentence that they were trained with
        trained = cls(clip, photos.classnames, **SMALL[cls])
        trained.prepare(photos)
        assert trained.for_data(eurosat).templates == trained.templates
    best = BestTemplate(clip, photos.classnames, ['{}', 'a {}'])
    best.prepare(photos)
    assert best.for_data(eurosat).templates == best.templates


def test_best_of_the_given(clip, photos):
    given = ['a photo of a {}.', '{}', 'many {}', 'no {}']
    accuracy = {t: evaluate(ZeroShot(clip, photos.classnames, t), photos, 'train').accuracy
                for t in given}
    learner = BestTemplate(clip, photos.classnames, given)
    fit(learner, photos, progress=False)
    assert learner.templates == [max(given, key=accuracy.get)]
    assert learner.templates == [best_template(clip, photos, given)]
    again = BestTemplate(clip, photos.classnames, given[::-1])
    again.prepare(photos); again.prepare(photos)
    assert accuracy[again.templates[0]] == accuracy[learner.templates[0]]
    one = BestTemplate(clip, photos.classnames, 'no {}')
    one.prepare(photos)
    assert one.templates == ['no {}']
    free = BestTemplate(clip, photos.classnames)
    free.prepare(photos)
    assert free.templates == [best_template(clip, photos)]


def test_nothing_is_trained_by_steps(clip, photos):
    for cls in (ZeroShot, BestTemplate, LinearProbe):
        for setting in ('few-shot', 'base-to-new', 'cross-dataset'):
            recipe = cls.recipe(setting, 4, 'food101')
            assert recipe.epochs == 0 and recipe.source
        assert cls.budget().epochs == 0
        assert fit(cls(clip, photos.classnames), photos, progress=False).losses == []
    assert not issubclass(ProVP, ZeroShot) and issubclass(ProVP, Templated)


# ---- the linear probe ----------------------------------------------------------------------------

def clouds(n_classes, shots, width=12, seed=0):
    "Overlapping classes, far from the origin"
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    scale = torch.linspace(.3, 3, width, dtype=torch.float64)
    x = (draw(n_classes, 1, width) + draw(n_classes, shots, width))*scale + 8*draw(width)
    return x.flatten(0, 1), torch.arange(n_classes).repeat_interleave(shots)


@pytest.mark.parametrize('n_classes,shots', [(2, 5), (3, 1), (6, 8)])
@pytest.mark.parametrize('gamma', [.003, 1.])
def test_the_solution_is_scikit_learns(n_classes, shots, gamma):
    x, y = clouds(n_classes, shots)
    W, b = logistic_regression(x, y, n_classes, gamma)
    theirs = LogisticRegression(C=gamma, tol=1e-10, max_iter=20_000).fit(x, y)
    coef = W[1:] - W[:1] if n_classes == 2 else W
    def away(ours, theirs): return np.abs(ours.numpy() - theirs).max()
    assert away(coef, theirs.coef_) < 1e-4
    assert away((x @ W.T + b).softmax(-1), theirs.predict_proba(x)) < 1e-4
    near = logistic_regression(x, y, n_classes, gamma, start=(W + .1, b - .2))
    torch.testing.assert_close(near[0], W, rtol=0, atol=1e-4)


def test_rows_in_parts_change_nothing(monkeypatch):
    x, y = clouds(6, 8)
    whole = logistic_regression(x, y, 6)
    parts = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, 'split', lambda t, n, dim=0: parts(t, min(n, 7), dim))
    for a, b in zip(logistic_regression(x, y, 6), whole):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('seed', range(2))
def test_the_penalty_is_the_one_that_a_grid_search_chooses(seed):
    x, y = clouds(6, 8, seed=seed)
    x = x-x.mean(0)  # for scikit-learn's sake: much faster, the same solution
    gamma, (W, b) = best_gamma(x.float(), y, 6, 4)
    grid = GridSearchCV(LogisticRegression(max_iter=1000), dict(C=list(GAMMAS)), cv=4)
    assert grid.fit(x, y).best_params_['C'] == gamma
    assert W.shape == (6, 12) and b.shape == (6,)


@pytest.mark.parametrize('shots', [1, 3])
@pytest.mark.parametrize('names', [2, 4])
def test_a_probe_as_it_was_with_scikit_learn(clip, photos, shots, names):
    "Two classes, one image of each, a search: the same predictions on the test images"
    few = photos.base().few_shot(shots) if names == 2 else photos.few_shot(shots)
    probe = LinearProbe(clip, few.classnames)
    fit(probe, few, progress=False)
    (x, y), (test_x, _) = (encode(probe, few.pictures(split, tested(clip, raw=True)))
                           for split in ('train', 'test'))
    s = clip.logit_scale
    model = LogisticRegression(tol=1e-8, max_iter=10_000)
    if shots > 1: model = GridSearchCV(model, dict(C=list(GAMMAS)), cv=shots)
    theirs = model.fit((s*x).double(), y).predict_proba((s*test_x).double())
    ours = probe.logits(test_x).double().softmax(-1).detach()
    assert np.abs(ours.numpy() - theirs).max() < 1e-4


def test_a_class_without_images(clip, photos):
    data = replace(photos, train=[item for item in photos.train if item.label != 2])
    with pytest.raises(ValueError) as e:
        fit(LinearProbe(clip, photos.classnames), data, progress=False)
    one_line(e, 'at least one', photos.classnames[2])


class Tuned(LinearProbe):
    "Solved, then trained"
    method = 'tuned-probe'

    @classmethod
    def recipe(cls, setting='few-shot', shots=16, dataset=''):
        return Recipe(lr=1e-3, epochs=3, batch_size=6, warmup_epochs=0, views=1)


def test_solved_and_then_trained(clip, photos, tmp_path):
    "Training starts from the solution, also where it is taken up again"
    data = photos.few_shot(3)
    solved, tuned = LinearProbe(clip, data.classnames), Tuned(clip, data.classnames)
    fit(solved, data, progress=False)
    done = fit(tuned, data, progress=False, checkpoint=tmp_path/'c')
    assert len(done.losses) == 3
    moved = (tuned.weight-solved.weight).norm()
    assert 0 < moved < .5*solved.weight.norm()
    still = Tuned(clip, data.classnames)
    fit(still, data, replace(Tuned.recipe(), lr=0., weight_decay=0.), progress=False)
    assert torch.equal(still.weight, solved.weight) and torch.equal(still.bias, solved.bias)
    again = Tuned(clip, data.classnames)
    assert fit(again, data, progress=False, checkpoint=tmp_path/'c').losses == done.losses
    assert torch.equal(again.weight, tuned.weight)
