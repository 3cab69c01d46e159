"""ProVP and re-formation beyond their goldens: the ends of alpha, few tokens, fixed views, the
best epoch, and other learners with an anchor."""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt.check import check_learner
from clipprompt.deep import VPT, MaPLe
from clipprompt.learner import PromptLearner, Recipe
from clipprompt.prompts import Given
from clipprompt.protocols import Method
from clipprompt.provp import Progressive, ProVP, ProVPRef, Reformed, provp_template, reformation
from clipprompt.evaluation import evaluate
from clipprompt.training import fit
from helpers import images, one_line

NAMES = ['polar bear', 'key', 'cart']

class VPTRef(Reformed, VPT): method = 'vpt-ref'
class MaPLeRef(Reformed, MaPLe): method = 'maple-ref'


def features_and_grad(learner, x, prompts):
    f = learner.vision(x, prompts)
    return f, *torch.autograd.grad(f.square().sum(), learner.visual_ctx.tokens)


@pytest.mark.parametrize('n', [1, 3, 4, 5, 8])
def test_ends_of_alpha(clip, n):
    """0 is VPT-deep, 1 is VPT-shallow, with few tokens as with many (the released code overwrites
    patches below five)"""
    for alpha, same in ((0., Given), (1., lambda tokens: Given(tokens[:1]))):
        learner = ProVP(clip, NAMES, n_visual=n, alpha=alpha).double()
        x, prompts = images(clip), learner.visual_ctx
        f, grad = features_and_grad(learner, x, prompts)
        g, other = features_and_grad(learner, x, same(prompts.tokens))
        torch.testing.assert_close(f, g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)
        assert grad[0].abs().max() > 0 and (grad[1:].abs().max() > 0) == (alpha < 1)


def test_nothing_stops_the_gradient_of_what_is_carried(clip):
    "With a large alpha the first tokens are felt in the last block: finite differences"
    learner = ProVP(clip, NAMES, n_visual=2, alpha=.6).double()
    f = lambda: learner.vision(images(clip), learner.visual_ctx).square().sum()
    (grad,) = torch.autograd.grad(f(), learner.visual_ctx.tokens)
    for at in ((0, 0, 3), (1, 1, 5), (2, 0, 7)):
        with torch.no_grad():
            learner.visual_ctx.tokens[at] += 1e-5
            up = f()
            learner.visual_ctx.tokens[at] -= 2e-5
            down = f()
            learner.visual_ctx.tokens[at] += 1e-5
        assert (up-down).item()/2e-5 == pytest.approx(grad[at].item(), rel=1e-6)


def test_start_and_size():
    assert Progressive(50, 768, 12).tokens.shape == (12, 50, 768)
    assert 0 < .0665190 - Progressive(50, 768, 12).tokens.abs().max().item() < 1e-5
    assert torch.equal(Progressive(2, 8, 3, seed=4).tokens, Progressive(2, 8, 3, seed=4).tokens)
    assert not torch.equal(Progressive(2, 8, 3, seed=4).tokens, Progressive(2, 8, 3, seed=5).tokens)


@pytest.mark.parametrize('setting,shots,epochs,lr,decay', [
    ('few-shot', 1, 50, .1, 1e-3), ('few-shot', 2, 100, .1, 5e-4), ('few-shot', 4, 100, .1, 5e-4),
    ('few-shot', 8, 200, .1, 5e-4), ('few-shot', 16, 200, .1, 5e-4),
    ('base-to-new', 16, 100, .1, 1e-3)])
def test_recipes(setting, shots, epochs, lr, decay):
    for cls in (ProVP, ProVPRef):
        r = cls.recipe(setting, shots)
        assert (r.epochs, r.lr, r.weight_decay, r.batch_size, r.momentum,
                r.select) == (epochs, lr, decay, 32, .9, 'last')
        assert 'ProVP' in r.source


def test_templates(photos, half):
    for name in ('OxfordPets', 'oxford_pets'):
        assert provp_template(name) == 'a type of pet, a photo of a {}.'
    assert provp_template('caltech101') == 'a photo of a {}.'
    assert provp_template('dtd') == provp_template('DescribableTextures') == 'a texture of {}.'
    photos_of_food = replace(photos, name='food101')
    method = Method(ProVPRef, dict(n_visual=2), Recipe(epochs=1))
    learner = method.train(half, photos_of_food, seed=7)
    # the seed reaches a mixed class
    assert learner.templates == ['a type of food, a photo of {}.'] and learner.hparams['seed'] == 7
    own = Method(ProVPRef, dict(n_visual=2, templates='{} here'),
                 Recipe(epochs=1)).train(half, photos_of_food, seed=7)
    # a sentence that was given stays
    assert own.templates == ['{} here']


# ---- re-formation --------------------------------------------------------------------------------

def test_reformation_by_hand():
    g = torch.Generator().manual_seed(0)
    f, z = F.normalize(torch.randn(2, 5, 7, generator=g, dtype=torch.float64), dim=-1)
    e = lambda i, j: torch.exp(f[i] @ z[j])
    by_hand = -sum(torch.log(e(i, i)/sum(e(i, j) for j in range(5))) for i in range(5))/5
    assert reformation(f, z).item() == pytest.approx(by_hand.item(), rel=1e-12)
    # one direction
    assert reformation(f, z).item() != pytest.approx(reformation(z, f).item(), rel=1e-3)


@pytest.mark.parametrize('cls', [VPTRef, MaPLeRef])
def test_an_anchor_for_others(cls):
    "The composition keeps the whole contract: save and load, other classes, determinism"
    assert (check_learner(cls).result == 'passed').all()


def test_given_frozen_features_change_nothing(clip):
    learner, x, y = ProVPRef(clip, NAMES, n_visual=3,
                             weight=.7).double(), images(clip, 3), torch.arange(3)
    z = learner.frozen_image(x)
    assert not z.requires_grad and torch.equal(learner.loss(x, y), learner.loss(x, y, z))
    terms = learner.loss_terms(x, y)
    assert terms['ref'].item() == pytest.approx(reformation(learner.image_features(x), z).item())
    assert torch.equal(terms['xe'] + .7*terms['ref'], learner.loss(x, y))
    alone = ProVPRef(clip, NAMES, n_visual=3, weight=0.).double().loss(x, y)
    assert torch.equal(alone, ProVP(clip, NAMES, n_visual=3).double().loss(x, y))


def test_fixed_views_give_their_frozen_features(half, photos, monkeypatch):
    "Each step is handed the frozen features of just its augmented pictures"
    learner, seen = ProVPRef(half, photos.classnames, n_visual=2), []
    def loss_terms(self, images, labels, frozen=None):
        seen.append((images, frozen))
        return terms(self, images, labels, frozen)
    terms = Reformed.loss_terms
    monkeypatch.setattr(Reformed, 'loss_terms', loss_terms)
    data = photos.few_shot(4, 1)
    fit(learner, data, Recipe(lr=.01, epochs=4, batch_size=5), seed=3, progress=False, views=2)
    for x, z in seen: torch.testing.assert_close(learner.frozen_image(x), z)
    n = len(seen)//4
    pictures = [torch.cat([x for x, _ in seen[i*n:(i+1)*n]]) for i in range(4)]
    same = lambda a, b: sum(any(torch.equal(x, y) for y in b) for x in a)
    # two views, in turn; each epoch drops another rest
    assert same(pictures[0], pictures[2]) >= len(pictures[0])-4
    assert same(pictures[0], pictures[1]) == 0
    seen.clear(); fit(learner, data, Recipe(lr=.01, epochs=1, batch_size=5), progress=False)
    # fresh augmentation: computed on the spot
    for x, z in seen: torch.testing.assert_close(learner.frozen_image(x), z)


# ---- the best epoch on test ----------------------------------------------------------------------

def test_best_on_test_is_kept_and_recorded(half, photos, tmp_path):
    data = photos.few_shot(3, 1)
    recipe = Recipe(lr=.3, epochs=5, batch_size=6, select='best_on_test')
    learner = ProVP(half, photos.classnames, n_visual=2)
    history = fit(learner, data, recipe, seed=1, progress=False)
    assert len(history.scores) == 5
    assert history.recipe.select == 'best_on_test'
    assert evaluate(learner, data).accuracy == max(history.scores)
    # stopped after three epochs, taken up again
    stopped = ProVP(half, photos.classnames, n_visual=2)
    def interrupt(self, batch, optimizer, step=PromptLearner.training_step):
        interrupt.steps += 1
        if interrupt.steps > 6: raise KeyboardInterrupt
        return step(self, batch, optimizer)
    interrupt.steps = 0
    stopped.training_step = interrupt.__get__(stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, data, recipe, seed=1, checkpoint=tmp_path/'c', progress=False)
    again = ProVP(half, photos.classnames, n_visual=2)
    assert fit(again, data, recipe, seed=1, checkpoint=tmp_path/'c',
               progress=False).scores == history.scores
    assert torch.equal(again.visual_ctx.tokens, learner.visual_ctx.tokens)
    fresh = ProVP(half, photos.classnames, n_visual=2)
    assert not fit(fresh, data, Recipe(epochs=1), progress=False).scores


def test_bad_input(clip):
    for make, says in ((lambda: ProVP(clip, NAMES, alpha=1.1),
                        ['alpha',
                         'between 0']), (lambda: ProVP(clip, NAMES, n_visual=0), ['at least one']),
                       (lambda: ProVP(clip, NAMES, templates='a photo'), ['exactly one {}']),
                       (lambda: Recipe(select='best'), ["select 'best'", 'best_on_test'])):
        with pytest.raises(ValueError) as e: make()
        one_line(e, *says)
