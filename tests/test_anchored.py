"""KgCoOp, ProGrad and PromptSRC beyond their goldens: starts, sentences, what happens at weight 0,
averages over epochs, and other learners with an anchor."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt.anchored import (
    PHOTO_TEMPLATES, Aligned, Consistent, Guided, KgCoOp, ProGrad, PromptSRC, aligned,
    kgcoop_template)
from clipprompt.check import ContractError, check_learner
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.data import PICTOGRAM_TEMPLATES
from clipprompt.deep import IVLP, MaPLe
from clipprompt.hooks import Hook, gaussian
from clipprompt.learner import Recipe
from clipprompt.mudpt import MuDPT
from clipprompt.prompts import phrase_tokens
from clipprompt.protocols import Method
from clipprompt.training import fit
from clipprompt.zeroshot import ZeroShot
from helpers import images, one_line

NAMES = ['polar bear', 'key', 'cart']
PETS = 'a type of pet, a photo of a {}.'

class MuDPTGuided(Guided, MuDPT): method = 'mudpt-guided'
class MaPLeConsistent(Consistent, MaPLe): method = 'maple-consistent'
class IVLPAligned(Aligned, IVLP): method = 'ivlp-aligned'
class CoOpConsistent(Consistent, CoOp): method = 'coop-consistent'


LABELS = torch.tensor([0, 2, 1, 1])

def moved(learner, seed=1, by=.1):
    "The same learner away from its start"
    g = torch.Generator().manual_seed(seed)
    for p in learner.double().parameters(): p.data += by*torch.randn(p.shape, generator=g).double()
    return learner

def step(learner, lr=1e-3):
    "One plain gradient step; the loss before it"
    opt = torch.optim.SGD(learner.parameters(), lr)
    return learner.training_step((images(learner.backbone), LABELS), opt)


# ---- the anchors ---------------------------------------------------------------------------------

def test_anchors_by_hand(clip):
    "The mean over sentences is taken before it is normalised, unlike CLIP's own ensemble"
    learner = PromptSRC(clip, NAMES, templates=['a {}.', 'one {} here'])
    with torch.no_grad():
        raw = torch.stack([learner.frozen_text([t.replace('{}', c) for c in NAMES], raw=True)
                           for t in ('a {}.', 'one {} here')])          # [2, C, E]
    torch.testing.assert_close(learner.anchors(), F.normalize(raw.mean(0), dim=-1))
    clips = ZeroShot(clip, NAMES, learner.templates).text_features()
    assert (learner.anchors()-clips).abs().max() > 1e-4
    assert not learner.anchors().requires_grad
    # other sentences, other anchors: nothing stale is kept
    learner.hparams['templates'] = 'a {}.'
    only = ZeroShot(clip, NAMES, 'a {}.').text_features()
    torch.testing.assert_close(learner.anchors(), only)
    assert learner.for_classes(['teapot']).anchors().shape == (1, clip.embed_dim)


def test_sentences(photos, half):
    assert kgcoop_template('dtd') == 'a photo of a {}, a type of texture.'
    assert kgcoop_template('DescribableTextures') == kgcoop_template('dtd')
    assert kgcoop_template('food101') == 'a photo of {}, a type of food.'
    assert kgcoop_template('caltech101') == 'a photo of a {}.'
    assert len(set(PHOTO_TEMPLATES)) == 60 and all(t.count('{}') == 1 for t in PHOTO_TEMPLATES)
    own = replace(photos, template='a drawing of a {}.')
    pets = replace(photos, name='oxford_pets', template='a photo of a {}, a type of pet.')
    icons = replace(photos, name='pictograms', template='an icon of a {}.')
    want = {
        KgCoOp: ['a drawing of a {}.', 'a photo of a {}, a type of pet.', 'an icon of a {}.'],
        ProGrad: ['a drawing of a {}.', PETS, 'an icon of a {}.'],
        PromptSRC: [PHOTO_TEMPLATES, PHOTO_TEMPLATES, PICTOGRAM_TEMPLATES]}
    for cls, sentences in want.items():
        for data, sentence in zip((own, pets, icons), sentences):
            learner = cls(half, photos.classnames)
            learner.prepare(data)
            assert learner.hparams['templates'] == sentence
            given = cls(half, photos.classnames, templates='{} here')
            given.prepare(data)  # what was given stays
            assert given.templates == ['{} here'] == given.for_classes(['a']).templates
    trained = Method(ProGrad, dict(n_ctx=9), Recipe(epochs=1)).train(half, pets, seed=3)
    assert trained.templates == [PETS] and trained.hparams['seed'] == 3


# ---- KgCoOp --------------------------------------------------------------------------------------

def test_nothing_pulls_at_home(clip):
    "With the words of the sentence as context the distance is 0, and so is its gradient"
    learner = KgCoOp(clip, NAMES, templates='a photo of a {}.').double()
    kg = learner.loss_terms(images(clip), LABELS)['kg']
    assert abs(kg.item()) < 1e-9
    (pull,) = torch.autograd.grad(kg, learner.ctx.tokens)
    assert pull.abs().max() < 1e-6
    away = moved(KgCoOp(clip, NAMES, templates='a photo of a {}.'))
    kg = away.loss_terms(images(clip), LABELS)['kg']
    (pull,) = torch.autograd.grad(kg, away.ctx.tokens)
    assert kg > 1e-6 and pull.abs().max() > 1e-6
    assert torch.equal(away.loss_terms(images(clip, 1), LABELS[:1])['kg'], kg)  # no batch in it


def test_distance_by_hand(clip):
    learner = moved(KgCoOp(clip, NAMES, weight=3.))
    terms = learner.loss_terms(images(clip), LABELS)
    with torch.no_grad(): apart = (learner.text_features()-learner.anchors()).square().sum(-1)
    assert terms['kg'].item() == pytest.approx(apart.mean().item()/2, rel=1e-9)
    assert torch.equal(learner.loss(images(clip), LABELS), terms['ce'] + 3*terms['kg'])


def test_start_of_kgcoop(clip):
    words = phrase_tokens(clip, 'a photo of a')
    assert torch.equal(KgCoOp(clip, NAMES).ctx.tokens[0], words)
    assert KgCoOp(clip, NAMES, ctx_init=None).ctx.tokens.shape == (1, 4, clip.text_width)
    noise = KgCoOp(clip, NAMES, n_ctx=6, ctx_init=None, seed=2).ctx.tokens
    assert torch.equal(noise, CoOp(clip, NAMES, n_ctx=6, seed=2).ctx.tokens)


# ---- ProGrad -------------------------------------------------------------------------------------

def test_projection():
    g, h = torch.tensor([1., 0.]), torch.tensor([-1., 1.])
    assert torch.allclose(aligned(g, h), torch.tensor([.5, .5]))
    assert abs((aligned(g, h)*h).sum()) < 1e-6                       # nothing is left against h
    assert torch.allclose(aligned(g, 100*h), aligned(g, h))          # only the direction of h
    assert torch.allclose(aligned(g, h, .8), .8*aligned(g, h) + .2*g)
    assert torch.equal(aligned(g, -h), g)                            # agreement: bit for bit
    for still in (torch.zeros(2), torch.tensor([0., 1.]), torch.tensor([math.nan, 0.])):
        assert torch.equal(aligned(g, still), g)     # none, a right angle, no number


def test_a_step_by_hand(clip):
    "What SGD is handed is the bent gradient; at weight 0 the step is CoOp's"
    seen = set()
    for seed in range(8):
        learner = moved(ProGrad(clip, NAMES, n_ctx=6), seed, by=.3)
        before = learner.ctx.tokens.detach().clone()
        (g, h), = learner.gradients(learner.loss_terms(images(clip), LABELS))
        loss, returned = learner.loss(images(clip), LABELS), step(learner, .1)
        assert torch.equal(loss, returned)
        along = (g*h).sum()
        want = g if along >= 0 else g - along*h/h.square().sum()
        torch.testing.assert_close(learner.ctx.tokens.data, before - .1*want)
        seen.add(bool(along < 0))
    assert seen == {True, False}, 'both signs were meant to occur'
    free = moved(ProGrad(clip, NAMES, n_ctx=6, weight=0., ctx_init=None))
    coop = CoOp(clip, NAMES, n_ctx=6).double()
    coop.load_state_dict(free.state_dict())
    step(free), step(coop)
    torch.testing.assert_close(free.ctx.tokens, coop.ctx.tokens, rtol=1e-12, atol=1e-14)


def test_each_tensor_has_a_cosine_of_its_own(clip):
    learner = moved(IVLPAligned(clip, NAMES), by=.3)
    pairs = learner.gradients(learner.loss_terms(images(clip), LABELS))
    before = [p.detach().clone() for p in learner.parameters()]
    step(learner, .1)
    assert len(pairs) == 2
    for p, old, (g, h) in zip(learner.parameters(), before, pairs):
        torch.testing.assert_close(p.data, old - .1*aligned(g, h))


def test_start_of_prograd(clip):
    "Zeros, then a token for each word; the comma is a token, so the last word stays fixed"
    learner = ProGrad(clip, NAMES, n_ctx=12, templates=PETS)
    tokens, words = learner.ctx.tokens[0], phrase_tokens(clip, 'a type of pet, a photo of a')
    assert len(words) == 9 and not tokens[:4].any() and torch.equal(tokens[4:], words[:8])
    said = clip.tokenize([f'X X X X {PETS}'.replace('{}', c) for c in NAMES])
    assert torch.equal(learner.sentences.ids, said)
    assert learner.sentences.slots.tolist() == [list(range(1, 13))]*3
    # exactly as many places as words: the sentence is zero-shot's
    exact = ProGrad(clip, NAMES, n_ctx=8, templates=PETS).double()
    zero = ZeroShot(clip, NAMES, PETS).text_features()
    torch.testing.assert_close(exact.text_features().detach(), zero, rtol=1e-6, atol=1e-7)
    csc = ProGrad(clip, NAMES, n_ctx=5, csc=True).ctx.tokens
    assert csc.shape == (1, 3, 5, clip.text_width) and torch.equal(csc[0, 0], csc[0, 2])
    noise = ProGrad(clip, NAMES, ctx_init=None, seed=4)
    assert torch.equal(noise.ctx.tokens, CoOp(clip, NAMES, seed=4).ctx.tokens)
    few = ProGrad(clip, NAMES, n_ctx=2, seed=4)         # too few for the words: noise
    assert torch.equal(few.ctx.tokens, CoOp(clip, NAMES, n_ctx=2, seed=4).ctx.tokens)


def test_prepare_moves_the_start_and_nothing_learned(half, photos):
    learner = ProGrad(half, photos.classnames, n_ctx=9)
    pets = replace(photos, name='oxford_pets', template='a photo of a {}, a type of pet.')
    learner.prepare(pets)
    told = ProGrad(half, photos.classnames, n_ctx=9, templates=PETS)
    assert torch.equal(learner.ctx.tokens, told.ctx.tokens)
    assert torch.equal(learner.sentences.ids, told.sentences.ids)
    learner.ctx.tokens.data += .1
    held = learner.ctx.tokens.detach().clone()
    learner.prepare(photos)
    assert torch.equal(learner.ctx.tokens, held)
    assert torch.equal(learner.sentences.ids, learner.for_classes(photos.classnames).sentences.ids)


def test_recipes():
    kg, b2n = KgCoOp.recipe(), PromptSRC.recipe('base-to-new')
    assert (kg.epochs, kg.batch_size, kg.lr, kg.weight_decay) == (100, 128, .002, 5e-4)
    assert (b2n.epochs, b2n.batch_size, b2n.lr) == (20, 4, .0025)
    assert PromptSRC.recipe().epochs == 50
    epochs = [ProGrad.recipe('few-shot', k).epochs for k in (1, 2, 4, 8, 16)]
    assert epochs == [50, 100, 100, 200, 200]
    assert ProGrad.recipe('few-shot', 16, 'imagenet').epochs == 50
    assert ProGrad.recipe('base-to-new').epochs == 100
    assert ProGrad.recipe('domain-generalisation').epochs == 50
    assert ProGrad.published('few-shot', 16, 'dtd') == dict(weight=.8)
    assert ProGrad.published('few-shot', 4, 'dtd') == ProGrad.published('few-shot', 16) == {}
    assert PromptSRC.published('cross-dataset') == dict(depth_text=3, depth_vision=3, gpa_mean=6.,
                                                        gpa_std=10.)
    assert PromptSRC.published('few-shot', 16, 'eurosat') == dict(gpa_mean=45., gpa_std=5.)
    assert PromptSRC.published('few-shot', 16, 'food101') == dict(gpa_mean=30., gpa_std=30.)


# ---- PromptSRC -----------------------------------------------------------------------------------

def test_consistency_by_hand(clip):
    learner, x = moved(PromptSRC(clip, NAMES, templates=['a {}.', 'one {}.'])), images(clip)
    terms = learner.loss_terms(x, LABELS)
    with torch.no_grad():
        f, w = learner.image_features(x), learner.text_features()
        z, W, s = learner.frozen_image(x), learner.anchors(), clip.logit_scale
        p, q = (s*z @ W.T).softmax(-1), (s*f @ w.T).softmax(-1)
    by_hand = dict(ce=-q[range(4), LABELS].log().mean(), scl_text=(w-W).abs().sum()/W.numel(),
                   scl_image=(f-z).abs().sum()/z.numel(),
                   scl_logits=(p*(p/q).log()).sum()/p.numel())
    for name, value in by_hand.items(): torch.testing.assert_close(terms[name], value)
    whole = terms['ce'] + 25*terms['scl_text'] + 10*terms['scl_image'] + terms['scl_logits']
    torch.testing.assert_close(learner.loss(x, LABELS), whole)
    assert torch.equal(learner.loss(x, LABELS), learner.loss(x, LABELS, z))  # known frozen features


def test_text_at_home(clip):
    "Shallow prompts that are the words of the one sentence: no distance"
    learner = PromptSRC(clip, NAMES, depth_text=1, templates='a photo of a {}.').double()
    terms = learner.loss_terms(images(clip), LABELS)
    assert terms['scl_text'] < 1e-7 and terms['scl_image'] > 1e-4


def test_start_and_depth_of_promptsrc(clip):
    learner = PromptSRC(clip, NAMES)
    assert learner.ctx.tokens.shape == (3, 4, clip.text_width)     # all blocks of a small CLIP
    assert torch.equal(learner.ctx.tokens[0], phrase_tokens(clip, 'a photo of a'))
    twin = IVLP(clip, NAMES, n_ctx=4, n_visual=4)
    for a, b in zip(learner.parameters(), twin.parameters()): assert torch.equal(a, b)
    assert PromptSRC(clip, NAMES, ctx_init='icon of').ctx.tokens.shape[1] == 2
    more, noise = (PromptSRC(clip, NAMES, n_ctx=5, **kw) for kw in ({}, dict(ctx_init=None)))
    assert torch.equal(more.sentences.ids, noise.sentences.ids)  # more than the words: noise


class Epochs(Hook):
    "Parameters after each epoch"
    def __init__(self): self.params = []
    def after_epoch(self, run, epoch):
        self.params.append([p.detach().clone() for p in run.learner.parameters()])

def trained(half, photos, cls=PromptSRC, hooks=(), checkpoint=None, **kw):
    learner = cls(half, photos.classnames, n_ctx=2, n_visual=2, templates='a {}.', **kw)
    recipe = Recipe(lr=.05, epochs=5, batch_size=6, warmup_epochs=0)
    fit(learner, photos.few_shot(3, 1), recipe, 1, checkpoint, progress=False, hooks=hooks)
    return learner


def test_fit_leaves_the_average(half, photos):
    every = Epochs()
    learner = trained(half, photos, hooks=[every], gpa_mean=4, gpa_std=1.5)
    bell = torch.tensor([math.exp(-.5*((e-4)/1.5)**2) for e in range(1, 6)])
    for p, *epochs in zip(learner.parameters(), *every.params):
        mean = sum(w*state for w, state in zip(bell/bell.sum(), epochs))
        torch.testing.assert_close(p.data, mean)
        assert not torch.equal(p.data, epochs[-1])
    flat = trained(half, photos, gpa_std=1e9)
    for p, *epochs in zip(flat.parameters(), *every.params):
        torch.testing.assert_close(p.data, torch.stack(epochs).mean(0))


def test_resumed_it_is_the_same_average(half, photos, tmp_path):
    class PowerCut(Hook):
        def before_epoch(self, run, epoch):
            if epoch == 4: raise KeyboardInterrupt
    whole, file = trained(half, photos, gpa_std=2.), tmp_path/'c'
    with pytest.raises(KeyboardInterrupt):
        trained(half, photos, hooks=[PowerCut()], checkpoint=file, gpa_std=2.)
    again = trained(half, photos, checkpoint=file, gpa_std=2.)
    done = trained(half, photos, checkpoint=file, gpa_std=2.)   # nothing is left to train
    for a, b, c in zip(whole.parameters(), again.parameters(), done.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_bell():
    share = [gaussian(15, 1)(e, 20) for e in range(1, 21)]
    share = [w/sum(share) for w in share]
    assert share[14] == pytest.approx(.3989, abs=1e-4)
    assert share[19] == pytest.approx(1.5e-6, rel=.02)
    default = [gaussian()(e, 20) for e in range(1, 21)]
    assert default == [gaussian(15, 1)(e, 20) for e in range(1, 21)]
    # far outside the run the nearest epoch still counts
    assert gaussian(500, .1)(3, 3) == 1. and gaussian(-90, .1)(1, 3) == 1.


def test_without_weights_it_is_ivlp(half, photos):
    "All weights 0, and the last epoch only"
    off = dict(text_weight=0., image_weight=0., logits_weight=0.)
    ours = trained(half, photos, gpa_mean=5, gpa_std=1e-3, **off)
    learner = IVLP(half, photos.classnames, n_ctx=2, n_visual=2)
    recipe = Recipe(lr=.05, epochs=5, batch_size=6, warmup_epochs=0)
    fit(learner, photos.few_shot(3, 1), recipe, 1, progress=False)
    for a, b in zip(ours.parameters(), learner.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- around other learners -----------------------------------------------------------------------

OFF = {MuDPTGuided: dict(weight=0.), IVLPAligned: dict(weight=0.)}
OFF |= {c: dict(text_weight=0., image_weight=0., logits_weight=0.)
        for c in (MaPLeConsistent, CoOpConsistent)}

@pytest.mark.parametrize('cls', OFF)
def test_around_another_learner(cls, clip):
    "Weight 0 is the bare learner, loss and gradient; a small step lowers the whole loss"
    free = cls(clip, NAMES, **OFF[cls])
    bare = next(c for c in cls.__mro__ if c in (MuDPT, MaPLe, IVLP, CoOp))
    free, x = moved(free), images(clip)
    alone = bare(clip, NAMES).double()
    alone.load_state_dict(free.state_dict())
    torch.testing.assert_close(free.loss(x, LABELS), alone.loss(x, LABELS), rtol=1e-12, atol=0)
    step(free), step(alone)
    for a, b in zip(free.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    held = moved(cls(clip, NAMES))
    before = step(held, 1e-5)
    after = held.loss(x, LABELS)
    assert after < before


@pytest.mark.parametrize('cls', OFF)
@pytest.mark.stress
def test_compositions_keep_the_contract(cls):
    assert (check_learner(cls).result == 'passed').all()


class Uphill(PromptSRC):
    "Its anchors are stronger than its mistake, so the whole loss falls"
    method = 'uphill'
    def loss_terms(self, *batch):
        terms = super().loss_terms(*batch)
        return terms | dict(ce=-terms['ce'])

@pytest.mark.stress
def test_an_anchor_hides_no_wrong_sign():
    "What outweighs the cross-entropy is left out to see whether that falls"
    with pytest.raises(ContractError) as e: check_learner(Uphill)
    assert e.value.check == 'learns'


def test_bad_input(clip):
    class PerImage(Guided, CoCoOp): method = 'cocoop-guided'
    for make, says in (
            (lambda: KgCoOp(clip, NAMES, templates='a photo'), ['exactly one {}']),
            (lambda: KgCoOp(clip, NAMES, templates=[]), ['no template']),
            (lambda: KgCoOp(clip, NAMES, n_ctx=3, ctx_init='a photo of a'), ['n_ctx is 3']),
            (lambda: ProGrad(clip, NAMES, T=0.), ['T is a temperature']),
            (lambda: ProGrad(clip, NAMES, n_ctx=2, ctx_init='a photo of a'), ['4 words for 2']),
            (lambda: PromptSRC(clip, NAMES, gpa_std=0.), ['std must be above 0']),
            (lambda: PerImage(clip, NAMES), ['depend on the image'])):
        with pytest.raises(ValueError) as e: make()
        one_line(e, *says)
