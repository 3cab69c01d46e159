"""Sweeps: nothing lost, nothing twice, whoever is killed and whenever. Records: any row can be run
again."""
import gc
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from clipprompt import pictures as pictures_module, runs as runs_module, sweep as sweep_module
from clipprompt.backbone import load_backbone
from clipprompt.coop import CoOp
from clipprompt.evaluation import evaluate
from clipprompt.evidence import stored_file
from clipprompt.files import check_writable
from clipprompt.methods import find_method, rerun
from clipprompt.pictures import DataNotFound
from clipprompt.protocols import Method, summary
from clipprompt.records import read_records, record, write_record, write_table
from clipprompt.report import compare
from clipprompt.runs import Run, Store, grid, load_run, planned
from clipprompt.sets import find_data, load_dataset
from clipprompt.sweep import attempt, sweep
from clipprompt.zeroshot import ZeroShot
from helpers import clipprompt, one_line, refused, shapes, tiny_clip, works
from strangers import Mine, Waits

SCORES = ['base', 'new', 'h', 'accuracy', 'hits_base', 'hits_new', 'hits_accuracy']


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def store(clip): return Store(backbone=clip)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


@pytest.fixture(scope='module')
def runs(photos):
    return grid(['zero-shot', 'coop', Mine], [str(photos)], ['few-shot', 'base-to-new'], [2],
                [1, 2], epochs=2)


@pytest.fixture(scope='module')
def whole(runs, clip, tmp_path_factory):
    "An undisturbed sweep"
    return sweep(runs, tmp_path_factory.mktemp('whole'), backbone=clip, progress=False)


@pytest.fixture(scope='module')
def rows(photos, tmp_path_factory):
    "Of a backbone that can be loaded again by its name"
    some = grid(['zero-shot', 'linear-probe'], [str(photos)], ['few-shot'], [2], [1])
    return sweep(some, tmp_path_factory.mktemp('rows'), progress=False).records


def scores(records):
    return {
        r['run']: {k: r[k]
                   for k in SCORES
                   if r.get(k) is not None and r[k] == r[k]}
        for r in records
    }


# ---- plans ---------------------------------------------------------------------------------------

def test_grid():
    g = grid(['zero-shot', 'coop'], ['icons', 'edges'], ['few-shot'], [1, 2, 4], [1, 2, 3])
    assert len(g) == len(set(g)) == 2*2*3*3 and g[0] == Run('zero-shot', 'icons', 'few-shot', 1, 1)
    assert len(grid(['coop', 'coop'], seeds=[1, 1])) == 1


@pytest.mark.parametrize('kw,says',
                         [(dict(methods=['copo']), ["unknown method 'copo'", 'did you mean coop']),
                          (dict(methods=[]), ['methods', 'at least one']),
                          (dict(methods='coop'), ['methods', 'list']),
                          (dict(protocols=['few']), ["unknown protocol 'few'", 'few-shot']),
                          (dict(seeds=[]), ['seeds', 'at least one']),
                          (dict(budget='big'), ["unknown budget 'big'", 'book', 'paper']),
                          (dict(methods=[7]), ['PromptLearner']),
                          (dict(hparams=dict(n_ctxs=4)), ["'n_ctxs'", 'did you mean n_ctx']),
                          (dict(select='best'), ["unknown select 'best'", 'best_on_val'])])
def test_grid_names_what_is_wrong(kw, says):
    with pytest.raises(ValueError) as e: grid(**(dict(methods=['coop']) | kw))
    one_line(e, *says)


def test_a_sweep_that_cannot_work_says_so_first(clip, tmp_path):
    (tmp_path/'file').touch()
    for out, how, says in ((tmp_path/'file', {}, ['cannot write', 'choose a folder']),
                           (tmp_path, dict(backend='spark'), ["unknown backend 'spark'", 'ray']),
                           (None, dict(backend='ray'), ['a folder', 'out=']),
                           (tmp_path, dict(backend='ray', backbone=clip), ['name the backbone'])):
        with pytest.raises((OSError, ValueError)) as e:
            sweep([Run('zero-shot')], out, progress=False, **how)
        one_line(e, *says)


def test_paper_budgets_are_the_papers(photos, store):
    at = load_run(Run('coop', str(photos), 'few-shot', 2, budget='paper'), store)
    assert at.recipe == CoOp.recipe('few-shot', 2) and at.method.hparams is None
    at = load_run(Run('coop', str(photos), 'base-to-new', 2, budget='paper'), store)
    assert at.method.hparams == CoOp.published('base-to-new')


def test_a_run_takes_a_name_a_class_or_a_method():
    run = Run(Mine, hparams=dict(strength=2., lr=.1), epochs=3)
    assert str(run) == 'mine (strength=2.0 lr=0.1) base-to-new devices, 16 shots, seed 1'
    m = planned(run)
    assert m.hparams == dict(strength=2.) and (m.recipe.lr, m.recipe.epochs) == (.1, 3)
    own = Run(Method(Mine, dict(strength=3.), label='m'))
    assert planned(own).hparams == dict(strength=3.) and own.name == 'm'
    assert len({run, own, Run(Mine), Run('mine'), Run(Mine, hparams=[('strength', 2.)])}) == 5
    assert pickle.loads(pickle.dumps(own)) == own
    assert Run(Mine, hparams=[('lr', 1)]) == Run(Mine, hparams=dict(lr=1))


def test_nothing_is_kept_alive(photos, monkeypatch, tmp_path):
    "Neither by a run that is done nor by one that failed"
    alive = []
    def load(*args, **kwargs):
        clip = tiny_clip()
        alive.append(weakref.ref(clip))
        return clip
    monkeypatch.setattr(runs_module, 'load_backbone', load)
    class Fails(Mine):
        method = 'fails'
        def training_step(self, batch, optimizer): raise KeyError('x')
    some = grid([Mine, Fails], [str(photos)], ['few-shot'], [2], [1])
    left = sweep(some, progress=False)
    gc.collect()
    assert len(left.records) == len(left.failed) == len(left.errors) == 1
    assert len(alive) == 1 and alive[0]() is None


# ---- doing what is missing -----------------------------------------------------------------------

def test_each_run_once(runs, whole):
    assert len(whole.records) == len(runs) == 12
    assert not whole.failed
    assert len(scores(whole.records)) == 12


def test_only_what_is_missing(runs, whole, clip, tmp_path, monkeypatch):
    for r in whole.records[:10]: write_record(tmp_path/'records', r)
    did, do = [], sweep_module._do
    monkeypatch.setattr(sweep_module, '_do', lambda run, *rest: (did.append(run), do(run, *rest)))
    again = sweep(runs, tmp_path, backbone=clip, progress=False)
    assert did == runs[10:]
    assert scores(again.records) == scores(whole.records)
    assert not list((tmp_path/'checkpoints').glob('*'))


def test_failures_are_tried_again_and_reported(runs, clip, tmp_path, monkeypatch):
    did, do = [], sweep_module._do
    def fails(run, *rest):
        did.append(run)
        if run.method == 'coop' or len(did) < 3: raise OSError(f'the disk of {run} is full')
        do(run, *rest)
    some = [r for r in runs if r.protocol == 'few-shot' and r.seed == 1]
    how = dict(backbone=clip, progress=False, patience=0)
    monkeypatch.setattr(sweep_module, '_do', fails)
    left = sweep(some, tmp_path, **how)
    # the first succeeds on its third try
    assert did == [some[0]]*3 + [some[1]]*3 + [some[2]] and len(left.records) == 2
    assert list(left.failed) == list(left.errors) == [some[1]]
    assert 'Traceback' in left.failed[some[1]]
    assert 'is full' in left.failed[some[1]]
    told = list((tmp_path/'failed').iterdir())
    assert len(told) == 1
    assert 'is full' in told[0].read_text()
    said = json.loads(told[0].read_text().splitlines()[0])
    assert Run(**said) == some[1]
    monkeypatch.setattr(sweep_module, '_do', do)
    assert len(sweep(some, tmp_path, **how).records) == 3
    assert not list((tmp_path/'failed').iterdir())


def test_a_failure_names_a_strangers_class(clip, photos, tmp_path):
    run = Run(Method(Mine, dict(strength=2.), label='m'), str(photos), 'few-shot', 99)
    left = sweep([run], tmp_path, backbone=clip, progress=False)
    told, = (tmp_path/'failed').iterdir()
    said = json.loads(told.read_text().splitlines()[0])['method']
    assert (said['cls'], said['hparams'], said['label']) == ('mine', dict(strength=2.), 'm')
    assert '99 shots' in left.failed[run]


def test_a_damaged_record_is_named(runs, whole, clip, tmp_path):
    write_record(tmp_path/'records', whole.records[0])
    path = next((tmp_path/'records').glob('*.json'))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError) as e:
        sweep(runs[:1], tmp_path, backbone=clip, progress=False)
    one_line(e, path.name, 'damaged', 'move it away')


# ---- others at work, and killed ------------------------------------------------------------------

WORKER = '''
import pickle, sys
from pathlib import Path
from clipprompt import sweep as m
from helpers import tiny_clip
out, runs = Path(sys.argv[1]), pickle.loads(sys.stdin.buffer.read())
do = m._do
def told(run, at, out, *rest):
    do(run, at, out, *rest)
    with open(out/'did.txt', 'a') as f: f.write(at.name+'\\n')
m._do = told
m.sweep(runs, out, backbone=tiny_clip(), progress=False, patience=.05)
'''
TESTS = Path(__file__).parent


def started(code, out, runs, **env):
    "A process that sweeps"
    path = os.pathsep.join([str(TESTS), os.environ.get('PYTHONPATH', '')])
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=path) | env
    p = subprocess.Popen([sys.executable, '-c', code, str(out)], stdin=subprocess.PIPE, env=env,
                         start_new_session=True)
    p.stdin.write(pickle.dumps(runs))
    p.stdin.close()
    return p


def killed(p):
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()


def until(what, seconds=120):
    end = time.time()+seconds
    while time.time() < end:
        if got := what(): return got
        time.sleep(.02)
    raise TimeoutError


@pytest.mark.stress
def test_two_workers_share_a_folder(runs, whole, tmp_path):
    both = [started(WORKER, tmp_path, runs), started(WORKER, tmp_path, runs[::-1])]
    assert all(p.wait(240) == 0 for p in both)
    # each once
    assert sorted((tmp_path/'did.txt').read_text().split()) == sorted(scores(whole.records))
    assert scores(read_records(tmp_path/'records')) == scores(whole.records)


@pytest.fixture
def steps(tmp_path, monkeypatch):
    "The folder by which `Waits` is told when to go on"
    folder = tmp_path/'steps'
    folder.mkdir()
    monkeypatch.setenv('STEPS', str(folder))
    return folder


@pytest.fixture
def undisturbed(photos, clip, tmp_path, monkeypatch):
    "Two runs that wait, done by a process that nobody stops"
    two = grid([Waits], [str(photos)], ['few-shot'], [2], [1, 2], epochs=3)
    with monkeypatch.context() as m:
        (tmp_path/'free').mkdir()
        (tmp_path/'free'/'go').touch()
        m.setenv('STEPS', str(tmp_path/'free'))
        return two, scores(sweep(two, tmp_path/'alone', backbone=clip, progress=False).records)


@pytest.mark.stress
def test_kill_9_between_any_two_steps(steps, undisturbed, clip, tmp_path):
    "The killed one blocks nobody, and what it left half done ends in the same bits"
    two, want = undisturbed
    out = tmp_path/'out'
    for n in (0, 3, 6):  # in the first epoch, in the third, in the next run's second one
        p = started(WORKER, out, two)
        until((steps/f'at-{n}').exists)
        killed(p)
        for step in (n+1, n+2): (steps/f'go-{step}').touch()  # the next one waits at n+3
    assert len(list((out/'records').glob('*.json'))) == 1
    assert len(list((out/'checkpoints').glob('*.safetensors'))) == 1
    (steps/'go').touch()
    done = sweep(two, out, backbone=clip, progress=False)
    assert scores(done.records) == want
    assert len(list(steps.glob('at-*'))) == 2*3 + 3  # only the three that were killed, again


def test_a_lock_is_respected_and_dies_with_its_owner(runs, store, tmp_path):
    name = load_run(runs[0], store).name
    (tmp_path/'locks').mkdir()
    code = ('import sys; from filelock import FileLock; '
            f"l = FileLock({str(tmp_path/'locks'/name)!r} + '.lock'); l.acquire(); "
            "print('held', flush=True); sys.stdin.read()")
    held = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == 'held\n'
    assert attempt(runs[0], tmp_path, store=store) == ('busy', '')
    held.kill()
    held.wait()
    assert attempt(runs[0], tmp_path, store=store)[0] == 'done'


# ---- Ray -----------------------------------------------------------------------------------------

DRIVER = '''
import pickle, sys, ray
from clipprompt.sweep import sweep
runs = pickle.loads(sys.stdin.buffer.read())
for trial in range(8):   # a start takes 15 s of an idle core, and gives up after 30 on a busy one
    try: ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    except Exception: ray.shutdown()
    else: break
left = sweep(runs, sys.argv[1], backend='ray', progress=False, patience=.1)
sys.exit(len(left.failed))
'''

def children(pid): # all processes below one, by their ids
    below = {}
    for p in Path('/proc').glob('[0-9]*'):
        try: parent = int((p/'stat').read_text().rpartition(')')[2].split()[1])
        except OSError: continue
        below.setdefault(parent, []).append(int(p.name))
    found = below.get(pid, [])
    for p in found: found += below.get(p, [])   # the list grows while it is read
    return found


@pytest.mark.stress
@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks for worker processes in /proc')
def test_ray_survives_a_dead_worker_and_a_dead_driver(steps, photos, tmp_path):
    pytest.importorskip('ray', reason="needs clipprompt[ray]")
    two, out = grid([Waits], [str(photos)], ['few-shot'], [2], [1, 2], epochs=2), tmp_path/'out'
    p = started(DRIVER, out, two, RAY_USAGE_STATS_ENABLED='0')
    try:
        until((steps/'at-0').exists, 480)
        worker = int(until((steps/'at-0').read_text))
        assert worker in children(p.pid)
        os.kill(worker, signal.SIGKILL)          # a worker dies in the middle of its run
        for step in (1, 2): (steps/f'go-{step}').touch()
        until((steps/'at-3').exists)             # another did it, and is in the next one
        assert len(list((out/'records').glob('*.json'))) == 1
    finally:
        cluster = children(p.pid)
        killed(p)                                # the driver dies,
        for pid in cluster:                      # and its cluster with it, by ids: no others' Ray
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
    (steps/'go').touch()
    left = sweep(two, out, progress=False)       # what is missing is done without Ray
    assert not left.failed
    alone = sweep(two, tmp_path/'alone', progress=False)
    assert scores(read_records(out/'records')) == scores(alone.records)


def test_without_ray_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError) as e:
        sweep([Run('zero-shot')], tmp_path, backend='ray', progress=False)
    one_line(e, 'Ray is not installed', 'pip install')


def test_ray_is_not_asked_for_what_it_has_not():
    with pytest.raises(ValueError) as e: sweep_module._room([dict(CPU=2.)], 1, .25)
    one_line(e, 'gpus=0.25', '--gpus')
    with pytest.raises(ValueError) as e: sweep_module._room([dict(CPU=2., GPU=1.)], 1, 0)
    one_line(e, 'has GPUs', '--gpus')
    sweep_module._room([dict(CPU=2., GPU=1.)], 1, .5)


@pytest.mark.parametrize('error', [
    ConnectionError('no GCS at this address\nwithin 60 s'),
    ValueError('malformed'),
    RuntimeError('version mismatch')
])
def test_a_cluster_that_does_not_answer(error):
    def init(**_): raise error
    ray = types.SimpleNamespace(is_initialized=lambda: False, init=init)
    def join(address):
        with pytest.raises(ValueError) as e: sweep_module._join(ray, address)
        return e
    with socket.create_server(('127.0.0.1', 0)) as somebody:
        address = f'127.0.0.1:{somebody.getsockname()[1]}'
        for a in (address, f'ray://{address}', 'auto', None):
            one_line(join(a), f"'{a or 'local'}'", type(error).__name__, str(error).split()[0],
                     '--ray local')
    # nobody: Ray is not even asked
    one_line(join(address), f"'{address}'", 'ConnectionRefusedError', '--ray local')


# ---- records -------------------------------------------------------------------------------------

def test_records_come_back(whole, tmp_path):
    write_table(tmp_path/'results.csv', whole.records)
    for r, back in zip(whole.records, read_records(tmp_path/'results.csv')):
        for k, v in r.items():
            if isinstance(v, float): assert back[k] == pytest.approx(v, abs=1e-4, nan_ok=True), k
            elif v is not None: assert back[k] == v, k
    table = pd.read_csv(tmp_path/'results.csv')
    assert table.base.notna().sum() == 6 and table.accuracy.notna().sum() == 6


def test_any_row_can_be_run_again(rows, tmp_path):
    write_table(tmp_path/'results.csv', rows)
    for r in read_records(tmp_path/'results.csv'):
        again = rerun(r, device='cpu')
        assert again['run'] == r['run']
        assert scores([again])[r['run']] == pytest.approx(scores([r])[r['run']], abs=1e-4)


def test_a_packed_table_is_the_same_table(whole, tmp_path):
    plain, packed = tmp_path/'t.csv', tmp_path/'t.csv.gz'
    for path in (plain, packed): write_table(path, whole.records)
    assert packed.stat().st_size < plain.stat().st_size/2
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    # NaN is not equal to itself
    assert repr(read_records(packed)) == repr(read_records(plain))
    first = packed.read_bytes()
    assert first[4:8] == bytes(4)                  # no time: equal tables are equal files
    write_table(packed, whole.records)
    assert packed.read_bytes() == first


@pytest.mark.stress
@pytest.mark.parametrize('method,points', [('zero-shot', 0), ('vpt', 1.5)])
def test_stored_rows_can_be_run_again(method, points):
    """The rows that the book prints, too: the same pictures are right. What is trained may differ
    a little where a processor rounds otherwise"""
    r = next(r for r in read_records(stored_file())
             if (r['part'], r['method'], r['task'], r['seed']) == ('main', method, 'arrows', 1))
    again = rerun(r, device='cpu')
    assert again['run'] == r['run']
    for score in ('base', 'new'):
        assert again[score] == pytest.approx(r[score], abs=max(points, 1e-3))
        if not points: assert again[f'hits_{score}'] == r[f'hits_{score}']


@pytest.fixture(scope='module')
def domains(photos):
    "A table of the same pictures in two domains"
    files = sorted(photos.glob('*/*.png'))
    lines = [f'{p},{p.parent.name},{"ab"[i % 2]}' for i, p in enumerate(files)]
    (photos.parent/'t.csv').write_text('\n'.join(['path,label,domain', *lines]))
    return photos.parent/'t.csv'


def test_transfer_to_several_sets(photos, clip, domains, tmp_path):
    data, zero = load_dataset(photos), find_method('zero-shot')
    targets = [find_data(f'{domains}/{d}') for d in 'ab']
    rec = record(zero, 'cross', clip, data, 1, 1, targets=targets)
    alone = [record(zero, 'cross', clip, data, 1, 1, targets=[t]) for t in targets]
    assert rec['by_target'] == {f't/{d}': a['accuracy'] for d, a in zip('ab', alone)}
    assert rec['accuracy'] == pytest.approx(sum(rec['by_target'].values())/2)
    assert rec['hits_t/b'] == alone[1]['hits_accuracy']
    assert len({r['run'] for r in (rec, *alone)}) == 3
    write_record(tmp_path, rec)
    assert read_records(tmp_path)[0]['by_target'] == rec['by_target']


@pytest.fixture
def rec(rows): return dict(rows[0])

def moved(rec, photos): rec['data'] = rec['data'] | dict(name=str(photos)+'-elsewhere')
def changed(rec, photos): rec['marks'] = ['0'*16]
def weights(rec, photos): rec['fingerprint'] = '0'*16
def nowhere(rec, photos): rec['data'] = {}
def model(rec, photos): rec['backbone'] = 'picto-clop'


@pytest.mark.parametrize('spoil,says',
                         [(moved, ['photos-elsewhere', 'no folder']),
                          (changed, ["data set 'photos'", "not the record's", '--root']),
                          (weights, ["backbone 'picto-clip'", '--pretrained']),
                          (nowhere, ['made in memory', 'record']),
                          (model, ["unknown backbone 'picto-clop'", 'picto-clip'])])
def test_what_changed_is_named(rec, photos, spoil, says):
    spoil(rec, photos)
    with pytest.raises((ValueError, OSError)) as e:
        rerun(rec, device='cpu')
    one_line(e, *says)


@pytest.mark.parametrize(
    'name,text,says',
    [('r.json', '{"method": "coop"', ['r.json', 'damaged', 'move it away']),
     ('r.json', '[1, 2]', ['r.json', 'no record']),
     ('r.json', '{"method": "coop"}', ['r.json', 'no record', 'missing']),
     ('r.json', '\x00\x01', ['r.json', 'damaged']), ('r.csv', '', ['r.csv', 'cannot be read']),
     ('r.csv', 'a,b\n1,2\n', ['r.csv', 'not written by this version']),
     ('r.csv', 'run,method\nx,coop\nx,coop\n', ['r.csv', 'not written by this version']),
     ('r.csv', 'run,method\nx,coop\n', ['r.csv', 'no record', 'missing'])])
def test_records_that_are_none(tmp_path, name, text, says):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError) as e: read_records(tmp_path/name)
    one_line(e, *says)
    with pytest.raises(FileNotFoundError) as e: read_records(tmp_path/'nothing')
    one_line(e, 'no records', 'results.csv')


def test_a_folder_that_moved(photos, tmp_path):
    here = shutil.copytree(photos, tmp_path/'a'/'photos')
    r = record(find_method('zero-shot'), 'few-shot', load_backbone(device='cpu'),
               load_dataset(here), 2)
    shutil.move(here, tmp_path/'b'/'photos')
    for root in (tmp_path/'b', tmp_path/'b'/'photos'):
        assert rerun(r, root=root, device='cpu')['hits_accuracy'] == r['hits_accuracy']


def test_text_stays_text(rec, tmp_path):
    odd = rec | dict(task='2024', fingerprint='12e4567890123456', split='null')
    write_table(tmp_path/'r.csv', [odd, rec | dict(run='0'*16)])
    back = read_records(tmp_path/'r.csv')[0]
    assert (back['task'], back['fingerprint'], back['split'], back['shots'],
            back['run']) == ('2024', '12e4567890123456', 'null', 2, rec['run'])


def test_names_in_a_table_are_apart(photos, clip, tmp_path):
    other = shutil.copytree(photos, tmp_path/'b'/'photos')
    tasks, how = [str(photos), str(other)], dict(backbone=clip, progress=False)

    def recorded():
        return record(find_method('zero-shot'), 'cross', clip, load_dataset(photos), 1,
                      targets=[load_dataset(photos), load_dataset(other)])

    for call in (lambda: compare(['zero-shot'], shots=[1], tasks=tasks, **how),
                 lambda: sweep(grid(['zero-shot'], tasks, shots=[1]), tmp_path/'out', **how),
                 recorded):
        with pytest.raises(ValueError) as e: call()
        one_line(e, "'photos'", 'rename')


def test_targets_are_for_cross(photos, clip, domains):
    def recorded():
        return record(find_method('zero-shot'), 'few-shot', clip, load_dataset(photos), 1,
                      targets=[load_dataset(photos)])

    def compared():
        return compare(['zero-shot'], shots=[1], protocol_name='few-shot', tasks=[str(photos)],
                       targets=['emoji'])

    for call in (recorded, compared):
        with pytest.raises(ValueError) as e: call()
        one_line(e, 'few-shot', 'targets', 'cross')
    both = sweep(grid(['zero-shot'], [str(photos)], ['few-shot', 'cross'], [1], [1],
                      targets=[f'{domains}/a']), backbone=clip, progress=False)
    assert len(both.records) == 2
    assert not both.failed
    assert sorted(r['protocol'] for r in both.records) == ['cross', 'few-shot']


def test_a_targets_own_sentence(photos, clip, domains):
    "Zero-shot on a target reads the target's template, not the source's"
    target = replace(find_data(f'{domains}/a'), template='a drawing of a {}.')
    source = load_dataset(photos)
    rec = record(find_method('zero-shot'), 'cross', clip, source, 1, targets=[target])
    theirs = evaluate(ZeroShot(clip, target.classnames, 'a drawing of a {}.'), target)
    assert rec['accuracy'] == theirs.accuracy
    given = find_method('zero-shot', hparams=dict(templates='an icon of a {}.'))
    rec = record(given, 'cross', clip, source, 1, targets=[target])
    assert rec['accuracy'] == evaluate(given.build(clip, target.classnames), target).accuracy


def test_paths_in_full_and_names_as_they_are(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    run, = grid(['zero-shot'], ['photos'], ['cross'],
                seeds=[1],
                root='~/data',
                targets=['emoji', 'photos'])
    assert (run.task, run.root) == (str(photos), os.path.expanduser('~/data'))
    assert run.targets == ('emoji', str(photos))
    assert grid(['zero-shot'], ['pacs/sketch'], seeds=[1])[0].task == 'pacs/sketch'


def test_a_full_disk_does_not_stop_the_rest(runs, clip, tmp_path):
    # no report can be written
    (tmp_path/'failed').touch()
    left = sweep([Run('zero-shot', runs[0].task, shots=99), runs[0]], tmp_path, backbone=clip,
                 progress=False)
    assert len(left.records) == 1 and len(left.failed) == 1


def test_check_writable_by_many_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_writable(tmp_path/'r'), range(200)))


def test_order_is_that_of_the_list(runs, clip, monkeypatch):
    "not that in which workers finish"
    some, here = [r for r in runs if r.method == 'zero-shot'], sweep_module._here
    monkeypatch.setattr(sweep_module, '_here',
                        lambda todo, *args, **kwargs: here(todo[::-1], *args, **kwargs))
    records = sweep(some, backbone=clip, progress=False).records
    assert [(r['protocol'], r['seed']) for r in records] == [(r.protocol, r.seed) for r in some]


# ---- the command line ----------------------------------------------------------------------------

def test_sweep_from_a_shell(photos, tmp_path):
    args = [
        'sweep', '--task', photos, '--methods', 'zero-shot,linear-probe', '--protocol',
        'few-shot,base-to-new', '--shots', '2', '--seeds', '1', '--epochs', '2', '--out', tmp_path
    ]
    assert '4 runs, 0 done, 4 missing' in works(*args, '--plan').out
    said = works(*args)
    assert 'linear-probe' in said.out and len(list((tmp_path/'records').glob('*.json'))) == 4
    assert '4 runs, 4 done, 0 missing' in works(*args, '--plan').out
    rows = pd.read_csv(tmp_path/'results.csv')
    said = works('rerun', tmp_path/'results.csv', '--run', rows.run[1][:8], '--out',
                 tmp_path/'again.csv')
    assert 'now' in said.out
    assert '(' not in said.out
    assert pd.read_csv(tmp_path/'again.csv').run[0] == rows.run[1]
    works('rerun', tmp_path/'records'/f'{rows.run[0]}.json')
    # the folder stands for its records
    assert {r['run'] for r in read_records(tmp_path)} == set(rows.run)
    works('rerun', tmp_path, '--run', rows.run[0], '--out', tmp_path/'again.csv')
    # one more row, none lost
    assert {r['run'] for r in read_records(tmp_path/'again.csv')} == {rows.run[0], rows.run[1]}
    before = (tmp_path/'results.csv').read_text()
    works('rerun', tmp_path, '--run', rows.run[0], '--out', tmp_path/'results.csv')
    values = lambda file: sorted(map(tuple, pd.read_csv(file).fillna(0).values))
    assert values(io.StringIO(before)) == values(tmp_path/'results.csv')
    (tmp_path/'mine.csv').write_text('a,b\n1,2\n')
    refused('rerun', tmp_path, '--run', rows.run[0], '--out', tmp_path/'mine.csv',
            says=['mine.csv', 'not written by', 'choose another'])


def test_compare_and_sweep_in_one_folder(photos, tmp_path):
    "Neither takes the other's rows away"
    args = [
        '--task', photos, '--protocol', 'few-shot', '--shots', '2', '--seeds', '1', '--out',
        tmp_path
    ]
    works('compare', '--methods', 'zero-shot', *args)
    works('sweep', '--methods', 'linear-probe', *args)
    works('compare', '--methods', 'zero-shot-best', *args)
    methods = pd.read_csv(tmp_path/'results.csv').method.tolist()
    assert methods == ['zero-shot', 'linear-probe', 'zero-shot-best']


def test_an_empty_folder_holds_no_records(tmp_path):
    refused('rerun', tmp_path, says=['no records', 'results.csv'])


def test_shares_of_a_cluster_without_one():
    refused('sweep', '--methods', 'zero-shot', '--targets', 'emoji',
            says=["only protocol 'cross' has targets", '--targets'])
    for given in ('--gpus', '--cpus'):
        refused('sweep', '--methods', 'zero-shot', given, '1', says=['--ray local', given])


def test_a_shell_is_told_what_failed(photos, tmp_path):
    r = clipprompt('sweep', '--task', photos, '--methods', 'zero-shot', '--shots', '2,50',
                   '--seeds', '1', '--out', tmp_path, '--retries', '0')
    assert r.code == 1 and len(r.said) == 2 and 'Traceback' not in r.err, r
    assert r.said[0].startswith('failed: zero-shot')
    assert '50 shots asked for' in r.said[0]
    assert 'failed runs: 1 of 2' in r.said[1]
    assert 'tries them again' in r.said[1]
    assert len(list((tmp_path/'records').glob('*.json'))) == 1
    assert len(list((tmp_path/'failed').iterdir())) == 1


def test_a_plan_names_the_runs_that_cannot_be(photos, tmp_path):
    "and goes on, as the sweep does"
    works('sweep', '--task', photos, '--methods', 'zero-shot', '--shots', '2', '--seeds', '1',
          '--out', tmp_path)
    r = works('sweep', '--task', photos, '--methods', 'zero-shot', '--shots', '2,50', '--seeds',
              '1', '--out', tmp_path, '--plan')
    assert '50 shots asked for' in r.err
    assert r.err.startswith('cannot run: zero-shot')
    assert '2 runs, 1 done, 1 missing' in r.out


def test_usual_shots():
    "compare and sweep mean the same where nobody says how many"
    usual = grid(['coop'], protocols=['few-shot', 'base-to-new', 'cross', 'domain'])
    assert {(r.protocol, r.shots) for r in usual} == {
        ('few-shot', 16), ('base-to-new', 16), ('cross', 16), ('domain', 4)}


@pytest.mark.parametrize('error,tries', [
    (OSError('gone'), 3), (DataNotFound('no file'), 3), (RuntimeError('CUDA out of memory'), 3),
    (MemoryError(), 3), (RuntimeError('shapes do not match'), 1), (AttributeError('x'), 1),
    (ValueError('wrong'), 1), (FloatingPointError('loss is nan'), 1)])
def test_what_another_try_may_change_is_tried_again(error, tries, tmp_path, monkeypatch):
    seen = []
    def fail(*args): seen.append(args); raise error
    monkeypatch.setattr(sweep_module, 'load_run', fail)
    state, said = attempt(Run('coop'), tmp_path, patience=0)
    assert state == 'failed' and said is error and len(seen) == tries
    assert said.__traceback__ is None and 'in fail' in str(said.__cause__)


def test_a_picture_that_cannot_be_read_may_be_there_again(photos, clip, tmp_path, monkeypatch):
    """A file server that is away for a moment: PIL's error reaches us as a DataError with an
    OSError behind it"""
    away, real = [1], pictures_module.open_image
    def flaky(path):
        if away: away.pop(); raise OSError('Stale file handle')
        return real(path)
    run = grid(['zero-shot'], [str(photos)], ['few-shot'], [2], [1])[0]
    store = Store(backbone=clip)
    load_run(run, store)
    monkeypatch.setattr(pictures_module, 'open_image', flaky)
    state, said = attempt(run, tmp_path, store=store, patience=0)
    assert state == 'done' and not away, said


def test_a_domain_of_a_table_is_a_task(photos, tmp_path, monkeypatch):
    """TABLE/DOMAIN: alone, or unseen under protocol domain; by the shell, by compare and by rerun
    the same"""
    files = sorted(photos.glob('*/*.png'))
    rows = [f'{p},{p.parent.name},{"ab"[i % 2]}' for i, p in enumerate(files)]
    (tmp_path/'t.csv').write_text('\n'.join(['path,label,domain', *rows]))
    monkeypatch.chdir(tmp_path)
    works('sweep', '--task', 't.csv/b', '--methods', 'zero-shot,coop', '--protocol',
          'few-shot,domain', '--shots', '2', '--seeds', '1', '--epochs', '1', '--out', 'out')
    by = {(r['method'], r['protocol']): r for r in read_records('out/records')}
    assert len(by) == 4 and {r['task'] for r in by.values()} == {'t/b'}
    for r in by.values():
        data = load_dataset(**r['data'])
        assert r['data']['name'] == str(tmp_path/'t.csv')
        assert {i.domain for i in data.test} == {'b'}
        assert {i.domain for i in data.train} == {'a' if r['protocol'] == 'domain' else 'b'}
    again = compare(['coop'], shots=[2], protocol_name='domain', tasks=['t.csv/b'], epochs=1,
                    progress=False).iloc[0].to_dict()
    for k in ('run', 'accuracy', 'hits_accuracy'): assert again[k] == by['coop', 'domain'][k]
    assert rerun(by['coop', 'domain'])['accuracy'] == again['accuracy']
    alone, apart = (works('train', 't.csv/b', *more, '--shots', '2', '--epochs',
                          '1').out for more in ((), ('--sources', 'rest')))
    assert '4 classes, 8 training and 4 test pictures' in alone
    assert '4 classes, 8 training and 12 test pictures' in apart
    refused('train', 't.csv/b', '--sources', 'c', says=["'c'", 'a, b'])
    refused('train', 't.csv', '--sources', 'rest', says=['task', 'a, b'])
    refused('train', 't.csv', '--budget', 'big', says=["unknown budget 'big'"])
    refused('compare', '--protocol', 'domain', '--task', 't.csv',
            says=["t.csv'", 'photos.csv/sketch'])
    refused('compare', '--task', 't.csv/c', says=["'c'", 'a, b'])
    refused('compare', '--task', 'u.csv/c', says=['u.csv/c', 'check the path'])


@pytest.mark.parametrize(
    'args,says',
    [(('sweep', '--methods', 'copo'), ["unknown method 'copo'"]),
     (('sweep', '--shots', 'two'), ['whole numbers']),
     (('sweep', '--seeds', ','), ['--seeds', 'at least one']),
     (('sweep', '--protocol', 'few'), ["unknown protocol 'few'"]),
     (('sweep', '--budget', 'big'), ["unknown budget 'big'"]),
     (('sweep', '--task', 'pixel', '--plan'), ["unknown data 'pixel'", 'pixels']),
     (('rerun', 'nothing.json'), ['nothing.json', 'no records']),
     (('compare', '--budget', 'big'), ["unknown budget 'big'"]),
     (('compare', '--task', 'caltech102'), ['caltech102', 'did you mean', 'caltech101']),
     (('compare', '--protocol', 'domain', '--task', 'caltech101'), ['domain']),
     (('compare', '--protocol', 'cross', '--task', 'icons', '--targets', 'emojy'),
      ['emojy', 'emoji'])])
def test_bad_arguments(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('CLIPPROMPT_DATA', raising=False)
    refused(*args, says=says)


def test_rerun_asks_which(whole, tmp_path):
    write_table(tmp_path/'results.csv', whole.records)
    refused('rerun', tmp_path/'results.csv', says=['12 records', '--run'])
    refused('rerun', tmp_path/'results.csv', '--run', 'zzz',
            says=['0 of them begin with zzz', '--run'])


def test_halves_are_runs_of_their_own(tmp_path):
    "Other halves are another run, say so in their row, and can be run again"
    runs = [Run('zero-shot', 'pictograms/tools', halves=h) for h in (0, 1, 2)]
    rows = sweep(runs, tmp_path, progress=False).rows
    assert rows.halves.tolist() == [0, 1, 2] and rows.run.nunique() == 3
    assert 'halves 2' in str(runs[2]) and 'halves' not in str(runs[0])
    kept = summary(rows)
    assert kept.halves.tolist() == [0, 1, 2] and kept.base.tolist() == rows.base.tolist()
    again = rerun(read_records(tmp_path)[0])
    assert again['run'] in set(rows.run)
