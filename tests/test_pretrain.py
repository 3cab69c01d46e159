"""Chapter 30's promises: what is shipped, how it was split, and that it can be made again.

The rebuild from the npm tarball runs where `CLIPPROMPT_ICONIFY` names it (pytest -m "slow or not
slow").
"""
import hashlib
import io
import json
import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from clipprompt import pretrain as P
from clipprompt.backbone import assets
from clipprompt.suite import build_suite

BELL = ('<path fill="none" stroke="currentColor" stroke-linecap="round" '
        'stroke-linejoin="round" stroke-width="2" '
        'd="M10 5a2 2 0 1 1 4 0a7 7 0 0 1 4 6v3a4 4 0 0 0 2 3H4a4 4 0 0 0 2-3v-3a7 7 0 0 1 4-6'
        'M9 17v1a3 3 0 0 0 6 0v-1"/>')
SMALL = dict(P.MODEL, vision_cfg=dict(P.MODEL['vision_cfg'], layers=2, width=64),
             text_cfg=dict(P.MODEL['text_cfg'], layers=2))


@pytest.fixture(scope='module')
def table(): return pd.read_csv(assets()/'pictograms.csv', dtype=str, keep_default_na=False)


# ---- the benchmark

def test_counts(table):
    icons = table[table.part == 'icons']
    count = icons.groupby(['class', 'split']).size().unstack(fill_value=0)
    assert set(count.index) == set(P.CLASSES) and len(count) == 80
    assert count.train.min() >= 16 and count.test.min() >= 8
    assert set(table.part) == {'icons', 'styles', 'emoji', 'unseen'}
    assert set(table.split) == {'train', 'test'}
    assert set(table[table.part.isin(['styles', 'unseen'])].split) == {'test'}
    assert set(table[table.part == 'styles']['class']) == set(P.CLASSES)
    emoji = table[table.part == 'emoji'].groupby(['class', 'split']).size().unstack(fill_value=0)
    assert len(emoji) == 100 and emoji.min().min() >= 2


def test_families(table):
    """No family of the pre-training anywhere; train and test families disjoint within a class;
    styles are not icons"""
    assert not set(table.family) & P.PRETRAIN
    for (part, cls), group in table[table.part.isin(['icons', 'emoji'])].groupby(['part', 'class']):
        train, test = (set(group[group.split == s].family) for s in ('train', 'test'))
        assert not train & test, (part, cls)
    assert not set(table[table.part == 'styles'].family) & set(table[table.part == 'icons'].family)
    assert (table[table.part == 'icons'].groupby(['class', 'family']).size() <= 3).all()
    assert all(P.FAMILY.get(s, s) == f for s, f in zip(table.set, table.family))


def test_halves(table):
    names = sorted(set(table[table.part == 'icons']['class']))
    assert len(names) % 2 == 0
    assert names[0] == 'airplane'
    assert names[39:41] == ['laptop', 'light bulb']
    assert names[-1] == 'warning'


def test_emoji_and_unseen_are_other_concepts(table):
    emoji, unseen = (set(table[table.part == p]['class']) for p in ('emoji', 'unseen'))
    assert not (emoji | unseen) & (set(P.ALIAS) | set(P.MIXED))
    assert not emoji & unseen
    assert len(unseen) == 40


def test_zip(table):
    path = assets()/'pictograms.zip'
    assert path.stat().st_size < 4e6
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None and z.namelist() == table.file.tolist() == sorted(table.file)
        assert all(i.compress_type == zipfile.ZIP_STORED and i.date_time == (1980, 1, 1, 0, 0, 0)
                   for i in z.infolist())
        for name, part in zip(table.file, table.part):
            image = Image.open(io.BytesIO(z.read(name)))
            assert image.size == (64, 64)
            assert image.mode in (('L',) if part == 'icons' else ('L', 'RGB'))
            low, high = image.convert('L').getextrema()
            assert high > low, f'{name} is blank'
    for f, p, c, s in zip(table.file, table.part, table['class'], table.set):
        assert re.fullmatch(rf'{p}/{c.replace(" ", "_")}/{s}--[a-z0-9-]+\.png', f)


def test_fingerprint():
    shipped = (assets()/'pictograms.sha256').read_text().split()[0]
    assert shipped == P.fingerprint(assets()/'pictograms.zip')


def test_no_picture_twice_across_the_split(table):
    with zipfile.ZipFile(assets()/'pictograms.zip') as z:
        icons = table[table.part == 'icons']
        picture = lambda f: np.asarray(Image.open(io.BytesIO(z.read(f))).convert('RGB'))
        ink = {f: P.ink_map(P.shrink(picture(f))) for f in icons.file}
    for cls, group in icons.groupby('class'):
        m = np.stack([ink[f] for f in group.file])
        assert (m@m.T - 2*np.eye(len(m))).max() <= .95 + 1e-4, cls


def test_attribution(table):
    text = (assets()/'PICTURES.md').read_text(encoding='utf-8')
    shipped, learned = text.split('## Pictures that picto-clip learned from')
    listed = lambda part: set(re.findall(r'^\| ([a-z0-9-]+) \|', part, re.M)) - {'set'}
    suite = pd.read_csv(assets()/'suite.csv')
    first, second = shipped.split('## Pictures in suite.zip')
    assert listed(first) == set(table.set) and listed(second) == set(suite.set)
    assert {P.FAMILY.get(s, s) for s in listed(learned)} == P.PRETRAIN
    licence = r'\| \[?(MIT|Apache-2\.0|ISC|BSD-3-Clause|CC0-1\.0)\]?'
    used = set(re.findall(licence + r'[^|]*\|$', text, re.M))
    rows = [l for l in text.splitlines()
            if re.match(r'\| [a-z0-9-]+ \|', l) and not l.startswith('| set ')]
    assert all(re.search(licence + r'(\(https?://[^)]*\))? \|$', l) for l in rows)
    assert all(f'## {licence}\n' in learned for licence in used)


# ---- the weights

def test_weights():
    path = assets()/'picto-clip.safetensors'
    assert path.stat().st_size < 20e6
    with safe_open(path, 'pt') as f:
        meta, keys = f.metadata(), set(f.keys())
        ids, rows = f.get_tensor('token_ids'), f.get_tensor('token_embedding.weight')
    assert len(ids) == len(rows) == len(set(ids.tolist()))
    assert (ids.diff() > 0).all()
    assert rows.dtype == torch.float16
    cfg = json.loads(meta['model_cfg'])
    assert cfg == P.MODEL
    assert cfg['vision_cfg']['layers'] >= 8
    assert cfg['text_cfg']['layers'] >= 8
    assert cfg['vision_cfg']['width'] != cfg['text_cfg']['width']
    assert json.loads(meta['mean']) == [P.MEAN]*3
    assert json.loads(meta['std']) == [P.STD]*3
    assert meta['interpolation'] == 'bicubic'
    assert {
        'logit_scale', 'text_projection', 'positional_embedding', 'visual.proj',
        'transformer.resblocks.7.mlp.c_proj.weight'
    } <= keys
    assert {P.SOT, P.EOT, *P.encode('a photo of a camera.')} <= set(ids.tolist())


def test_log_and_weights_agree():
    log = pd.read_csv(assets()/'picto-clip-training.csv')
    assert list(log.columns) == ['step', 'loss', 'logit_scale', 'seconds']
    assert log.step.is_monotonic_increasing
    assert log.seconds.is_monotonic_increasing
    with safe_open(assets()/'picto-clip.safetensors', 'pt') as f:
        assert int(f.metadata()['steps']) == log.step.iloc[-1]
        scale = f.get_tensor('logit_scale').exp().item()
        assert scale == pytest.approx(log.logit_scale.iloc[-1], abs=.1)


# ---- names and captions

@pytest.mark.parametrize('name,words,style', [
    ('bell', 'bell', ''), ('bell-fill', 'bell', 'filled'), ('outline-bell', 'bell', 'outline'),
    ('camera-24-regular', 'camera', ''), ('bell-two-tone', 'bell', ''),
    ('battery-o', 'battery', 'outline'), ('mail-02', 'mail', ''), ('home-v2-line', 'home', 'line'),
    ('light-bulb', 'light bulb', ''), ('bulb-light', 'bulb', 'light'), ('solid', '', 'solid'),
    ('', '', '')])
def test_concept(name, words, style):
    assert P.concept(name) == words and P.style_of(name, words) == style


def test_own_suffix_goes_once():
    assert P.concept('bell-20-solid', ['20-solid', 'solid']) == 'bell'
    assert P.concept('arrow-left-left', ['left']) == 'arrow left'


def test_one_size():
    rows = pd.DataFrame([('s', 's', f'add-{n}-filled', 'add', '')
                         for n in (16, 24, 48)] + [('s', 's', 'bell-16-light', 'bell', '')],
                        columns='set family name concept style'.split())
    assert P.one_size(rows).name.tolist() == ['add-24-filled', 'bell-16-light']


def test_pairs_leave_out():
    row = lambda s, name, f=None: (s, f or P.FAMILY.get(s, s), name, P.concept(name), '')
    icons = pd.DataFrame([row('tabler', 'bell'), row('lucide', 'bell'), row('tabler', 'photo-up'),
                          row('lucide', 'photo-up'), row('ph', 'bell-duotone'), row('jam', 'bell'),
                          row('noto', 'bell'), row('tabler', 'gizmo')],
                         columns='set family name concept style'.split())
    assert P.choose_pairs(icons).set.tolist() == ['tabler', 'lucide']
    assert set(P.choose_pairs(icons).concept) == {'bell'}


def test_captions_never_say_photo():
    rng, photo = random.Random(0), set(P.encode('photo'))
    for _ in range(3000): assert not photo & set(P.caption('bell', rng.choice(['', 'solid']), rng))
    assert not any(w in t for t in P.PLAIN + P.STYLED + P.CLIP_80 for w in ('photo', 'picture'))
    assert P.caption('bell', '', random.Random(5)) == P.caption('bell', '', random.Random(5))


def test_pad_keeps_eot_last():
    tokens = P.pad([P.encode('bell'), P.encode('word '*60)])
    assert tokens.shape == (2, 24)
    assert (tokens[:, 0] == P.SOT).all()
    assert tokens.argmax(1).tolist() == [2, 23]


# ---- pictures

def test_render_is_byte_stable():
    """These digits may change with a new resvg only on purpose: then the shipped pictures change
    as well"""
    pytest.importorskip('resvg_py', reason='needs clipprompt[pretrain]')
    svg = P.to_svg(dict(icons=dict(bell=dict(body=BELL)), width=24, height=24), 'bell')
    picture = P.render(svg)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [255]*3
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == '8551475f4ed05433'


def test_view_box_grows_to_a_square():
    svg = P.to_svg(dict(icons=dict(a=dict(body='<path d="M0 0"/>', width=10, left=3)), height=20),
                   'a')
    assert 'viewBox="-2.0 0.0 20 20"' in svg and 'currentColor' not in svg


def test_twins():
    grey = np.full((32, 32), 255, np.uint8); grey[8:20, 10:14] = 0; grey[16:20, 10:24] = 0
    other = np.full((32, 32), 255, np.uint8); other[8:24, 8:24] = 0
    inks = np.stack([
        P.ink_map(g)
        for g in (grey, np.roll(grey, (3, -4), (0, 1)), other, np.full((32, 32), 255, np.uint8))
    ])
    assert P.without_twins(inks, [0, 1, 2, 3], inks[:0]) == [0, 2]
    assert P.without_twins(inks, [1, 0, 2, 3], inks[:0]) == [1, 2]
    assert P.without_twins(inks, [0, 1, 2], inks[2:3]) == [0]


def test_png_is_lossless():
    g = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for picture, mode in ((np.stack([g]*3, -1), 'L'), (np.stack([g, g.T, g], -1), 'RGB')):
        image = Image.open(io.BytesIO(P.to_png(picture)))
        assert image.mode == mode and (np.asarray(image.convert('RGB')) == picture).all()


# ---- bad input

def test_wrong_source_says_what_to_do(tmp_path):
    fake = tmp_path/'iconify-json.tgz'; fake.write_bytes(b'not the package')
    with pytest.raises(ValueError, match='npm pack @iconify/json@2.2.535'):
        P.open_source(fake, tmp_path)
    with pytest.raises(FileNotFoundError, match='npm pack'):
        P.open_source(tmp_path/'nothing.tgz', tmp_path)
    (tmp_path/'package').mkdir()
    (tmp_path/'package'/'package.json').write_text('{"version": "2.2.1"}')
    with pytest.raises(ValueError, match='2.2.1'): P.open_source(tmp_path/'package', tmp_path)
    r = CliRunner().invoke(P.app, ['build', '--source', str(fake), '--out', str(tmp_path/'out')])
    assert r.exit_code == 2 and 'Traceback' not in r.output


# ---- training

@pytest.fixture
def pairs():
    g = torch.Generator().manual_seed(0)
    images = (torch.rand(12, 32, 32, generator=g)*255).to(torch.uint8).numpy()
    concepts, styles = ['bell', 'cloud', 'shopping cart', 'key']*3, ['', 'solid', '']*4
    return P.Pairs(images, concepts, styles, P.token_ids(concepts, styles))

def steps(run, n):
    for _ in range(n): run.advance()
    return run


def same(a, b):
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return all(torch.equal(x, y) for x, y in pairs)


def test_training_resumes_to_identical_weights(pairs, tmp_path):
    new = lambda: P.Run(pairs, SMALL, steps=4, batch_size=5, warmup=2)
    whole = steps(new(), 4)
    steps(new(), 2).save(tmp_path/'c.pt')
    resumed = new(); resumed.load(tmp_path/'c.pt')
    assert resumed.step == 2 and not same(whole, resumed)
    assert same(whole, steps(resumed, 2)) and resumed.loss == whole.loss
    assert not list(tmp_path.glob('*.tmp'))


def test_train_after_an_interruption(pairs, tmp_path):
    new = lambda: P.Run(pairs, SMALL, steps=4, batch_size=5, warmup=2)
    def stop(line):
        if line.startswith('step 3 '): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        P.train(new(), tmp_path, every=2, log_every=1, report=stop)
    resumed = new(); P.train(resumed, tmp_path, every=2, log_every=1, report=lambda line: None)
    assert same(resumed, steps(new(), 4))
    assert pd.read_csv(tmp_path/'picto-clip-training.csv').step.tolist() == [1, 2, 3, 4]


def test_checkpoint_of_other_pairs(pairs, tmp_path):
    P.Run(pairs, SMALL, steps=1, batch_size=5).save(tmp_path/'c.pt')
    other = P.Pairs(pairs.images, pairs.concepts, pairs.styles,
                    pairs.token_ids[:-3] + pairs.token_ids[-2:])
    with pytest.raises(ValueError, match='other pre-training pairs'):
        P.Run(other, SMALL, steps=1, batch_size=5).load(tmp_path/'c.pt')


def test_seeds_make_other_models_and_are_not_mixed(pairs, tmp_path):
    first, again, other = (steps(P.Run(pairs, SMALL, steps=2, batch_size=5, seed=s), 1)
                           for s in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    first.save(tmp_path/'c.pt')
    with pytest.raises(ValueError, match='seed 1, not 2; remove it'): other.load(tmp_path/'c.pt')


def test_pairs_survive_a_round_trip(pairs, tmp_path):
    pairs.save(tmp_path)
    back = P.Pairs.load(tmp_path)
    assert (back.images == pairs.images).all()
    assert (back.concepts, back.styles) == (pairs.concepts, pairs.styles)
    assert back.token_ids == pairs.token_ids


def test_soft_targets():
    f = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    loss = P.contrastive_loss(f, f, torch.tensor(100.), torch.arange(4))
    twice = P.contrastive_loss(f[[0, 0, 1, 1]], f[[0, 0, 1, 1]], torch.tensor(100.),
                               torch.tensor([0, 0, 1, 1]))
    # two right answers share the probability
    assert loss < .01 and twice.item() == pytest.approx(np.log(2), abs=.01)


def test_exported_weights_load(pairs, tmp_path):
    from clipprompt.backbone import _picto_clip
    run = P.Run(pairs, SMALL, steps=1, batch_size=5)
    P.export_weights(run, tmp_path/'w.safetensors', SMALL)
    clip = _picto_clip(tmp_path/'w.safetensors')
    row = run.model.token_embedding.weight[pairs.token_ids.index(P.encode('bell')[0])]
    assert torch.allclose(clip.model.token_embedding.weight[P.encode('bell')[0]], row, atol=1e-3)
    tokens = clip.tokenize(['a bell'])                                        # [1, 77], plain ids
    short = P.row_numbers(pairs.token_ids)[P.pad([P.encode('a bell')])]       # [1, 4], row numbers
    with torch.no_grad():
        assert torch.allclose(clip.model.encode_text(tokens),
                              P.encode_text(run.model.eval(), short), atol=1e-2)


# ---- everything again

@pytest.mark.slow
def test_rebuild_equals_what_is_shipped(tmp_path):
    source = os.environ.get('CLIPPROMPT_ICONIFY')
    if not source: pytest.skip(f'set CLIPPROMPT_ICONIFY to iconify-json-{P.VERSION}.tgz; {P.HOW}')
    pytest.importorskip('resvg_py', reason='needs clipprompt[pretrain]')
    icons = P.open_source(Path(source), tmp_path/'source')
    P.build(icons, tmp_path)
    build_suite(icons, tmp_path)
    for name in ('pictograms.csv', 'pictograms.sha256', 'suite.csv', 'suite.sha256', 'PICTURES.md'):
        assert (tmp_path/name).read_bytes() == (assets()/name).read_bytes(), name
    with safe_open(assets()/'picto-clip.safetensors', 'pt') as f:
        assert P.Pairs.load(tmp_path).token_ids == f.get_tensor('token_ids').tolist()
