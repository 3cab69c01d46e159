"DePT: two heads over one pair of raw features, the second for the classes that were seen."
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt.anchored import KgCoOp, ProGrad, PromptSRC
from clipprompt.check import ContractError, check_learner
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.deep import IVLP, VPT, MaPLe
from clipprompt.dept import Channelwise, Decoupled, DePT, linear_head, rows_of
from clipprompt.distill import PromptKD
from clipprompt.evaluation import encode, evaluate
from clipprompt.hooks import Hook
from clipprompt.inside import ClipLoRA
from clipprompt.learner import Classifier, Recipe, read_prompts
from clipprompt.mudpt import MuDPT
from clipprompt.page import Answers
from clipprompt.pictures import test_transform
from clipprompt.provp import ProVPRef
from clipprompt.steps import Feed, lr_at, optimizer_of
from clipprompt.tcp import TCP
from clipprompt.training import fit
from clipprompt.variational import VariationalCoOp
from helpers import one_line

NAMES = ['cat', 'old shopping cart', 'traffic light']
OTHERS = ['violin', 'cat']


class DeKgCoOp(Decoupled, KgCoOp): method = 'dept-kgcoop'
class DeMaPLe(Decoupled, MaPLe): method = 'dept-maple'
class DePromptSRC(Decoupled, PromptSRC): method = 'dept-promptsrc'
class DeMuDPT(Decoupled, MuDPT): method = 'dept-mudpt'

HOSTS = {DePT: CoOp, DeKgCoOp: KgCoOp, DeMaPLe: MaPLe, DePromptSRC: PromptSRC, DeMuDPT: MuDPT}

def moved(learner, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in learner.parameters(): p += .1*torch.randn(p.shape, generator=g).to(p)
    return learner

def batch(clip):
    g, size = torch.Generator().manual_seed(0), clip.image_size
    return torch.randn(4, 3, size, size, generator=g).to(clip.dtype), torch.tensor([0, 2, 2, 1])

def beside(learner, x): return [learner.frozen_image(x)] if 'frozen' in learner.reads else []

def host_of(learner):
    "The host alone, with the same parameters"
    hparams = {k: v for k, v in learner.hparams.items() if k not in ('share', 'head')}
    host = HOSTS[type(learner)](learner.backbone, learner.classnames, **hparams).double()
    own = dict(host.named_parameters())
    host.load_state_dict({k: v for k, v in learner.state_dict().items() if k in own})
    return host


# ---- the equations -------------------------------------------------------------------------------

@pytest.mark.parametrize('cls', HOSTS)
def test_both_heads_by_hand(clip, cls):
    "Logits, terms and loss, from the towers' own features"
    learner, (x, y) = moved(cls(clip, NAMES, share=.4).double()), batch(clip)
    host, E = host_of(learner), clip.embed_dim
    f, t = learner.image_features(x), learner.text_features()
    torch.testing.assert_close(F.normalize(f, dim=-1), host.image_features(x))
    torch.testing.assert_close(F.normalize(t, dim=-1), host.text_features())
    assert f.norm(dim=-1).sub(1).abs().min() > 1e-3 and f.shape == (4, E)
    p = dict(learner.named_parameters())
    def head(u): return u @ p['linear.weight'].T + p['linear.bias']
    image = p['film_image.scale']*f + p['film_image.bias']
    text = p['film_text.scale']*t + p['film_text.bias']
    S = host(x)
    torch.testing.assert_close(learner(x), .6*S + .4*head(image))
    rows = torch.cat([head(text)[y], head(image)])
    linear = -rows.log_softmax(-1)[torch.arange(8), torch.cat([y, y])].mean()
    more, terms = beside(host, x), learner.loss_terms(x, y, *beside(learner, x))
    theirs = host.loss_terms(x, y, *more)
    ce = theirs.pop('xe') if 'xe' in theirs else theirs.pop('ce')
    torch.testing.assert_close(terms.pop('ce'), ce)
    torch.testing.assert_close(terms.pop('ce_linear'), linear)
    assert terms.keys() == theirs.keys()
    for name in theirs: torch.testing.assert_close(terms[name], theirs[name])
    loss = .6*ce + .4*linear + sum(host.loss_weights.get(k, 1.)*v for k, v in theirs.items())
    torch.testing.assert_close(learner.loss(x, y, *more), loss)

@pytest.mark.parametrize('cls', [DePT, DeMaPLe])
def test_gradients_are_those_of_the_sum(clip, cls):
    "The host's part of the graph is not cut where its features are made once for both heads"
    learner, (x, y) = moved(cls(clip, NAMES).double()), batch(clip)
    host = host_of(learner)
    ours = learner.loss_terms(x, y)['ce']
    names = [n for n, _ in host.named_parameters()]
    p = dict(learner.named_parameters())
    a = torch.autograd.grad(ours, [p[n] for n in names])
    b = torch.autograd.grad(host.loss(x, y), list(host.parameters()))
    for ga, gb in zip(a, b): torch.testing.assert_close(ga, gb)

def test_towers_run_once_a_step(clip, monkeypatch):
    "However many terms read the features"
    learner, (x, y), runs = DePromptSRC(clip, NAMES).double(), batch(clip), []
    text, image = type(learner.text).__call__, type(learner.vision).__call__
    def counted(name, run): return lambda self, *a, **k: runs.append(name) or run(self, *a, **k)
    learner.anchors()
    monkeypatch.setattr(type(learner.text), '__call__', counted('text', text))
    monkeypatch.setattr(type(learner.vision), '__call__', counted('image', image))
    learner.loss(x, y, torch.randn(4, clip.embed_dim).double())
    assert sorted(runs) == ['image', 'text']

def test_nothing_is_left_of_the_hosts_view(clip):
    "Not after a loss, and not after one that failed"
    learner, (x, y) = DeKgCoOp(clip, NAMES).double(), batch(clip)
    learner.loss(x, y)
    before = set(vars(learner))
    learner.loss(x, y)
    with pytest.raises(IndexError): learner.loss(x, y+9)
    assert set(vars(learner)) == before
    assert type(learner).image_features is Classifier.image_features   # so features are kept

def test_no_share_is_the_host(clip):
    "w = 0: logits, loss and the prompt's gradient are CoOp's, and the head does not learn"
    learner, (x, y) = moved(DePT(clip, NAMES, share=0.).double()), batch(clip)
    host = host_of(learner)
    torch.testing.assert_close(learner(x), host(x))
    loss = learner.loss(x, y)
    torch.testing.assert_close(loss, host.loss(x, y))
    grads = dict(zip([n for n, _ in learner.named_parameters()],
                     torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)))
    torch.testing.assert_close(grads['ctx.tokens'], *torch.autograd.grad(host.loss(x, y),
                                                                        [host.ctx.tokens]))
    assert all(g is None or not g.any() for n, g in grads.items() if n != 'ctx.tokens')

def test_unit_class_features_as_rows_give_the_cosines_order(clip):
    "g = 1, h = 0, A = t/|t|, b = 0: among unit images the linear head ranks as the cosines do"
    learner, (x, _) = DePT(clip, NAMES, share=1.).double(), batch(clip)
    t = F.normalize(learner.text_features(), dim=-1)
    with torch.no_grad():
        learner.linear.weight.copy_(t)
        learner.linear.bias.zero_()
        f = F.normalize(learner.image_features(x), dim=-1)
        Z = learner.logits(f)
        assert torch.equal(Z.argsort(-1), host_of(learner).logits(f).argsort(-1))
        torch.testing.assert_close(Z, f @ t.T)

def test_length_of_raw_features_counts(clip):
    "For the linear head alone"
    learner, (x, _) = DePT(clip, NAMES).double(), batch(clip)
    f = learner.image_features(x)
    near, far = (learner.logits(k*f) for k in (1., 3.))
    S = host_of(learner).logits(F.normalize(f, dim=-1))
    b = learner.linear.bias
    torch.testing.assert_close(far-.3*S-.7*b, 3*(near-.3*S-.7*b))


# ---- the start -----------------------------------------------------------------------------------

def test_start(clip):
    a, b, c = (DePT(clip, NAMES, seed=s) for s in (1, 1, 2))
    for film in (a.film_image, a.film_text):
        assert torch.equal(film.scale, torch.ones(clip.embed_dim))
        assert torch.equal(film.bias, torch.zeros(clip.embed_dim))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        usual = torch.nn.Linear(clip.embed_dim, 3)
    assert torch.equal(a.linear.weight, usual.weight) and torch.equal(a.linear.bias, usual.bias)
    assert torch.equal(a.linear.weight, b.linear.weight)
    assert not torch.equal(a.linear.weight, c.linear.weight)
    assert linear_head(4, 3).weight.shape == (3, 4) and Channelwise(4)(torch.ones(4)).sum() == 4

def test_number_of_parameters(clip):
    "M context vectors, four vectors of E, and C(E+1): 19,987 for ViT-B/16 and 19 classes"
    E, D = clip.embed_dim, clip.text_width
    n = sum(p.numel() for p in DePT(clip, NAMES).parameters())
    assert n == 16*D + 4*E + 3*(E+1)
    assert 16*512 + 4*512 + 19*513 == 19_987


# ---- whose head it is ----------------------------------------------------------------------------

@pytest.mark.parametrize('cls', HOSTS)
def test_new_classes_do_not_read_the_head(clip, cls):
    learner, (x, _) = moved(cls(clip, NAMES).double()), batch(clip)
    other, host = learner.for_classes(OTHERS), host_of(learner).for_classes(OTHERS)
    assert learner.head and not other.head and other.hparams['head'] is False
    assert not any(n.startswith(('film_', 'linear')) for n in other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(x), host(x))
        for name, p in learner.named_parameters():
            if name.startswith(('film_', 'linear')): p += torch.randn_like(p)
        assert torch.equal(learner.for_classes(OTHERS)(x), other(x))
    assert learner.head and learner.hparams['head']

def test_trained_classes_keep_their_rows(clip):
    "Reordered, or fewer of them; one stranger among them, and there is no head"
    learner, (x, _) = moved(DePT(clip, NAMES).double()), batch(clip)
    with torch.no_grad():
        for rows in ([2, 0, 1], [2, 0], [1]):
            other = learner.for_classes([NAMES[i] for i in rows])
            assert other.head
            torch.testing.assert_close(other(x), learner(x)[:, rows])
        assert not learner.for_classes([*NAMES, 'violin']).head
        assert not learner.for_classes(OTHERS).for_classes(['cat']).head   # it was left behind
    assert rows_of(['a', 'a'], ['a', 'a']) == [0, 1] and rows_of(['a', 'a'], ['b', 'a']) == [1, 1]

def test_files(clip, half, tmp_path):
    "With and without a head"
    learner, (x, _) = moved(DePT(half, NAMES)), batch(half)
    for each in (learner, learner.for_classes(OTHERS), DePT(half, NAMES, head=False)):
        each.save(tmp_path/'p.safetensors')
        again = DePT.load(tmp_path/'p.safetensors', half)
        assert again.head == each.head and again.hparams == each.hparams
        assert ('linear.weight' in read_prompts(tmp_path/'p.safetensors')[1]) == each.head
        with torch.no_grad(): assert torch.equal(again(x), each(x))

def test_without_a_head_it_is_coop(clip, half, photos):
    learner, (x, y) = DePT(clip, NAMES, head=False).double(), batch(clip)
    host = host_of(learner)
    torch.testing.assert_close(learner.loss(x, y), host.loss(x, y))
    few = photos.few_shot(2)   # and can be trained by the same recipe
    fit(DePT(half, few.classnames, n_ctx=2, head=False), few, replace(DePT.recipe(), epochs=1),
        progress=False)


# ---- training ------------------------------------------------------------------------------------

def test_two_rates(clip):
    "New layers at 6.5 times the prompt's; at one rate in the first epoch; tuned together"
    recipe = DePT.recipe()
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (.0035, 10, 4)
    learner = DePT(clip, NAMES)
    for lr in (.0035, .01):
        first, *others = optimizer_of(learner, replace(recipe, lr=lr)).param_groups
        assert len(first['params']) == 1 and first['params'][0] is learner.ctx.tokens
        assert first['top'] == lr and sum(len(g['params']) for g in others) == 6
        for g in others:
            assert g['top'] == pytest.approx(6.5*lr)
            assert lr_at(recipe, 1, lr=g['top']) == lr_at(recipe, 1) == 1e-5
            assert lr_at(recipe, 4, lr=g['top']) == pytest.approx(
                6.5*lr_at(replace(recipe, lr=lr), 4))
    assert optimizer_of(learner, recipe).param_groups[1]['lr'] == pytest.approx(.02275)

def test_times_of_a_group(clip):
    "With a rate of the group's own it multiplies that; a name that nothing has is refused"
    def rates(groups):
        return {g['lr'] for g in optimizer_of(DePT(clip, NAMES), Recipe(lr=1., groups=groups))
                .param_groups}
    assert rates({'linear': dict(times=3.)}) == {1., 3.}
    assert rates({'linear': dict(times=3., lr=2.)}) == {1., 6.}
    assert rates({'linear': dict(lr=2.)}) == {1., 2.}
    with pytest.raises(ValueError) as e: rates({'meta_net': dict(times=3.)})
    one_line(e, "begins with 'meta_net'")
    for times in ('six', -1., None, True):
        with pytest.raises(ValueError) as e: rates({'linear': dict(times=times)})
        one_line(e, 'times of a group')

@pytest.mark.parametrize('cls', HOSTS)
def test_recipe_is_one_for_all_hosts(cls):
    r = cls.recipe('base-to-new', 16)
    assert (r.lr, r.epochs, r.batch_size, r.optimizer) == (.0035, 10, 4, 'sgd')
    assert bool(cls.affordable().views) == (not cls.learns_image)

@pytest.mark.parametrize('cls,given', [(DePT, {}), (DeKgCoOp, dict(weight=2.)), (DeMaPLe, {})])
def test_training_resumes_bit_by_bit(half, photos, tmp_path, cls, given):
    few, recipe = photos.few_shot(2), replace(cls.affordable(), epochs=3)
    def new(): return cls(half, few.classnames, n_ctx=2, ctx_init=None, **given)
    whole, part = new(), new()
    fit(whole, few, recipe, progress=False)
    class Stop(Exception): pass
    class Interrupt(Hook):
        def before_epoch(self, run, epoch):
            if epoch == 3: raise Stop
    with pytest.raises(Stop):
        fit(part, few, recipe, checkpoint=tmp_path/'c.safetensors', progress=False,
            hooks=[Interrupt()])
    again = new()
    fit(again, few, recipe, checkpoint=tmp_path/'c.safetensors', progress=False)
    for (n, a), b in zip(whole.named_parameters(), again.parameters()): assert torch.equal(a, b), n
    assert all(not torch.equal(a, b) for a, b in zip(whole.parameters(), new().parameters()))

def test_kept_features_are_raw(half, photos):
    "Fixed views and evaluation read the cache, and give what the pictures give"
    few = photos.few_shot(2)
    learner = moved(DePT(half, few.classnames, n_ctx=2))
    recipe = replace(DePT.affordable(), epochs=1)
    x, y = next(Feed(learner, few, recipe, 0, 1).epoch(1))
    assert x.ndim == 2 and (x.norm(dim=-1)-1).abs().min() > 1e-3
    plain = next(Feed(CoOp(half, few.classnames, n_ctx=2), few, recipe, 0, 1).epoch(1))[0]
    assert torch.equal(F.normalize(x, dim=-1), plain)
    pictures = few.pictures('test', test_transform(half, raw=True))
    features, _ = encode(learner, pictures)
    images = torch.stack([test_transform(half)(few.read(i)) for i in few.test])
    with torch.no_grad(): torch.testing.assert_close(features, learner.image_features(images),
                                                     rtol=1e-4, atol=1e-4)
    score = evaluate(learner, few)
    with torch.no_grad(): torch.testing.assert_close(score.logits, learner(images), rtol=1e-3,
                                                     atol=1e-3)

def test_a_host_gets_frozen_features_of_length_one(half, photos):
    few = photos.few_shot(2)
    learner = DePromptSRC(half, few.classnames)
    for views in (None, 2):
        recipe = replace(DePromptSRC.affordable(), epochs=1, views=views)
        _, _, z = next(Feed(learner, few, recipe, 0, 1).epoch(1))
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(len(z)))

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('cls', [DePT, DeMaPLe])
def test_half_precision(half, photos, precision, cls):
    few, before = photos.few_shot(2), half.precision
    if precision == 'fp16' and half.device.type == 'cpu':
        try: torch.ones(2, 2).half() @ torch.ones(2, 2).half()
        except RuntimeError: pytest.skip('no fp16 here')
    half.precision = precision
    try:
        learner = cls(half, few.classnames)
        result = fit(learner, few, replace(cls.affordable(), epochs=2), progress=False)
    finally: half.precision = before
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learner.parameters())
    assert all(torch.isfinite(torch.tensor(result.losses)))


# ---- others who read features --------------------------------------------------------------------

def test_a_teacher(half, photos):
    "PromptKD's student compares with class features of length one"
    teacher = moved(DePT(half, photos.classnames, n_ctx=2))
    student = PromptKD(half, photos.classnames)
    student.taught_by(teacher)
    T = student.text_features()
    torch.testing.assert_close(T, F.normalize(teacher.text_features().detach(), dim=-1))
    x = batch(half)[0]
    with torch.no_grad():
        torch.testing.assert_close(student.teacher_logits(x), teacher(x), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('order', [1, -1])
def test_beside_others_on_a_page(half, photos, order):
    "The page looks once for all learners with a frozen image side; not with one kind of features"
    learners = [moved(DePT(half, photos.classnames, n_ctx=2)),
                moved(CoOp(half, photos.classnames, n_ctx=2))][::order]
    picture = photos.read(photos.test[0])
    said = Answers(learners)(picture)
    for learner, answer in zip(learners, said):
        alone, = Answers(learner)(picture)
        assert alone['top'] == answer['top']


# ---- the contract, and what is refused -----------------------------------------------------------

@pytest.mark.parametrize('cls,given', [
    (DePT, dict(share=.3, n_ctx=2)), (DePT, dict(csc=True, n_ctx=2)), (DePT, dict(head=False)),
    (DeMaPLe, {}), (DeMuDPT, dict(fusion='linear'))])
def test_contract(cls, given): check_learner(cls, **given)

class OwnKgCoOp(Decoupled, KgCoOp):
    "As a reader would write it"
    method = 'own'
    def __init__(self, backbone, classnames, n_ctx=None, csc=False, ctx_init='auto', weight=2.,
                 templates=None, share=.7, head=True, seed=0):
        super().__init__(backbone, classnames, n_ctx=n_ctx, csc=csc, ctx_init=ctx_init,
                         weight=weight, templates=templates, share=share, head=head, seed=seed)

def test_contract_around_kgcoop(clip):
    check_learner(OwnKgCoOp)
    assert OwnKgCoOp(clip, NAMES).loss_weights == pytest.approx(
        dict(ce=.3, ce_linear=.7, kg=2.))

@pytest.mark.parametrize('given,says', [
    (dict(share=1.5), 'from 0 to 1'), (dict(share=-.1), 'from 0 to 1'),
    (dict(share='all'), 'from 0 to 1'), (dict(share=True), 'from 0 to 1'),
    (dict(share=float('nan')), 'from 0 to 1'), (dict(head='yes'), 'True or False'),
    (dict(head=None), 'True or False')])
def test_bad_input(clip, given, says):
    with pytest.raises(ValueError) as e: DePT(clip, NAMES, **given)
    one_line(e, says)

@pytest.mark.parametrize('host,says', [
    (CoCoOp, 'class features'), (VariationalCoOp, 'class features'), (ProGrad, 'steps of its own')])
def test_hosts_that_it_cannot_have(clip, host, says):
    cls = type('Cannot', (Decoupled, host), dict(method='cannot'))
    with pytest.raises(ValueError) as e: cls(clip, NAMES)
    one_line(e, says, 'another learner')

@pytest.mark.parametrize('host,what', [(TCP, 'text'), (ClipLoRA, 'image'), (ProVPRef, 'text')])
def test_hosts_that_scale_by_themselves(clip, host, what):
    "The head would read features without their length"
    cls, (x, y) = type('Scales', (Decoupled, host), dict(method='scales')), batch(clip)
    learner = cls(clip, NAMES).double()
    with pytest.raises(ValueError) as e: learner.loss(x, y, *beside(learner, x))
    one_line(e, f'the {what} features have length one', 'self.scaled')

@pytest.mark.parametrize('host', [IVLP, VPT])
def test_hosts_without_a_line_of_their_own(clip, host):
    "Prompts in both towers, or in the image tower alone"
    cls = type('Other', (Decoupled, host), dict(method='other'))
    learner, (x, y) = cls(clip, NAMES).double(), batch(clip)
    grads = torch.autograd.grad(learner.loss(x, y), list(learner.parameters()))
    assert all(g.any() for g in grads)

class Forgets(DePT):
    "Another share in a copy for other classes"
    method = 'forgets'
    def carried(self, classnames):
        hparams, state = super().carried(classnames)
        return hparams | dict(share=.1), state

class Clings(DePT):
    "Says of nothing that it stays, so its copies and their files lack what the contract promises"
    method, stays = 'clings', {}
    def carried(self, classnames):
        own = 'film_', 'linear.'
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(own)}
        return self.hparams | dict(head=False), state

@pytest.mark.parametrize('cls', [Forgets, Clings])
def test_the_contract_finds_copies_that_lose_something(cls):
    with pytest.raises(ContractError): check_learner(cls, n_ctx=2)
