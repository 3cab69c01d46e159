"PromptKD: a second backbone teaches, labels are not read, running averages are kept."
from dataclasses import replace

import pytest
import torch

from clipprompt.backbone import load_backbone
from clipprompt.deep import IVLP
from clipprompt.distill import Projection, PromptKD, distillation
from clipprompt.hooks import Average
from clipprompt.sets import load_dataset
from clipprompt.training import fit
from helpers import one_line, tiny_clip

NAMES = ['cat', 'old shopping cart', 'traffic light']

@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)

def images(clip, n=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, clip.image_size, clip.image_size, dtype=clip.dtype, generator=g)

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
