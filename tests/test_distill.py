"PromptKD: a second backbone teaches, labels are not read, running averages are kept."
from dataclasses import replace

import pytest
import torch

from clipprompt.adapters import TaskRes
from clipprompt.backbone import load_backbone
from clipprompt.check import small_clip
from clipprompt.cocoop import CoCoOp
from clipprompt.deep import IVLP
from clipprompt.distill import (BEFORE, Projection, PromptKD, distillation, load_teacher,
                                rescaled)
from clipprompt.hooks import Average, Hook
from clipprompt.learner import Recipe
from clipprompt.sets import load_dataset
from clipprompt.training import fit
from clipprompt.variational import VariationalCoOp
from clipprompt.zeroshot import ZeroShot
from helpers import images, one_line, tiny_clip

NAMES = ['cat', 'old shopping cart', 'traffic light']


def test_labels_are_not_read_and_weight_scales(clip):
    x, losses = images(clip), []
    for w in (1., 5.):
        learner = PromptKD(clip, NAMES, kd_weight=w).double()
        loss = learner.loss(x, torch.tensor([0, 1, 2, 0]))
        assert torch.equal(loss, learner.loss(x, None))
        losses.append(loss)
    torch.testing.assert_close(losses[1], 5*losses[0])

def test_a_teacher_is_not_trained(clip):
    teacher = IVLP(clip, NAMES).double()
    learner = PromptKD(clip, NAMES).double().taught_by(teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), .1)
    learner.training_step((images(clip), None), optimizer)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert learner.proj.running_mean.abs().max() > 0

def test_only_a_step_moves_the_averages(clip):
    learner = PromptKD(clip, NAMES).double().train()
    learner.loss(images(clip), None)
    learner(images(clip))
    assert learner.proj.running_mean.abs().max() == 0

def test_file_with_its_teacher(clip, tmp_path):
    teacher = IVLP(clip, NAMES, seed=3).double()
    with pytest.raises(ValueError) as e:
        PromptKD(clip, NAMES).taught_by(teacher).save(tmp_path/'s.safetensors')
    one_line(e, 'teacher is in memory only')
    teacher.save(tmp_path/'t.safetensors')
    learner = PromptKD(clip, NAMES, teacher=tmp_path/'t.safetensors').double()
    learner.proj.running_mean += 1
    learner.save(tmp_path/'s.safetensors')
    again = PromptKD.load(tmp_path/'s.safetensors', clip).eval()
    with torch.no_grad():
        assert torch.equal(again(images(clip)), learner(images(clip)))
        assert torch.equal(again.for_classes(NAMES[:2])(images(clip)),
                           learner.for_classes(NAMES[:2])(images(clip)))

# ---- other backbones, other classes --------------------------------------------------------------

def test_a_teacher_on_another_backbone_comes_from_its_file(tmp_path):
    "picto-clip is wider and deeper than the student; the file names it, nobody else does"
    clip, large = tiny_clip(), load_backbone(device='cpu')
    teacher = IVLP(large, NAMES, n_ctx=3, ctx_init=None, n_visual=1, depth_text=2, seed=5)
    teacher.save(tmp_path/'t.safetensors')
    student = PromptKD(clip, NAMES, teacher=tmp_path/'t.safetensors')
    x = images(clip)
    with torch.no_grad():
        theirs = teacher.eval()(rescaled(x, clip, large))   # picto-clip has pixels of its own
        torch.testing.assert_close(student.teacher_logits(x), theirs)
    assert student.proj.last.out_features == large.embed_dim != clip.embed_dim
    student.training_step((x, None), torch.optim.SGD(student.parameters(), .1))
    student.save(tmp_path/'s.safetensors')
    again = PromptKD.load(tmp_path/'s.safetensors', clip).eval()
    with torch.no_grad(): assert torch.equal(again(x), student.eval()(x))
    new = again.for_classes(['fork', *NAMES[:1]])
    with torch.no_grad(): assert new(x).shape == (4, 2)

def test_weights_that_have_no_name_are_given(clip, tmp_path):
    other = tiny_clip(seed=7)
    teacher = IVLP(other, NAMES, seed=2).eval()
    teacher.save(tmp_path/'t.safetensors')
    with pytest.raises(ValueError) as e: PromptKD(clip, NAMES, teacher=tmp_path/'t.safetensors')
    one_line(e, 't.safetensors', 'tiny-7', 'taught_by', 'load_teacher')
    loaded = load_teacher(tmp_path/'t.safetensors', clip, other)
    x = images(clip)
    with torch.no_grad():
        assert torch.equal(loaded(x), teacher(x))
        student = PromptKD(clip, NAMES).double().taught_by(loaded)
        torch.testing.assert_close(student.teacher_logits(x), teacher(x))
    assert student.loss(x, None).isfinite()   # a teacher in float32, a student in float64

def test_a_teacher_whose_weights_have_no_name_goes_along(clip, tmp_path):
    "Its file is noted, so the student is saved; whoever loads it brings the teacher"
    teacher, student = tmp_path/'t.safetensors', tmp_path/'s.safetensors'
    other, x = tiny_clip(seed=7), images(clip)
    IVLP(other, NAMES, seed=2).save(teacher)
    learner = PromptKD(clip, NAMES).double().taught_by(load_teacher(teacher, clip, other), teacher)
    learner.save(student)
    with pytest.raises(ValueError) as e: PromptKD.load(student, clip)
    one_line(e, 'tiny-7', 'PromptKD.load')
    again = PromptKD.load(student, clip, teacher=load_teacher(teacher, clip, other)).eval()
    assert type(again) is PromptKD and again.hparams == learner.hparams
    with torch.no_grad():
        assert torch.equal(again(x), learner.eval()(x))
        few = again.for_classes(NAMES[:2])(x)   # the teacher rounds in single precision
        torch.testing.assert_close(few, again(x)[:, :2], rtol=1e-4, atol=1e-4)

def test_a_method_nobody_imported(clip, tmp_path):
    teacher = IVLP(clip, NAMES).double()
    teacher.method = 'unheard-of'
    teacher.save(tmp_path/'t.safetensors')
    with pytest.raises(ValueError) as e: load_teacher(tmp_path/'t.safetensors', clip)
    one_line(e, "'unheard-of'", 'import the module')

def test_pixels_are_scaled_for_the_teacher(clip):
    other = tiny_clip(seed=7, dtype=torch.float64)
    other.mean, other.std = (.5, .4, .3), (.2, .3, .4)
    teacher = ZeroShot(other, NAMES)
    pixels = torch.rand(2, 3, clip.image_size, clip.image_size, dtype=torch.float64)
    def seen(clip):
        mean, std = (torch.tensor(v)[:, None, None].double() for v in (clip.mean, clip.std))
        return (pixels-mean)/std
    student = PromptKD(clip, NAMES).double().taught_by(teacher)
    torch.testing.assert_close(student.teacher_logits(seen(clip)), teacher(seen(other)),
                               rtol=1e-6, atol=1e-5)

@pytest.mark.parametrize('make,says', [
    (lambda clip: ZeroShot(small_clip(), NAMES), ['16 pixels', '32', 'one picture size']),
    (lambda clip: TaskRes(clip, ['fork', 'key']), ['taskres', 'the teacher was trained on']),
    (lambda clip: CoCoOp(clip, NAMES), ['cocoop has no class features']),
    (lambda clip: VariationalCoOp(clip, NAMES), ['variational-coop has no class features'])])
def test_teachers_that_cannot_teach(clip, make, says):
    with pytest.raises(ValueError) as e: PromptKD(clip, NAMES).taught_by(make(clip).double())
    one_line(e, *says)

@pytest.mark.parametrize('cls', BEFORE, ids=lambda cls: cls.method)
def test_every_earlier_method_teaches_or_refuses(clip, cls):
    student = PromptKD(clip, NAMES).double()
    try: student.taught_by(cls(clip, NAMES).double())
    except ValueError as e:
        assert 'cannot teach' in str(e) and '\n' not in str(e)
        return
    x = images(clip)
    assert student.loss(x, None).isfinite() and student.eval()(x).shape == (4, 3)


# ---- the teacher looks once ----------------------------------------------------------------------

class Forgetful(PromptKD):
    "Asks its teacher at every step"
    def hooks(self): return []

class Looks(IVLP):
    "Counts the pictures it has seen"
    method, seen = 'looks', 0
    def image_features(self, images):
        self.seen += len(images)
        return super().image_features(images)


def distilled(cls, data, clip, **how):
    "A student after training, its teacher, and what `fit` says"
    teacher = Looks(clip, data.classnames, seed=4)
    learner = cls(clip, data.classnames, depth_vision=2).taught_by(teacher)
    recipe = replace(PromptKD.recipe(), epochs=5, batch_size=5, views=2, warmup_epochs=0)
    return learner, teacher, fit(learner, data, recipe, seed=3, progress=False, **how)

def test_a_teacher_that_looks_once_says_the_same(photos):
    data, clip = photos.few_shot(4, 1), tiny_clip()
    kept, once, told = distilled(PromptKD, data, clip)
    asked, often, said = distilled(Forgetful, data, clip)
    assert told.losses == pytest.approx(said.losses, rel=1e-5)
    for a, b in zip(kept.state_dict().values(), asked.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    n, steps = len(data.train), len(data.train)//5
    assert once.seen == 2*n and often.seen == 5*steps*5
    assert kept.told is None   # nothing is left behind

def test_resumed_it_is_told_the_same(photos, tmp_path):
    class PowerCut(Hook):
        def before_epoch(self, run, epoch):
            if epoch == 4: raise KeyboardInterrupt
    data, clip = photos.few_shot(4, 1), tiny_clip()
    whole, *_ = distilled(PromptKD, data, clip)
    with pytest.raises(KeyboardInterrupt):
        distilled(PromptKD, data, clip, hooks=[PowerCut()], checkpoint=tmp_path/'c')
    again, *_ = distilled(PromptKD, data, clip, checkpoint=tmp_path/'c')
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)

def test_the_best_epoch_keeps_its_running_averages(photos):
    "best_on_val leaves parameters and buffers of one epoch, that with the best score"
    class Epochs(Hook):
        def __init__(self): self.states = []
        def after_epoch(self, run, epoch):
            self.states.append({k: v.clone() for k, v in run.learner.state_dict().items()})
    data = photos.few_shot(2, 1)
    data, every = replace(data, val=data.test), Epochs()
    learner = PromptKD(tiny_clip(), data.classnames, depth_vision=1)
    recipe = Recipe(lr=.2, epochs=6, batch_size=4, warmup_epochs=0, select='best_on_val')
    run = fit(learner, data, recipe, seed=5, progress=False, hooks=[every])
    best = run.scores.index(max(run.scores))
    assert best < 5, 'an earlier epoch was meant to be best'
    for name, value in learner.state_dict().items():
        assert torch.equal(value, every.states[best][name]), name
    assert not torch.equal(learner.proj.running_mean, every.states[-1]['proj.running_mean'])


# ---- the loss, and what is refused ---------------------------------------------------------------

def test_divergence():
    z = torch.randn(3, 5)
    assert distillation(z, z) == 0
    assert distillation(torch.randn(3, 5), z) > 0

def test_bad_input(clip):
    with pytest.raises(ValueError) as e: PromptKD(clip, NAMES, tau=0)
    one_line(e, 'tau must be above 0')
    with pytest.raises(ValueError) as e: Projection(4, 4).of_batch(torch.randn(1, 4))
    one_line(e, 'at least two pictures')


@pytest.mark.stress
def test_running_statistics_survive_average_and_selection():
    "Hooks that replace prompts at the end keep what batch normalisation remembers"
    picto, data = load_backbone(device='cpu'), load_dataset('pictograms', 'arrows').few_shot(1, 1)
    recipe = replace(PromptKD.recipe(), epochs=2, batch_size=4)

    def trained(recipe, **how):
        learner = PromptKD(picto, data.classnames, depth_vision=1)
        fit(learner, data, recipe, seed=1, progress=False, **how)
        return learner.state_dict()

    last = trained(recipe)
    mean = trained(recipe, hooks=[Average()])
    assert torch.equal(mean['proj.running_mean'], last['proj.running_mean'])
    assert not torch.equal(mean['proj.first.weight'], last['proj.first.weight'])
    best = trained(replace(recipe, select='best_on_val'))
    assert set(best) == set(last)
