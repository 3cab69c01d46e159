"""MetaPrompt: what must hold whatever the numbers are. The reference's own numbers are replayed in
test_goldens."""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipprompt.check import check_learner
from clipprompt.coop import CoOp
from clipprompt.data import join
from clipprompt.pictures import DataError
from clipprompt.sets import load_dataset
from clipprompt.learner import Recipe
from clipprompt.metaprompt import (MODES, Episodic, MetaPrompt, Part, class_episodes, class_groups,
                                   domain_episodes, rehearse)
from clipprompt.prompts import Prompts, phrase_tokens
from clipprompt.protocols import Method, domain
from clipprompt.provp import ProVPRef
from clipprompt.towers import TextTower, VisionTower
from clipprompt.steps import lr_at
from clipprompt.training import fit
from helpers import one_line, tiny_clip

NAMES = ['camera', 'shopping_cart', 'key', 'umbrella', 'alarm clock', 'fork', 'bed']


@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)

@pytest.fixture
def batch(clip):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64)
    return x, torch.arange(8) % 7, CoOp(clip, NAMES, n_ctx=1).frozen_image(x), torch.arange(8) % 3

def learner_of(clip, **hparams): return MetaPrompt(clip, NAMES, **hparams).double()


def sgd(learner, lr=.05, momentum=.9):
    return torch.optim.SGD(learner.parameters(), lr, momentum, weight_decay=5e-4)


@pytest.mark.parametrize('hparams', [  # besides the defaults, in test_check.py
    dict(mode='clean', order=2), dict(split='domain', depth=2, mode='restore',
                                      templates=['a {}', 'the {} there'])], ids=str)
def test_contract(hparams): assert (check_learner(MetaPrompt, **hparams).result == 'passed').all()


def test_v1_each_term_reaches_its_tower_and_all_its_tokens(clip, batch):
    learner = learner_of(clip)
    reach = {}
    for k, v in learner.loss_terms(*batch).items():
        grads = torch.autograd.grad(v, [learner.ctx.tokens, learner.visual_ctx.tokens],
                                    retain_graph=True,
                                    allow_unused=True)
        reach[k] = [None if g is None else bool((g.abs().amax(-1) > 0).all()) for g in grads]
    assert reach == dict(ce_mix=[True, True], ce_image=[None, True], ce_text=[True, None])


def test_v2_the_mean_of_logits_costs_no_more_than_the_mean_of_losses(clip, batch):
    terms = learner_of(clip).loss_terms(*batch)
    assert terms['ce_mix'] < (terms['ce_image']+terms['ce_text'])/2
    assert learner_of(clip).loss(*batch) == sum(terms.values())


def episodes_of(learner, batch):
    x, y, z, d = batch
    if learner.hparams['split'] == 'domain': return domain_episodes(d), ['visual_ctx.tokens']
    return class_episodes(y, [torch.tensor([5, 0, 3, 2]), torch.tensor([1, 6, 4])]), ['ctx.tokens']


def gradient(learner, part, batch, tokens):
    return torch.autograd.grad(learner.episode_loss(part, *batch[:3]), tokens)[0]


@pytest.mark.parametrize('split', ['class', 'domain'])
@pytest.mark.parametrize('order', [1, 2])
def test_v3_inner_rate_zero_gives_plain_gradients(clip, batch, split, order):
    learner = learner_of(clip, split=split, mode='clean', order=order)
    episodes, names = episodes_of(learner, batch)
    tokens = dict(learner.named_parameters())[names[0]]
    plain = sum(gradient(learner, test, batch, tokens) for _, test in episodes)
    total, = rehearse(learner, sgd(learner, lr=0.), episodes,
                      lambda p: learner.episode_loss(p, *batch[:3]), names, 'clean', order)
    assert torch.allclose(total, plain, rtol=1e-11, atol=1e-14) and plain.abs().max() > 1e-3


@pytest.mark.parametrize('split', ['class', 'domain'])
def test_v4_v5_second_order(clip, batch, split):
    """Order 2 is the slope of the test loss behind a trial step; order 1 is not; (I - eta H) takes
    one to the other"""
    learner, eta = learner_of(clip, split=split), 2.
    (episode, *_), names = episodes_of(learner, batch)
    tokens = dict(learner.named_parameters())[names[0]]
    loss = lambda p: learner.episode_loss(p, *batch[:3])
    start = tokens.detach().clone()
    def G(order):
        tokens.data.copy_(start)
        total, = rehearse(learner, sgd(learner, eta), [episode], loss, names, 'clean', order, mu=0.)
        assert torch.equal(tokens, start)
        return total
    first, second = G(1), G(2)
    def after(theta):
        tokens.data.copy_(theta)
        tokens.data.copy_(theta - eta*gradient(learner, episode[0], batch, tokens))
        value = loss(episode[1]).item()
        tokens.data.copy_(start)
        return value
    g = torch.Generator().manual_seed(0)
    for d in (second, torch.randn(second.shape, generator=g, dtype=torch.float64)):
        h = 1e-5/d.norm()
        numeric = (after(start + h*d) - after(start - h*d))/(2*h)
        assert numeric.item() == pytest.approx((second*d).sum().item(), rel=1e-5)
    assert (first-second).norm() > 1e-3*second.norm()
    h = 1e-4/first.norm()
    def slope(theta): tokens.data.copy_(theta); return gradient(learner, episode[0], batch, tokens)
    Hg = (slope(start+h*first)-slope(start-h*first))/(2*h)
    assert (first-eta*Hg-second).norm() < 1e-4*(first-second).norm()


def test_v6_groups_and_domains():
    torch.manual_seed(0)
    for C in (2, 3, 6, 7):
        a, b = class_groups(C)
        assert len(a) == (C+1)//2 and sorted(torch.cat([a, b]).tolist()) == list(range(C))
    # drawn anew
    assert len({tuple(class_groups(9)[0].tolist()) for _ in range(20)}) > 10
    labels = torch.tensor([0, 1, 2, 3])
    groups = [3, 0], [1, 2]
    episodes = class_episodes(labels, [torch.tensor(group) for group in groups])
    for (train, test), group in zip(episodes, groups):
        assert not (train.rows & test.rows).any()
        assert (train.rows | test.rows).all()
        assert test.classes.tolist() == group
        assert train.classes[train.among(labels)].tolist() == labels[train.rows].tolist()
    # a group of one class is never tested
    assert len(class_episodes(labels, [torch.tensor([0, 1, 2]), torch.tensor([3])])) == 1
    # no image of the other group
    assert class_episodes(torch.tensor([0, 0]), [torch.tensor([0, 1]), torch.tensor([2, 3])]) == []
    three = class_episodes(labels, [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3])])
    assert len(three) == 1 and three[0][0].classes.tolist() == [2, 3]
    episodes = domain_episodes(torch.tensor([4, 0, 4, 7]))
    assert [e[1].rows.tolist()
            for e in episodes] == [[d == k for d in (4, 0, 4, 7)] for k in (0, 4, 7)]
    assert all((a.rows ^ b.rows).all() for a, b in episodes)


def test_v6_order_inside_a_group_does_not_matter(clip, batch):
    learner, rows = learner_of(clip), batch[1] < 4
    a, b = (learner.episode_loss(Part(rows, torch.tensor(c)), *batch[:3])
            for c in ([0, 1, 2, 3], [2, 0, 3, 1]))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize('split', ['class', 'domain'])
@pytest.mark.parametrize('mode', MODES)
def test_v7_v8_v9_modes_by_hand(clip, batch, split, mode):
    """Two whole steps against the definition written out; the other tower does not move in the
    episodes"""
    learner, plain = learner_of(clip, split=split, mode=mode), learner_of(clip, split=split)
    opt, opt2 = sgd(learner), sgd(plain)
    frozen = {k: v.clone() for k, v in clip.model.state_dict().items()}
    for _ in range(2):
        episodes, (name,) = episodes_of(learner, batch)
        learner.groups = None
        if split == 'class':
            learner.groups = [episodes[0][1].classes, episodes[1][1].classes]
        here, there = (batch if split == 'domain' else batch[:3]), dict(plain.named_parameters())
        loss = learner.training_step(here, opt)
        # step (A)
        ordinary = super(MetaPrompt, plain).training_step(here, opt2)
        assert ordinary.item() == pytest.approx(loss.item(), rel=1e-12)
        tokens, lr = there[name], .05
        others = {k: v.detach().clone() for k, v in there.items() if k != name}
        start, total = tokens.detach().clone(), 0
        for k, (train, test) in enumerate(episodes):
            g = gradient(plain, train, batch, tokens)
            if mode == 'clean': tokens.data.copy_(start-lr*g)
            else:
                buffer = opt2.state[tokens]['momentum_buffer']
                buffer.mul_(.9).add_(g + 5e-4*tokens.detach())
                tokens.data.sub_(lr*buffer)
            total = total + gradient(plain, test, batch, tokens)
            if mode != 'reference' or k == 0: tokens.data.copy_(start)
        # what the aliased backup keeps
        assert torch.equal(tokens, start) == (mode != 'reference')
        tokens.data.sub_(.2*lr*total)
        for k, v in learner.named_parameters():
            torch.testing.assert_close(v, there[k], rtol=1e-10, atol=1e-13)
        assert all(torch.equal(v, there[k]) for k, v in others.items())
    assert all(torch.equal(v, frozen[k]) for k, v in clip.model.state_dict().items())


def test_v9_counts():
    clip = tiny_clip()
    learner = MetaPrompt(clip, NAMES, n_ctx=4, n_visual=3)
    assert sum(p.numel() for p in learner.parameters()) == 3*(4*24 + 3*32)


def test_v10_words_in_the_first_layer_are_the_frozen_sentence(clip):
    learner = MetaPrompt(clip, NAMES, n_ctx=4, depth=1, templates='a photo of a {}.').double()
    learner.ctx.tokens.data[0] = phrase_tokens(clip, 'a photo of a')
    torch.testing.assert_close(learner.prompted_text(), learner.classifier(), rtol=1e-10,
                               atol=1e-12)


def test_v11_what_a_block_puts_out_at_fresh_slots_is_discarded(clip, batch):
    class Loud(Prompts):
        def enter(self, layer, carried):
            return super().enter(layer, None if carried is None else carried*float('nan'))
    learner = learner_of(clip)
    before = learner(batch[0])
    for k in ('ctx', 'visual_ctx'):
        old = getattr(learner, k)
        loud = Loud(2, old.tokens.shape[-1], 3).double(); loud.load_state_dict(old.state_dict())
        setattr(learner, k, loud)
    assert torch.equal(learner(batch[0]), before)


@pytest.mark.parametrize('split', ['class', 'domain'])
def test_v12_only_what_a_step_needs_is_run(clip, batch, split, monkeypatch):
    """Group classes only, no image tower in class episodes, no text tower in domain episodes; the
    full computation gives the same"""
    learner, ran = learner_of(clip, split=split, mode='clean'), []
    (train, test), *_ = episodes_of(learner, batch)[0]
    x, y, z, _ = batch
    if split == 'class':
        full = clip.logit_scale*z @ learner.prompted_text().T
        full = full[test.rows][:, test.classes]
    else:
        full = clip.logit_scale*learner.prompted_image(x) @ learner.classifier().T
        full = full[test.rows]
    value = learner.episode_loss(test, x, y, z)
    torch.testing.assert_close(value, F.cross_entropy(full, test.among(y)), rtol=1e-11, atol=0)
    text, vision = TextTower.__call__, VisionTower.__call__
    monkeypatch.setattr(TextTower, '__call__',
                        lambda self, s, p=None: ran.append(len(s.ids)) or text(self, s, p))
    monkeypatch.setattr(VisionTower, '__call__',
                        lambda self, x, p=None: ran.append(-len(x)) or vision(self, x, p))
    learner.episode_loss(test, x, y, z)
    assert ran == ([len(test.classes)] if split == 'class' else [-int(test.rows.sum())])


def test_v13_prediction_and_schedule(clip, batch):
    learner, s = learner_of(clip), clip.logit_scale
    li = s*learner.prompted_image(batch[0]) @ learner.classifier().T
    lt = s*batch[2] @ learner.prompted_text().T
    torch.testing.assert_close(learner(batch[0]), (li+lt)/2)
    b2n, dg = (MetaPrompt.recipe(x) for x in ('base-to-new', 'domain-generalisation'))
    rates = 1e-5, 1.5e-3, 1.44291e-3, 1.28033e-3, 1.03701e-3, 7.5e-4, 4.62987e-4, 2.19670e-4
    assert [f'{lr_at(b2n, e):.5e}' for e in range(1, 9)] == [f'{x:.5e}' for x in rates]
    rates = 1e-5, 1.5e-3, 1.39952e-3, 1.125e-3, 7.5e-4, 3.75e-4
    assert [f'{lr_at(dg, e):.5e}' for e in range(1, 7)] == [f'{x:.5e}' for x in rates]


# ---- episodes around other learners, and the data they need --------------------------------------


class EpisodicCoOp(Episodic, CoOp): method = 'coop-episodes'
class EpisodicProVPRef(Episodic, ProVPRef): method = 'provp-ref-episodes'

@pytest.mark.parametrize('cls,hparams', [(EpisodicCoOp, dict(n_ctx=2, order=2)),
                                         (EpisodicProVPRef, dict(n_visual=2))],
                         ids=['coop', 'provp-ref'])
def test_contract_with_episodes(cls, hparams):
    "Files, other classes, determinism and the rest hold around a learner as well"
    assert (check_learner(cls, **hparams).result == 'passed').all()


@pytest.mark.parametrize('around,cls,hparams', [(EpisodicCoOp, CoOp, dict(n_ctx=2)),
                                                (EpisodicProVPRef, ProVPRef, dict(n_visual=2))],
                         ids=['coop', 'provp-ref'])
def test_episodes_around_any_learner(clip, batch, around, cls, hparams):
    "An ordinary step, then the outer step of the definition"
    ours = around(clip, NAMES, **hparams).double()
    plain = cls(clip, NAMES, **hparams).double()
    here = batch[:2+len(plain.reads)]
    torch.manual_seed(3); a = ours.training_step(here, sgd(ours))
    assert a.ndim == 0 and not a.requires_grad
    assert a == plain.training_step(here, sgd(plain))
    torch.manual_seed(3); episodes = class_episodes(batch[1], class_groups(7))

    def loss(part):
        return F.cross_entropy(plain(batch[0][part.rows])[:, part.classes], part.among(batch[1]))
    (p,) = plain.parameters()
    start, total = p.detach().clone(), 0
    for train, test in episodes:
        p.data.copy_(start - .05*torch.autograd.grad(loss(train), p)[0])
        total = total + torch.autograd.grad(loss(test), p)[0]
        p.data.copy_(start)
    torch.testing.assert_close(next(ours.parameters()), start - .2*.05*total, rtol=1e-10,
                               atol=1e-13)
    assert (total*.01).abs().max() > 1e-9


@pytest.fixture(scope='module')
def joined():
    sources = [load_dataset(task=t) for t in ('icons', 'edges')]
    return join(sources, load_dataset(task='pixels')).few_shot(1)

def test_domains_reach_the_step(joined, monkeypatch):
    """Each image comes with the domain it was drawn in, with fresh and with fixed views, around a
    learner of its own or MetaPrompt"""
    picto, seen = tiny_clip(), []
    data = replace(joined, train=joined.train[:24] + joined.train[80:104])
    assert data.domains == ['edges', 'icons', 'pixels']
    pictures = data.pictures('train',
                             lambda image: torch.tensor(float(sum(image.getpixel((32, 32))))))
    assert pictures.domains.tolist() == [1]*24 + [0]*24
    for learner in (MetaPrompt(picto, data.classnames),
                    EpisodicCoOp(picto, data.classnames, n_ctx=2, split='domain')):
        learner.prepare(data)
        own = 'frozen' in learner.reads
        assert learner.reads[-1] == 'domains'
        for views in (None, 1):
            learner.training_step = lambda batch, optimizer: seen.append(batch) or 1.
            fit(learner, data, Recipe(epochs=1, batch_size=48), seed=1, views=views, progress=False)
            images, labels, *rest = seen.pop()
            assert len(rest) == 1+own
            drawn = sorted(zip(rest[-1].tolist(), labels.tolist()))
            assert drawn == sorted((d, i.label) for d, i in zip([1]*24 + [0]*24, data.train))
            if own:
                features = learner.frozen_image(images)
                torch.testing.assert_close(rest[0], features, rtol=1e-4, atol=1e-5)


def test_resuming_draws_the_same_groups(joined, tmp_path):
    "Bit-equal after an interruption, though the groups are drawn at random"
    picto = tiny_clip()
    data = load_dataset().base().few_shot(1)
    recipe = Recipe(lr=.005, epochs=3, batch_size=6)  # two steps an epoch
    whole, again = (MetaPrompt(picto, data.classnames, depth=1, mode='clean') for _ in range(2))
    torch.manual_seed(5); fit(whole, data, recipe, seed=2, progress=False)
    stop = MetaPrompt(picto, data.classnames, depth=1, mode='clean')
    step, n = stop.training_step, []
    def stops(*args):
        n.append(1)
        if len(n) == 4: raise KeyboardInterrupt
        return step(*args)
    stop.training_step = stops
    with pytest.raises(KeyboardInterrupt):
        fit(stop, data, recipe, seed=2, checkpoint=tmp_path/'c', progress=False)
    torch.manual_seed(99); fit(again, data, recipe, seed=2, checkpoint=tmp_path/'c', progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_a_plain_run_is_not_resumed_with_episodes(tmp_path):
    picto, data = tiny_clip(), load_dataset().base().few_shot(1)
    recipe = Recipe(epochs=1, views=1)
    fit(CoOp(picto, data.classnames, n_ctx=1), data, recipe, checkpoint=tmp_path/'c',
        progress=False)
    with pytest.raises(ValueError) as e:
        fit(EpisodicCoOp(picto, data.classnames, n_ctx=1), data, recipe, checkpoint=tmp_path/'c',
            progress=False)
    one_line(e, 'another run', 'hparams, method differ')


def test_domains_in_a_protocol(joined):
    picto = tiny_clip()
    row = domain(Method(MetaPrompt, dict(depth=1), Recipe(epochs=1)), picto, joined, shots=1)
    assert row['protocol'] == 'domain' and row['task'] == 'pixels' and 0 < row['accuracy'] < 100


@pytest.mark.parametrize(
    'call,says',
    [(lambda c: MetaPrompt(c, NAMES, mode='aliased'), ['aliased', 'clean', 'reference']),
     (lambda c: MetaPrompt(c, NAMES, order=3), ['1 or 2', '3']),
     (lambda c: MetaPrompt(c, NAMES, order=2), ["'clean'", 'reference']),
     (lambda c: MetaPrompt(c, NAMES, split='image'), ['class', 'domain', 'image']),
     (lambda c: EpisodicCoOp(c, NAMES, split='image'), ['class', 'domain', 'image']),
     (lambda c: EpisodicCoOp(c, NAMES, mode='x'), ['unknown mode']),
     (lambda c: domain(Method(CoOp), c, load_dataset()), ['one domain', 'join']),
     (lambda c: join([], load_dataset()), ['at least one']),
     (lambda c: join([load_dataset('emoji')], load_dataset()), ['other classes']),
     (lambda c: join([load_dataset()], load_dataset()), ['not all different'])])
def test_bad_input(clip, call, says):
    with pytest.raises(ValueError) as e: call(clip)
    one_line(e, *says)
    if 'join' in says[-1:]: assert isinstance(e.value, DataError)


def test_too_few_shots_in_one_domain(joined):
    with pytest.raises(DataError) as e: joined.few_shot(2)
    one_line(e, '2 shots', 'in one of its domains', 'at most 1')
