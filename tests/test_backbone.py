"""Which models can be a backbone, and do the towers compute on each of them what open_clip
computes?

All weights are random and nothing is fetched. The large models keep their widths and lose
blocks; ViT-L-14 with all of its blocks gave the same bits when this file was written.
"""
import hashlib
import logging
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from clipprompt import backbone as module
from clipprompt.backbone import Backbone, Takes, build_backbone, load_backbone, takes
from clipprompt.coop import CoOp
from clipprompt.prompts import Sentences
from clipprompt.towers import TextTower, VisionTower
from helpers import TINY, one_line

NAMES = ['disc', 'two bars', 'a cross with a long name']
CONFIGS = open_clip.factory._MODEL_CONFIGS
OWN = Takes('fast', 'fast')
PLAIN = [n for n in open_clip.list_models() if takes(open_clip.get_model_config(n)) == OWN]


def altered(vision=(), text=(), **top):
    "TINY with other entries"
    return TINY | dict(vision_cfg=TINY['vision_cfg'] | dict(vision),
                       text_cfg=TINY['text_cfg'] | dict(text)) | top

def built(cfg):
    "The bare open_clip model of a configuration, as open_clip's factory chooses its class"
    cfg = dict(cfg)
    custom = cfg.pop('custom_text', False)
    return (open_clip.CoCa if 'multimodal_cfg' in cfg else
            open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg)

@pytest.fixture
def shallow(monkeypatch):
    "A function that cuts the towers of a known model to a few blocks"
    def cut(name, layers):
        cfg = open_clip.get_model_config(name)
        for tower in ('vision_cfg', 'text_cfg'):
            cfg[tower]['layers'] = min(layers, cfg[tower].get('layers', 12))
        monkeypatch.setitem(CONFIGS, name, cfg)
    return cut

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def never(*args, **kwargs): raise AssertionError('this test must not fetch anything')
    monkeypatch.setattr(open_clip, 'download_pretrained', never)


def check_towers(clip):
    """Plain pass: open_clip's bits. Fast pass: the same numbers. One step of CoOp moves the
    context and nothing else"""
    for p in clip.model.parameters():
        # biases and layer norms are no identities
        if p.ndim == 1: p.data += .1*torch.randn_like(p)
    images, texts = torch.randn(1, 3, clip.image_size,
                                clip.image_size), [f'a photo of a {n}.' for n in NAMES]
    sentences = Sentences.of(clip, texts)
    with torch.no_grad():
        text, image = clip.model.encode_text(clip.tokenize(texts)), clip.model.encode_image(images)
        if isinstance(image, tuple): image = image[0]
        if isinstance(text, tuple): text = text[0]
        assert torch.equal(TextTower(clip, plain=True)(sentences), text)
        assert torch.equal(VisionTower(clip, plain=True)(images), image)
        torch.testing.assert_close(VisionTower(clip)(images), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(TextTower(clip)(sentences), text, rtol=1e-4,
                                   atol=1e-5*text.abs().max().item())
    learner = CoOp(clip, NAMES, n_ctx=3)
    before = learner.ctx.tokens.detach().clone()
    optimizer = torch.optim.SGD(learner.parameters(), .1)
    F.cross_entropy(learner(images), torch.tensor([1])).backward()
    optimizer.step()
    assert learner.ctx.tokens.isfinite().all() and not torch.equal(learner.ctx.tokens, before)
    assert [n for n, p in learner.named_parameters() if p.grad is not None] == ['ctx.tokens']
    assert all(p.grad is None for p in clip.model.parameters())


# ---- models that fit -----------------------------------------------------------------------------


@pytest.mark.parametrize('name,layers', [
    ('ViT-S-16', 12), ('ViT-B-32', 12), ('ViT-B-16', 4), ('ViT-B-16-quickgelu', 4),
    ('ViT-L-14', 3), ('ViT-M-16-alt', 4)])
def test_open_clip_models(name, layers, shallow):
    shallow(name, layers)
    clip = load_backbone(name, 'random', device='cpu')
    cfg = open_clip.get_model_config(name)
    v, t = cfg['vision_cfg'], cfg['text_cfg']
    assert clip.image_size == v['image_size']
    assert (clip.vision_width, clip.text_width) == (v['width'], t['width'])
    assert clip.vision_layers == clip.text_layers == min(layers, 12)
    assert clip.context_length == 77 and clip.name == f'{name}/random'
    check_towers(clip)


VARIANTS = dict(context=altered(text=dict(context_length=32)),
                custom=altered(custom_text=True),
                eos=altered(text=dict(pool_type='eos', eos_id=49407)),
                custom_eos=altered(text=dict(pool_type='eos', eos_id=49407, context_length=40),
                                   custom_text=True),
                projection_with_bias=altered(text=dict(proj_bias=True)),
                custom_projection_with_bias=altered(text=dict(proj_bias=True), custom_text=True),
                layer_scale=altered(dict(ls_init_value=.1), dict(ls_init_value=.1)),
                quick=altered(quick_gelu=True),
                tanh=altered(dict(act_kwargs=dict(approximate='tanh'))),
                no_ln_pre=altered(dict(no_ln_pre=True)),
                ln_after_pool=altered(dict(final_ln_after_pool=True)),
                sines=altered(dict(pos_embed_type='sin_cos_2d')),
                patch_dropout=altered(dict(patch_dropout=.5)),
                tokens=altered(dict(output_tokens=True), dict(output_tokens=True),
                               custom_text=True),
                logit_bias=altered(init_logit_bias=-10, nonscalar_logit_scale=True),
                ragged=altered(dict(image_size=37)),
                one_block=altered(dict(layers=1), dict(layers=1)),
                large_vocabulary=altered(text=dict(vocab_size=50000)),
                eps=altered(dict(norm_kwargs=dict(eps=1e-3)), dict(norm_kwargs=dict(eps=1e-3))))

@pytest.mark.parametrize('variant', VARIANTS)
def test_built_models(variant):
    clip = build_backbone(VARIANTS[variant], name=variant)
    assert clip.logit_scale.ndim == 0
    assert clip.context_length == VARIANTS[variant]['text_cfg']['context_length']
    check_towers(clip)
    Backbone(built(VARIANTS[variant]))   # given directly: the same verdict


def test_tokenizer_follows_the_configuration(monkeypatch):
    """A model that was added to open_clip's list, with a context and a way of cleaning text of its
    own"""
    cfg = altered(text=dict(context_length=24, tokenizer_kwargs=dict(clean='canonicalize')))
    monkeypatch.setitem(CONFIGS, 'mine', cfg)
    clip = load_backbone('mine', 'random', device='cpu')
    assert clip.tokenize(['a cat']).shape == (1, 24)
    assert torch.equal(clip.tokenize(['A, cat!']), clip.tokenize(['a cat']))
    with pytest.raises(ValueError) as e: clip.tokenize(['word '*30])
    one_line(e, 'needs 32 tokens', 'holds 24', 'shorten')


# ---- what models take ----------------------------------------------------------------------------

ODD = {
    'average': (dict(vision=dict(pool_type='avg')), ('fast', 'blocks')),
    'attention pool': (dict(vision=dict(attentional_pool=True)), ('fast', 'blocks')),
    'image blocks': (dict(vision=dict(block_type='custom')), ('fast', 'blocks')),
    **{e: (dict(text={e: True}), ('whole', 'fast')) for e in module._EXTRAS
       if e != 'scaled_cosine_attn'},    # open_clip 3.3 cannot run it
    'image extras': (dict(vision=dict(qk_norm=True)), ('fast', 'blocks')),
    'text blocks': (dict(text=dict(block_type='custom')), ('whole', 'fast')),
    'both ways': (dict(text=dict(no_causal_mask=True)), ('whole', 'fast')),
    'cls': (dict(text=dict(embed_cls=True)), ('whole', 'fast')),
    'last': (dict(text=dict(pool_type='last')), ('whole', 'fast')),
    'no projection': (dict(text=dict(proj_type='none')), ('whole', 'fast')),
    'resnet': (dict(vision=dict(layers=(1, 1, 1, 1), width=8)), ('fast', 'features')),
}

@pytest.mark.parametrize('case', ODD)
def test_odd_configurations(case):
    "By configuration and by modules the same, and CoOp trains on all of them"
    change, what = ODD[case]
    cfg = altered(**change, custom_text=True)
    if case == 'no projection': cfg['embed_dim'] = cfg['text_cfg']['width']
    clip = build_backbone(cfg, name='odd')
    assert takes(cfg) == clip.takes == Takes(*what) and f'({what[1]})' in repr(clip)
    learner = CoOp(clip, NAMES, n_ctx=3)
    images = torch.randn(2, 3, clip.image_size, clip.image_size)
    learner.loss(images, torch.tensor([0, 1])).backward()
    assert learner.ctx.tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip.model.parameters())


def test_oblong():
    with pytest.raises(ValueError) as e:
        build_backbone(altered(vision=dict(image_size=(32, 40))), name='odd')
    one_line(e, "'odd'", '32 x 40', 'square')


def test_every_name_of_open_clip():
    "By configuration, and where open_clip alone can build the model, by its modules as well"
    assert {
        'ViT-B-32', 'ViT-B-16', 'ViT-B-16-quickgelu', 'ViT-L-14', 'ViT-L-14-336', 'ViT-S-16',
        'ViT-M-16-alt', 'ViT-H-14', 'ViT-bigG-14'
    } <= set(PLAIN)
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        what = takes(cfg)
        if 'hf_model_name' in cfg['text_cfg'] or 'timm_model_name' in cfg['vision_cfg']: continue
        if isinstance(cfg['vision_cfg']['layers'], int):
            cfg['vision_cfg']['layers'] = cfg['text_cfg']['layers'] = 1
        with torch.device('meta'): model = built(cfg)
        assert module._brings(model, name) == what, name


@pytest.mark.parametrize(
    'model', [nn.Linear(2, 2), nn.ModuleDict(dict(visual=nn.Linear(2, 2)))],
    ids='linear dict'.split())
def test_no_clip_at_all(model):
    with pytest.raises(ValueError) as e: Backbone(model)
    one_line(e, 'custom', 'no CLIP of open_clip', 'create_model', 'from a file')


def test_blocks_of_another_make():
    "OpenAI's own code has blocks of the same names that read [L, N, D]: no shortcut there"
    model = built(TINY)
    for b in model.transformer.resblocks: b.attn.batch_first = False
    assert Backbone(model).takes == Takes('whole', 'fast')


@pytest.mark.parametrize(
    'text,tokenizer,says',
    [(dict(vocab_size=1000), None, ['vocabulary of 1000', 'ids up to 49407']),
     (dict(pool_type='eos', eos_id=2), None, ['EOT 2', 'ids up to 49407']),
     (dict(), open_clip.SimpleTokenizer(context_length=50), ['reads 77 tokens', 'gives 50'])],
    ids='vocabulary eos context'.split())
def test_tokenizer_that_does_not_fit(text, tokenizer, says):
    with pytest.raises(ValueError) as e:
        build_backbone(altered(text=text), name='odd', tokenizer=tokenizer)
    one_line(e, "'odd'", *says, 'pass the tokenizer')


# ---- weight files --------------------------------------------------------------------------------

@pytest.fixture
def mine(monkeypatch):
    "Random weights of a small model that load_backbone knows by the name 'mine'"
    monkeypatch.setitem(CONFIGS, 'mine', TINY)
    return load_backbone('mine', 'random', device='cpu')

def write_state(clip, path): torch.save(clip.model.state_dict(), path)


def write_half(clip, path):
    torch.save({k: v.half() for k, v in clip.model.state_dict().items()}, path)


def write_old(clip, path):
    torch.save(OrderedDict(clip.model.state_dict()), path, _use_new_zipfile_serialization=False)
def write_training(clip, path):
    weights = {f'module.{k}': v for k, v in clip.model.state_dict().items()}
    optimizer = torch.optim.AdamW(clip.model.visual.ln_post.parameters()).state_dict()
    torch.save(dict(epoch=3, name='run', state_dict=weights, optimizer=optimizer), path)


def write_scale(clip, path):
    more = dict(logit_scale=clip.model.logit_scale[None], context_length=torch.tensor(77),
                vocab_size=torch.tensor(49408))
    torch.save(clip.model.state_dict() | more, path)

@pytest.mark.parametrize('ending', ['pt', 'bin', 'ckpt'])
@pytest.mark.parametrize('write', [write_state, write_old, write_training, write_scale])
def test_tensors_in_a_pickle(write, ending, mine, tmp_path):
    write(mine, tmp_path/f'w.{ending}')
    assert load_backbone('mine', tmp_path/f'w.{ending}',
                         device='cpu').fingerprint == mine.fingerprint


def test_safetensors(mine, tmp_path, monkeypatch):
    save_file(mine.model.state_dict(), tmp_path/'w.safetensors')
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in (tmp_path/'w.safetensors', str(tmp_path/'w.safetensors'), '~/w.safetensors'):
        clip = load_backbone('mine', path, device='cpu')
        assert clip.fingerprint == mine.fingerprint and clip.name == 'mine/w'
    write_half(mine, tmp_path/'h.pt')
    half = load_backbone('mine', tmp_path/'h.pt', device='cpu')
    assert half.dtype == torch.float32 and half.fingerprint != mine.fingerprint


class Harm:
    "Unpickling it makes a folder"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('wrap', [
    lambda m, h: h, lambda m, h: dict(m.model.state_dict(), extra=h),
    lambda m, h: dict(state_dict=m.model.state_dict(), args=h), lambda m, h: m.model
],
                         ids='bare entry beside module'.split())
@pytest.mark.parametrize('name', ['w.pt', 'w.bin', 'w.pth', 'w', 'w.safetensors', 'w.npz'])
@pytest.mark.parametrize('new', [True, False], ids='zip legacy'.split())
def test_pickle_is_never_run(mine, tmp_path, name, wrap, new):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save(wrap(mine, Harm(tmp_path/'harmed')), tmp_path/name,
                   _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError) as e: load_backbone('mine', tmp_path/name)
    one_line(e, name, 'damaged', 'safetensors',
             *(['pickled objects'] if name != 'w.safetensors' else []))
    assert not (tmp_path/'harmed').exists()


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pt'])
def test_truncated(mine, tmp_path, name):
    (save_file if name == 'w.safetensors' else torch.save)(mine.model.state_dict(), tmp_path/name)
    whole = (tmp_path/name).read_bytes()
    for keep in (0, 5, 1000, len(whole)//2, len(whole)-1):
        (tmp_path/name).write_bytes(whole[:keep])
        with pytest.raises(ValueError) as e: load_backbone('mine', tmp_path/name)
        one_line(e, name, 'damaged', 'get it again')


@pytest.mark.parametrize('change,says',
                         [(lambda sd: {k: v
                                       for k, v in sd.items()
                                       if k != 'ln_final.weight'}, ['ln_final.weight is missing;']),
                          (lambda sd: sd | {'extra': torch.zeros(2)}, ['extra is']),
                          (lambda sd: sd | {'visual.proj': torch.zeros(3, 3)}, ['visual.proj is']),
                          (lambda sd: sd | {'visual.positional_embedding': torch.zeros(50, 32)},
                           ['visual.positional_embedding'])],
                         ids='missing foreign shape grid'.split())
def test_weights_of_another_model(mine, tmp_path, change, says):
    for name, write in (('w.safetensors', save_file), ('w.pt', torch.save)):
        write(change(mine.model.state_dict()), tmp_path/name)
        with pytest.raises(ValueError) as e: load_backbone('mine', tmp_path/name)
        one_line(e, name, 'the weights of mine', *says, 'give the name')


def test_no_file(mine, tmp_path):
    for path in (tmp_path/'gone.safetensors', tmp_path):
        with pytest.raises(ValueError) as e: load_backbone('mine', path)
        one_line(e, path.name, 'neither a file nor a tag')


# ---- tags ----------------------------------------------------------------------------------------


def gelus(clip):
    return {
        type(b.mlp.gelu).__name__
        for t in (clip.visual, clip.text)
        for b in t.transformer.resblocks
    }

@pytest.fixture
def published(monkeypatch, tmp_path):
    "ViT-B-16 is small, and its tags are files on this disk"
    cfg = altered(quick_gelu=False)
    monkeypatch.setitem(CONFIGS, 'ViT-B-16', cfg)
    monkeypatch.setitem(CONFIGS, 'ViT-B-16-quickgelu', cfg | dict(quick_gelu=True))
    model = built(cfg)
    save_file(model.state_dict(), tmp_path/'open_clip_model.safetensors')
    monkeypatch.setattr(open_clip, 'download_pretrained',
                        lambda tag: str(tmp_path/'open_clip_model.safetensors'))
    return model


@pytest.mark.parametrize('name,tag,gelu', [
    ('ViT-B-16', 'openai', 'QuickGELU'), ('ViT-B-16', 'laion2b_s34b_b88k', 'GELU'),
    ('ViT-B-16-quickgelu', 'openai', 'QuickGELU'), ('ViT-B-16', 'dfn2b', 'QuickGELU')])
def test_the_tag_decides_the_activation(name, tag, gelu, published, recwarn):
    clip = load_backbone(name, tag, device='cpu')
    assert gelus(clip) == {gelu}
    assert clip.name == f'{name}/{tag}'
    assert not [w for w in recwarn if 'GELU' in str(w.message)]
    assert torch.equal(clip.visual.conv1.weight, published.visual.conv1.weight)
    assert torch.equal(clip.text.token_embedding.weight, published.token_embedding.weight)
    assert clip.mean == tuple(open_clip.OPENAI_DATASET_MEAN) and clip.interpolation == 'bicubic'


def test_every_tag_that_wants_quickgelu():
    "No tag of a '-quickgelu' name wants anything else: the tag's word can be taken"
    for name in PLAIN:
        if name.endswith('quickgelu'):
            for t in open_clip.list_pretrained_tags_by_model(name):
                assert open_clip.get_pretrained_cfg(name, t).get('quick_gelu')


def test_pixel_constants_of_the_tag(monkeypatch, tmp_path):
    monkeypatch.setitem(CONFIGS, 'ViT-L-14', TINY)
    save_file(built(TINY).state_dict(), tmp_path/'w.safetensors')
    monkeypatch.setattr(open_clip, 'download_pretrained', lambda tag: str(tmp_path/'w.safetensors'))
    clip = load_backbone('ViT-L-14', 'laion2b_s32b_b82k', device='cpu')
    assert clip.mean == clip.std == (.5, .5, .5)


def test_without_a_network(published, monkeypatch):
    class Unreachable(Exception): pass
    def fails(tag): raise Unreachable('no route\nto host')
    monkeypatch.setattr(open_clip, 'download_pretrained', fails)
    with pytest.raises(ConnectionError) as e: load_backbone('ViT-B-16', 'openai')
    one_line(e, "'openai'", 'ViT-B-16', 'Unreachable', 'connect once', '.safetensors')


def test_damaged_download(published, tmp_path):
    (tmp_path/'open_clip_model.safetensors').write_bytes(b'xx')
    with pytest.raises(ValueError) as e: load_backbone('ViT-B-16', 'openai')
    one_line(e, 'open_clip_model.safetensors', 'damaged', 'delete it')


def test_a_tag_goes_before_a_file_of_its_name(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'openai').write_bytes(b'xx')
    assert load_backbone('ViT-B-16', 'openai', device='cpu').name == 'ViT-B-16/openai'


# ---- the rest ------------------------------------------------------------------------------------

def test_random_weights_are_silent(mine, capfd, recwarn):
    root, records = logging.getLogger(), []
    class Keep(logging.Handler):
        def emit(self, record): records.append(record)
    handlers, level, keep = list(root.handlers), root.level, Keep()
    root.addHandler(keep)
    try: load_backbone('mine', 'random', device='cpu')
    finally: root.removeHandler(keep)
    assert not records
    assert not recwarn.list
    assert capfd.readouterr() == ('', '')
    assert (list(root.handlers), root.level) == (handlers, level)
    root.warning('others still speak')


def test_fingerprint(mine, monkeypatch):
    "Of all weights in their order, computed once; rounding makes another network"
    h = hashlib.sha256()
    for k, v in sorted(mine.model.state_dict().items()): h.update(k.encode() + v.numpy().tobytes())
    first = mine.fingerprint
    assert first == h.hexdigest()[:16]
    assert first != build_backbone(TINY | dict(quick_gelu=True)).fingerprint
    def never(*args): raise AssertionError('computed twice')
    with monkeypatch.context() as m:
        m.setattr(module.hashlib, 'sha256', never)
        assert mine.fingerprint == first
        assert mine.to('cpu').fingerprint == mine.to(torch.float32).fingerprint == first
    other = mine.to(dtype=torch.bfloat16).fingerprint
    assert other != first and other == mine.to(dtype=torch.float32).fingerprint


@pytest.mark.parametrize('pretrained', ['openai', 'random', Path('weights.safetensors')])
def test_picto_clip_has_its_own_weights(pretrained):
    "Others would be ignored, and recorded as if they had been used"
    with pytest.raises(ValueError) as e: load_backbone('picto-clip', pretrained)
    one_line(e, 'picto-clip', str(pretrained), '--pretrained', '--backbone')


def test_other_trainings_of_picto_clip(tmp_path, monkeypatch):
    "By tag where the book is cloned, else by file; what is used is what is recorded"
    shipped = module.assets()/'picto-clip.safetensors'
    monkeypatch.setattr(module, 'assets', lambda: tmp_path)
    with pytest.raises(ValueError) as e: load_backbone('picto-clip', 'seed1')
    one_line(e, "'seed1'", 'clone', 'picto-clip chapter')
    (tmp_path/'backbones').mkdir()
    with safe_open(shipped, 'pt') as f:
        meta, weights = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    weights['visual.proj'] *= 2
    save_file(weights, tmp_path/'backbones'/'picto-clip-seed1.safetensors', meta)
    other = load_backbone('picto-clip', 'seed1')
    assert (other.name, other.pretrained) == ('picto-clip', 'seed1')
    same = load_backbone('picto-clip', tmp_path/'backbones'/'picto-clip-seed1.safetensors')
    monkeypatch.undo()
    assert other.fingerprint == same.fingerprint != load_backbone().fingerprint
    save_file(dict(x=torch.zeros(1)), tmp_path/'x.safetensors')
    with pytest.raises(ValueError) as e: load_backbone('picto-clip', tmp_path/'x.safetensors')
    one_line(e, 'x.safetensors', 'no picto-clip')
