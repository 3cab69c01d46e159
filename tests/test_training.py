"""Learners and training: exact, frozen where they must be, reproducible, and unharmed by a power
cut."""
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipprompt import training
from clipprompt.coop import CoOp
from clipprompt.data import load_dataset, test_transform
from clipprompt.files import write_safely
from clipprompt.learner import PromptLearner, Recipe
from clipprompt.protocols import base_to_new, few_shot
from clipprompt.report import METHODS
from clipprompt.training import encode, evaluate, fit, lr_at
from helpers import TINY, shapes, tiny_clip

NAMES = [
    'a', 'guide dog', 'eel',
    'a small red bird with a very long tail that sits on the branch of an old tree', 'cat'
]
RECIPE = Recipe(lr=.05, epochs=3, batch_size=4)
TENSORBOARD = importlib.util.find_spec('tensorboard') is not None


@pytest.fixture(scope='module')
def clip(): return tiny_clip(dtype=torch.float64)


@pytest.fixture(scope='module')
def clip32(): return tiny_clip()


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return load_dataset(shapes(tmp_path_factory.mktemp('data')/'photos')).few_shot(3)


def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()


# ---- methods: what each must keep is in test_check.py --------------------------------------------

def learner_of(name, backbone, names=NAMES):
    "A learner whose parameters are not at their start"
    learner = METHODS[name].cls(backbone, names, **(METHODS[name].hparams or {}))
    g = torch.Generator().manual_seed(1)
    for p in learner.parameters(): p.data = torch.randn(p.shape, generator=g).to(backbone.dtype)
    return learner.eval()

# solved; words; image prompts; episodes; drawn for each image
@pytest.mark.parametrize(
    'name', ['linear-probe', 'coop', 'vpt', 'metaprompt', 'variational-cocoop'])
def test_protocol_rows(name, few, clip32):
    "The same seed, the same row; base and new are what a hand-made run gives"
    m = replace(METHODS[name], recipe=RECIPE)
    a, b = (base_to_new(m, clip32, few, 2, 1) for _ in range(2))
    drop = lambda row: {k: v for k, v in row.items() if k != 'seconds' and v == v}
    assert drop(a) == drop(b) and 0 <= a['base'] <= 100
    data = few.few_shot(2, 1)
    learner = m.train(clip32, data.base(), 1)
    assert a['base'] == evaluate(learner, data.base()).accuracy
    assert a['trainable'] == sum(p.numel() for p in learner.parameters())
    if learner.transfers:
        assert a['new'] == evaluate(learner.for_classes(data.new().classnames), data.new()).accuracy
    score = few_shot(m, clip32, few, 2, 1)['accuracy']
    assert score == evaluate(m.train(clip32, data, 1), data).accuracy


# ---- schedule, seeds, evaluation -----------------------------------------------------------------

@pytest.mark.parametrize('epochs,warmup', [(12, 1), (5, 1), (1, 1), (10, 0), (10, 3)])
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


def test_epochs_see_different_orders_and_crops(few, clip32):
    def of_epoch(epoch):
        pictures = few.pictures('train', training.train_transform(clip32))
        return torch.cat([x for x, _ in training._epoch_batches(pictures, 4, 0, epoch)])

    batches = [of_epoch(e) for e in (1, 1, 2)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize('n,batch,sizes', [
    (12, 5, [5, 5]), (12, 12, [12]), (12, 32, [12]), (12, 4, [4, 4, 4])])
def test_batches(few, clip32, n, batch, sizes):
    "An incomplete last batch is dropped, except when it is the only one"
    assert len(few.train) == n
    pictures = few.pictures('train', training.train_transform(clip32))
    assert [len(y) for _, y in training._epoch_batches(pictures, batch, 0, 1)] == sizes


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
    learner = learner_of('coop', clip32, few.classnames)
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


def test_randomness_is_left_alone_while_a_batch_is_used(few, clip32):
    "Also if training stops in between and the rest of the epoch is thrown away at some later time"
    pictures = few.pictures('train', training.train_transform(clip32))
    torch.manual_seed(5); state = torch.get_rng_state()
    batches = training._epoch_batches(pictures, 4, 0, 1)
    next(batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6); state = torch.get_rng_state()
    del batches
    assert torch.equal(torch.get_rng_state(), state)


# ---- interruptions -------------------------------------------------------------------------------

LONG = replace(RECIPE, epochs=6)

MOMENTS = '''
import json, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from safetensors import safe_open
from tqdm import tqdm
from clipprompt import training
from clipprompt.data import load_dataset
from clipprompt.learner import Recipe
from clipprompt.report import METHODS
from helpers import tiny_clip

folder, where, track, *names = sys.argv[2:]
torch.set_num_threads(1)          # forked processes cannot share a pool of threads
tqdm.set_lock(threading.RLock())  # nor tqdm's own lock, which a killed one would keep for ever
tqdm.monitor_interval = 0
data, clip = load_dataset(folder).few_shot(3), tiny_clip()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def die_in_step(cls, n):
    step, steps = cls.training_step, []
    def training_step(self, batch, optimizer):
        steps.append(1)
        if len(steps) == n: die()
        return step(self, batch, optimizer)
    training_step.__qualname__ = step.__qualname__   # the run is the same run
    cls.training_step = training_step

def die_at_checkpoint(n, renamed):
    "The n-th has just got its name, or is half on disk"
    replace, seen = os.replace, []
    def os_replace(a, b):
        if os.path.basename(b) != 'checkpoint.safetensors': return replace(a, b)
        seen.append(1)
        if renamed: replace(a, b)
        if len(seen) == n and not renamed: os.truncate(a, os.path.getsize(a) - 50)
        if len(seen) == n: die()
        if not renamed: replace(a, b)
    os.replace = os_replace

def moments(cls): # three steps make an epoch; how many epochs are safe after each
    return [(lambda: die_in_step(cls, 8), 2), (lambda: die_at_checkpoint(2, False), 3),
            (lambda: die_at_checkpoint(2, True), 5)]

def run(name, checkpoint, tracker):
    views = 2 if name in ('coop', 'variational-coop') else None
    select = 'best_on_test' if name == 'coop' else 'last'
    learner = METHODS[name].cls(clip, data.classnames, seed=1)
    recipe = Recipe(lr=.05, epochs=8, batch_size=4, views=views, select=select)
    fit = training.fit(learner, data, recipe, 1, checkpoint, progress=False, tracker=tracker)
    state = {n: p.detach().double().flatten().tolist() for n, p in learner.named_parameters()}
    return state, fit.losses, fit.tested

def child(name, place, tracker, arm):
    "How a process that does the run ends"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    try:
        if arm: arm()
        result = run(name, place, tracker)
        with open(f'{where}/{name}.json', 'w') as f: json.dump(result, f)
    finally: os._exit(0)

for name in names:
    os.makedirs(place := f'{where}/{name}')
    tracker = f'{where}/events' if track and name == 'coop' else None
    whole, left = run(name, None, None), []
    for arm, safe in moments(METHODS[name].cls):
        status = child(name, place, tracker, arm)
        assert os.WIFSIGNALED(status), f'{name} was not killed'
        with safe_open(f'{place}/checkpoint.safetensors', 'pt') as f: meta = f.metadata()
        left.append([len(os.listdir(place)), len(json.loads(meta['losses'])), safe])
    child(name, place, tracker, None)
    with open(f'{where}/{name}.json') as f: resumed = json.load(f)
    same = resumed == json.loads(json.dumps(whole))
    print(json.dumps(dict(name=name, same=same, left=left, end=os.listdir(place))), flush=True)
'''
# fixed views and a chosen epoch; fresh augmentation; episodes; noise
KILLABLE = ['coop', 'vpt', 'metaprompt', 'variational-coop']

@pytest.fixture(scope='module')
def killed(few, tmp_path_factory):
    """Runs of eight epochs, killed in a step, while a checkpoint is written, and when it has just
    got its name; and told to go on"""
    where, track = tmp_path_factory.mktemp('killed'), 'yes' if TENSORBOARD else ''
    args = [Path(__file__).parent, few.source.root, where, track, *KILLABLE]
    r = subprocess.run([sys.executable, '-c', MOMENTS, *args], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return where, {row['name']: row for row in map(json.loads, r.stdout.splitlines())}


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('name', KILLABLE)
def test_kill_9_at_any_moment(name, killed):
    """Prompts, losses and test accuracies go on as if nothing had happened, bit for bit those of a
    run in one piece; a half file does no harm and does not stay"""
    row = killed[1][name]
    assert row['same'] and row['end'] == ['checkpoint.safetensors'], row
    for files, epochs, safe in row['left']: assert epochs == safe, row
    assert [files for files, *_ in row['left']] == [1, 2, 1], row


@pytest.mark.stress
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
        m.setattr(training, '_train', never)
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
                  ('test_accuracy', i + 1, report.tested[i]))
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
