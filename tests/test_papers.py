"Numbers of papers in data/papers*.csv: columns average to what was published, sources are named."
import numpy as np
import pandas as pd
import pytest

from clipprompt.backbone import assets
from clipprompt.protocols import harmonic_mean

ELEVEN = {'ImageNet', 'Caltech101', 'OxfordPets', 'StanfordCars', 'Flowers102', 'Food101',
          'FGVCAircraft', 'SUN397', 'DTD', 'EuroSAT', 'UCF101'}
WHOLE = ['zero-shot', 'coop', 'cocoop', 'maple', 'kgcoop', 'prograd', 'promptsrc', 'tcp', 'mma',
         'mmrl', 'promptkd']  # base, new and H of each set
KEPT = ['clip-adapter', 'tip-adapter', 'tip-adapter-f']  # read from a log that has no averages
SHOTS = [1, 2, 4, 8, 16]


@pytest.fixture(scope='module')
def papers(): return pd.read_csv(assets()/'papers.csv')


@pytest.fixture(scope='module')
def few(): return pd.read_csv(assets()/'papers-few-shot.csv')


def parted(rows):
    "Rows of single sets, and the one row of the published average"
    mean = rows[rows.dataset == 'Average']
    assert len(mean) == 1
    return rows[rows.dataset != 'Average'], mean.iloc[0]


# ---- base to new ---------------------------------------------------------------------------------

def test_a_number_stands_once(papers, few):
    assert not papers.duplicated(['method', 'dataset', 'backbone', 'shots']).any()
    assert not few.duplicated(['method', 'dataset', 'backbone', 'shots']).any()


def test_each_number_has_a_source(papers, few):
    for file in (papers, few):
        assert file.source.str.contains(r'\d{4}|AWT|MaPLe|LightRA', regex=True).all()


@pytest.mark.parametrize('method', WHOLE)
def test_columns_average_to_the_published_mean(papers, method):
    sets, mean = parted(papers[papers.method == method])
    assert set(sets.dataset) == ELEVEN
    for column in ('base', 'new'):  # two roundings, each of half a hundredth
        assert abs(sets[column].mean()-mean[column]) < .01


def test_h_is_of_base_and_new(papers):
    rows = papers.dropna(subset=['base', 'new', 'h'])
    assert set(rows.method) >= set(WHOLE)
    h = np.array([harmonic_mean(*pair) for pair in rows[['base', 'new']].to_numpy()])
    off = (rows.h-h).abs() >= .01
    assert rows[off][['method', 'dataset', 'h']].values.tolist() == [['mmrl', 'DTD', 73.82]]
    assert rows[off].source.str.contains('H as quoted').all()


def test_recalled_numbers_make_a_mean_and_say_so(papers, few):
    for file in (papers, few):
        recalled = file[file.source.str.contains('recalled')]
        assert len(recalled)
        assert recalled.source.str.contains('average to the published mean').all()
        assert not (recalled.dataset == 'Average').any()  # an average was read
    assert set(papers[papers.source.str.contains('recalled')].method) <= set(WHOLE)


def test_what_saw_unlabelled_test_classes_is_apart(papers):
    assert set(papers[papers.method == 'promptkd'].protocol) == {'base-to-new (transductive)'}
    assert set(papers[papers.method != 'promptkd'].protocol) == {'base-to-new'}


# ---- few shots -----------------------------------------------------------------------------------

def test_few_shot_columns_average_to_the_published_mean(few):
    looked = set()
    for key, rows in few.groupby(['method', 'backbone', 'shots']):
        if len(rows) == 1: continue     # an average alone
        if key[0] in KEPT: continue
        sets, mean = parted(rows)
        assert set(sets.dataset) == ELEVEN, key
        digits = 1 if key[0] == 'clip-lora' else 2
        assert abs(sets.accuracy.mean()-mean.accuracy) < 10**-digits, key
        looked.add(key[:2])
    assert looked == {('zero-shot', 'RN50'), ('coop', 'RN50'), ('zero-shot', 'ViT-B/16'),
                      ('coop', 'ViT-B/16'), ('promptsrc', 'ViT-B/16'), ('provp-ref', 'ViT-B/16'),
                      ('clip-lora', 'ViT-B/16')}


@pytest.mark.parametrize('method', KEPT)
def test_the_log_of_tip_adapter_is_whole(few, method):
    rows = few[(few.method == method) & (few.backbone == 'RN50')]
    assert len(rows) == 11*5 and set(rows.dataset) == ELEVEN
    wide = rows.pivot(index='dataset', columns='shots', values='accuracy')
    assert list(wide) == SHOTS and wide.notna().all(axis=None)
    assert wide.mean().is_monotonic_increasing


def test_averages_alone_are_of_all_shots(few):
    alone = few[few.source.str.contains('CLIP-SVD')]
    assert set(alone.dataset) == {'Average'}
    for _, rows in alone.groupby('method'): assert rows.shots.tolist() == SHOTS
