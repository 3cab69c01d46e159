"""Chapter 04: the public sets in the folders of CoOp and Dassl. Splits are the published ones, to
the picture; files that cannot be trusted get one line.

No test needs the photographs: what matters is which pictures, in which order, under which names.
With the archives of Caltech101 and PACS (caltech101.tar, pacs.tar in ../shared/datasets beside
the repository, or in $CLIPPROMPT_DATA) they are read as well.
"""
import gzip
import hashlib
import json
import lzma
import os
import shutil
import warnings
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from clipprompt import public as public_module
from clipprompt.data import TEMPLATES, join, template_of
from clipprompt.pictures import DataError, DataNotFound, Item, test_transform
from clipprompt.public import PUBLIC
from clipprompt.sets import TASKS, load_dataset
from clipprompt.prompts import clean_names
from helpers import one_line, refused, works

REPO = Path(__file__).resolve().parents[1]
SHELF = next((p for p in (Path(os.environ.get('CLIPPROMPT_DATA') or '/nowhere'),
                          REPO.parent/'shared'/'datasets') if (p/'caltech101.tar').is_file()), None)
needs_archives = pytest.mark.skipif(
    SHELF is None, reason='caltech101.tar is neither in ../shared/datasets nor in $CLIPPROMPT_DATA')
CLIP = SimpleNamespace(image_size=32, mean=(.48, .46, .41), std=(.27, .26, .28),
                       interpolation='bicubic', resize_mode='shortest')
PARTS = ('train', 'val', 'test')

def png():
    out = BytesIO()
    Image.new('RGB', (8, 8), 'teal').save(out, 'PNG')
    return out.getvalue()

PNG = png()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch): monkeypatch.delenv('CLIPPROMPT_DATA', raising=False)

differs = pytest.mark.filterwarnings('ignore:.*differs from the published one')


# ---- a tiny tree for each set, in its own layout -------------------------------------------------

def touch(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for n in names: (folder/n).write_bytes(PNG)

def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines)+'\n')

def class_folders(images, classes, n=10):
    for c in classes: touch(images/c, [f'{c.lower()}_{i:03d}.jpg' for i in range(n)])

WNIDS = ['n01440764', 'n01443537', 'n01484850']   # tench, goldfish, great white shark

def imagenet(root):
    for part, n in (('train', 4), ('val', 2)):
        for w in WNIDS:
            touch(root/'imagenet'/'images'/part/w, [f'{part}_{w}_{i}.JPEG' for i in range(n)])
    text(root/'imagenet'/'classnames.txt',
         [f'{w} {n}' for w, n in zip(WNIDS, ('tench', 'gold_fish', 'great white shark'))])


def caltech101(root):
    class_folders(root/'caltech-101'/'101_ObjectCategories', [
        'BACKGROUND_Google', 'Faces', 'Faces_easy', 'Leopards', 'Motorbikes', 'airplanes',
        'yin_yang'
    ])

def oxford_pets(root):
    home = root/'oxford_pets'
    breeds = ['Abyssinian', 'american_bulldog']
    touch(home/'images', [f'{b}_{i}.jpg' for b in breeds for i in range(15)] + ['Abyssinian_1.mat'])
    lines = {
        part: [f'{b}_{i} {l} 1 1' for l, b in enumerate(breeds, 1) for i in n]
        for part, n in (('trainval', range(10)), ('test', range(10, 15)))
    }
    for part in lines: text(home/'annotations'/f'{part}.txt', lines[part])

def stanford_cars(root):
    home = root/'stanford_cars'
    (home/'devkit').mkdir(parents=True)
    names = ['AM General Hummer SUV 2000', 'Audi TTS Coupe 2012']
    savemat(home/'devkit'/'cars_meta.mat', {'class_names': np.array(names, dtype=object)})
    kind = [('bbox_x1', 'O'), ('class', 'O'), ('fname', 'O')]
    def annotate(file, folder, n):
        rows = [(3, i % 2 + 1, f'{i:05d}.jpg') for i in range(n)]
        touch(home/folder, [r[2] for r in rows])
        savemat(home/file, {'annotations': np.array(rows, dtype=kind)})
    annotate('devkit/cars_train_annos.mat', 'cars_train', 20)
    annotate('cars_test_annos_withlabels.mat', 'cars_test', 6)

def oxford_flowers(root):
    home = root/'oxford_flowers'
    touch(home/'jpg', [f'image_{i:05d}.jpg' for i in range(1, 21)])
    savemat(home/'imagelabels.mat', {'labels': np.array([[2]*10 + [1]*10], dtype=np.uint8)})
    text(home/'cat_to_name.json', [json.dumps({'2': 'canterbury bells', '1': 'pink primrose'})])

def food101(root): class_folders(root/'food-101'/'images', ['apple_pie', 'baby_back_ribs'])

def fgvc_aircraft(root):
    home = root/'fgvc_aircraft'
    text(home/'variants.txt', ['707-320', 'Cessna 172', 'F/A-18'])
    touch(home/'images', [f'{i:07d}.jpg' for i in range(12)])
    for k, part in enumerate(PARTS):
        text(home/f'images_variant_{part}.txt', [
            f'{4*k+i:07d} {v}'
            for i, v in enumerate(('F/A-18', '707-320', 'Cessna 172', 'Cessna 172'))
        ])

def sun397(root):
    home = root/'sun397'
    folders = ['a/abbey', 'i/ice_skating_rink/indoor', 'i/ice_skating_rink/outdoor']
    for f in folders: touch(home/'SUN397'/f, [f'sun_{i}.jpg' for i in range(14)])
    text(home/'ClassName.txt', [f'/{f}' for f in folders])
    text(home/'Training_01.txt', [f'/{f}/sun_{i}.jpg' for f in folders for i in range(10)])
    text(home/'Testing_01.txt', [f'/{f}/sun_{i}.jpg' for f in folders for i in range(10, 14)])

def dtd(root): class_folders(root/'dtd'/'images', ['banded', 'zigzagged'])


def eurosat(root):
    class_folders(root/'eurosat'/'2750', [
        'AnnualCrop', 'Forest', 'HerbaceousVegetation', 'Highway', 'Industrial', 'Pasture',
        'PermanentCrop', 'Residential', 'River', 'SeaLake'
    ])

def ucf101(root):
    home = root/'ucf101'
    films = {
        'ApplyEyeMakeup': 'Apply_Eye_Makeup', 'HandstandPushups': 'Handstand_Pushups',
        'YoYo': 'Yo_Yo'
    }
    # the films are spelled otherwise than the class
    spell = lambda a: a.replace('HandstandP', 'HandStandP')
    for a, f in films.items():
        touch(home/'UCF-101-midframes'/f, [f'v_{spell(a)}_g{i:02d}_c01.jpg' for i in range(14)])
    text(home/'ucfTrainTestlist'/'classInd.txt', [f'{i} {a}' for i, a in enumerate(films, 1)])
    text(home/'ucfTrainTestlist'/'trainlist01.txt', [
        f'{a}/v_{spell(a)}_g{i:02d}_c01.avi {k}' for k, a in enumerate(films, 1)
        for i in range(4, 14)
    ])
    text(home/'ucfTrainTestlist'/'testlist01.txt',
         [f'{a}/v_{spell(a)}_g{i:02d}_c01.avi' for a in films for i in range(4)])

def imagenetv2(root):
    for l in (0, 2, 10):
        touch(root/'imagenetv2'/'imagenetv2-matched-frequency-format-val'/str(l),
              ['a.jpeg', 'b.jpeg'])
    text(root/'imagenetv2'/'classnames.txt', [f'n{i:08d} thing {i}' for i in range(12)])

def imagenet_sketch(root):
    for w in WNIDS: touch(root/'imagenet-sketch'/'images'/w, ['sketch_0.JPEG', 'sketch_1.JPEG'])

def imagenet_a(root):
    for w in WNIDS[1:]: touch(root/'imagenet-adversarial'/'imagenet-a'/w, ['0.001_x.jpg'])
    text(root/'imagenet-adversarial'/'imagenet-a'/'README.txt', ['read me'])

def imagenet_r(root):
    for w in WNIDS[::2]:
        touch(root/'imagenet-rendition'/'imagenet-r'/w, ['art_0.jpg', 'art_1.jpg', 'art_2.jpg'])
    text(root/'imagenet'/'classnames.txt',
         [f'{w} {n}' for w, n in zip(WNIDS, ('tench', 'goldfish', 'shark'))])

def pacs(root):
    for d in TASKS['pacs']:
        for c in ('dog', 'elephant', 'guitar'):
            touch(root/'pacs'/'images'/d/c, [f'{i}.png' for i in range(10)])
        rows = [[f'{d}/{c}/{i}.png {l}' for l, c in enumerate(('dog', 'elephant', 'guitar'), 1)
                 for i in n] for n in (range(9), range(9, 10))]
        if d == 'sketch': rows[0].insert(3, 'sketch/dog/n02103406_4068-1.png 1')
        for part, lines in (('train', rows[0]), ('crossval', rows[1]), ('test', rows[0] + rows[1])):
            text(root/'pacs'/'splits'/f'{d}_{part}_kfold.txt', lines)

def vlcs(root):
    for d in ('CALTECH', 'LABELME', 'PASCAL', 'SUN'):
        for part, n in (('train', 7), ('crossval', 3), ('test', 4)):
            for l in range(5):
                touch(root/'VLCS'/d/part/str(l), [f'{part}_{i}.jpg' for i in range(n)])

def office_home(root):
    for d in TASKS['office_home']:
        for part, n in (('train', 5), ('val', 2)):
            for c in ('alarm_clock', 'Backpack'):
                touch(root/'office_home_dg'/d/part/c, [f'{part}{i}.jpg' for i in range(n)])

def domainnet(root):
    for d in TASKS['domainnet']:
        classes = ['aircraft_carrier', 't-shirt']
        for c in classes: touch(root/'domainnet'/d/c, [f'{i}.jpg' for i in range(5)])
        for part, n in (('train', range(3)), ('test', range(3, 5))):
            text(root/'domainnet'/'splits'/f'{d}_{part}.txt', [
                f'{d}/{c}/{i}.jpg {l}' for l, c in enumerate(classes)
                for i in n if not (d == 'painting' and part == 'train' and l)
            ])

OURS = 'seed 0: not the published one'
OWN = f'own 50/20/30 split, {OURS}'
REST = f'own 80/20 split of the rest, {OURS}'
EXPECT = {  # pictures to train, val, test in the tiny trees above; class names; what `split` says
    'imagenet': ((12, 0, 6), ['tench', 'gold fish', 'great white shark'],
                 'official, val as test; names from classnames.txt'),
    'caltech101': ((25, 10, 15), ['face', 'leopard', 'motorbike', 'airplane', 'yin yang'], OWN),
    'oxford_pets': ((16, 4, 10), ['abyssinian', 'american bulldog'], REST),
    'stanford_cars': ((16, 4, 6), ['2000 AM General Hummer SUV', '2012 Audi TTS Coupe'], REST),
    'oxford_flowers': ((10, 4, 6), ['pink primrose', 'canterbury bells'], OWN),
    'food101': ((10, 4, 6), ['apple pie', 'baby back ribs'], OWN),
    'fgvc_aircraft': ((4, 4, 4), ['707-320', 'Cessna 172', 'F/A-18'], 'official lists'),
    'sun397': ((24, 6, 12), ['abbey', 'indoor ice skating rink', 'outdoor ice skating rink'], REST),
    'dtd': ((10, 4, 6), ['banded', 'zigzagged'], OWN),
    'eurosat': ((50, 20, 30), ['Annual Crop Land', 'Forest', 'Herbaceous Vegetation Land',
                               'Highway or Road', 'Industrial Buildings', 'Pasture Land',
                               'Permanent Crop Land', 'Residential Buildings', 'River',
                               'Sea or Lake'], OWN),
    'ucf101': ((24, 6, 12), ['Apply Eye Makeup', 'Handstand Pushups', 'Yo Yo'], REST),
    'imagenetv2': ((0, 0, 6), [f'thing {i}' for i in range(12)], 'classnames.txt'),
    'imagenet_sketch': ((0, 0, 6), ['tench', 'goldfish', 'great white shark'], 'open_clip'),
    'imagenet_a': ((0, 0, 2), ['goldfish', 'great white shark'], 'open_clip'),
    'imagenet_r': ((0, 0, 6), ['tench', 'shark'], 'classnames.txt'),
    'pacs': ((27, 3, 30), ['dog', 'elephant', 'guitar'], 'official lists'),
    'vlcs': ((35, 15, 20), ['bird', 'car', 'chair', 'dog', 'person'], 'official folders'),
    'office_home': ((10, 4, 14), ['alarm clock', 'backpack'], 'train and val'),
    'domainnet': ((6, 0, 4), ['aircraft carrier', 't-shirt'], 'official lists'),
}

SHOWS = {  # what the path of each class's pictures must hold, by label
    'imagenet': WNIDS,
    'caltech101': ['Faces/', 'Leopards/', 'Motorbikes/', 'airplanes/', 'yin_yang/'],
    'oxford_pets': ['Abyssinian_', 'american_bulldog_'],
    'food101': ['apple_pie/', 'baby_back_ribs/'],
    'sun397': ['abbey/', 'indoor/', 'outdoor/'],
    'dtd': ['banded/', 'zigzagged/'],
    'eurosat': ['AnnualCrop/', 'Forest/', 'HerbaceousVegetation/', 'Highway/', 'Industrial/',
                'Pasture/', 'PermanentCrop/', 'Residential/', 'River/', 'SeaLake/'],
    'ucf101': ['Apply_Eye_Makeup/v_ApplyEye', 'Handstand_Pushups/v_HandStand', 'Yo_Yo/v_YoYo'],
    'imagenetv2': [f'{i}/' for i in range(12)],
    'imagenet_sketch': WNIDS,
    'imagenet_a': WNIDS[1:],
    'imagenet_r': WNIDS[::2],
    'pacs': ['dog/', 'elephant/', 'guitar/'],
    'vlcs': [f'{i}/' for i in range(5)],
    'office_home': ['alarm_clock/', 'Backpack/'],
    'domainnet': ['aircraft_carrier/', 't-shirt/'],
}

def lay(root, name):
    globals()[name](root)
    return root

EVERY = [(name, task) for name, p in PUBLIC.items() for task in (p.domains or [None])]


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "All nineteen, side by side but for the two that share classnames.txt"
    return {name: lay(tmp_path_factory.mktemp(name), name) for name in PUBLIC}


def test_the_list_is_complete():
    assert len(PUBLIC) == 19
    assert set(EXPECT) == set(PUBLIC)
    assert set(TEMPLATES['coop']) <= {*PUBLIC, 'all others'}
    tasks = {k: tuple(v) for k, v in TASKS.items() if k in PUBLIC}
    assert tasks == {k: p.domains for k, p in PUBLIC.items() if p.domains}
    names = ('Caltech101 OxfordPets StanfordCars OxfordFlowers Food101 SUN397 DescribableTextures '
             'EuroSAT UCF101').split()
    assert [p.split for p in PUBLIC.values() if p.split] == [f'split_zhou_{n}.json' for n in names]
    known = [p for p in PUBLIC.values() if p.torchvision]
    assert all(hasattr(torchvision.datasets, p.torchvision) and p.fetched for p in known)
    assert all(p.get.startswith('https://') for p in PUBLIC.values())
    with pytest.raises(Exception): PUBLIC['dtd'].classes = 1


@differs
@pytest.mark.parametrize('name,task', EVERY)
def test_each_reader(shelf, name, task):
    data = load_dataset(name, task, root=shelf[name])
    counts, classnames, split = EXPECT[name]
    if (name, task) == ('domainnet', 'painting'): counts = (3, 0, 4)   # no t-shirt to train on
    assert tuple(len(getattr(data, p)) for p in PARTS) == counts and data.classnames == classnames
    assert split in data.split
    assert (data.name, data.task, data.template) == (name, task or '', template_of(name))
    paths = {p: [i.path for i in getattr(data, p)] for p in PARTS}
    assert all(len(set(v)) == len(v) for v in paths.values())
    assert not set(paths['train']) & set(paths['val'])
    trained, tested = set(paths['train'] + paths['val']), set(paths['test'])
    if 'tested on both' in data.split: assert tested == trained
    else: assert not tested & trained
    for item in data.train + data.val + data.test if name in SHOWS else []:
        assert f'/{SHOWS[name][item.label]}' in Path(item.path).as_posix()
    assert data.read(data.test[0]).size == (8, 8)
    expected = dict(name=name, root=str(shelf[name])) | (dict(task=task) if task else {})
    assert data.origin == expected and json.loads(json.dumps(data.origin)) == expected
    again = load_dataset(**data.origin)
    assert again.fingerprint == data.fingerprint
    assert again.train == data.train
    assert again.val == data.val
    few = data.few_shot(1, allow_fewer=True)
    assert few.origin == expected
    assert len(few.classnames) < 4 or few.base().origin == expected == few.new().origin


def test_root_is_handed_on(shelf, tmp_path):
    "From the shell, whole sets and single domains"
    for name in ('eurosat', 'pacs/sketch'):
        root = shelf[name.partition('/')[0]]
        works('train', name, '--root', root, '--method', 'zero-shot', '--out', tmp_path/'p')
        said = f'on {load_dataset(*name.split("/"), root=root)}:'
        assert said in works('evaluate', tmp_path/'p', name, '--root', root).out
    refused('evaluate', tmp_path/'p', 'pacs', '--root', shelf['pacs'], says=['in a shell pacs/'])
    refused('compare', '--task', 'pacs', '--root', shelf['pacs'], says=['pacs/'])


@differs
@pytest.mark.parametrize('name', [n for n in PUBLIC if PUBLIC[n].split])
def test_the_published_split_goes_first(shelf, name, tmp_path):
    """With the JSON nothing else is needed but the pictures, the order is the file's, and names
    are cleaned"""
    ours = load_dataset(name, root=shelf[name])
    p = PUBLIC[name]
    images = shelf[name]/p.folder/p.images
    (tmp_path/p.folder/p.images).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(images, tmp_path/p.folder/p.images, target_is_directory=True)
    entry = lambda i: [Path(i.path).relative_to(images).as_posix(), i.label,
                       ours.classnames[i.label].replace(' ', '_')]
    entries = {part: [entry(i) for i in getattr(ours, part)][::-1] for part in PARTS}
    text((tmp_path if not p.images else tmp_path/p.folder)/p.split, [json.dumps(entries)])
    data = load_dataset(name, root=tmp_path)
    assert data.split == p.split
    assert data.classnames == ours.classnames
    assert data.fingerprint != ours.fingerprint
    for part in PARTS:
        listed = lambda d: [(Path(i.path).name, i.label) for i in getattr(d, part)]
        assert listed(data) == listed(ours)[::-1]


@differs
def test_own_splits_are_seeded_and_stratified(shelf, tmp_path):
    lay(tmp_path, 'caltech101')   # somewhere else: the same split
    a, b = (load_dataset('caltech101', root=r) for r in (shelf['caltech101'], tmp_path))
    assert a.fingerprint == b.fingerprint
    assert [[i.label for i in getattr(a, p)].count(0) for p in PARTS] == [5, 2, 3]
    assert [Path(i.path).name
            for i in a.train[:5]] != sorted(Path(i.path).name for i in a.train[:5])


@differs
def test_cars_and_flowers_by_hand(shelf):
    cars = load_dataset('stanford_cars', root=shelf['stanford_cars'])
    flowers = load_dataset('oxford_flowers', root=shelf['oxford_flowers'])
    assert all(i.label == int(Path(i.path).stem) % 2 for i in cars.train + cars.test)
    assert {Path(i.path).parent.name for i in cars.test} == {'cars_test'}
    assert all(i.label == (int(Path(i.path).stem[6:]) <= 10)
               for i in flowers.train + flowers.val + flowers.test)
    planes = load_dataset('fgvc_aircraft', root=shelf['fgvc_aircraft'])
    assert [i.label for i in planes.train] == [2, 0, 1, 1]
    assert [Path(i.path).stem for i in planes.val] == [f'{i:07d}' for i in range(4, 8)]
    v2 = load_dataset('imagenetv2', root=shelf['imagenetv2'])
    assert [i.label for i in v2.test] == [0, 0, 2, 2, 10, 10]
    assert all(int(Path(i.path).parent.name) == i.label for i in v2.test)


@differs
def test_pacs_leaves_the_broken_sketch_out_and_says_so(shelf):
    sketch, photo = (load_dataset('pacs', t, root=shelf['pacs']) for t in ('sketch', 'photo'))
    assert 'left out: sketch/dog/n02103406_4068-1.png' in sketch.split
    assert 'left out' not in photo.split
    assert len(sketch.test) == 30


@differs
def test_leave_one_domain_out(shelf):
    root = shelf['pacs']
    data = load_dataset('pacs', 'sketch', root=root, sources='rest')
    assert data.domains == ['art_painting', 'cartoon', 'photo', 'sketch']
    assert {i.domain for i in data.test} == {'sketch'}
    assert data.by_domain
    assert len(data.val) == 9
    few = data.few_shot(2)
    assert len(few.train) == 2*3*3
    assert len(few.val) == 3*3
    sources = ['art_painting', 'cartoon', 'photo']
    for items in (few.train, few.val): assert {i.domain for i in items} == set(sources)
    by_hand = join([load_dataset('pacs', t, root=root) for t in sources],
                   load_dataset('pacs', 'sketch', root=root))
    origin = dict(name='pacs', root=str(root), task='sketch', sources=sources)
    assert by_hand.origin == data.origin == origin
    assert load_dataset(**few.origin).fingerprint == data.fingerprint == by_hand.fingerprint
    two = load_dataset('pacs', 'sketch', root=root, sources=['photo', 'cartoon'])
    assert {i.domain for i in two.train} == {'photo', 'cartoon'}
    assert two.origin['sources'] == ['photo', 'cartoon']
    one = load_dataset('pacs', 'sketch', root=root, sources='photo')
    assert {i.domain for i in one.train} == {'photo'}


def test_domains_of_pictograms_join_as_well():
    data = load_dataset(sources='rest')
    # styles has nothing to train on
    assert {i.domain for i in data.train} == {'icons', 'edges', 'rotated'} and data.task == 'pixels'
    assert data.origin == dict(name='pictograms', task='pixels',
                               sources=['icons', 'edges', 'rotated'])
    assert load_dataset(**data.origin).fingerprint == data.fingerprint
    assert load_dataset().origin == dict(name='pictograms')
    few = load_dataset('emoji', 'edges').few_shot(1, allow_fewer=True)
    assert few.origin == dict(name='emoji', task='edges')
    assert join([load_dataset(task='icons')],
                load_dataset(task='styles')).origin['sources'] == ['icons']


@differs
def test_root_from_the_environment(shelf, monkeypatch):
    monkeypatch.setenv('CLIPPROMPT_DATA', str(shelf['dtd']))
    data = load_dataset('dtd')
    assert data.origin == dict(name='dtd', root=str(shelf['dtd']))
    monkeypatch.chdir(shelf['dtd'])
    assert load_dataset('dtd', root='.').origin == data.origin
    assert load_dataset('dtd', root='.').fingerprint == data.fingerprint


@differs
def test_imagenet_without_training_pictures_or_names(tmp_path):
    imagenet(tmp_path)
    import shutil
    shutil.rmtree(tmp_path/'imagenet'/'images'/'train')
    (tmp_path/'imagenet'/'classnames.txt').unlink()
    data = load_dataset('imagenet', root=tmp_path)
    assert not data.train
    assert len(data.test) == 6
    assert data.classnames == ['tench', 'goldfish', 'great white shark']
    assert 'for want of classnames.txt' in data.split


def test_a_name_for_two_classes_is_a_warning():
    "As in ImageNet's published list"
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    with pytest.warns(UserWarning, match="cannot be told apart: 'missile', 'sunglasses'") as said:
        assert len(clean_names(IMAGENET_CLASSNAMES)) == 1000
    assert '\n' not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        clean_names(['cat', 'dog'])


def test_skip_broken_decodes_and_names(tmp_path):
    lay(tmp_path, 'dtd')
    bad = tmp_path/'dtd'/'images'/'banded'/'banded_004.jpg'
    bad.write_bytes(PNG[:45])
    # not decoded: a million pictures would take an hour
    with pytest.warns(UserWarning) as said: whole = load_dataset('dtd', root=tmp_path)
    item = next(i for p in PARTS for i in getattr(whole, p) if i.path == str(bad))
    with pytest.raises(DataError) as e: whole.read(item)
    one_line(e, 'banded_004.jpg', 'skip_broken=True')
    with pytest.warns(UserWarning) as said:
        data = load_dataset('dtd', root=tmp_path, skip_broken=True)
    assert any('banded_004.jpg; left out' in str(w.message) for w in said)
    assert all(w.filename == __file__ for w in said)
    assert len(data.train+data.val+data.test) == 19 and data.origin['skip_broken'] is True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert load_dataset(**data.origin).fingerprint == data.fingerprint


# ---- Caltech101 as published ---------------------------------------------------------------------

@pytest.fixture(scope='module')
def published():
    """The published split of Caltech101 (folder, label, name, numbers of the pictures) and digests
    of the nine published lists of few shots"""
    path = Path(__file__).parent/'published'/'caltech101.json.xz'
    return json.loads(lzma.decompress(path.read_bytes()))


@pytest.fixture(scope='module')
def caltech(published, tmp_path_factory):
    "Caltech101 with empty files for pictures: which they are is all that counts here"
    root = tmp_path_factory.mktemp('caltech')
    split = {
        part: [[f'{folder}/image_{n:04d}.jpg', label, name]
               for folder, label, name, numbers in runs
               for n in numbers]
        for part, runs in published['split'].items()
    }
    text(root/'caltech-101'/'split_zhou_Caltech101.json', [json.dumps(split)])
    images = root/'caltech-101'/'101_ObjectCategories'
    for folder in {e[0].split('/')[0] for entries in split.values() for e in entries}:
        (images/folder).mkdir(parents=True, exist_ok=True)
    for entries in split.values():
        for path, _, _ in entries: (images/path).touch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # nothing to warn of: all counts are the published ones
        return load_dataset('caltech101', root=root)


def test_caltech_counts(caltech):
    assert [len(getattr(caltech, p)) for p in PARTS] == [4128, 1649, 2465]
    assert len(caltech.classnames) == 100
    assert caltech.classnames[:5] == ['face', 'leopard', 'motorbike', 'accordion', 'airplane']
    assert caltech.classnames[-1] == 'yin yang'
    base, new = caltech.base(), caltech.new()
    assert (len(base.classnames), len(new.classnames)) == (50, 50)
    assert (len(base.test), len(new.test)) == (1549, 916)
    assert len(base.val)+len(new.val) == 1649
    assert {i.label for i in new.val} == set(range(50))


@pytest.mark.parametrize('shots', [1, 4, 16])
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_the_published_few_shots(caltech, published, shots, seed):
    few = caltech.few_shot(shots, seed)

    def digest(items):
        names = ['/'.join(i.path.replace('\\', '/').split('/')[-2:]) for i in items]
        return hashlib.sha256('\n'.join(names).encode()).hexdigest()[:16]
    assert [digest(few.train), digest(few.val)] == published['few_shot'][f'{shots} {seed}']
    assert len(few.val) == 100*min(shots, 4) and few.test == caltech.test


def test_validation_pictures_change_nothing_else(caltech):
    from dataclasses import replace
    bare = replace(caltech, val=[])
    assert bare.fingerprint == caltech.fingerprint
    assert bare.few_shot(2, 3).train == caltech.few_shot(2, 3).train
    assert bare.few_shot(2).val == []
    with pytest.raises(DataError) as e: bare.pictures('val', None)
    one_line(e, 'no val pictures')
    with pytest.raises(DataError) as e: replace(caltech, val=[Item('x', 100)])
    one_line(e, 'val label 100')


@needs_archives
@pytest.mark.parametrize('name,file', [
    ('dtd', 'DescribableTextures'), ('eurosat', 'EuroSAT'), ('oxford_flowers', 'OxfordFlowers'),
    ('oxford_pets', 'OxfordPets'), ('stanford_cars', 'StanfordCars'), ('ucf101', 'UCF101')])
def test_other_published_splits(tmp_path, monkeypatch, name, file):
    "Their counts are those in PUBLIC, so nothing is warned of"
    (folder := tmp_path/PUBLIC[name].folder/PUBLIC[name].images).mkdir(parents=True)
    home = folder.parent if PUBLIC[name].images else folder
    packed = (SHELF/'splits'/f'split_zhou_{file}.json.gz').read_bytes()
    (home/PUBLIC[name].split).write_bytes(gzip.decompress(packed))
    monkeypatch.setattr(public_module, 'missing', lambda paths: [])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = load_dataset(name, root=tmp_path)
        clean_names(data.classnames)
    assert data.classnames == clean_names(data.classnames)
    if name == 'oxford_flowers' and hasattr(torchvision.datasets.Flowers102, 'classes'):
        assert [c.rstrip('?') for c in torchvision.datasets.Flowers102.classes] == data.classnames


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    root = tmp_path_factory.mktemp('archives')
    for name in ('caltech101', 'pacs'):
        shutil.unpack_archive(SHELF/f'{name}.tar', root)
    return root


@needs_archives
def test_caltech_archive(archives, caltech):
    data = load_dataset('caltech101', root=archives)
    strip = lambda d: [[(Path(i.path).parts[-2:], i.label) for i in getattr(d, p)] for p in PARTS]
    assert strip(data) == strip(caltech)
    assert data.fingerprint == load_dataset(**data.origin).fingerprint
    image, label = data.few_shot(1).pictures('train', test_transform(CLIP))[3]
    assert image.shape == (3, 32, 32) and label == 3
    for shots in (1, 4, 16):   # against the lists themselves, not their digests
        for seed in (1, 2, 3):
            file = SHELF/'fewshot_indices'/f'caltech101_shot_{shots}-seed_{seed}.json.gz'
            listed = json.loads(gzip.decompress(file.read_bytes()))
            for part in ('train', 'val'):
                def short(path): return path.rpartition('101_ObjectCategories')[2]
                drawn = getattr(data.few_shot(shots, seed), part)
                published = [short(x['impath']) for x in listed[part]['data']]
                assert [short(i.path) for i in drawn] == published


@needs_archives
def test_caltech_without_its_split(archives, tmp_path):
    "The rule of the original code gives the published counts, but other pictures"
    (tmp_path/'caltech-101').mkdir()
    os.symlink(archives/'caltech-101'/'101_ObjectCategories',
               tmp_path/'caltech-101'/'101_ObjectCategories')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours = load_dataset('caltech101', root=tmp_path)
        theirs = load_dataset('caltech101', root=archives)
    assert ours.classnames == theirs.classnames
    assert ours.split.startswith('own')
    assert ours.fingerprint != theirs.fingerprint


@needs_archives
def test_pacs_archive(archives):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sizes = {t: len(load_dataset('pacs', t, root=archives).test) for t in TASKS['pacs']}
    assert sizes == dict(photo=1670, art_painting=2048, cartoon=2344, sketch=3929)
    data = load_dataset('pacs', 'sketch', root=archives, sources='rest')
    assert data.classnames == ['dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person']
    assert len(data.few_shot(16).train) == 16*7*3
    assert data.read(data.test[-1]).mode == 'RGB'
    assert load_dataset(**data.origin).fingerprint == data.fingerprint


# ---- fetching through torchvision ----------------------------------------------------------------

def stand_in(name, calls):
    "A torchvision class that leaves the tiny tree where the real one would"
    class Fetch:
        def __init__(self, root, download=False):
            calls.append((root, download))
            p = PUBLIC[name]
            lay(made := Path(root)/'made', name)
            home, images = made/p.folder, Path(root)/p.fetched
            images.parent.mkdir(parents=True, exist_ok=True)
            if name == 'sun397':   # one archive, lists and all
                (home/p.images).rename(images)
                (home/'ClassName.txt').rename(images/'ClassName.txt')
                for part in ('Training', 'Testing'):
                    (home/f'{part}_01.txt').rename(Path(root)/f'{part}_01.txt')
                return
            (home/p.images).rename(images)
            for f in home.iterdir():
                if f.name != 'cat_to_name.json': f.rename(images.parent/f.name)
    return Fetch


@differs
@pytest.mark.parametrize('name', [n for n in PUBLIC if PUBLIC[n].torchvision])
def test_download(tmp_path, monkeypatch, name):
    calls, root = [], tmp_path/'new'/'data'
    monkeypatch.setattr(torchvision.datasets, PUBLIC[name].torchvision, stand_in(name, calls))
    if name == 'oxford_flowers':
        monkeypatch.setattr(torchvision.datasets.Flowers102,
                            'classes', ['pink primrose', 'canterbury bells?'],
                            raising=False)
    with pytest.raises(DataNotFound) as e: load_dataset(name, root=root)
    one_line(e, PUBLIC[name].folder, 'download=True')
    data = load_dataset(name, root=root, download=True)
    assert tuple(len(getattr(data, p)) for p in PARTS) == EXPECT[name][0]
    assert data.classnames == EXPECT[name][1]
    again = load_dataset(name, root=root, download=True)
    assert again.fingerprint == data.fingerprint == load_dataset(**data.origin).fingerprint
    assert calls == [(str(root), True)]
    if PUBLIC[name].split:   # the published split on top
        images = root/PUBLIC[name].fetched
        entries = {
            p: [[Path(i.path).relative_to(images).as_posix(), i.label, data.classnames[i.label]]
                for i in getattr(data, p)]
            for p in PARTS
        }
        text(root/PUBLIC[name].split, [json.dumps(entries)])
        assert load_dataset(name, root=root).split == PUBLIC[name].split


@pytest.mark.parametrize(
    'error',
    [RuntimeError('File not found or\ncorrupted.'),
     OSError('no network'),
     ImportError('gdown')])
def test_download_that_fails(tmp_path, monkeypatch, error):
    def fetch(root, download): raise error
    monkeypatch.setattr(torchvision.datasets, 'EuroSAT', fetch)
    with pytest.raises(DataNotFound) as e: load_dataset('eurosat', root=tmp_path, download=True)
    one_line(e, 'eurosat', type(error).__name__, 'https://')


@pytest.mark.parametrize('name,says', [
    ('ucf101', 'torchvision cannot fetch ucf101'), ('stanford_cars', 'torchvision cannot fetch'),
    ('pictograms', 'nothing to download'), ('some/folder', 'nothing to download')])
def test_nothing_to_download(tmp_path, name, says):
    with pytest.raises(DataError) as e: load_dataset(name, root=tmp_path, download=True)
    one_line(e, says)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    'args,says',
    [(dict(name='caltech101'),
      ['where is caltech101', 'give root=', "'caltech-101'", 'CLIPPROMPT_DATA', 'download=True']),
     (dict(name='imagenet'), ['give root=', "'imagenet'", 'https://']),
     (dict(name='caltech101', root='/gone'), ['/gone/caltech-101', 'root=', 'download=True']),
     (dict(name='vlcs', task='sun', root='/gone'), ["/gone/VLCS", 'https://']),
     (dict(name='pacs', root='/gone'), ['several domains', 'art_painting, cartoon, photo, sketch']),
     (dict(name='pacs', task='sketches', root='/gone'), ["did you mean 'sketch'"]),
     (dict(name='dtd', task='photo', root='/gone'), ['no tasks', 'leave it out']),
     (dict(name='dtd', sources='rest', root='/gone'), ["'dtd'", 'no domains', 'leave']),
     (dict(name='Caltech-101'), ["did you mean 'caltech101'"]),
     (dict(name='EuroSat'), ["did you mean 'eurosat'"]),
     (dict(name='oxfordpets'), ["did you mean 'oxford_pets'"]),
     (dict(sources=['edge']), ["did you mean 'edges'"]),
     (dict(sources=[]), ['one or more domains']),
     (dict(sources=['pixels']), ['other than the task']),
     (dict(sources=['icons', 'icons']), ['all different']),
     (dict(sources=['styles']), ['styles', 'icons, edges']),
     (dict(name='pacs', task='sketch', sources='photos', root='/gone'), ['pacs'])])
def test_wrong_arguments(args, says):
    with pytest.raises(DataError) as e: load_dataset(**args)
    one_line(e, *says)


@differs
def test_root_that_is_the_set_itself(shelf):
    with pytest.raises(DataNotFound) as e: load_dataset('dtd', root=shelf['dtd']/'dtd')
    one_line(e, f"did you mean root={shelf['dtd']}?")


@differs
@pytest.mark.parametrize('name,task,file,says', [
    ('oxford_pets', None, 'oxford_pets/annotations/test.txt', ['split_zhou_OxfordPets.json']),
    ('oxford_pets', None, 'oxford_pets/annotations/trainval.txt', []),
    ('stanford_cars', None, 'stanford_cars/devkit/cars_meta.mat', ['split_zhou_StanfordCars.json']),
    ('stanford_cars', None, 'stanford_cars/cars_test_annos_withlabels.mat', []),
    ('oxford_flowers', None, 'oxford_flowers/imagelabels.mat', ['split_zhou_OxfordFlowers.json']),
    ('sun397', None, 'sun397/Training_01.txt', []), ('sun397', None, 'sun397/ClassName.txt', []),
    ('ucf101', None, 'ucf101/ucfTrainTestlist/testlist01.txt', []),
    ('ucf101', None, 'ucf101/ucfTrainTestlist/classInd.txt', []),
    ('fgvc_aircraft', None, 'fgvc_aircraft/variants.txt', []),
    ('fgvc_aircraft', None, 'fgvc_aircraft/images_variant_val.txt', []),
    ('domainnet', 'real', 'domainnet/splits/real_test.txt', []),
    ('pacs', 'photo', 'pacs/splits/photo_crossval_kfold.txt', [])
])
def test_missing_official_list(tmp_path, name, task, file, says):
    (lay(tmp_path, name)/file).unlink()
    with pytest.raises(DataNotFound) as e: load_dataset(name, task, root=tmp_path)
    one_line(e, file, 'is missing', 'https://', *says)


@differs
@pytest.mark.parametrize(
    'name,task,file,content,says',
    [('oxford_pets', None, 'oxford_pets/annotations/test.txt', 'Abyssinian_3\n',
      ['line 1', 'Abyssinian_3']),
     ('oxford_pets', None, 'oxford_pets/annotations/test.txt', '', ['empty']),
     ('oxford_pets', None, 'oxford_pets/annotations/test.txt', 'Abyssinian_3 9 1 1', ['label']),
     ('oxford_pets', None, 'oxford_pets/annotations/test.txt', b'\xff\xfe\x00', ['cannot read']),
     ('oxford_pets', None, 'oxford_pets/annotations/test.txt', '../../Abyssinian_3 1 1 1',
      ['does not stay below']),
     ('sun397', None, 'sun397/Testing_01.txt', '/b/bar/sun_1.jpg', ['line 1', 'b/bar']),
     ('ucf101', None, 'ucf101/ucfTrainTestlist/testlist01.txt', 'Juggling/v_1.avi',
      ['line 1', 'Juggling']),
     ('ucf101', None, 'ucf101/ucfTrainTestlist/classInd.txt', 'one ApplyEyeMakeup', ['line 1']),
     ('fgvc_aircraft', None, 'fgvc_aircraft/images_variant_test.txt', '0000001 Concorde',
      ['Concorde']),
     ('stanford_cars', None, 'stanford_cars/devkit/cars_meta.mat', 'no matrix',
      ['class_names', 'cars_meta.mat']),
     ('oxford_flowers', None, 'oxford_flowers/imagelabels.mat', b'', ['labels', 'imagelabels.mat']),
     ('oxford_flowers', None, 'oxford_flowers/cat_to_name.json', '[1]', ['cat_to_name.json']),
     ('oxford_flowers', None, 'oxford_flowers/cat_to_name.json', '{', ['cat_to_name.json']),
     ('imagenet', None, 'imagenet/classnames.txt', 'n01440764 tench',
      ['n01443537', 'classnames.txt']),
     ('imagenet', None, 'imagenet/classnames.txt', 'n01440764', ['line 1']),
     ('pacs', 'photo', 'pacs/splits/photo_train_kfold.txt', 'photo/dog/0.png 0', ['line 1']),
     ('pacs', 'photo', 'pacs/splits/photo_train_kfold.txt',
      'photo/dog/0.png 2\nphoto/guitar/0.png 2', ['line 2']),
     ('domainnet', 'real', 'domainnet/splits/real_train.txt', 'real/t-shirt/0.jpg x', ['line 1']),
     ('domainnet', 'real', 'domainnet/splits/real_test.txt', 'real/aircraft_carrier/77.jpg 0',
      ['missing', '77.jpg'])])
def test_damaged_official_list(tmp_path, name, task, file, content, says):
    path = lay(tmp_path, name)/file
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    with pytest.raises(DataError) as e: load_dataset(name, task, root=tmp_path)
    one_line(e, *says)


@differs
def test_folders_that_do_not_fit(tmp_path):
    for name in ('imagenet', 'imagenetv2', 'vlcs', 'office_home', 'dtd', 'imagenet_sketch'):
        lay(tmp_path, name)
    def says(name, task, *words):
        with pytest.raises(DataError) as e: load_dataset(name, task, root=tmp_path)
        one_line(e, *words)

    (tmp_path/'imagenet'/'images'/'train'/'n99999999').mkdir()
    says('imagenet', None, 'n99999999', 'only one of train and val')
    (tmp_path/'imagenet-sketch'/'images'/'cats').mkdir()
    says('imagenet_sketch', None, "'cats'", 'classnames.txt')
    v2 = tmp_path/'imagenetv2'/'imagenetv2-matched-frequency-format-val'
    (v2/'12').mkdir(); says('imagenetv2', None, 'to 12', '12 class names')
    (v2/'x').mkdir(); says('imagenetv2', None, 'no number')
    (tmp_path/'VLCS'/'SUN'/'test'/'5').mkdir(); says('vlcs', 'sun', "'5'", '0 to 4')
    (tmp_path/'office_home_dg'/'art'/'val'/'mop').mkdir()
    says('office_home', 'art', "'mop'", 'train and val')
    import shutil
    shutil.rmtree(tmp_path/'dtd'/'images')
    (tmp_path/'dtd'/'images').mkdir()
    says('dtd', None, 'no class folders', 'https://')
    (tmp_path/'dtd'/'images'/'banded').mkdir(); says('dtd', None, 'no images')


def test_other_counts_are_warned_of(shelf):
    with pytest.warns(UserWarning) as said: load_dataset('dtd', root=shelf['dtd'])
    assert len(said) == 1 and said[0].filename == __file__
    for words in ('2 classes instead of 47', '10 training pictures instead of 2820',
                  '6 test pictures instead of 1692'):
        assert words in str(said[0].message)
    with pytest.warns(UserWarning, match='pacs/photo .*30 test pictures instead of 1670'):
        load_dataset('pacs', 'photo', root=shelf['pacs'])


ENTRY = ['a/1.jpg', 0, 'ant']


def split(**parts):
    return dict(train=[['a/1.jpg', 0, 'ant'], ['b/1.jpg', 1, 'bee']], val=[['a/2.jpg', 0, 'ant']],
                test=[['a/3.jpg', 0, 'ant'], ['b/3.jpg', 1, 'bee']]) | parts

@pytest.fixture
def dtd_root(tmp_path):
    for c in 'ab': touch(tmp_path/'dtd'/'images'/c, [f'{i}.jpg' for i in range(1, 4)])
    return tmp_path

def load_split(root, content):
    said = content if isinstance(content, str) else json.dumps(content)
    (root/'dtd'/PUBLIC['dtd'].split).write_text(said)
    return load_dataset('dtd', root=root)


@differs
def test_the_good_split(dtd_root):
    data = load_split(dtd_root, split())
    assert data.classnames == ['ant', 'bee'] and [len(getattr(data, p)) for p in PARTS] == [2, 1, 2]


@differs
@pytest.mark.parametrize(
    'content,says', [('', ['no JSON']), ('{"train": [', ['no JSON']), ('['*100000, ['no JSON']),
                     ('[]', ["'train', 'val' and 'test'"]), ({'train': [], 'test': []}, ["'val'"]),
                     (split(val={}), ["'val'"]), (split(train=[]), ["'train' is empty"]),
                     (split(test=[]), ["'test' is empty"]),
                     (split(val=[['a/2.jpg', 0]]), ['val, entry 0', 'class name]']),
                     (split(val=['a/2.jpg']), ['val, entry 0']),
                     (split(val=[['a/2.jpg', '0', 'ant']]), ['val, entry 0']),
                     (split(val=[['a/2.jpg', True, 'ant']]), ['val, entry 0']),
                     (split(val=[['a/2.jpg', 0.0, 'ant']]), ['val, entry 0']),
                     (split(val=[[None, 0, 'ant']]), ['val, entry 0']),
                     (split(val=[['a/2.jpg', 0, None]]), ['val, entry 0']),
                     (split(val=[['a/2.jpg', -1, 'ant']]), ['-1 is negative']),
                     (split(val=[['a/2.jpg', 0, 'bee']]), ["label 0 is 'bee' here but was 'ant'"]),
                     (split(val=[['a/2.jpg', 0, '_']]), ['class name is empty']),
                     (split(val=[['a/2.jpg', 3, 'cat']]), ['label 2 is missing']),
                     (split(val=[['/etc/passwd', 0, 'ant']]), ['/etc/passwd', 'below']),
                     (split(val=[['a/../../2.jpg', 0, 'ant']]), ['below']),
                     (split(val=[['C:/2.jpg', 0, 'ant']]), ['below']),
                     (split(val=[['..\\2.jpg', 0, 'ant']]), ['below']),
                     (split(val=[['', 0, 'ant']]), ['below']),
                     (split(val=[['a\0b.jpg', 0, 'ant']]), ['below']),
                     (split(val=[ENTRY]), ['a/1.jpg', 'listed twice', 'in train and in val']),
                     (split(val=[['a/./1.jpg', 0, 'ant']]), ['listed twice']),
                     (split(val=[['a/2.jpg', 0, 'ant']]*2), ['in val and in val']),
                     (split(val=[['a/9.jpg', 0, 'ant'], ['c/1.jpg', 0, 'ant']]),
                      ['2 of 6 pictures', "'a/9.jpg'", 'unpack']),
                     (split(val=[['\ud800.jpg', 0, 'ant']]), ['1 of 5']),
                     (split(val=[['x'*5000, 0, 'ant']]), ['1 of 5'])])
def test_split_that_cannot_be_trusted(dtd_root, content, says):
    with pytest.raises(DataError) as e: load_split(dtd_root, content)
    assert PUBLIC['dtd'].split in one_line(e, *says)


# ---- any split file at all -----------------------------------------------------------------------

@st.composite
def valid_splits(draw):
    name = st.text('abc _-é', min_size=1, max_size=6)
    name = name.filter(lambda n: n.replace('_', ' ').strip())
    names = draw(st.lists(name, min_size=2, max_size=4))
    paths = st.sampled_from([f'{f}/{i}.jpg' for f in 'abc' for i in range(12)])
    pictures = draw(st.lists(paths, min_size=2*len(names), max_size=30, unique=True))
    thirty = lambda values: draw(st.lists(values, min_size=30, max_size=30))
    labels = [*range(len(names))]*2 + thirty(st.integers(0, len(names) - 1))
    where = ['train']*len(names) + ['test']*len(names) + thirty(st.sampled_from(PARTS))
    entries = [(p, [path, l, names[l]]) for path, l, p in zip(pictures, labels, where)]
    return {part: [e for p, e in entries if p == part] for part in PARTS}

@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    "Pictures for splits to name"
    root = tmp_path_factory.mktemp('pool')
    for c in 'abc': touch(root/'dtd'/'images'/c, [f'{i}.jpg' for i in range(12)])
    return root


quick = settings(max_examples=25, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])

@differs
@quick
@given(parts=valid_splits())
def test_valid_splits_load_as_written(pool, parts):
    data = load_split(pool, parts)
    for part in PARTS:
        assert [[i.path[len(str(pool/'dtd'/'images')) + 1:], i.label]
                for i in getattr(data, part)] == [e[:2] for e in parts[part]]
    names = {l: n for p in PARTS for _, l, n in parts[p]}
    assert data.classnames == [' '.join(names[l].replace('_', ' ').split())
                               for l in range(len(names))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6)

@differs
@quick
@given(parts=valid_splits(), data=st.data())
def test_corrupted_splits_never_end_in_another_error(pool, parts, data):
    part = data.draw(st.sampled_from(PARTS))
    kind = data.draw(st.sampled_from(['part', 'entry', 'cell', 'byte', 'extra']))
    if kind == 'part': parts[part] = data.draw(JSON)
    if kind == 'extra': parts[part].append(data.draw(JSON))
    if kind in ('entry', 'cell') and parts[part]:
        i = data.draw(st.integers(0, len(parts[part])-1))
        if kind == 'entry': parts[part][i] = data.draw(JSON)
        else: parts[part][i][data.draw(st.integers(0, 2))] = data.draw(JSON)
    text_ = json.dumps(parts)
    if kind == 'byte':
        at = data.draw(st.integers(0, len(text_)-1))
        text_ = text_[:at] + data.draw(st.text(max_size=2)) + text_[at+1:]
    (pool/'dtd'/PUBLIC['dtd'].split).write_bytes(text_.encode('utf-8', 'surrogatepass'))
    try: load_dataset('dtd', root=pool)
    except DataError as e: assert '\n' not in str(e) and len(str(e)) < 700
