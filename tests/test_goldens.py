"""Numbers recorded from the authors' code on small random CLIPs (tests/goldens) must come out
again, on every path.

Set CLIPPROMPT_GOLDENS to a folder to run other cases of the same format: cases are found by
listing the folder and dispatched on `method` and `hparams`, never on file names. Error: max|a-b|
/ max|b| per tensor.
"""
import json
import os
import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from clipprompt.adapters import (ClipAdapter, LPPlusPlus, TaskRes, TipAdapter, TipAdapterF,
                                 best_mix, cache_keys, grid, step_sizes)
from clipprompt.anchored import Anchored, Aligned, KgCoOp, ProGrad, PromptSRC, aligned
from clipprompt.check import Golden
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.coprompt import Agreeing, CoPrompt
from clipprompt.backbone import Backbone
from clipprompt.deep import IVLP, VPT, MaPLe
from clipprompt.dept import DePT
from clipprompt.inside import MMA, MMRL, ClipLoRA
from clipprompt.distill import PromptKD
from clipprompt.metaprompt import MetaPrompt
from clipprompt.mudpt import MuDPT
from clipprompt.prompts import AUTO, place
from clipprompt.provp import ProVP, ProVPRef, provp_template
from clipprompt.tcp import TCP
from clipprompt.variational import Variational, VariationalCoCoOp, VariationalCoOp
from clipprompt.zeroshot import ZeroShot
from helpers import one_line, tiny_clip

FOLDER = Path(os.environ.get('CLIPPROMPT_GOLDENS') or Path(__file__).parent/'goldens')
CASES = sorted(p.stem for p in FOLDER.glob('*.json'))
REST = slice(1, None)   # the reference code keeps the first layer's tokens apart from the others

TEXT, IMAGE = [{'ctx': (f'{p}.tokens', 0), 'deep': (f'{p}.tokens', REST)}
               for p in ('ctx', 'visual_ctx')]
# method in the json -> our class; recorded parameter -> our parameter and an index into it
WHERE = {
    'CoOp': (CoOp, {'ctx': TEXT['ctx']}),
    'CoCoOp': (CoCoOp, {'ctx': TEXT['ctx']} | {
        f'meta_net.linear{i}.{w}': (f'meta_net.linear{i}.{w}', ...)
        for i in (1, 2)
        for w in ('weight', 'bias')
    }),
    'VPT deep (vision prompts only)':
        (VPT, {'visual_ctx': IMAGE['ctx'], 'deep_visual': IMAGE['deep']}),
    'IVLP (independent prompts)': (IVLP, {
        'ctx': TEXT['ctx'], 'deep_text': TEXT['deep'], 'visual_ctx': IMAGE['ctx'],
        'deep_visual': IMAGE['deep']
    }),
    'MaPLe': (MaPLe, {'ctx': TEXT['ctx'], 'deep_text': TEXT['deep']} | {
        f'{p}proj.{w}': (f'proj.{w}', REST if p else 0)
        for p in ('', 'deep_')
        for w in ('weight', 'bias')
    }),
}
FUSIONS = {
    'MuDPT linear fusion': 'linear', 'MuDPT transformer fusion': 'transformer',
    'MuDPT text-to-vision only': 'text_to_vision'
}
WHERE |= {m: (MuDPT, WHERE['IVLP (independent prompts)'][1]) for m in FUSIONS}
WHERE |= {
    'ProVP': (ProVP, {'visual_prompts': ('visual_ctx.tokens', ...)}),
    'ProVP-Ref': (ProVPRef, {'visual_prompts': ('visual_ctx.tokens', ...)})
}
WHERE['variational CoOp (unconditional)'] = VariationalCoOp, {'ctx':
    TEXT['ctx']} | {n: (n, ...)
                    for n in ('posterior.mu', 'posterior.logvar')}
WHERE['variational CoCoOp (conditional)'] = VariationalCoCoOp, {'ctx': TEXT['ctx']} | {
    n: (n, ...)
    for p in ('mu', 'logvar')
    for i in (0, 2, 4)
    for w in ('weight', 'bias')
    for n in [f'posterior.{p}.{i}.{w}']
}

WHERE |= {
    f'MetaPrompt {setting}':
        (MetaPrompt, {'ctx_text': ('ctx.tokens', ...), 'ctx_visual': ('visual_ctx.tokens', ...)})
    for setting in ('base-to-new', 'domain generalisation')
}
# ---- inside (CLIP-LoRA, MMA, MMRL) ---------------------------------------------------------------

_MAPS = [f'{m}.{w}' for m in ('down', 'up') for w in ('weight', 'bias')]
INSIDE = {
    'CLIP-LoRA': (ClipLoRA, {f'{tower}.{place}.{m}': (f'{tower}_lora.{place}.{m}', ...)
                             for tower in ('text', 'vision') for place in 'qkvo' for m in 'AB'}),
    'MMA': (MMA, {f'{tower}.{m}': (f'{tower}_adapter.{m}', ...)
                  for tower in ('text', 'vision') for m in _MAPS} |
                 {n: (n, ...) for n in ('shared.weight', 'shared.bias')}),
    'MMRL': (MMRL, {n: (n, ...) for n in ('rep_tokens', 'r2v.weight', 'r2v.bias', 'r2t.weight',
                                          'r2t.bias', 'proj_rep')}),
}
WHERE |= INSIDE

def inside_hparams(J):
    "The recorded hyper-parameters as our learners take them"
    h = dict(J['hparams'])
    if J['method'] == 'CLIP-LoRA':
        h['templates'], h['dropout'] = h.pop('template'), 0.   # training was recorded without
        h.pop('b_start', None)
        listed = [h.pop(k) for k in ('layers', 'blocks', 'indices') if k in h]
        if listed: h['position'] = listed[0]
        named = isinstance(h['position'], str) and re.findall(r'\d+', h['position'])
        if named and h['position'] != 'top3': h['position'] = [int(i) for i in named]
    if J['method'] == 'MMA': h['templates'] = h.pop('prompt') + ' {}.'
    if J['method'] == 'MMRL': h['templates'] = (h.pop('dataset'), J['templates'])[1]
    return h

def inside_start(g, learner, where):
    "Both towers on this path; ids of the sentences; CLIP-LoRA with the recorded masks"
    learner.vision.plain, learner.vision.checkpoint = learner.text.plain, learner.text.checkpoint
    if not isinstance(learner, ClipLoRA): return {}
    assert torch.equal(learner.sentences.ids, g.tensors['tokens.fixed_text_ids'].long())
    hparams = learner.hparams | dict(dropout=g.json['hparams']['dropout'])
    other = ClipLoRA(g.backbone, g.json['classnames'], **hparams)
    other.text, other.vision = learner.text, learner.vision
    params = g.start(other, where)
    for tower, lora in (('text', other.text_lora), ('vision', other.vision_lora)):
        if lora is None: continue
        shape = g.json['mask_shapes'][tower]
        bits = np.unpackbits(g.tensors[f'batch.keep_{tower}'].numpy())[:np.prod(shape)]
        masks = torch.from_numpy(bits).reshape(shape)          # [J*places, L, N, D]
        def kept(place, j, draw, x, masks=masks, places=lora.params):
            mask = masks[j*len(places)+places.index(place)]
            return mask[:x.shape[1]].transpose(0, 1)
        lora.kept = kept
    images, labels = g.batch(0)
    errors = g.error('dropout.logits_0', other.train()(images))
    loss = other.loss(images, labels)
    errors |= g.error('dropout.loss_0', loss)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
    for name, (ours, at) in where.items():
        errors |= g.error(f'dropout.grad.{name}', grads[ours][at])
    return errors

@torch.no_grad()
def inside_end(g, learner):
    "The parts of what MMRL's trained heads say"
    if not isinstance(learner, MMRL): return {}
    images, t = g.tensors['eval.images'].to(g.dtype), learner.text_features()
    f, h = learner.heads(images)
    errors = g.error('eval_logits_main', learner.logits(f, t))
    errors |= g.error('eval_logits_rep', learner.logits(h, t))
    frozen = learner.frozen_text(learner.texts)
    return errors | g.error('frozen_text', frozen)

# ---- end of inside -------------------------------------------------------------------------------
# clipprompt.anchored
WHERE |= {
    'KgCoOp': (KgCoOp, {'ctx': TEXT['ctx']}), 'ProGrad': (ProGrad, {'ctx': TEXT['ctx']}),
    'PromptSRC': (PromptSRC, WHERE['IVLP (independent prompts)'][1])
}

def anchored_hparams(J):
    "Names and sentences as our classes take them"
    hparams = {k: v for k, v in J['hparams'].items() if k != 'dataset'}
    if 'lambda' in hparams: hparams['weight'] = hparams.pop('lambda')
    words = hparams.get('ctx_init')
    if isinstance(words, bool): hparams['ctx_init'] = AUTO if words else None
    return hparams | dict(templates=J['templates'])

@torch.no_grad()
def zero_shot_errors(g, learner, images):
    "Of frozen class features, and of zero-shot's logits where they were recorded"
    zero = g.backbone.logit_scale*learner.frozen_image(images) @ learner.anchors().T
    return g.error('frozen_text', learner.anchors()) | g.error('frozen_logits_0', zero)

def gradient_errors(g, learner, step, seen):
    "Of ProGrad's two gradients and what it makes of them; `seen` collects the cosines"
    (xe, kl), = learner.gradients(learner.loss_terms(*g.batch(step, learner)))
    seen[step] = torch.nn.functional.cosine_similarity(xe.flatten(), kl.flatten(), dim=0)
    if step: return {}
    applied = aligned(xe, kl, learner.hparams['weight'])
    parts = {'grad_xe.ctx': xe, 'grad_kl.ctx': kl, 'grad.ctx': applied}
    return {k: e for name, d in parts.items() for k, e in g.error(name, d[0]).items()}

def average_errors(g, learner, where, hook):
    "Of the last prompts' logits and of the average, which the learner then holds"
    images = g.tensors['eval.images'].to(g.dtype)
    with torch.no_grad(): errors = g.error('eval_logits_last', learner(images))
    hook.finish(SimpleNamespace(learner=learner))
    params, epochs = dict(learner.named_parameters()), g.json['steps']
    for name, (ours, at) in where.items(): errors |= g.error(f'gpa.{name}', params[ours][at])
    weights = torch.tensor([hook.weight(e+1, epochs) for e in range(epochs)], dtype=torch.float64)
    return errors | g.error('gpa_weights', weights/weights.sum())

def anchored_replay(g, learner, where):
    "Errors of a replay, and of what these methods recorded beside it; a step is an epoch"
    errors, cosines, hooks, epochs = {}, {}, learner.hooks(), g.json['steps']
    run, left = SimpleNamespace(learner=learner, recipe=SimpleNamespace(epochs=epochs)), [*hooks]
    def inject(learner, step):
        if isinstance(learner, Aligned) and step is not None:
            errors.update(gradient_errors(g, learner, step, cosines))
        if step != 0:
            for hook in left: hook.after_epoch(run, epochs if step is None else step)
        if step is None and left: errors.update(average_errors(g, learner, where, left.pop()))
    replayed = g.replay(learner, where, inject)
    if cosines: errors |= g.error('cosines', torch.stack([cosines[s] for s in sorted(cosines)]))
    return replayed | errors
# end of clipprompt.anchored
# tcp
WHERE['TCP'] = TCP, {'ctx': TEXT['ctx']} | {
    f'meta_net.linear{i}.{w}': (f'meta_net.linear{i}.{w}', ...)
    for i in (1, 2)
    for w in ('weight', 'bias')
}
# distill
WHERE['PromptKD'] = PromptKD, {
    'visual_ctx': IMAGE['ctx'], 'deep_visual': IMAGE['deep'],
    'proj.0.weight': ('proj.first.weight', ...), 'proj.0.bias': ('proj.first.bias', ...),
    'proj.1.weight': ('proj.scale', ...), 'proj.1.bias': ('proj.shift', ...),
    'proj.3.weight': ('proj.last.weight', ...), 'proj.3.bias': ('proj.last.bias', ...)}

def recorded_teacher(g):
    "IVLP on the second random CLIP of a case"
    J, T = g.json, g.tensors
    model = open_clip.model.CLIP(**J['teacher_cfg']).to(g.dtype)
    words = torch.zeros(model.token_embedding.weight.shape, dtype=g.dtype)
    words[T['tokens.used_ids'].long()] = T['tokens.used_rows_teacher'].to(g.dtype)
    weights = {k.removeprefix('clip_teacher.'): v.to(g.dtype)
               for k, v in T.items() if k.startswith('clip_teacher.')}
    model.load_state_dict(weights | {'token_embedding.weight': words})
    clip, h = Backbone(model, 'teacher'), J['hparams']
    depths = dict(depth_text=min(h['teacher_depth'], clip.text_layers),
                  depth_vision=min(h['teacher_depth'], clip.vision_layers))
    teacher = IVLP(clip, J['classnames'], n_ctx=h['teacher_n_ctx'],
                   n_visual=h['teacher_n_visual'], ctx_init=h['ctx_init'], **depths).to(g.dtype)
    where = WHERE['IVLP (independent prompts)'][1]
    params, found = dict(teacher.named_parameters()), 0
    for name, tensor in T.items():
        if not name.startswith('init.teacher.'): continue
        ours, at = where[name.removeprefix('init.teacher.')]
        params[ours].data[at] = tensor.to(g.dtype)
        found += tensor.numel()
    assert found == sum(p.numel() for p in params.values())
    return teacher

# dept
WHERE['DePT (on CoOp)'] = DePT, {'ctx': TEXT['ctx']} | {
    f'film_{theirs}.{w}': (f'film_{ours}.{w}', ...)
    for theirs, ours in (('img', 'image'), ('text', 'text'))
    for w in ('scale', 'bias')
} | {n: (n, ...) for n in ('linear.weight', 'linear.bias')}

def dept_hparams(J):
    "The share by our name; the factor between the rates is in `lr_per_step_new`"
    hparams = {k: v for k, v in J['hparams'].items() if k != 'lr_exp'}
    return hparams | dict(share=hparams.pop('weight'))
# end of dept

# coprompt
WHERE['CoPrompt'] = CoPrompt, WHERE['MaPLe'][1] | {
    n: (n, ...)
    for tower in ('image', 'text')
    for m in ('down', 'up')
    for n in [f'adapter_{tower}.{m}.weight']
}

def coprompt_hparams(J):
    "The start is that of the recorded sentences: their words, or noise where they are X X"
    name = J['classnames'][0].replace('_', ' ')
    words = J['prompts'][0].removesuffix(f' {name}.')
    hparams = {k: v for k, v in J['hparams'].items() if k != 'dataset'}
    return dict(ctx_init=None if set(words) <= {'X', ' '} else words) | hparams
# end of coprompt

MODES = ('restore', 'clean')   # of MetaPrompt, recorded beside the reference's own

class Literal(MetaPrompt):
    "The reference leaves underscores in the frozen sentences"
    def __init__(self, backbone, classnames, **hparams):
        super().__init__(backbone, classnames, **hparams)
        self.given = list(classnames)

    def classifier(self):
        t = self.frozen_text([t.replace('{}', c) for t in self.templates for c in self.given])
        total = t.view(len(self.templates), len(self.given), -1).sum(0)
        return torch.nn.functional.normalize(total, dim=-1)


def method_of(case): return json.loads((FOLDER/f'{case}.json').read_text())['method']

def learner_of(g):
    """The learner of a case, and where its recorded parameters lie; recorded ones without layers
    (depth 1) are left out"""
    cls, where = WHERE[g.json['method']]
    init = {k.removeprefix('init.') for k in g.tensors
            if k.startswith('init.') and not k.startswith('init.teacher.')}
    hparams = dict(g.json['hparams'])
    if cls is MuDPT:
        hparams['fusion'] = FUSIONS[g.json['method']]
        ours = dict(t2v_shallow='shallow', t2v_deep='t2v', v2t_deep='v2t')
        apart = [(k, *k.partition('.')) for k in init]
        where = where | {k: (f'{ours.get(map_, map_)}.{leaf}', ...)
                         for k, map_, _, leaf in apart if leaf}
    if issubclass(cls, ProVP):
        hparams['templates'], weight = provp_template(hparams.pop('dataset')), hparams.pop('lambda')
        if cls is ProVPRef: hparams['weight'] = weight
    if cls is MetaPrompt:
        cls, hparams = Literal, {k: v for k, v in hparams.items() if k != 'dataset'}
        hparams['split'] = 'class' if 'base-to-new' in g.json['method'] else 'domain'
    if g.json['method'] in INSIDE: hparams = inside_hparams(g.json)
    if cls is PromptKD:
        taken = 'n_visual', 'depth_vision', 'kd_weight'
        hparams = {k: hparams[k] for k in taken} | dict(tau=hparams['T'])
    if cls is TCP:   # what the optimiser and the sentences took from the reference's settings
        hparams = {k: v for k, v in hparams.items() if k not in ('eps', 'dataset')}
        hparams |= dict(templates=g.json['templates'], ctx_init=None)
    if cls is CoPrompt: hparams = coprompt_hparams(g.json)
    if issubclass(cls, Variational): hparams['samples'] = hparams.pop('L')
    if issubclass(cls, Anchored): hparams = anchored_hparams(g.json)
    if cls is DePT: hparams = dept_hparams(g.json)
    # a case without words starts from random vectors
    if 'ctx_init' in signature(cls).parameters: hparams.setdefault('ctx_init', None)
    assert init <= set(where), f'recorded parameters that are not tested: {init-set(where)}'
    learner = cls(g.backbone, g.json['classnames'], **hparams)
    if cls is PromptKD: learner.to(g.dtype).taught_by(recorded_teacher(g))
    assert sum(p.numel() for p in learner.parameters()) == g.json['n_trainable']
    return learner, {k: v for k, v in where.items() if k in init}

def all_within(g, errors, dtype):
    tolerance = g.json['tolerances'][str(dtype).removeprefix('torch.')]
    kinds = {
        'grad': 'grad', 'grad_sample': 'grad', 'param_after': 'param',
        'param_after_sample': 'param', 'param_trace': 'param', 'loss_0': 'loss',
        'loss_trace': 'loss', 'grad_xe': 'grad', 'grad_kl': 'grad', 'gpa': 'param'
    }
    for k, e in errors.items():
        kind = k.split('.')[0]
        if kind in ('restore', 'clean', 'dropout'): kind = k.split('.')[1]
        limit = tolerance[kinds.get(kind, 'logits')]
        assert e <= limit, f'{k}: error {e:.1e} > {limit:.1e}'


def injected(g):
    """Puts what the reference drew at random in a step (None: in evaluation, where each image may
    have noise of its own) into a learner"""
    def inject(learner, step):
        # [L, E or 1, d]
        if isinstance(learner, Variational):
            if step is None: learner.eps = g.tensors['eval.eps'][:, :, 0].transpose(0, 1)
            else: learner.eps = g.tensors['batch.eps'][step]
        if isinstance(learner, Agreeing) and step is not None:
            learner.picked = int(g.tensors['batch.picks'][step])
        if isinstance(learner, MMA): learner.boost = 1/learner.hparams['scale']
        if 'class_groups' in g.json and step is not None:
            learner.groups = [torch.tensor(group) for group in g.json['class_groups'][step]]
    return inject

@torch.no_grad()
def at_the_start(g, learner, where):
    """Errors of what some methods recorded besides: logits of MetaPrompt's two maps; a posterior
    and the logits of each sample"""
    g.start(learner, where)
    injected(g)(learner, 0)
    x = g.batch(0)[0]
    if isinstance(learner, PromptKD):   # predictions are of the running averages
        return g.error('teacher_text', learner.text_features()) | g.error(
            'teacher_logits_0', learner.teacher_logits(x))
    if isinstance(learner, TCP):
        other = learner.for_classes(g.json['new_classnames'])
        return g.error('frozen_text', learner.frozen_classes()) | g.error(
            'new_frozen_text', other.frozen_classes())
    if isinstance(learner, Agreeing): return g.error('frozen_text', learner.frozen_descriptions())
    z = learner.frozen_image(x)
    if isinstance(learner, Anchored): return zero_shot_errors(g, learner, x)
    if isinstance(learner, Variational):
        mu, logvar = learner.posterior(z)
        errors = g.error('mu_0', mu) | g.error('logvar_0', logvar)
        return errors | g.error('sample_logits_0', learner.sample_logits(z))
    if not isinstance(learner, MetaPrompt): return {}
    s = g.backbone.logit_scale
    image = s*learner.prompted_image(x) @ learner.classifier().T
    text = s*z @ learner.prompted_text().T
    return g.error('logits_image_0', image) | g.error('logits_text_0', text)

def other_modes(g, learner, where):
    """Errors of the modes that are recorded beside the reference's own, under names such as
    `expect.clean.loss_trace`"""
    errors = {}
    for mode in MODES if isinstance(learner, MetaPrompt) else ():
        hparams = learner.hparams | dict(mode=mode)
        other = Literal(g.backbone, g.json['classnames'], **hparams)
        part = Golden.__new__(Golden)
        other.text = learner.text
        told = f'expect.{mode}.', 'batch.', 'eval.', 'init.'
        tensors = {k.replace(f'.{mode}.', '.'): v
                   for k, v in g.tensors.items() if k.startswith(told)}
        tensors['expect.loss_0'] = g.tensors['expect.loss_0']
        vars(part).update(vars(g) | dict(tensors=tensors))
        found = part.replay(other, where, injected(g))
        errors |= {f'{mode}.{k}': e for k, e in found.items() if k != 'loss_0'}
    return errors


@pytest.mark.parametrize(
    'dtype,path',
    [(torch.float64, 'fast'), (torch.float64, 'plain'), (torch.float32, 'checkpoint')],
    ids=['float64-fast', 'float64-plain', 'float32-checkpoint'])
@pytest.mark.parametrize('case', [c for c in CASES if method_of(c) in WHERE])
def test_golden(case, dtype, path):
    g = Golden(FOLDER/case, dtype)
    learner, where = learner_of(g)
    learner.text.plain = path == 'plain'
    learner.text.checkpoint = path == 'checkpoint'
    learner.text.chunk = 2
    # the placeholder strings, tokenised as the reference did; a student has none
    if 'tokens.prompt_ids' in g.tensors and not isinstance(learner, PromptKD):
        ours, J = learner.sentences, g.json
        if J['hparams'].get('position', 'end') != 'end':
            words = J['hparams'].get('ctx_init')
            ours = place(g.backbone, J['classnames'], ours.slots.shape[1], words=words)
        assert torch.equal(ours.ids, g.tensors['tokens.prompt_ids'].long())
    errors = at_the_start(g, learner, where) | other_modes(g, learner, where)
    if g.json['method'] in INSIDE: errors |= inside_start(g, learner, where)
    if isinstance(learner, Anchored): errors |= anchored_replay(g, learner, where)
    else: errors |= g.replay(learner, where, injected(g))
    errors |= inside_end(g, learner)
    if isinstance(learner, PromptKD):
        for name, buffer in learner.proj.named_buffers(): errors |= g.error(name, buffer)
    for name in g.json.get('zero_grad_params', ()):  # zero but for rounding: compared absolutely
        errors[f'grad.{name}'] *= g.tensors[f'expect.grad.{name}'].abs().max().item()
    all_within(g, errors, dtype)
    left = {k.removeprefix('expect.') for k in g.tensors if k.startswith('expect.')} - set(errors)
    assert not left, f'recorded values that no test looked at: {sorted(left)}'
    if 'expect.new_class_logits' not in g.tensors and not isinstance(learner, PromptKD):
        with pytest.raises(ValueError, match='cannot be used for other names'):
            learner.for_classes(['cat', 'dog'])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('case', [c for c in CASES if method_of(c) == 'zero-shot CLIP'])
def test_golden_zero_shot(case, dtype):
    g = Golden(FOLDER/case, dtype)
    # the recorded sentences are ready made, all templates of a class together
    def scores(names, texts, images):
        first = names[0].replace('_', ' ')
        templates = [t.replace(first, '{}') for t in texts[:len(texts) // len(names)]]
        return ZeroShot(g.backbone, names, templates)(images)
    J, images = g.json, g.tensors['eval.images'].to(dtype)
    errors = g.error('logits_0', scores(J['classnames'], J['fixed_texts'], g.batch(0)[0]))
    errors |= g.error('eval_logits', scores(J['classnames'], J['fixed_texts'], images))
    errors |= g.error('new_class_logits', scores(J['new_classnames'], J['new_fixed_texts'], images))
    if 'ensemble_templates' in J['hparams']:
        ensemble = ZeroShot(g.backbone, J['classnames'], J['hparams']['ensemble_templates'])
        errors |= g.error('ensemble_logits_0', ensemble(g.batch(0)[0]))
    all_within(g, errors, dtype)
    assert {f'expect.{k}' for k in errors} == {k for k in g.tensors if k.startswith('expect.')}


# ---- clipprompt.adapters: frozen features, other optimisers --------------------------------------

class TaskResLiteral(TaskRes):
    "The reference leaves underscores in the class names"
    def __init__(self, backbone, classnames, **hparams):
        super().__init__(backbone, classnames, **hparams)
        self.given = list(classnames)

    @property
    def base(self):
        texts = [t.replace('{}', c) for t in self.templates for c in self.given]
        t = self.frozen_text(texts, raw=True)
        return t.view(len(self.templates), len(self.given), -1).mean(0)


def with_its_optimiser(g, learner, where):
    "Errors of the first batch, of each step with the recorded optimiser, and of evaluation"
    params, J = g.start(learner, where), g.json
    x, y = g.batch(0)
    loss = learner.loss(x, y)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
    errors = g.error('logits_0', learner(x)) | g.error('loss_0', loss)
    for name, (ours, at) in where.items(): errors |= g.error(f'grad.{name}', grads[ours][at])
    said = J['optimizer']
    kinds = dict(SGD=torch.optim.SGD, Adam=torch.optim.Adam, AdamW=torch.optim.AdamW)
    takes = signature(kinds[said['name']]).parameters
    how = {k: v for k, v in said.items() if k in takes}
    opt = kinds[said['name']](params.values(), lr=said['base_lr'], **how)
    losses, trace = [], {name: [] for name in where}
    for step, lr in enumerate(J['lr_per_step']):
        opt.param_groups[0]['lr'] = lr
        losses.append(learner.training_step(g.batch(step), opt))
        for name, (ours, at) in where.items(): trace[name].append(params[ours][at].detach().clone())
    errors |= g.error('loss_trace', torch.stack(losses))
    for name, values in trace.items():
        errors |= g.error(f'param_after.{name}', values[-1])
        errors |= g.error(f'param_trace.{name}', torch.stack(values))
    with torch.no_grad():
        images = g.tensors['eval.images'].to(g.dtype)
        errors |= g.error('eval_logits', learner.eval()(images))
        if 'expect.new_class_logits' in g.tensors:
            other = learner.for_classes(J['new_classnames'])
            errors |= g.error('new_class_logits', other(images))
    return errors

def clip_adapter_errors(g, plain):
    J = g.json
    own = {k: J['hparams'][k] for k in ('ratio', 'reduction')}
    learner = ClipAdapter(g.backbone, J['classnames'], templates=J['templates'], **own)
    learner.text.plain = plain
    where = {n: (n, ...) for n in ('down.weight', 'up.weight')}
    errors = g.error('frozen_text', learner.text_features().to(g.dtype))
    return errors | with_its_optimiser(g, learner, where), learner

def taskres_errors(g, plain):
    J = g.json
    learner = TaskResLiteral(g.backbone, J['classnames'], scale=J['hparams']['scale'],
                             templates=J['templates'])
    learner.text.plain = plain
    errors = g.error('base_text', learner.base)
    return errors | with_its_optimiser(g, learner, {'residual': ('residual', ...)}), learner

def tip_adapter_errors(g, plain):
    J, T, h = g.json, g.tensors, g.json['hparams']
    labels = T['cache.labels'].long()
    order = labels.argsort(stable=True)   # ours keeps the keys of a class together
    counts = labels.bincount(minlength=len(J['classnames'])).tolist()
    both = dict(templates=h['templates'], counts=counts, alpha=h['alpha'], beta=h['beta'])
    free, learner = (cls(g.backbone, J['classnames'], **both).to(g.dtype)
                     for cls in (TipAdapter, TipAdapterF))
    free.text.plain = learner.text.plain = plain
    A, N = T['cache.images'].shape[:2]
    with torch.no_grad():
        views = free.frozen_image(T['cache.images'].to(g.dtype).flatten(0, 1), raw=True)
        keys = cache_keys(views.view(A, N, -1))
        free.keys.copy_(keys[order])
        images = T['eval.images'].to(g.dtype)
        z = free.frozen_image(T['val.images'].to(g.dtype))
        errors = g.error('frozen_text', free.text_features()) | g.error('cache_keys', keys)
        errors |= g.error('training_free_eval_logits', free(images))
        errors |= g.error('val_features', z) | g.error('val_logits', free(z))
        zero = super(TipAdapter, free).logits(free.frozen_image(images))
        errors |= g.error('zero_shot_eval_logits', zero)
        (beta_scale, alpha_scale), steps = h['search_scale'], h['search_step']
        found = best_mix(super(TipAdapter, free).logits(z), z @ free.keys.T, free.values,
                         T['val.labels'].long(), grid(beta_scale, steps[0]),
                         grid(alpha_scale, steps[1]))
        errors |= g.error('search', torch.tensor(found[:2], dtype=torch.float64))
        free.hparams |= dict(beta=found[0], alpha=found[1])
        errors |= g.error('searched_eval_logits', free(images))
    place = order.argsort()               # of each recorded key among ours
    errors |= with_its_optimiser(g, learner, {'keys': ('keys', place)})
    return errors, learner

def lp_plus_plus_errors(g, plain):
    J, T, h = g.json, g.tensors, g.json['hparams']
    learner = LPPlusPlus(g.backbone, J['classnames'], templates=h['templates'], steps=h['epochs'])
    learner = learner.to(g.dtype)
    learner.text.plain = plain
    x, y = g.batch(0)
    f, W = learner.frozen_image(x), learner.text_features()
    lr_w, lr_alpha = (torch.tensor(r, dtype=torch.float64) for r in step_sizes(f, W))
    errors = g.error('frozen_text', W) | g.error('lr_w', lr_w) | g.error('lr_alpha', lr_alpha)
    learner.start(f, y)
    errors |= g.error('init_alpha', learner.alpha[0])
    # the rule of the start is recorded, too
    for name in ('weight', 'alpha') if 'perturbed' not in ' '.join(J['notes']) else ():
        ours, theirs = getattr(learner, name), T[f'init.{name}'].to(g.dtype)
        torch.testing.assert_close(ours, theirs.view_as(ours), rtol=1e-5, atol=1e-6)
    g.start(learner, dict(weight=('weight', ...), bias=('bias', ...), alpha=('alpha', None)))
    loss = learner.loss(x, y)
    at = dict(weight=learner.weight, bias=learner.bias, alpha=learner.alpha)
    for name, grad in zip(at, torch.autograd.grad(loss, list(at.values()))):
        errors |= g.error(f'grad.{name}', grad[None] if name == 'alpha' else grad)
    errors |= g.error('logits_0', learner(x)) | g.error('loss_0', loss)
    errors |= g.error('loss_trace', torch.tensor(learner.descend(f, y), dtype=torch.float64))
    for name, p in at.items():
        errors |= g.error(f'param_after.{name}', p[None] if name == 'alpha' else p)
    with torch.no_grad():
        return errors | g.error('eval_logits', learner(T['eval.images'].to(g.dtype))), learner

ADAPTERS = {
    'CLIP-Adapter': clip_adapter_errors, 'TaskRes': taskres_errors, 'LP++': lp_plus_plus_errors,
    'Tip-Adapter / Tip-Adapter-F': tip_adapter_errors
}

@pytest.mark.parametrize(
    'dtype,path',
    [(torch.float64, 'fast'), (torch.float64, 'plain'), (torch.float32, 'fast')],
    ids=['float64-fast', 'float64-plain', 'float32-fast'])
@pytest.mark.parametrize('case', [c for c in CASES if method_of(c) in ADAPTERS])
def test_golden_adapters(case, dtype, path):
    g = Golden(FOLDER/case, dtype)
    errors, learner = ADAPTERS[g.json['method']](g, path == 'plain')
    assert sum(p.numel() for p in learner.parameters()) == g.json['n_trainable']
    print({k: f'{e:.0e}' for k, e in errors.items()})
    all_within(g, errors, dtype)
    left = {k.removeprefix('expect.') for k in g.tensors if k.startswith('expect.')} - set(errors)
    assert not left, f'recorded values that no test looked at: {sorted(left)}'
    if 'expect.new_class_logits' not in g.tensors:
        with pytest.raises(ValueError, match='cannot be used for other names'):
            learner.for_classes(['cat', 'dog'])


def test_there_are_goldens():
    assert CASES, f'no golden cases in {FOLDER}'
    known = set(WHERE) | {'zero-shot CLIP'}
    known |= set(ADAPTERS)
    assert {method_of(c) for c in CASES} <= known or 'CLIPPROMPT_GOLDENS' in os.environ


# ---- invariants where nobody recorded anything ---------------------------------------------------

WORDS = 'a photo of a'
NAMES = ['cat', 'old shopping cart', 'traffic light']

@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)

def images(clip): return torch.randn(2, 3, 32, 32, dtype=clip.dtype,
                                     generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('position', ['middle', 'front'])
def test_words_at_another_place_are_that_sentence(clip, position):
    "Before the first step CoOp with words reads the sentence in which the words stand there"
    learner = CoOp(clip, NAMES, ctx_init=WORDS, position=position).double()
    said = dict(middle='a photo {} of a.', front='{} a photo of a.')[position]
    with torch.no_grad():
        theirs = ZeroShot(clip, NAMES, said).text_features()
        torch.testing.assert_close(learner.text_features(), theirs, rtol=1e-6, atol=1e-7)
    learner.loss(images(clip), torch.tensor([0, 2])).backward()
    assert learner.ctx.tokens.grad.abs().amax(-1).gt(0).all()


METHODS = dict(coop=CoOp, cocoop=CoCoOp, ivlp=IVLP, maple=MaPLe, mudpt=MuDPT,
               variational=VariationalCoOp, conditional=VariationalCoCoOp)
PART = ('ivlp', 'maple', 'mudpt')   # these may start from the first of more words

@pytest.mark.parametrize('method', METHODS)
def test_a_number_of_tokens_holds(clip, method, tmp_path):
    "Alone, with noise, with words that have so many; in hparams, in the tokens and after a file"
    cls = METHODS[method]
    fits = [dict(n_ctx=1), dict(n_ctx=6), dict(n_ctx=3, ctx_init=None), dict(n_ctx=4),
            dict(n_ctx=4, ctx_init=WORDS), dict(n_ctx=3, ctx_init='an_icon of')]
    for given in fits:
        learner = cls(clip, NAMES, **given).double().eval()
        assert learner.ctx.tokens.shape[-2] == learner.sentences.slots.shape[1] == given['n_ctx']
        assert learner.hparams | given == learner.hparams
    learner.save(tmp_path/'p.safetensors')
    again = cls.load(tmp_path/'p.safetensors', clip).eval()
    assert again.hparams == learner.hparams
    with torch.no_grad():
        assert torch.equal(again(images(clip)), learner(images(clip)))
        assert torch.equal(again.for_classes(NAMES[:2])(images(clip)),
                           learner.for_classes(NAMES[:2])(images(clip)))


@pytest.mark.parametrize('method', METHODS)
def test_words_and_number_that_contradict_each_other(clip, method):
    cls, refused = METHODS[method], [dict(n_ctx=6, ctx_init=WORDS)]
    if method not in PART: refused.append(dict(n_ctx=2, ctx_init=WORDS))
    for given in refused:
        with pytest.raises(ValueError) as e: cls(clip, NAMES, **given)
        one_line(e, f'n_ctx is {given["n_ctx"]}', '4 tokens', 'choose')
    usual = 2 if method in PART else 4
    assert cls(clip, NAMES, ctx_init=WORDS).ctx.tokens.shape[-2] == usual


@pytest.mark.parametrize('method', METHODS)
def test_files_of_the_first_edition(clip, method, tmp_path):
    "They held a number and words that disagree: the words counted, in deep prompts the number"
    cls, n = METHODS[method], 6 if method in PART else 4
    from_words = {} if method in PART else dict(ctx_init=WORDS)
    learner = cls(clip, NAMES, n_ctx=n, **from_words).double().eval()
    tokens = learner.ctx.tokens.detach().clone()
    learner.hparams |= dict(n_ctx=6 if method in PART else 16, ctx_init=WORDS)
    learner.save(tmp_path/'p.safetensors')
    again = cls.load(tmp_path/'p.safetensors', clip).eval()
    assert torch.equal(again.ctx.tokens, tokens)
    assert torch.equal(again.sentences.ids, learner.sentences.ids)
    with torch.no_grad(): assert torch.equal(again(images(clip)), learner(images(clip)))
    again.for_classes(['cat']).save(tmp_path/'q.safetensors')
    assert cls.load(tmp_path/'q.safetensors', clip).hparams == again.hparams
