"CoPrompt: MaPLe with adapters, agreeing with other descriptions and with another view."
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt import steps
from clipprompt.check import check_learner
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.coprompt import (Adapted, Adapter, Agreeing, CoPrompt, disagreement,
                                 seven_sentences)
from clipprompt.data import ENSEMBLE
from clipprompt.deep import MaPLe
from clipprompt.hooks import Hook
from clipprompt.learner import Recipe
from clipprompt.pictures import Augmented, mixed, normalised
from clipprompt.steps import Feed
from clipprompt.training import fit
from helpers import images, one_line

NAMES = ['cat', 'old shopping cart', 'traffic light']
SAID = {'cat': ['whiskers', 'a cat asleep'], 'old_shopping_cart': ['a basket', 'four wheels'],
        'traffic light': ['red over green', 'a pole']}
BATCH = torch.tensor([0, 2, 1, 0])

class AgreeingCoOp(Agreeing, CoOp): method = 'agreeing-coop'

def moved(learner):
    g = torch.Generator().manual_seed(1)
    for p in learner.parameters(): p.data += .1*torch.randn(p.shape, generator=g).to(p)
    return learner

def grads(learner, *batch):
    loss = learner.loss(*batch)
    names, params = zip(*learner.named_parameters())
    return loss, dict(zip(names, torch.autograd.grad(loss, params)))

# ---- what it is ----------------------------------------------------------------------------------

def test_without_adapters_and_weight_it_is_maple(clip):
    x = images(clip)
    ours = CoPrompt(clip, NAMES, weight=0., image_ratio=0., text_ratio=0., seed=3).double()
    theirs = MaPLe(clip, NAMES, seed=3).double()
    moved(theirs)
    ours.load_state_dict(ours.state_dict() | theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    (a, g), (b, h) = grads(ours, x, BATCH), grads(theirs, x, BATCH)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name in h: torch.testing.assert_close(g[name], h[name], rtol=1e-9, atol=1e-12)
    assert not any(g[name].any() for name in g if name.startswith('adapter'))

def test_the_start_is_maples(clip):
    ours, theirs = CoPrompt(clip, NAMES, seed=2), MaPLe(clip, NAMES, seed=2)
    state = ours.state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    other = CoPrompt(clip, NAMES, seed=5).state_dict()
    assert all(not torch.equal(state[k], other[k]) for k in state if k.startswith('adapter'))
    assert not torch.equal(state['adapter_image.up.weight'], state['adapter_text.up.weight'])
    E = clip.embed_dim
    assert sum(p.numel() for p in ours.parameters()) == 4*E*(E//4) + sum(
        p.numel() for p in theirs.parameters())

def test_adapter_by_hand():
    adapter, x = Adapter(16, .2).double(), torch.randn(5, 16, dtype=torch.float64)
    hidden = (x @ adapter.down.weight.T).clamp(min=0)
    want = .2*(hidden @ adapter.up.weight.T).clamp(min=0) + .8*x
    torch.testing.assert_close(adapter(x), want/want.norm(dim=-1, keepdim=True))

def test_terms_by_hand(clip):
    x, second = images(clip), F.normalize(torch.randn(4, clip.embed_dim).double(), dim=-1)
    learner = moved(CoPrompt(clip, NAMES, descriptions=SAID, weight=3.).double())
    f, t = learner.image_features(x), learner.text_features()
    for k in (0, 1):
        learner.picked = k
        texts = learner.frozen_text([SAID[n][k] for n in SAID])
        want = 2 - (t*texts).sum(-1).mean() - (f*second).sum(-1).mean()
        terms = learner.loss_terms(x, BATCH, second)
        torch.testing.assert_close(terms['consistency'], want)
        torch.testing.assert_close(learner.loss(x, BATCH, second), terms['ce'] + 3*want)
        torch.testing.assert_close(terms['ce'], F.cross_entropy(learner(x), BATCH))
    squares = CoPrompt(clip, NAMES, descriptions=SAID, distance='mse').double()
    squares.load_state_dict(learner.state_dict())
    squares.picked = 1
    torch.testing.assert_close(squares.loss_terms(x, BATCH, second)['consistency'],
                               want*2/clip.embed_dim)

def test_squares_are_cosines_of_another_weight():
    a, b = (F.normalize(torch.randn(7, 12).double(), dim=-1) for _ in range(2))
    torch.testing.assert_close(disagreement(a, b, 'mse'), disagreement(a, b)/6)

def test_consistency_does_not_read_labels(clip):
    x, learner = images(clip), CoPrompt(clip, NAMES).double()
    learner.picked = 2
    one, two = (learner.loss_terms(x, y) for y in (BATCH, BATCH.roll(1)))
    assert one['consistency'] == two['consistency'] and one['ce'] != two['ce']

def test_one_number_is_picked_in_a_step(clip, monkeypatch):
    "For all classes, every description in its turn, from torch's generator alone"
    x, learner = images(clip), CoPrompt(clip, NAMES, descriptions=SAID).double()
    draws, draw = [], torch.randint
    def counted(*args, **how):
        draws.append(args)
        return draw(*args, **how)
    monkeypatch.setattr(torch, 'randint', counted)
    def losses(seed):
        torch.manual_seed(seed)
        return [learner.loss(x, BATCH).item() for _ in range(8)]
    first = losses(0)
    assert len(draws) == 8 and all(args == (2, ()) for args in draws)
    assert losses(0) == first and len(set(first)) == 2
    both = set()
    for learner.picked in (0, 1): both.add(learner.loss(x, BATCH).item())
    assert both == set(first)

def test_descriptions_run_once(clip, monkeypatch):
    learner = CoPrompt(clip, NAMES, descriptions=SAID).double()
    before = learner.frozen_descriptions()
    assert before.shape == (3, 2, clip.embed_dim) and not before.requires_grad
    monkeypatch.setattr(type(learner.text), '__call__', None)   # no tower runs again
    assert torch.equal(learner.frozen_descriptions(), before)

def test_sentences_in_words_of_the_backbone():
    assert seven_sentences('a photo of a') == ENSEMBLE
    assert seven_sentences('a sketch showing a') == ENSEMBLE
    icons = seven_sentences('an icon of a')
    assert 'a bad icon of the {}.' in icons and 'an icon of the large {}.' in icons
    assert not any('photo' in t for t in icons) and len(icons) == 7
    assert 'a bad photograph of the {}.' in seven_sentences('a photograph of a')

# ---- the contract --------------------------------------------------------------------------------

@pytest.mark.parametrize('hparams', [{}, dict(distance='mse', descriptions=['{} one.', 'a {}.'])])
def test_contract(hparams): assert set(check_learner(CoPrompt, **hparams).result) == {'passed'}

def test_mixins_around_another_learner():
    class AdaptedCoOp(Adapted, CoOp): method = 'adapted-coop'
    for cls in (AgreeingCoOp, AdaptedCoOp): assert set(check_learner(cls).result) == {'passed'}

def test_without_learned_images_only_words_agree(clip):
    learner = AgreeingCoOp(clip, NAMES).double()
    assert learner.reads == () and CoPrompt(clip, NAMES).reads == ('second',)
    learner.picked = 0
    want = disagreement(learner.text_features(), learner.frozen_descriptions()[:, 0])
    torch.testing.assert_close(learner.loss_terms(images(clip), BATCH)['consistency'], want)

def test_other_names_need_no_descriptions(clip, tmp_path):
    learner, x = moved(CoPrompt(clip, NAMES, descriptions=SAID).double()).eval(), images(clip)
    other = learner.for_classes(['umbrella', 'cat'])
    with torch.no_grad():
        torch.testing.assert_close(other(x)[:, 1], learner(x)[:, 0])
        learner.save(tmp_path/'p.safetensors')
        again = CoPrompt.load(tmp_path/'p.safetensors', clip).eval()
        assert torch.equal(again(x), learner(x)) and again.hparams == learner.hparams
    with pytest.raises(ValueError) as e: other.loss(x, BATCH % 2)
    one_line(e, "'umbrella'", 'templates')

@pytest.mark.parametrize('given,says', [
    (dict(descriptions={'cat': ['a', 'b'], 'dog': ['c']}), "'dog' has 1"),
    (dict(descriptions={'cat': 'one sentence'}), 'give a list'),
    (dict(descriptions={'cat': []}), 'at least one'), (dict(descriptions={}), 'no descriptions'),
    (dict(descriptions=[]), 'no template'), (dict(descriptions=['a cat']), 'exactly one {}'),
    (dict(descriptions='a cat'), 'exactly one {}'),
    (dict(distance='l1'), "use 'cosine' or 'mse'"), (dict(image_ratio=1.5), 'image_ratio'),
    (dict(text_ratio=float('nan')), 'text_ratio'), (dict(depth=9), 'use 1 to')])
def test_bad_input(clip, given, says):
    with pytest.raises(ValueError) as e: CoPrompt(clip, NAMES, **given)
    one_line(e, says)

@pytest.mark.parametrize('mixin', [Agreeing, Adapted])
def test_class_features_of_each_image_are_refused(clip, mixin):
    cls = type('Bad', (mixin, CoCoOp), dict(method='bad'))
    with pytest.raises(ValueError) as e: cls(clip, NAMES)
    one_line(e, 'depend on the image', 'another learner')

# ---- the second view -----------------------------------------------------------------------------

RECIPE = Recipe(lr=.01, epochs=3, batch_size=4, warmup_epochs=0)

@pytest.fixture(scope='module')
def few(photos): return photos.few_shot(2, 0)

class TwoViews(MaPLe):
    method, reads = 'two-views', ('second', 'frozen')

def batches(clip, data, cls, recipe, seed=0, first=1, workers=None):
    feed = Feed(cls(clip, data.classnames), data, recipe, seed, first, workers)
    return [list(feed.epoch(epoch)) for epoch in range(first, recipe.epochs+1)]

def same(a, b):
    return all(torch.equal(x, y) for one, two in zip(a, b) for s, t in zip(one, two)
               for x, y in zip(s, t))

@pytest.mark.parametrize('views', [None, 2, 3])
def test_others_read_the_same_batches(half, few, views):
    recipe = replace(RECIPE, views=views)
    both, plain = (batches(half, few, cls, recipe) for cls in (TwoViews, MaPLe))
    cut = [[step[:2] for step in epoch] for epoch in both]
    assert same(cut, plain) and len(plain[0][0]) == 2

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('views', [None, 3])
def test_the_second_view_is_of_the_same_pictures_and_repeats(half, few, views, workers):
    recipe = replace(RECIPE, views=views)
    found = batches(half, few, TwoViews, recipe)
    assert same(found[1:], batches(half, few, TwoViews, recipe, first=2, workers=workers))
    for epoch in found:
        for _, _, second, frozen in epoch:
            assert second.shape == frozen.shape == (4, half.embed_dim)
            torch.testing.assert_close(second.norm(dim=-1), torch.ones(4))
            assert not torch.allclose(second, frozen, atol=1e-3)

def test_a_new_second_view_is_drawn_from_another_seed(half, few):
    learner = TwoViews(half, few.classnames)
    feed = Feed(learner, few, RECIPE, 5, 1)
    again = Augmented(feed.pictures, mixed(5, 2))
    for epoch in (1, 2):
        order = steps.shuffled(len(few.train), 4, 5, epoch)
        for (_, labels, second, _), at in zip(feed.epoch(epoch), order):
            pixels = torch.stack([again[epoch, i][0] for i in at.tolist()])
            assert torch.equal(second, learner.frozen_image(normalised(pixels, half)))
            assert torch.equal(labels, feed.labels[at])

def test_a_fixed_second_view_is_the_next_one(half, few, monkeypatch):
    "Each view passes the frozen tower once"
    made, frozen = [], steps.frozen_features
    def counted(learner, pictures, seed, view, **how):
        made.append(view)
        return frozen(learner, pictures, seed, view, **how)
    monkeypatch.setattr(steps, 'frozen_features', counted)
    recipe = replace(RECIPE, views=2, epochs=4)
    feed = Feed(TwoViews(half, few.classnames), few, recipe, 0, 1)
    for epoch in (1, 2, 3, 4):
        order = steps.shuffled(len(few.train), 4, 0, epoch)
        for (_, _, second, first), at in zip(feed.epoch(epoch), order):
            mine, other = (1, 2) if epoch % 2 else (2, 1)
            assert torch.equal(first, feed.views[mine, False][at])
            assert torch.equal(second, feed.views[other, False][at])
    assert sorted(made) == [1, 2]

def test_of_kept_features_the_second_is_the_next_view(half, few):
    class Words(CoOp): method, reads = 'words', ('second',)
    feed = Feed(Words(half, few.classnames), few, replace(RECIPE, views=2), 0, 1)
    at = steps.shuffled(len(few.train), 4, 0, 1)[0]
    features, _, second = next(iter(feed.epoch(1)))
    assert torch.equal(features, feed.views[1, False][at])
    assert torch.equal(second, feed.views[2, False][at])

def test_one_fixed_view_is_refused(half, few):
    learner = CoPrompt(half, few.classnames)
    with pytest.raises(ValueError) as e: fit(learner, few, RECIPE, views=1, progress=False)
    one_line(e, 'coprompt compares two views', 'views=2')

@pytest.mark.parametrize('views', [None, 2])
def test_a_resumed_run_has_the_same_bits(half, few, views, tmp_path):
    "Second views and drawn descriptions included"
    recipe, file = replace(RECIPE, views=views), tmp_path/'c.safetensors'
    def trained(epochs, **how):
        learner = CoPrompt(half, few.classnames)
        report = fit(learner, few, recipe, progress=False, **how)
        return report.losses, learner.state_dict()
    losses, whole = trained(3)
    class Enough(Exception): pass
    class Stop(Hook):
        def before_epoch(self, run, epoch):
            if epoch == 3: raise Enough
    with pytest.raises(Enough): trained(3, checkpoint=file, hooks=[Stop()])
    again, resumed = trained(3, checkpoint=file)
    assert again == losses
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())

def test_undescribed_classes_stop_a_training_before_it_starts(half, few):
    learner = CoPrompt(half, few.classnames, descriptions={'disc': ['round']})
    with pytest.raises(ValueError) as e: fit(learner, few, RECIPE, progress=False)
    one_line(e, 'say nothing of')

def test_recipe():
    r = CoPrompt.recipe()
    assert (r.lr, r.epochs, r.batch_size, r.randaugment) == (.0035, 8, 4, (2, 10))
    assert r.crop_scale == (1., 1.) and r.flip is False
    assert CoPrompt.affordable() == r and CoPrompt.published('cross-dataset') == {}
