"""MAP-DAFE has no reference code and no published number: what stands in for a golden are 21 exact
invariants of the reconstruction, in float64."""
import copy

import pytest
import torch
from torch.nn import functional as F

from clipprompt import map_dafe
from clipprompt.backbone import build_backbone
from clipprompt.check import check_learner
from clipprompt.deep import IVLP, VPT
from clipprompt.learner import Classifier
from clipprompt.map_dafe import GATES, MAPDAFE, PRESETS, RATE, Gated, Reading, around, read_images
from clipprompt.prompts import Given, Prompts, Sentences, place
from clipprompt.towers import TextTower, VisionTower
from clipprompt.zeroshot import ZeroShot
from helpers import TINY, one_line, tiny_clip

NAMES = ['cat', 'a very old red fire engine', 'guide dog']   # of different lengths
OTHERS = ['shopping cart', 'cat']
BOTH = ('ctx', 'visual_ctx')


@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)

@pytest.fixture(scope='module')
def images(clip): return noise(4, 3, clip.image_size, clip.image_size, seed=9)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def make(clip, names=NAMES, moved=0, **kw):
    "A learner in float64; `moved` seeds what is added to its start"
    learner = MAPDAFE(clip, names, **dict(n_ctx=3, n_visual=2) | kw).double()
    for p in learner.parameters() if moved else (): p.data += .3*noise(*p.shape, seed=moved)
    return learner

def sentences(clip, names=NAMES): return Sentences.of(clip, [f'a photo of a {n}.' for n in names])

def same(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def differ(a, b): return (a-b).abs().max().item()

def train(learner, images, steps=3, lr=.5):
    opt, y = torch.optim.SGD(learner.train().parameters(), lr,
                             momentum=.9), torch.arange(len(images)) % len(learner.classnames)
    return [learner.training_step((images, y), opt) for _ in range(steps)]

def watch(monkeypatch, name='run_beside'):
    "Rows that enter and leave each block"
    seen, run = [], getattr(map_dafe, name)
    def spy(block, x, *args, **kwargs):
        y = run(block, x, *args, **kwargs)
        seen.append((x, y if isinstance(y, torch.Tensor) else y[0]))
        return y
    monkeypatch.setattr(map_dafe, name, spy)
    return seen

def by_hand(clip, names, rows, text='read', p2p='none', enter=lambda l, x: x):
    """All rows of [template; prompts (; EOT)] of each class alone, written out: states behind
    every block, [L+R, d_t] each"""
    out = []
    for ids in sentences(clip, names).ids:
        ids = ids[:int(ids.argmax())+1]
        L, m = len(ids), rows.shape[0]
        positions = clip.text.positional_embedding
        words, pos = clip.embed(ids) + positions[:L], positions[L - 1]
        x = torch.cat([words, rows + pos, words[-1:]][:2 + (text == 'read_eot')])
        may = torch.zeros(len(x), len(x), dtype=torch.bool)
        may[:L, :L] = torch.ones(L, L).tril().bool()
        may[L:, :L - (text == 'read_eot')] = True
        may[L:L + m, L:L + m] = dict(none=torch.zeros(m, m), self=torch.eye(m),
                                     causal=torch.ones(m, m).tril(),
                                     full=torch.ones(m, m))[p2p].bool()
        if text == 'read_eot': may[-1, L:] = True
        if text == 'both': may[:L, L:] = True
        mask, states = torch.zeros(len(x), len(x), dtype=x.dtype).masked_fill(~may, -torch.inf), []
        for l, block in enumerate(clip.text.transformer.resblocks):
            if l: x = torch.cat([x[:L], enter(l, x[L:L+m]), x[L+m:]])
            x = block(x[None], attn_mask=mask)[0]
            states.append(x)
        out.append(states)
    return out

def feature(clip, x): return F.normalize(clip.text.ln_final(x) @ clip.text.text_projection, dim=-1)


# ---- the invariants ------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [{}, dict(p2p='full'), dict(gate_text=.5), dict(text='read_eot')])
def test_01_the_template_never_sees_a_prompt(clip, images, kw):
    "Its states with prompts beside it are those without, in each block, also after training"
    learner = make(clip, moved=1, **kw)
    train(learner, images)
    rule, p = learner.ctx, learner.ctx.tokens[0].detach()
    with torch.no_grad():
        hand = by_hand(clip, NAMES, p, kw.get('text', 'read'), kw.get('p2p', 'none'),
                       lambda l, x: rule.enter(l, x))
        for n, states in zip(NAMES, hand):
            ids = sentences(clip, [n]).ids[:, :states[0].shape[0]]
            L = int(ids.argmax())+1
            x = clip.embed(ids[:, :L]) + clip.text.positional_embedding[:L]
            for block, state in zip(clip.text.transformer.resblocks, states):
                x = block(x, attn_mask=clip.text.attn_mask[:L, :L])
                same(state[:L], x[0])
        fresh = make(clip).reading.template(slice(0, 3))
        kept = learner.reading.template(slice(0, 3))
        assert all(torch.equal(a, b) for x, y in zip(fresh, kept) for a, b in zip(x, y))


def test_02_so_the_feature_at_eot_is_zero_shot(clip):
    "A classifier that read EOT beside read-only prompts would train nothing"
    learner = make(clip, moved=1)
    p = learner.ctx.tokens[0]
    each = zip(by_hand(clip, NAMES, p), sentences(clip).eot)
    at_eot = torch.stack([feature(clip, states[-1][int(e)]) for states, e in each])
    same(at_eot, ZeroShot(clip, NAMES).text_features())
    (g,) = torch.autograd.grad(at_eot.square().sum() + 0*p.sum(), p)
    assert g.abs().max() == 0
    assert differ(learner.text_features(), at_eot) > 1e-2


@pytest.mark.parametrize('text', ['write', 'both'])
def test_03_written_to_the_template_changes(clip, text):
    a, b = make(clip, text=text, moved=1), make(clip, text=text, moved=2)
    assert differ(a.text_features(), b.text_features()) > 1e-2
    assert differ(a.text_features(), ZeroShot(clip, NAMES).text_features()) > 1e-2
    if text == 'both':
        states = by_hand(clip, NAMES, a.ctx.tokens[0].detach(), 'both',
                         enter=lambda l, x: a.ctx.enter(l, x))
        each = zip(states, sentences(clip).eot)
        same(a.text_features(), torch.stack([feature(clip, s[-1][int(e)]) for s, e in each]))


def test_04_in_coops_slot_prompts_know_nothing_of_the_class(clip, monkeypatch):
    s, p = place(clip, NAMES, 3), Prompts(3, clip.text_width, std=.5).double()
    class Watch(Given):
        def __init__(self): super().__init__(p.tokens); self.seen = []

        def enter(self, layer, carried):
            self.seen.append(carried)
            return super().enter(layer, carried)
    TextTower(clip, plain=True)(s, w := Watch())
    # [C, n, d_t]
    carried = [o for o in w.seen if o is not None][-1][0]
    assert differ(carried, carried[:1]) < 1e-12
    seen = watch(monkeypatch)
    make(clip, moved=1).text_features()
    # behind block 0 already
    assert differ(seen[0][1][:1], seen[0][1][1:]) > 1e-2


@pytest.mark.parametrize('kw,chunk', [
    (dict(p2p='none'), None), (dict(p2p='self'), 2), (dict(p2p='causal'), None),
    (dict(p2p='full'), 2), (dict(text='read_eot', p2p='causal'), 2), (dict(text='both'), 2),
    (dict(text='both'), None), (dict(depth_text=1), 2), (dict(gate='conditional'), None)])
def test_05_kept_keys_and_values_are_the_full_masked_forward(clip, kw, chunk):
    """Features and gradients; against open_clip's blocks under one mask, and against each class
    written out by hand"""
    seen = []
    for plain in (True, False):
        learner = make(clip, moved=1, **kw)
        learner.text.plain, learner.text.chunk = plain, chunk
        y = learner.text_features()
        seen.append([y, *torch.autograd.grad(y[:, ::2].sum(), list(learner.ctx.parameters()))])
    for a, b in zip(*seen): same(a, b, 1e-10)
    states = by_hand(clip, NAMES, learner.ctx.tokens[0], kw.get('text', 'read'),
                     kw.get('p2p', 'none'), learner.ctx.enter)
    if kw.get('text', 'read') == 'read':
        hand = torch.stack([F.normalize(feature(clip, s[-1][-3:]).mean(0), dim=-1) for s in states])
    else:
        rows = [-1 if kw['text'] == 'read_eot' else int(e) for e in sentences(clip).eot]
        hand = torch.stack([feature(clip, s[-1][row]) for s, row in zip(states, rows)])
    same(seen[1][0], hand, 1e-10)


def test_06_behind_eot_the_causal_mask_does_it(clip):
    """Prompts that overwrite the padding behind EOT, under CLIP's own mask, are appended prompts
    that read each other causally"""
    learner, s = make(clip, moved=1, p2p='causal', depth_text=1), sentences(clip)
    for c, (ids, e) in enumerate(zip(s.ids, s.eot)):
        # all 77 positions
        x = clip.embed(ids) + clip.text.positional_embedding
        prompts = learner.ctx.tokens[0] + clip.text.positional_embedding[e]
        x = torch.cat([x[:e + 1], prompts, x[e + 4:]])[None]
        for block in clip.text.transformer.resblocks: x = block(x, attn_mask=clip.text.attn_mask)
        same(F.normalize(feature(clip, x[0, e+1:e+4]).mean(0), dim=-1), learner.text_features()[c])


@pytest.mark.parametrize('text', ['read', 'read_eot', 'both'])
def test_07_padding_is_not_read(clip, text):
    "A short class beside a long one has the feature it has alone"
    for plain in (True, False):
        (together := make(clip, moved=1, text=text)).text.plain = plain
        for c, n in enumerate(NAMES):
            (alone := make(clip, [n], moved=1, text=text)).text.plain = plain
            same(together.text_features()[c], alone.text_features()[0])


@pytest.mark.parametrize('m', [1, 4])
def test_08_the_start_can_be_zero_shot_exactly(clip, images, m):
    "EOT without noise, all carried, no prompt reads another, no image prompts: zero-shot logits"
    zero = ZeroShot(clip, NAMES)
    same(make(clip, n_ctx=m, n_visual=0, noise=0., gate_text=1.)(images), zero(images))
    both = make(clip, n_ctx=m, noise=0., gate_text=1., vision='read', gate_vision=1.)
    same(both(images), zero(images))                                               # CLS likewise
    # EOT counted twice
    for p in ('self', 'causal', 'full'):
        twice = make(clip, n_ctx=m, n_visual=0, noise=0., gate_text=1., p2p=p)
        assert differ(twice(images), zero(images)) > 1e-3

    def away(**kw):
        learner = make(clip, n_ctx=m, n_visual=0, gate_text=1., **kw)
        return differ(learner.text_features(), zero.text_features())
    assert 0 < away(noise=1e-4) < 1e-3 < away() and away(start='noise') > 1e-3


def test_09_at_zero_they_are_deep_prompts(clip, images):
    "The preset `ivlp` is IVLP, image prompts alone are VPT-deep: bit for bit"
    pairs = [(make(clip, n_ctx=2, **PRESETS['ivlp']), IVLP(clip, NAMES, n_ctx=2, n_visual=2)),
             (make(clip, n_ctx=0, gate_vision=0.), VPT(clip, NAMES, n_visual=2))]
    values = lambda learner: {k: v.tolist() for k, v in learner.state_dict().items()}
    for ours, theirs in pairs:
        theirs = theirs.double()
        assert values(ours) == values(theirs)
        assert torch.equal(ours(images), theirs(images))
        assert train(ours, images) == train(theirs, images)
        fixed = make(clip, n_ctx=2 if theirs.learns_text else 0, text='write', gate='fixed',
                     gate_text=0., gate_vision=0.)
        assert torch.equal(fixed(images),
                           ours.__class__(clip, NAMES, **ours.hparams).double()(images))


@pytest.mark.parametrize('kw', [{}, dict(text='write'), dict(text='both'), dict(vision='read')])
def test_10_at_one_they_are_shallow_prompts(clip, images, kw):
    learner = make(clip, gate_text=1., gate_vision=1., **kw)
    shallow = make(clip, depth_text=1, depth_vision=1, **kw)
    for k in BOTH: getattr(shallow, k).tokens.data.copy_(getattr(learner, k).tokens.data[:1])
    assert torch.equal(learner(images), shallow(images))
    learner.loss(images, torch.arange(4) % 3).backward()
    for k in BOTH:
        g = getattr(learner, k).tokens.grad.abs().amax((1, 2))
        assert g[0] > 0 and g[1:].eq(0).all()


@pytest.mark.parametrize('side,kw', [('ctx', {}), ('visual_ctx', dict(vision='read'))])
def test_11_read_only_prompts_that_are_replaced_are_dead(clip, images, side, kw):
    "At g = 0 nothing carries their effect: only the last block's tokens learn"
    learner = make(clip, gate_text=0., gate_vision=0., **kw)
    learner.loss(images, torch.arange(4) % 3).backward()
    g = getattr(learner, side).tokens.grad.abs().amax((1, 2))
    assert g[:-1].eq(0).all() and g[-1] > 0
    # B has none: EOT carries it
    other = make(clip, gate_text=0., gate_vision=0., text='read_eot')
    other.loss(images, torch.arange(4) % 3).backward()
    assert (other.ctx.tokens.grad.abs().amax((1, 2)) > 0).all()


KINDS = ({}, dict(text='both', vision='read'), dict(text='write'))

# every gate with every form, and with every way to read
@pytest.mark.parametrize('gate,form,kw', [
    (gate, form, KINDS[(i+j) % 3])
    for i, gate in enumerate(GATES[:-1]) for j, form in enumerate(('convex', 'additive', 'convex'))
])
def test_12_in_between_everything_learns(clip, images, gate, form, kw):
    learner = make(clip, moved=1, gate=gate, form=form, **kw)
    learner.loss(images, torch.arange(4) % 3).backward()
    for k in BOTH:
        for p in getattr(learner, k).parameters():
            assert (p.grad.flatten(1).abs().amax(1) > 0).all(), (k, p.shape)
    assert len(list(learner.parameters())) == 2*(2 + (gate == 'conditional'))


def test_13_cls_changes_only_where_it_reads_prompts(clip, images):
    frozen = Classifier(clip, NAMES).image_features(images)
    states = lambda vision: make(clip, moved=1, vision=vision).image_features(images)
    assert differ(states('both'), frozen) > 1e-2
    learner = make(clip, moved=1, vision='read')
    read, tower = Watching(learner.visual_ctx), VisionTower(clip)
    # the stream that read-only prompts stand beside is CLIP's own: its CLS gives the frozen feature
    stream = []
    run = map_dafe.run_block

    def kept(block, x, **kw):
        stream.append(run(block, x, **kw))
        return stream[-1]

    try:
        map_dafe.run_block = kept
        read_images(tower, images, read)
    finally: map_dafe.run_block = run
    same(F.normalize(clip.visual.ln_post(stream[-1][0][:, 0]) @ clip.visual.proj, dim=-1), frozen)


def test_read_only_image_prompts_by_hand(clip, images):
    """All rows of one image through open_clip's blocks, image tokens blind to the prompts, prompts
    to each other; and the mean of unit features"""
    p, vit = make(clip, moved=1, vision='read', n_visual=3).visual_ctx, clip.visual
    for i, ours in enumerate(read_images(VisionTower(clip), images, p)):
        x = torch.cat([
            VisionTower(clip).embed(images[i:i + 1]),
            (p.tokens[0] + vit.positional_embedding[0])[None]
        ], 1)
        x, N = vit.ln_pre(x), x.shape[1]-3
        mask = torch.zeros(N+3, N+3, dtype=x.dtype)
        mask[:, N:] = -torch.inf
        for l, block in enumerate(vit.transformer.resblocks):
            if l: x = torch.cat([x[:, :N], p.enter(l, x[:, N:])], 1)
            x = block(x, attn_mask=mask)
        same(ours, F.normalize(F.normalize(vit.ln_post(x[0, N:]) @ vit.proj, dim=-1).mean(0),
                               dim=-1))


class Watching(Given):
    "What came out at the slots, block by block"
    def __init__(self, prompts): self.prompts, self.tokens, self.seen = prompts, prompts.tokens, []

    def enter(self, layer, carried):
        self.seen.append(carried)
        return self.prompts.enter(layer, carried)


def test_14_image_prompts_become_the_image(clip, images):
    for run in (lambda w: VisionTower(clip)
                (images, w), lambda w: read_images(VisionTower(clip), images, w)):
        run(w := Watching(make(clip, moved=1).visual_ctx))
        # [B, n, d_v]
        assert w.seen[0] is None and all(differ(o[:1], o[1:]) > 1e-2 for o in w.seen[1:])
    # and text prompts the class
    for text in ('read', 'read_eot', 'both'):
        Reading(TextTower(clip), sentences(clip), text)(w := Watching(make(clip, moved=1).ctx))
        assert all(differ(o[:1], o[1:]) > 1e-2 for o in w.seen if o is not None)


@pytest.mark.parametrize('kw', [{}, dict(gate='token'), dict(vision='read')])
def test_15_order_of_prompts_does_not_matter(clip, images, kw):
    learner, perm = make(clip, moved=1, **dict(n_ctx=3, n_visual=3) | kw), [2, 0, 1]
    other = copy.deepcopy(learner.state_dict())
    for k, v in other.items():
        if v.shape[1] == 3: other[k] = v[:, perm]
    turned = make(clip, **dict(n_ctx=3, n_visual=3) | kw)
    turned.load_state_dict(other)
    same(turned(images), learner(images))


def test_16_edges_of_number_and_depth(clip, images):
    """No prompts at all are CLIP; every depth from 1 to all blocks runs, and what lies below is
    the same"""
    same(make(clip, n_ctx=0, n_visual=0)(images), ZeroShot(clip, NAMES)(images))
    assert not list(make(clip, n_ctx=0, n_visual=0).parameters())
    for kw in (dict(n_ctx=0), dict(n_visual=0)):
        learner = make(clip, moved=1, **kw)
        assert learner.learns_text == ('n_visual' in kw) and learner.learns_image == ('n_ctx' in kw)
        if 'n_visual' in kw:
            same(learner.image_features(images), Classifier(clip, NAMES).image_features(images))
        else: same(learner.text_features(), ZeroShot(clip, NAMES).text_features())
    seen = []
    for J in (1, 2, 3):
        learner = make(clip, depth_text=J, depth_vision=J)
        for k in BOTH:
            prompts = getattr(learner, k)
            assert prompts.tokens.shape[0] == J and hasattr(prompts, 'logits') == (J > 1)
        seen.append(learner(images))
    assert min(differ(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-4
    for J in (0, 4):
        with pytest.raises(ValueError): make(clip, depth_text=J)
        with pytest.raises(ValueError): make(clip, depth_vision=J)


@pytest.mark.parametrize(
    'kw',
    [{}, dict(text='read_eot'),
     dict(text='both', vision='read'),
     dict(gate='conditional')])
def test_17_images_and_classes_stand_alone(clip, images, kw):
    learner = make(clip, moved=1, **kw)
    whole = learner(images)
    for i in range(len(images)): same(learner(images[i:i+1]), whole[i:i+1])
    other = make(clip, [NAMES[2], 'umbrella', NAMES[0]], moved=1, **kw)
    same(other(images)[:, [2, 0]], whole[:, [0, 2]])


@pytest.mark.parametrize('form', ['convex', 'additive'])
@pytest.mark.parametrize('gate', GATES)
def test_18_every_gate_starts_as_the_same_share(clip, images, gate, form):
    same(make(clip, gate=gate, form=form)(images), make(clip, form=form)(images))
    p = Gated(3, 8, 4, share=.3, gate=gate)
    assert torch.as_tensor(p.gate(2, torch.randn(5, 3, 8))).mean().item() == pytest.approx(.3)


def test_19_what_is_trained_and_what_is_not(clip, images):
    J, n, m, dt, dv = 3, 3, 2, clip.text_width, clip.vision_width
    want = {
        'ctx.tokens': (J, n, dt), 'visual_ctx.tokens': (J, m, dv), 'ctx.logits': (J - 1, 1, 1),
        'visual_ctx.logits': (J - 1, 1, 1)
    }
    learner = make(clip)
    sizes = lambda named: {k: tuple(v.shape) for k, v in named}
    assert sizes(learner.named_parameters()) == want
    assert sizes(learner.state_dict().items()) == want
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    train(learner, images)
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())
    assert all(p.grad is None for p in clip.model.parameters())
    for gate, extra in dict(scalar=4, token=2*(n+m), channel=2*(dt+dv), conditional=4 + 2*(dt+dv),
                            fixed=0).items():
        assert sum(p.numel() for p in make(clip, gate=gate).parameters()) == J*(n*dt+m*dv) + extra


def test_20_variant_b(clip):
    "EOT behind the prompts: words unchanged (test 1), EOT changed, and without prompts it is CLIP"
    zero, s = ZeroShot(clip, NAMES).text_features(), sentences(clip)
    for plain in (True, False):
        reading = Reading(TextTower(clip, plain=plain), s, 'read_eot', 'causal')
        same(reading(Given(torch.zeros(1, 0, clip.text_width).double())), zero)
    learner = make(clip, moved=1, **PRESETS['map_dafe_b'])
    assert differ(learner.text_features(), zero) > 1e-2
    # CLIP's own mask over the sentence with tokens let in before EOT
    for c, n in enumerate(NAMES):
        ids = s.ids[c, :int(s.eot[c])+1]
        pos, e = clip.text.positional_embedding, len(ids)-1
        x, t = clip.embed(ids)+pos[:e+1], learner.ctx.tokens[0]+pos[e]
        x = torch.cat([x[:-1], t, x[-1:]])[None]
        for l, block in enumerate(clip.text.transformer.resblocks):
            if l: x = torch.cat([x[:, :e], learner.ctx.enter(l, x[:, e:e+3]), x[:, e+3:]], 1)
            x = block(x, attn_mask=clip.text.attn_mask[:x.shape[1], :x.shape[1]])
        same(feature(clip, x[0, -1]), learner.text_features()[c])


@pytest.mark.parametrize('preset', PRESETS)
def test_21_save_load_and_other_classes(preset, tmp_path):
    clip, x = tiny_clip(), noise(2, 3, 32, 32).float()
    learner = MAPDAFE(clip, NAMES, **PRESETS[preset], seed=3)
    for p in learner.parameters(): p.data += .1*torch.randn_like(p)
    learner.save(tmp_path/'p.safetensors')
    again = MAPDAFE.load(tmp_path/'p.safetensors', clip)
    assert torch.equal(again(x), learner(x)) and again.for_classes(OTHERS)(x).shape == (2, 2)
    # 'cat' in both lists
    same(again.for_classes(OTHERS)(x)[:, 1], learner(x)[:, 0], 1e-4)
    assert (tmp_path/'p.safetensors').stat().st_size < 40_000


# ---- beyond them ---------------------------------------------------------------------------------


# besides the defaults, in test_check.py
@pytest.mark.parametrize('kw', [PRESETS['map_dafe_b'],
                                dict(text='both', vision='read', gate='conditional')])
def test_contract(kw): assert (check_learner(MAPDAFE, **kw).result == 'passed').all()


def test_the_template_runs_once(clip, images, monkeypatch):
    "In training, in evaluation; anew for other classes, other weights, another precision"
    seen = watch(monkeypatch, 'run_block')
    learner = make(clip)
    train(learner, images)
    learner.text_features()
    assert len(seen) == 3                                                               # blocks
    assert not any(k.startswith('reading') for k in learner.state_dict())
    learner.for_classes(OTHERS).text_features()
    assert len(seen) == 6
    half = copy.copy(tiny_clip()); learner = MAPDAFE(half, NAMES, n_visual=0)
    a = learner.text_features()
    half.precision = 'bf16'
    b = learner.text_features()
    half.precision = None
    c = learner.text_features()
    assert torch.equal(a, c) and 1e-5 < differ(a, b) < .1
    half.to(torch.float64); d = learner.double().text_features()
    assert d.dtype == torch.float64 and differ(a, d) < 1e-4
    for p in half.model.parameters(): p.data *= 1.01
    del half.fingerprint
    assert differ(learner.text_features(), d) > 1e-4


def test_for_classes_keeps_its_tower(clip):
    learner = make(clip, moved=1)
    learner.text.plain = True
    other = learner.for_classes(OTHERS)
    other.text_features()
    assert other.text is learner.text
    assert other.reading.tower is learner.text
    assert not other.reading._kept


def test_gate_rates(clip):
    """One step of SGD moves a gate's logit ten times as far as plain descent would, and decay
    pulls it to its start"""
    p = Gated(2, 4, 3, share=.2).double()
    a0 = torch.tensor(.2/.8, dtype=torch.float64).log()
    a = a0.clone().requires_grad_()
    slope, = torch.autograd.grad(a.sigmoid().square(), a)
    opt = torch.optim.SGD(p.parameters(), .01)
    p.gate(1).square().sum().backward(); opt.step()
    assert (p.gate(1).logit()-a0).item() == pytest.approx(-RATE*.01*slope.item(), rel=1e-9)
    assert p.gate(2).item() == pytest.approx(.2)
    with torch.no_grad(): p.logits += 3; p.logits *= 0
    assert p.gate(1).item() == pytest.approx(.2)


def test_forms_and_scales():
    out, p = noise(5, 2, 8), Gated(2, 8, 3, share=.3, seed=1).double()
    same(p.enter(1, out), .3*out + .7*p.tokens[1])
    gated = lambda **kw: Gated(2, 8, 3, share=.3, seed=1, **kw).double()
    same(gated(form='additive').enter(1, out), .3*out + p.tokens[1])
    same(gated(scale=5.).enter(1, out), .3*out + 3.5*p.tokens[1])
    dynamic = Gated(2, 8, 3, share=.3, scale='dynamic', seed=1).double()
    same((dynamic.enter(1, out)-.3*out).norm(dim=-1), .7*out.norm(dim=-1))
    assert p.enter(0, None) is not None and p.enter(3, out) is out
    out.requires_grad_()
    detached = Gated(2, 8, 3, detach=True).double().enter(1, out).sum()
    assert not torch.autograd.grad(detached, out, allow_unused=True)[0]
    assert torch.equal(Gated(2, 8, 3, share=0., scale=2.).enter(1, out), 2*Gated(2, 8, 3).tokens[1])


def test_start():
    t = around(torch.ones(8), 5, .1, 0)
    same((t-1).norm(dim=-1), torch.full((5,), .1), 1e-5)
    assert torch.equal(t, around(torch.ones(8), 5, .1, 0))
    assert differ(t, around(torch.ones(8), 5, .1, 1)) > 1e-3


def test_a_projection_that_is_a_layer():
    cfg = dict(TINY, text_cfg=TINY['text_cfg'] | dict(proj_bias=True), custom_text=True)
    clip = build_backbone(cfg)
    learner = MAPDAFE(clip, NAMES, noise=0., gate_text=1., n_visual=0)
    same(learner.text_features(), ZeroShot(clip, NAMES).text_features(), 1e-5)


def test_checkpoint_gives_the_same(clip):
    seen = []
    for c in (False, True):
        learner = make(clip, moved=1)
        learner.text.checkpoint, learner.text.chunk = c, 2
        y = learner.text_features()
        seen.append([y, *torch.autograd.grad(y[:, 0].sum(), list(learner.ctx.parameters()))])
    for a, b in zip(*seen): same(a, b)


def test_bad_input(clip):
    for kw, says in ((dict(text='reed'), ["text 'reed'",
                                          'read']), (dict(vision='write'), ["vision 'write'"]),
                     (dict(p2p='all'), ["p2p 'all'"]), (dict(gate='scalr'), ['scalar']),
                     (dict(gate_text=1.2), ['1.2', 'between 0']), (dict(form='sum'), ['convex']),
                     (dict(scale=0), ['positive']), (dict(scale='static'), ["'dynamic'"]),
                     (dict(start='zero'), ["start 'zero'"]), (dict(n_ctx=-1), ['at least one'])):
        with pytest.raises(ValueError) as e: MAPDAFE(clip, NAMES, **kw)
        one_line(e, *says)


def test_recipe():
    r = MAPDAFE.recipe()
    assert (r.lr, r.epochs, r.batch_size, r.weight_decay) == (.02, 50, 32, 5e-4)
    assert 'ours' in r.source
    assert MAPDAFE.recipe(dataset='imagenet').epochs == 20
