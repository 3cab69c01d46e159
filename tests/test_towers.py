"""The two towers: every shortcut gives the numbers of the definition, features and gradients
alike."""
import copy
import inspect

import pytest
import torch
from torch.nn import functional as F

from clipprompt import towers
from clipprompt.coop import CoOp
from clipprompt.prompts import Given, Prompts, Sentences, place
from clipprompt.towers import TextTower, VisionTower
from helpers import pairwise, tiny_clip

LONG = ('a small red bird with a very long tail that sits on the branch of an old tree behind '
        'the house near the river while two boys and a dog walk along the road to the next town '
        'in rain')
NAMES = ['a', 'guide dog', 'eel', LONG, 'cat']   # tokens of each: WORDS
WORDS = [1, 2, 1, 40, 1]
NOUNS = ('cat dog bird tree house road river town rain tail boy branch eel fish cow pig ant '
         'bee owl hen fox bat rat').split()
LISTS = {
    'one': ['guide dog'],
    'equal lengths': ['guide dog', 'red bird', 'old tree'],
    'two of each length': ['cat', 'guide dog', 'eel', 'old tree'],
    'beginnings of each other': ['dog', 'dog house', 'dog house roof'],
    'long first': [LONG, 'cat'],
    'two chunks of 128': [f'{a} {b}'.strip()
                          for a in ('', 'red', 'small old', 'big', 'very good', 'new')
                          for b in NOUNS],
}
F32, F64 = torch.float32, torch.float64
LIMIT = {F64: 1e-10, F32: 1e-5}
CHUNKS = [1, 2, 3, 100]
FAST = [dict(chunk=c, checkpoint=k) for c in CHUNKS for k in (False, True)]
# limits for features and gradients against float32
HALF = {'bf16': (.03, .1), 'fp16': (.004, .02)}

dtypes = pytest.mark.parametrize('dtype', [F64, F32], ids=['float64', 'float32'])
depths = pytest.mark.parametrize('depth', [1, 2, 3])
positions = pytest.mark.parametrize('position', ['end', 'middle', 'front'])


@pytest.fixture(scope='module')
def clips(): return {dtype: tiny_clip(dtype=dtype) for dtype in (F32, F64)}


@pytest.fixture(scope='module')
def clip(clips): return clips[F64]


@pytest.fixture(scope='module')
def clip32(clips): return clips[F32]


@pytest.fixture(scope='module')
def images(): return noise(6, 3, 32, 32)


class Progressive(Prompts):
    "Fresh tokens, mixed with what the block before put out"
    def enter(self, layer, carried):
        fresh = super().enter(layer, carried)
        return fresh if carried is None or fresh is carried else .3*carried + .7*fresh


class Watch:
    "Any prompts, and what they were given"
    def __init__(self, prompts): self.prompts, self.tokens, self.seen = prompts, prompts.tokens, {}
    def __getattr__(self, name): return getattr(self.prompts, name)

    def enter(self, layer, carried):
        self.seen[layer] = carried
        return self.prompts.enter(layer, carried)


def noise(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)

# so large that a mistake shows
def loud(n, width, dtype=F64, kind=Prompts, **kwargs):
    return kind(n, width, std=1., **kwargs).to(dtype)

def error(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return ((a-b).abs().max()/b.abs().max()).item()

def outcome(tower, x, prompts):
    "Features, and the gradient of a random mix of them for the tokens of each layer"
    y = tower(x, prompts)
    leaves = prompts.tokens if isinstance(prompts.tokens, list) else [prompts.tokens]
    grads = torch.autograd.grad((y*noise(*y.shape, dtype=y.dtype, seed=5)).sum(), leaves)
    listed = isinstance(prompts.tokens, list)
    return [y.detach(), *(grads if listed else grads[0])]

def agree(ours, theirs, limit=None):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        what = f'tokens of block {i-1}' if i else 'features'
        assert b.abs().max() > 1e-4, f'{what}: nothing to compare'
        assert (e := error(a, b)) <= (limit or LIMIT[b.dtype]), f'{what}: {e:.1e}'

def short_equals_plain(clip, s, prompts, options=FAST):
    "Compare the tower in all its options with the definition, which is returned"
    plain = outcome(TextTower(clip, plain=True), s, prompts)
    for o in options:
        try: agree(outcome(TextTower(clip, **o), s, prompts), plain)
        except AssertionError as e: raise AssertionError(f'{o}: {e}') from None
    return plain

def watch_blocks(monkeypatch):
    """For each call of an opened block: the shape of x, whether x needs a gradient, whether only
    some rows are asked for"""
    calls = {'run_block': [], 'run_after': []}
    for name in calls:
        def spied(*args, name=name, run=getattr(towers, name), **kwargs):
            a = inspect.signature(run).bind(*args, **kwargs).arguments
            some = a.get('rows') is not None or a.get('pack') is not None
            calls[name].append((tuple(a['x'].shape), a['x'].requires_grad, some))
            return run(*args, **kwargs)
        monkeypatch.setattr(towers, name, spied)
    return calls


# ---- the definition of the text tower ------------------------------------------------------------

def text_by_hand(clip, s, prompts):
    "One sentence after the other through open_clip's blocks"
    features = []
    for c, (ids, slots, eot) in enumerate(zip(s.ids, s.slots, s.eot)):
        def enter(layer, carried):
            t = prompts.enter(layer, carried)
            return t[c] if t.ndim == 3 else t
        x = clip.embed(ids).clone()
        x[slots] = enter(0, None)
        x = x + clip.text.positional_embedding
        for l, block in enumerate(clip.text.transformer.resblocks):
            if l: y = x.clone(); y[slots] = enter(l, x[slots]); x = y
            x = block(x[None], attn_mask=clip.text.attn_mask)[0]
        features.append(clip.text.ln_final(x[eot]) @ clip.text.text_projection)
    return torch.stack(features)


@depths
@pytest.mark.parametrize('kind', [Prompts, Progressive])
@pytest.mark.parametrize('position,csc', [
    ('end', False), ('middle', False), ('front', False), ('end', True), ('middle', True)])
def test_plain_text_by_hand(clip, position, csc, kind, depth):
    s = place(clip, NAMES, 3, position)
    p = loud(3, clip.text_width, kind=kind, depth=depth, n_classes=5 if csc else None)
    agree(outcome(TextTower(clip, plain=True), s, p),
          outcome(lambda s, p: text_by_hand(clip, s, p), s, p))


@dtypes
def test_prompt_free_text_equals_open_clip(clips, dtype):
    """The definition bit for bit, the short computation to rounding, for sentences that share
    words and for such that do not"""
    clip = clips[dtype]
    for texts in ([f'a photo of a {n}.' for n in NAMES], NAMES, ['cat', 'cat'], ['cat'],
                  [f'{w} of a {n}.' for n in NAMES for w in ('a photo', 'art')]):
        s, theirs = Sentences.of(clip, texts), clip.model.encode_text(clip.tokenize(texts))
        assert torch.equal(TextTower(clip, plain=True)(s), theirs)
        for o in FAST: assert error(TextTower(clip, **o)(s), theirs) < LIMIT[dtype]


def test_learned_words_equal_written_words(clip):
    """CoOp started from a phrase is, before training, the hand-written prompt; wherever the words
    stand"""
    learner = CoOp(clip, NAMES, ctx_init='a photo of a').double()
    ids = clip.tokenize([f'a photo of a {n}.' for n in NAMES])
    theirs = F.normalize(clip.model.encode_text(ids), dim=-1)
    # the words pass through float32 parameters
    assert error(learner.text_features(), theirs) < 1e-6


@pytest.mark.parametrize('position,text', [
    ('middle', 'a photo {} of a.'), ('front', '{} a photo of a.')])
def test_positions_read_as_written(clip, position, text):
    learner = CoOp(clip, NAMES, ctx_init='a photo of a', position=position).double()
    theirs = F.normalize(clip.model.encode_text(clip.tokenize([text.format(n) for n in NAMES])),
                         dim=-1)
    assert error(learner.text_features(), theirs) < 1e-6


# ---- the short computation of the text tower -----------------------------------------------------

@pairwise(position=['end', 'middle', 'front'], csc=[False, True], n_ctx=[1, 4, 16],
          depth=[1, 2, 3], dtype=[F64, F32])
def test_short_text_equals_plain(clips, position, csc, n_ctx, depth, dtype):
    "Features and gradients are those of all 77 positions"
    clip = clips[dtype]
    s = place(clip, NAMES, n_ctx, position)
    p = loud(n_ctx, clip.text_width, dtype, depth=depth, n_classes=5 if csc else None)
    assert s.lengths == [n_ctx+3+k for k in WORDS]
    assert s.shared == (1+n_ctx if position == 'end' else 0)
    short_equals_plain(clip, s, p, FAST if position == 'end' and not csc else FAST[:2])


@pairwise(classes=list(LISTS), position=['end', 'middle', 'front'], dtype=[F64, F32])
def test_lists_of_classes(clips, classes, position, dtype):
    """One class alone (all but EOT is shared, wherever the name stands), equal lengths, more
    classes than a chunk"""
    clip, names = clips[dtype], LISTS[classes]
    s = place(clip, names, 4, position)
    assert classes != 'one' or s.shared == s.eot[0]
    many = len(names) > 128
    short_equals_plain(clip, s, loud(4, clip.text_width, dtype, depth=2),
                       [{}, dict(chunk=10, checkpoint=True)] if many else FAST)
    if not many:
        short_equals_plain(clip, s, loud(4, clip.text_width, dtype, depth=3, n_classes=len(names)),
                           FAST[:2])


@dtypes
def test_words_longer_than_the_slots(clips, dtype):
    "Of 'a photo of a' two words are learned, the other two are shared too"
    clip = clips[dtype]
    s = place(clip, NAMES, 2, words='a photo of a')
    assert s.shared == 5 and s.slots.tolist() == [[1, 2]]*5
    for depth in (1, 3): short_equals_plain(clip, s, loud(2, clip.text_width, dtype, depth=depth))
    short_equals_plain(clip, s, loud(2, clip.text_width, dtype, depth=2, n_classes=5), FAST[:2])


def test_slots_behind_the_last_eot_are_kept(clip):
    "A sentence whose slots stand behind its EOT cannot be cut at EOT"
    s = Sentences.of(clip, ['cat', 'guide dog'])
    s = Sentences(s.ids, (s.eot+3)[:, None], s.eot)
    assert s.shared == 0 and max(s.lengths) == s.slots.max()+1
    p = loud(1, clip.text_width, depth=2)
    assert error(TextTower(clip)(s, p), TextTower(clip, plain=True)(s, p)) < 1e-10


def test_different_slots_in_equal_words_are_not_shared(clip):
    "Both sentences begin alike, but the first learns its first word and the second its third"
    s = Sentences.of(clip, ['a photo of a cat.', 'a photo of a guide dog.'])
    assert s.shared == 5 and Sentences(s.ids, s.eot.new_tensor([[1], [1]]), s.eot).shared == 5
    s = Sentences(s.ids, s.eot.new_tensor([[1], [3]]), s.eot)
    assert s.shared == 0
    short_equals_plain(clip, s, loud(1, clip.text_width, depth=2), FAST[:2])


@pairwise(layers=['G', 'GGG', '-G', '--G', 'G-G', '1G-'], G=[1, 3, 5],
          position=['end', 'middle', 'front'], dtype=[F64, F32])
def test_groups(clips, layers, G, position, dtype):
    """[G, 1, n, D] (G), [1, 1, n, D] (1) or [n, D] (-) in each layer: every group as if it were
    alone"""
    clip, C, n = clips[dtype], 5, 3
    s, shape = place(clip, NAMES, n, position), {'G': (G, 1), '1': (1, 1), '-': ()}
    tokens = [
        noise(*shape[k], n, clip.text_width, dtype=dtype, seed=l).requires_grad_()
        for l, k in enumerate(layers)
    ]
    plain = short_equals_plain(clip, s, Given(tokens), FAST if position == 'end' else FAST[:2])
    assert plain[0].shape == ((C, clip.embed_dim) if layers[0] == '-' and G == 1 else
                              (G, C, clip.embed_dim))
    with torch.no_grad():
        of_group = lambda g: Given([t.expand(G, 1, -1, -1)[g, 0] for t in tokens])
        alone = [TextTower(clip, plain=True)(s, of_group(g)) for g in range(G)]
    assert error(plain[0].reshape(G, C, -1), torch.stack(alone)) < LIMIT[dtype]


@pairwise(position=['end', 'middle', 'front'], n_classes=[None, 5], depth=[1, 2, 3],
          dtype=[F64, F32])
def test_progressive_prompts(clips, position, n_classes, depth, dtype):
    """A rule that mixes in what the block before put out: it gets the same in the shared, the cut
    and the plain computation"""
    clip = clips[dtype]
    s = place(clip, NAMES, 4, position)
    p = loud(4, clip.text_width, dtype, Progressive, depth=depth, n_classes=n_classes)
    plain = short_equals_plain(clip, s, p,
                               FAST if position == 'end' and n_classes is None else FAST[:2])
    fresh = loud(4, clip.text_width, dtype, depth=depth, n_classes=n_classes)
    assert depth == 1 or error(outcome(TextTower(clip), s, fresh)[0],
                               plain[0]) > 1e-3, 'the mix has no effect'
    seen = []
    for tower in (TextTower(clip), TextTower(clip, plain=True)):
        tower(s, w := Watch(p))
        assert list(w.seen) == [0, 1, 2] and w.seen[0] is None
        seen.append(w.seen)
    for l in (1, 2):
        short, whole = (x[l] for x in seen)                        # [1, 1 or C, n, D], [1, C, n, D]
        assert whole.shape == (1, 5, 4, clip.text_width)
        assert error(short.expand_as(whole), whole) < LIMIT[dtype]


def test_progressive_groups(clip):
    s = place(clip, NAMES, 2)
    tokens = [noise(3, 1, 2, clip.text_width, seed=l).requires_grad_() for l in range(3)]

    class Rule(Given):
        def enter(self, layer, carried):
            own = self.tokens[layer]
            return own if carried is None else .3*carried + .7*own
    short_equals_plain(clip, s, Rule(tokens))
    short_equals_plain(clip, place(clip, NAMES, 2, 'front'), Rule(tokens), FAST[:2])


@pytest.mark.parametrize('kind', [Prompts, Progressive])
@pytest.mark.parametrize('position,csc', [
    ('end', False), ('middle', False), ('front', False), ('end', True)])
def test_order_of_classes(clip, position, csc, kind):
    "Names in another order, features in that order; packing and chunks do not show"
    order, p = [3, 0, 4, 2, 1], loud(3, clip.text_width, kind=kind, depth=2,
                                     n_classes=5 if csc else None)
    other = copy.deepcopy(p)
    if csc: other.tokens.data = p.tokens.data[:, order]
    for o in FAST:
        a, b = (TextTower(clip, **o)(place(clip, names, 3, position), q)
                for names, q in ((NAMES, p), ([NAMES[i] for i in order], other)))
        assert error(b, a[order]) < 1e-10


@pytest.mark.parametrize('plain', [False, True])
def test_class_specific_tokens_reach_their_class_only(clip, plain):
    p = loud(2, clip.text_width, depth=3, n_classes=5)
    (g,) = torch.autograd.grad(TextTower(clip, plain)(place(clip, NAMES, 2), p)[3].sum(), p.tokens)
    assert (g[:, 3].abs().amax((1, 2)) > 1e-4).all() and g[:, [0, 1, 2, 4]].eq(0).all()


def test_how_much_is_computed(clip, monkeypatch):
    """The prefix once, the rest in chunks, no row padded; without a shared prefix all at once; the
    last block for EOT only"""
    calls, d, G = watch_blocks(monkeypatch), clip.text_width, 3
    def run(chunk, s, tokens):
        for seen in calls.values(): seen.clear()
        TextTower(clip, chunk=chunk)(s, Given(tokens))
    end, front = place(clip, NAMES, 4), place(clip, NAMES, 4, 'front')
    run(2, end, [noise(4, d).requires_grad_()])
    assert calls['run_block'] == [((1, 5, d), True, False)]*3                   # SOT and 4 slots
    # behind them: a name, a full stop and EOT; each pair fills one tile
    rows = [sum(WORDS[i:i+2]) + 2*len(WORDS[i:i+2]) for i in (0, 2, 4)]
    # It needs a gradient from block 1 on, through the prefix
    assert calls['run_after'] == [((1, 1, R, d), l > 0, l == 2) for R in rows for l in range(3)]
    run(6, end, [noise(4, d), noise(G, 1, 4, d)])
    assert [x for x, _, _ in calls['run_block']] == [(1, 5, d), (G, 5, d), (G, 5, d)]
    assert [x for x, _, _ in calls['run_after']] == [(G, 1, R, d) for R in rows for _ in range(3)]
    run(None, front, [noise(4, d)])
    assert calls == {'run_block': [((5, 47, d), False, l == 2) for l in range(3)], 'run_after': []}
    run(None, front, [noise(4, d), noise(G, 1, 4, d)])
    assert [x for x, _, _ in calls['run_block']] == [(5, 47, d), (G*5, 47, d), (G*5, 47, d)]
    TextTower(clip)(end, loud(4, d, n_classes=5))
    assert calls['run_block'][-1] == ((5, 47, d), True, True) and not calls['run_after']
    # the default on a CPU
    names = LISTS['two chunks of 128']
    run(None, s := place(clip, names, 4), [noise(4, d)])
    full = sum(l - 5 for l in s.lengths[:128]), sum(l - 5 for l in s.lengths[128:])
    run_rows = [x[1]*x[2] for x, _, _ in calls['run_after']][::3]
    assert len(calls['run_after']) == 6
    for rows, needed in zip(run_rows, full): assert needed <= rows < 1.05*needed


def kept(clip, f):
    "Bytes that autograd keeps for the backward pass of f, without CLIP's weights"
    weights, store = {p.untyped_storage().data_ptr() for p in clip.model.parameters()}, {}
    def pack(t): store[t.untyped_storage().data_ptr()] = t.untyped_storage(); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = f()
    return sum(s.nbytes() for k, s in store.items() if k not in weights), y


@positions
@dtypes
def test_checkpoint(clips, dtype, position):
    """The same numbers, bit for bit or nearly so, and far less to keep; and nothing changes where
    there is no gradient"""
    clip = clips[dtype]
    s, p = place(clip, NAMES, 4, position), loud(4, clip.text_width, dtype, Progressive, depth=3)
    for chunk in CHUNKS:
        a, b = (TextTower(clip, chunk=chunk, checkpoint=k) for k in (True, False))
        x, y = outcome(a, s, p), outcome(b, s, p)
        assert torch.equal(x[0], y[0])
        agree(x, y, 1e-12 if dtype == F64 else 1e-6)
        with torch.no_grad(): assert torch.equal(a(s, p), x[0]) and not a(s, p).requires_grad
        assert not a(s).requires_grad
    plain, short, least = (kept(clip, lambda: t(s, p))[0]
                           for t in (TextTower(clip, plain=True), b, a))
    assert short < plain*.7, (plain, short, least)
    assert least < short*(.35 if position == 'end' else .2), (plain, short, least)


def test_no_prompt_is_asked_twice_for_a_block(clip, images):
    """Neither by chunks nor by the second pass of `checkpoint`: a rule may draw random numbers.
    Block 0 is asked for its shape as well"""
    class Counts(Prompts):
        asked = []

        def enter(self, layer, carried):
            self.asked.append(layer)
            return super().enter(layer, carried)

    p = loud(4, clip.text_width, kind=Counts, depth=2)
    q = loud(4, clip.vision_width, kind=Counts, depth=2)
    for position in ('end', 'front'):
        p.asked.clear()
        s = place(clip, NAMES, 4, position)
        TextTower(clip, chunk=2, checkpoint=True)(s, p).sum().backward()
        assert [l for l in p.asked if l] == [1, 2]
    q.asked.clear()
    VisionTower(clip)(images, q).sum().backward()
    assert q.asked == [0, 1, 2]


def test_no_gradient_reaches_clip(clip, images):
    before, d = {k: v.clone() for k, v in clip.model.state_dict().items()}, clip.text_width
    for position in ('end', 'front'):
        for o in (*FAST, dict(plain=True)):
            TextTower(clip, **o)(place(clip, NAMES, 4, position),
                                 loud(4, d, kind=Progressive, depth=3)).sum().backward()
    for a in ('cls', 'patches'):
        VisionTower(clip, a)(images, loud(4, clip.vision_width, kind=Progressive,
                                          depth=3)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())


def test_no_gradient_below_the_first_learned_token(clip, images, monkeypatch):
    "What stands before it asks autograd for nothing: as the input of a block and as `carried`"
    calls = watch_blocks(monkeypatch)
    text, vision = (TextTower(clip), clip.text_width), (VisionTower(clip), clip.vision_width)
    cases = ((text, place(clip, NAMES, 2)), (text, place(clip, NAMES, 2, 'front')),
             (vision, images))
    for (tower, d), x in cases:
        for first in range(4):
            calls['run_block'].clear()
            w = Watch(Given([noise(2, d, seed=l).requires_grad_(l == first) for l in range(3)]))
            y = tower(x, w)
            assert [g for _, g, _ in calls['run_block']] == [l >= first for l in range(3)]
            assert y.requires_grad == (first < 3)
            assert [w.seen[l].requires_grad for l in (1, 2)] == [l > first for l in (1, 2)]
        assert not tower(x).requires_grad


@dtypes
@pytest.mark.parametrize('visual', [False, True], ids=['text', 'image'])
@pytest.mark.parametrize('own', ['none', 'itself', 'causal', 'all'])
def test_rows_beside_a_sequence_that_does_not_read_them(clips, dtype, own, visual):
    """open_clip's own block over both, under the mask written out, has the same rows: of the
    sequence as if alone, of the others as `run_beside` has them; gradients alike"""
    tower = clips[dtype].visual if visual else clips[dtype].text
    block, (N, L, m) = tower.transformer.resblocks[1], (3, 7, 4)
    d = clips[dtype].vision_width if visual else clips[dtype].text_width
    x, rows = noise(N, L, d, dtype=dtype), noise(N, m, d, seed=1, dtype=dtype).requires_grad_()
    among = dict(none=torch.zeros(m, m), itself=torch.eye(m), causal=torch.ones(m, m).tril(),
                 all=torch.ones(m, m))[own].bool().expand(N, m, m)
    earlier = (torch.arange(L) < torch.tensor([2, 5, 7])[:, None])[:, None].expand(N, m, L)
    # [N, m, L+m]
    may = torch.cat([earlier, among], 2)
    sequence = torch.cat([torch.ones(L, L).tril(0 if not visual else L), torch.zeros(L, m)], 1)
    hidden = ~torch.cat([sequence.bool().expand(N, L, L + m), may], 1)
    mask = torch.zeros(N, L + m, L + m, dtype=dtype).masked_fill(hidden, -torch.inf)
    mask = mask.repeat_interleave(block.attn.num_heads, 0)
    whole = block(torch.cat([x, rows], 1), attn_mask=mask)
    alone, k, v = towers.run_block(block, x, causal=not visual)
    beside = towers.run_beside(block, rows, k, v, may[:, None])
    assert error(alone, whole[:, :L]) < LIMIT[dtype] and error(beside, whole[:, L:]) < LIMIT[dtype]
    a, b = (torch.autograd.grad(y.square().sum(), rows, retain_graph=True)[0]
            for y in (beside, whole[:, L:]))
    assert error(a, b) < LIMIT[dtype] and beside.shape == rows.shape
    # one mask for all
    assert error(towers.run_beside(block, rows, k, v, may[:1, None].expand(N, -1, -1, -1)),
                 towers.run_beside(block, rows, k, v, may[:1, None])) == 0


# ---- the vision tower ----------------------------------------------------------------------------

def image_by_hand(clip, images, prompts, after, ln_pre):
    "The definition with open_clip's own blocks"
    vit, B = clip.visual, len(images)
    x = vit.conv1(images).flatten(2).mT
    x = torch.cat([vit.class_embedding.expand(B, 1, -1), x], 1) + vit.positional_embedding
    t, N = prompts.enter(0, None).expand(B, -1, -1), x.shape[1]
    n = t.shape[1]
    x, t = vit.ln_pre(x), vit.ln_pre(t) if ln_pre else t
    at = torch.arange(1, 1+n) if after == 'cls' else torch.arange(N, N+n)
    x = torch.cat([x[:, :at[0]], t, x[:, at[0]:]], 1)
    for l, block in enumerate(vit.transformer.resblocks):
        if l: y = x.clone(); y[:, at] = prompts.enter(l, x[:, at]).expand(B, -1, -1); x = y
        x = block(x)
    return vit.ln_post(x[:, 0]) @ vit.proj


@dtypes
@depths
@pytest.mark.parametrize('kind',
                         ['one for all', 'each image', 'progressive', 'progressive, each image'])
@pytest.mark.parametrize('ln_pre', [True, False], ids=['ln_pre', 'no ln_pre'])
@pytest.mark.parametrize('after', ['cls', 'patches'])
def test_visual_slots(clips, images, after, ln_pre, kind, depth, dtype):
    "Features, gradients and what is given back are the definition's"
    clip, d = clips[dtype], clips[dtype].vision_width
    rule = Progressive if 'progressive' in kind else Prompts
    # [J, B, n, D]: own tokens for each image
    p = loud(3, d, dtype, rule, depth=depth, n_classes=6 if 'each' in kind else None)
    x, tower, found = images.to(dtype), VisionTower(clip, after, ln_pre), []
    agree(outcome(tower, x, p), outcome(lambda x, p: image_by_hand(clip, x, p, after, ln_pre), x,
                                        p))
    for f in (tower, lambda x, p: image_by_hand(clip, x, p, after, ln_pre)):
        f(x, w := Watch(p))
        assert list(w.seen) == [0, 1, 2] and w.seen[0] is None
        found.append([w.seen[1], w.seen[2]])                       # O_0 and O_1
    for ours, theirs in zip(*found):
        assert error(ours, theirs) < LIMIT[dtype] and ours.shape == (6, 3, d)


@pytest.mark.parametrize('after,slots', [('cls', slice(1, 4)), ('patches', slice(17, 20))])
def test_where_visual_slots_are(clip, images, monkeypatch, after, slots):
    """Right behind CLS or behind all patches, which no feature tells; of the last block only CLS
    is read"""
    calls, into, p = watch_blocks(monkeypatch), [], loud(3, clip.vision_width, depth=3)
    run = towers.run_block

    def noted(block, x, *args, **kwargs):
        into.append(x)
        return run(block, x, *args, **kwargs)

    monkeypatch.setattr(towers, 'run_block', noted)
    VisionTower(clip, after, ln_pre=False)(images, p)
    assert calls['run_block'] == [((6, 1+16+3, clip.vision_width), True, l == 2) for l in range(3)]
    for x, tokens in zip(into, p.tokens): assert torch.equal(x[:, slots], tokens.expand(6, -1, -1))
    assert torch.equal(into[0][:, 0], clip.visual.ln_pre(VisionTower(clip).embed(images))[:, 0])


@pytest.mark.parametrize('B', [1, 6])
def test_prompt_free_images_equal_open_clip(clips, B):
    "The definition bit for bit in each precision, with and without autograd; the fast way nearly"
    for dtype, clip in clips.items():
        x, plain = noise(B, 3, 32, 32, dtype=dtype), VisionTower(clip, plain=True)
        theirs = clip.model.encode_image(x)
        assert torch.equal(plain(x), theirs)
        for chunk in (None, 1, 4):
            assert error(VisionTower(clip, chunk=chunk)(x), theirs) < LIMIT[dtype]
        with torch.no_grad(): assert torch.equal(plain(x), clip.model.encode_image(x))
    for precision in HALF:
        half = at(clips[F32], precision)
        with half.autocast(): theirs = half.model.encode_image(x := x.float()).float()
        assert torch.equal(VisionTower(half, plain=True)(x), theirs)
        assert error(VisionTower(half)(x), theirs) < HALF[precision][0]


def test_images_pass_a_few_at_a_time(clip, images, monkeypatch):
    "Four on a CPU or as many as are asked for; with prompts all of them; of the last block CLS"
    calls, d = watch_blocks(monkeypatch)['run_block'], clip.vision_width
    def sizes(prompts=None, **options):
        calls.clear()
        VisionTower(clip, **options)(images, prompts)
        assert [rows for *_, rows in calls] == [False, False, True]*(len(calls)//3)
        return [shape[0] for shape, *_ in calls][::3]
    assert sizes() == [4, 2] and sizes(chunk=5) == [5, 1] and sizes(chunk=100) == [6]
    assert sizes(loud(2, d), chunk=2) == [6]


def test_plain_images_equal_fast_images(clip, images):
    p = loud(3, clip.vision_width, kind=Progressive, depth=3)
    for after, ln_pre in (('cls', False), ('patches', True)):
        plain = outcome(VisionTower(clip, after, ln_pre, plain=True), images, p)
        for again in (False, True):
            agree(outcome(VisionTower(clip, after, ln_pre, checkpoint=again), images, p), plain)
    less, more = (kept(clip, lambda: VisionTower(clip, checkpoint=k)(images, p))[0]
                  for k in (True, False))
    assert less < .35*more


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_only_a_processor_looks_for_nan(clip32, device):
    "On another device the question would make the loop wait; `meta` refuses it"
    bad = torch.full((1, 3, 32, 32), float('nan'), device=device)
    if device == 'cpu':
        with pytest.raises(ValueError, match='NaN'): VisionTower(clip32)(bad)
        return
    there = copy.copy(clip32)   # no autocast there, so only the rows
    there.model = copy.deepcopy(clip32.model).to('meta')
    there.visual = there.model.visual
    assert VisionTower(there).embed(bad).shape == (1, 17, clip32.vision_width)


# ---- compiling, copying, moving ------------------------------------------------------------------

def compiled(f, *args, backend='eager'):
    torch._dynamo.reset()
    try: return torch.compile(f, fullgraph=True, backend=backend)(*args)
    finally: torch._dynamo.reset()


@pytest.mark.parametrize('case', ['end', 'front', 'image', 'frozen'])
def test_towers_compile_without_a_break(clip32, images, case):
    "`fullgraph` refuses a break; sentences are counted in a first call"
    if case in ('end', 'front'):
        tower, prompts = TextTower(clip32), loud(2, clip32.text_width, F32, depth=2)
        x = place(clip32, NAMES[:3], 2, case)
    else:
        tower, x = VisionTower(clip32), images.float()
        prompts = loud(2, clip32.vision_width, F32, depth=2) if case == 'image' else None
    theirs = tower(x, prompts)
    assert error(compiled(lambda x: tower(x, prompts), x), theirs) < 1e-5


@pytest.mark.stress
@pytest.mark.parametrize('case', ['text', 'image'])
def test_compiled_towers_have_the_same_numbers(case):
    "Through inductor, on three blocks, which it compiles one by one: features and gradients"
    clip = tiny_clip()
    if case == 'text':
        tower, prompts = TextTower(clip), loud(2, clip.text_width, F32, depth=2)
        x = place(clip, NAMES[:3], 2)
    else:
        tower, prompts = VisionTower(clip), loud(2, clip.vision_width, F32, depth=2)
        x = noise(2, 3, clip.image_size, clip.image_size, dtype=F32)
    theirs = outcome(tower, x, prompts)
    agree(outcome(lambda x, p: compiled(lambda: tower(x, p), backend='inductor'), x, prompts),
          theirs)


def test_a_copy_shares_clip(clip):
    learner = CoOp(clip, NAMES, n_ctx=2)
    twin = copy.deepcopy(learner)
    assert twin.backbone is clip and twin.text.blocks is learner.text.blocks
    assert twin.text is not learner.text and twin.ctx.tokens is not learner.ctx.tokens
    twin.text.chunk = 1
    assert learner.text.chunk is None


def test_towers_follow_a_backbone_that_moves():
    "They hold it and none of its modules"
    clip = tiny_clip()
    text, vision = TextTower(clip), VisionTower(clip)
    clip.to(dtype=F64)
    assert text(Sentences.of(clip, NAMES)).dtype == vision(noise(1, 3, 32, 32)).dtype == F64


def test_order_of_slots_does_not_matter_to_a_vit(clip, images):
    "No mask, and prompts have no positions: both places give the same feature; ln_pre does not"
    p = loud(3, clip.vision_width, depth=2)
    cls, patches, raw = (VisionTower(clip, *a)(images, p)
                         for a in (('cls', ), ('patches', ), ('patches', False)))
    assert error(cls, patches) < 1e-10 and error(raw, patches) > 1e-3


def test_visual_prompts_of_each_image(clip, images):
    "[B, n, D]: every image its own tokens"
    tokens = noise(6, 2, clip.vision_width)
    together = VisionTower(clip)(images, Given([tokens]))
    alone = torch.cat([VisionTower(clip)(images[i:i+1], Given([tokens[i]])) for i in range(6)])
    assert error(together, alone) < 1e-10
    assert error(together, VisionTower(clip)(images, Given([tokens[0]]))) > 1e-3


# ---- half precision ------------------------------------------------------------------------------

def at(clip, precision):
    "The same frozen model with towers in another precision"
    half = copy.copy(clip)
    half.precision = precision
    return half


def towers_and_inputs(clip, images, kind=Prompts):
    "Text shared, text cut, text plain, text in groups, images"
    d, w = clip.text_width, clip.vision_width
    end, middle = place(clip, NAMES, 4), place(clip, NAMES, 4, 'middle')
    p, q = loud(4, d, F32, kind, depth=2), loud(3, w, F32, kind, depth=2)
    return [(TextTower(clip, chunk=2, checkpoint=True), end, p), (TextTower(clip), middle, p),
            (TextTower(clip, plain=True), middle, p),
            (TextTower(clip), end, Given([noise(3, 1, 4, d, dtype=F32).requires_grad_()])),
            (VisionTower(clip), images, q), (VisionTower(clip, 'cls', False), images, q)]


@pytest.mark.parametrize('kind', [Prompts, Progressive])
@pytest.mark.parametrize('precision', HALF)
def test_half_precision(clip32, images, precision, kind):
    "Near float32, but no more than near; features and gradients are float32 and finite"
    near, near_grad = HALF[precision]
    half, x, seen = at(clip32, precision), images.float(), []
    hooks = [
        b.mlp.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
        for t in (half.text, half.visual)
        for b in t.transformer.resblocks
    ]
    try: ours = [outcome(*a) for a in towers_and_inputs(half, x, kind)]
    finally: [h.remove() for h in hooks]
    assert set(seen) == {{'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]}
    for a, b in zip(ours, [outcome(*a) for a in towers_and_inputs(clip32, x, kind)], strict=True):
        assert all(t.dtype == half.dtype == F32 and t.isfinite().all() for t in a)
        assert 1e-5 < error(a[0], b[0]) < near
        for g, h in zip(a[1:], b[1:], strict=True): assert 0 < error(g, h) < near_grad
    assert all(p.dtype == F32 for p in half.model.parameters())


@pytest.mark.parametrize('precision', HALF)
def test_half_precision_with_checkpoint(clip32, precision):
    "The second pass computes in the same precision as the first"
    half = at(clip32, precision)
    for position in ('end', 'front'):
        s, p = place(half, NAMES, 4, position), loud(4, half.text_width, F32, depth=3)
        again, once = (outcome(TextTower(half, chunk=2, checkpoint=k), s, p) for k in (True, False))
        agree(again, once, 1e-6)


def test_no_precision_changes_nothing(clips, images):
    "Towers without a precision compute in that of their weights, also inside somebody's autocast"
    for dtype, clip in clips.items():
        assert clip.precision is None
        x, d = images.to(dtype), clip.text_width
        s, p, q = place(clip, NAMES, 4), loud(4, d, dtype), loud(3, clip.vision_width, dtype)
        runs = lambda: [
            TextTower(clip)(s, p),
            TextTower(clip)(s),
            VisionTower(clip)(x, q),
            VisionTower(clip)(x)
        ]
        ours = runs()
        with torch.autocast('cpu', torch.bfloat16): inside = runs()
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(ours, inside))
