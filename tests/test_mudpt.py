"""MuDPT beyond its goldens: widths that differ, one level, long prompts, and what remains when the
maps are thrown away."""
import pytest
import torch

from clipprompt.deep import IVLP
from clipprompt.mudpt import FUSIONS, MuDPT
from helpers import one_line, tiny_clip

NAMES = ['polar bear', 'key', 'old shopping cart']
fusions = pytest.mark.parametrize('fusion', FUSIONS)


@pytest.fixture(scope='module')
# text width 24, image width 32, joint width 16: all differ
def clip(): return tiny_clip(dtype=torch.float64)


def images(clip, n=2):
    return torch.randn(n, 3, clip.image_size, clip.image_size, dtype=clip.dtype,
                       generator=torch.Generator().manual_seed(0))


@fusions
@pytest.mark.parametrize('depth', [1, 2, 3])
def test_shapes_and_gradients(clip, fusion, depth):
    "Every parameter is used and taught, also where there is a single level"
    learner = MuDPT(clip, NAMES, n_ctx=3, depth=depth, fusion=fusion).double()
    text, image = learner.fused()
    assert text.shape == (depth, 3, clip.text_width)
    assert image.shape == (depth, 3, clip.vision_width)
    learner.loss(images(clip), torch.tensor([0, 2])).backward()
    for n, p in learner.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, n


@fusions
def test_level_zero_of_the_text_is_never_fused(clip, fusion):
    learner = MuDPT(clip, NAMES, fusion=fusion).double()
    assert torch.equal(learner.fused()[0][0], learner.ctx.tokens[0])
    if fusion == 'text_to_vision':
        assert learner.fused()[0] is learner.ctx.tokens and not hasattr(learner, 'visual_ctx')
    else: assert not torch.allclose(learner.fused()[0][1], learner.ctx.tokens[1])


@fusions
def test_without_the_maps_it_is_independent_prompting(clip, fusion):
    "Fused once, the same tokens in IVLP give the same logits"
    learner = MuDPT(clip, NAMES, depth=2, fusion=fusion).double()
    other = IVLP(clip, NAMES, depth_text=2, depth_vision=2).double()
    text, image = learner.fused()
    with torch.no_grad():
        other.ctx.tokens.copy_(text); other.visual_ctx.tokens.copy_(image)
        # IVLP keeps the rest of the phrase in the sentence
        other.sentences = learner.sentences
        torch.testing.assert_close(other(images(clip)), learner(images(clip)), rtol=1e-12,
                                   atol=1e-12)


def test_the_sentence_holds_the_first_words_and_the_whole_name(clip):
    def words(learner):
        s = learner.sentences
        return [clip.tokenizer.decode(ids[:eot + 1].tolist()) for ids, eot in zip(s.ids, s.eot)]

    said = words(MuDPT(clip, NAMES, n_ctx=2))[0]
    assert said == '<start_of_text>a photo polar bear . <end_of_text>'
    said = words(MuDPT(clip, NAMES, n_ctx=4))[2]
    assert said == '<start_of_text>a photo of a old shopping cart . <end_of_text>'
    # longer than the phrase: noise, and no name is cut
    long = MuDPT(clip, NAMES, n_ctx=8)
    assert all(n in w for n, w in zip(NAMES, words(long)))
    assert long.ctx.tokens.std() < .03
    assert len(long.sentences.slots[0]) == 8
    # words of several tokens: exactly as many places as there are tokens
    odd = MuDPT(clip, NAMES, n_ctx=2, ctx_init='pictograms of a')
    assert len(clip.tokenizer.encode('pictograms of')) > 2
    assert words(odd)[1] == '<start_of_text>x x key . <end_of_text>'


def test_both_directions_read_the_raw_tokens(clip):
    learner = MuDPT(clip, NAMES, fusion='linear').double()
    T, V, (text, image) = learner.ctx.tokens, learner.visual_ctx.tokens, learner.fused()
    torch.testing.assert_close(text[1:], T[1:] + V[1:] @ learner.v2t.weight.T + learner.v2t.bias)
    mapped = torch.cat([T[:1] @ learner.shallow.weight.T + learner.shallow.bias,
                        T[1:] @ learner.t2v.weight.T + learner.t2v.bias])
    torch.testing.assert_close(image, V + mapped)


def numbers(fusion, n, J, d_t, d_v):
    "What the authors' trainers learn: tokens, and the maps between the towers"
    def linear(a, b): return a*b + b
    def light(d): return 12*d*d + 13*d + 4*d   # a block and two layer norms
    both, maps = n*J*(d_t+d_v), 2*linear(d_t, d_v) + linear(d_v, d_t)
    if fusion == 'linear': return both + maps
    down, up = light(d_t) + linear(d_t, d_v), light(d_v) + linear(d_v, d_t)
    return n*J*d_t + down if fusion == 'text_to_vision' else both + down + up

@fusions
@pytest.mark.parametrize('n_ctx,depth', [(None, None), (4, 2), (6, 3)])
def test_numbers_that_are_learned(clip, fusion, n_ctx, depth):
    """As many as the repository's three trainers have: the formula that gives theirs at ViT-B/16
    gives ours at other widths"""
    at_b16 = dict(transformer=11_053_568, linear=1_202_176, text_to_vision=3_556_608)
    assert numbers(fusion, 2, 8, 512, 768) == at_b16[fusion]
    learner = MuDPT(clip, NAMES, n_ctx=n_ctx, depth=depth, fusion=fusion)
    ours = sum(p.numel() for p in learner.parameters())
    assert ours == numbers(fusion, n_ctx or 2, depth or 3, clip.text_width, clip.vision_width)


@pytest.mark.parametrize('kw,says', [
    (dict(fusion='both'), ["fusion 'both'", 'transformer']), (dict(depth=4), ['depth', '3']),
    (dict(depth=0), ['depth']), (dict(n_ctx=0), ['n_ctx', 'at least 1']),
    (dict(n_ctx=5, ctx_init='a photo of a'), ['n_ctx is 5', '4 tokens', 'at most 4'])])
def test_bad_input(clip, kw, says):
    with pytest.raises(ValueError) as e: MuDPT(clip, NAMES, **kw)
    one_line(e, *says)
