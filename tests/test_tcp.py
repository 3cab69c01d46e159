"TCP: class tokens from a block on, the prefix shared below it, words behind the name."
import pytest
import torch

from clipprompt import towers
from clipprompt.prompts import place
from clipprompt.tcp import TCP, Injected
from helpers import one_line

NAMES = ['cat', 'old shopping cart', 'traffic light']


def grads(learner, plain):
    learner.text.plain = plain
    t = learner.text_features()
    weights = torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype)
    return t, torch.autograd.grad((t*weights).sum(), list(learner.parameters()))

@pytest.mark.parametrize('sentence',
    [None, 'X X X X {}, a type of pet.', 'X X X X person doing {}'])
@pytest.mark.parametrize('block', ['first', 'last'])
@pytest.mark.parametrize('checkpoint', [False, True])
def test_fast_is_plain(clip, block, sentence, checkpoint):
    layer = 1 if block == 'first' else clip.text_layers-1
    learner = TCP(clip, NAMES, inject_layer=layer, prompt_template=sentence).double()
    learner.text.checkpoint = checkpoint
    (t, fast), (t0, plain) = grads(learner, False), grads(learner, True)
    torch.testing.assert_close(t, t0, rtol=1e-10, atol=1e-12)
    for a, b in zip(fast, plain): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(g.abs().max() > 0 for g in fast)

@pytest.mark.parametrize('chunk', [1, 2, 3])
def test_chunks_change_nothing_and_bound_the_rows(clip, chunk, monkeypatch):
    "No block ever sees more classes than a chunk has, and the numbers stay"
    whole, learner = TCP(clip, NAMES).double(), TCP(clip, NAMES).double()
    learner.text.chunk, seen, run = chunk, [], towers.run_block
    (t, few), (t0, all_) = grads(learner, False), grads(whole, False)
    torch.testing.assert_close(t, t0, rtol=1e-10, atol=1e-12)
    for a, b in zip(few, all_): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    def counted(block, x, *args, **how):
        seen.append(len(x))
        return run(block, x, *args, **how)
    monkeypatch.setattr(towers, 'run_block', counted)
    learner.text_features()
    assert max(seen) == chunk
    other = learner.for_classes(NAMES[::-1])   # nothing of the old classes is kept
    torch.testing.assert_close(other.text_features().flip(0), t0, rtol=1e-10, atol=1e-12)

def test_what_is_carried_to_the_slots_is_dropped(clip):
    "From the injection on the slots hold the class's tokens, whatever came out there"
    own, out = torch.randn(3, 4, 8), torch.randn(1, 3, 4, 8)
    prompts = Injected(torch.randn(4, 8), own, 1)
    assert prompts.enter(1, out) is own
    assert prompts.enter(2, out) is out

def test_order_of_classes(clip):
    learner = TCP(clip, NAMES).double()
    other = learner.for_classes(NAMES[::-1])
    with torch.no_grad():
        torch.testing.assert_close(other.text_features().flip(0), learner.text_features())

def test_words_behind_the_name(clip):
    s = place(clip, NAMES, 4, behind=', a type of pet.')
    assert torch.equal(s.ids, clip.tokenize([f'X X X X {n}, a type of pet.' for n in NAMES]))
    assert torch.equal(s.slots, torch.arange(1, 5).expand(3, 4))
    assert torch.equal(place(clip, NAMES, 4).ids, place(clip, NAMES, 4, behind='.').ids)
    with pytest.raises(ValueError) as e: place(clip, NAMES, 4, behind=' of a type'*30)
    one_line(e, 'needs', 'places')

@pytest.mark.parametrize('given,says', [
    (dict(inject_layer=0), 'use 1 to'), (dict(inject_layer=99), 'use 1 to'),
    (dict(prompt_template='X X X X'), 'exactly one {}')])
def test_bad_input(clip, given, says):
    with pytest.raises(ValueError) as e: TCP(clip, NAMES, **given)
    one_line(e, says)

def test_terms_and_weight(clip):
    x, y = torch.randn(2, 3, clip.image_size, clip.image_size).double(), torch.tensor([0, 2])
    learner = TCP(clip, NAMES, kg_weight=3.).double()
    terms = learner.loss_terms(x, y)
    torch.testing.assert_close(learner.loss(x, y), terms['ce'] + 3*terms['kg'])
