"""The command line does what its help says: tables, figures, files, round trips, and an
interruption that loses nothing finished."""
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

import clipprompt as package
from clipprompt import console, protocols
from clipprompt.backbone import load_backbone
from clipprompt.data import SUITE
from clipprompt.learner import read_prompts
from clipprompt.methods import compared as usual_methods, find_method, load as load_prompts, methods
from clipprompt.pictures import test_transform
from clipprompt.protocols import harmonic_mean, summary
from clipprompt.sets import load_dataset
from clipprompt.training import fit
from helpers import clipprompt, refused, shapes, works

METHODS = {name: find_method(name) for name in methods()}

COLUMNS = 'method protocol task shots seed base new h seconds trainable'.split()
COMMANDS = ['compare', 'sweep', 'rerun', 'train', 'evaluate', 'predict', 'live', 'bench',
            'info']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp('data')/'my photos',
                  ('disc', 'two_bars', 'Kreuz é', 'ring'))


@pytest.fixture(scope='module')
def picto(): return load_backbone(device='cpu')


def results(folder):
    rows = pd.read_csv(folder/'results.csv')
    assert [c for c in rows if c in COLUMNS] == COLUMNS
    return rows

def in_percent(scores, n):
    "Shares of n pictures, times 100"
    hits = scores*n/100
    assert (hits.round() - hits).abs().max() < .01, scores
    assert scores.between(0, 100).all() and scores.max() > 1, scores


# ---- compare -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def compared(photos, tmp_path_factory):
    "Two folders, two methods, two seeds"
    out = tmp_path_factory.mktemp('compare')/'new'/'folder'
    second = shapes(out.parent.parent/'more', ('pink', 'sea', 'sky', 'iron'))
    r = works('compare', '--task', f'{photos},{second}', '--methods', 'linear-probe,coop',
              '--seeds', '1,2', '--shots', '2', '--epochs', '2', '--out', out)
    return r, results(out), out


def test_compare_writes_one_row_per_run(compared):
    _, rows, out = compared
    assert len(rows) == 8 and not rows.duplicated(['method', 'task', 'seed']).any()
    assert set(rows.method) == {'linear-probe', 'coop'}
    assert set(rows.task) == {'my photos', 'more'}
    assert set(rows.seed) == {1, 2}
    assert (rows.protocol == 'base-to-new').all()
    assert (rows.shots == 2).all()
    assert (rows.seconds >= 0).all()
    assert Image.open(out/'compare.png').size > (200, 100)


def test_compare_scores(compared, picto):
    _, rows, _ = compared
    coop, probe = rows[rows.method == 'coop'], rows[rows.method == 'linear-probe']
    # two pictures of each of two classes
    in_percent(rows.base, 4), in_percent(coop.new, 4)
    assert np.allclose(coop.h, [harmonic_mean(b, n) for b, n in zip(coop.base, coop.new)],
                       atol=1e-3)
    # shapes are easy; a probe knows no new names
    assert probe.new.isna().all() and probe.h.isna().all() and (probe.base == 100).all()
    assert (coop.trainable == 4*picto.text_width).all()
    assert (probe.trainable == 2*(picto.embed_dim+1)).all()


def test_compare_prints_the_means(compared):
    r, rows, out = compared
    for m, means in summary(rows).groupby('method'):
        line = next(l for l in r.out.splitlines() if f' {m} ' in f' {l} ' and 'my photos' in l)
        assert f'{means[means.task == "my photos"].base.item():.1f}' in line
    assert f'{out}/results.csv' in r.out.replace('\n', '')


@pytest.mark.stress
def test_quick_runs_all_methods(photos, tmp_path, monkeypatch):
    "From another folder, no method named; .ci/run tries three on the shipped pictures"
    monkeypatch.chdir(tmp_path)
    r = works('compare', '--quick', '--task', photos)
    rows = results(tmp_path/'clipprompt-results')
    assert rows.method.tolist() == usual_methods()
    assert (rows.seed == 1).all()
    assert (rows.shots == 2).all()
    assert (rows.task == 'my photos').all()
    in_percent(rows.base, len(load_dataset(photos).base().test))
    assert (tmp_path/'clipprompt-results'/'compare.png').stat().st_size > 5000
    assert all(m in r.out for m in usual_methods())


def test_quick_fills_only_what_is_not_given(photos, tmp_path):
    works('compare', '--task', photos, '--methods', 'zero-shot,coop', '--quick', '--shots', '3',
          '--seeds', '4', '--out', tmp_path)
    rows = results(tmp_path)
    assert rows.shots.tolist() == [3, 3]
    assert rows.seed.tolist() == [4, 4]
    assert json.loads(rows.recipe[1])['epochs'] == 2


def test_weights_that_nobody_would_read_are_refused(photos, prompts_of_picto, tmp_path):
    says = ['picto-clip has weights of its own', '--pretrained', '--backbone']
    for command in (('compare', '--out', tmp_path/'out'), ('sweep', '--out', tmp_path/'out'),
                    ('train', photos, '--out', tmp_path/'p')):
        refused(*command, '--pretrained', 'openai', says=says)
    for command in (('evaluate', prompts_of_picto, photos), ('predict', prompts_of_picto, photos)):
        refused(*command, '--pretrained', 'openai',
                says=['prompts was trained on picto-clip', *says])
    assert not (tmp_path/'p').exists() and not list(tmp_path.glob('out/records/*'))


@pytest.fixture
def prompts_of_picto(photos, tmp_path):
    works('train', photos, '--shots', 2, '--epochs', 1, '--out', tmp_path/'prompts')
    return tmp_path/'prompts'


@pytest.mark.stress
def test_one_name_for_data_in_all_commands(photos, tmp_path):
    "DOMAIN, NAME/DOMAIN and TABLE/DOMAIN, where compare takes them, train and evaluate do"
    files = sorted(photos.glob('*/*.png'))
    rows = [f'{p},{p.parent.name},{"ab"[i % 2]}' for i, p in enumerate(files)]
    (tmp_path/'t.csv').write_text('\n'.join(['path,label,domain', *rows]))
    short = '--shots', 2, '--epochs', 1, '--out', tmp_path/'p'
    twice = lambda *forms: len({works('train', *f, *short).out for f in forms}) == 1
    assert twice(['--task', tmp_path/'t.csv'/'b'], [tmp_path/'t.csv'/'b'])
    assert twice(['--task', tmp_path/'t.csv'/'b', '--sources', 'rest'],
                 [tmp_path/'t.csv'/'b', '--sources', 'a'])
    assert '12 test pictures' in works('train', tmp_path/'t.csv'/'b', '--sources', 'rest',
                                       *short).out
    forms = ['edges'], ['pictograms/edges'], ['--task', 'edges']
    assert len({works('evaluate', tmp_path/'p', *f).out for f in forms}) == 1
    refused('train', tmp_path/'t.csv'/'c', says=["'c'", 'a, b'])
    refused('evaluate', tmp_path/'p', 'nofolder',
            says=["unknown data 'nofolder'", 'no such folder'])
    refused('compare', '--task', 'nofolder', says=["unknown data 'nofolder'", 'no such folder'])


def test_a_wrong_select_is_refused_where_nothing_is_trained(photos, tmp_path):
    refused('compare', '--task', photos, '--methods', 'zero-shot', '--shots', '1',
            '--select', 'frist', '--out', tmp_path, says=["unknown select 'frist'", 'did you mean'])


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such modes')
def test_others_may_read_what_we_write(photos, tmp_path, prompts_of_picto):
    "As far as the user's umask lets them"
    (tmp_path/'plain').touch()
    assert prompts_of_picto.stat().st_mode == (tmp_path/'plain').stat().st_mode


def test_few_shot_curve(photos, tmp_path):
    works('compare', '--task', photos, '--methods', 'zero-shot,linear-probe', '--protocol',
          'few-shot', '--shots', '1,3', '--seeds', '3', '--out', tmp_path)
    rows = results(tmp_path)
    assert rows.shots.tolist() == [1, 1, 3, 3]
    assert (rows.protocol == 'few-shot').all()
    assert rows[['base', 'new', 'h']].isna().all().all()
    in_percent(rows.accuracy, 8)
    assert rows.accuracy[rows.method == 'zero-shot'].nunique() == 1
    assert rows.trainable.tolist() == [0, 516]*2


@pytest.fixture
def pretended(monkeypatch):
    "Runs that take no time"
    row = lambda m, b, d, k, seed, *a, **kw: dict(
        method=m.name, protocol='base-to-new', task=d.task, shots=k, seed=seed, base=50. + seed,
        new=40. - seed, h=44.4, accuracy=np.nan, seconds=100., trainable=20480)
    monkeypatch.setitem(protocols.PROTOCOLS, 'base-to-new', row)


def test_all_tasks(pretended, tmp_path, monkeypatch):
    "`--task all` is the eleven small worlds, or the domains where they are what is asked about"
    works('compare', '--task', 'all', '--methods', 'zero-shot', '--seeds', '1', '--out', tmp_path)
    assert results(tmp_path).task.tolist() == list(SUITE)
    monkeypatch.setitem(protocols.PROTOCOLS, 'domain', protocols.PROTOCOLS['base-to-new'])
    works('compare', '--task', 'all', '--protocol', 'domain', '--methods', 'zero-shot',
          '--seeds', '1', '--out', tmp_path/'domains')
    asked = results(tmp_path/'domains').task.tolist()
    assert asked == ['icons', 'edges', 'pixels', 'rotated']


def test_no_name_is_cut_in_the_table(pretended, tmp_path, monkeypatch):
    "In a terminal of 80 columns every run's line tells its method and all its numbers"
    monkeypatch.setattr(console, 'out', Console(width=80))
    r = works('compare', '--methods', ','.join(METHODS), '--seeds', '1,2,3', '--out', tmp_path)
    for m in METHODS:
        line = next((l for l in r.out.splitlines() if f' {m} ' in l), '')
        assert all(x in line for x in ('devices', '52.0 ± 1.0', '38.0 ± 1.0', '20,480')), r.out


def test_the_same_method_twice_runs_once(photos, tmp_path):
    works('compare', '--task', photos, '--methods', 'zero-shot,zero-shot', '--seeds', '1,1',
          '--shots', '1,1', '--protocol', 'few-shot', '--out', tmp_path)
    assert len(results(tmp_path)) == 1


@pytest.mark.parametrize('when', ['second run', 'while writing'])
def test_interrupt_keeps_finished_rows(photos, tmp_path, monkeypatch, when):
    run, runs = protocols.PROTOCOLS['few-shot'], []
    def stops(*args, **kwargs):
        runs.append(args)
        if when == 'second run' and len(runs) == 2: raise KeyboardInterrupt
        return run(*args, **kwargs)
    monkeypatch.setitem(protocols.PROTOCOLS, 'few-shot', stops)
    if when == 'while writing':
        to_csv = pd.DataFrame.to_csv
        def half(self, path, **kwargs):
            to_csv(self, path, **kwargs)
            if len(self) == 2: path.write_bytes(path.read_bytes()[:100]); raise KeyboardInterrupt
        monkeypatch.setattr(pd.DataFrame, 'to_csv', half)
    r = clipprompt('compare', '--task', photos, '--methods', 'zero-shot,linear-probe', '--protocol',
                   'few-shot', '--shots', '2', '--out', tmp_path)
    assert r.code == 130 and len(r.said) == 1 and 'stopped' in r.said[0], r
    if when == 'second run':
        assert results(tmp_path).method.tolist() == ['zero-shot']
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ['results.csv']
    monkeypatch.undo()
    ran = []
    monkeypatch.setitem(protocols.PROTOCOLS, 'few-shot',
                        lambda m, *args, **kwargs: ran.append(m.name) or run(m, *args, **kwargs))
    works('compare', '--task', photos, '--methods', 'zero-shot,linear-probe', '--protocol',
          'few-shot', '--shots', '2', '--out', tmp_path)
    # what was finished is not run again
    assert ran == (['linear-probe'] if when == 'second run' else [])
    assert results(tmp_path).method.tolist() == ['zero-shot', 'linear-probe']


def test_only_what_is_missing_runs(photos, tmp_path, monkeypatch):
    """Another seed, another picture, another budget is another run; rows of other comparisons stay
    in the file, out of the table"""
    ran, run = [], protocols.PROTOCOLS['few-shot']

    def noted(m, b, d, k, seed, *args, **kwargs):
        ran.append((m.name, seed))
        return run(m, b, d, k, seed, *args, **kwargs)

    monkeypatch.setitem(protocols.PROTOCOLS, 'few-shot', noted)
    own = shapes(tmp_path/'own')

    def again(*args):
        ran.clear()
        return works('compare', '--task', own, '--methods', 'zero-shot,coop', '--protocol',
                     'few-shot', '--shots', '2', '--epochs', '2', '--out', tmp_path/'out', *args)
    first = again()
    assert ran == [('zero-shot', 1), ('coop', 1)]
    assert again().out == first.out and not ran
    again('--seeds', '1,2')
    assert ran == [('zero-shot', 2), ('coop', 2)]
    again('--epochs', '3')
    assert ran == [('coop', 1)]
    r = again('--methods', 'linear-probe')
    assert ran == [('linear-probe', 1)]
    assert 'coop' not in r.out
    assert len(results(tmp_path/'out')) == 6
    next((own/'ring').iterdir()).unlink()
    again('--methods', 'zero-shot')
    assert ran == [('zero-shot', 1)]


@pytest.mark.parametrize('text', ['', 'method,seed\ncoop,1\n', '\0\0,"'])
def test_a_strange_results_file_is_not_overwritten(photos, tmp_path, text):
    (tmp_path/'results.csv').write_text(text)
    refused('compare', '--task', photos, '--methods', 'zero-shot', '--shots', '1',
            '--out', tmp_path, says=['results.csv', 'move it away or choose another folder'])
    refused('sweep', '--task', photos, '--methods', 'zero-shot', '--shots', '1', '--out', tmp_path,
            says=['results.csv', 'move it away or choose another folder'])
    assert (tmp_path/'results.csv').read_text() == text and not list(tmp_path.glob('records/*'))


@pytest.mark.stress
def test_transfer_and_unseen_domains(tmp_path, monkeypatch):
    """Zero-shot on the second data set, and on each domain left out; the shots of a left-out
    domain come from the other three"""
    works('compare', '--methods', 'zero-shot', '--protocol', 'cross', '--task', 'icons', '--shots',
          '1', '--out', tmp_path)
    works('compare', '--methods', 'zero-shot', '--protocol', 'domain', '--task', 'icons,edges',
          '--out', tmp_path)
    rows = results(tmp_path)
    assert rows.protocol.tolist() == ['cross', 'domain', 'domain']
    assert rows.shots.tolist() == [1, 4, 4]
    assert rows.task.tolist() == ['icons', 'icons', 'edges']
    in_percent(rows.accuracy[:1], len(load_dataset('emoji').test))
    in_percent(rows.source[:1], len(load_dataset(task='icons').test))
    assert rows.source[0] == rows.accuracy[1] and rows.source[1:].isna().all()
    for args, says in ((('--protocol', 'domain', '--task', 'styles'), ["not 'styles'"]),
                       (('--protocol', 'cross', '--task', 'emoji'), ['no other data sets'])):
        refused('compare', '--methods', 'zero-shot', *args, '--out', tmp_path, says=says)


@pytest.mark.stress
@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_a_real_ctrl_c(photos, tmp_path):
    "SIGINT in the middle of training, in a process of its own"
    args = ['compare', '--task', str(photos), '--methods', 'zero-shot,coop', '--protocol',
            'few-shot', '--shots', '2', '--seeds', '1', '--epochs', '100000', '--out',
            str(tmp_path)]
    p = subprocess.Popen(
        [sys.executable, '-c', 'from clipprompt.cli import main; main()', *args],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # a job in the background starts with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        seen = ''
        # the first run is told, the second is under way
        while 'run 1 of 2' not in seen:
            line = p.stderr.readline()
            assert line, seen
            seen += line
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130 and 'Traceback' not in err and 'stopped' in err, err
    assert results(tmp_path).method.tolist() == ['zero-shot']


# ---- train, evaluate, predict, info --------------------------------------------------------------

# chosen and solved without steps; words; image prompts; episodes; drawn for each image
SORTS = ['zero-shot-best', 'linear-probe', 'coop', 'vpt', 'metaprompt', 'variational-cocoop']

@pytest.fixture(scope='module', params=SORTS)
def trained(request, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts')/f'{request.param}.safetensors'
    return request.param, path, works('train', photos, '--method', request.param, '--shots', 3,
                                      '--epochs', 2, '--out', path)

accuracy = lambda r: float(re.search(r'([\d.]+)\s+%', r.out)[1])

def test_train_then_evaluate(trained, photos):
    method, path, r = trained
    again = works('evaluate', path, photos)
    assert accuracy(r) == pytest.approx(accuracy(again), abs=.06)
    assert '4 classes' in r.out
    assert method in r.out
    assert method in again.out
    assert method != 'linear-probe' or accuracy(again) == 100
    n = sum(v.numel() for v in read_prompts(path)[1].values())
    # prompts and maps, not a copy of CLIP (6.65 million numbers)
    assert path.stat().st_size < 4*n + 10_000 < 4_000_000


def test_predict(trained, photos, picto):
    "Sorted probabilities, the same as in Python"
    method, path, _ = trained
    files = [photos/c/'5.png' for c in ('disc', 'Kreuz é')]
    lines = works('predict', path, *files, '--top', 99).out.splitlines()
    learner = load_prompts(path, picto).eval()
    with torch.no_grad():
        p = learner(torch.stack([test_transform(picto)(Image.open(f)) for f in files])).softmax(-1)
    for line, f, row in zip(lines, files, p, strict=True):
        expect = ', '.join(f'{learner.classnames[i]} {100*row[i]:.1f} %'
                           for i in row.argsort(descending=True))
        assert line == f'{f}: {expect}'
    if method == 'linear-probe':
        assert [learner.classnames[i] for i in p.argmax(-1)] == ['disc', 'Kreuz é']


def test_predict_other_classes_and_top(trained, photos):
    method, path, _ = trained
    if not METHODS[method].cls.transfers: pytest.skip('belongs to its classes')
    said = works('predict', path, photos/'disc'/'0.png', '--classes', ' cat,guide_dog, eel',
                 '--top', 2).out
    names = re.findall(r'(\w[\w ]*) [\d.]+ %', said.split(': ', 1)[1])
    assert len(names) == 2 and set(names) < {'cat', 'guide dog', 'eel'}


@pytest.fixture(scope='module')
def coop(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts')/'coop.safetensors'
    works('train', photos, '--shots', 3, '--epochs', 2, '--out', path)
    return path

def shown(r): return [line.rsplit(': ', 1)[0] for line in r.out.splitlines()]

def test_predict_folders_and_patterns(coop, photos, tmp_path):
    """A folder is all its images in sorted order; a pattern what it matches; what is no image is
    left out, and the order of arguments kept"""
    all_of = [str(p) for p in sorted(photos.rglob('*.png'))]
    assert len(all_of) == 24 and shown(works('predict', coop, photos)) == all_of
    assert shown(works('predict', coop, f'{photos}/**/*.png')) == all_of
    assert shown(works('predict', coop,
                       f'{photos}/r*/[01].png')) == [str(photos/'ring'/f'{i}.png') for i in (0, 1)]
    (tmp_path/'sub').mkdir()
    for name in ('b.PNG', 'sub/a.png', '.hidden.png', 'notes.txt', 'a[b].png'):
        (tmp_path/name).write_bytes((photos/'ring'/'0.png').read_bytes())
    mixed = works('predict', coop, photos/'ring'/'1.png', tmp_path, tmp_path/'a[b].png')
    assert shown(mixed) == [
        str(p) for p in (photos/'ring'/'1.png', tmp_path/'a[b].png', tmp_path/'b.PNG',
                         tmp_path/'sub'/'a.png', tmp_path/'a[b].png')
    ]


@pytest.mark.parametrize('method', ['cocoop', 'metaprompt'])
def test_batches_change_nothing(method, photos, tmp_path):
    """The same probabilities to six digits, whatever comes through the tower together; also beside
    what cannot be read"""
    works('train', photos, '--method', method, '--shots', 2, '--epochs', 1, '--out', tmp_path/'p')
    (tmp_path/'broken.png').write_text('x')

    def read(batch):
        r = works('predict', tmp_path/'p', photos/'disc', tmp_path/'broken.png', photos/'ring',
                  '--batch', batch, '--top', 4, '--json', '--skip-broken')
        return json.loads(r.out)
    one = read(1)
    assert len(one['images']) == 12 and len(one['errors']) == 1
    for many in map(read, (5, 100)):
        assert many['errors'] == one['errors']
        assert [i['image'] for i in many['images']] == [i['image'] for i in one['images']]
        p = lambda r: torch.tensor([[next(t['probability'] for t in i['top'] if t['class'] == c)
                                     for c in r['classes']] for i in r['images']])
        assert (p(many) - p(one)).abs().max() < 5e-6


def test_json_and_csv(coop, photos, picto, tmp_path):
    "The same numbers in all three forms, on standard output and in a file"
    (tmp_path/'in').mkdir()
    strange = tmp_path/'in'/'b, "é".png'
    strange.write_bytes((photos/'disc'/'0.png').read_bytes())
    (tmp_path/'in'/'a.png').write_text('x')
    args = ('predict', coop, tmp_path/'in', photos/'ring'/'0.png', '--top', 2, '--skip-broken')
    said = json.loads(works(*args, '--json').out)
    assert said['method'] == 'coop'
    assert said['backbone'] == 'picto-clip'
    assert said['classes'] == picto_names(coop)
    assert said['prompts'] == str(coop)
    assert [i['image'] for i in said['images']] == [str(strange), str(photos/'ring'/'0.png')]
    assert [len(i['top']) for i in said['images']] == [2, 2]
    assert [e['image'] for e in said['errors']] == [str(tmp_path/'in'/'a.png')]
    assert 'cannot read' in said['errors'][0]['error']
    works(*args, '--out', tmp_path/'new'/'out.csv')
    table = pd.read_csv(tmp_path/'new'/'out.csv')
    assert list(table) == ['image', 'rank', 'class', 'probability']
    assert table['rank'].tolist() == [1, 2, 1, 2]
    listed = table[['image', 'class', 'probability']].itertuples(index=False)
    assert [tuple(r) for r in listed] == [(i['image'], t['class'], t['probability'])
                                          for i in said['images'] for t in i['top']]
    lines = works(*args).out.splitlines()
    best = lambda i: ', '.join(f"{t['class']} {100*t['probability']:.1f} %" for t in i['top'])
    assert lines == [f"{i['image']}: {best(i)}" for i in said['images']]
    for form, mode in (('json', '--json'), ('txt', '--top=2')):
        r = works(*args, '--out', tmp_path/'new'/f'out.{form}')
        assert '2 of 3 images' in r.out
        written = (tmp_path/'new'/f'out.{form}').read_text(encoding='utf-8')
        assert written == works(*args, mode).out
    both = works(*args, '--json', '--out', tmp_path/'new'/'out.json')   # a note is not for programs
    assert json.loads(both.out) == said and '2 of 3 images' in both.err
    assert sorted(p.name for p in (tmp_path/'new').iterdir()) == ['out.csv', 'out.json', 'out.txt']

def picto_names(path): return read_prompts(path)[0]['classnames']


def test_an_error_leaves_the_old_file(coop, photos, tmp_path):
    (tmp_path/'out.json').write_text('old'), (tmp_path/'broken.png').write_text('x')
    refused('predict', coop, photos, tmp_path/'broken.png', '--out', tmp_path/'out.json',
            says=['broken.png'])
    assert (tmp_path/'out.json').read_text() == 'old'


@pytest.mark.parametrize('text', ['cat\nguide_dog\neel', '\ufeffcat\r\n guide dog \r\n\r\neel\r\n'],
                         ids=['plain', 'windows'])
def test_class_names_from_a_file(coop, photos, tmp_path, text):
    (tmp_path/'names').write_bytes(text.encode())
    image = photos/'disc'/'0.png'
    predict = lambda names: works('predict', coop, image, '--classes', names).out
    assert predict(tmp_path/'names') == predict('cat,guide dog,eel')
    # in a file, commas belong to the name
    (tmp_path/'commas.txt').write_text('cat, black\ndog')
    assert 'cat, black ' in works('predict', coop, image, '--classes', tmp_path/'commas.txt').out


# ---- a folder of one's own, from the first command to the last -----------------------------------

def test_own_folder_from_start_to_end(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'inbox').mkdir()
    for i, c in enumerate(('disc', 'ring')):
        (tmp_path/'inbox'/f'{i}.png').write_bytes((photos/c/'5.png').read_bytes())
    r = works('train', photos, '--method', 'linear-probe')
    assert accuracy(r) == 100 and '4 classes' in r.out and 'prompts.safetensors' in r.out
    lines = works('predict', 'prompts.safetensors', 'inbox', '--top', 1).out.splitlines()
    assert [re.split(r': | [\d.]+ %', l)[:2] for l in lines] == [
        ['inbox/0.png', 'disc'], ['inbox/1.png', 'ring']]
    r = works('evaluate', 'prompts.safetensors', photos, '--per-class')
    assert accuracy(r) == 100 and '(8 of 8)' in r.out
    for name in ('disc', 'two bars', 'Kreuz é', 'ring'):
        assert re.search(rf'{name} +2 +100\.0', r.out), r.out


def test_per_class(coop, photos):
    "Hardest first; the hits add up to the accuracy"
    r = works('evaluate', coop, photos, '--per-class')
    rows = [(int(n), float(x)) for n, x in re.findall(r' (\d+) +(\d+\.\d) *$', r.out, re.M)]
    assert len(rows) == 4 and [x for _, x in rows] == sorted(x for _, x in rows)
    assert sum(n*x/100
               for n, x in rows) == pytest.approx(int(re.search(r'\((\d+) of 8\)', r.out)[1]))


def test_train_tracks_and_goes_on(photos, tmp_path):
    "--tracker writes what TensorBoard reads and changes no bit; --checkpoint takes a folder"
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for method in ('coop', 'linear-probe'):
        train = lambda name, *more: works('train', photos, '--method', method, '--shots', 2,
                                          '--epochs', 3, '--seed', 2, '--out', tmp_path/name, *more)
        train('a'), train('b', '--tracker', tmp_path/method, '--checkpoint',
                          f'{tmp_path}/{method}-run/')
        a, b = (read_prompts(tmp_path/n)[1] for n in 'ab')
        assert all(torch.equal(a[k], b[k]) for k in a | b)
        # solved, not trained: no curve
        if method == 'linear-probe': continue
        assert [p.name for p in (tmp_path/f'{method}-run').iterdir()] == ['checkpoint.safetensors']
        read = EventAccumulator(str(tmp_path/method)).Reload()
        assert sorted(read.Tags()['scalars']) == ['learning_rate', 'loss']
        assert [e.step for e in read.Scalars('loss')] == [1, 2, 3]


def test_info_about_prompts(trained):
    method, path, _ = trained
    r, (meta, state) = works('info', path), read_prompts(path)
    for text in (f'method: {method}', 'backbone: picto-clip', f"fingerprint: {meta['fingerprint']}",
                 'two bars', *state):
        assert text in r.out.replace('\n', ' ')


@pytest.mark.parametrize('mode', ['transparent', '16 bit', 'CMYK', 'animated'])
def test_predict_sees_what_training_saw(mode, photos, picto, tmp_path):
    """The same file, read by `predict` and as part of a data set: a black icon on transparent
    paper is no black square"""
    ink = np.full((32, 32), 255, np.uint8); ink[8:24, 8:24] = np.arange(16)*8
    folder = tmp_path/'data'
    for c in 'ab':
        (folder/c).mkdir(parents=True)
        for i in range(2):
            grey, path = Image.fromarray(ink), folder/c/f'{i}.png'
            if mode == 'transparent':
                Image.merge('LA', [Image.new('L', (32, 32)), Image.fromarray(255 - ink)]).save(path)
            elif mode == '16 bit': Image.fromarray(ink.astype(np.uint16)*257).save(path)
            elif mode == 'CMYK': grey.convert('CMYK').save(path.with_suffix('.tif'))
            else:
                grey.save(path, format='GIF', save_all=True,
                          append_images=[Image.new('L', (32, 32))])
    data, clip = load_dataset(folder), picto
    seen = np.asarray(data.read(data.test[0])).astype(int)
    assert abs(seen - ink[..., None]).max() <= 1, 'the data set shows another picture than the file'
    works('train', photos, '--method', 'linear-probe', '--out', tmp_path/'p')
    learner = load_prompts(tmp_path/'p', clip).eval()
    with torch.no_grad():
        p = learner(test_transform(clip)(data.read(data.test[0]))[None]).softmax(-1)[0]
    said = works('predict', tmp_path/'p', data.test[0].path, '--top', 1).out
    assert f'{learner.classnames[p.argmax()]} {100*p.max():.1f} %' in said


@pytest.mark.stress
def test_round_trip_on_the_shipped_pictures(tmp_path):
    path = tmp_path/'p.safetensors'
    r = works('train', '--task', 'icons', '--shots', 1, '--classes', 'base', '--epochs', 1, '--out',
              path)
    assert 'pictograms/icons: 40 classes, 40 training' in r.out and accuracy(r) > 10
    new = works('evaluate', path, '--task', 'icons', '--classes', 'new')
    assert '40 classes' in new.out and 10 < accuracy(new) != accuracy(r)
    base = works('evaluate', path, 'icons', '--classes', 'base')
    assert accuracy(base) == pytest.approx(accuracy(r), abs=.06)


def test_seed_and_checkpoint(photos, tmp_path):
    "Equal seeds, equal files; a finished checkpoint gives the same prompts without training"
    train = lambda name, seed, *more: works(
        'train', photos, '--shots', 2, '--epochs', 3, '--seed', seed, '--out', tmp_path/name, *more)
    for name, seed in dict(a=1, b=1, c=2).items(): train(name, seed)
    for name in 'de': train(name, 1, '--checkpoint', tmp_path/'ck')
    tokens = {n: read_prompts(tmp_path/n)[1]['ctx.tokens'] for n in 'abcde'}
    assert all(torch.equal(tokens['a'], tokens[n]) for n in 'bde')
    assert not torch.equal(tokens['a'], tokens['c'])


def test_info():
    out = works('info').out
    for text in (package.__version__, torch.__version__, 'picto-clip', *METHODS,
                 *protocols.PROTOCOLS, 'pictograms/pixels: 80 classes', 'emoji'):
        assert text in out


# ---- help ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example_that_parses(command):
    "Every example of the help text starts with this command and names only options that exist"
    text = works(command, '--help').out
    lines = ' '.join(re.sub(r'[│╭╮╰╯─]', ' ', text).split())
    examples = re.search(r'Examples?: (.*?) (Arguments|Options) ', lines)[1]
    assert examples.startswith(f'clipprompt {command}')
    options = set(re.findall(r'--[a-z-]+', lines.split(' Options ', 1)[1]))
    assert set(re.findall(r'--[a-z-]+', examples)) <= options


def test_help_lists_all_commands():
    out = works('--help').out
    assert all(f' {c} ' in out for c in COMMANDS)


def test_version(): assert package.__version__ in works('--version').out


# ---- the same words in all commands --------------------------------------------------------------

def same_bits(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('method', METHODS)
def test_train_is_fit(method, photos, picto, tmp_path):
    "The shell and plain Python give the same prompts, bit by bit"
    works('train', photos, '--method', method, '--shots', 2, '--epochs', 1, '--seed', 3, '--out',
          tmp_path/'p')
    data, cls = load_dataset(photos).few_shot(2, 3), methods()[method]
    recipe, seed = cls.budget(), {'seed': 3} if takes_seed(cls) else {}
    if recipe.epochs: recipe = replace(recipe, epochs=1, steps=None)
    learner = cls(picto, data.classnames, **cls.usual_hparams(), **seed)
    fit(learner, data, recipe, seed=3, progress=False)
    meta, state = read_prompts(tmp_path/'p')
    assert same_bits(state, learner.state_dict())
    assert meta['hparams'] == json.loads(json.dumps(learner.hparams))

def takes_seed(cls):
    "Also where only a class that it inherits from names `seed`"
    return any('seed' in signature(c).parameters for c in cls.__mro__[:-1])


def test_settings_reach_method_and_recipe(photos, tmp_path):
    "In train as in a comparison; what the recipe says is in the record"
    how = '--set', 'n_ctx=2', '--set', 'lr=0.5', '--set', 'epochs=1', '--set', 'select=last'
    works('train', photos, '--shots', 2, *how, '--out', tmp_path/'p')
    meta, state = read_prompts(tmp_path/'p')
    assert meta['hparams']['n_ctx'] == 2 and state['ctx.tokens'].shape[-2] == 2
    r = works('compare', '--task', photos, '--methods', 'coop', '--protocol', 'few-shot', '--shots',
              2, *how, '--out', tmp_path/'out', '--json')
    [row] = json.loads(r.out)['rows']
    assert row['hparams']['n_ctx'] == 2
    assert {k: row['recipe'][k] for k in ('lr', 'epochs')} == dict(lr=.5, epochs=1)


@pytest.mark.parametrize(
    'command', [('train', '--method', 'coop'), ('compare', '--methods', 'coop'),
                ('sweep', '--methods', 'coop', '--plan')], ids=['train', 'compare', 'sweep'])
@pytest.mark.parametrize('setting,says', [
    (['n_ctxt=4'], ["no setting 'n_ctxt'", 'did you mean n_ctx']),
    (['n_ctx=four'], ['n_ctx must be']),
    (['lr=fast'], ['lr must be a number']), (['n_ctx'], ['NAME=VALUE']),
    (['select=first'], ["unknown select 'first'"]), (['lr=1', 'lr=2'], ['lr is given twice'])],
    ids=lambda x: ' '.join(x))
def test_wrong_settings(command, setting, says, photos, tmp_path):
    given = [word for s in setting for word in ('--set', s)]
    refused(*command, '--task', photos, *given, '--out', tmp_path/'out', says=says)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('old,says', [
    (('predict', 'p', 'a.png', '--format', 'csv'), ['--json', '--out FILE.json, FILE.csv']),
    (('bench', '--json', 'speed.json'), ['--out speed.json']),
    (('train', 'pacs', '--task', 'sketch'), ['--task pacs/sketch']),
    (('evaluate', 'p', 'photos.csv', '--task', 'sketch'), ['--task photos.csv/sketch']),
    (('rerun', 'p', '--out', 'new.json'), ['.csv', '--json']),
    (('bench', '--out', 'speed.csv'), ['.json'])], ids=lambda x: ' '.join(x))
def test_old_spellings_say_the_new_ones(old, says): refused(*old, says=says)


def test_evaluate_for_programs(coop, photos, tmp_path):
    "The same scores on standard output and in files"
    said = json.loads(works('evaluate', coop, photos, '--json').out)
    assert said['method'] == 'coop' and said['images'] == 8 and len(said['per_class']) == 4
    assert said['accuracy'] == pytest.approx(100*said['right']/8)
    for form in ('json', 'csv', 'txt'):
        works('evaluate', coop, photos, '--out', tmp_path/f'a.{form}')
    assert json.loads((tmp_path/'a.json').read_text()) == said
    rows = pd.read_csv(tmp_path/'a.csv')
    assert rows.accuracy.tolist() == [row['accuracy'] for row in said['per_class']]
    assert (tmp_path/'a.txt').read_text() == works('evaluate', coop, photos).out


def test_results_for_programs(photos, tmp_path):
    "compare, sweep, a plan and rerun print one JSON value and nothing else"
    few = '--task', photos, '--methods', 'zero-shot', '--protocol', 'few-shot', '--shots', 1
    compared = json.loads(works('compare', *few, '--json', '--out', tmp_path/'a').out)['rows']
    swept = json.loads(works('sweep', *few, '--seeds', 1, '--json', '--out', tmp_path/'b').out)
    assert compared[0]['accuracy'] == swept['rows'][0]['accuracy'] and swept['failed'] == {}
    plan = json.loads(works('sweep', *few, '--seeds', '1,2', '--plan', '--json', '--out',
                            tmp_path/'b').out)
    assert plan['done'] == 1 and len(plan['missing']) == 1
    again = json.loads(works('rerun', tmp_path/'b', '--json').out)
    assert again['then']['accuracy'] == again['now']['accuracy']


def test_no_bar_where_nobody_looks(photos, tmp_path):
    "Redirected, an epoch is a plain line; --log keeps the lines"
    r = works('train', photos, '--shots', 2, '--epochs', 2, '--log', tmp_path/'log', '--out',
              tmp_path/'p')
    lines = r.err.splitlines()
    assert [l.split(',')[0] for l in lines] == ['coop: epoch 1 of 2', 'coop: epoch 2 of 2']
    assert (tmp_path/'log').read_text().splitlines() == lines
    r = works('compare', '--task', photos, '--methods', 'coop', '--protocol', 'few-shot', '--shots',
              2, '--epochs', 1, '--out', tmp_path/'out')
    assert '\r' not in r.err and 'run 1 of 1' in r.err, r


def test_how_the_text_tower_computes_changes_nothing(photos, tmp_path):
    few = 'train', photos, '--shots', 2, '--epochs', 1
    works(*few, '--out', tmp_path/'a')
    works(*few, '--text-chunk', 3, '--checkpoint-text', '--out', tmp_path/'b')
    (_, a), (_, b) = read_prompts(tmp_path/'a'), read_prompts(tmp_path/'b')
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('command', ['train', 'compare', 'sweep'])
def test_how_it_computes_reaches_the_training(command, photos, tmp_path, monkeypatch):
    seen = []

    def fit(learner, *args, workers, **how):
        seen.append((learner.text.chunk, learner.text.checkpoint, workers))
    monkeypatch.setattr('clipprompt.protocols.fit', fit)
    how = '--text-chunk', 3, '--checkpoint-text', '--workers', 1
    many = '--methods', 'coop', '--protocol', 'few-shot', '--seeds', 1
    few = () if command == 'train' else many
    works(command, '--task', photos, '--shots', 1, *few, *how, '--out', tmp_path/'out')
    assert seen == [(3, True, 1)]


def test_a_device_that_is_not_there(coop, photos, tmp_path):
    few = '--task', photos, '--methods', 'zero-shot', '--protocol', 'few-shot', '--shots', 1
    for command in (('train', photos), ('evaluate', coop, photos), ('predict', coop, photos),
                    ('compare', *few), ('sweep', *few), ('info', )):
        out = [] if command[0] in ('evaluate', 'predict', 'info') else ['--out', tmp_path/'out']
        refused(*command, *out, '--device', 'tpu', says=["no device 'tpu'"])


def test_info_for_programs(coop):
    assert json.loads(works('info', '--json').out)['methods'] == list(METHODS)
    said = json.loads(works('info', coop, '--json').out)
    assert said['method'] == 'coop' and 'ctx.tokens' in said['parameters']
