"""CLIP-LoRA, MMA and MMRL beyond their goldens: where they begin, what they merge, whose gradient
is whose, which head answers."""
import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipprompt.check import check_learner, small_clip
from clipprompt.evaluation import evaluate
from clipprompt.inside import MMA, MMRL, ClipLoRA, LowRank, Maps, blocks_of, times
from clipprompt.training import fit
from clipprompt.zeroshot import ZeroShot
from helpers import images, one_line, tiny_clip

NAMES = ['polar bear', 'key', 'cart']
LABELS = torch.tensor([0, 1, 2, 0])

@torch.no_grad()
def moved(learner, size=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in learner.parameters(): p += size*torch.randn(p.shape, generator=g).to(p)
    return learner.double().eval()

def near(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def slopes(learner, x):
    params = dict(learner.named_parameters())
    grads = torch.autograd.grad(learner.loss(x, LABELS), list(params.values()))
    return dict(zip(params, grads))


@pytest.mark.parametrize('cls,hparams', [
    (ClipLoRA, dict(dropout=0.)), (ClipLoRA, dict(encoder='text', params='qo')),
    (ClipLoRA, dict(encoder='vision', position=[1, 2], r=3, alpha=2)),
    (ClipLoRA, dict(params=['v'], position='half-up')), (MMA, dict(start=1, end=2, dim=4)),
    (MMA, dict(scale=.3, boosted=False)), (MMRL, dict(rep_layers=[1, 3], rep_dim=8, n_rep=1)),
    (MMRL, dict(alpha=.4, reg_weight=1., rep_dim=8))])
def test_contract_with_other_settings(cls, hparams):
    result = check_learner(cls, **hparams)
    assert (result.result == 'passed').all(), result


# ---- CLIP-LoRA -----------------------------------------------------------------------------------

def test_lora_begins_at_zero_shot(clip):
    x = images(clip)
    learner = ClipLoRA(clip, NAMES).double()
    near(learner.eval()(x), ZeroShot(clip, NAMES)(x))
    for name, g in slopes(learner.train(), x).items():
        assert (g == 0).all() == name.endswith('A'), name


@pytest.mark.parametrize('hparams', [
    {}, dict(params='qkvo', r=3, alpha=2.), dict(encoder='text', position=[0, 2]),
    dict(encoder='vision', position='up', params='vo')])
def test_merged_weights_give_the_same_logits(clip, hparams):
    "In a copy: CLIP keeps its weights, and the copy has another fingerprint"
    x, before = images(clip), {k: v.clone() for k, v in clip.model.state_dict().items()}
    learner = moved(ClipLoRA(clip, NAMES, **hparams))
    merged = learner.merged()
    near(ZeroShot(merged, NAMES)(x), learner(x))
    assert (learner(x)-ZeroShot(clip, NAMES)(x)).abs().max() > .01
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())
    assert merged.fingerprint != clip.fingerprint and merged.model is not clip.model


@pytest.mark.parametrize('params,position', [('qkv', 'all'), ('qo', [0]), ('o', 'top3')])
def test_number_of_parameters(clip, params, position):
    learner = ClipLoRA(clip, NAMES, r=4, params=params, position=position)
    J = len(blocks_of(position, 3))
    assert sum(p.numel() for p in learner.parameters()) == \
        J*len(params)*2*4*(clip.text_width+clip.vision_width)


def test_dropout_is_the_same_on_every_path(clip):
    "Masks are functions of one draw; kept numbers are scaled; evaluation has none"
    x, learner = images(clip), moved(ClipLoRA(clip, NAMES, params='qkvo', dropout=.5))
    still = learner(x)
    near(still, moved(ClipLoRA(clip, NAMES, params='qkvo', dropout=0.))(x))
    learner.train()
    def out(seed, plain=False, again=False):
        learner.text.plain = learner.vision.plain = plain
        learner.text.checkpoint = learner.vision.checkpoint = again
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = learner.loss(x, LABELS)
            grads = torch.autograd.grad(loss, list(learner.parameters()))
        return loss, *grads
    for how in (dict(plain=True), dict(again=True)):
        for a, b in zip(out(1, **how), out(1)): near(a, b)
    assert out(1)[0] != out(2)[0]
    lora, rows = learner.text_lora, torch.ones(3, 7, clip.text_width).double()
    kept = lora.kept('q', 1, 5, rows)
    assert torch.equal(kept[:, :4], lora.kept('q', 1, 5, rows[:, :4]))
    assert .3 < kept.double().mean() < .7 and not torch.equal(kept, lora.kept('k', 1, 5, rows))
    assert not torch.equal(kept[0], kept[1])


def test_the_mean_over_masks_is_no_mask():
    "Inverted scaling: on average the thin branch sees what it sees in evaluation"
    lora = LowRank(6, [0], params='q', dropout=.25)
    lora.q['B'].data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, 6)
    with torch.no_grad():
        mean = torch.stack([lora.add('q', 0, i, x) for i in range(2000)]).mean(0)
        assert (mean-lora.add('q', 0, None, x)).abs().max() < .1


@pytest.mark.parametrize('wrong,says', [
    (dict(params='qx'), ('params', 'qx')), (dict(params=''), ('params', )),
    (dict(encoder='image'), ("unknown encoder 'image'", )),
    (dict(position='botom'), ("unknown position 'botom'", 'bottom')),
    (dict(position=[3]), ('3 blocks', '0 to 2')), (dict(r=0), ('r is at least 1', )),
    (dict(dropout=1.), ('dropout', ))])
def test_lora_refuses(clip, wrong, says):
    with pytest.raises(ValueError) as e: ClipLoRA(clip, NAMES, **wrong)
    one_line(e, *says)


# ---- MMA -----------------------------------------------------------------------------------------

def test_nothing_that_comes_up_is_zero_shot(clip):
    learner, x = MMA(clip, NAMES).double(), images(clip)
    for own in (learner.text_adapter, learner.vision_adapter):
        for p in own['up'].parameters(): p.data.zero_()
    near(learner(x), ZeroShot(clip, NAMES)(x))


def test_the_boost_multiplies_what_is_learned_and_nothing_below(clip):
    "1/scale for every parameter, also of the lower of two adapted blocks"
    learner, x = moved(MMA(clip, NAMES, start=1, scale=.1), .1), images(clip)
    true = slopes(learner, x)
    learner.boost = 10.
    for name, g in slopes(learner, x).items(): near(g, 10*true[name])


def test_gradients_hardly_depend_on_the_scale(clip):
    x, grads, gaps = images(clip), [], []
    zero = ZeroShot(clip, NAMES)(x)
    for scale in (1e-5, 5e-6):
        learner = moved(MMA(clip, NAMES, scale=scale))
        gaps.append((learner(x)-zero).abs().max().item())
        learner.boost = 1/scale
        grads.append(slopes(learner, x))
    assert gaps[0]/gaps[1] == pytest.approx(2, rel=1e-2)
    for a, b in zip(*(g.values() for g in grads)): near(a/b.abs().max(), b/b.abs().max(), 1e-2)


def test_a_shared_map_learns_from_both_towers(clip):
    "Its gradient is the sum of those of two maps that are not shared"
    learner, x = moved(MMA(clip, NAMES), .1), images(clip)
    whole = slopes(learner, x)['shared.weight']
    twins, parts = [Maps(learner.shared.weight.detach().clone(),
                         learner.shared.bias.detach().clone()) for _ in range(2)], []
    beside = learner._beside
    def apart(own):
        found = beside(own)
        twin = twins[own is learner.vision_adapter]
        found.maps = found.maps[0], twin, found.maps[2]
        return found
    learner._beside = apart
    loss = learner.loss(x, LABELS)
    parts = torch.autograd.grad(loss, [t.weight for t in twins])
    near(sum(parts), whole)
    assert all(p.abs().max() > 0 for p in parts)


def test_steps_are_boosted_unless_asked_not_to(clip):
    x = images(clip)
    def step(**hparams):
        learner = MMA(clip, NAMES, scale=.01, **hparams).double()
        before = [p.detach().clone() for p in learner.parameters()]
        opt = torch.optim.SGD(learner.parameters(), 1e-3)
        learner.training_step((x, LABELS), opt)
        assert learner.boost == 1
        return [p.detach()-b for p, b in zip(learner.parameters(), before)]
    for a, b in zip(step(), step(boosted=False)): near(a, 100*b, 1e-7)


def test_times():
    x = torch.tensor([1e8, 1e-8, 3.], requires_grad=True)
    y = times(x, 1000.)
    assert torch.equal(y, x) and torch.autograd.grad(y.sum(), x)[0].tolist() == [1000.]*3


@pytest.mark.parametrize('wrong', [dict(start=0), dict(end=4), dict(start=3, end=2)])
def test_mma_refuses_blocks(clip, wrong):
    with pytest.raises(ValueError) as e: MMA(clip, NAMES, **wrong)
    one_line(e, 'adapters from block', 'use 1 to 3')


def test_sizes_of_the_papers(clip):
    "As the released code counts them at ViT-B/16"
    large = dict(text_width=512, vision_width=768, embed_dim=512, text_layers=12, vision_layers=12)
    big = copy.copy(clip)   # constructors ask for nothing but its sizes
    big.__class__ = type('Large', (type(clip),), large)
    for name in large: vars(big).pop(name, None)   # where they are no properties
    sizes = {MMA: 674_560, ClipLoRA: 184_320, MMRL: 4_992_256}
    for cls, n in sizes.items():
        assert sum(p.numel() for p in cls(big, NAMES).parameters()) == n


# ---- MMRL ----------------------------------------------------------------------------------------

def test_which_head_answers(clip):
    learner, x = moved(MMRL(clip, NAMES, rep_dim=8), .1), images(clip)
    (f, g), t = learner.heads(x), learner.text_features()
    s = clip.logit_scale
    near(learner(x), s*(.7*f + .3*g) @ t.T)
    near(learner.for_classes(NAMES[::-1])(x), learner(x)[:, [2, 1, 0]])
    assert learner.for_classes(NAMES[:2]).fused and not learner.for_classes(['fork', *NAMES]).fused
    new = learner.for_classes(['fork', 'key'])
    near(new(x), s*f @ new.text_features().T)
    assert new.for_classes(NAMES).fused and not new.for_classes(['fork']).fused
    before = new(x)
    new.proj_rep.data += 1
    near(new(x), before)
    near(learner.for_data(SimpleNamespace(classnames=NAMES))(x), s*f @ t.T)


def test_seen_classes_are_those_of_the_data(photos, tmp_path):
    clip = tiny_clip()
    learner = MMRL(clip, photos.classnames, rep_dim=8)
    fit(learner, photos, replace(MMRL.recipe(), epochs=1), progress=False)
    assert learner.hparams['seen'] == learner.classnames
    learner.for_classes(['key', 'disc']).save(tmp_path/'p.safetensors')
    again = MMRL.load(tmp_path/'p.safetensors', clip)
    assert not again.fused and again.for_classes(['disc', 'ring']).fused
    assert evaluate(learner, photos).accuracy >= 0


def test_without_its_share_the_second_head_learns_nothing(clip):
    learner = MMRL(clip, NAMES, rep_dim=8, alpha=1., reg_weight=0.).double()
    grads = slopes(learner, images(clip))
    assert (grads['proj_rep'] == 0).all() and grads['rep_tokens'].abs().max() > 0


def test_maps_of_all_layers_start_equal(clip):
    learner = MMRL(clip, NAMES, rep_layers=[1, 2, 3], rep_dim=8)
    for maps in (learner.r2v, learner.r2t):
        assert all(torch.equal(maps.weight[0], w) for w in maps.weight)


def test_frozen_features_may_be_given(clip):
    learner, x = moved(MMRL(clip, NAMES, rep_dim=8)), images(clip)
    near(learner.loss(x, LABELS, learner.frozen_image(x)), learner.loss(x, LABELS))


@pytest.mark.parametrize('wrong', [dict(rep_layers=[0, 1]), dict(rep_layers=[3, 4]),
                                   dict(alpha=1.5), dict(n_rep=0)])
def test_mmrl_refuses(clip, wrong):
    with pytest.raises(ValueError) as e: MMRL(clip, NAMES, **wrong)
    one_line(e)


def test_rates_are_the_recorded_ones():
    "The recipes' schedules, cut to the recorded number of epochs"
    from clipprompt.steps import lr_at
    goldens = Path(__file__).parent/'goldens'
    for cls, case in ((MMA, 'mma'), (MMRL, 'mmrl'), (ClipLoRA, 'clip_lora')):
        told = json.loads((goldens/f'{case}.json').read_text())
        recipe = cls.recipe('base-to-new')
        epochs = told['schedule'].get('max_epoch') or told['schedule']['t_max']
        recipe = replace(recipe, epochs=epochs, steps=None)
        ours = [lr_at(recipe, e) for e in range(1, 1+len(told['lr_per_step']))]
        assert ours == pytest.approx(told['lr_per_step'], rel=1e-12)
        o = told['optimizer']
        assert (recipe.optimizer, recipe.weight_decay, recipe.lr) == \
            (o['name'].lower(), o['weight_decay'], o['base_lr'])


def test_files_are_small(tmp_path):
    clip = small_clip(torch.float32)
    for cls in (ClipLoRA, MMA, MMRL):
        learner = cls(clip, NAMES)
        learner.save(tmp_path/'p.safetensors')
        size, n = (tmp_path/'p.safetensors').stat().st_size, sum(
            p.numel() for p in learner.parameters())
        assert size < 4*n + 4096
        x = images(clip)
        near(cls.load(tmp_path/'p.safetensors', clip).eval()(x), learner.eval()(x), 1e-6)
