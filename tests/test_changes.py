"""What bends a block: additions equal a CLIP whose weights were changed, inserted tokens equal a
longer sequence, and all shortcuts give the numbers of the definition."""
import copy

import pytest
import torch
from torch.nn import functional as F

from clipprompt import towers
from clipprompt.prompts import Prompts, Sentences, place
from clipprompt.towers import Bent, Changes, TextTower, VisionTower, bent, grown
from helpers import tiny_clip

F32, F64 = torch.float32, torch.float64
NAMES = ['cat', 'guide dog', 'very old red shopping cart', 'eel']
WORDS = [f'a photo of a {n}.' for n in NAMES]
PLACES = 'q', 'k', 'v', 'o', 'block'


@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=F64)


@pytest.fixture(scope='module')
def images(): return noise(5, 3, 32, 32)


def noise(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)

def error(a, b):
    assert a.shape == b.shape
    return ((a-b).abs().max()/b.abs().max()).item()


class Low(Changes):
    "A random map of low rank at each place of each block; 'block' has a ReLU in the middle"
    def __init__(self, width, layers, places=PLACES, rank=2, dtype=F64):
        sizes = layers, len(places), rank, width
        self.down = noise(*sizes, dtype=dtype).div(width**.5).requires_grad_()
        self.up = noise(*sizes, dtype=dtype, seed=1).mul(.5).mT.contiguous().requires_grad_()
        self.places, self.tokens = places, [self.down, self.up]

    def add(self, layer, i, y):
        y = F.linear(y, self.down[layer, i])
        if self.places[i] == 'block': y = y.relu()
        return F.linear(y, self.up[layer, i])

    def at(self, layer):
        def of(i): return lambda y: self.add(layer, i, y)
        return {p: of(i) for i, p in enumerate(self.places)}

class Inserted(Changes):
    "Three tokens for each of some blocks, in a row"
    def __init__(self, width, first, depth, dtype=F64):
        self.first, self.tokens = first, [noise(depth, 3, width, dtype=dtype).requires_grad_()]

    def insert(self, layer):
        j = layer-self.first
        return self.tokens[0][j] if 0 <= j < len(self.tokens[0]) else None

class Both(Inserted):
    def __init__(self, width, layers):
        super().__init__(width, 1, 2)
        self.low = Low(width, layers)
        self.tokens = self.tokens + self.low.tokens

    def at(self, layer): return self.low.at(layer) if layer != 1 else {}


def outcome(tower, x, prompts, changes):
    y = tower(x, prompts, changes)
    leaves = changes.tokens + ([prompts.tokens] if prompts is not None else [])
    return [y.detach(), *torch.autograd.grad((y*noise(*y.shape, seed=5)).sum(), leaves)]

def agree(ours, theirs, limit=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-4 and error(a, b) < limit

def changed(clip, low, visual):
    "A CLIP whose weights are W + up down"
    other = copy.copy(clip)
    other.model = copy.deepcopy(clip.model)
    other.visual, other.text = other.model.visual, other.model
    for l, block in enumerate((other.visual if visual else other.text).transformer.resblocks):
        D = block.attn.embed_dim
        for i, place_ in enumerate(low.places):
            delta = (low.up[l, i] @ low.down[l, i]).detach()
            if place_ == 'o': block.attn.out_proj.weight.data += delta
            else: block.attn.in_proj_weight.data[i*D:(i+1)*D] += delta
    return other


def test_low_rank_changes_are_other_weights(clip, images):
    "In both towers, in the definition and in the short computation"
    text, vision = Low(clip.text_width, 3, 'qkvo'), Low(clip.vision_width, 3, 'qkvo')
    s = Sentences.of(clip, WORDS)
    theirs = changed(clip, text, False).model.encode_text(s.ids)
    assert error(clip.model.encode_text(s.ids), theirs) > .05
    for how in (dict(plain=True), dict(chunk=2), dict(checkpoint=True)):
        assert error(TextTower(clip, **how)(s, None, text), theirs) < 1e-10
    front = Sentences.of(clip, ['cat', 'an old dog'])   # nothing is shared but SOT
    theirs = changed(clip, text, False).model.encode_text(front.ids)
    assert error(TextTower(clip)(front, None, text), theirs) < 1e-10
    theirs = changed(clip, vision, True).model.encode_image(images)
    for plain in (True, False):
        assert error(VisionTower(clip, plain=plain)(images, None, vision), theirs) < 1e-10


def test_gradients_of_low_rank_changes_are_those_of_weights(clip):
    "By the chain rule: dL/dup = dL/dW down^T"
    low, s, l = Low(clip.text_width, 3, 'q'), Sentences.of(clip, WORDS), 1
    other = changed(clip, low, False)
    W = other.text.transformer.resblocks[l].attn.in_proj_weight.requires_grad_()
    slope, = torch.autograd.grad(other.model.encode_text(s.ids).square().sum(), W)
    dW = slope[:clip.text_width]
    y = TextTower(clip)(s, None, low).square().sum()
    down, up = torch.autograd.grad(y, low.tokens)
    assert error(up[l, 0], dW @ low.down[l, 0].T) < 1e-9
    assert error(down[l, 0], low.up[l, 0].T @ dW) < 1e-9


KINDS = dict(low=lambda w: Low(w, 3), first=lambda w: Inserted(w, 0, 2),
             later=lambda w: Inserted(w, 1, 1), last=lambda w: Inserted(w, 2, 1),
             all=lambda w: Inserted(w, 0, 3), both=lambda w: Both(w, 3))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('position', [None, 'end', 'middle'])
def test_short_text_equals_plain(clip, kind, position):
    "Alone and together with prompts, shared and cut, features and gradients"
    changes, prompts = KINDS[kind](clip.text_width), None
    s = Sentences.of(clip, WORDS)
    if position:
        s = place(clip, NAMES, 2, position)
        prompts = Prompts(2, clip.text_width, depth=2, std=1.).double()
    plain = outcome(TextTower(clip, plain=True), s, prompts, changes)
    for how in (dict(chunk=1), dict(chunk=3, checkpoint=True), {}):
        agree(outcome(TextTower(clip, **how), s, prompts, changes), plain)
    assert error(plain[0], TextTower(clip)(s, prompts)) > 1e-3


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('after', [None, 'cls', 'patches'])
def test_fast_images_equal_plain(clip, images, kind, after):
    changes, prompts = KINDS[kind](clip.vision_width), None
    if after: prompts = Prompts(2, clip.vision_width, depth=2, std=1.).double()
    def tower(**how): return VisionTower(clip, after or 'patches', **how)
    plain = outcome(tower(plain=True), images, prompts, changes)
    for again in (False, True):
        agree(outcome(tower(checkpoint=again), images, prompts, changes), plain)
    both = [tower(plain=p).rows(4, images, prompts, changes) for p in (True, False)]
    assert both[0].shape == (5, 4, clip.vision_width) and error(*both) < 1e-10
    assert error(both[0][:, 0] @ clip.visual.proj, plain[0]) < 1e-12


def test_inserted_tokens_by_hand(clip, images):
    "Words keep their positions, the mask grows, the feature is read n rows later"
    s, ins = Sentences.of(clip, WORDS), Inserted(clip.text_width, 1, 2)
    L, features = s.ids.shape[1], []
    mask = torch.full((L+3, L+3), -torch.inf, dtype=F64).triu(1)
    for ids, eot in zip(s.ids, s.eot):
        x = clip.embed(ids) + clip.text.positional_embedding
        blocks = clip.text.transformer.resblocks
        x = blocks[0](x[None], attn_mask=clip.text.attn_mask)[0]
        x = torch.cat([x[:1], ins.tokens[0][0], x[1:]])
        x = blocks[1](x[None], attn_mask=mask)[0]
        x = torch.cat([x[:1], ins.tokens[0][1], x[4:]])
        x = blocks[2](x[None], attn_mask=mask)[0]
        features.append(clip.text.ln_final(x[eot+3]) @ clip.text.text_projection)
    assert error(TextTower(clip)(s, None, ins), torch.stack(features)) < 1e-10

    ins, vit = Inserted(clip.vision_width, 1, 1), clip.visual
    x = vit.ln_pre(VisionTower(clip).embed(images))
    x = vit.transformer.resblocks[0](x)
    x = torch.cat([x[:, :1], ins.tokens[0][0].expand(5, -1, -1), x[:, 1:]], 1)
    for block in vit.transformer.resblocks[1:]: x = block(x)
    theirs = vit.ln_post(x[:, :4])
    assert error(VisionTower(clip).rows(4, images, None, ins), theirs) < 1e-10


def test_no_change_is_no_change(clip, images):
    "Neither None nor an object that answers with nothing costs a bit; blocks stay CLIP's own"
    s, p = place(clip, NAMES, 2), Prompts(2, clip.text_width, depth=2).double()
    q = Prompts(2, clip.vision_width, depth=2).double()
    block = clip.text.transformer.resblocks[0]
    assert bent(block, 0, None) is block and bent(block, 0, Changes()) is block
    for plain in (True, False):
        text, vision = TextTower(clip, plain=plain), VisionTower(clip, plain=plain)
        assert torch.equal(text(s, p), text(s, p, Changes()))
        assert torch.equal(vision(images, q), vision(images, q, Changes()))


def test_the_definition_of_a_bent_block(clip):
    "Without additions it is open_clip's block to rounding; its own call is `run_block`"
    block, x = clip.text.transformer.resblocks[1], noise(3, 7, clip.text_width)
    mask = clip.text.attn_mask[:7, :7]
    assert error(Bent(block, {})(x, mask), block(x, attn_mask=mask)) < 1e-12
    full = bent(block, 1, Low(clip.text_width, 3))
    assert error(towers.run_block(full, x, True)[0], full(x, mask)) < 1e-12
    some = towers.run_block(full, x, True, torch.tensor([2, 4, 6]))[0]
    assert error(some, full(x, mask)[range(3), [2, 4, 6], None]) < 1e-12
    assert error(towers.run_block(full, x, True)[0], block(x, attn_mask=mask)) > 1e-2


def test_rows_beside_a_bent_sequence(clip):
    "`run_beside` bends too: rows beside are the last rows of the whole"
    block = bent(clip.visual.transformer.resblocks[1], 1, Low(clip.vision_width, 3))
    x, rows = noise(3, 6, clip.vision_width), noise(3, 2, clip.vision_width, seed=3)
    _, k, v = towers.run_block(block, x)
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    hidden = torch.zeros(8, 8, dtype=F64)
    hidden[:6, 6:] = -torch.inf
    whole = block(torch.cat([x, rows], 1), attn_mask=hidden)
    assert error(towers.run_beside(block, rows, k, v, mask), whole[:, 6:]) < 1e-12


class Drawn(Changes):
    "Every row has its own"
    drawn = True
    def __init__(self, L, N, width): self.noise = noise(L, N, width)
    def at(self, layer):
        def add(y): return self.noise[:y.shape[1]].transpose(0, 1)*y
        return dict(q=add, v=add, o=add)

def test_what_is_drawn_for_each_row_is_not_shared(clip, images):
    "Sentences are still cut behind the longest; no row of the last block is left out"
    s = Sentences.of(clip, WORDS)
    changes = Drawn(77, 4, clip.text_width)
    plain, fast = (TextTower(clip, plain=p)(s, None, changes) for p in (True, False))
    assert error(fast, plain) < 1e-10
    changes = Drawn(17, 5, clip.vision_width)
    plain, fast = (VisionTower(clip, plain=p)(images, None, changes) for p in (True, False))
    assert error(fast, plain) < 1e-10


def test_frozen_weights_get_no_gradient_and_stay(clip, images):
    low, before = Low(clip.vision_width, 3), copy.deepcopy(clip.model.state_dict())
    VisionTower(clip)(images, None, low).sum().backward()
    assert low.down.grad.abs().amax((1, 2, 3)).gt(0).all()
    assert all(p.grad is None for p in clip.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision(images, precision):
    clip = tiny_clip()
    s, x = Sentences.of(clip, WORDS), images.float()
    text, vision = Both(clip.text_width, 3), Both(clip.vision_width, 3)
    for c in (text, vision): c.low.down.data, c.low.up.data = c.low.down.float(), c.low.up.float()
    def features(plain=False):
        return (TextTower(clip, plain=plain)(s, None, text),
                VisionTower(clip, plain=plain)(x, None, vision))
    full = features()
    clip.precision = precision
    for plain in (True, False):
        for a, b in zip(features(plain), full):
            assert a.dtype == F32 and 1e-5 < error(a, b) < .1


@pytest.mark.stress
def test_bent_towers_compile(images):
    clip = tiny_clip()
    s, x = Sentences.of(clip, WORDS), images.float()
    for tower, given, width in ((TextTower(clip), s, clip.text_width),
                                (VisionTower(clip), x, clip.vision_width)):
        changes = Inserted(width, 1, 2, F32)
        theirs = tower(given, None, changes)
        torch._dynamo.reset()
        try: ours = torch.compile(lambda: tower(given, None, changes), backend='eager')()
        finally: torch._dynamo.reset()
        assert error(ours, theirs) < 1e-5


def test_grown_counts():
    x = torch.zeros(2, 5, 3)
    ins = Inserted(3, 0, 1, F32)
    y, n = grown(ins, 0, x, 0)
    assert y.shape == (2, 8, 3) and n == 3
    assert grown(ins, 1, y, n)[0] is y
