"One reader of data names, and other people's data set objects"
import pickle
from collections import UserDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import FakeData, ImageFolder

from clipprompt.data import DataSet
from clipprompt.pictures import DOMAINS, DataError, Item, test_transform
from clipprompt.sets import as_dataset, find_data, load_dataset, split_name, to_picture
from helpers import shapes

NAMES = ['ant', 'bee']


def noise(seed=0, size=(6, 5)): # H, W
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


class Held:
    "Pairs in a list, with whatever else an object may keep; counts how often it is asked"
    def __init__(self, pairs, **kept):
        self.pairs, self.asked = pairs, []
        vars(self).update(kept)

    def __len__(self): return len(self.pairs)

    def __getitem__(self, i):
        if not -len(self.pairs) <= i < len(self.pairs): raise IndexError(i)
        self.asked.append(int(i))
        return self.pairs[i]


def held(n=6, **kept):
    return Held([(Image.fromarray(noise(i)), i % 2) for i in range(n)], **kept)


class ClassLabel:
    def __init__(self, names): self.names = names


class Hub:
    "What of a Hugging Face data set is used here"
    _fingerprint = 'abc123'

    def __init__(self, n=6, image='image', label='label', names=('ant', 'bee'), labels=None):
        Picture = type('Image', (), {})
        self.features = {image: Picture(), label: ClassLabel(list(names)), 'note': object()}
        self.columns = {image: [Image.fromarray(noise(i)) for i in range(n)],
                        label: [i % 2 for i in range(n)] if labels is None else labels,
                        'note': list('abcdefgh'[:n])}
        self.info = type('Info', (), dict(dataset_name='insects', builder_name='imagefolder'))

    def __len__(self): return len(self.columns['note'])

    def __getitem__(self, key):
        if isinstance(key, str): return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


# ---- names ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('text,expect', [
    ('pixels', ('pictograms', 'pixels')),
    ('styles', ('pictograms', 'styles')),
    ('emoji/edges', ('emoji', 'edges')),
    ('pacs/sketch', ('pacs', 'sketch')),
    ('caltech101', ('caltech101', '')),
    ('./caltech101', (Path('caltech101'), '')),
    ('a/b', (Path('a/b'), ''))])
def test_a_word_is_taken_apart(text, expect):
    assert split_name(text) == expect


def test_a_domain_may_lie_below_a_table(tmp_path):
    table = tmp_path/'photos.csv'
    table.write_text('path,label,domain\n')
    assert split_name(f'{table}/clinic 3') == (table, 'clinic 3')
    assert split_name(table) == (table, '')


@pytest.mark.parametrize('text,near', [('pixls', 'pixels'), ('caltech', 'caltech101')])
def test_an_unknown_word_gets_the_nearest(text, near):
    with pytest.raises(ValueError, match=f"unknown data '{text}'.*{near}"): split_name(text)


def test_what_is_left_out():
    unseen = find_data('pixels', 'domain')
    others = [d for d in DOMAINS if d != 'pixels']
    assert {i.domain for i in unseen.train} == set(others)
    assert {i.domain for i in unseen.test} == {'pixels'}
    assert unseen.train == load_dataset(task='pixels', sources=others).train
    for text in ('styles', 'pictograms', './photos'):
        with pytest.raises(ValueError, match="protocol 'domain' leaves out one of"):
            find_data(text, 'domain')


def test_a_root_is_for_public_sets_alone(tmp_path):
    assert find_data('icons', root=tmp_path).fingerprint == load_dataset(task='icons').fingerprint
    folder = shapes(tmp_path/'photos', n=3)
    assert find_data(folder, root=tmp_path/'elsewhere').name == 'photos'


# ---- pictures ------------------------------------------------------------------------------------

def test_pictures_of_all_kinds(tmp_path):
    a = noise()
    picture, chw = Image.fromarray(a), torch.tensor(a).permute(2, 0, 1)
    picture.save(tmp_path/'a.png')
    kinds = [picture, tmp_path/'a.png', str(tmp_path/'a.png'), a, a.astype(np.int64), a/255,
             a.astype(np.float32)/255, chw, chw/255, (chw/255).double(), chw.numpy()]
    for image in kinds: assert to_picture(image).tobytes() == picture.tobytes()


def test_grey_and_transparent_pixels():
    grey = noise()[..., 0]
    for image in (grey, grey[..., None], grey[None], torch.tensor(grey)[None]/255):
        assert (np.asarray(to_picture(image)) == grey[..., None]).all()
    assert to_picture(np.zeros((5, 3, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert to_picture(torch.zeros(4, 5, 6)).size == (6, 5)


@pytest.mark.parametrize('image,says', [
    (torch.zeros(3, 4, 4)-1, ['run from -1 to -1 instead of 0 to 1', 'normalisation']),
    (torch.full((3, 4, 4), 2.), ['instead of 0 to 1']),
    (torch.full((3, 4, 4), torch.nan), ['nan', 'instead of 0 to 1']),
    (np.full((4, 4, 3), 256), ['256', 'instead of 0 to 255']),
    (torch.zeros(2, 4, 5), ['shape [2, 4, 5]', '[3, H, W]']),
    (np.zeros(7), ['shape [7]']),
    (7, ['type int', 'PIL'])])
def test_no_picture(image, says):
    with pytest.raises(ValueError) as e: to_picture(image)
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), e.value


# ---- objects -------------------------------------------------------------------------------------

def test_tensors_become_a_data_set():
    pixels, labels = torch.tensor(noise(0, (8, 5, 5))).movedim(-1, 1), torch.arange(8) % 2
    data = as_dataset(TensorDataset(pixels, labels), NAMES, name='dtd')
    assert (data.name, data.classnames, data.template) == ('dtd', NAMES, '{} texture.')
    assert [i.label for i in data.train] == labels.tolist() and data.test == data.val == []
    for i, item in enumerate(data.train):
        assert np.array_equal(np.asarray(data.read(item)), pixels[i].permute(1, 2, 0))
    half = data.few_shot(2, seed=3)
    assert len(half.train) == 4
    assert half.fingerprint != data.fingerprint


def test_a_loader_reads_in_another_process():
    clip = type('', (), dict(image_size=8, interpolation='bicubic', resize_mode='shortest',
                                mean=[0]*3, std=[1]*3))
    data = as_dataset(held(), NAMES)
    pictures = data.pictures('train', test_transform(clip))
    alone, beside = [list(DataLoader(pictures, 4, num_workers=n)) for n in (0, 1)]
    for (a, la), (b, lb) in zip(alone, beside): assert torch.equal(a, b) and torch.equal(la, lb)
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint == data.fingerprint
    assert again.read(again.train[3]).tobytes() == data.read(data.train[3]).tobytes()


def test_labels_that_are_kept_open_no_pictures():
    for kept in (dict(targets=[0, 1]*50), dict(labels=np.array([0, 1]*50)),
                 dict(_labels=torch.tensor([0, 1]*50))):
        obj = held(100, classes=NAMES, **kept)
        data = as_dataset(obj)
        assert [i.label for i in data.train] == [0, 1]*50
        assert set(obj.asked) <= {0, 99}


@pytest.mark.parametrize('kept', [dict(targets=[1, 0]*3), dict(labels=[0]*6), dict(labels=[0, 1]),
                                  dict(targets=['a', 'b']*3), {}])
def test_labels_that_disagree_with_the_items_are_not_believed(kept):
    assert [i.label for i in as_dataset(held(classes=NAMES, **kept)).train] == [0, 1]*3


@pytest.mark.parametrize('kept', [
    dict(features=torch.zeros(6, 2)), dict(classes=2), dict(classes=[0, 1]), dict(samples=3),
    dict(tensors=torch.zeros(6)), dict(data=torch.zeros(2)), dict(info=dict(a=1)), dict(indices=0)])
def test_attributes_that_mean_something_else(kept):
    data = as_dataset(held(**kept), NAMES)
    assert [i.label for i in data.train] == [0, 1]*3 and data.fingerprint


def test_labels_may_be_changed_on_the_way(tmp_path):
    shapes(tmp_path, n=2)
    turned = ImageFolder(str(tmp_path), target_transform=lambda label: 3-label)
    data = as_dataset(turned)
    assert [i.label for i in data.train] == [3, 3, 2, 2, 1, 1, 0, 0]


def test_a_folder_by_torchvision_is_the_folder(tmp_path):
    shapes(tmp_path/'here', n=3)
    obj = ImageFolder(str(tmp_path/'here'))
    data, own = as_dataset(obj), load_dataset(tmp_path/'here')
    assert data.classnames == own.classnames and 'two bars' in data.classnames
    assert len(data.train) == 12 and data.name == 'ImageFolder' and data.fingerprint
    (tmp_path/'here').rename(tmp_path/'there')
    assert as_dataset(ImageFolder(str(tmp_path/'there'))).fingerprint == data.fingerprint


def test_a_part_knows_what_it_was_cut_from():
    whole = held(8, classes=NAMES, targets=[0, 1]*4)
    inner = Subset(Subset(whole, [7, 6, 5, 4, 3]), [0, 2, 4])   # items 7, 5, 3
    data = as_dataset(inner, test=Subset(whole, [0, 1]))
    assert data.classnames == NAMES and data.name == 'Held'
    assert [i.label for i in data.train] == [1, 1, 1] and [i.label for i in data.test] == [0, 1]
    assert data.read(data.train[1]).tobytes() == Image.fromarray(noise(5)).tobytes()
    both = as_dataset(ConcatDataset([whole, whole]), NAMES)
    assert [i.label for i in both.train] == [0, 1]*8


def test_synonyms_and_categories():
    assert as_dataset(held(classes=[('ant', 'emmet'), ('honey_bee',)])).classnames \
        == ['ant', 'honey bee']
    assert as_dataset(held(categories=NAMES)).classnames == NAMES
    assert as_dataset(held(classes=NAMES), ['wasp', 'fly_2']).classnames == ['wasp', 'fly 2']


@pytest.mark.parametrize('image,label', [('image', 'label'), ('img', 'label'), ('scan', 'kind')])
def test_a_data_set_from_the_hub(image, label):
    data = as_dataset(Hub(image=image, label=label))
    assert (data.name, data.classnames) == ('insects', NAMES)
    assert [i.label for i in data.train] == [0, 1]*3
    assert data.read(data.train[5]).tobytes() == Image.fromarray(noise(5)).tobytes()
    other = Hub(image=image, label=label)
    other._fingerprint = 'def456'
    assert as_dataset(other).fingerprint != data.fingerprint


def test_the_hubs_parts():
    parts = dict(train=Hub(6), test=Hub(4), validation=Hub(2))
    for given in (parts, UserDict(parts)):
        data = as_dataset(given)
        assert [len(getattr(data, p)) for p in ('train', 'test', 'val')] == [6, 4, 2]
    assert len(as_dataset(parts, test=Hub(5)).test) == 5


def test_pixels_in_memory_are_told_apart():
    pixels, labels = torch.rand(40, 3, 4, 4), torch.arange(40) % 2
    def seen(): return as_dataset(TensorDataset(pixels, labels), NAMES).fingerprint
    before = seen()
    assert seen() == before
    pixels[13] = pixels[13].flip(-1)
    assert seen() != before
    kept = [held(classes=NAMES, data=np.stack([noise(i+(i == 3)*shift) for i in range(6)]))
            for shift in (0, 90)]
    assert as_dataset(kept[0]).fingerprint != as_dataset(kept[1]).fingerprint


def test_another_transform_is_another_data_set(tmp_path):
    shapes(tmp_path, n=2)
    plain, small = ImageFolder(str(tmp_path)), ImageFolder(str(tmp_path), T.Resize(20))
    assert as_dataset(plain).fingerprint != as_dataset(small).fingerprint


def test_a_data_set_stays_what_it_is():
    data = DataSet('toy', NAMES, [Item('a', 0), Item('b', 1)], [])
    assert as_dataset(data) is data and as_dataset(data, NAMES) is data
    with pytest.raises(DataError, match='leave classnames out'): as_dataset(data, ['a', 'b'])


class Stream:
    def __iter__(self): return iter(())


@pytest.mark.parametrize('make,says', [
    (lambda: as_dataset(held()), ["'Held' does not say", 'give classnames=[...]']),
    (lambda: as_dataset(FakeData(4, (3, 8, 8), 2)), ['give classnames=[...]']),
    (lambda: as_dataset(held(), ['ant']), ['train label 1 has no class name', '0 to 0']),
    (lambda: as_dataset(held(), NAMES, test=held(classes=['bee', 'ant'])) and
     as_dataset(held(classes=NAMES), test=held(classes=['bee', 'ant'])), ['call their classes']),
    (lambda: as_dataset(Hub(labels=[-1]*6)), ['train label -1 has no class name']),
    (lambda: as_dataset(Hub(labels=['ant']*6)), ["label of item 0 is 'ant'", 'from 0']),
    (lambda: as_dataset(Held([(noise(), .5)]), NAMES), ['label of item 0 is 0.5']),
    (lambda: as_dataset(Held([(noise(), torch.ones(2))]), NAMES), ['not a whole number']),
    (lambda: as_dataset(Held([noise()]), NAMES), ['item 0 is of type ndarray', 'pair']),
    (lambda: as_dataset(Held([7]), NAMES), ['item 0 is of type int', '(image, label)']),
    (lambda: as_dataset(Held([]), NAMES), ['train part has no pictures']),
    (lambda: as_dataset(Stream(), NAMES), ['of type Stream', '__len__ and __getitem__']),
    (lambda: as_dataset(DataLoader(held()), NAMES), ['of type DataLoader', '__getitem__']),
    (lambda: as_dataset(7, NAMES), ['of type int', '__getitem__']),
    (lambda: as_dataset('photos', NAMES), ["'photos' is a name or a path", 'load_dataset']),
    (lambda: as_dataset(dict(test=held())), ["no part 'train' among test"]),
    (lambda: as_dataset(Held([dict(x=noise(), label=0)]), NAMES),
     ['no column for the pictures', "rename one to 'image'"])])
def test_objects_that_cannot_be_used(make, says):
    with pytest.raises(DataError) as e: make()
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), e.value


def test_a_picture_that_cannot_be_read_is_named():
    obj = Held([(Image.fromarray(noise(i)), i % 2) for i in range(20)])
    data = as_dataset(obj, NAMES)
    obj.pairs[7] = (torch.full((3, 4, 4), -2.), 1)
    with pytest.raises(DataError, match=r'cannot read picture 7 of the train part .*run from -2'):
        data.read(data.train[7])
    obj.pairs[0] = obj.pairs[7]
    with pytest.raises(DataError, match='cannot read pictures of the train part'):
        replace(data).fingerprint


def test_halves_of_an_alphabet_or_drawn():
    "Another seed cuts the classes otherwise; each picture keeps its name"
    plain, cut, again = (load_dataset(task='tools', halves=h) for h in (0, 1, 1))
    def named(data):
        everything = data.train+data.test+data.val
        return {(i.path, data.classnames[i.label]) for i in everything}
    assert plain.classnames == sorted(plain.classnames) != cut.classnames == again.classnames
    assert set(plain.classnames) == set(cut.classnames) and named(plain) == named(cut)
    assert set(cut.base().classnames) != set(plain.base().classnames)
    assert cut.fingerprint == again.fingerprint != plain.fingerprint
    assert cut.origin['halves'] == 1 and load_dataset(**cut.origin).fingerprint == cut.fingerprint
    assert load_dataset(task='tools', halves=2).classnames != cut.classnames
