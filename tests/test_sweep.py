"""Sweeps: nothing lost, nothing twice, whoever is killed and whenever. Records: any row can be run
again."""
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from clipprompt import data as data_module, sweep as sweep_module
from clipprompt.backbone import assets, load_backbone
from clipprompt.data import DataNotFound
from clipprompt.sets import load_dataset
from clipprompt.files import check_writable
from clipprompt.protocols import read_records, record, rerun, write_record, write_table
from clipprompt.report import METHODS, compare, find_method
from clipprompt.sweep import Run, attempt, grid, load_run, sweep
from clipprompt.training import evaluate
from helpers import clipprompt, one_line, refused, shapes, works

SCORES = ['base', 'new', 'h', 'accuracy', 'hits_base', 'hits_new', 'hits_accuracy']


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


@pytest.fixture(scope='module')
def runs(photos):
    return grid(['zero-shot', 'coop', 'vpt'], [str(photos)], ['few-shot', 'base-to-new'],
                shots=[2],
                seeds=[1, 2],
                epochs=3)


@pytest.fixture(scope='module')
def whole(runs, tmp_path_factory):
    "An undisturbed sweep"
    return sweep(runs, tmp_path_factory.mktemp('whole'), progress=False)


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
                          (dict(budget='big'), ["unknown budget 'big'", 'book', 'paper'])])
def test_grid_names_what_is_wrong(kw, says):
    with pytest.raises(ValueError) as e: grid(**(dict(methods=['coop']) | kw))
    one_line(e, *says)


def test_a_sweep_that_cannot_work_says_so_first(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError) as e: sweep([Run('zero-shot')], tmp_path/'file', progress=False)
    one_line(e, 'cannot write', 'choose a folder')
    with pytest.raises(ValueError) as e: sweep([Run('zero-shot')], tmp_path/'out', backend='spark')
    one_line(e, "unknown backend 'spark'", 'here or ray')


def test_runs_have_the_names_that_compare_gives(photos, tmp_path, whole):
    rows = compare(['zero-shot', 'coop'], [1, 2], [2],
                   'base-to-new', [str(photos)],
                   epochs=3,
                   out=tmp_path,
                   progress=False)
    ours = {r['run']: r for r in whole.records}
    assert set(rows.run) <= set(ours)
    assert all(rows[rows.run == k].iloc[0].hits_base == ours[k]['hits_base'] for k in rows.run)


def test_paper_budgets_are_the_papers(photos):
    at = load_run(Run('coop', str(photos), 'few-shot', 2, budget='paper'))
    assert at.recipe == METHODS['coop'].cls.recipe('few-shot', 2) and at.method.hparams is None
    assert load_run(Run('coop', str(photos), 'base-to-new', 2,
                        budget='paper')).method.hparams == dict(ctx_init='a photo of a')


# ---- doing what is missing -----------------------------------------------------------------------

def test_each_run_once(runs, whole):
    assert len(whole.records) == len(runs) == 12
    assert not whole.failed
    assert len(scores(whole.records)) == 12


def test_only_what_is_missing(runs, whole, tmp_path, monkeypatch):
    for r in whole.records[:10]: write_record(tmp_path/'records', r)
    did, do = [], sweep_module._do
    monkeypatch.setattr(sweep_module, '_do', lambda run, at, out:
                        (did.append(run), do(run, at, out)))
    again = sweep(runs, tmp_path, progress=False)
    assert did == runs[10:]
    assert scores(again.records) == scores(whole.records)
    assert not list((tmp_path/'checkpoints').glob('*'))


def test_failures_are_tried_again_and_reported(runs, tmp_path, monkeypatch):
    did, do = [], sweep_module._do
    def fails(run, at, out):
        did.append(run)
        if run.method == 'vpt' or len(did) < 3: raise OSError(f'the disk of {run} is full')
        do(run, at, out)
    some = [r for r in runs if r.protocol == 'few-shot' and r.seed == 1]
    monkeypatch.setattr(sweep_module, '_do', fails)
    left = sweep(some, tmp_path, progress=False, patience=.01)
    # the first succeeds on its third try
    assert did == [some[0]]*3 + [some[1]] + [some[2]]*3 and len(left.records) == 2
    assert list(left.failed) == [some[2]]
    assert 'Traceback' in left.failed[some[2]]
    assert 'is full' in left.failed[some[2]]
    told = list((tmp_path/'failed').iterdir())
    assert len(told) == 1
    assert 'is full' in told[0].read_text()
    said = json.loads(told[0].read_text().splitlines()[0])
    assert Run(**{k: tuple(v) if k == 'targets' else v for k, v in said.items()}) == some[2]
    monkeypatch.setattr(sweep_module, '_do', do)
    assert len(sweep(some, tmp_path, progress=False).records) == 3
    assert not list((tmp_path/'failed').iterdir())


def test_a_damaged_record_is_named(runs, whole, tmp_path):
    write_record(tmp_path/'records', whole.records[0])
    path = next((tmp_path/'records').glob('*.json'))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError) as e: sweep(runs[:1], tmp_path, progress=False)
    one_line(e, path.name, 'damaged', 'move it away')


# ---- others at work, and killed ------------------------------------------------------------------

WORKERS = '''
import json, os, signal, sys, threading
from pathlib import Path
import torch
from tqdm import tqdm
from clipprompt import sweep as m
from clipprompt.learner import PromptLearner
from clipprompt.sweep import Run, sweep

out = Path(sys.argv[1])
runs = [Run(**(r | dict(targets=()))) for r in json.loads(sys.argv[2])]
torch.set_num_threads(1)          # forked processes cannot share a pool of threads
tqdm.set_lock(threading.RLock())  # nor tqdm's own lock, which a killed one would keep for ever
tqdm.monitor_interval = 0
do = m._do

def told(run, at, out):
    do(run, at, out)
    with open(out/'did.txt', 'a') as f: f.write(at.name+'\\n')

def die(): os.kill(os.getpid(), signal.SIGKILL)

def die_in_step(n):
    step, steps = PromptLearner.training_step, []
    def training_step(self, batch, optimizer):
        steps.append(1)
        if len(steps) == n: die()
        return step(self, batch, optimizer)
    PromptLearner.training_step = training_step

def die_before_record(n):
    "The run is done, its record half on disk"
    replace, seen = os.replace, []
    def os_replace(a, b):
        seen.append(b) if str(b).endswith('.json') else None
        if len(seen) == n:
            os.truncate(a, 50)
            die()
        replace(a, b)
    os.replace = os_replace

def worker(runs, arm=lambda: None):
    pid = os.fork()
    if pid: return pid
    try:
        m._do = told
        arm()
        sweep(runs, out, progress=False, patience=.05)
        os._exit(0)
    finally: os._exit(1)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if sys.argv[3] == 'share':
    both = [worker(runs), worker(runs[::-1])]
    print(*map(ended, both))
else:
    print(ended(worker(runs, lambda: die_in_step(5))),
          ended(worker(runs, lambda: die_before_record(2))),
          ended(worker(runs[::-1], lambda: die_in_step(4))))
'''
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')

def workers(out, runs, what):
    "Exit codes of processes that work at a sweep"
    args = [str(out), json.dumps([vars(r) for r in runs]), what]
    r = subprocess.run([sys.executable, '-c', WORKERS, *args], capture_output=True, text=True,
                       env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr
    return [int(code) for code in r.stdout.split()]


@pytest.mark.stress
@forks
def test_two_workers_share_a_folder(runs, whole, tmp_path):
    assert workers(tmp_path, runs, 'share') == [0, 0]
    # each once
    assert sorted((tmp_path/'did.txt').read_text().split()) == sorted(scores(whole.records))
    assert scores(read_records(tmp_path/'records')) == scores(whole.records)


@pytest.mark.stress
@forks
def test_kill_9_at_any_moment(runs, whole, tmp_path):
    "The killed ones block nobody, and what they left half done ends in the same bits"
    assert workers(tmp_path, runs, 'die') == [-signal.SIGKILL]*3
    found = scores(read_records(tmp_path/'records'))
    assert 0 < len(found) < len(runs)
    assert all(scores(whole.records)[k] == v for k, v in found.items())
    done = sweep(runs, tmp_path, progress=False, patience=.1)
    assert scores(done.records) == scores(whole.records) == scores(read_records(tmp_path/'records'))


def test_a_lock_is_respected_and_dies_with_its_owner(runs, tmp_path):
    name = load_run(runs[0]).name
    (tmp_path/'locks').mkdir()
    lock = str(tmp_path/'locks'/name)
    code = ('from filelock import FileLock; import time; '
            f"l=FileLock({lock!r}+'.lock'); l.acquire(); "
            "print('held', flush=True); time.sleep(600)")
    held = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == 'held\n' and attempt(runs[0], tmp_path) == ('busy', '')
    held.kill(); held.wait()
    assert attempt(runs[0], tmp_path)[0] == 'done'


# ---- Ray -----------------------------------------------------------------------------------------

DRIVER = '''
import json, os, signal, sys
import ray
from clipprompt import sweep as m
from clipprompt.sweep import Run, sweep
for trial in range(3):   # on a busy machine its first start can time out
    try: ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception: ray.shutdown()
    else: break
out, dies = sys.argv[1], sys.argv[3] == 'dies'
runs = [Run(**(r | dict(targets=()))) for r in json.loads(sys.argv[2])]
tell, told = m._tell, []

def dies_once(run, *args): # on a worker: killed in the fifth step of its run, the first time
    from clipprompt.learner import PromptLearner
    from clipprompt.sweep import attempt
    step, steps = PromptLearner.training_step, []
    def training_step(self, batch, optimizer):
        steps.append(1)
        if len(steps) == 5:
            try: os.close(os.open(f'{out}/died', os.O_CREAT | os.O_EXCL))
            except FileExistsError: pass
            else: os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, optimizer)
    PromptLearner.training_step = training_step
    try: return attempt(run, *args)
    finally: PromptLearner.training_step = step

def waits(*args): # here: after the seventh run, to be killed with all the cluster
    tell(*args)
    told.append(1)
    if len(told) == 7:
        print('waiting', flush=True)
        signal.pause()

if dies: m.attempt, m._tell = dies_once, waits
left = sweep(runs, out, backend='ray', progress=False, patience=.2)
print('finished', len(left.records), len(left.failed), flush=True)
'''

def driver(out, runs, how):
    args = str(out), json.dumps([vars(r) for r in runs]), how
    env = os.environ | dict(OMP_NUM_THREADS='1', RAY_USAGE_STATS_ENABLED='0')
    with open(out/'stderr.txt', 'a') as log:
        return subprocess.Popen([sys.executable, '-c', DRIVER, *args], stdout=subprocess.PIPE,
                                stderr=log, text=True, start_new_session=True, env=env)

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
@pytest.mark.skipif(not Path('/proc').is_dir(), reason="looks for the cluster's processes in /proc")
def test_ray_survives_a_dead_worker_and_a_dead_driver(runs, whole, tmp_path):
    pytest.importorskip('ray', reason="needs clipprompt[ray]")
    count = lambda: len(list((tmp_path/'records').glob('*.json')))
    p = driver(tmp_path, runs, 'dies')
    try: said = p.stdout.readline()
    finally:
        cluster = children(p.pid)
        os.killpg(p.pid, signal.SIGKILL); p.wait()   # the driver dies,
        for pid in cluster:                        # and its cluster with it, by ids: no others' Ray
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
    assert said == 'waiting\n', (tmp_path/'stderr.txt').read_text()
    assert (tmp_path/'died').exists()   # a worker, in the middle of its run
    assert 7 <= count() < len(runs)
    left = driver(tmp_path, runs, 'lives')
    try: said = left.communicate(timeout=240)[0]
    finally: os.killpg(left.pid, signal.SIGKILL) if left.poll() is None else None
    assert f'finished {len(runs)} 0' in said
    assert scores(read_records(tmp_path/'records')) == scores(whole.records)
    assert count() == len(runs)


def test_without_ray_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError) as e:
        sweep([Run('zero-shot')], tmp_path, backend='ray', progress=False)
    one_line(e, 'Ray is not installed', 'pip install')


# ---- records -------------------------------------------------------------------------------------

def test_records_come_back(whole, tmp_path):
    write_table(tmp_path/'results.csv', whole.records)
    for r, back in zip(whole.records, read_records(tmp_path/'results.csv')):
        for k, v in r.items():
            if isinstance(v, float): assert back[k] == pytest.approx(v, abs=1e-4, nan_ok=True), k
            elif v is not None: assert back[k] == v, k
    table = pd.read_csv(tmp_path/'results.csv')
    assert table.base.notna().sum() == 6 and table.accuracy.notna().sum() == 6


def test_any_row_can_be_run_again(whole, tmp_path):
    write_table(tmp_path/'results.csv', whole.records)
    for r in read_records(tmp_path/'results.csv')[::5]:
        again = rerun(r, METHODS[r['method']].cls, device='cpu')
        assert again['run'] == r['run']
        assert scores([again])[r['run']] == pytest.approx(scores([r])[r['run']], abs=1e-4)


@pytest.mark.stress
def test_stored_rows_can_be_run_again():
    "The rows that the book prints, too"
    r = next(r for r in read_records(assets()/'results.csv')
             if r['method'] == 'zero-shot-best' and r['protocol'] == 'domain')
    again = rerun(r, METHODS['zero-shot-best'].cls, device='cpu')
    assert again['run'] == r['run'] and again['hits_accuracy'] == r['hits_accuracy']


@pytest.mark.stress
def test_transfer_to_several_sets(tmp_path):
    clip, data = load_backbone(device='cpu'), load_dataset(task='icons')
    targets = [load_dataset('emoji', task=t) for t in ('icons', 'pixels')]
    rec = record(METHODS['zero-shot'], 'cross', clip, data, 1, 1, targets=targets)
    alone = [record(METHODS['zero-shot'], 'cross', clip, data, 1, 1, targets=[t]) for t in targets]
    assert rec['by_target'] == {f'emoji/{t.task}': a['accuracy'] for t, a in zip(targets, alone)}
    assert rec['accuracy'] == pytest.approx(sum(rec['by_target'].values())/2)
    assert rec['hits_emoji/pixels'] == alone[1]['hits_accuracy']
    assert len({r['run'] for r in (rec, *alone)}) == 3
    write_record(tmp_path, rec)
    assert rerun(*read_records(tmp_path), METHODS['zero-shot'].cls,
                 device='cpu')['by_target'] == rec['by_target']


@pytest.fixture
def rec(whole): return dict(next(r for r in whole.records if r['method'] == 'zero-shot'))

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
        rerun(rec, METHODS['zero-shot'].cls, device='cpu')
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
    r = record(METHODS['zero-shot'], 'few-shot', load_backbone(device='cpu'), load_dataset(here), 2)
    shutil.move(here, tmp_path/'b'/'photos')
    for root in (tmp_path/'b', tmp_path/'b'/'photos'):
        assert rerun(r, METHODS['zero-shot'].cls, root,
                     device='cpu')['hits_accuracy'] == r['hits_accuracy']


def test_text_stays_text(rec, tmp_path):
    odd = rec | dict(task='2024', fingerprint='12e4567890123456', split='null')
    write_table(tmp_path/'r.csv', [odd, rec | dict(run='0'*16)])
    back = read_records(tmp_path/'r.csv')[0]
    assert (back['task'], back['fingerprint'], back['split'], back['shots'],
            back['run']) == ('2024', '12e4567890123456', 'null', 2, rec['run'])


def test_names_in_a_table_are_apart(photos, tmp_path):
    other = shutil.copytree(photos, tmp_path/'b'/'photos')
    tasks = [str(photos), str(other)]

    def recorded():
        return record(METHODS['zero-shot'], 'cross', load_backbone(device='cpu'),
                      load_dataset(task='icons'), 1,
                      targets=[load_dataset(photos), load_dataset(other)])

    for call in (lambda: compare(['zero-shot'], shots=[1], tasks=tasks, progress=False),
                 lambda: sweep(grid(['zero-shot'], tasks, shots=[1]), tmp_path/'out',
                               progress=False),
                 recorded):
        with pytest.raises(ValueError) as e: call()
        one_line(e, "'photos'", 'rename')


def test_targets_are_for_cross(photos, tmp_path):
    def recorded():
        return record(METHODS['zero-shot'], 'few-shot', load_backbone(device='cpu'),
                      load_dataset(photos), 1, targets=[load_dataset(photos)])

    def compared():
        return compare(['zero-shot'], shots=[1], protocol_name='few-shot', tasks=[str(photos)],
                       targets=['emoji'])

    for call in (recorded, compared):
        with pytest.raises(ValueError) as e: call()
        one_line(e, 'few-shot', 'no targets', 'cross')
    other = shapes(tmp_path/'other')
    both = sweep(grid(['zero-shot'], [str(photos)], ['few-shot', 'cross'], [1], [1],
                      targets=[str(other)]), tmp_path/'out', progress=False)
    assert len(both.records) == 2
    assert not both.failed
    assert sorted(r['protocol'] for r in both.records) == ['cross', 'few-shot']


def test_a_targets_own_sentence(photos):
    "Zero-shot on a target reads the target's template, not the source's"
    clip, source = load_backbone(device='cpu'), load_dataset(photos)
    target = replace(load_dataset(photos), name='target', template='a drawing of a {}.')
    rec = record(METHODS['zero-shot'], 'cross', clip, source, 1, targets=[target])
    theirs = evaluate(METHODS['zero-shot'].cls(clip, target.classnames, 'a drawing of a {}.'),
                      target)
    ours = evaluate(METHODS['zero-shot'].cls(clip, target.classnames), target)
    assert rec['accuracy'] == theirs.accuracy and not torch.equal(ours.logits, theirs.logits)


def test_paths_in_full_and_names_as_they_are(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    run, = grid(['zero-shot'], ['photos'], ['cross'],
                seeds=[1],
                root='~/data',
                targets=['emoji', 'photos'])
    assert (run.task, run.root) == (str(photos), os.path.expanduser('~/data'))
    assert run.targets == ('emoji', str(photos))
    assert grid(['zero-shot'], ['pacs/sketch'], seeds=[1])[0].task == 'pacs/sketch'


def test_a_full_disk_does_not_stop_the_rest(runs, tmp_path, monkeypatch):
    # no report can be written
    (tmp_path/'failed').touch()
    left = sweep([Run('zero-shot', runs[0].task, shots=99), runs[0]], tmp_path, progress=False)
    assert len(left.records) == 1 and len(left.failed) == 1


def test_check_writable_by_many_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_writable(tmp_path/'r'), range(200)))


def test_ray_is_not_asked_for_what_it_has_not(monkeypatch, tmp_path):
    fake = types.SimpleNamespace(is_initialized=lambda: True,
                                 nodes=lambda: [dict(Alive=True, Resources=dict(CPU=2.))],
                                 remote=None)
    monkeypatch.setitem(sys.modules, 'ray', fake)
    with pytest.raises(ValueError) as e:
        sweep([Run('zero-shot')], tmp_path, 'ray', gpus=.25, progress=False)
    one_line(e, 'gpus=0.25', '--gpus')
    fake.nodes = lambda: [dict(Alive=True, Resources=dict(CPU=2., GPU=1.))]
    with pytest.raises(ValueError) as e: sweep([Run('zero-shot')], tmp_path, 'ray', progress=False)
    one_line(e, 'has GPUs', '--gpus')


@pytest.mark.parametrize('error', [
    ConnectionError('no GCS at this address\nwithin 60 s'),
    ValueError('malformed'),
    RuntimeError('version mismatch')
])
def test_a_cluster_that_does_not_answer(error, monkeypatch, tmp_path):
    def init(**_): raise error

    monkeypatch.setitem(sys.modules, 'ray',
                        types.SimpleNamespace(is_initialized=lambda: False, init=init))
    def join(address):
        with pytest.raises(ValueError) as e:
            sweep([Run('zero-shot')], tmp_path, 'ray', address=address, progress=False)
        return e
    with socket.create_server(('127.0.0.1', 0)) as somebody:
        address = f'127.0.0.1:{somebody.getsockname()[1]}'
        for a in (address, f'ray://{address}', 'auto', None):
            one_line(join(a), f"'{a or 'local'}'",
                     type(error).__name__,
                     str(error).split()[0], '--ray local')
    # nobody: Ray is not even asked
    one_line(join(address), f"'{address}'", 'ConnectionRefusedError', '--ray local')


def test_order_is_that_of_the_list(runs, tmp_path, monkeypatch):
    "not that in which workers finish"
    some, here = [r for r in runs if r.method == 'zero-shot'], sweep_module._here
    monkeypatch.setattr(sweep_module, '_here',
                        lambda todo, *args, **kwargs: here(todo[::-1], *args, **kwargs))
    records = sweep(some, tmp_path, progress=False).records
    assert [(r['protocol'], r['seed']) for r in records] == [(r.protocol, r.seed) for r in some]


# ---- the command line ----------------------------------------------------------------------------

def test_sweep_from_a_shell(photos, tmp_path):
    args = [
        'sweep', '--task', photos, '--methods', 'zero-shot,coop', '--protocol',
        'few-shot,base-to-new', '--shots', '2', '--seeds', '1', '--epochs', '2', '--out', tmp_path
    ]
    assert '4 runs, 0 done, 4 missing' in works(*args, '--plan').out
    said = works(*args)
    assert 'coop' in said.out and len(list((tmp_path/'records').glob('*.json'))) == 4
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
    (OSError('gone'), 3), (DataNotFound('no file'), 3), (RuntimeError('out of memory'), 3),
    (ValueError('wrong'), 1), (FloatingPointError('loss is nan'), 1)])
def test_what_another_try_may_change_is_tried_again(error, tries, tmp_path, monkeypatch):
    seen = []
    def fail(*args): seen.append(args); raise error
    monkeypatch.setattr(sweep_module, 'load_run', fail)
    state, said = attempt(Run('coop'), tmp_path, patience=0)
    assert state == 'failed' and str(error) in said and len(seen) == tries


def test_a_picture_that_cannot_be_read_may_be_there_again(photos, tmp_path, monkeypatch):
    """A file server that is away for a moment: PIL's error reaches us as a DataError with an
    OSError behind it"""
    away, real = [1], data_module.open_image
    def flaky(path):
        if away: away.pop(); raise OSError('Stale file handle')
        return real(path)
    run = grid(['zero-shot'], [str(photos)], ['few-shot'], [2], [1])[0]
    load_run(run)
    monkeypatch.setattr(data_module, 'open_image', flaky)
    state, said = attempt(run, tmp_path, patience=0)
    assert state == 'done' and not away, said


@pytest.mark.parametrize('method,protocol,dataset,hparams',
                         [('maple', 'cross', 'imagenet', dict(depth=3)),
                          ('maple', 'base-to-new', 'dtd', None),
                          ('metaprompt', 'domain', 'pacs', dict(n_ctx=4, n_visual=4)),
                          ('metaprompt', 'base-to-new', 'dtd', None),
                          ('coop', 'few-shot', 'dtd', None),
                          ('coop', 'cross', 'imagenet', dict(ctx_init='a photo of a')),
                          ('variational-coop', 'base-to-new', 'oxford_pets', dict(samples=40)),
                          ('variational-cocoop', 'few-shot', 'ucf101', dict(samples=5))])
def test_the_papers_arguments(method, protocol, dataset, hparams):
    "A recipe alone is not the published setting"
    m = find_method(method, 'paper', protocol, 16, dataset)
    assert m.hparams == hparams
    name = {'cross': 'cross-dataset', 'domain': 'domain-generalisation'}.get(protocol, protocol)
    assert m.planned(protocol, 16, dataset) == m.cls.recipe(name, 16, dataset)


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
    assert rerun(by['coop', 'domain'], METHODS['coop'].cls)['accuracy'] == again['accuracy']
    alone, apart = (works('train', 't.csv', '--task', 'b', *more, '--shots', '2', '--epochs',
                          '1').out for more in ((), ('--sources', 'rest')))
    assert '4 classes, 8 training and 4 test pictures' in alone
    assert '4 classes, 8 training and 12 test pictures' in apart
    refused('train', 't.csv', '--task', 'b', '--sources', 'c', says=["'c'", 'a, b'])
    refused('train', 't.csv', '--sources', 'rest', says=['task', 'a, b'])
    refused('train', 't.csv', '--budget', 'big', says=["unknown budget 'big'"])
    refused('compare', '--protocol', 'domain', '--task', 't.csv',
            says=["not 't.csv'", 'photos.csv/sketch'])
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
