"""Pictures and data: splits and shots are the papers', transforms do what they say, and bad data
gets one line that helps."""
import hashlib
import json
import math
import os
import pickle
import random
import warnings
import zipfile
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from io import BytesIO
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from clipprompt.data import (ENSEMBLE, PICTOGRAM_TEMPLATES, SUITE, TEMPLATES, DataSet,
                             template_of)
from clipprompt.disk import all_broken
from clipprompt.pictures import (DOMAINS, DataError, DataNotFound, Files, Item, edge_map, pixelate,
                                 rotate90, test_transform, to_rgb, train_transform)
from clipprompt.sets import TASKS, load_dataset, split_name

CLIP = SimpleNamespace(image_size=32, mean=(.48, .46, .41), std=(.27, .26, .28),
                       interpolation='bicubic', resize_mode='shortest')


def picture(seed=0, size=(20, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder, n=6, ending='png', start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start+n): picture(i).save(folder/f'{i:02d}.{ending}')
    return folder


@pytest.fixture
def folder(tmp_path):
    "Three classes of six pictures"
    for c in ('cat', 'guide_dog', 'eel'): fill(tmp_path/'pets'/c)
    return tmp_path/'pets'


@pytest.fixture(scope='module')
def pictograms(): return load_dataset(task='pixels')


def one_line(error, *words):
    message = str(error.value)
    assert '\n' not in message and len(message) < 400
    for w in words: assert w in message, message
    return message


# ---- shots, halves -------------------------------------------------------------------------------

def toy(sizes=(6, 6, 6), order=None):
    items = [Item(f'{c}{i}', c) for c in order or range(len(sizes)) for i in range(sizes[c])]
    return DataSet('toy', [f'name {c}' for c in range(len(sizes))], items, list(items))


def test_shots_are_pinned():
    """Python promises the same sample for ever; if it ever breaks that, results stop being
    comparable and we want to know"""
    data = toy(order=(1, 0, 2))
    assert [i.path for i in data.few_shot(2, 1).train] == ['11', '14', '00', '02', '20', '23']


@pytest.mark.parametrize('shots', [1, 2, 4, 6])
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_shots_as_coop_draws_them(shots, seed):
    data = toy((6, 9, 7, 4), order=(2, 0, 3, 1))
    by_label = {}
    for i in data.train: by_label.setdefault(i.label, []).append(i)
    random.seed(seed)
    theirs = []
    for items in by_label.values():
        theirs += random.sample(items, shots) if len(items) >= shots else items
    assert data.few_shot(shots, seed, allow_fewer=True).train == theirs


def test_shots_leave_the_global_generator_alone():
    random.seed(5); before = random.getstate()
    toy().few_shot(2, 1)
    assert random.getstate() == before


def test_shots_of_interleaved_labels_and_untouched_test():
    data = toy()
    data.train = [data.train[i] for i in random.Random(0).sample(range(18), 18)]
    few = data.few_shot(3, np.int64(2))
    assert sorted(i.label for i in few.train) == [0]*3 + [1]*3 + [2]*3
    assert few.test == data.test
    assert len(data.train) == 18


@pytest.mark.parametrize('shots', [0, -1, 2.5, '4', None])
def test_shots_must_be_a_count(shots):
    with pytest.raises(DataError) as e: toy().few_shot(shots)
    one_line(e, 'shots', 'at least 1', repr(shots))


def test_too_many_shots_name_class_and_count():
    with pytest.raises(DataError) as e: toy((6, 3, 6)).few_shot(4)
    one_line(e, "'name 1'", 'has 3 training pictures', '4 shots', 'allow_fewer')
    assert len(toy((6, 3, 6)).few_shot(4, allow_fewer=True).train) == 11
    empty = toy((6, 0, 6))
    with pytest.raises(DataError, match='has 0 training'): empty.few_shot(1)


@pytest.mark.parametrize('n', [4, 5, 10, 37])
def test_halves(n):
    data = toy((3,)*n)
    base, new = data.base(), data.new()
    assert len(base.classnames) == math.ceil(n/2)
    assert base.classnames + new.classnames == data.classnames
    for half in (base, new):
        assert {i.label
                for i in half.train} == {i.label
                                         for i in half.test} == set(range(len(half.classnames)))
        assert all(half.classnames[i.label] == data.classnames[int(i.path[:-1])]
                   for i in half.train)
    assert len(base.train) + len(new.train) == len(data.train)


def test_a_half_of_one_class_is_refused():
    assert len(toy((2,)*3).base().classnames) == 2
    for data in (toy((2,)*3), toy((2,)*2)):
        with pytest.raises(DataError) as e: data.new()
        one_line(e, 'two classes each')


# ---- domains, transforms, templates --------------------------------------------------------------

@pytest.mark.parametrize('size', [(64, 64), (40, 30)])
def test_domains_are_pure_and_rgb(size):
    image = picture(size=size)
    before = image.tobytes()
    for name, f in DOMAINS.items():
        out = f(image)
        assert out.mode == 'RGB'
        assert out.size == (size[::-1] if name == 'rotated' else size)
        assert out.tobytes() == f(image).tobytes()
    assert image.tobytes() == before
    assert rotate90(rotate90(rotate90(rotate90(image)))).tobytes() == before


def test_edge_map_by_hand():
    grey = np.full((8, 8), 200, np.uint8)
    grey[:, 4:] = 50
    out = np.asarray(edge_map(Image.fromarray(grey).convert('RGB')))[..., 0]
    assert (out[:, 3:5] == 255-150).all() and (np.delete(out, (3, 4), 1) == 255).all()


def test_pixelate_by_hand():
    black_and_white = np.zeros((64, 64, 3), np.uint8)
    black_and_white[:, ::2] = 255
    out = np.asarray(pixelate(Image.fromarray(black_and_white), 8))
    assert (abs(out.astype(int)-127) <= 1).all()
    blocks = np.asarray(pixelate(picture(size=(64, 64)), 11))
    assert np.unique(blocks, axis=0).shape[0] == np.unique(blocks, axis=1).shape[1] == 11


def test_rotate90_turns_left():
    image = Image.new('RGB', (4, 4))
    image.putpixel((3, 0), (255, 0, 0))              # top right
    assert rotate90(image).getpixel((0, 0)) == (255, 0, 0)  # top left


def test_test_transform_is_resize_centre_crop_normalise():
    image = picture(size=(60, 40))
    x = test_transform(CLIP)(image)
    ref = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    back = x*torch.tensor(CLIP.std)[:, None, None] + torch.tensor(CLIP.mean)[:, None, None]
    assert x.shape == (3, 32, 32)
    assert np.allclose(back.permute(1, 2, 0)*255, np.asarray(ref), atol=1e-3)


def test_train_transform_crops_and_flips_under_torchs_seed():
    image, t = picture(size=(60, 40)), train_transform(CLIP)
    draw = lambda seed: (torch.manual_seed(seed), t(image))[1]
    assert draw(1).shape == (3, 32, 32)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    crop, flip = t.transforms[:2]
    assert tuple(crop.scale) == (.08, 1.)
    assert tuple(crop.ratio) == (3/4, 4/3)
    assert crop.interpolation.value == 'bicubic'
    assert flip.p == .5
    assert len(train_transform(CLIP, flip=False).transforms) == len(t.transforms)-1


def test_templates():
    assert all(t.count('{}') == 1 for t in [*ENSEMBLE, *PICTOGRAM_TEMPLATES])
    assert len(ENSEMBLE) == 7 and len(set(PICTOGRAM_TEMPLATES)) == len(PICTOGRAM_TEMPLATES)
    for paper, listed in TEMPLATES.items():
        for name, t in listed.items():
            several = t if isinstance(t, list) else [t]
            assert all(s.count('{}') == 1 for s in several), (paper, name)


@pytest.mark.parametrize('paper,dataset,sentence', [
    ('coop', 'oxford_pets', 'a photo of a {}, a type of pet.'),
    ('coop', 'dtd', '{} texture.'),
    ('coop', 'food101', 'a photo of {}, a type of food.'),
    ('coop', 'pictograms', 'an icon of a {}.'),
    ('metaprompt', 'emoji', 'an icon of a {}'),
    ('provp', 'OxfordPets', 'a type of pet, a photo of a {}.'),
    ('provp', 'FGVCAircraft', 'a type of aircraft, a photo of a {}.'),
    ('provp', 'DescribableTextures', 'a texture of {}.'),
    ('provp', 'my_folder', 'a photo of a {}.'),
    ('metaprompt', 'eurosat', 'a centered satellite photo of {}'),
    ('metaprompt', 'caltech101', 'a photo of a {}'),
])
def test_each_paper_has_its_sentences(paper, dataset, sentence):
    assert template_of(dataset, paper) == sentence


def test_metaprompt_averages_eight_on_imagenet():
    eight = template_of('imagenet', 'metaprompt')
    assert len(set(eight)) == 8 and not any(t.endswith('.') for t in eight)


def test_an_unknown_paper_is_named():
    with pytest.raises(DataError, match="unknown paper 'cop': did you mean 'coop'"):
        template_of('dtd', 'cop')


# ---- scale ---------------------------------------------------------------------------------------

class Nowhere:
    "Marks without files, counted"
    def __init__(self): self.asked = Counter()

    def mark(self, path):
        self.asked[path] += 1
        return path


def big(n, classes, **kwargs):
    items = [Item(f'{i}.jpg', i % classes, f'look {i % 3}') for i in range(n)]
    names = [f'class {c}' for c in range(classes)]
    return DataSet('big', names, items, items[:n//2], source=Nowhere(), val=items[:n//3], **kwargs)


def test_items_are_small():
    items = big(30, 3).train
    assert not hasattr(items[0], '__dict__')
    assert len({id(i.domain) for i in items}) == 3   # one string for each domain
    again = pickle.loads(pickle.dumps(items))
    assert again == items and len({id(i.domain) for i in again}) == 3
    with pytest.raises(FrozenInstanceError): items[0].label = 1


@pytest.mark.parametrize('by_domain', [False, True])
def test_nothing_grows_with_pictures_times_classes(by_domain):
    start = process_time()
    data = big(15_000, 5_000, by_domain=by_domain)
    few = data.few_shot(1, allow_fewer=True)
    base, new = data.base(), data.new()
    prints = {d.fingerprint for d in (data, few, base, new)}
    assert process_time() - start < 4   # 75 million steps would take longer
    assert len(prints) == 4 and len(base.train) == len(new.train) == 7_500
    assert len(few.train) == (15_000 if by_domain else 5_000)


def test_a_file_is_looked_at_once():
    data = big(60, 3)
    data.few_shot(2)
    assert not data.source.asked   # only for a fingerprint
    few, new = data.few_shot(4), replace(data, classnames=list('abcd')).new()
    prints = [few.fingerprint, data.fingerprint, data.base().fingerprint, data.fingerprint]
    assert len(data.source.asked) == 60 and set(data.source.asked.values()) == {1}
    assert prints[1] == prints[3] and len(set(prints)) == 3
    assert new.fingerprint not in prints


def test_what_was_changed_is_looked_at_again():
    data = big(60, 3)
    before = data.fingerprint
    data.train = data.train[1:]
    assert data.fingerprint != before
    again = pickle.loads(pickle.dumps(data))
    assert not {'fingerprint', '_looked'} & set(vars(again))
    assert again.fingerprint == data.fingerprint


def test_a_fingerprint_is_that_of_the_first_edition(tmp_path):
    "Stored results and caches find their data again"
    paths = [tmp_path/'a'/f'{i}.png' for i in range(2)]
    (tmp_path/'a').mkdir()
    for i, path in enumerate(paths): path.write_bytes(b'x'*(i+1))
    items = [Item(str(path), i) for i, path in enumerate(paths)]
    data = DataSet('toy', ['a', 'b'], items, items[:1], source=Files(str(tmp_path)))
    marks = [['a/0.png 1', 0], ['a/1.png 2', 1]]
    parts = ['toy', ['a', 'b'], marks, marks[:1], 'as_drawn']
    assert data.fingerprint == hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def test_broken_pictures_in_order_whichever_thread_is_first(folder):
    paths = [str(p) for p in sorted(folder.glob('*/*.png'))]*40   # several packs
    for path in set(paths[1::5]): Path(path).write_bytes(b'')
    one, many = (all_broken(paths, threads) for threads in (1, 8))
    assert list(one.items()) == list(many.items())
    assert set(one) == {p for p in paths if os.path.getsize(p) == 0}


def test_looking_leaves_warnings_as_they_were(folder, monkeypatch):
    before = list(warnings.filters)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)   # pictures have 400: a warning
    path = str(next(folder.glob('*/*.png')))
    assert 'million pixels' in all_broken([path])[path]
    assert warnings.filters == before


# ---- what ships ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name,task', [(n, t) for n in ('pictograms', 'emoji') for t in TASKS[n]])
def test_shipped_tasks(name, task):
    data = load_dataset(name, task)
    assert (data.name, data.task, data.template) == (name, task, 'an icon of a {}.')
    assert data.classnames == sorted(set(data.classnames))
    assert not any('_' in c for c in data.classnames)
    assert not {i.path for i in data.train} & {i.path for i in data.test}
    assert all(i.domain for i in data.train)
    every = set(range(len(data.classnames)))
    assert {i.label for i in data.train} == {i.label for i in data.test} == every
    for item in (data.train[0], data.test[-1]):
        image = data.read(item)
        assert image.size == (64, 64) and image.mode == 'RGB' and np.asarray(image).std() > 5


@pytest.mark.parametrize('task', SUITE)
def test_small_worlds(task):
    data = load_dataset(task=task)
    parts = dict(train=data.train, val=data.val, test=data.test)
    assert len(data.classnames) >= 12 and len(data.test) >= 100
    for part, least in (('train', 8), ('val', 1), ('test', 3)):
        count = Counter(i.label for i in parts[part])
        assert min(count[label] for label in range(len(data.classnames))) >= least, part
    hands = [{i.domain for i in items} for items in parts.values()]
    assert not (hands[0] & hands[1] or hands[0] & hands[2] or hands[1] & hands[2])
    assert data.flip == SUITE[task].flip and data.crop_scale == (.6, 1.)
    assert data.domain is SUITE[task].look
    few = data.few_shot(16)
    assert max(Counter(i.label for i in few.train).values()) <= 16
    assert len(data.few_shot(1000).train) == len(data.train)


def test_a_look_is_part_of_the_fingerprint():
    arrows = load_dataset(task='arrows')
    seen = {replace(arrows, domain=world.look).fingerprint for world in SUITE.values()}
    assert len(seen) == len({world.look for world in SUITE.values()}) == 4


def test_a_world_and_a_folder_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_name('tools') == ('pictograms', 'tools')
    (tmp_path/'tools').mkdir()
    with pytest.raises(ValueError) as e: split_name('tools')
    one_line(e, 'pictograms/tools', './tools')
    assert split_name('pictograms/tools') == ('pictograms', 'tools')
    assert split_name('./tools')[0] == Path('tools')


def test_pictograms_protocol(pictograms):
    for label in range(len(pictograms.classnames)):
        train, test = ([i for i in s if i.label == label]
                       for s in (pictograms.train, pictograms.test))
        assert len(train) >= 16
        assert len(test) >= 8
        assert not {i.domain for i in train} & {i.domain for i in test}
    assert pictograms.task == 'pixels' and pictograms.crop_scale == (.6, 1.) and not pictograms.flip
    icons, styles = load_dataset(task='icons'), load_dataset(task='styles')
    assert icons.train == pictograms.train == styles.train
    assert not {i.path for i in styles.test} & {i.path for i in icons.test}
    assert not set(load_dataset('emoji').classnames) & set(icons.classnames)
    pixels = DOMAINS['pixels'](icons.read(icons.test[0]))
    assert pixels.tobytes() == pictograms.read(pictograms.test[0]).tobytes()


def test_pictures_feed_a_loader(pictograms):
    few = pictograms.few_shot(1)
    pictures = few.pictures('train', test_transform(CLIP))
    alone = list(DataLoader(pictures, batch_size=30))
    assert [b[0].shape for b in alone] == [(30, 3, 32, 32), (30, 3, 32, 32), (20, 3, 32, 32)]
    assert torch.cat([b[1] for b in alone]).tolist() == list(range(80))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Python 3.12 on: fork after threads
        workers = list(DataLoader(pictures, batch_size=30, num_workers=2))
    assert all(torch.equal(a, b) for x, y in zip(alone, workers) for a, b in zip(x, y))
    with pytest.raises(DataError) as e: few.pictures('tset', None)
    one_line(e, "did you mean 'test'", 'train, test')


def test_pictures_travel_light(pictograms):
    "What a spawned worker receives: paths, not decoded pictures"
    sent = pickle.dumps(pictograms.pictures('test', test_transform(CLIP)))
    assert len(sent) < 1e6
    image, label = pickle.loads(sent)[3]
    assert torch.equal(image, pictograms.pictures('test', test_transform(CLIP))[3][0])
    assert label == pictograms.test[3].label


def test_fingerprints(pictograms, folder, tmp_path):
    prints = [
        d.fingerprint
        for d in (pictograms, load_dataset(task='edges'), pictograms.base(), pictograms.new(),
                  pictograms.few_shot(1, 1), pictograms.few_shot(1, 2),
                  replace(pictograms, classnames=pictograms.classnames[::-1]))
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == load_dataset(task='pixels').fingerprint
    assert prints[4] == pictograms.few_shot(1, 1).fingerprint
    t = test_transform(CLIP)
    of_test = lambda d, t: d.pictures('test', t).fingerprint
    assert of_test(pictograms, t) == of_test(pictograms.few_shot(2), t)
    assert of_test(pictograms, t) != of_test(pictograms, train_transform(CLIP))
    before = load_dataset(folder).fingerprint
    os.renames(folder, tmp_path/'elsewhere'/'pets')
    assert load_dataset(tmp_path/'elsewhere'/'pets').fingerprint == before
    picture(9, (33, 33)).save(tmp_path/'elsewhere'/'pets'/'cat'/'00.png')
    assert load_dataset(tmp_path/'elsewhere'/'pets').fingerprint != before


@pytest.fixture
def shelf(tmp_path):
    """A small benchmark in the shipped format, with a class that pandas would take for a missing
    value"""
    rows = [(f'icons/{c}/{f}{i}.png', c, s, 'icons', f, f, 'plain')
            for c in ('null', 'bell')
            for f, s in (('a', 'train'), ('b', 'test'))
            for i in range(3)]
    frame = pd.DataFrame(rows, columns='file class split part set family style'.split())
    frame.to_csv(tmp_path/'pictograms.csv', index=False)
    with zipfile.ZipFile(tmp_path/'pictograms.zip', 'w') as z:
        for i, r in enumerate(rows):
            with z.open(r[0], 'w') as f: picture(i).save(f, 'PNG')
    return tmp_path


def test_root_and_a_class_called_null(shelf):
    data = load_dataset(root=shelf, task='icons')
    assert data.classnames == ['bell', 'null']
    assert len(data.train) == len(data.test) == 6
    assert data.train[0].domain == 'a'
    assert data.read(data.train[0]).tobytes() == picture(6).tobytes()


def test_archive_damaged_or_missing(shelf):
    whole = (shelf/'pictograms.zip').read_bytes()
    (shelf/'pictograms.zip').write_bytes(whole[:len(whole)//2])
    data = load_dataset(task='pixels', root=shelf)
    with pytest.raises(DataError) as e: data.read(data.train[0])
    one_line(e, 'pictograms.zip', 'damaged', 'reinstall')
    (shelf/'pictograms.zip').unlink()
    with pytest.raises(DataNotFound) as e: load_dataset(task='pixels', root=shelf)
    one_line(e, 'pictograms.zip', 'missing', 'reinstall')


@pytest.mark.parametrize('part', ['styles', 'emoji'])
def test_archive_without_a_part(shelf, part):
    with pytest.raises(DataError) as e:
        load_dataset(*(('emoji', ) if part == 'emoji' else ('pictograms', 'styles')), root=shelf)
    one_line(e, part, 'pictograms.csv')


def test_archive_lacks_a_listed_picture(shelf):
    table = pd.read_csv(shelf/'pictograms.csv', keep_default_na=False)
    table.loc[0, 'file'] = 'icons/null/gone.png'
    table.to_csv(shelf/'pictograms.csv', index=False)
    data = load_dataset(task='pixels', root=shelf)
    with pytest.raises(DataError) as e: [data.read(i) for i in data.train]
    one_line(e, 'gone.png', 'pictograms.zip')


# ---- your own folder -----------------------------------------------------------------------------

def test_flat_folder(folder):
    data = load_dataset(folder)
    assert data.classnames == ['cat', 'eel', 'guide dog']
    assert data.name == 'pets'
    assert repr(data) == 'pets: 3 classes, 12 training and 6 test pictures'
    # the last third, no seed
    assert [os.path.basename(i.path) for i in data.test if i.label == 0] == ['04.png', '05.png']
    assert data.crop_scale == (.08, 1.) and data.flip
    image, label = data.pictures('train', train_transform(CLIP))[0]
    assert image.shape == (3, 32, 32) and label == 0
    assert load_dataset(str(folder)).fingerprint == data.fingerprint
    assert load_dataset('pets', root=folder.parent).fingerprint == data.fingerprint


def test_relative_folder_survives_a_change_of_directory(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    data = load_dataset('pets')
    monkeypatch.chdir('/')
    assert data.read(data.train[0]).size == (20, 20)


def test_two_pictures_are_enough(tmp_path):
    for c in 'ab': fill(tmp_path/c, 2)
    data = load_dataset(tmp_path)
    assert len(data.train) == len(data.test) == 2
    (tmp_path/'b'/'01.png').unlink()
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, "'b'", 'one picture', 'two')


@pytest.mark.parametrize('test', ['test', 'val'])
def test_parted_folder(tmp_path, test):
    for c in 'ab': fill(tmp_path/'train'/c, 4); fill(tmp_path/test/c, 1, start=9)
    (tmp_path/'notes').mkdir()  # not a class: the split folders tell the layout
    data = load_dataset(tmp_path)
    assert data.classnames == ['a', 'b']
    assert (len(data.train), len(data.test)) == (8, 2)
    assert f'/{test}/' in data.test[0].path.replace('\\', '/')


def test_train_alone_is_split(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 6)
    assert repr(load_dataset(tmp_path)).endswith('2 classes, 8 training and 4 test pictures')


def test_train_can_be_a_class(tmp_path):
    for c in ('train', 'tram'): fill(tmp_path/c, 3)
    assert load_dataset(tmp_path).classnames == ['train', 'tram']


def test_hidden_files_other_files_and_endings(folder):
    (folder/'cat'/'._00.png').write_bytes(b'resource fork')
    (folder/'cat'/'notes.txt').write_text('x')
    (folder/'.ipynb_checkpoints').mkdir()
    picture().save(folder/'cat'/'zz.JPG', 'JPEG')
    fill(folder/'cat'/'more', 2)
    data = load_dataset(folder)
    assert len(data.classnames) == 3 and len(data.train + data.test) == 21


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', '1'])
def test_modes_become_rgb_on_white(folder, mode):
    image = Image.new('RGBA', (8, 8),
                      (0, 0, 0, 0)).convert(mode) if 'A' in mode else picture().convert(mode)
    image.save(folder/'cat'/'00.png')
    data = load_dataset(folder)
    out = data.read(data.train[0])
    assert out.mode == 'RGB' and ('A' not in mode or np.asarray(out).min() == 255)


# ---- bad input -----------------------------------------------------------------------------------

def test_missing_folder(tmp_path):
    for where in (tmp_path/'gone', str(tmp_path/'gone'), './gone'):
        with pytest.raises(FileNotFoundError) as e: load_dataset(where)
        one_line(e, 'no folder', 'gone')
    with pytest.raises(DataNotFound): load_dataset('gone', root=tmp_path)


@pytest.mark.parametrize('name,near', [
    ('pictogram', 'pictograms'), ('Emoji', 'emoji'), ('zzz', None)])
def test_unknown_name(name, near):
    with pytest.raises(ValueError) as e: load_dataset(name)
    message = one_line(e, name, 'pictograms, emoji', 'folder')
    assert (f"did you mean '{near}'" in message) if near else 'did you mean' not in message


@pytest.mark.parametrize('args,near', [
    (('pictograms', 'pixel'), 'pixels'), (('pictograms', 'edge'), 'edges'),
    (('emoji', 'rotate'), 'rotated')])
def test_unknown_task(args, near):
    with pytest.raises(DataError) as e: load_dataset(*args)
    one_line(e, f"did you mean '{near}'", 'icons, edges, pixels, rotated')


def test_emoji_have_no_styles_and_folders_no_tasks(folder):
    with pytest.raises(DataError, match='task of emoji'): load_dataset('emoji', 'styles')
    with pytest.raises(DataError) as e: load_dataset(folder, 'pixels')
    one_line(e, 'no tasks', 'leave it out')


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(DataError) as e: load_dataset(folder/'cat'/'00.png')
    one_line(e, '00.png', 'is a file', 'folder')


@pytest.mark.parametrize('make', [
    lambda p: None, lambda p: (p/'cat').mkdir(), lambda p: fill(p),
    lambda p: (fill(p/'train'), (p/'test').mkdir())], ids='empty noimages flat trainflat'.split())
def test_folder_without_images(tmp_path, make):
    make(tmp_path)
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    message = one_line(e, str(tmp_path))
    assert 'no images' in message or 'no readable images' in message


def test_one_class_only(tmp_path):
    fill(tmp_path/'cat')
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, "'cat'", 'one class', 'at least two')


def test_one_class_has_no_images(folder):
    (folder/'fox').mkdir()
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, "'fox'", 'no readable images', 'remove')


@pytest.mark.parametrize('name', ['_', ' ', '__ _'])
def test_empty_class_name(folder, name):
    fill(folder/name, 3)
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, 'empty class name', 'rename')


def test_two_folders_with_one_name(folder):
    fill(folder/'guide dog', 3)
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, "'guide dog'", "'guide_dog'", 'same class name')


def test_empty_test_part(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3)
    (tmp_path/'test'/'a').mkdir(parents=True)
    with pytest.raises(DataNotFound) as e: load_dataset(tmp_path)
    one_line(e, 'test', 'no images', 'remove')


def test_test_part_with_other_classes(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3)
    for c in 'ac': fill(tmp_path/'test'/c, 1)
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, 'lacks: c', 'same class folders')


def break_(path, how):
    if how == 'empty': path.write_bytes(b'')
    elif how == 'text': path.write_text('not an image')
    elif how == 'bit':
        b = bytearray(path.read_bytes())
        b[len(b) // 2] ^= 255
        path.write_bytes(bytes(b))
    else: path.write_bytes(path.read_bytes()[:path.stat().st_size//2])


@pytest.mark.parametrize('ending,how', [
    ('png', 'empty'), ('png', 'text'), ('png', 'bit'), ('png', 'cut'), ('jpg', 'empty'),
    ('jpg', 'text'), ('jpg', 'cut'), ('bmp', 'cut')])
def test_unreadable_image_is_named_and_the_rest_usable(tmp_path, ending, how):
    for c in 'ab': fill(tmp_path/c, 6, ending)
    break_(tmp_path/'a'/f'01.{ending}', how)
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, '1 of 12 images', os.path.join('a', f'01.{ending}'), 'skip_broken=True')
    with pytest.warns(UserWarning, match=f'1 of 12 images .*01.{ending}; left out') as said:
        data = load_dataset(tmp_path, skip_broken=True)
    assert said[0].filename == __file__  # the warning points at the caller
    assert len(data.train + data.test) == 11
    for s in ('train', 'test'):
        assert all(image.shape == (3, 32, 32)
                   for image, _ in data.pictures(s, test_transform(CLIP)))


def test_broken_test_picture_and_a_long_list(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3); fill(tmp_path/'test'/c, 12)
    for p in (tmp_path/'test'/'a').iterdir(): break_(p, 'text')
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, '12 of 24', 'and 2 more')
    with pytest.warns(UserWarning): assert len(load_dataset(tmp_path, skip_broken=True).test) == 12


def test_test_part_with_nothing_but_broken_images(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3); break_(fill(tmp_path/'test'/c, 1)/'00.png', 'cut')
    with pytest.warns(UserWarning), pytest.raises(DataError) as e:
        load_dataset(tmp_path, skip_broken=True)
    one_line(e, 'test', 'can be read')


def test_class_with_nothing_but_broken_images(folder):
    for p in (folder/'eel').iterdir(): break_(p, 'text')
    with pytest.warns(UserWarning), pytest.raises(DataError) as e:
        load_dataset(folder, skip_broken=True)
    one_line(e, "'eel'", 'no readable images')


def test_image_that_breaks_after_loading(folder):
    data = load_dataset(folder)
    break_(folder/'cat'/'00.png', 'text')
    with pytest.raises(DataError) as e: data.pictures('train', test_transform(CLIP))[0]
    one_line(e, '00.png', 'cannot read', 'skip_broken')
    (folder/'cat'/'00.png').unlink()
    with pytest.raises(DataError, match='00.png'): data.read(data.train[0])


def test_data_set_by_hand():
    with pytest.raises(DataError) as e: DataSet('mine', ['cat', ' '], [], [])
    one_line(e, "'mine'", 'class 1', 'empty name')
    with pytest.raises(DataError) as e: DataSet('mine', ['cat', 'dog'], [Item('x', 2)], [])
    one_line(e, 'train label 2', '0 to 1')
    with pytest.raises(DataError) as e:
        DataSet('mine', ['cat', 'dog'], [Item('x', 1)], []).pictures('test', None)
    one_line(e, 'no test pictures')


# ---- pictures in all their forms -----------------------------------------------------------------

def stored(image, format, **kwargs):
    out = BytesIO()
    image.save(out, format, **kwargs)
    return Image.open(out)

def halves(mode='RGB', left='red', right='blue'):
    image = Image.new('RGB', (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image.convert(mode)

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_upright(turn, format):
    "All eight notes of EXIF, undone by hand"
    T = Image.Transpose
    undo = {2: [T.FLIP_LEFT_RIGHT], 3: [T.ROTATE_180], 4: [T.FLIP_TOP_BOTTOM], 5: [T.TRANSPOSE],
            6: [T.ROTATE_270], 7: [T.TRANSVERSE], 8: [T.ROTATE_90]}.get(turn, [])
    note, source = Image.Exif(), picture(size=(16, 8))
    note[0x0112] = turn
    image = stored(source, format, exif=note, **(dict(lossless=True) if format == 'WEBP' else {}))
    expected = stored(source, 'JPEG').convert('RGB') if format == 'JPEG' else source
    for t in undo: expected = expected.transpose(t)
    assert to_rgb(image).tobytes() == expected.tobytes()
    assert to_rgb(image).size == ((8, 16) if turn > 4 else (16, 8))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_a_broken_note_is_no_reason_to_refuse():
    file = BytesIO()
    halves().save(file, 'JPEG')
    note = b'\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff'
    image = Image.open(BytesIO(b'\xff\xd8' + note + file.getvalue()[2:]))
    assert to_rgb(image).size == (8, 4)


def test_to_rgb_by_hand():
    def near(image, at, colour, by=6):
        return np.abs(np.array(to_rgb(image).getpixel(at), int) - colour).max() <= by
    cmyk = stored(halves('CMYK'), 'JPEG', quality=100)
    assert cmyk.mode == 'CMYK'
    assert near(cmyk, (1, 1), (255, 0, 0), 12)
    assert near(cmyk, (6, 1), (0, 0, 255), 12)
    deep = stored(Image.fromarray(np.array([[0, 65535, 32768, 256]]*4, np.uint16)), 'PNG')
    assert [to_rgb(deep).getpixel((x, 0))[0] for x in range(4)] == [0, 255, 128, 1]
    # as PIL opened 16 bits in former times
    old = Image.fromarray(np.array([[0, 65535, 32768, 256]]*4, np.int32))
    assert old.mode == 'I' and to_rgb(old).tobytes() == to_rgb(deep).tobytes()
    palette = halves('P', (0, 0, 0), (0, 0, 255))
    palette.info['transparency'] = palette.getpixel((0, 0))
    gif = stored(palette, 'PNG', transparency=palette.getpixel((0, 0)))
    assert gif.mode == 'P' and near(gif, (1, 1), (255,)*3, 0) and near(gif, (6, 1), (0, 0, 255), 0)
    grey = stored(Image.merge('LA', (Image.new('L', (8, 4), 0), Image.new('L', (8, 4), 128))),
                  'PNG')
    assert near(grey, (0, 0), (127,)*3, 1)
    assert near(stored(halves('1', 'black', 'white'), 'PNG'), (7, 0), (255,)*3, 0)


@pytest.mark.parametrize('image,says', [
    (Image.fromarray(np.ones((4, 4), np.float32)), 'fractions'),
    (Image.fromarray(np.full((4, 4), 70_000, np.int32)), '32 bits')])
def test_pixels_whose_scale_nobody_knows(folder, image, says):
    image.save(folder/'cat'/'00.tiff')
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, os.path.join('cat', '00.tiff'), says, 'save it')


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_of_an_animation_the_first_frame(tmp_path, format):
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'lime', 'blue')]
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(3):
            frames[0].save(tmp_path/c/f'{i}.{format.lower()}', format, save_all=True,
                           append_images=frames[1:])
    # a table may name any file that PIL reads
    rows = [f'{c}/{i}.{format.lower()},{c}' for c in 'ab' for i in range(3)]
    text = '\n'.join(['path,label', *rows])
    (tmp_path/'t.csv').write_text(text)
    data = load_dataset(tmp_path)
    r, g, b = data.read(data.test[0]).getpixel((4, 4))
    assert r > 240 and g < 16 and b < 16


def test_absurdly_large(folder, monkeypatch):
    picture(size=(40, 40)).save(folder/'eel'/'02.png')
    for limit in (1000, 500):   # PIL warns of more than the limit and raises at twice as much
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')   # whatever the caller does with warnings
            with pytest.raises(DataError) as e: load_dataset(folder)
            one_line(e, os.path.join('eel', '02.png'), 'million pixels', '1 of 18')
        with pytest.warns(UserWarning, match='02.png; left out'):
            data = load_dataset(folder, skip_broken=True)
        assert len(data.train+data.test) == 17
        with pytest.raises(DataError) as e: data.source(str(folder/'eel'/'02.png'))
        one_line(e, '02.png', 'cannot read')


def test_what_is_wrong_is_said(folder):
    (folder/'cat'/'00.png').write_bytes(b'')
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, '(empty)', '00.png')
    (folder/'eel'/'01.PNG').write_text('text')
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, '2 of 19', 'damaged or no image, empty', '01.PNG')


# ---- folders: names in words, val, origin --------------------------------------------------------

def test_origin_and_split_of_folders(folder, monkeypatch):
    data = load_dataset(folder)
    assert data.origin == dict(name=str(folder))
    assert data.split == 'last third of each class held back'
    assert data.val == []
    monkeypatch.chdir(folder.parent)
    assert load_dataset('./pets').origin == load_dataset('pets', root='.').origin == data.origin
    assert load_dataset(**data.few_shot(1).origin).fingerprint == data.fingerprint
    (folder/'cat'/'00.png').write_text('x')
    with pytest.warns(UserWarning):
        origin = load_dataset(folder, skip_broken=True).origin
    assert origin == dict(name=str(folder), skip_broken=True)


def test_three_parts(tmp_path):
    for part, n in (('train', 4), ('val', 2), ('test', 3)):
        for c in 'ab': fill(tmp_path/part/c, n)
    data = load_dataset(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.split == 'folders train and test'
    assert len(data.few_shot(1).val) == 2
    assert len(data.pictures('val', test_transform(CLIP))) == 4
    import shutil
    shutil.rmtree(tmp_path/'val')
    assert load_dataset(tmp_path).fingerprint == data.fingerprint
    fill(tmp_path/'val'/'c', 1)
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, 'val', 'lacks: c')


@pytest.mark.parametrize('write', [
    lambda f: (f/'classnames.csv').write_text(
        'folder,name\ncat,tabby_cat\nguide_dog,"dog, for the blind"\nfox,a fox\n'), lambda f:
    (f/'classnames.json').write_text(
        json.dumps({'cat': 'tabby_cat', 'guide_dog': 'dog, for the blind', 'fox': 'a fox'}))
],
                         ids='csv json'.split())
def test_names_in_words(folder, write):
    write(folder)
    assert load_dataset(folder).classnames == ['tabby cat', 'eel', 'dog, for the blind']
    (folder/'t.csv').write_text('\n'.join([
        'path,label',
        *(f'{c}/{i:02d}.png,{c}' for c in ('cat', 'guide_dog', 'eel') for i in range(4))
    ]))
    for source in (folder, folder/'t.csv'):
        assert load_dataset(source).classnames == ['tabby cat', 'eel', 'dog, for the blind']


@pytest.mark.parametrize('file,content,says',
                         [('classnames.csv', 'cat', ['line 1', '1 cells instead of two']),
                          ('classnames.csv', 'cat,a,b', ['3 cells']),
                          ('classnames.csv', 'dog,hound', ['none of the classes', "'cat'"]),
                          ('classnames.csv', b'cat,\xff', ['UTF-8']),
                          ('classnames.csv', 'cat,eel', ["'cat'", "'eel'", 'same class name']),
                          ('classnames.csv', 'cat,_', ["'cat'", 'empty class name']),
                          ('classnames.json', '{', ['classnames.json', '{"folder": "name"}']),
                          ('classnames.json', '[]', ['"name"']),
                          ('classnames.json', '{"cat": 3}', ['"name"']),
                          ('classnames.json', '{"cow": "x"}', ['none'])])
def test_names_that_do_not_fit(folder, file, content, says):
    (folder/file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, *says)


def test_two_lists_of_names(folder):
    (folder/'classnames.csv').write_text('cat,a'); (folder/'classnames.json').write_text('{}')
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, 'classnames.csv', 'classnames.json', 'keep one')


# ---- tables --------------------------------------------------------------------------------------

def table(folder, rows, header='path,label', name='t.csv'):
    (folder/name).write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return folder/name

CLASSES = ('cat', 'eel', 'guide_dog')
ROWS = [f'{c}/{i:02d}.png,{c}' for c in CLASSES for i in range(6)]


def short(items):
    return [(i.path.replace('\\', '/').rsplit('/', 2)[1:], i.label, i.domain) for i in items]


def test_table_is_the_folder(folder):
    "Whatever the order of its lines, and by either door"
    whole = load_dataset(folder)
    a = load_dataset(table(folder, random.Random(1).sample(ROWS, len(ROWS))))
    assert short(a.train) == short(whole.train)
    assert short(a.test) == short(whole.test)
    assert a.classnames == whole.classnames
    assert a.split == whole.split
    b = load_dataset(folder)
    assert b.fingerprint == a.fingerprint
    assert a.name == b.name == 't'
    assert a.origin == dict(name=str(folder/'t.csv'))
    assert load_dataset(**b.origin).fingerprint == a.fingerprint
    assert load_dataset(table(folder, [r.replace(',', '\t') for r in ROWS], 'path\tlabel',
                              't.TSV')).train == a.train


def test_table_with_splits(folder):
    rows = [f'{r},{p}' for r, p in zip(ROWS, ['train', 'Train', 'val', 'test', 'train', 'TEST']*3)]
    data = load_dataset(table(folder, rows[::-1], ' Path , LABEL,split'))
    assert [len(x) for x in (data.train, data.val, data.test)] == [9, 3, 6]
    assert data.split == 'column split of t.csv'
    # its own order: few shots depend on it
    assert short(data.train)[0] == (['guide_dog', '04.png'], 2, '')
    assert data.few_shot(1).val and data.train[0].domain == ''


def test_table_with_domains(folder):
    rows = [f'{r},{"north" if i % 3 else "south"},more' for i, r in enumerate(ROWS)]
    data = load_dataset(table(folder, rows, 'path,label,domain,note'))
    assert data.domains == ['north', 'south']
    assert not data.by_domain
    assert data.task == ''
    assert len(data.train) == 12
    alone = load_dataset(folder/'t.csv', task='south')
    assert alone.domains == ['south']
    assert (len(alone.train), len(alone.test)) == (3, 3)
    assert alone.task == 'south'
    assert not alone.by_domain
    assert alone.origin == dict(name=str(folder/'t.csv'), task='south')
    out = load_dataset(folder/'t.csv', 'south', sources='rest')
    assert {i.domain for i in out.test} == {'south'}
    assert {i.domain for i in out.train} == {'north'}
    assert (len(out.train), len(out.test)) == (12, 6)
    assert out.task == 'south'
    assert out.by_domain
    assert out.split == 'tested on south, trained on north'
    assert out.origin == alone.origin | dict(sources='rest')
    for d in (alone, out):
        assert load_dataset(**d.origin).fingerprint == d.fingerprint
        assert json.loads(json.dumps(d.origin)) == d.origin
    assert out.pictures('test', test_transform(CLIP)).domains.tolist() == [1]*6
    image, label = out.few_shot(1).pictures('train', test_transform(CLIP))[0]
    assert image.shape == (3, 32, 32)


def test_shots_from_each_domain_of_a_table(folder):
    rows = [f'{r},{"abc"[i % 3]},{"test" if i % 6 > 2 else "train"}' for i, r in enumerate(ROWS)]
    data = load_dataset(table(folder, rows, 'path,label,domain,split'), task='a',
                        sources=['c', 'b'])
    shots = Counter((i.domain, i.label) for i in data.few_shot(1).train)
    assert shots == {(d, l): 1 for d in 'bc' for l in range(3)}
    assert {i.domain for i in data.test} == {'a'}
    assert len(data.test) == 3
    assert data.origin['sources'] == ['c', 'b']
    assert load_dataset(**data.origin).fingerprint == data.fingerprint
    assert {i.domain for i in load_dataset(folder/'t.csv', task='a', sources='b').train} == {'b'}


def test_absolute_paths_and_other_folders(folder, tmp_path):
    (tmp_path/'lists').mkdir()
    data = load_dataset(table(tmp_path/'lists', [f'{folder}/{r}' for r in ROWS]))
    assert short(data.train) == short(load_dataset(folder).train)
    assert data.fingerprint
    assert data.read(data.train[0]).size == (20, 20)


def test_a_table_beside_the_pictures_or_not_at_all(folder):
    (folder/'notes.csv').write_text('file,comment\n')
    (folder/'broken.csv').write_bytes(b'\xff\xfe')
    assert load_dataset(folder).name == 'pets'   # not tables of pictures
    table(folder, ROWS), table(folder, ROWS, name='u.csv')
    with pytest.raises(DataError) as e: load_dataset(folder)
    one_line(e, 't.csv, u.csv', 'give the path')
    assert load_dataset(folder/'u.csv').name == 'u'


def test_broken_pictures_of_a_table(folder):
    break_(folder/'cat'/'01.png', 'cut')
    with pytest.raises(DataError) as e: load_dataset(table(folder, ROWS))
    one_line(e, '1 of 18', 'cat/01.png', 'skip_broken')
    with pytest.warns(UserWarning, match='01.png; left out') as said:
        data = load_dataset(folder/'t.csv', skip_broken=True)
    assert said[0].filename == __file__
    assert len(data.train+data.test) == 17
    assert data.origin['skip_broken']


R = ROWS
@pytest.mark.parametrize(
    'header,rows,says',
    [('path,label', [], ['lists no pictures', 'path,label']), ('', [], ['lists no pictures']),
     ('file,label', R, ["no column 'path'", 'file, label']),
     ('path;label', [r.replace(',', ';') for r in R], ["no column 'path'", 'with commas between']),
     ('path,class', R, ["no column 'label'"]),
     ('path,label,label', [f'{r},x' for r in R], ['two columns of the same name']),
     ('path,label', [*R[:3], 'cat/03.png'], ['line 5', '1 cells under 2']),
     ('path,label', [*R, 'cat/03.png,cat,x'], ['line 20', '3 cells']),
     ('path,label', ['cat/03.png,', *R], ['line 2', 'no label']),
     ('path,label', [',cat', *R], ['line 2', 'no path']),
     ('path,label', ['../pets/cat/03.png,cat', *R], ['line 2', 'leaves the folder', 'absolute']),
     ('path,label', ['cat/../eel/03.png,cat', *R], ['leaves the folder']),
     ('path,label', ['a\\..\\b.png,cat', *R], ['leaves']),
     ('path,label', [*R, 'cat/00.png,eel'], ['line 20', 'line 2', 'remove one']),
     ('path,label', [*R, './cat/00.png,cat'], ['listed before']),
     ('path,label', [*R, 'cat/99.png,cat', 'x/1.png,cat'], ['2 pictures', 'line 20', '99.png']),
     ('path,label', R[:6], ['one class', 'two']),
     ('path,label', [*R[:6], 'eel/01.png,_'], ["'_'", 'empty class name']),
     ('path,label', [*R[:6], 'eel/01.png,guide dog', *R[12:]
                     ], ["'guide dog' and 'guide_dog'", 'same class name']),
     ('path,label', R[:7], ["'eel'", 'one picture']),
     ('path,label,split', [f'{r},trian' for r in R], ['line 2', "'trian'", 'train, val or test']),
     ('path,label,split', [f'{r},' for r in R], ['line 2', 'no split']),
     ('path,label,split', [f'{r},train' for r in R], ['no test picture']),
     ('path,label,split', [f'{r},test' for r in R], ["class 'cat'", 'no training picture']),
     ('path,label,domain', [f'{r},' for r in R], ['line 2', 'no domain']),
     ('path,label', ['"cat/03.png,cat', *R], ['t.csv', 'cannot read'])])
def test_table_that_cannot_be_used(folder, header, rows, says):
    with pytest.raises(DataError) as e: load_dataset(table(folder, rows, header))
    one_line(e, 't.csv', *says)


@pytest.mark.parametrize('args,says',
                         [(dict(task='south'), ["no column 'domain'", 'leave task out']),
                          (dict(sources='rest'), ["no column 'domain'", 'leave sources out'])])
def test_table_without_domains(folder, args, says):
    with pytest.raises(DataError) as e: load_dataset(table(folder, ROWS), **args)
    one_line(e, *says)
    (folder/'t.csv').unlink()
    with pytest.raises(DataError) as e: load_dataset(folder, **args)
    one_line(e, 'a folder has no tasks', 'column')


@pytest.mark.parametrize(
    'args,says',
    [(dict(task='soth'), ["did you mean 'south'"]),
     (dict(sources='rest'), ['need a task', 'north, south']),
     (dict(task='south', sources=['norht']), ["did you mean 'north'"]),
     (dict(task='south', sources=[]), ['one or more domains']),
     (dict(task='south', sources=['south', 'north']), ['other than the task']),
     (dict(task='east', sources='rest'), ["class 'cat'", 'no training picture in the domains']),
     (dict(task='south'), ["class 'cat'", 'no training picture of domain south'])])
def test_domains_that_are_not_there(folder, args, says):
    rows = [
        f'{r},{"east" if r.startswith("cat") else "north" if i % 2 else "south"}'
        for i, r in enumerate(ROWS)
    ]
    with pytest.raises(DataError) as e:
        load_dataset(table(folder, rows, 'path,label,domain'), **args)
    one_line(e, *says)


def test_table_in_another_encoding_or_gone(folder):
    (folder/'t.csv').write_bytes('path,label\ncat/00.png,Kätzchen'.encode('latin-1'))
    with pytest.raises(DataError) as e: load_dataset(folder/'t.csv')
    one_line(e, 't.csv', 'UTF-8')
    # as Excel saves it
    (folder/'t.csv').write_bytes('\ufeffpath,label\n'.encode() +
                                 '\r\n'.join(ROWS).replace(',cat', ',Kätzchen').encode())
    assert 'Kätzchen' in load_dataset(folder/'t.csv').classnames
    with pytest.raises(DataNotFound) as e: load_dataset(folder/'gone.csv')
    one_line(e, 'gone.csv')


# ---- any table at all ----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    root = tmp_path_factory.mktemp('pool')
    for c in 'ab': fill(root/c, 6)
    return root

POOL = [f'{c}/{i:02d}.png' for c in 'ab' for i in range(6)]
quick = settings(max_examples=20, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text('xyz é,"_', min_size=1,
                max_size=5).filter(lambda n: n.strip() == n and n.replace('_', ' ').strip())

def write(path, rows):
    import csv
    with path.open('w', newline='', encoding='utf-8') as f: csv.writer(f).writerows(rows)
    return path

@quick
@given(names=st.lists(NAMES, min_size=2, max_size=3,
                      unique_by=lambda n: ' '.join(n.replace('_', ' ').split())),
       order=st.permutations(POOL),
       data=st.data())
def test_valid_tables_load_as_written(pool, names, order, data):
    n = 12 - 2*len(names)
    some = lambda values: data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    labels = [*names, *names] + some(names)
    splits = ['train']*len(names) + ['test']*len(names) + some(['train', 'val', 'test'])
    rows = [*zip(order, labels, splits)]
    loaded = load_dataset(write(pool/'t.csv', [('path', 'label', 'split'), *rows]))
    assert loaded.classnames == [' '.join(n.replace('_', ' ').split()) for n in sorted(names)]
    for part in ('train', 'val', 'test'):
        listed = [(i.path, i.label) for i in getattr(loaded, part)]
        assert listed == [(str(pool/p), sorted(names).index(l)) for p, l, s in rows if s == part]

@quick
@given(rows=st.lists(st.lists(st.sampled_from(
    ['path', 'label', 'split', 'domain', 'train', 'test', 'a', 'b', '', '..', '\0', *POOL])
                              | st.text(max_size=4),
                              max_size=4),
                     max_size=8),
       header=st.booleans(),
       junk=st.binary(max_size=3),
       task=st.sampled_from([None, 'a']))
def test_any_table_loads_or_gets_one_line(pool, rows, header, junk, task):
    write(pool/'t.csv', [('path', 'label')]*header + rows)
    (pool/'t.csv').write_bytes((pool/'t.csv').read_bytes() + junk)
    try: load_dataset(pool/'t.csv', task=task)
    except DataError as e: assert '\n' not in str(e) and len(str(e)) < 700
