"""Adapters, caches and probes: starts and ends, what goldens cannot show, the search of
Tip-Adapter, `fit` with a `prepare` that solves and then trains, files, checkpoints, errors.

Recorded runs of the authors' code are in test_goldens.py.
"""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt.adapters import (CONFIGS, ClipAdapter, LPPlusPlus, TaskRes, TipAdapter,
                                 TipAdapterF, best_mix, cache_logits, config, cropped, grid,
                                 step_sizes)
from clipprompt.check import _small_data
from clipprompt.data import ENSEMBLE
from clipprompt.evaluation import evaluate, frozen_features
from clipprompt.steps import lr_at
from clipprompt.towers import VisionTower
from clipprompt.training import fit
from clipprompt.zeroshot import ZeroShot
from helpers import one_line, tiny_clip

NAMES = ['cat', 'old shopping cart', 'traffic light', 'key']
ALL = [ClipAdapter, TipAdapter, TipAdapterF, TaskRes, LPPlusPlus]
FIXED = [TipAdapter, TipAdapterF, TaskRes, LPPlusPlus]

@pytest.fixture(scope='module')
def clip(): return tiny_clip()

@pytest.fixture(scope='module')
def data():
    "Two training pictures of each class and one more of the last; one to test, two to choose on"
    small = _small_data(NAMES)
    extra = replace(small.train[3], path='100')
    return replace(small, train=[*small.train, extra], val=small.train[:8])

@pytest.fixture(scope='module')
def features(clip):
    g = torch.Generator().manual_seed(0)
    f = F.normalize(torch.randn(12, 16, generator=g), dim=-1)
    return f, torch.arange(12) % 4

def zero_shot(clip, f): return ZeroShot(clip, NAMES)(f)

def alike(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- starts and ends -----------------------------------------------------------------------------

@torch.no_grad()
def test_clip_adapter_ends(clip, features):
    f, _ = features
    alike(ClipAdapter(clip, NAMES, ratio=0.)(f), zero_shot(clip, f))
    learner = ClipAdapter(clip, NAMES, ratio=1.)
    net = F.relu(learner.up(F.relu(learner.down(f))))
    alike(learner.adapted(f), F.normalize(net, dim=-1))
    for scale in (.1, 7.): alike(learner.adapted(scale*f), learner.adapted(f))
    assert (net >= 0).all()

def test_clip_adapter_start(clip):
    "PyTorch's own: uniform between one over the root of the width that enters, from the seed"
    learner = ClipAdapter(clip, NAMES, reduction=4, seed=3)
    assert learner.down.weight.shape == (4, 16) and learner.up.weight.shape == (16, 4)
    for layer, width in ((learner.down, 16), (learner.up, 4)):
        assert layer.bias is None
        assert .8*width**-.5 < layer.weight.abs().max() <= width**-.5
    torch.manual_seed(3)
    assert torch.equal(learner.down.weight, torch.nn.Linear(16, 4, bias=False).weight)

@torch.no_grad()
def test_tip_ends(clip, features):
    f, y = features
    alike(TipAdapter(clip, NAMES, alpha=0.)(f), zero_shot(clip, f))
    blunt = TipAdapter(clip, NAMES, alpha=2., beta=0., counts=[1, 3, 1, 0])
    alike(blunt(f) - zero_shot(clip, f), torch.tensor([2., 6., 2., 0.]).expand(12, 4))
    sharp = TipAdapter(clip, NAMES, alpha=1e4, beta=1e5, counts=[3, 3, 3, 3])
    sharp.keys.copy_(f[y.argsort(stable=True)])
    assert torch.equal(sharp(f).argmax(-1), y)

def test_tip_keys(clip, data):
    "The mean of the views as the tower makes them, scaled then; classes together, any number"
    learner = TipAdapter(clip, NAMES, key_views=3, seed=5)
    learner.prepare(data)
    pictures = cropped(learner, data)
    assert 'scale=(0.5, 1.0)' in repr(pictures.transform)
    raw = [frozen_features(learner, pictures, 5, epoch, raw=True) for epoch in (1, 2, 3)]
    keys = F.normalize(sum(raw)/3, dim=-1)
    assert learner.hparams['counts'] == [2, 2, 2, 3] and learner.keys.shape == (9, 16)
    at = pictures.labels.argsort(stable=True)
    alike(learner.keys, keys[at])
    assert torch.equal(learner.values.argmax(-1), pictures.labels[at])
    assert 'Flip' not in repr(cropped(learner, replace(data, flip=False)).transform)

def test_f_without_a_rate_is_tip(clip, data):
    free, trained = (cls(clip, NAMES, key_views=2) for cls in (TipAdapter, TipAdapterF))
    fit(free, data, progress=False)
    recipe = replace(TipAdapterF.recipe(), lr=0., epochs=2, views=2)
    fit(trained, data, recipe, progress=False)
    assert torch.equal(free.keys, trained.keys)
    fit(trained, data, replace(recipe, lr=.1), progress=False)
    assert not torch.equal(free.keys, trained.keys)
    assert (trained.keys.norm(dim=-1)-1).abs().max() > 1e-4    # nothing scales them again

def test_taskres_start_and_slope(clip, features):
    f, y = features
    learner = TaskRes(clip, NAMES)
    assert not learner.residual.any()
    with torch.no_grad(): alike(learner(f), zero_shot(clip, f))
    learner.residual.data.normal_(generator=torch.Generator().manual_seed(1))
    slope, = torch.autograd.grad(learner.loss(f, y), [learner.residual])
    moved = learner.base + .5*learner.residual
    assert F.cosine_similarity(slope, moved, dim=-1).abs().max() < 1e-4
    half = TaskRes(clip, NAMES, scale=.25)
    half.residual.data.copy_(2*learner.residual)               # the same features
    other, = torch.autograd.grad(half.loss(f, y), [half.residual])
    torch.testing.assert_close(other, slope/2, rtol=1e-3, atol=1e-6)

@torch.no_grad()
def test_taskres_base_is_not_scaled(clip):
    two = ['a photo of a {}.', '{}']
    learner = TaskRes(clip, NAMES, templates=two)
    raw = [learner.frozen_text([t.replace('{}', c) for c in NAMES], raw=True) for t in two]
    alike(learner.base, (raw[0]+raw[1])/2)

def test_lp_start(clip, features):
    f, y = features
    f, y = f[:-1], y[:-1]                                      # unequal numbers
    learner = LPPlusPlus(clip, NAMES, seed=2)
    learner.start(f, y)
    W, cosines = learner.text_features(), []
    for c in range(4):
        mine = f[y == c]
        alike(learner.weight[c], mine.sum(0))                  # the sum, not the mean
        cosines.append((mine @ W[c]).mean())
    alike(learner.alpha, 250*torch.stack(cosines).mean().expand(4))
    assert learner.bias.abs().max() <= 16**-.5
    assert torch.equal(learner.bias, LPPlusPlus(clip, NAMES, seed=2).bias)
    assert not torch.equal(learner.bias, LPPlusPlus(clip, NAMES, seed=3).bias)

def test_lp_step_sizes(features):
    f, W = features[0].double(), F.normalize(torch.randn(4, 16).double(), dim=-1)
    probe, alpha = step_sizes(f, W)
    assert probe == pytest.approx(4*12/torch.linalg.matrix_norm(f, 2)**2)
    assert alpha == pytest.approx(12/(4*max(((f @ w)**2).sum() for w in W)))
    assert step_sizes(3*f, W) == pytest.approx((probe/9, alpha/9))
    wide = f[:, :5]                                            # more pictures than width
    assert step_sizes(wide, W[:, :5])[0] == pytest.approx(48/torch.linalg.matrix_norm(wide, 2)**2)

def test_lp_alpha_moves_at_every_tenth_step(clip, features):
    f, y = features
    def alpha(steps, **kw):
        learner = LPPlusPlus(clip, NAMES, steps=steps, **kw)
        learner.start(f, y)
        losses = learner.descend(f, y)
        assert len(losses) == steps
        return learner.alpha.detach()
    assert torch.equal(alpha(0), alpha(9))
    assert not torch.equal(alpha(9), alpha(10)) and torch.equal(alpha(10), alpha(19))
    assert not torch.equal(alpha(10), alpha(10, reset=True))

@pytest.mark.parametrize('reset', [False, True])
def test_lp_alpha_gradient_by_hand(clip, features, reset):
    "Twenty steps written out: the sum of all gradients so far, or the last one"
    f, y = features
    learner = LPPlusPlus(clip, NAMES, steps=20, reset=reset).double()
    f = f.double()
    learner.start(f, y)
    w, b, a = (p.detach().clone().requires_grad_()
               for p in (learner.weight, learner.bias, learner.alpha))
    W, speed, total = learner.text_features().double(), [0., 0.], 0.
    rate, alpha_rate = step_sizes(f, W)
    for step in range(1, 21):
        loss = F.cross_entropy(f @ w.T + b + a*(f @ W.T), y)
        *slopes, slope = torch.autograd.grad(loss, [w, b, a])
        total = slope if reset else total+slope
        for i, p in enumerate((w, b)):
            speed[i] = .9*speed[i] + slopes[i]
            p.data -= rate*speed[i]
        if step % 10 == 0: a.data -= alpha_rate*total
    learner.descend(f, y)
    for ours, theirs in ((learner.weight, w), (learner.bias, b), (learner.alpha, a)):
        torch.testing.assert_close(ours, theirs)

def test_lp_keeps_the_best_step_and_of_equals_the_later(clip, features):
    f, y = features
    noise = f + .5*torch.randn(f.shape, generator=torch.Generator().manual_seed(1))
    val = F.normalize(noise, dim=-1), y
    def after(steps, val=None):
        learner = LPPlusPlus(clip, NAMES, steps=steps)
        learner.start(f, y)
        learner.descend(f, y, val)
        return learner
    right = [(after(n)(val[0]).argmax(-1) == y).sum().item() for n in range(1, 16)]
    best = max(n for n, hits in enumerate(right, 1) if hits == max(right))
    assert torch.equal(after(15, val).weight, after(best).weight)


# ---- the search ----------------------------------------------------------------------------------

def test_grid():
    assert grid(7, 200)[:2] == [.1, .1+6.9/200] and len(grid(7, 200)) == 200
    assert max(grid(3, 20)) < 3

def test_of_equals_the_smallest_pair():
    zero, none = torch.eye(3), torch.zeros(3, 0)
    assert best_mix(zero, none, torch.zeros(0, 3), torch.arange(3), [5., 9.], [2., 4.]) == \
        (5., 2., 100.)

def test_search_finds_what_looking_at_each_pair_finds(features):
    f, y = features
    g = torch.Generator().manual_seed(4)
    zero, affinity = torch.randn(12, 4, generator=g), torch.rand(12, 8, generator=g)*2-1
    values, betas, alphas = F.one_hot(torch.arange(8) % 4, 4).float(), grid(9, 7), grid(4, 5)
    pairs = {(b, a): ((zero + a*cache_logits(affinity, values, b)).argmax(-1) == y).sum().item()
             for b in betas for a in alphas}
    best = max(pairs, key=pairs.get)                           # the first of equals
    found = best_mix(zero, affinity, values, y, betas, alphas)
    assert found == (*best, 100*pairs[best]/12)

def test_search_takes_validation_pictures_and_holds_what_is_given(clip, data):
    learner = TipAdapter(clip, NAMES, search=True, key_views=1)
    fit(learner, data, progress=False)
    assert learner.hparams['beta'] in grid(7, 200) and learner.hparams['alpha'] in grid(3, 20)
    found = evaluate(learner, data, 'val').accuracy
    assert found == pytest.approx(learner.search(data))
    held = TipAdapter(clip, NAMES, alpha=2.5, search=True, key_views=1)
    held.prepare(data)
    assert held.hparams['alpha'] == 2.5 and held.hparams['beta'] in grid(7, 200)
    with pytest.raises(ValueError) as e:
        TipAdapter(clip, NAMES, search=True, key_views=1).prepare(replace(data, val=[]))
    one_line(e, 'no val pictures')

def test_published_numbers_are_the_data_sets():
    assert len(CONFIGS) == 11 and config('pictograms') == config('imagenet') == (7, 3, 1., 1.17)
    assert TipAdapterF.published(dataset='oxford_flowers') == dict(alpha=10., beta=1.)
    assert TipAdapterF.recipe(dataset='eurosat').epochs == 100
    assert TaskRes.published(dataset='oxford_flowers') == dict(scale=1.)
    assert TaskRes.recipe(shots=4).epochs == 100 and TaskRes.recipe(dataset='imagenet').lr == 2e-4
    assert [ClipAdapter.recipe(shots=k).epochs for k in (1, 4, 16)] == [50, 100, 200]
    # selection on test is asked for, never silent
    assert all(cls.recipe().select == 'last' for cls in ALL)
    assert LPPlusPlus.published() == dict(select='best_on_val')

def test_f_schedule_is_a_cosine_per_step():
    recipe = replace(TipAdapterF.recipe(), epochs=2)
    rates = [lr_at(recipe, 1 + i//2, i % 2/2) for i in range(4)]
    want = [.001*(1+torch.cos(torch.tensor(torch.pi*i/4)).item())/2 for i in range(4)]
    assert rates == pytest.approx(want)

def test_seven_sentences_on_imagenet(clip, data):
    on = replace(data, name='imagenet')
    for cls, want in ((TipAdapter, ENSEMBLE), (LPPlusPlus, ENSEMBLE),
                      (TaskRes, [*ENSEMBLE, 'a photo of a {}.'])):
        for _ in range(2):                                     # the list does not grow
            learner = cls(clip, NAMES)
            assert learner.suits(on) == dict(templates=want)
            assert learner.suits(data) == dict(templates=data.template)
    assert len(ENSEMBLE) == 7


# ---- fit, files, checkpoints ---------------------------------------------------------------------

class Stop(Exception): pass

@pytest.mark.parametrize('cls', [ClipAdapter, TipAdapterF, TaskRes])
def test_prepared_trained_cut_off_and_resumed(clip, data, tmp_path, cls):
    "The same bits as a run in one go, after a file as well"
    small = dict(key_views=2) if cls is TipAdapterF else {}
    recipe = replace(cls.recipe(), epochs=4, views=2)
    def make(): return cls(clip, NAMES, **small)
    whole, cut, again = make(), make(), make()
    fit(whole, data, recipe, seed=1, progress=False)
    class AfterTwo:
        def add_scalar(self, tag, value, step):
            if step == 3: raise Stop
    with pytest.raises(Stop):
        fit(cut, data, recipe, seed=1, progress=False, checkpoint=tmp_path/'c.safetensors',
            tracker=AfterTwo())
    run = fit(again, data, recipe, seed=1, progress=False, checkpoint=tmp_path/'c.safetensors')
    assert run.epochs == 4 and again.hparams == whole.hparams
    for a, b in zip(whole.parameters(), again.parameters()): assert torch.equal(a, b)
    whole.save(tmp_path/'p.safetensors')
    loaded = cls.load(tmp_path/'p.safetensors', clip).eval()
    f = torch.randn(3, 16)
    with torch.no_grad(): assert torch.equal(loaded(f), whole(f))

@pytest.mark.parametrize('cls', [TipAdapter, LPPlusPlus])
def test_solved_and_saved(clip, data, tmp_path, cls):
    learner = cls(clip, NAMES)
    run = fit(learner, data, progress=False)
    assert run.epochs == 0
    learner.save(tmp_path/'p.safetensors')
    loaded, f = cls.load(tmp_path/'p.safetensors', clip).eval(), torch.randn(3, 16)
    with torch.no_grad(): assert torch.equal(loaded(f), learner(f))
    assert loaded.hparams == learner.hparams

def test_select_on_validation_in_fit(clip, data):
    learner = TipAdapterF(clip, NAMES, key_views=1)
    recipe = replace(TipAdapterF.recipe(), epochs=3, views=1, select='best_on_val')
    assert len(fit(learner, data, recipe, progress=False).scores) == 3
    lp = LPPlusPlus(clip, NAMES, select='best_on_val', steps=20)
    fit(lp, data, progress=False)
    with pytest.raises(ValueError) as e: fit(lp, replace(data, val=[]), progress=False)
    one_line(e, 'no val pictures')

@pytest.mark.parametrize('cls', ALL)
def test_features_are_kept(clip, data, cls, monkeypatch):
    "With fixed views the image tower sees each picture once per view, however long training is"
    seen, whole = [], VisionTower.__call__
    def count(self, images, *a, **k):
        seen.append(len(images))
        return whole(self, images, *a, **k)
    monkeypatch.setattr(VisionTower, '__call__', count)
    small = dict(key_views=2) if issubclass(cls, TipAdapter) else {}
    learner = cls(clip, NAMES, **small)
    assert not learner.learns_image
    recipe = cls.recipe()
    if recipe.epochs: recipe = replace(recipe, epochs=9, views=2)
    fit(learner, data, recipe, progress=False)
    assert 1 <= len(seen) <= 4


# ---- errors --------------------------------------------------------------------------------------

@pytest.mark.parametrize('cls', FIXED)
def test_no_other_classes(clip, cls):
    with pytest.raises(ValueError) as e: cls(clip, NAMES).for_classes(['cup', 'pen'])
    one_line(e, cls.method, 'cannot be used for other names')

def test_clip_adapter_transfers(clip, features):
    learner = ClipAdapter(clip, NAMES)
    other = learner.for_classes(['pen', 'cat'])
    with torch.no_grad(): alike(other(features[0])[:, 1], learner(features[0])[:, 0])

@pytest.mark.parametrize('cls,bad,said', [
    (ClipAdapter, dict(ratio=1.5), 'ratio'), (ClipAdapter, dict(reduction=0), 'reduction'),
    (TipAdapter, dict(alpha=-1.), 'alpha'), (TipAdapterF, dict(beta=-.1), 'beta'),
    (TipAdapter, dict(key_views=0), 'key_views'), (TipAdapter, dict(counts=[1, 2]), 'counts'),
    (LPPlusPlus, dict(select='best_on_test'), 'select'), (LPPlusPlus, dict(steps=-1), 'steps')])
def test_bad_arguments(clip, cls, bad, said):
    with pytest.raises(ValueError) as e: cls(clip, NAMES, **bad)
    one_line(e, said)

def test_other_numbers_of_keys_than_pictures(clip, data):
    learner = TipAdapter(clip, NAMES, counts=[2, 2, 2, 2], key_views=1)
    with pytest.raises(ValueError) as e: learner.prepare(data)
    one_line(e, 'counts')

def test_a_class_without_pictures(clip, data):
    few = replace(data, train=[i for i in data.train if i.label != 2])
    with pytest.raises(ValueError) as e: fit(LPPlusPlus(clip, NAMES), few, progress=False)
    one_line(e, 'traffic light')
    tip = TipAdapter(clip, NAMES, key_views=1)
    fit(tip, few, progress=False)                              # that class has its text
    assert tip.hparams['counts'] == [2, 2, 0, 3]
