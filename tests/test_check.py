"""`check_learner` passes every method of the package and finds what is wrong with learners that are
wrong on purpose.

Methods are found by looking into all modules, so a new chapter is under test without a change
here.
"""
import importlib
import json
import pkgutil
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import clipprompt
from clipprompt.check import CHECKS, ContractError, check_learner, small_clip
from clipprompt.learner import PromptLearner, Recipe
from clipprompt.prompts import Given, Prompts, place
from helpers import one_line

MODULES = [
    importlib.import_module(f'clipprompt.{m.name}')
    for m in pkgutil.iter_modules(clipprompt.__path__)
]
METHODS = {
    c.__name__: c
    for m in MODULES
    for c in vars(m).values()
    if isinstance(c, type) and issubclass(c, PromptLearner)
    and c.method != PromptLearner.method and c.__module__ == m.__name__
}
WORDS = dict(ctx_init='a photo of a')
DRAWN = 'VariationalCoOp', 'VariationalCoCoOp'   # ten draws by default: slow
VARIANTS = dict(
    CoOp=[dict(n_ctx=1, position='middle'), dict(n_ctx=6, position='front'),
          dict(n_ctx=2, csc=True), WORDS | dict(position='front'), WORDS | dict(csc=True)],
    CoCoOp=[dict(n_ctx=1), dict(n_ctx=6), dict(n_ctx=2, ctx_init=None)],
    ZeroShot=[dict(templates=['a photo of a {}.', '{}'])],
    VPT=[dict(depth=1)],
    IVLP=[dict(n_ctx=6, depth_text=1), dict(n_ctx=1)],
    MaPLe=[dict(n_ctx=1, depth=1), dict(n_ctx=6), dict(depth=1, ctx_init=None)],
    MuDPT=[dict(fusion='linear', n_ctx=6), dict(fusion='text_to_vision', depth=1, n_ctx=1)],
    MetaPrompt=[dict(n_ctx=1), dict(n_ctx=6)], MAPDAFE=[dict(n_ctx=1), dict(n_ctx=6, text='write')],
    VariationalCoOp=[dict(samples=2), dict(n_ctx=1, samples=2)],
    VariationalCoCoOp=[dict(n_ctx=6, samples=2)],
    ProVP=[dict(n_visual=3, alpha=.5)],
    ProVPRef=[dict(n_visual=3, weight=.1)])
VARIANTS |= dict(   # clipprompt.adapters
    ClipAdapter=[dict(ratio=.6, reduction=2)], TaskRes=[dict(scale=1.)],
    TipAdapter=[dict(alpha=3., beta=5., key_views=1)], LPPlusPlus=[dict(reset=True, steps=50)])


@pytest.mark.parametrize('name,hparams', [
    pytest.param(n, h, id=f'{n}-{json.dumps(h)}')
    for n in METHODS
    for h in VARIANTS.get(n, []) + [{}]*(n not in DRAWN)
])
def test_method(name, hparams):
    result = check_learner(METHODS[name], **hparams).set_index('check').result
    assert list(result.index) == list(CHECKS)
    skipped = {k: r for k, r in result.items() if r != 'passed'}
    assert all(r.startswith('skipped: ') for r in skipped.values())
    learner = METHODS[name](small_clip(), ['cat', 'dog'], **hparams)
    if list(learner.parameters()) and learner.transfers and learner.recipe().epochs:
        assert not skipped


def test_methods_are_found():
    assert {'ZeroShot', 'BestTemplate', 'LinearProbe', 'CoOp'} <= METHODS.keys()
    assert VARIANTS.keys() <= METHODS.keys()
    listed = importlib.import_module('clipprompt.methods').BOOK
    assert {cls.__name__ for cls in listed} <= METHODS.keys()


def test_every_check_has_a_promise():
    for check in CHECKS.values():
        first, *rest = check.__doc__.splitlines()   # one line, or one and its details
        assert first and not check.__doc__.rstrip().endswith('.') and (not rest or not rest[0])


# ---- learners that are wrong ---------------------------------------------------------------------

class Good(PromptLearner):
    "CoOp with two vectors, and one number for the image side to play with"
    method, learns_text = 'good', True
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        super().__init__(backbone, classnames, n_ctx=n_ctx, seed=seed)
        self.build(self.classnames, n_ctx, seed)
    def build(self, names, n_ctx, seed):
        self.ctx, self.sentences = Prompts(n_ctx, self.backbone.text_width,
                                           seed=seed), place(self.backbone, names, n_ctx)
    def text_features(self): return F.normalize(self.text(self.sentences, self.ctx), dim=-1)
    @classmethod
    def recipe(cls, setting='few-shot', shots=16, dataset=''): return Recipe(source='ours')

BROKEN = []
def breaks(check):
    "The class below must break this promise, and no earlier one"
    def add(cls): BROKEN.append(pytest.param(check, cls, id=f'{check}-{cls.__name__}')); return cls
    return add


@breaks('rebuild')
class LosesAnArgument(Good):
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        PromptLearner.__init__(self, backbone, classnames, n_ctx=n_ctx)
        self.build(self.classnames, n_ctx, seed)

@breaks('rebuild')
class KeepsAnotherValue(Good):
    def __init__(self, backbone, classnames, n_ctx=None, seed=0):
        super().__init__(backbone, classnames, n_ctx or 2, seed)

@breaks('rebuild')
class KeepsWhatJsonCannotWrite(Good):
    def __init__(self, backbone, classnames, std=torch.tensor(.02), seed=0):
        PromptLearner.__init__(self, backbone, classnames, std=std, seed=seed)
        self.build(self.classnames, 2, seed)

@breaks('parameters')
class OwnsClip(Good):
    def build(self, *args):
        super().build(*args)
        self.encoder = self.backbone.text.transformer

@breaks('parameters')
class TrainsAWeightOfClip(Good):
    def build(self, *args):
        super().build(*args)
        self.ln_final = self.backbone.text.ln_final.weight.requires_grad_()

@breaks('parameters')
class StartsInsideClip(Good):
    def build(self, *args):
        super().build(*args)
        self.ctx.tokens = nn.Parameter(self.backbone.text.token_embedding.weight[None, 320:322])

@breaks('parameters')
class SavesTheClasses(Good):
    def build(self, *args):
        super().build(*args)
        self.register_buffer('ids', self.sentences.ids)

@breaks('parameters')
class CarriesAConstant(Good):
    def build(self, *args):
        super().build(*args)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

@breaks('parameters')
class HidesItsTokens(Good):
    def build(self, *args):
        super().build(*args)
        self.layers, self.ctx = [self.ctx], None

@breaks('gradients')
class UnfreezesClip(Good):
    def build(self, *args):
        super().build(*args)
        self.backbone.text.ln_final.requires_grad_(True)

@breaks('frozen')
class WritesIntoClip(Good):
    def training_step(self, batch, optimizer):
        self.backbone.text.ln_final.weight.data *= 1.01
        return super().training_step(batch, optimizer)

@breaks('frozen')
class PutsClipIntoTrainingMode(Good):
    def train(self, mode=True):
        self.backbone.model.train(mode)
        return super().train(mode)

@breaks('class list')
class ClassSpecificUnawares(Good):
    def build(self, names, n_ctx, seed):
        super().build(names, n_ctx, seed)
        self.ctx = Prompts(n_ctx, self.backbone.text_width, n_classes=len(names), seed=seed)

@breaks('random state')
class StartsFromTheGlobalGenerator(Good):
    def build(self, *args):
        super().build(*args)
        nn.init.normal_(self.ctx.tokens, std=.02)

@breaks('random state')
class DrawsInEvalMode(Good):
    def image_features(self, images):
        return F.normalize((f := super().image_features(images)) + .01*torch.randn_like(f), dim=-1)

@breaks('seed')
class ShufflesWithPython(Good):
    def training_step(self, batch, optimizer):
        random.random()
        return super().training_step(batch, optimizer)

@breaks('random state')
class SeedsEverything(Good):
    def build(self, *args):
        torch.manual_seed(args[-1]), np.random.seed(args[-1])
        super().build(*args)

@breaks('seed')
class IgnoresTheSeed(Good):
    def build(self, names, n_ctx, seed): super().build(names, n_ctx, 0)

@breaks('seed')
class TrainsWithFreshNoise(Good):
    def training_step(self, batch, optimizer):
        (g := torch.Generator()).seed()
        some = tuple(x[torch.randperm(len(x), generator=g)[:6]] for x in batch)
        return super().training_step(some, optimizer)

@breaks('logits')
class Transposed(Good):
    def logits(self, image_features, text_features=None):
        return super().logits(image_features, text_features).T

@breaks('logits')
class LosesPrecision(Good):
    def logits(self, image_features, text_features=None):
        return super().logits(image_features, text_features).float()

@breaks('logits')
class SqueezesOneImage(Good):
    def logits(self, image_features, text_features=None):
        return super().logits(image_features, text_features).squeeze(0)

@breaks('logits')
class LongFeatures(Good):
    def text_features(self): return self.text(self.sentences, self.ctx)

@breaks('repeats')
class NoiseOfItsOwn(Good):
    noise = torch.Generator().manual_seed(0)

    def image_features(self, images):
        f = super().image_features(images)
        return F.normalize(f + .01*torch.randn(f.shape, generator=self.noise), dim=-1)

@breaks('repeats')
class RunningMean(Good):
    mean = 0.
    def image_features(self, images):
        f = super().image_features(images)
        self.mean = .9*self.mean + .1*f.mean(0)
        return F.normalize(f-self.mean, dim=-1)

@breaks('batch independence')
class CentresTheBatch(Good):
    def image_features(self, images):
        return F.normalize((f := super().image_features(images)) - .5*f.mean(0), dim=-1)

@breaks('batch independence')
class AveragesTheContext(Good):
    learns_text = True

    def logits(self, image_features, text_features=None):
        return super().logits(image_features, text_features) + image_features.mean()

@breaks('class order')
class SortsTheNames(Good):
    def build(self, names, *args): super().build(sorted(names), *args)

@breaks('class order')
class CountsTheClasses(Good):
    def logits(self, image_features, text_features=None):
        y = super().logits(image_features, text_features)
        return y + .1*torch.arange(y.shape[1])

@breaks('underscores')
class ReadsTheArgument(Good):
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        super().__init__(backbone, classnames, n_ctx, seed)
        ids = [backbone.tokenize([f'X X {n}.'])[0] for n in classnames]
        self.sentences.ids = torch.stack(ids)
        self.sentences.eot = self.sentences.ids.argmax(-1)

@breaks('flags')
class LearnsTheImageSideToo(Good):
    def image_features(self, images):
        f = super().image_features(images)
        return F.normalize(f + self.ctx.tokens.mean()*f.flip(-1), dim=-1)

@breaks('flags')
class ForgetsTheFlag(Good): learns_text = False

@breaks('flags')
class KeepsOldFeatures(Good):
    kept = None
    def text_features(self):
        if self.training or self.kept is None: self.kept = super().text_features()
        return self.kept

@breaks('features')
class ForwardOfItsOwn(Good):
    def forward(self, images): return 1.1*super().forward(images)

@breaks('features')
class NeedsImages(Good):
    def image_features(self, images): return F.normalize(self.vision(images), dim=-1)

@breaks('features')
class SaysNone(Good):
    def text_features(self): return None

    def logits(self, image_features, text_features=None):
        return super().logits(image_features, super().text_features())

@breaks('features')
class LossNeedsImages(Good):
    def loss(self, images, labels): return super().loss(images, labels) + .01*images.mean()

@breaks('other classes')
class SharesItsTokens(Good):
    def for_classes(self, classnames):
        other = super().for_classes(classnames)
        other.ctx = self.ctx
        return other

@breaks('other classes')
class StartsAnew(Good):
    def text_features(self):
        if len(self.classnames) in (4, 7): return super().text_features()
        return self.frozen_text(self.classnames)
    def for_classes(self, classnames):
        known = {c.replace(' ', '_') for c in self.classnames} | set(self.classnames)
        if set(classnames) <= known: return super().for_classes(classnames)
        return type(self)(self.backbone, classnames, **self.hparams)

@breaks('other classes')
class CentresTheClasses(Good):
    def text_features(self):
        return F.normalize((f := super().text_features()) - .5*f.mean(0), dim=-1)

@breaks('other classes')
class AlwaysSevenClasses(Good):
    def logits(self, image_features, text_features=None):
        return F.pad(y := super().logits(image_features, text_features), (0, 7 - y.shape[1]))

@breaks('other classes')
class DoesNotTransferButDoes(Good):
    transfers = False
    def for_classes(self, classnames): return type(self)(self.backbone, classnames, **self.hparams)

@breaks('fast path')
class SharesTooMuch(Good):
    def build(self, *args):
        super().build(*args)
        self.sentences.__dict__['shared'] = self.sentences.shared+1   # the first token of the name

@breaks('fast path')
class ReadsOneTokenEarly(Good):
    def text_features(self):
        s = self.sentences
        if not self.text.plain: s = type(s)(s.ids, s.slots, s.eot-1)
        return F.normalize(self.text(s, self.ctx), dim=-1)

@breaks('gradients')
class HasAParameterTooMany(Good):
    def build(self, *args):
        super().build(*args)
        self.bias = nn.Parameter(torch.zeros(3))

@breaks('gradients')
class LearnsInAList(Good):
    def build(self, *args):
        super().build(*args)
        self.shift = [torch.zeros((), requires_grad=True)]
    def text_features(self): return F.normalize(super().text_features() + self.shift[0], dim=-1)

@breaks('gradients')
class Detached(Good):
    def text_features(self): return super().text_features().detach()

@breaks('gradients')
class LossPerImage(Good):
    def loss(self, images, labels): return F.cross_entropy(self(images), labels, reduction='none')
    def training_step(self, batch, optimizer):
        loss = self.loss(*batch).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        return loss.detach()

@breaks('finite differences')
class HalfDetached(Good):
    def text_features(self):
        return F.normalize((f := self.text(self.sentences, self.ctx)) + .3*f.detach().flip(-1),
                           dim=-1)

@breaks('finite differences')
class SignOfTheGradient(Good):
    def text_features(self):
        f = super().text_features()
        return 2*f.detach() - f                    # the right value, the wrong direction

@breaks('training step')
class LossAfterTheStep(Good):
    def training_step(self, batch, optimizer):
        super().training_step(batch, optimizer)
        return self.loss(*batch).detach()

@breaks('training step')
class ReturnsAFloat(Good):
    def training_step(self, batch, optimizer):
        return super().training_step(batch, optimizer).item()

@breaks('training step')
class ReturnsItsGraph(Good):
    def training_step(self, batch, optimizer):
        loss = self.loss(*batch)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        return loss

@breaks('training step')
class AddsUpGradients(Good):
    def training_step(self, batch, optimizer):
        loss = self.loss(*batch)
        loss.backward(), optimizer.step()
        return loss.detach()

@breaks('training step')
class ForgetsToStep(Good):
    def training_step(self, batch, optimizer): return self.loss(*batch).detach()

@breaks('training step')
class CountsItsSteps(Good):
    steps = 0
    def loss(self, images, labels): return super().loss(images, labels)*(1+self.steps)
    def training_step(self, batch, optimizer):
        loss = super().training_step(batch, optimizer)
        self.steps += 1
        return loss

@breaks('learns')
class WrongSign(Good):
    def loss(self, images, labels): return -super().loss(images, labels)

@breaks('learns')
class LabelsOffByOne(Good):
    def loss(self, images, labels): return super().loss(images, (labels+1) % len(self.classnames))

@breaks('not finite')
class HidesNaN(Good):
    def training_step(self, batch, optimizer):
        return super().training_step(batch, optimizer).nan_to_num()

@breaks('copies')
class HoldsAPartOfClip(Good):
    def build(self, *args):
        super().build(*args)
        self.borrowed = [self.backbone.text.transformer]

@breaks('copies')
class CopiesNothing(Good):
    def __deepcopy__(self, memo):
        made = type(self)(self.backbone, self.classnames, **self.hparams)
        made.ctx = self.ctx
        return made.train(self.training)

@breaks('moves')
class KeepsATensorAside(Good):
    def build(self, *args):
        super().build(*args)
        self.order = torch.arange(len(self.classnames))
    def text_features(self): return super().text_features()[self.order]

@breaks('moves')
class LeavesClipBehind(Good):
    def _apply(self, fn, recurse=True): return nn.Module._apply(self, fn, recurse)

@breaks('number of tokens')
class WordsOverrideTheNumber(Good):
    def build(self, names, n_ctx, seed): super().build(names, 4, seed)

@breaks('number of tokens')
class ForgetsTheNumber(Good):
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        super().__init__(backbone, classnames, n_ctx, seed)
        self.hparams |= dict(n_ctx=2)

@breaks('number of tokens')
class FewerSlotsThanTokens(Good):
    def build(self, names, n_ctx, seed):
        super().build(names, n_ctx, seed)
        if n_ctx == 6: self.sentences = place(self.backbone, names, 2)

class Templated(Good):
    "Takes a template from its data, as it should"
    def __init__(self, backbone, classnames, template=None, n_ctx=2, seed=0):
        PromptLearner.__init__(self, backbone, classnames, template=template, n_ctx=n_ctx,
                               seed=seed)
        self.build(self.classnames, n_ctx, seed)
    def prepare(self, data):
        if self.hparams['template'] is None: self.hparams['template'] = data.template
    def text_features(self):
        template = self.hparams['template'] or 'a photo of a {}.'
        frozen = self.frozen_text([template.replace('{}', c) for c in self.classnames])
        return F.normalize(super().text_features() + frozen, dim=-1)

class Solved(Good):
    "Its first token is solved from pictures, the other is trained"
    def prepare(self, data):
        with torch.no_grad(): self.ctx.tokens[0, 0] = .01*len(data.train)

@breaks('prepare')
class PreparesAnother(Templated):
    def prepare(self, data):
        hparams = self.hparams | dict(template=data.template)
        return type(self)(self.backbone, self.classnames, **hparams)

@breaks('prepare')
class RecordsNothing(Templated):
    told = None
    def prepare(self, data): self.told = data.template
    def text_features(self):
        self.hparams, mine = self.hparams | dict(template=self.told), self.hparams
        f = super().text_features()
        self.hparams = mine
        return f

@breaks('prepare')
class KnowsBetter(Templated):
    def prepare(self, data): self.hparams['template'] = data.template

@breaks('prepare')
class ChangesANumber(Templated):
    def prepare(self, data): self.hparams['n_ctx'] = 4

@breaks('prepare')
class PreparesByChance(Solved):
    def prepare(self, data): torch.rand(1)

@breaks('half precision')
class LossInHalfPrecision(Good):
    def forward(self, images):
        with self.backbone.autocast(): return super().forward(images)

@breaks('half precision')
class CastsTheFeatures(Good):
    def text_features(self):
        f = self.text(self.sentences, self.ctx)
        return F.normalize((f*1e6).half().to(f) if self.backbone.precision else f, dim=-1)

@breaks('save and load')
class HasNoName(Good): method = 'prompt-learner'

@breaks('save and load')
class SavesClip(Good):
    def save(self, path):
        super().save(path)
        meta, state = clipprompt.learner.read_prompts(path)
        save_file(state | {'clip.proj': self.backbone.visual.proj.data.clone()}, path,
                  {k: json.dumps(v)
                   for k, v in meta.items()})
    @classmethod
    def load(cls, path, backbone):
        meta, state = clipprompt.learner.read_prompts(path)
        (learner := cls(backbone, meta['classnames'],
                        **meta['hparams'])).load_state_dict(state, strict=False)
        return learner

@breaks('save and load')
class Pickles(Good):
    def save(self, path): torch.save(self.state_dict(), path)

@breaks('save and load')
class SavesRounded(Good):
    def save(self, path):
        (small :=
         self.for_classes(self.classnames)).ctx.tokens.data = self.ctx.tokens.data.half().float()
        PromptLearner.save(small, path)

@breaks('recipe')
class SaysNoSource(Good):
    @classmethod
    def recipe(cls, setting='few-shot', shots=16, dataset=''): return Recipe()

@breaks('recipe')
class KnowsOneSetting(Good):
    @classmethod
    def recipe(cls, setting='few-shot', shots=16, dataset=''):
        return dict(zip(['few-shot'], [Recipe(source='ours')]))[setting]

@breaks('recipe')
class BudgetsWithoutASource(Good):
    @classmethod
    def budget(cls): return Recipe()

@breaks('recipe')
class SpellsItsArgumentsWrong(Good): cpu_hparams = dict(n_context=4)

@breaks('bad input')
class CutsNames(Good):
    def build(self, names, *args): super().build([' '.join(n.split()[:9]) for n in names], *args)

@breaks('bad input')
class ClampsDepth(Good):
    def __init__(self, backbone, classnames, depth=1, seed=0):
        PromptLearner.__init__(self, backbone, classnames, depth=depth, seed=seed)
        self.build(self.classnames, 2, seed)
        self.ctx = Prompts(2, backbone.text_width, min(depth, backbone.text_layers), seed=seed)

@breaks('bad input')
class MergesDoubles(Good):
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        super().__init__(backbone, list(dict.fromkeys(classnames)), n_ctx, seed)

@breaks('bad input')
class EndsInAKeyError(Good):
    def __init__(self, backbone, classnames, n_ctx=2, seed=0):
        dict(first=classnames[0])
        super().__init__(backbone, classnames, n_ctx, seed)


@pytest.mark.parametrize('check,cls', BROKEN)
def test_broken(check, cls):
    with pytest.raises(ContractError) as e: check_learner(cls)
    message = one_line(e, cls.__name__, f"'{check}'")
    assert e.value.check == check, message


# ---- learners that are unusual and right ---------------------------------------------------------

class Sampled(Good):
    """Contexts drawn from a distribution, predictions averaged: log-probabilities, random in
    training, the same noise in each evaluation"""
    def build(self, names, n_ctx, seed):
        super().build(names, n_ctx, seed)
        self.log_std = nn.Parameter(torch.zeros(self.backbone.text_width))
    def text_features(self): return None
    def logits(self, image_features, text_features=None):
        g = None if self.training else torch.Generator().manual_seed(0)
        noise = .1*torch.randn(3, 1, self.backbone.text_width, generator=g,
                               dtype=self.log_std.dtype)*self.log_std.exp()
        given = Given((self.ctx.tokens[0] + noise)[None, :, None])
        # [S, C, E]
        t = F.normalize(self.text(self.sentences, given), dim=-1)
        each = (self.backbone.logit_scale*image_features @ t.mT).log_softmax(-1)
        return each.logsumexp(0) - torch.tensor(3.).log()

class TwoPairs(Good):
    """Each side is compared with the other side's frozen features: the mean of two cosines is the
    cosine of features set side by side"""
    learns_image = True
    def build(self, names, n_ctx, seed):
        super().build(names, n_ctx, seed)
        self.visual_ctx = Prompts(n_ctx, self.backbone.vision_width, seed=seed+1)
    # [., 2E]
    def both(self, a, b): return torch.cat([a, b], -1)/2**.5

    def text_features(self):
        return self.both(Good.text_features(self),
                         self.frozen_text([f'a photo of a {c}' for c in self.classnames]))

    def image_features(self, images):
        return self.both(super().image_features(images),
                         F.normalize(self.vision(images, self.visual_ctx), dim=-1))


@pytest.mark.parametrize('cls', [Good, Sampled, TwoPairs, Templated, Solved])
def test_no_false_alarm(cls): assert (check_learner(cls).result == 'passed').all()

def test_each_check_can_fail(): assert {p.values[0] for p in BROKEN} == set(CHECKS)


def test_an_error_inside_is_named_and_kept():
    class Typo(Good):
        def loss(self, images, labels): return self.cross_entropy(images, labels)
    with pytest.raises(ContractError) as e: check_learner(Typo)
    one_line(e, "Typo breaks 'gradients'", 'AttributeError', 'cross_entropy')
    assert isinstance(e.value.__cause__, AttributeError)


def test_wrong_arguments():
    with pytest.raises(ValueError, match='n_ctx|at least one token'):
        check_learner(METHODS['CoOp'], n_ctx=0)
    with pytest.raises(TypeError, match='n_context'): check_learner(METHODS['CoOp'], n_context=4)
    for no_class in (Good(small_clip(), ['cat']), nn.Linear):
        with pytest.raises(TypeError, match='subclass of PromptLearner'): check_learner(no_class)


def test_leaves_the_generators_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ContractError): check_learner(SeedsEverything)
    check_learner(Good)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
