"""Pictures from everywhere get the answer that evaluation would give; what is none, one line."""
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipprompt import inference
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.deep import VPT
from clipprompt.inference import Prediction, find_images, listed, predict, predictions
from clipprompt.pictures import test_transform
from clipprompt.sets import load_dataset
from clipprompt.evaluation import evaluate
from helpers import one_line, shapes, tiny_clip

NAMES = ['disc', 'two bars', 'cross', 'ring']


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def coop(clip): return CoOp(clip, NAMES, n_ctx=2)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


def p_of(prediction): return dict(prediction.top)

def same(a, b, most=2e-6):
    "Equal probabilities; batches of another size round differently"
    return all(abs(p_of(a)[c] - p_of(b)[c]) < most for c in NAMES)


# ---- the same picture from everywhere ------------------------------------------------------------

def test_forms_of_one_picture(coop, clip, photos):
    file = photos/'ring'/'3.png'
    picture = Image.open(file)
    array = np.asarray(picture)                                # [H, W, 3]
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)   # [3, H, W]
    floats = test_transform(clip)(picture.convert('RGB'))
    forms = [file, str(file), picture, array, tensor, floats]
    found = predict(coop, forms, top=4)
    assert [p.image for p in found] == [file, file, 2, 3, 4, 5]
    assert all(same(p, found[0]) for p in found)
    for form in forms:
        [one] = predict(coop, form, top=4)
        assert same(one, found[0])
    batch = predict(coop, torch.stack([tensor, tensor]), top=4)
    assert len(batch) == 2 and all(same(p, found[0]) for p in batch)


@pytest.mark.parametrize('method', [CoOp, CoCoOp, VPT])
def test_predictions_are_what_evaluation_sees(clip, photos, method):
    data = load_dataset(photos)
    learner = method(clip, data.classnames)
    logits = evaluate(learner, data).logits
    found = predict(learner, [item.path for item in data.test], top=4, batch_size=3)
    for p, row in zip(found, logits.softmax(-1), strict=True):
        expected = dict(zip(learner.classnames, row.tolist()))
        assert all(abs(p_of(p)[c] - x) < 1e-5 for c, x in expected.items())
        assert [x for _, x in p.top] == sorted((x for _, x in p.top), reverse=True)


def test_grey_transparent_and_of_any_size(coop):
    "White paper below, as in training"
    ink = np.zeros((50, 30), np.uint8)
    white = np.full((50, 30, 4), (0, 0, 0, 0), np.uint8)       # nothing drawn
    grey, clear = predict(coop, [ink, white], top=4)
    assert same(predict(coop, Image.new('RGB', (30, 50), 'white'), top=4)[0], clear)
    assert same(predict(coop, Image.new('RGB', (30, 50), 'black'), top=4)[0], grey)


# ---- folders, patterns, order --------------------------------------------------------------------

def test_folders_and_patterns(coop, photos, tmp_path):
    every = sorted(photos.rglob('*.png'))
    assert find_images(photos) == every == find_images(f'{photos}/**/*.png')
    for name in ('b.PNG', 'sub/a.png', '.hidden.png', 'notes.txt', 'a[b].png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes((photos/'ring'/'0.png').read_bytes())
    below = [tmp_path/'a[b].png', tmp_path/'b.PNG', tmp_path/'sub'/'a.png']
    mixed = listed([photos/'ring'/'1.png', [tmp_path, tmp_path/'a[b].png']])
    assert mixed == [photos/'ring'/'1.png', *below, tmp_path/'a[b].png']
    assert [p.image for p in predict(coop, tmp_path)] == below


@pytest.mark.parametrize('workers', [0, 1, 3])
@pytest.mark.parametrize('batch_size', [1, 5, 100])
def test_threads_and_batches_change_nothing(coop, photos, workers, batch_size):
    plain = predict(coop, photos, top=4, workers=0)
    found = predict(coop, photos, top=4, workers=workers, batch_size=batch_size)
    assert [p.image for p in found] == [p.image for p in plain]
    assert all(same(a, b) for a, b in zip(found, plain))


def test_reading_ahead_has_a_bound(coop, photos, monkeypatch):
    "Two batches, not the folder; and threads end with the generator"
    opened, ready = [], inference._ready

    def noted(given, **how):
        opened.append(given)
        return ready(given, **how)

    monkeypatch.setattr(inference, '_ready', noted)
    before = threading.active_count()
    stream = predictions(coop, photos, batch_size=2, workers=2)
    next(stream)
    assert len(opened) <= 2 + 2*2 + 1
    stream.close()
    assert threading.active_count() == before


# ---- what cannot be read -------------------------------------------------------------------------

def test_broken_pictures(coop, photos, tmp_path):
    (tmp_path/'a.png').write_text('x')
    whole = photos/'ring'/'0.png'
    given = [tmp_path/'a.png', whole, tmp_path/'gone.png', np.zeros((5, 5, 7), np.uint8), whole]
    found = predict(coop, given, skip_broken=True, batch_size=2)
    assert [bool(p.error) for p in found] == [True, False, True, True, False]
    assert [c for c, _ in found[1].top] == [c for c, _ in found[4].top]
    assert all('\n' not in p.error and not p.top for p in found if p.error)
    for i, name in ((0, 'a.png'), (2, 'gone.png'), (3, 'picture 3')): assert name in found[i].error
    assert str(found[0]).startswith(str(tmp_path/'a.png')) and 'cannot read' in str(found[0])
    with pytest.raises(ValueError) as e: predict(coop, given)
    one_line(e, 'cannot read', 'a.png', 'skip_broken=True', '--skip-broken')
    with pytest.raises(FileNotFoundError) as e: predict(coop, [whole, tmp_path/'gone.png'])
    one_line(e, 'there is no image', 'gone.png')


def test_a_batch_of_broken_ones(coop, photos, tmp_path):
    for i in range(3): (tmp_path/f'{i}.png').write_text('x')
    found = predict(coop, [tmp_path, photos/'ring'], skip_broken=True, batch_size=2)
    assert [bool(p.error) for p in found] == [True]*3 + [False]*6


@pytest.mark.parametrize('images,says', [
    (7, ['type int']), (None, ['type NoneType']), (b'x', ['type bytes']), ([], ['no pictures']),
    ({'a.png': 1}, ['type dict']), (torch.zeros(3), ['shape [3]']),
    (torch.zeros(1, 1, 3, 4, 4), ['shape [1, 1, 3, 4, 4]']),
    (torch.zeros(3, 4, 4), ['picture 0', '[3, 4, 4]', '[3, 32, 32]', 'uint8']),
    (np.full((4, 4, 3), 7.5), ['picture 0', '0 to 1'])], ids=lambda x: str(type(x).__name__))
def test_what_is_no_picture(coop, images, says):
    with pytest.raises(ValueError) as e: predict(coop, images)
    one_line(e, *says)


@pytest.mark.parametrize('how', [dict(top=0), dict(batch_size=0), dict(workers=-1)],
                         ids=lambda d: next(iter(d)))
def test_wrong_numbers(coop, photos, how):
    with pytest.raises(ValueError) as e: predictions(coop, photos, **how)
    one_line(e, next(iter(how)), 'at least')


def test_paths_are_looked_up_at_once(coop, tmp_path):
    "Not at the first `next`"
    (tmp_path/'empty').mkdir()
    for given, words in ((tmp_path/'empty', 'holds no images'), (f'{tmp_path}/*.jpg', 'no image')):
        with pytest.raises(FileNotFoundError) as e: predictions(coop, given)
        one_line(e, words)


def test_top_is_at_most_all(coop, photos):
    [p] = predict(coop, photos/'ring'/'0.png', top=99)
    assert sorted(c for c, _ in p.top) == sorted(coop.classnames)
    assert sum(x for _, x in p.top) == pytest.approx(1)
    assert str(Prediction(Path('a'), [('cat', .5)])) == 'a: cat 50.0 %'


def test_no_gradient_and_no_trace(coop, photos):
    "Neither in the parameters nor in the working folder"
    before = os.listdir()
    predict(coop, photos)
    assert all(p.grad is None for p in coop.parameters()) and os.listdir() == before
