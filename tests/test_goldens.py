"""Numbers recorded from the authors' code on small random CLIPs (tests/goldens) must come out again.

Set CLIPPROMPT_GOLDENS to a folder to run other cases of the same format: cases are found by listing the folder and
dispatched on `method` and `hparams`, never on file names. Error: max|a-b| / max|b| per tensor.
"""
import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipprompt.backbone import Backbone
from clipprompt.coop import CoOp
from clipprompt.prompts import place
from clipprompt.zeroshot import ZeroShot

FOLDER = Path(os.environ.get('CLIPPROMPT_GOLDENS') or Path(__file__).parent/'goldens')
CASES = sorted(p.stem for p in FOLDER.glob('*.json'))


def coop(backbone, J, classnames):
    h = J['hparams']
    return CoOp(backbone, classnames, n_ctx=h['n_ctx'], position=h.get('position', 'end'), csc=h.get('csc', False), ctx_init=h.get('ctx_init'))

def zero_shot(backbone, J, classnames, texts=None):
    # the recorded sentences are template + name, template-major within a class; the json holds them ready made
    texts = texts or J['fixed_texts']
    name = classnames[0].replace('_', ' ')
    return ZeroShot(backbone, classnames, [t.replace(name, '{}') for t in texts[:len(texts)//len(classnames)]])

# method in the json -> (how to build it, golden parameter name -> (our parameter, how it lies in it))
METHODS = {'CoOp': (coop, {'ctx': ('ctx.tokens', 0)}), 'zero-shot CLIP': (zero_shot, {})}


def backbone(J, T, dtype):
    model = open_clip.model.CLIP(**J['model_cfg']).to(dtype)
    state = {k.removeprefix('clip.'): v.to(dtype) for k, v in T.items() if k.startswith('clip.')}
    rows = torch.zeros(J['model_cfg']['text_cfg'].get('vocab_size', 49408), J['model_cfg']['text_cfg']['width'], dtype=dtype)
    rows[T['tokens.used_ids'].long()] = T['tokens.used_rows'].to(dtype)
    model.load_state_dict(state | {'token_embedding.weight': rows})
    return Backbone(model, J['case'])

class Golden:
    "One case in one precision, with what was compared so far"
    def __init__(self, case, dtype):
        self.J, self.T = json.loads((FOLDER/f'{case}.json').read_text()), load_file(FOLDER/f'{case}.safetensors')
        if self.J['method'] not in METHODS: pytest.skip(f"{self.J['method']}: this method has no chapter yet")
        self.dtype, self.clip, self.seen = dtype, backbone(self.J, self.T, dtype), set()
        self.build, self.names = METHODS[self.J['method']]
        self.tolerances = self.J['tolerances'][str(dtype).removeprefix('torch.')]

    def learner(self):
        learner = self.build(self.clip, self.J, self.J['classnames']).to(self.dtype)
        self.params = {g: dict(learner.named_parameters())[ours] for g, (ours, _) in self.names.items()}
        for g in self.names: self.part(g).data.copy_(self.T[f'init.{g}'].to(self.dtype))
        assert {k.removeprefix('init.') for k in self.T if k.startswith('init.')} == set(self.names), 'a recorded parameter is not tested'
        assert sum(p.numel() for p in learner.parameters()) == self.J.get('n_trainable', 0)
        return learner

    def part(self, g, of=None):
        at = self.names[g][1]
        return (self.params[g] if of is None else of)[at]

    def batch(self, s): return self.T['batch.images'][s].to(self.dtype), self.T['batch.labels'][s].long()
    def eval_images(self): return self.T['eval.images'].to(self.dtype)

    def check(self, key, ours, kind):
        "Compare with `expect.<key>`, or with its recorded sample of a large tensor"
        self.seen.add(key)
        if key not in self.T:
            group, _, param = key.removeprefix('expect.').partition('.')
            key = f'expect.{group}_sample.{param}'
            self.seen.add(key)
            ours = ours.flatten()[::next(v for k, v in self.J['sampled'].items() if param in k)['stride']]
        theirs = self.T[key].double()
        assert ours.shape == theirs.shape, f'{key}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}'
        error = ((ours.detach().double()-theirs).abs().max()/theirs.abs().max().clamp_min(1e-30)).item()
        assert error <= self.tolerances[kind], f'{key}: error {error:.1e} > {self.tolerances[kind]:.1e}'

    def done(self):
        left = {k for k in self.T if k.startswith('expect.')} - self.seen
        assert not left, f'recorded values that no test looked at: {sorted(left)}'


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('case', CASES)
def test_golden(case, dtype):
    g = Golden(case, dtype)
    learner = g.learner()
    ids = g.T.get('tokens.prompt_ids')
    if ids is not None:  # the placeholder strings, tokenised as the reference did
        s = place(g.clip, g.J['classnames'], g.J['hparams']['n_ctx'], words=g.J['hparams'].get('ctx_init'))
        assert torch.equal(s.ids, ids.long())
    if 'batch.images' in g.T and 'expect.logits_0' in g.T:
        x, y = g.batch(0)
        g.check('expect.logits_0', learner(x), 'logits')
        if 'expect.loss_0' in g.T:
            loss = learner.loss(x, y)
            g.check('expect.loss_0', loss.reshape(g.T['expect.loss_0'].shape), 'loss')
            grads = dict(zip([n for n, _ in learner.named_parameters()], torch.autograd.grad(loss, list(learner.parameters()))))
            for p, (ours, _) in g.names.items(): g.check(f'expect.grad.{p}', g.part(p, grads[ours]), 'grad')
    if g.J['method'] == 'zero-shot CLIP' and 'expect.ensemble_logits_0' in g.T:
        templates = g.J['hparams']['ensemble_templates']
        g.check('expect.ensemble_logits_0', ZeroShot(g.clip, g.J['classnames'], templates)(g.batch(0)[0]), 'logits')
    if g.J['steps']:
        o = g.J['optimizer']
        opt = torch.optim.SGD(learner.parameters(), o['base_lr'], momentum=o['momentum'], weight_decay=o['weight_decay'], dampening=o['dampening'], nesterov=o['nesterov'])
        trace, params = [], {p: [] for p in g.names}
        for s, lr in enumerate(g.J['lr_per_step']):
            for group in opt.param_groups: group['lr'] = lr
            trace.append(learner.training_step(g.batch(s), opt))
            for p in g.names: params[p].append(g.part(p).detach().clone())
        g.check('expect.loss_trace', torch.tensor(trace, dtype=torch.float64), 'loss')
        for p in g.names:
            g.check(f'expect.param_after.{p}', params[p][-1], 'param')
            if f'expect.param_trace.{p}' in g.T: g.check(f'expect.param_trace.{p}', torch.stack(params[p]), 'param')
    learner.eval()
    with torch.no_grad():
        g.check('expect.eval_logits', learner(g.eval_images()), 'logits')
        if 'expect.new_class_logits' in g.T:
            new = g.J['new_classnames']
            other = g.build(g.clip, g.J, new, g.J['new_fixed_texts']) if g.J['method'] == 'zero-shot CLIP' else learner.for_classes(new)
            g.check('expect.new_class_logits', other(g.eval_images()), 'logits')
        elif getattr(learner, 'csc', False) or learner.hparams.get('csc'):
            with pytest.raises(ValueError, match='cannot be used for other names'): learner.for_classes(['cat', 'dog'])
    g.done()


@pytest.mark.parametrize('case', [c for c in CASES if json.loads((FOLDER/f'{c}.json').read_text())['method'] == 'CoOp'])
def test_golden_plain_path(case):
    "The 77-token definition gives the recorded numbers too"
    g = Golden(case, torch.float64)
    learner = g.learner()
    text = learner.text(learner.sentences, learner.ctx, plain=True)
    logits = learner.logits(learner.image_features(g.batch(0)[0]), torch.nn.functional.normalize(text, dim=-1))
    g.check('expect.logits_0', logits, 'logits')


def test_there_are_goldens():
    assert CASES, f'no golden cases in {FOLDER}'
