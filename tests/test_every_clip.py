"""Towers of every kind that open_clip has: the definition by hooks, tokenizers, pixels, refusals

Small members of each family with random weights, built by open_clip itself.
"""
import json
import threading

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import _create_eva
from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin
from torch.nn import functional as F

from clipprompt import backbone as module
from clipprompt.adapters import TaskRes
from clipprompt.anchored import KgCoOp
from clipprompt.backbone import Takes, UnfitError, backbones, build_backbone, load_backbone, takes
from clipprompt.check import _small_data, check_learner
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.deep import IVLP, MaPLe, VPT
from clipprompt.inside import MMA, MMRL, ClipLoRA
from clipprompt.learner import PromptLearner
from clipprompt.map_dafe import MAPDAFE
from clipprompt.pictures import test_transform as transform
from clipprompt.prompts import Given, Prompts, Sentences, phrase_tokens, place
from clipprompt.slots import whole_image, whole_text
from clipprompt.tcp import TCP
from clipprompt.towers import TextTower, VisionTower
from helpers import TINY, one_line, refused, shapes, works

NAMES = ['cat', 'traffic light', 'a much longer name']
BOTH = dict(no_causal_mask=True, pool_type='last')
COCA = dict(width=16, heads=2, layers=1, context_length=24, vocab_size=49408)


@register_model
def vit_for_tests(pretrained=False, **kwargs): return timm.create_model('test_vit', **kwargs)


@register_model
def eva_for_tests(pretrained=False, **kwargs):
    "EVA02 with rotary positions, for pictures of 32 pixels"
    usual = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, swiglu_mlp=True,
                 use_rot_pos_emb=True, ref_feat_shape=(4, 4))
    return _create_eva('eva02_tiny_patch14_224', **usual, **kwargs)


@register_model
def vitamin_for_tests(pretrained=False, **kwargs):
    "Convolutions, and blocks on what they leave of 64 pixels"
    cfg = VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8,
                 conv_cfg=VitConvCfg(norm_layer='layernorm2d', norm_eps=1e-6), head_type='1d')
    usual = dict(img_size=64, embed_dim=32, depth=3, num_heads=2, mlp_layer=GeGluMlp, mlp_ratio=2.,
                 class_token=False, embed_cfg=cfg)
    return _create_vitamin('vitamin_small_224', **usual, **kwargs)


def family(vision=None, text=None, **top):
    "A configuration of small towers"
    own = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16)
    timm = dict(image_size=160, timm_proj=None, timm_pool='token')
    vision = vision or {}
    base = timm if 'timm_model_name' in vision else own
    words = dict(context_length=24, vocab_size=49408, width=24, heads=2, layers=3)
    return dict(embed_dim=64, vision_cfg=base | vision, text_cfg=words | (text or {}),
                custom_text=True) | top

FAMILIES = dict(
    clip=(family(), 'fast', 'fast'),
    gap=(family(dict(pool_type='avg', no_ln_pre=True), BOTH), 'whole', 'blocks'),
    resnet=(family(dict(layers=(1, 1, 1, 1), width=8, patch_size=None)), 'fast', 'features'),
    convnext=(family(dict(timm_model_name='test_convnext', timm_proj='linear', timm_pool='avg',
                          image_size=32)), 'fast', 'features'),
    siglip=(family(dict(timm_model_name='vit_for_tests', timm_pool='map', timm_proj='none'),
                   BOTH | dict(proj_bias=True)), 'whole', 'blocks'),
    coca=(family(dict(attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
                 dict(embed_cls=True, output_tokens=True), multimodal_cfg=COCA),
          'whole', 'blocks'),
    eva=(family(dict(timm_model_name='eva_for_tests', image_size=32)), 'fast', 'blocks'),
    vitamin=(family(dict(timm_model_name='vitamin_for_tests', timm_pool='avg', image_size=64)),
             'fast', 'blocks'),
)
SEQUENCES = [f for f, (_, _, image) in FAMILIES.items() if image != 'features']


@pytest.fixture(scope='module')
def built():
    "Each family once"
    made = {}
    def one(name):
        if name in made: return made[name]
        torch.manual_seed(0)
        clip = made[name] = build_backbone(FAMILIES[name][0], name=name)
        for p in clip.model.parameters():
            if p.ndim < 3: p.data += .1*torch.randn_like(p)   # biases are no identities
        return clip
    return one


def pictures(clip, n=2):
    return torch.randn(n, 3, clip.image_size, clip.image_size,
                       generator=torch.Generator().manual_seed(1))


# ---- the table -----------------------------------------------------------------------------------

def test_what_all_of_them_take():
    rows = {r['name']: r for r in backbones()}
    assert len(rows) == len({n for n, _ in open_clip.list_pretrained()})
    assert sum(r['text'] in ('fast', 'whole') for r in rows.values()) >= 110
    assert sum(r['image'] != 'features' for r in rows.values()) >= 90
    assert rows['RN50'] | dict(tags=0) == dict(
        name='RN50', family='ResNet', tags=0, text='fast', image='features', tokenizer='CLIP',
        extra='', context=77, pixels=224)
    assert rows['ViT-B-16-SigLIP2']['extra'] == 'hf' and rows['ViT-B-16']['family'] == 'CLIP'


LARGE = [r['name'] for r in backbones() if 'hf_model_name' not in
         open_clip.get_model_config(r['name'])['text_cfg']]
ONE_EACH = ['RN50', 'convnext_base', 'ViT-B-16-SigLIP', 'coca_ViT-B-32', 'EVA02-B-16', 'ViTamin-S',
            'MobileCLIP-B', 'MobileCLIP-S1', 'PE-Core-B-16', 'ViT-L-14-CLIPA']

@pytest.mark.parametrize('name', [
    name if name in ONE_EACH else pytest.param(name, marks=pytest.mark.stress) for name in LARGE])
def test_the_table_is_what_is_built(name):
    "On the meta device: shapes without numbers"
    cfg = open_clip.get_model_config(name)
    what, custom = takes(cfg), cfg.pop('custom_text', False)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if 'multimodal_cfg' in cfg: kind = open_clip.CoCa
    with torch.device('meta'): model = kind(**cfg)
    assert module._brings(model, name) == what
    embedding, blocks = module._text_parts(getattr(model, 'text', model))
    assert embedding.embedding_dim == cfg['text_cfg']['width'] and len(blocks) > 1
    assert module._embed_dim(model) == cfg['embed_dim']
    if what.image == 'features': return
    blocks, front, norm, width = module._image_parts(model.visual)
    assert len(blocks) > 1 and front in (0, 1) and width > 100


# ---- towers --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FAMILIES)
def test_without_prompts_open_clips_own_features(name, built):
    clip, (cfg, text, image) = built(name), FAMILIES[name]
    assert clip.takes == takes(cfg) == Takes(text, image)
    texts, images = [f'a photo of a {n}.' for n in NAMES], pictures(clip)
    with torch.no_grad():
        own = clip.model.encode_text(clip.tokenize(texts), normalize=False)
        picture = clip.model.encode_image(images, normalize=False)
        for plain in (True, False):
            ours = TextTower(clip, plain=plain)(Sentences.of(clip, texts))
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
            ours = VisionTower(clip, plain=plain)(images)
            torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-5)
        words = Given(phrase_tokens(clip, 'a photo of a')[None])
        torch.testing.assert_close(TextTower(clip)(place(clip, NAMES, 4), words), own,
                                   rtol=1e-4, atol=1e-5)


def test_three_ways_are_one():
    "Where CLIP's own towers run: hooks, open_clip's blocks and the shortcuts, with gradients"
    clip = build_backbone(TINY, name='tiny').to(torch.float64)
    s, images = place(clip, NAMES, 3), pictures(clip).double()
    text = Prompts(3, clip.text_width, depth=2).double()
    groups = Given(torch.randn(2, 4, 1, 3, clip.text_width).double().requires_grad_())
    own = Prompts(3, clip.text_width, depth=2, n_classes=3).double()
    def grads(y, x): return y, torch.autograd.grad(y.square().sum(), x)[0]
    for p in (text, groups, own):
        want = grads(TextTower(clip, plain=True)(s, p), p.tokens)
        whole = whole_text(clip, s, p)
        for got in (grads(TextTower(clip)(s, p), p.tokens),
                    grads(whole if p is groups else whole[0], p.tokens)):
            for a, b in zip(want, got): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    shallow, deep = (Prompts(2, clip.vision_width, depth=d).double() for d in (1, 3))
    for p in (shallow, deep):
        for after, ln_pre in (('patches', True), ('cls', True), ('patches', False), ('cls', False)):
            how = dict(after=after, ln_pre=ln_pre)
            want = grads(VisionTower(clip, plain=True, **how)(images, p), p.tokens)
            for got in (grads(VisionTower(clip, **how)(images, p), p.tokens),
                        grads(whole_image(clip, images, p, **how), p.tokens)):
                for a, b in zip(want, got): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def by_parts(clip, images, prompts, after, ln_pre):
    "Image prompts in timm's towers, written out from their public parts"
    t = clip.visual.trunk
    x, turn = t.patch_embed(images), None
    if type(t).__name__ == 'Eva': x, turn = t._pos_embed(x)
    else: x = t._pos_embed(x)
    x, n, front = t.norm_pre(x), prompts.tokens.shape[1], t.num_prefix_tokens
    fresh = t.norm_pre(prompts.tokens[0]) if ln_pre else prompts.tokens[0]
    B, N = x.shape[:2]
    cls, patches = x[:, :front], x[:, front:]
    tokens = fresh.expand(B, -1, -1)
    for l, block in enumerate(t.blocks):
        if 0 < l < len(prompts.tokens): tokens = prompts.tokens[l].expand(B, -1, -1)
        order = [cls, tokens, patches] if after == 'cls' else [cls, patches, tokens]
        row, how = torch.cat(order, 1), {}
        if turn is not None:
            d = turn.shape[-1]//2
            still = torch.cat([torch.zeros(n, d), torch.ones(n, d)], 1)
            how['rope'] = torch.cat([still, turn] if after == 'cls' else [turn, still])
        row = block(row, **how)
        sizes = [front, n, N-front] if after == 'cls' else [front, N-front, n]
        parts = row.split(sizes, 1)
        cls, tokens, patches = (parts if after == 'cls' else (parts[0], parts[2], parts[1]))
    x = t.norm(torch.cat([cls, patches], 1))
    return clip.visual.head(t.forward_head(x))


@pytest.mark.parametrize('after', ['patches', 'cls'])
@pytest.mark.parametrize('name', ['siglip', 'eva', 'vitamin'])
def test_image_prompts_by_hooks_and_by_parts(name, after, built):
    clip = built(name)
    images = pictures(clip)
    for depth in (1, 3):
        prompts = Prompts(2, clip.vision_width, depth=depth, std=1.)
        with torch.no_grad():
            ours = VisionTower(clip, after=after)(images, prompts)
            want = by_parts(clip, images, prompts, after, True)
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
            assert (ours-VisionTower(clip)(images)).abs().max() > 1e-3


@pytest.mark.parametrize('name', ['gap', 'siglip', 'coca'])
def test_deep_text_prompts_by_hooks_and_by_parts(name, built):
    "open_clip's text tower, block by block"
    clip = built(name)
    s, p = place(clip, NAMES, 2), Prompts(2, clip.text_width, depth=3, std=1.)
    t = clip.text
    with torch.no_grad():
        x, mask = t._embeds(s.ids)
        for l, block in enumerate(t.transformer.resblocks):
            fresh = p.tokens[l] + (t.positional_embedding[s.slots] if l == 0 else 0)
            x = x.scatter(1, s.slots[..., None].expand(-1, -1, x.shape[-1]),
                          fresh.expand(len(x), -1, -1))
            x = block(x, attn_mask=mask)
        if t.cls_emb is not None: x = t.ln_final(x[:, -1])
        else: x = t.ln_final(x)[:, -1]
        W = t.text_projection
        want = W(x) if callable(W) else x @ W
        torch.testing.assert_close(TextTower(clip)(s, p), want, rtol=1e-4, atol=1e-5)


def test_chunks_and_checkpoints_change_nothing(built):
    clip = built('siglip')
    s, p = place(clip, NAMES, 3), Prompts(3, clip.text_width, depth=2)
    images, v = pictures(clip, 3), Prompts(2, clip.vision_width, depth=2)
    def grads(tower, x, prompts):
        y = tower(x, prompts)
        return y, torch.autograd.grad(y.square().sum(), prompts.tokens)[0]
    for kind, x, prompts in ((TextTower, s, p), (VisionTower, images, v)):
        want = grads(kind(clip), x, prompts)
        for how in (dict(chunk=2), dict(checkpoint=True), dict(chunk=1, checkpoint=True)):
            for a, b in zip(want, grads(kind(clip, **how), x, prompts)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        a, b = (VisionTower(clip, chunk=c)(images) for c in (None, 1))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_also_after_an_error(built):
    clip = built('siglip')
    def hung(): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
                           for m in clip.model.modules())
    class Broken(Prompts):
        def enter(self, layer, carried):
            if layer == 2: raise RuntimeError('broken')
            return super().enter(layer, carried)
    before = hung()
    for tower, x, width in ((TextTower, place(clip, NAMES, 2), clip.text_width),
                            (VisionTower, pictures(clip), clip.vision_width)):
        with pytest.raises(RuntimeError, match='broken'): tower(clip)(x, Broken(2, width, depth=3))
        tower(clip)(x, Prompts(2, width))
        assert hung() == before


def test_two_threads_on_one_backbone(built):
    clip = built('siglip')
    images = pictures(clip)
    prompts = [Prompts(2, clip.vision_width, std=1., seed=seed) for seed in range(4)]
    tower = VisionTower(clip)
    with torch.no_grad(): want = [tower(images, p) for p in prompts]
    got = [None]*4
    def run(i):
        with torch.no_grad():
            for _ in range(3): got[i] = tower(images, prompts[i])
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(want, got): assert torch.equal(a, b)


# ---- methods -------------------------------------------------------------------------------------

def judged():
    "Two families in every run of the tests, the others in the long one"
    for name in FAMILIES:
        short = name in ('gap', 'resnet')
        for cls in (CoOp, CoCoOp, VPT, MaPLe, KgCoOp) + (TCP, TaskRes)*short:
            marks = [] if short else pytest.mark.stress
            if name != 'clip': yield pytest.param(cls, name, marks=marks)   # elsewhere


@pytest.mark.parametrize('cls,name', [*judged()])
def test_methods_keep_their_promises(cls, name, built):
    clip, image = built(name), cls in (VPT, MaPLe)
    if image and clip.takes.image == 'features':
        with pytest.raises(ValueError) as e: cls(clip, NAMES)
        one_line(e, name, 'no sequence of transformer blocks', 'CoOp', 'ViT-B-16')
        return
    check_learner(cls, FAMILIES[name][0])


@pytest.mark.parametrize('name', [*FAMILIES])
def test_a_step_of_each(name, built):
    clip = built(name)
    kinds = [CoOp, CoCoOp] + [VPT, IVLP, MaPLe]*(clip.takes.image != 'features')
    for cls in kinds:
        learner = cls(clip, NAMES)
        learner.loss(pictures(clip), torch.tensor([0, 1])).backward()
        for k, p in learner.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), (cls, k)
        assert all(p.grad is None for p in clip.model.parameters())


@pytest.mark.parametrize('cls', [MAPDAFE, ClipLoRA, MMA, MMRL])
def test_who_works_inside_the_blocks_says_so(cls, built):
    for name in ('gap', 'siglip', 'vitamin', 'resnet'):
        if cls is MAPDAFE and FAMILIES[name][1] == 'fast': continue   # its image side fills slots
        with pytest.raises(UnfitError) as e: cls(built(name), NAMES)
        one_line(e, cls.method, "CLIP's own towers", 'ViT-B-16')
    thin = ClipLoRA(built('vitamin'), NAMES, encoder='text')   # a text tower like CLIP's
    thin.loss(pictures(thin.backbone), torch.tensor([0, 1])).backward()
    if cls is ClipLoRA:
        with pytest.raises(UnfitError): ClipLoRA(built('gap'), NAMES, encoder='text')


@pytest.mark.parametrize('cls', [TCP, KgCoOp, TaskRes])
def test_newer_methods_on_other_towers(cls, built):
    for name in ('gap', 'siglip', 'coca', 'resnet'):
        learner = cls(built(name), NAMES)
        learner.prepare(_small_data(NAMES))
        learner.loss(pictures(learner.backbone), torch.tensor([0, 1])).backward()
        for k, p in learner.named_parameters(): assert p.grad.isfinite().all(), (name, k)


def test_prompts_of_one_backbone_are_refused_on_another(built, tmp_path):
    CoOp(built('siglip'), NAMES, n_ctx=2).save(tmp_path/'p.safetensors')
    with pytest.raises(ValueError) as e: CoOp.load(tmp_path/'p.safetensors', built('gap'))
    one_line(e, 'siglip', 'gap')


# ---- tokenizers ----------------------------------------------------------------------------------

WORDS = 'a photo of x cat dog traffic light much longer name icon . an the'.split()

def hf_tokenizer(kind, folder, length=16):
    "A tokenizer of the library transformers with few words, as one of open_clip's"
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    special = dict(bert=['[PAD]', '[CLS]', '[SEP]', '[UNK]'],
                   roberta=['<s>', '<pad>', '</s>', '[UNK]'],
                   t5=['<pad>', '</s>', '[UNK]'], gemma=['<pad>', '<eos>', '<bos>', '[UNK]'])[kind]
    vocab = {w: i for i, w in enumerate(special + WORDS)}
    t = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    around = dict(bert=('[CLS] $A [SEP]', ['[CLS]', '[SEP]']),
                  roberta=('<s> $A </s>', ['<s>', '</s>']),
                  t5=('$A </s>', ['</s>']), gemma=('$A <eos>', ['<eos>']))[kind]
    t.post_processor = processors.TemplateProcessing(
        single=around[0], special_tokens=[(w, vocab[w]) for w in around[1]])
    pad = '</s>' if kind == 't5' else special[0] if kind != 'roberta' else '<pad>'
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token=pad, unk_token='[UNK]',
        sep_token='[SEP]' if kind == 'bert' else None)
    fast.save_pretrained(folder)
    return open_clip.tokenizer.HFTokenizer(str(folder), length,
                                           strip_sep_token=kind == 'bert')


@pytest.mark.parametrize('kind', ['bert', 'roberta', 't5', 'gemma'])
def test_words_of_any_tokenizer(kind, tmp_path):
    tokenizer = hf_tokenizer(kind, tmp_path)
    words = module.Words(tokenizer)
    for text in ('cat', 'a photo of a cat.', 'X traffic light.'):
        assert words.frame.rows([words.encode(text)], 16).equal(tokenizer([text])), text
    assert words.decode(words.encode('cat')[0]) == 'cat'
    cfg = family(text=BOTH | dict(context_length=16, vocab_size=40))
    clip = build_backbone(cfg, name=kind, tokenizer=tokenizer)
    for position in ('end', 'middle', 'front'):
        s = place(clip, ['cat', 'traffic light'], 4, position)
        x = words.encode('X')[0]
        assert (s.ids.gather(1, s.slots) == x).all() and s.slots.shape == (2, 4)
        kept = [i for i in s.ids[1].tolist() if i != x]
        assert kept[:len(words.frame.lead)] == words.frame.lead
        assert words.encode('traffic light.') == [i for i in kept if i > 3]
    assert place(clip, ['cat'], 4, words='a photo of a').ids.equal(tokenizer(['a photo of a cat.']))
    with pytest.raises(ValueError) as e: clip.tokenize(['cat '*16])
    one_line(e, 'holds 16', 'shorten')
    with pytest.raises(ValueError) as e: place(clip, ['cat '*16], 4)
    one_line(e, 'holds 16', 'shorten')
    learner = CoOp(clip, ['cat', 'traffic light'], n_ctx=3)
    learner.loss(pictures(clip), torch.tensor([0, 1])).backward()
    assert learner.ctx.tokens.grad.abs().sum() > 0


def test_a_tokenizer_whose_end_is_read(tmp_path):
    "XLM-V's: EOT has no large id, the tower is causal; the short way is exact"
    tokenizer = hf_tokenizer('roberta', tmp_path)
    cfg = family(text=dict(context_length=16, vocab_size=40, pool_type='eos', eos_id=2))
    clip = build_backbone(cfg, name='worldwide', tokenizer=tokenizer)
    assert clip.takes.text == 'fast'
    s, p = place(clip, ['cat', 'traffic light'], 3), Prompts(3, clip.text_width, depth=2)
    with torch.no_grad():
        torch.testing.assert_close(TextTower(clip)(s, p), whole_text(clip, s, p)[0],
                                   rtol=1e-4, atol=1e-5)


def test_hugging_face_text_tower(tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizer = hf_tokenizer('roberta', tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, pad_token_id=1, bos_token_id=0,
        eos_token_id=2)
    config.save_pretrained(tmp_path)
    text = dict(hf_model_name=str(tmp_path), hf_tokenizer_name=str(tmp_path), context_length=16,
                hf_model_pretrained=False, hf_pooler_type='mean_pooler', hf_proj_type='mlp')
    cfg = family() | dict(text_cfg=text)
    clip = build_backbone(cfg, name='roberta', tokenizer=tokenizer)
    assert clip.takes == Takes('whole', 'fast') == takes(cfg) and clip.text_layers == 3
    texts = ['a photo of a cat.', 'a photo of a traffic light.']
    with torch.no_grad():
        own = clip.model.encode_text(clip.tokenize(texts))
        words = Given(phrase_tokens(clip, 'a photo of a')[None])
        ours = TextTower(clip)(place(clip, ['cat', 'traffic light'], 4), words)
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    for cls in (CoOp, MaPLe):
        learner = cls(clip, ['cat', 'traffic light'], n_ctx=2)
        learner.loss(pictures(clip), torch.tensor([0, 1])).backward()
        assert learner.ctx.tokens.grad.abs().sum() > 0


def test_files_of_a_tokenizer_lie_beside_the_weights(tmp_path, monkeypatch):
    "And without them: which file to give"
    cfg = family(text=BOTH | dict(context_length=16, vocab_size=40, hf_tokenizer_name='some/where'))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'mine', cfg)
    tokenizer = hf_tokenizer('gemma', tmp_path/'hub')
    clip = build_backbone(cfg, tokenizer=tokenizer)
    (tmp_path/'lone').mkdir()
    for folder in ('hub', 'lone'):
        save_file(clip.model.state_dict(), tmp_path/folder/'w.safetensors')
    again = load_backbone('mine', tmp_path/'hub'/'w.safetensors', device='cpu')
    assert again.fingerprint == clip.fingerprint
    assert again.tokenize(['a cat']).equal(tokenizer(['a cat']))
    def fails(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(open_clip.tokenizer, 'HFTokenizer', fails)
    with pytest.raises(ConnectionError) as e: load_backbone('mine', tmp_path/'lone'/'w.safetensors')
    one_line(e, 'some/where', 'mine', 'tokenizer.json', 'beside')
    def lacks(*args, **kwargs): raise ImportError('no', name='transformers')
    monkeypatch.setattr(open_clip.tokenizer, 'HFTokenizer', lacks)
    with pytest.raises(ValueError) as e: load_backbone('mine', tmp_path/'lone'/'w.safetensors')
    one_line(e, 'transformers', "pip install 'clipprompt[hf]'")


# ---- pixels --------------------------------------------------------------------------------------

KEYS = 'mean', 'std', 'interpolation', 'resize_mode'

def settings():
    "One tag for every distinct way of preparing pixels"
    found = {}
    for name, tag in open_clip.list_pretrained():
        said = open_clip.get_pretrained_cfg(name, tag)
        found.setdefault(tuple(said.get(k) for k in KEYS), (name, tag))
    return list(found.values())


@pytest.mark.parametrize('name,tag', settings())
def test_pixels_as_the_tag_wants_them(name, tag):
    said = open_clip.get_pretrained_cfg(name, tag)
    pixels = module._pixels(name, said)
    clip = build_backbone(family(), **pixels)
    theirs = open_clip.image_transform(
        clip.image_size, is_train=False, mean=said['mean'], std=said['std'],
        interpolation=said['interpolation'], resize_mode=said['resize_mode'])
    rng = np.random.default_rng(0)
    for w, h in ((61, 40), (33, 97), (20, 20), (32, 32)):
        picture = Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
        torch.testing.assert_close(transform(clip)(picture), theirs(picture))


def test_a_file_gets_the_pixels_that_all_tags_agree_on():
    assert module._pixels('ViT-B-16-SigLIP', {})['resize_mode'] == 'squash'
    assert module._pixels('ViT-B-16-SigLIP', {})['mean'] == (.5, .5, .5)
    assert 'resize_mode' not in module._pixels('ViT-H-14', {})     # its tags differ


def test_a_class_of_zero_width_is_no_prompt(built):
    "Asking for the width of image prompts is asking for image prompts"
    class Mine(PromptLearner):
        method = 'mine'
        def __init__(self, backbone, classnames):
            super().__init__(backbone, classnames)
            self.tokens = torch.nn.Parameter(torch.zeros(1, backbone.vision_width))
    with pytest.raises(ValueError) as e: Mine(built('convnext'), NAMES)
    one_line(e, 'convnext', 'image prompts cannot enter')
    assert F.normalize(CoOp(built('convnext'), NAMES).text_features(), dim=-1).shape[0] == 3


# ---- the command line ----------------------------------------------------------------------------

@pytest.fixture
def small_names(monkeypatch):
    "Names of open_clip, with towers of a size that a test can run"
    known = open_clip.factory._MODEL_CONFIGS
    rn = family(dict(layers=(1, 1, 1, 1), width=8, patch_size=None, image_size=64))
    monkeypatch.setitem(known, 'RN50', rn)
    text = BOTH | dict(context_length=32, vocab_size=40, hf_tokenizer_name='some/where',
                       tokenizer_kwargs=dict(clean='canonicalize'))
    siglip = family(dict(timm_model_name='vit_for_tests', timm_pool='map', timm_proj='none'), text)
    monkeypatch.setitem(known, 'ViT-B-16-SigLIP2', siglip)
    return dict(rn=rn, siglip=siglip)


@pytest.mark.parametrize('methods', ['zero-shot,coop,tip-adapter', 'vpt'])
def test_a_resnet_in_the_command_line(methods, small_names, tmp_path):
    clip = build_backbone(small_names['rn'])
    save_file(clip.model.state_dict(), tmp_path/'w.safetensors')
    args = ('compare', '--backbone', 'RN50', '--pretrained', tmp_path/'w.safetensors', '--methods',
            methods, '--task', shapes(tmp_path/'photos'), '--quick', '--protocol', 'few-shot',
            '--out', tmp_path/'o')
    if methods == 'vpt': return refused(*args, says=['RN50', 'image prompts cannot enter'])
    works(*args)
    rows = pd.read_csv(tmp_path/'o'/'results.csv')
    assert set(rows.method) == set(methods.split(',')) and rows.accuracy.notna().all()
    assert set(rows.backbone) == {'RN50/w'}


def test_siglip_in_the_command_line(small_names, tmp_path):
    "Its tokenizer lies beside the weights; a prompt file finds its way back"
    tokenizer = hf_tokenizer('gemma', tmp_path/'hub', 32)
    clip = build_backbone(small_names['siglip'], tokenizer=tokenizer)
    weights = tmp_path/'hub'/'w.safetensors'
    save_file(clip.model.state_dict(), weights)
    what = ('--backbone', 'ViT-B-16-SigLIP2', '--pretrained', weights)
    photos = shapes(tmp_path/'photos')
    works('compare', *what, '--methods', 'zero-shot,coop', '--task', photos, '--quick',
          '--out', tmp_path/'o')
    rows = pd.read_csv(tmp_path/'o'/'results.csv')
    assert set(rows.method) == {'zero-shot', 'coop'} and rows.h.notna().all()
    works('train', photos, *what, '--shots', 2, '--epochs', 1, '--out', tmp_path/'p.safetensors')
    works('evaluate', tmp_path/'p.safetensors', photos, '--pretrained', weights)
    refused('compare', *what, '--methods', 'map-dafe', '--task', photos,
            says=['map-dafe', "CLIP's own towers"])


def test_the_list_of_backbones(tmp_path):
    said = works('backbones', '--json').out
    assert json.loads(said)['backbones'] == backbones()
    assert 'ViT-B-16-SigLIP2' in works('backbones').out
    for form in ('json', 'csv', 'txt'):
        assert '115 backbones' in works('backbones', '--out', tmp_path/f'b.{form}').out
    assert (tmp_path/'b.json').read_text() == said
    table = pd.read_csv(tmp_path/'b.csv', keep_default_na=False)
    assert table.to_dict('records') == backbones()
    assert 'ViT-B-16-SigLIP2' in (tmp_path/'b.txt').read_text()
    refused('backbones', '--out', tmp_path, says=[str(tmp_path), 'folder'])
