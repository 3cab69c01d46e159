"""Chapter 04: splits and shots are the papers', transforms do what they say, and bad data gets one line that helps."""
import math
import os
import pickle
import random
import warnings
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clipprompt.data import (DOMAINS, ENSEMBLE, PICTOGRAM_TEMPLATES, TASKS, TEMPLATES, DataError, DataNotFound, DataSet, Item, edge_map,
                             load_dataset, pixelate, rotate90, test_transform, train_transform)

CLIP = SimpleNamespace(image_size=32, mean=(.48, .46, .41), std=(.27, .26, .28), interpolation='bicubic')


def picture(seed=0, size=(20, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


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
def pictograms(): return load_dataset()


def one_line(error, *words):
    message = str(error.value)
    assert '\n' not in message and len(message) < 400
    for w in words: assert w in message, message
    return message


# ---- shots, halves -------------------------------------------------------------------------------------------------

def toy(sizes=(6, 6, 6), order=None):
    items = [Item(f'{c}{i}', c) for c in order or range(len(sizes)) for i in range(sizes[c])]
    return DataSet('toy', [f'name {c}' for c in range(len(sizes))], items, list(items))


def test_shots_are_pinned():
    "Python promises the same sample for ever; if it ever breaks that, results stop being comparable and we want to know"
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
    for items in by_label.values(): theirs += random.sample(items, shots) if len(items) >= shots else items
    assert data.few_shot(shots, seed, allow_fewer=True).train == theirs


def test_shots_leave_the_global_generator_alone():
    random.seed(5); before = random.getstate()
    toy().few_shot(2, 1)
    assert random.getstate() == before


def test_shots_of_interleaved_labels_and_untouched_test():
    data = toy()
    data.train = [data.train[i] for i in random.Random(0).sample(range(18), 18)]
    few = data.few_shot(3, np.int64(2))
    assert sorted(i.label for i in few.train) == [0]*3 + [1]*3 + [2]*3 and few.test == data.test and len(data.train) == 18


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
    assert len(base.classnames) == math.ceil(n/2) and base.classnames + new.classnames == data.classnames
    for half in (base, new):
        assert {i.label for i in half.train} == {i.label for i in half.test} == set(range(len(half.classnames)))
        assert all(half.classnames[i.label] == data.classnames[int(i.path[:-1])] for i in half.train)
    assert len(base.train) + len(new.train) == len(data.train)


def test_a_half_of_one_class_is_refused():
    assert len(toy((2,)*3).base().classnames) == 2
    for data in (toy((2,)*3), toy((2,)*2)):
        with pytest.raises(DataError) as e: data.new()
        one_line(e, 'two classes each')


# ---- domains, transforms, templates --------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(64, 64), (40, 30)])
def test_domains_are_pure_and_rgb(size):
    image = picture(size=size)
    before = image.tobytes()
    for name, f in DOMAINS.items():
        out = f(image)
        assert out.mode == 'RGB' and out.size == (size[::-1] if name == 'rotated' else size) and out.tobytes() == f(image).tobytes()
    assert image.tobytes() == before and rotate90(rotate90(rotate90(rotate90(image)))).tobytes() == before


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
    assert x.shape == (3, 32, 32) and np.allclose(back.permute(1, 2, 0)*255, np.asarray(ref), atol=1e-3)


def test_train_transform_crops_and_flips_under_torchs_seed():
    image, t = picture(size=(60, 40)), train_transform(CLIP)
    draw = lambda seed: (torch.manual_seed(seed), t(image))[1]
    assert draw(1).shape == (3, 32, 32) and torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    crop, flip = t.transforms[:2]
    assert tuple(crop.scale) == (.08, 1.) and tuple(crop.ratio) == (3/4, 4/3) and crop.interpolation.value == 'bicubic' and flip.p == .5
    assert len(train_transform(CLIP, flip=False).transforms) == len(t.transforms)-1


def test_templates():
    assert all(t.count('{}') == 1 for t in [*TEMPLATES.values(), *ENSEMBLE, *PICTOGRAM_TEMPLATES])
    assert len(ENSEMBLE) == 7 and len(set(PICTOGRAM_TEMPLATES)) == len(PICTOGRAM_TEMPLATES)
    assert TEMPLATES['oxford_pets'] == 'a photo of a {}, a type of pet.' and TEMPLATES['dtd'] == '{} texture.'


# ---- what ships ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,task', [(n, t) for n in ('pictograms', 'emoji') for t in TASKS[n]])
def test_shipped_tasks(name, task):
    data = load_dataset(name, task)
    assert (data.name, data.task, data.template) == (name, task, 'a photo of a {}.')
    assert data.classnames == sorted(set(data.classnames)) and not any('_' in c for c in data.classnames)
    assert not {i.path for i in data.train} & {i.path for i in data.test} and all(i.domain for i in data.train)
    assert {i.label for i in data.train} == {i.label for i in data.test} == set(range(len(data.classnames)))
    for item in (data.train[0], data.test[-1]):
        image = data.read(item)
        assert image.size == (64, 64) and image.mode == 'RGB' and np.asarray(image).std() > 5


def test_pictograms_protocol(pictograms):
    for label in range(len(pictograms.classnames)):
        train, test = ([i for i in s if i.label == label] for s in (pictograms.train, pictograms.test))
        assert len(train) >= 16 and len(test) >= 8 and not {i.domain for i in train} & {i.domain for i in test}
    assert pictograms.task == 'pixels' and pictograms.crop_scale == (.6, 1.) and not pictograms.flip
    icons, styles = load_dataset(task='icons'), load_dataset(task='styles')
    assert icons.train == pictograms.train == styles.train and not {i.path for i in styles.test} & {i.path for i in icons.test}
    assert not set(load_dataset('emoji').classnames) & set(icons.classnames)
    assert DOMAINS['pixels'](icons.read(icons.test[0])).tobytes() == pictograms.read(pictograms.test[0]).tobytes()


def test_pictures_feed_a_loader(pictograms):
    few = pictograms.few_shot(1)
    pictures = few.pictures('train', test_transform(CLIP))
    alone = list(DataLoader(pictures, batch_size=30))
    assert [b[0].shape for b in alone] == [(30, 3, 32, 32), (30, 3, 32, 32), (20, 3, 32, 32)] and torch.cat([b[1] for b in alone]).tolist() == list(range(80))
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
    assert torch.equal(image, pictograms.pictures('test', test_transform(CLIP))[3][0]) and label == pictograms.test[3].label


def test_fingerprints(pictograms, folder, tmp_path):
    prints = [d.fingerprint for d in (pictograms, load_dataset(task='edges'), pictograms.base(), pictograms.new(), pictograms.few_shot(1, 1), pictograms.few_shot(1, 2),
                                      replace(pictograms, classnames=pictograms.classnames[::-1]))]
    assert len(set(prints)) == len(prints) and prints[0] == load_dataset().fingerprint and prints[4] == pictograms.few_shot(1, 1).fingerprint
    t = test_transform(CLIP)
    assert pictograms.pictures('test', t).fingerprint == pictograms.few_shot(2).pictures('test', t).fingerprint
    assert pictograms.pictures('test', t).fingerprint != pictograms.pictures('test', train_transform(CLIP)).fingerprint
    before = load_dataset(folder).fingerprint
    os.renames(folder, tmp_path/'elsewhere'/'pets')
    assert load_dataset(tmp_path/'elsewhere'/'pets').fingerprint == before
    picture(9, (33, 33)).save(tmp_path/'elsewhere'/'pets'/'cat'/'00.png')
    assert load_dataset(tmp_path/'elsewhere'/'pets').fingerprint != before


@pytest.fixture
def shelf(tmp_path):
    "A small benchmark in the shipped format, with a class that pandas would take for a missing value"
    rows = [(f'icons/{c}/{f}{i}.png', c, s, 'icons', f, f, 'plain') for c in ('null', 'bell') for f, s in (('a', 'train'), ('b', 'test')) for i in range(3)]
    pd.DataFrame(rows, columns='file class split part set family style'.split()).to_csv(tmp_path/'pictograms.csv', index=False)
    with zipfile.ZipFile(tmp_path/'pictograms.zip', 'w') as z:
        for i, r in enumerate(rows):
            with z.open(r[0], 'w') as f: picture(i).save(f, 'PNG')
    return tmp_path


def test_root_and_a_class_called_null(shelf):
    data = load_dataset(root=shelf, task='icons')
    assert data.classnames == ['bell', 'null'] and len(data.train) == len(data.test) == 6 and data.train[0].domain == 'a'
    assert data.read(data.train[0]).tobytes() == picture(6).tobytes()


def test_archive_damaged_or_missing(shelf):
    whole = (shelf/'pictograms.zip').read_bytes()
    (shelf/'pictograms.zip').write_bytes(whole[:len(whole)//2])
    with pytest.raises(DataError) as e: (d := load_dataset(root=shelf)).read(d.train[0])
    one_line(e, 'pictograms.zip', 'damaged', 'reinstall')
    (shelf/'pictograms.zip').unlink()
    with pytest.raises(DataNotFound) as e: load_dataset(root=shelf)
    one_line(e, 'pictograms.zip', 'missing', 'reinstall')


@pytest.mark.parametrize('part', ['styles', 'emoji'])
def test_archive_without_a_part(shelf, part):
    with pytest.raises(DataError) as e: load_dataset(*(('emoji',) if part == 'emoji' else ('pictograms', 'styles')), root=shelf)
    one_line(e, part, 'pictograms.csv')


def test_archive_lacks_a_listed_picture(shelf):
    table = pd.read_csv(shelf/'pictograms.csv', keep_default_na=False)
    table.loc[0, 'file'] = 'icons/null/gone.png'
    table.to_csv(shelf/'pictograms.csv', index=False)
    data = load_dataset(root=shelf)
    with pytest.raises(DataError) as e: [data.read(i) for i in data.train]
    one_line(e, 'gone.png', 'pictograms.zip')


# ---- your own folder -----------------------------------------------------------------------------------------------

def test_flat_folder(folder):
    data = load_dataset(folder)
    assert data.classnames == ['cat', 'eel', 'guide dog'] and data.name == 'pets' and repr(data) == 'pets: 3 classes, 12 training and 6 test pictures'
    assert [os.path.basename(i.path) for i in data.test if i.label == 0] == ['04.png', '05.png']  # the last third, no seed
    assert data.crop_scale == (.08, 1.) and data.flip
    image, label = data.pictures('train', train_transform(CLIP))[0]
    assert image.shape == (3, 32, 32) and label == 0
    assert load_dataset(str(folder)).fingerprint == data.fingerprint == load_dataset('pets', root=folder.parent).fingerprint


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
    assert data.classnames == ['a', 'b'] and (len(data.train), len(data.test)) == (8, 2) and f'/{test}/' in data.test[0].path.replace('\\', '/')


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
    image = Image.new('RGBA', (8, 8), (0, 0, 0, 0)).convert(mode) if 'A' in mode else picture().convert(mode)
    image.save(folder/'cat'/'00.png')
    data = load_dataset(folder)
    out = data.read(data.train[0])
    assert out.mode == 'RGB' and ('A' not in mode or np.asarray(out).min() == 255)


# ---- bad input -----------------------------------------------------------------------------------------------------

def test_missing_folder(tmp_path):
    for where in (tmp_path/'gone', str(tmp_path/'gone'), './gone'):
        with pytest.raises(FileNotFoundError) as e: load_dataset(where)
        one_line(e, 'no folder', 'gone')
    with pytest.raises(DataNotFound): load_dataset('gone', root=tmp_path)


@pytest.mark.parametrize('name,near', [('pictogram', 'pictograms'), ('Emoji', 'emoji'), ('zzz', None)])
def test_unknown_name(name, near):
    with pytest.raises(ValueError) as e: load_dataset(name)
    message = one_line(e, name, 'pictograms, emoji', 'folder')
    assert (f"did you mean '{near}'" in message) if near else 'did you mean' not in message


@pytest.mark.parametrize('args,near', [(('pictograms', 'pixel'), 'pixels'), (('pictograms', 'edge'), 'edges'), (('emoji', 'rotate'), 'rotated')])
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


@pytest.mark.parametrize('make', [lambda p: None, lambda p: (p/'cat').mkdir(), lambda p: fill(p), lambda p: (fill(p/'train'), (p/'test').mkdir())], ids='empty noimages flat trainflat'.split())
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
    elif how == 'bit': b = bytearray(path.read_bytes()); b[len(b)//2] ^= 255; path.write_bytes(bytes(b))
    else: path.write_bytes(path.read_bytes()[:path.stat().st_size//2])


@pytest.mark.parametrize('ending,how', [('png', 'empty'), ('png', 'text'), ('png', 'bit'), ('png', 'cut'), ('jpg', 'empty'), ('jpg', 'text'), ('jpg', 'cut'), ('bmp', 'cut')])
def test_unreadable_image_is_named_and_the_rest_usable(tmp_path, ending, how):
    for c in 'ab': fill(tmp_path/c, 6, ending)
    break_(tmp_path/'a'/f'01.{ending}', how)
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, '1 of 12 images', os.path.join('a', f'01.{ending}'), 'skip_broken=True')
    with pytest.warns(UserWarning, match=f'1 of 12 images .*01.{ending}; left out') as said: data = load_dataset(tmp_path, skip_broken=True)
    assert said[0].filename == __file__  # the warning points at the caller
    assert len(data.train + data.test) == 11
    for s in ('train', 'test'): assert all(image.shape == (3, 32, 32) for image, _ in data.pictures(s, test_transform(CLIP)))


def test_broken_test_picture_and_a_long_list(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3); fill(tmp_path/'test'/c, 12)
    for p in (tmp_path/'test'/'a').iterdir(): break_(p, 'text')
    with pytest.raises(DataError) as e: load_dataset(tmp_path)
    one_line(e, '12 of 24', 'and 2 more')
    with pytest.warns(UserWarning): assert len(load_dataset(tmp_path, skip_broken=True).test) == 12


def test_test_part_with_nothing_but_broken_images(tmp_path):
    for c in 'ab': fill(tmp_path/'train'/c, 3); break_(fill(tmp_path/'test'/c, 1)/'00.png', 'cut')
    with pytest.warns(UserWarning), pytest.raises(DataError) as e: load_dataset(tmp_path, skip_broken=True)
    one_line(e, 'test', 'can be read')


def test_class_with_nothing_but_broken_images(folder):
    for p in (folder/'eel').iterdir(): break_(p, 'text')
    with pytest.warns(UserWarning), pytest.raises(DataError) as e: load_dataset(folder, skip_broken=True)
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
    with pytest.raises(DataError) as e: DataSet('mine', ['cat', 'dog'], [Item('x', 1)], []).pictures('test', None)
    one_line(e, 'no test pictures')
