"""Learners and training: exact, frozen where they must be, reproducible, and unharmed by a power
cut."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clipprompt import training
from clipprompt.coop import CoOp
from clipprompt.deep import VPT
from clipprompt.files import write_safely
from clipprompt.learner import PromptLearner, Recipe
from clipprompt.pictures import test_transform
from clipprompt.sets import load_dataset
from clipprompt.evaluation import encode, evaluate
from clipprompt.hooks import Hook
from clipprompt.steps import Feed, lr_at, shuffled
from clipprompt.training import fit
from helpers import TINY, shapes, tiny_clip

RECIPE = Recipe(lr=.05, epochs=3, batch_size=4)
TENSORBOARD = importlib.util.find_spec('tensorboard') is not None


@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)


@pytest.fixture(scope='module')
def clip32(): return tiny_clip()


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return load_dataset(shapes(tmp_path_factory.mktemp('data')/'photos')).few_shot(3)


@pytest.fixture(scope='module')
def images():
    return torch.randn(6, 3, 32, 32, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))


def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()


# ---- schedule, seeds, evaluation -----------------------------------------------------------------

@pytest.mark.parametrize('epochs,warmup', [(50, 1), (5, 1), (1, 1), (10, 0), (10, 3)])
def test_schedule(epochs, warmup, few, clip32):
    """Constant warm-up, then torch's own cosine over `epochs`, as Dassl chains them; and `fit`
    uses it"""
    recipe = Recipe(lr=.002, epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-5, batch_size=100)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], .002)
    cosine, expect = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs), [1e-5]*warmup
    while len(expect) < epochs: expect.append(opt.param_groups[0]['lr']); opt.step(); cosine.step()
    assert [lr_at(recipe, e) for e in range(1, epochs+1)] == pytest.approx(expect, rel=1e-9)
    seen = []
    class Watched(CoOp):
        def training_step(self, batch, optimizer):
            seen.append(optimizer.param_groups[0]['lr'])
            return 0.
    fit(Watched(clip32, few.classnames, n_ctx=1), few, recipe, progress=False)
    assert seen == pytest.approx(expect, rel=1e-9)


def train(clip, data, seed=0, start=0, recipe=RECIPE, **kwargs):
    learner = CoOp(clip, data.classnames, n_ctx=2, seed=start)
    return fit(learner, data, recipe, seed, progress=False, **kwargs), learner.ctx.tokens.detach()


def test_seeds(few, clip32):
    "Everything random hangs on the seed, nothing on the global generator, which is left as it was"
    a, tokens = train(clip32, few)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    b, again = train(clip32, few)
    assert torch.equal(tokens, again)
    assert a.losses == b.losses
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(tokens, train(clip32, few, seed=1)[1])
    assert not torch.equal(tokens, train(clip32, few, start=1)[1])


@pytest.mark.parametrize('n,batch,sizes', [
    (12, 5, [5, 5]), (12, 12, [12]), (12, 32, [12]), (12, 4, [4, 4, 4])])
def test_batches(n, batch, sizes):
    "An incomplete last batch is dropped, except when it is the only one; each place comes once"
    batches = shuffled(n, batch, seed=0, epoch=1)
    assert [len(b) for b in batches] == sizes
    places = torch.cat(batches).tolist()
    assert len(set(places)) == len(places) and set(places) <= set(range(n))
    again, other, later = (torch.cat(shuffled(n, n, *which)).tolist()
                           for which in ((0, 1), (1, 1), (0, 2)))
    assert again != other and again != later and again == torch.cat(shuffled(n, n, 0, 1)).tolist()


def test_training_learns(few, clip32):
    """On the pictures themselves, without crops: a margin, because an untrained CLIP has little to
    tell"""
    images, labels = zip(*few.pictures('train', test_transform(clip32)))
    score = lambda epochs: (l := CoOp(clip32, few.classnames, n_ctx=2),
                            fit(l, few, Recipe(lr=.02, epochs=epochs, batch_size=4), progress=False
                                ), l.loss(torch.stack(images), torch.tensor(labels)).item())[1:]
    (_, before), (report, after) = score(1), score(15)      # one epoch is warm-up at 1e-5
    assert len(report.losses) == report.epochs == 15 and report.seconds > 0 and after < before - .01


def test_evaluate_by_hand(few, clip32):
    learner = CoOp(clip32, few.classnames, n_ctx=2)
    pictures = few.pictures('test', test_transform(clip32))
    with torch.no_grad(): logits = torch.stack([learner(x[None])[0] for x, _ in pictures])
    labels = torch.tensor([y for _, y in pictures])
    e = evaluate(learner, few, batch_size=3)
    assert torch.equal(e.labels, labels) and error(e.logits, logits) < 1e-4
    hit = (logits.argmax(-1) == labels).double()
    assert e.accuracy == pytest.approx(100*hit.mean().item())
    assert e.per_class().tolist() == [100*hit[labels == c].mean() for c in range(4)]
    kept = evaluate(learner, few, features=encode(learner, pictures))
    assert error(kept.logits, logits) < 1e-4
    without = replace(few, test=[i for i in few.test if i.label])
    assert evaluate(learner, without).per_class().isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize('workers', [0, 2])
def test_randomness_is_left_alone_while_a_batch_is_used(few, clip32, workers):
    feed = Feed(VPT(clip32, few.classnames), few, RECIPE, 0, 1, workers)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images, labels = next(iter(feed.epoch(1)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


# ---- interruptions -------------------------------------------------------------------------------

KILLED = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from clipprompt import hooks, training
from clipprompt.coop import CoOp
from clipprompt.learner import Recipe
from clipprompt.sets import load_dataset
from helpers import tiny_clip

folder, checkpoint, when, threads, tracker = sys.argv[2:]
torch.set_num_threads(int(threads))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == 'in a step':                         # the second step of epoch 3
    step, steps = CoOp.training_step, []
    def training_step(self, batch, optimizer):
        steps.append(1)
        if len(steps) == 8: die()
        return step(self, batch, optimizer)
    CoOp.training_step = training_step
elif when == 'after the rename':                # the third checkpoint has just got its name
    replace, replaced = os.replace, []
    def os_replace(a, b):
        replace(a, b)
        replaced.append(str(b).endswith('.check'))
        if replaced.count(False) == 3: die()
    os.replace = os_replace
else:                                           # half of the third checkpoint is on disk
    save, saved = hooks.save_file, []
    def save_file(state, path, meta):
        save(state, path, meta)
        saved.append(1)
        if len(saved) == 3: path.write_bytes(path.read_bytes()[:-50]); die()
    hooks.save_file = save_file
data = load_dataset(folder).few_shot(3)
recipe = Recipe(lr=.05, epochs=6, batch_size=4)
training.fit(CoOp(tiny_clip(), data.classnames, n_ctx=2), data, recipe, checkpoint=checkpoint,
             progress=False, tracker=tracker or None)
'''
LONG = replace(RECIPE, epochs=6)

class Epochs(Hook):
    "Which ones were trained"
    def __init__(self): self.epochs = []
    def before_epoch(self, run, epoch): self.epochs.append(epoch)

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('when', ['in a step', 'while writing', 'after the rename'])
def test_resume_after_kill_9(when, few, clip32, tmp_path):
    """Prompts, losses and momentum go on as if nothing had happened: bit for bit the prompts of a
    run in one piece"""
    checkpoint, folder = tmp_path/'run'/'c', Path(few.source.root)
    tracker = str(tmp_path/'events') if TENSORBOARD else ''
    args = [Path(__file__).parent, folder, checkpoint, when, str(torch.get_num_threads()), tracker]
    r = subprocess.run([sys.executable, '-c', KILLED, *args], capture_output=True, text=True)
    assert r.returncode == -signal.SIGKILL, r.stderr
    done = 3 if when == 'after the rename' else 2
    assert bool(list(checkpoint.parent.glob('.*.tmp'))) == (when == 'while writing')
    with safe_open(checkpoint, 'pt') as f:
        assert len(json.loads(f.metadata()['state'])['losses']) == done
        assert set(f.keys()) == {'param.ctx.tokens', 'optimizer.momentum_buffer/ctx.tokens'}
    whole, tokens = train(clip32, few, recipe=LONG)
    seen = Epochs()
    resumed, again = train(clip32, few, recipe=LONG, checkpoint=checkpoint,
                           tracker=tracker or None, hooks=[seen])
    assert seen.epochs == [3, 4, 5, 6][done-2:]
    assert torch.equal(tokens, again)
    assert resumed.losses == whole.losses
    # the killed writer's half file is gone
    assert [p.name for p in checkpoint.parent.iterdir()] == ['c']
    # epoch 3 was tracked before its checkpoint was lost, and is there once
    if tracker:
        points = events(tracker)['loss']
        assert [s for s, _ in points] == [1, 2, 3, 4, 5, 6]
        assert [v for _, v in points] == pytest.approx(whole.losses, rel=1e-6)
    # finished: nothing left to do
    third, same = train(clip32, few, recipe=LONG, checkpoint=checkpoint)
    assert torch.equal(tokens, same) and third.losses == whole.losses


MOMENTS = '''
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from clipprompt import hooks, training
from clipprompt.coop import CoOp
from clipprompt.deep import VPT
from clipprompt.learner import Recipe
from clipprompt.metaprompt import MetaPrompt
from clipprompt.sets import load_dataset
from clipprompt.variational import VariationalCoOp
from helpers import tiny_clip

folder, where = sys.argv[2:4]
torch.set_num_threads(1)          # forked processes cannot share a pool of threads
data, clip = load_dataset(folder).few_shot(3), tiny_clip()
HOW = {  # fixed views and a chosen epoch; fresh augmentation; episodes; noise, Adam and averages
    'coop': (CoOp, dict(views=2, select='best_on_test')),
    'vpt': (VPT, dict(optimizer='adamw', lr=.001, per='step')),
    'metaprompt': (MetaPrompt, {}),
    'variational-coop': (VariationalCoOp, dict(views=2, optimizer='adam', lr=.001, accumulate=2)),
}

def run(name, checkpoint, tracker):
    cls, own = HOW[name]
    learner = cls(clip, data.classnames, seed=1)
    recipe = Recipe(**dict(lr=.05, epochs=8, batch_size=4) | own)
    more = [hooks.Average()] if name == 'variational-coop' else []
    fit = training.fit(learner, data, recipe, 1, checkpoint, progress=False, tracker=tracker,
                       hooks=more)
    state = {n: p.detach().double().flatten().tolist() for n, p in learner.named_parameters()}
    return state, fit.losses, fit.scores

def doomed(left):
    "Die at the `left`-th of all moments: before a step, before and after a file gets its name"
    def moment():
        nonlocal left
        left -= 1
        if not left: os.kill(os.getpid(), signal.SIGKILL)
    replace, epoch = os.replace, training.Training._epoch
    def replaced(a, b):
        moment(); replace(a, b); moment()
    def steps(self, *args):
        self.hooks.insert(0, hook)
        moment()
        return epoch(self, *args)
    class Moments(hooks.Hook):
        def after_step(self, run, step): moment()
    hook = Moments()
    os.replace, training.Training._epoch = replaced, steps

for name in HOW:
    os.makedirs(place := f'{where}/{name}')
    whole, kills, tracked = run(name, None, None), 0, name == 'coop' and os.environ['TRACK']
    moments = [2, 9, 13, 6, 11, 17]
    while True:
        if not (child := os.fork()):
            if moments: doomed(moments[0])
            result = run(name, place, f'{where}/events' if tracked else None)
            with open(f'{where}/{name}.json', 'w') as f: json.dump(result, f)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status): break
        kills += 1
        moments.pop(0)
    assert os.WEXITSTATUS(status) == 0, name
    with open(f'{where}/{name}.json') as f: resumed = json.load(f)
    same = resumed == json.loads(json.dumps(whole))
    print(json.dumps(dict(name=name, kills=kills, same=same, left=sorted(os.listdir(place)))),
          flush=True)
'''
KILLABLE = ['coop', 'vpt', 'metaprompt', 'variational-coop']

@pytest.fixture(scope='module')
def killed(few, tmp_path_factory):
    "Runs of eight epochs, killed six times each, and told to go on"
    where = tmp_path_factory.mktemp('killed')
    args = [Path(__file__).parent, few.source.root, where]
    r = subprocess.run([sys.executable, '-c', MOMENTS, *args], capture_output=True, text=True,
                       env=os.environ | dict(TRACK='1' if TENSORBOARD else ''))
    assert r.returncode == 0, r.stderr
    return where, {row['name']: row for row in map(json.loads, r.stdout.splitlines())}


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('name', KILLABLE)
def test_kill_9_at_any_moment(name, killed):
    """Parameters, losses and test accuracies are those of a run in one piece, and nothing but the
    checkpoint is left"""
    row = killed[1][name]
    assert row['kills'] == 6 and row['same'] and row['left'] == ['checkpoint.safetensors'], row


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_tracked_once_after_kill_9(killed):
    "TensorBoard shows each epoch of the killed runs once, with the loss of the run in one piece"
    points = events(killed[0]/'events')
    _, losses, tested = json.loads((killed[0]/'coop.json').read_text())
    assert [s for s, _ in points['loss']] == list(range(1, 9))
    assert [v for _, v in points['loss']] == pytest.approx(losses, rel=1e-6)
    assert [s for s, _ in points['learning_rate']] == list(range(1, 9))
    assert [v for _, v in points['test_accuracy']] == pytest.approx(tested)


@contextmanager
def interrupted(monkeypatch, n):
    "Ctrl-C in the n-th training step"
    step, steps = PromptLearner.training_step, []
    def stops(self, batch, optimizer):
        steps.append(1)
        if len(steps) == n: raise KeyboardInterrupt
        return step(self, batch, optimizer)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PromptLearner, 'training_step', stops)
        yield


def test_interrupt_in_python_keeps_the_checkpoint(few, clip32, tmp_path, monkeypatch):
    with interrupted(monkeypatch, 5): train(clip32, few, checkpoint=tmp_path/'c')
    assert torch.equal(train(clip32, few, checkpoint=tmp_path/'c')[1], train(clip32, few)[1])
    assert [p.name for p in tmp_path.iterdir()] == ['c']


@pytest.mark.parametrize('how', ['existing', 'slash', 'new/slash', 'file'])
def test_checkpoint_in_a_folder(few, clip32, tmp_path, how):
    (tmp_path/'existing').mkdir()
    given, file = dict(existing=(tmp_path/'existing', 'existing/checkpoint.safetensors'),
                       slash=(f'{tmp_path}/runs/', 'runs/checkpoint.safetensors'),
                       file=(tmp_path/'runs'/'a',
                             'runs/a')).get(how, (f'{tmp_path}/a/b/', 'a/b/checkpoint.safetensors'))
    train(clip32, few, checkpoint=given)
    assert [p.relative_to(tmp_path).as_posix()
            for p in tmp_path.rglob('*')
            if p.is_file()] == [file]
    with pytest.MonkeyPatch.context() as m:
        # finished: nothing is trained again
        m.setattr(training.Training, '_epoch', never)
        train(clip32, few, checkpoint=given)

def never(*args, **kwargs): raise AssertionError('trained')


def test_stale_temporary_files(few, clip32, tmp_path):
    """A killed writer's leavings go, other people's files stay, also those whose names look much
    the same"""
    ours = ['.c.12-34.tmp', '..c.check.12-34.tmp']
    theirs = ['.cc.12-34.tmp', '.c.tmp', 'c.12-34.tmp', '.cx12-34.tmp', '.c.1-2.tmp.keep',
              '.c.a-b.tmp']
    for name in ours+theirs: (tmp_path/name).write_text('half')
    _, tokens = train(clip32, few, checkpoint=tmp_path/'c')
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['c', *theirs])
    assert torch.equal(tokens, train(clip32, few)[1])


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace

    def synced(fd):
        calls.append(('sync', os.fstat(fd).st_size))
        return fsync(fd)

    monkeypatch.setattr(os, 'fsync', synced)
    monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append('rename'), rename(a, b))[1])
    write_safely(tmp_path/'p', lambda tmp: tmp.write_text('whole'))
    assert calls == [('sync', 5), 'rename'] and (tmp_path/'p').read_text() == 'whole'


# ---- trackers ------------------------------------------------------------------------------------

def events(folder):
    "tag -> [(step, value)], as TensorBoard reads them"
    if not TENSORBOARD: pytest.skip('tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()['scalars']}


class Points(list):
    "A tracker of one's own"
    def add_scalar(self, tag, value, step): self.append((tag, step, value))


def test_tracker_of_ones_own(few, clip32):
    "Every epoch once, and the prompts are the same as without"
    seen = Points()
    report, tokens = train(clip32, few, tracker=seen, recipe=replace(RECIPE, select='best_on_test'))
    assert seen == [
        p for i in range(3)
        for p in (('loss', i + 1, report.losses[i]), ('learning_rate', i + 1, lr_at(RECIPE, i + 1)),
                  ('test_accuracy', i + 1, report.scores[i]))
    ]
    seen.clear()
    report, tokens = train(clip32, few, tracker=seen)
    assert {t for t, *_ in seen} == {'loss', 'learning_rate'}
    assert torch.equal(tokens, train(clip32, few)[1])


def test_tracker_goes_on_counting(few, clip32, tmp_path, monkeypatch):
    first, second = Points(), Points()
    with interrupted(monkeypatch, 8):
        train(clip32, few, recipe=LONG, checkpoint=tmp_path, tracker=first)
    report, _ = train(clip32, few, recipe=LONG, checkpoint=tmp_path, tracker=second)
    assert [s for t, s, _ in first if t == 'loss'] == [1, 2]
    assert [s for t, s, _ in second if t == 'loss'] == [3, 4, 5, 6]
    assert [v for t, _, v in first+second if t == 'loss'] == report.losses
    train(clip32, few, recipe=LONG, checkpoint=tmp_path, tracker=(third := Points()))
    assert third == []


def test_a_new_run_replaces_the_curve(few, clip32, tmp_path):
    pytest.importorskip('tensorboard')
    train(clip32, few, recipe=LONG, tracker=tmp_path/'t')
    report, _ = train(clip32, few, seed=1, tracker=str(tmp_path/'t'))
    points = events(tmp_path/'t')
    assert [s for s, _ in points['loss']] == [1, 2, 3]
    assert [v for _, v in points['loss']] == pytest.approx(report.losses, rel=1e-6)
    rates = [v for _, v in points['learning_rate']]
    assert rates == pytest.approx([lr_at(RECIPE, e) for e in (1, 2, 3)], rel=1e-6)


def test_tiny_is_what_the_tests_think(clip):
    assert (clip.text_layers, clip.vision_layers, clip.context_length) == (3, 3, 77)
    assert clip.text_width != clip.vision_width
    assert TINY['embed_dim'] == clip.embed_dim
