"""Bad input gets one line that names the cause and the cure, from Python and from the command line.

What `load_dataset` says is tested in test_data.py; here it goes through the command line as well.
"""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clipprompt import backbone as backbone_module
from clipprompt.backbone import assets, load_backbone
from clipprompt.coop import CoOp, nearest_words
from clipprompt.sets import load_dataset
from clipprompt.files import write_safely
from clipprompt.learner import Recipe, read_prompts
from clipprompt.prompts import phrase_tokens
from clipprompt.protocols import PROTOCOLS, protocol
from clipprompt.methods import find_method, load as load_prompts, must_fit
from clipprompt.report import compare
from clipprompt.evaluation import evaluate
from clipprompt.training import fit
from clipprompt.zeroshot import LinearProbe, ZeroShot
from helpers import one_line, refused, shapes, tiny_clip, works

NAMES = ['disc', 'two bars', 'cross', 'ring']


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def picto(): return load_backbone(device='cpu')


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


@pytest.fixture(scope='module')
def prompts(tmp_path_factory, picto):
    "Prompt files for picto-clip by name"
    folder = tmp_path_factory.mktemp('prompts')
    for name, learner in dict(coop=CoOp(picto, NAMES, n_ctx=2),
                              csc=CoOp(picto, NAMES, n_ctx=2, csc=True),
                              probe=LinearProbe(picto, NAMES)).items():
        learner.save(folder/f'{name}.safetensors')
    return folder


# ---- folders and images --------------------------------------------------------------------------

def no_images(folder): (folder/'disc').mkdir(parents=True); (folder/'cross').mkdir()
def one_class(folder): shapes(folder, ['disc'])
def nameless(folder): shapes(folder, ['disc', '_'])


@pytest.mark.parametrize('make,says', [
    (no_images, ['no images', 'put them in']), (one_class, ['one class', 'at least two']),
    (nameless, ['empty class name', 'rename'])])
@pytest.mark.parametrize('command', [('train', ), ('compare', '--task')],
                         ids='train compare'.split())
def test_useless_folder(tmp_path, make, says, command):
    make(tmp_path/'photos')
    refused(*command, tmp_path/'photos', '--out', tmp_path/'out', says=['photos', *says])
    assert not (tmp_path/'out').exists()


@pytest.fixture
def damaged(tmp_path):
    "Readable but for one picture"
    folder = shapes(tmp_path/'photos')
    whole = (folder/'cross'/'1.png').read_bytes()
    (folder/'cross'/'1.png').write_bytes(whole[:len(whole)//2])
    return folder


COMMANDS = {
    'train': ('train', '{}', '--epochs', '1', '--out', '{}.safetensors'),
    'evaluate': ('evaluate', '{prompts}', '{}'),
    'compare': ('compare', '--task', '{}', '--methods', 'coop', '--quick', '--protocol', 'few-shot',
                '--out', '{}-results')
}

@pytest.mark.parametrize('command', COMMANDS)
def test_unreadable_image(damaged, prompts, command):
    """Named; the message says the flag as this command line spells it; with the flag the rest is
    used, and the picture is named again"""
    args = [a.format(damaged, prompts=prompts/'coop.safetensors') for a in COMMANDS[command]]
    refused(*args, says=['1 of 24 images', os.path.join('cross', '1.png'), '--skip-broken'])
    r = works(*args, '--skip-broken')
    about = [l for l in r.said if '1.png' in l]
    assert len(about) == 1 and 'left out' in about[0], r
    # a sentence, not a line of our code
    assert not any('load_dataset(' in l for l in r.said), r


def test_unreadable_image_in_predict(damaged, prompts):
    bad, good = damaged/'cross'/'1.png', damaged/'cross'/'2.png'
    refused('predict', prompts/'coop.safetensors', good, bad,
            says=['cannot read', '1.png', '--skip-broken'])
    r = works('predict', prompts/'coop.safetensors', bad, good, '--skip-broken')
    assert len(r.said) == 1 and '1.png' in r.said[0], r
    assert r.out.count('\n') == 1 and '2.png' in r.out, r
    refused('predict', prompts/'coop.safetensors', damaged/'gone.png',
            says=['there is no image', 'gone.png'])
    # a folder stands for its images
    refused('predict', prompts/'coop.safetensors', damaged,
            says=['cannot read', '1.png', '--skip-broken'])


# ---- counts --------------------------------------------------------------------------------------

def test_more_shots_than_pictures(photos, tmp_path):
    refused('train', photos, '--shots', 5, '--out', tmp_path/'p',
            says=['5 shots', "has 4 training pictures", 'at most 4'])


def test_the_last_shots_are_checked_before_the_first_run(photos, tmp_path):
    "An hour of finished runs is no time to learn that the last ones cannot work"
    refused('compare', '--task', photos, '--methods', 'zero-shot', '--protocol', 'few-shot',
            '--shots', '1,2,5', '--out', tmp_path, says=['5 shots', 'at most 4'])
    assert not (tmp_path/'results.csv').exists()


def test_base_to_new_needs_four_classes(tmp_path):
    shapes(tmp_path/'photos', ['disc', 'bars', 'cross'])
    refused('compare', '--task', tmp_path/'photos', '--quick', '--out', tmp_path/'out',
            says=['two classes each', '3 in all'])


@pytest.mark.parametrize('option,value', [
    ('--seeds', 'a,b'), ('--seeds', '1.5'), ('--shots', 'x'), ('--shots', '0'),
    ('--shots', '-1')])
def test_no_count(photos, tmp_path, option, value):
    refused('compare', '--task', photos, option, value, '--out', tmp_path, says=['whole number'])


@pytest.mark.parametrize('option', ['--methods', '--seeds', '--shots', '--task'])
@pytest.mark.parametrize('value', ['', ' , '], ids='empty commas'.split())
def test_empty_list(option, value, tmp_path):
    refused('compare', option, value, '--out', tmp_path, says=[option.strip('-s'), 'at least one'])


@pytest.mark.parametrize('empty', ['methods', 'seeds', 'shots', 'tasks'])
def test_empty_list_in_python(clip, photos, empty):
    with pytest.raises(ValueError) as e:
        compare(**(dict(methods=['zero-shot'], tasks=[photos], seeds=[1], shots=[1], backbone=clip)
                   | {empty: []}))
    one_line(e, empty, 'at least one')


@pytest.mark.parametrize('args', [('compare', '--epochs', '0'), ('train', '--epochs', '0'),
                                  ('train', '--shots', '0'), ('predict', 'x', 'y', '--top', '0'),
                                  ('train', '--classes', 'bas'), ('evaluate', ), ('comapre', ),
                                  ('compare', '--method', 'coop')],
                         ids=' '.join)
def test_wrong_usage(args): refused(*args, code=2)


def test_no_command_shows_help_and_no_empty_error():
    from helpers import clipprompt
    r = clipprompt()
    assert 'compare' in r.out + r.err and 'error:' not in r.err, r


# ---- names ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    'args,says',
    [(('compare', '--methods', 'zero-shot,copo'), ["unknown method 'copo'", 'did you mean coop']),
     (('train', '--method', 'zero_shot'), ["unknown method 'zero_shot'", 'did you mean zero-shot']),
     (('compare', '--protocol', 'base2new'),
      ["unknown protocol 'base2new'", 'did you mean base-to-new']),
     (('compare', '--task', 'pixel'), ["'pixel'", 'did you mean', 'pixels']),
     (('compare', '--task', 'pixels,edge'), ["'edge'", 'did you mean', 'edges']),
     (('train', '--task', 'pixel'), ["'pixel'", 'did you mean', 'pixels']),
     (('train', 'pictogram'), ["'pictogram'", 'did you mean', 'pictograms']),
     (('train', './gone'), ['no folder', 'gone', 'check the path'])],
    ids=lambda x: ' '.join(x) if isinstance(x, tuple) else '')
def test_unknown_name(args, says, tmp_path): refused(*args, '--out', tmp_path/'out', says=says)


@pytest.mark.parametrize(
    'call,says',
    [(lambda: find_method('CoOp'), ['CoOp', 'did you mean coop']),
     (lambda: find_method('xyz'), ['known: ', 'coop', 'zero-shot']),
     (lambda: protocol('few_shot'), ['few_shot', 'did you mean few-shot']),
     (lambda: load_backbone('pictoclip'), ['pictoclip', 'did you mean picto-clip']),
     (lambda: load_backbone('vit-b-16', 'openai'), ['vit-b-16', 'did you mean ViT-B-16']),
     (lambda: load_backbone('ViT-B/16', 'openai'), ['did you mean ViT-B-16']),
     (lambda: load_backbone('ViT-B-16'), ['pretrained=', 'openai']),
     (lambda: load_backbone('ViT-B-16', 'opnai'), ['opnai', 'did you mean openai'])])
def test_unknown_name_in_python(call, says):
    with pytest.raises(ValueError) as e: call()
    one_line(e, *says)


def test_image_prompts_for_a_resnet():
    "Before weights are looked for: there is no network here"
    with pytest.raises(ValueError) as e:
        must_fit([find_method('coop'), find_method('vpt')], 'RN50')
    one_line(e, 'RN50', 'no sequence of transformer blocks', 'CoOp')
    must_fit([find_method('coop')], 'RN50')


# ---- places that cannot be written ---------------------------------------------------------------

@pytest.fixture
def barred(tmp_path):
    "A path below a regular file: nobody can write there, not even root"
    (tmp_path/'file').write_text('x')
    return tmp_path/'file'/'below'


def never(*args, **kwargs):
    raise AssertionError('the run began before the place of its results was checked')

def test_results_folder_is_checked_before_the_first_run(photos, barred, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, 'few-shot', never)
    refused('compare', '--task', photos, '--protocol', 'few-shot', '--quick', '--out', barred,
            says=['cannot write', 'below', 'choose a folder you may write to'])


def test_results_folder_is_a_file(photos, tmp_path):
    (tmp_path/'file').write_text('x')
    refused('compare', '--task', photos, '--protocol', 'few-shot', '--quick',
            '--out', tmp_path/'file', says=['cannot write', 'file', 'choose'])
    assert (tmp_path/'file').read_text() == 'x'


def test_prompt_file_is_checked_before_training(photos, barred, monkeypatch):
    monkeypatch.setattr('clipprompt.protocols.fit', never)
    refused('train', photos, '--out', barred/'p.safetensors',
            says=['cannot write', 'choose a folder you may write to'])
    refused('train', photos, '--out', photos, says=['cannot write', 'photos'])  # a folder


def test_nothing_half_written_is_left(tmp_path, clip):
    def fails(path): path.write_text('half'); raise OSError(28, 'No space left on device')
    (tmp_path/'p').write_text('old')
    with pytest.raises(OSError) as e: write_safely(tmp_path/'p', fails)
    one_line(e, 'cannot write', 'No space left')
    assert [p.name for p in tmp_path.iterdir()] == ['p'] and (tmp_path/'p').read_text() == 'old'


def test_learner_names_the_place(clip, barred):
    with pytest.raises(OSError) as e: ZeroShot(clip, NAMES).save(barred/'p.safetensors')
    one_line(e, 'cannot write', 'below', 'choose')


# ---- damaged and foreign files -------------------------------------------------------------------

@pytest.mark.parametrize('keep', [0, 5, 2000, -1], ids='empty stub header cut'.split())
def test_truncated_weights(tmp_path, monkeypatch, keep):
    start = (assets()/'picto-clip.safetensors').read_bytes()[:keep]
    (tmp_path/'picto-clip.safetensors').write_bytes(start)
    monkeypatch.setattr(backbone_module, 'assets', lambda: tmp_path)
    with pytest.raises(ValueError) as e: load_backbone()
    one_line(e, 'picto-clip.safetensors', 'damaged', 'reinstall')
    refused('info', says=['picto-clip.safetensors', 'damaged', 'reinstall'])


@pytest.mark.parametrize('name,content', [
    ('w.safetensors', b'xx'), ('w.safetensors', b'\x08\0\0\0\0\0\0\0{"a":1 }'), ('w.pt', b'xx')],
    ids='stub header pickle'.split())
def test_damaged_weights_of_another_model(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    # not a ConnectionError: the file is here
    with pytest.raises(ValueError) as e: load_backbone('ViT-S-32-alt', str(tmp_path/name))
    one_line(e, name, 'damaged')


@pytest.fixture(scope='module')
def few(photos): return load_dataset(photos).few_shot(2)

RECIPE = Recipe(epochs=1, batch_size=4)

class Other(CoOp):
    method = 'other'

def test_checkpoint_of_another_method(clip, few, tmp_path):
    fit(Other(clip, few.classnames, n_ctx=2), few, RECIPE, checkpoint=tmp_path/'c', progress=False)
    learner = CoOp(clip, few.classnames, n_ctx=2)
    before = learner.ctx.tokens.detach().clone()
    with pytest.raises(ValueError) as e:
        fit(learner, few, RECIPE, checkpoint=tmp_path/'c', progress=False)
    one_line(e, 'another run', 'method', 'give another file, or delete it')
    assert torch.equal(learner.ctx.tokens, before)


@pytest.mark.parametrize('what,change', [
    ('recipe', dict(recipe=Recipe(epochs=2, batch_size=4))), ('seed', dict(seed=3)),
    ('data', dict(shots=3)), ('fingerprint', dict(clip=1)), ('hparams', dict(n_ctx=3))])
def test_checkpoint_of_another_run(clip, photos, tmp_path, what, change):
    def run(recipe=RECIPE, seed=0, shots=2, clip=0, n_ctx=2):
        data = load_dataset(photos).few_shot(shots)
        fit(CoOp(tiny_clip(clip), data.classnames, n_ctx=n_ctx), data, recipe, seed, tmp_path/'c',
            progress=False)
    run()
    with pytest.raises(ValueError) as e: run(**change)
    one_line(e, 'another run', f': {what} differ')


@pytest.mark.parametrize('damage', ['empty', 'cut', 'pickle', 'prompts'])
def test_damaged_checkpoint(photos, prompts, tmp_path, damage):
    args = ('train', photos, '--shots', 2, '--epochs', 1, '--checkpoint', tmp_path/'c', '--out',
            tmp_path/'p')
    works(*args)
    contents = dict(empty=b'', cut=(tmp_path/'c').read_bytes()[:-9],
                    pickle=pickle.dumps({'epoch': 1}),
                    prompts=(prompts/'coop.safetensors').read_bytes())
    (tmp_path/'c').write_bytes(contents[damage])
    refused(*args,
            says=['is no checkpoint; give another file']
            if damage == 'prompts' else ['checkpoint', 'is damaged', 'give another file'])


class Harm:
    "Unpickling it writes a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
@pytest.mark.parametrize('command', ['predict', 'evaluate', 'info'])
def test_pickle_as_prompt_file(photos, tmp_path, ending, command):
    path = tmp_path/f'p.{ending}'
    args = dict(predict=[photos/'disc'/'0.png'], evaluate=[photos], info=[])[command]
    torch.save({'ctx': Harm(tmp_path/'harmed')}, path)
    refused(command, path, *args, says=[path.name, 'safetensors', 'pickle'])
    assert not (tmp_path/'harmed').exists()


@pytest.mark.parametrize(
    'make,says',
    [(lambda p, b: p.write_bytes(b[:-10]), ['no intact safetensors', 'truncated']),
     (lambda p, b: p.write_bytes(b''), ['no intact safetensors', 'truncated']),
     (lambda p, b: None, ['no prompt file', 'clipprompt train']),
     (lambda p, b: save_file({'a': torch.zeros(1)}, p), ['holds no prompts; use the file']),
     (lambda p, b: save_file({'a': torch.zeros(1)}, p, {'format': 'pt'}),
      ['holds no prompts; use the file']),
     (lambda p, b: save_file({'a': torch.zeros(1)}, p, {'run': '{}'}),
      ['holds no prompts, it is a checkpoint'])],
    ids='cut empty missing foreign foreign-meta checkpoint'.split())
def test_no_prompt_file(prompts, tmp_path, make, says):
    path = tmp_path/'p.safetensors'
    make(path, (prompts/'coop.safetensors').read_bytes())
    with pytest.raises((ValueError, FileNotFoundError)) as e: read_prompts(path)
    one_line(e, 'p.safetensors', *says)
    refused('info', path, says=says)


def edited(path, to, **change):
    "A prompt file that says something else of itself; None takes it out"
    with safe_open(path, 'pt') as f: meta = f.metadata()
    said = meta | {k: json.dumps(v) for k, v in change.items()}
    save_file(load_file(path), to, {k: v for k, v in said.items() if v != 'null'})


@pytest.mark.parametrize('change', [
    dict(hparams={'n_ctx': 3}),
    dict(hparams={'size': 1}),
    dict(classnames=None),
    dict(method=None)
],
                         ids='shape hparams classnames method'.split())
def test_prompt_file_of_another_version(prompts, photos, tmp_path, change):
    "Right format, wrong inside: edited by hand, or written by a later version"
    edited(prompts/'coop.safetensors', tmp_path/'p.safetensors', **change)
    refused('predict', tmp_path/'p.safetensors', photos/'disc'/'0.png', says=['p.safetensors'])


def test_prompts_of_another_method(prompts, picto):
    with pytest.raises(ValueError) as e: CoOp.load(prompts/'probe.safetensors', picto)
    one_line(e, "'linear-probe'", "'coop'", 'load')


def test_prompts_of_another_backbone(clip, picto, photos, tmp_path):
    CoOp(clip, NAMES, n_ctx=2).save(tmp_path/'p.safetensors')
    with pytest.raises(ValueError) as e: load_prompts(tmp_path/'p.safetensors', picto)
    one_line(e, 'tiny-0', 'picto-clip', clip.fingerprint, picto.fingerprint, 'load that backbone')
    refused('predict', tmp_path/'p.safetensors', photos/'disc'/'0.png',
            says=['p.safetensors was trained on tiny-0', 'unknown backbone'])


def test_prompts_whose_weights_were_a_file(prompts, photos, tmp_path):
    "A name is no path: where the file lies now must be said"
    edited(prompts/'coop.safetensors', tmp_path/'p.safetensors', backbone='ViT-L-14-336/mine')
    refused('predict', tmp_path/'p.safetensors', photos/'disc'/'0.png',
            says=['p.safetensors was trained on ViT-L-14-336/mine', "'mine' is neither",
                  'with --pretrained'])


# ---- class names and prompts ---------------------------------------------------------------------


@pytest.mark.parametrize('names,says', [
    ([], ['no class names']), (['disc', ''], ['number 2', 'empty']),
    (['_', 'disc'], ['number 1', 'empty']), (['disc', ' '], ['number 2', 'empty'])])
@pytest.mark.parametrize('make', [
    lambda c, n: CoOp(c, n, n_ctx=2), lambda c, n: ZeroShot(c, n), lambda c, n: LinearProbe(c, n),
    lambda c, n: CoOp(c, NAMES, n_ctx=2).for_classes(n)
],
                         ids='coop zero-shot probe for_classes'.split())
def test_empty_class_name(clip, names, says, make):
    with pytest.raises(ValueError) as e: make(clip, names)
    one_line(e, *says)


def test_empty_class_name_on_the_command_line(prompts, photos):
    refused('predict', prompts/'coop.safetensors', photos/'disc'/'0.png',
            '--classes', 'disc,,cross', says=['class name number 2 is empty', 'name every class'])


def test_prompts_that_do_not_transfer(clip, prompts, photos):
    for learner in (CoOp(clip, NAMES, n_ctx=2, csc=True), LinearProbe(clip, NAMES)):
        with pytest.raises(ValueError) as e: learner.for_classes(['cat', 'dog'])
        one_line(e, learner.method, 'cannot be used for other names')
    for name in ('csc', 'probe'):
        refused('predict', prompts/f'{name}.safetensors', photos/'disc'/'0.png',
                '--classes', 'cat,dog', says=['cannot be used for other names'])
        refused('evaluate', prompts/f'{name}.safetensors', photos, '--classes', 'new',
                says=['cannot be used for other names'])


def test_learner_of_other_classes(clip, few):
    with pytest.raises(ValueError) as e: evaluate(ZeroShot(clip, ['cat', 'dog']), few)
    one_line(e, '2 and 4 classes', 'for_classes')


@pytest.mark.parametrize('n_ctx,name', [
    (73, 'black guide dog'), (70, 'a rather long name that nobody would give'), (4, 'word '*80)],
    ids='context both name'.split())
def test_prompt_too_long(clip, n_ctx, name):
    "The class that does not fit is named: with 1000 classes nobody finds it otherwise"
    with pytest.raises(ValueError) as e: CoOp(clip, ['cross', name], n_ctx=n_ctx)
    one_line(e, f"class '{name[:12]}", 'holds 77', 'shorten')


def test_class_name_too_long_on_the_command_line(prompts, photos):
    refused('predict', prompts/'coop.safetensors', photos/'disc'/'0.png',
            '--classes', 'disc,' + 'word '*80, says=['holds 77', 'shorten', 'word'])


@pytest.mark.parametrize(
    'call,says',
    [(lambda c: CoOp(c, NAMES, n_ctx=0), ['n_ctx', 'at least 1']),
     (lambda c: CoOp(c, NAMES, position='start'), ['start', "'end', 'middle' or 'front'"]),
     (lambda c: CoOp(c, NAMES, ctx_init=' '), ['phrase is empty', 'None']),
     (lambda c: phrase_tokens(c, ''), ['phrase is empty']),
     (lambda c: ZeroShot(c, NAMES, 'a photo'), ['a photo', 'exactly one {}']),
     (lambda c: ZeroShot(c, NAMES, []), ['template']),
     (lambda c: nearest_words(CoOp(c, NAMES, csc=True)), ['unified', 'csc=False']),
     (lambda c: CoOp(c, NAMES).vision(torch.zeros(2, 3, 16, 16)),
      ['[2, 3, 16, 16]', '[B, 3, 32, 32]', 'transform'])])
def test_wrong_arguments(clip, call, says):
    with pytest.raises(ValueError) as e: call(clip)
    one_line(e, *says)


def test_loss_that_is_not_finite(clip, few):
    with pytest.raises(FloatingPointError) as e:
        fit(CoOp(clip, few.classnames, n_ctx=2), few,
            Recipe(epochs=5, warmup_lr=1e38, lr=1e38, batch_size=4), progress=False)
    one_line(e, 'loss is nan', 'lower the learning rate')


# ---- predict: images, names, places --------------------------------------------------------------


def no_pictures(tmp):
    (tmp/'texts').mkdir()
    (tmp/'texts'/'a.txt').write_text('x')
    return tmp/'texts', ['holds no images', 'texts', '.png']
def no_match(tmp): return f'{tmp}/*.jpeg', ['no image matches', '*.jpeg', 'check the pattern']
def no_file(tmp): return tmp/'gone'/'a.png', ['there is no image', 'a.png', 'check the path']


def no_picture(tmp):
    (tmp/'a.png').write_text('x')
    return tmp/'a.png', ['cannot read', 'a.png', '--skip-broken']


def no_bytes(tmp):
    (tmp/'a.png').touch()
    return tmp/'a.png', ['cannot read', 'a.png', '--skip-broken']

@pytest.mark.parametrize('make', [no_pictures, no_match, no_file, no_picture, no_bytes])
@pytest.mark.parametrize('form', ['txt', 'json', 'csv'])
def test_predict_without_a_picture(prompts, tmp_path, make, form):
    "Nothing is written, neither to standard output nor to a file"
    what, says = make(tmp_path)
    more = ['--json'] if form == 'json' else []
    r = refused('predict', prompts/'coop.safetensors', what, *more, says=says)
    refused('predict', prompts/'coop.safetensors', what, '--out', tmp_path/f'out.{form}', says=says)
    assert r.out == '' and not (tmp_path/f'out.{form}').exists()


@pytest.mark.parametrize('more', [[], ['--json']], ids=['text', 'json'])
def test_predict_when_nothing_can_be_read(prompts, tmp_path, more):
    for i in range(2): (tmp_path/f'{i}.png').write_text('x')
    from helpers import clipprompt
    r = clipprompt('predict', prompts/'coop.safetensors', tmp_path, '--skip-broken', *more)
    assert r.code == 1, r
    assert [l.split(':')[0] for l in r.said] == ['skipped', 'skipped', 'error'], r
    assert 'none of the 2 images' in r.said[2], r


def test_too_large_a_picture(prompts, tmp_path, monkeypatch):
    "What PIL takes for a decompression bomb"
    Image.new('L', (60, 60)).save(tmp_path/'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    refused('predict', prompts/'coop.safetensors', tmp_path/'a.png',
            says=['cannot read', 'a.png', 'exceeds limit', '--skip-broken'])


@pytest.mark.parametrize('content,says', [
    (None, ['no file', 'n.txt', 'check the path']),
    (b'', ['n.txt', 'no class names', 'one per line']), (b' \n\n', ['n.txt', 'no class names']),
    (b'caf\xe9\ncat', ['n.txt', 'UTF-8']), (b'cat\ncat', ["'cat' is given twice"])],
    ids='missing empty blank latin1 twice'.split())
def test_file_of_class_names(prompts, photos, tmp_path, content, says):
    if content is not None: (tmp_path/'n.txt').write_bytes(content)
    refused('predict', prompts/'coop.safetensors', photos/'disc'/'0.png',
            '--classes', tmp_path/'n.txt', says=says)


def test_predict_checks_the_place_first(prompts, photos, barred, tmp_path, monkeypatch):
    from clipprompt import cli
    monkeypatch.setattr(cli, 'load', never)
    refused('predict', prompts/'coop.safetensors', photos, '--out', barred/'x.json',
            says=['cannot write', 'choose a folder you may write to'])
    refused('predict', prompts/'coop.safetensors', photos, '--out', tmp_path,
            says=['cannot write', 'is a folder', 'choose a file name'])


@pytest.mark.parametrize('args', [('--jsn', ), ('--batch', '0'), ('--batch', 'x'),
                                  ('--top', '0')],
                         ids=' '.join)
def test_predict_usage(prompts, photos, args):
    refused('predict', prompts/'coop.safetensors', photos, *args, code=2)


# ---- trackers and checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize('tracker', [3, [], object(), dict(add_scalar=1)],
                         ids='number list object dict'.split())
def test_no_tracker(clip, few, tracker):
    with pytest.raises(ValueError) as e:
        fit(CoOp(clip, few.classnames, n_ctx=2), few, RECIPE, progress=False, tracker=tracker)
    one_line(e, 'tracker', type(tracker).__name__, 'add_scalar')


def test_tracker_without_tensorboard(photos, clip, few, tmp_path, monkeypatch):
    # as where it is not installed
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ValueError) as e:
        fit(CoOp(clip, few.classnames, n_ctx=2), few, RECIPE, progress=False, tracker=tmp_path/'t')
    one_line(e, 'not installed', 'pip install "clipprompt[tensorboard]"', 'add_scalar')
    refused('train', photos, '--shots', 2, '--epochs', 1, '--out', tmp_path/'p',
            '--tracker', tmp_path/'t', says=['not installed', 'pip install'])
    assert not (tmp_path/'p').exists() and not (tmp_path/'t').exists()


def test_tracker_that_cannot_be_written(photos, barred, tmp_path):
    pytest.importorskip('tensorboard')
    for place in (barred, barred.parent):
        refused('train', photos, '--shots', 2, '--epochs', 1, '--out', tmp_path/'p',
                '--tracker', place,
                says=['cannot write', str(place), 'choose a folder you may write to'])


def test_checkpoint_is_checked_before_the_first_epoch(photos, barred, tmp_path, monkeypatch):
    from clipprompt import training
    monkeypatch.setattr(training.Training, '_epoch', never)
    for place in (barred, f'{barred}/'):
        refused('train', photos, '--shots', 2, '--epochs', 1, '--out', tmp_path/'p',
                '--checkpoint', place, says=['cannot write', 'choose a folder you may write to'])


# ---- files that are there already ----------------------------------------------------------------

def test_out_spares_what_the_command_reads(prompts, photos, tmp_path):
    file, picture = shutil.copy(prompts/'coop.safetensors',
                                tmp_path), shutil.copy(photos/'disc'/'0.png', tmp_path)
    before = Path(file).read_bytes(), Path(picture).read_bytes()
    for out in (file, picture):
        refused('predict', file, tmp_path/'0.png', '--out', out,
                says=['--out', Path(out).name, 'choose another name'])
    refused('train', photos, '--checkpoint', file, '--out', file,
            says=['--out', 'choose another name'])
    assert before == (Path(file).read_bytes(), Path(picture).read_bytes())


@pytest.mark.parametrize('text', ['path,label\n', 'print()', ''])
def test_train_replaces_prompts_and_nothing_else(photos, tmp_path, text):
    (tmp_path/'mine').write_text(text)
    refused('train', photos, '--out', tmp_path/'mine',
            says=['mine is there', 'holds no prompts', 'choose another name'])
    assert (tmp_path/'mine').read_text() == text
    for seed in (1, 2):
        works('train', photos, '--epochs', 1, '--shots', 2, '--seed', seed, '--out', tmp_path/'p')


def test_prompts_are_no_checkpoint(prompts, photos, tmp_path):
    file = Path(shutil.copy(prompts/'coop.safetensors', tmp_path))
    refused('train', photos, '--shots', 2, '--epochs', 1, '--checkpoint', file,
            '--out', tmp_path/'p', says=['coop.safetensors is no checkpoint', 'give another file'])
    assert file.read_bytes() == (prompts/'coop.safetensors').read_bytes()


def test_options_of_training_where_nothing_is_trained(photos, tmp_path):
    for method, more in (('linear-probe', ['--checkpoint', tmp_path/'c']),
                         ('zero-shot', ['--epochs', 3])):
        r = works('train', photos, '--method', method, *more, '--out', tmp_path/method)
        assert f'warning: {method} is not trained in epochs' in r.err


def test_a_place_that_cannot_be_is_named_as_given(photos, tmp_path):
    (tmp_path/'file').touch()
    r = refused('train', photos, '--out', tmp_path/'file'/'p.safetensors',
                says=[f"{tmp_path/'file'/'p.safetensors'} (", 'choose a folder'])
    assert '.check' not in r.err


# ---- the root of a data set ----------------------------------------------------------------------

@pytest.mark.parametrize('command', ['train', 'evaluate'])
def test_root_that_is_not_there(prompts, tmp_path, command):
    args = [prompts/'coop.safetensors'] if command == 'evaluate' else []
    refused(command, *args, 'eurosat', '--root', tmp_path/'gone', says=['gone', '--root'])


# ---- the command itself --------------------------------------------------------------------------

def test_brackets_in_names(prompts, tmp_path):
    "Names may hold what rich takes for markup"
    Image.new('RGB', (20, 20)).save(tmp_path/'a[bold]b.png')
    assert 'a[bold]b.png' in works('predict', prompts/'coop.safetensors',
                                   tmp_path/'a[bold]b.png').out
    assert '[bold]key' in works('predict', prompts/'coop.safetensors', tmp_path/'a[bold]b.png',
                                '--classes', 'cat,[bold]key').out
    refused('info', '[/red]:key:.safetensors', says=['[/red]:key:.safetensors'])


@pytest.mark.stress
def test_the_installed_command(tmp_path):
    "A process of its own: the message on stderr, nothing on stdout, exit code 1"
    code = 'from clipprompt.cli import main; main()'
    r = subprocess.run([sys.executable, '-c', code, 'train', 'gone/photos'], cwd=tmp_path,
                       capture_output=True, text=True)
    assert r.returncode == 1
    assert r.stdout == ''
    assert r.stderr.startswith('error: no folder ')
    assert r.stderr.count('\n') == 1
