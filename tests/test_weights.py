"""Weight files: the same table from every kind of file, and nothing of a file is ever run"""
import hashlib
import os
import pickle
import random
import struct
import warnings
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipprompt.backbone import Backbone, build_backbone, load_backbone
from clipprompt.weights import as_open_clip, fits, misfit, read_weights
from helpers import TINY, one_line

CONFIGS = open_clip.factory._MODEL_CONFIGS
RESNET = TINY | dict(vision_cfg=dict(image_size=64, layers=[1, 2, 1, 1], width=8))
BESIDES = {'attn_mask', 'text.attn_mask', 'context_length', 'vocab_size', 'input_resolution'}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for k, v in theirs.items():
        assert ours[k].dtype == v.dtype and ours[k].shape == v.shape, k
        assert torch.equal(ours[k], v), k


def jitted(model, path, how='script', size=32):
    "Write a TorchScript archive; the table that torch's own loader finds in it"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if how == 'script': program = torch.jit.script(model)
        else:
            texts = open_clip.tokenize(['a', 'b'])
            inputs = torch.randn(2, 3, size, size), texts
            program = torch.jit.trace(model, inputs, check_trace=False)
        program.save(path)
        found = torch.jit.load(path).state_dict()
    return {k: v for k, v in found.items() if k not in BESIDES}


def altered(old, new, change):
    "A copy of an archive; `change` gets and gives its members, without the folder that they are in"
    root = old.stem
    with zipfile.ZipFile(old) as z, zipfile.ZipFile(new, 'w') as out:
        members = {n.removeprefix(f'{root}/'): z.read(n) for n in z.namelist()}
        for n, data in change(members).items(): out.writestr(f'{root}/{n}', data)
    return new


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    "An archive of a small CLIP, and its table"
    path = tmp_path_factory.mktemp('archive')/'vit.pt'
    torch.manual_seed(0)
    return path, jitted(open_clip.CLIP(**TINY).eval(), path)


@pytest.fixture
def mine(monkeypatch):
    "Random weights of a small model that load_backbone knows by the name 'mine'"
    monkeypatch.setitem(CONFIGS, 'mine', TINY)
    return load_backbone('mine', 'random', device='cpu')


# ---- the same table ------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['script', 'trace'])
@pytest.mark.parametrize('cfg', [TINY, RESNET, TINY | dict(custom_text=True)],
                         ids='vit resnet custom'.split())
def test_archives_hold_what_torch_finds_in_them(cfg, how, tmp_path):
    cfg = dict(cfg)
    kind = open_clip.CustomTextCLIP if cfg.pop('custom_text', False) else open_clip.CLIP
    model = kind(**cfg).eval()
    theirs = jitted(model, tmp_path/'w.pt', how, cfg['vision_cfg']['image_size'])
    same(read_weights(tmp_path/'w.pt'), theirs)
    same(theirs, model.state_dict())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_numbers(dtype, tmp_path):
    "OpenAI's files have half precision"
    theirs = jitted(open_clip.CLIP(**RESNET).eval().to(dtype), tmp_path/'w.pt')
    ours = read_weights(tmp_path/'w.pt')
    same(ours, theirs)
    assert ours['visual.conv1.weight'].dtype == dtype
    assert ours['visual.bn1.num_batches_tracked'].dtype == torch.int64


class Odd(nn.Module):
    "Views, shared storages, lists, dictionaries, a module used twice, tensors that are no weights"
    sizes:list[int]
    rates:list[float]
    flags:list[bool]
    parts:list[torch.Tensor]
    table:dict[str, torch.Tensor]

    def __init__(self):
        super().__init__()
        base = torch.arange(12.)
        self.register_buffer('turned', base.view(3, 4).T)
        self.register_buffer('part', base[5:9])
        self.register_buffer('empty', torch.zeros(0, 3))
        self.register_buffer('none', None)
        for kind in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
            self.register_buffer(f'{kind}'[6:] + '_', torch.ones(3, dtype=kind))
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float16))
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.again, self.note = self.layers[0], torch.ones(3)
        self.sizes, self.rates, self.flags, self.parts = [1, 2], [.5], [True], [torch.ones(2)]
        self.table = dict(a=torch.ones(2))

    def forward(self, x):
        more = self.note.sum() + self.parts[0].sum() + self.table['a'].sum() + self.rates[0]
        if self.flags[0]: more = more + self.sizes[0]
        return self.again(self.layers(x))*self.scale + more


def test_odd_modules(tmp_path):
    theirs = jitted(Odd(), tmp_path/'w.pt')
    ours = read_weights(tmp_path/'w.pt')
    same(ours, theirs)
    assert not {'note', 'parts', 'table'} & ours.keys() and 'again.weight' in ours
    assert ours['turned'].stride() == (1, 4)
    first = ours['turned'].untyped_storage().data_ptr()
    assert ours['part'].untyped_storage().data_ptr() == first


def test_of_older_torch_and_of_a_gpu(vit, tmp_path):
    "Without lists of buffers all tensors count; the device where a tensor was is none of ours"
    path, theirs = vit
    def older(members):
        def cut(data): return b''.join(l for l in data.splitlines(True) if b'__buffers__' not in l)
        members = {n: cut(d) if n.endswith('.py') else d for n, d in members.items()}
        pickled = members['data.pkl'].replace(b'X\3\0\0\0cpu', b'X\6\0\0\0cuda:0')
        assert pickled != members['data.pkl']
        return members | {'data.pkl': pickled}
    same(read_weights(altered(path, tmp_path/'old.pt', older)), theirs)


def test_any_kind_under_any_name(vit, tmp_path):
    path, theirs = vit
    made = dict(archive=path.read_bytes())
    save_file(theirs, tmp_path/'w')
    made['safetensors'] = (tmp_path/'w').read_bytes()
    torch.save(theirs, tmp_path/'w')
    made['zip'] = (tmp_path/'w').read_bytes()
    torch.save(theirs, tmp_path/'w', _use_new_zipfile_serialization=False)
    made['legacy'] = (tmp_path/'w').read_bytes()
    for ending in ('.safetensors', '.pt', '.bin', ''):
        for kind, data in made.items():
            (tmp_path/f'{kind}{ending}').write_bytes(data)
            same(read_weights(tmp_path/f'{kind}{ending}'), theirs)
            same(read_weights(str(tmp_path/f'{kind}{ending}')), theirs)


def test_training_checkpoints(vit, tmp_path):
    _, theirs = vit
    parallel = {f'module.{k}': v for k, v in theirs.items()}
    numbers = dict(context_length=torch.tensor(77), attn_mask=torch.zeros(2, 2))
    torch.save(dict(epoch=3, name='run', state_dict=parallel | numbers), tmp_path/'w.pt')
    same(read_weights(tmp_path/'w.pt'), theirs)


def test_a_backbone_from_an_archive(mine, tmp_path):
    jitted(mine.model, tmp_path/'w.pt')
    again = load_backbone('mine', tmp_path/'w.pt', device='cpu')
    assert again.fingerprint == mine.fingerprint and again.name == 'mine/w'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scripted = torch.jit.load(tmp_path/'w.pt')
    with pytest.raises(ValueError) as e: Backbone(scripted)
    one_line(e, 'no CLIP of open_clip')


# ---- nothing is run ------------------------------------------------------------------------------

class Harm:
    "Unpickling it makes a folder"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def unicode(text): return b'X' + struct.pack('<I', len(text)) + text.encode()

def call(name, argument='true'):
    "A pickle that calls NAME ('module name') with a text"
    return b'\x80\x02c' + name.replace(' ', '\n').encode() + b'\n' + unicode(argument) + b'\x85R.'

CALLS = ['os system', 'posix system', 'nt system', 'subprocess run', 'builtins eval',
         'builtins exec', 'builtins getattr', 'builtins __import__', '__builtin__ eval',
         'importlib import_module', 'operator methodcaller', 'pickle loads', 'torch load',
         'torch.jit load', 'torch.jit._script wrap_cpp_module', 'torch.jit._pickle os.system',
         'torch._utils _rebuild_tensor_v2.__globals__', 'torch.hub load', 'collections Counter',
         'collections OrderedDict.update', 'torch FloatStorage.from_file', 'torch UntypedStorage',
         'os __torch__.x', 'torch.serialization _load', 'codecs encode']

@pytest.mark.parametrize('name', CALLS)
def test_foreign_names(name, vit, tmp_path, monkeypatch):
    def ran(*args): raise AssertionError('something was run')
    for place in (os, os.path): monkeypatch.setattr(place, 'system', ran, raising=False)
    path = altered(vit[0], tmp_path/'evil.pt', lambda m: m | {'data.pkl': call(name)})
    with pytest.raises(ValueError) as e: read_weights(path)
    one_line(e, 'evil.pt', repr(name.replace(' ', '.')), 'nothing of it was run', '.safetensors')


@pytest.mark.parametrize('protocol', range(6))
def test_harm_in_every_protocol(protocol, vit, tmp_path):
    evil = pickle.dumps(dict(a=Harm(tmp_path/'harmed')), protocol)
    path = altered(vit[0], tmp_path/'evil.pt', lambda m: m | {'data.pkl': evil})
    with pytest.raises(ValueError) as e: read_weights(path)
    one_line(e, 'evil.pt', 'no weights need')
    assert not (tmp_path/'harmed').exists()


ORDERS = dict(inst=b"(S'true'\nios\nsystem\n.", obj=b"(cos\nsystem\nS'true'\no.",
              stack_global=b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.',
              extension=b'\x80\x02\x82\x01)R.', persid=b'Pid\n.',
              bytes_=b'\x80\x05\x96' + struct.pack('<Q', 2**60) + b'.',
              newobj_ex=b'\x80\x04c__torch__.a\nB\n)}\x92.')

@pytest.mark.parametrize('name', ORDERS)
def test_foreign_orders(name, vit, tmp_path):
    path = altered(vit[0], tmp_path/'evil.pt', lambda m: m | {'data.pkl': ORDERS[name]})
    with pytest.raises(ValueError) as e: read_weights(path)
    one_line(e, 'evil.pt')


def test_harm_beside_good_weights(vit, tmp_path):
    "In the middle of a table that is otherwise sound, and in members that nobody opens"
    harm = pickle.dumps(Harm(tmp_path/'harmed'), 2)
    def inside(members):
        good = members['data.pkl']
        at = good.index(b'X\x08\0\0\0training')
        inner = harm[2:-1]  # without its protocol and its stop
        return members | {'data.pkl': good[:at] + unicode('x') + inner + good[at:]}
    with pytest.raises(ValueError) as e: read_weights(altered(vit[0], tmp_path/'in.pt', inside))
    one_line(e, 'in.pt', 'mkdir')
    def around(members): return members | {'constants.pkl': harm, 'traced_inputs.pkl': harm}
    same(read_weights(altered(vit[0], tmp_path/'around.pt', around)), vit[1])
    def program(members):
        evil = f'import os\nos.mkdir({str(tmp_path/"harmed")!r})\n'.encode()
        return {n: evil + d if n.endswith('.py') else d for n, d in members.items()}
    same(read_weights(altered(vit[0], tmp_path/'program.pt', program)), vit[1])
    assert not (tmp_path/'harmed').exists()


def test_our_own_objects_cannot_be_bent(vit, tmp_path):
    "Attributes are set on records of this one reading, never on a class or function of ours"
    for name in ('torch._utils _rebuild_tensor_v2', '__torch__.a B', 'collections OrderedDict'):
        bent = (b'\x80\x02c' + name.replace(' ', '\n').encode() + b'\n}(' + unicode('args')
                + b'K\x01ub.')
        path = altered(vit[0], tmp_path/'bent.pt', lambda m: m | {'data.pkl': bent})
        with pytest.raises(ValueError) as e: read_weights(path)
        one_line(e, 'bent.pt')
    same(read_weights(vit[0]), vit[1])


# ---- damage --------------------------------------------------------------------------------------

def test_truncated_archives(vit, tmp_path):
    whole = vit[0].read_bytes()
    for keep in (0, 1, 30, 1000, len(whole)//2, len(whole)-30, len(whole)-1):
        (tmp_path/'w.pt').write_bytes(whole[:keep])
        with pytest.raises(ValueError) as e: read_weights(tmp_path/'w.pt')
        one_line(e, 'w.pt', 'damaged', 'get it again')


def numbers(n): return lambda members: members | {'data/0': members['data/0'][:n]}

LOOP = b'\x80\x02c__torch__.a\nB\n)\x81q\x00}(' + unicode('x') + b'h\x00ub.'

DAMAGED = {
    'lost storage': (lambda m: {n: d for n, d in m.items() if n != 'data/3'}, 'data/3'),
    'lost pickle': (lambda m: {n: d for n, d in m.items() if n != 'data.pkl'}, 'data.pkl'),
    'lost code': (lambda m: {n: d for n, d in m.items() if 'code/' not in n}, 'damaged'),
    'short storage': (numbers(-8), 'numbers are missing'),
    'ragged storage': (numbers(-3), 'damaged'),
    'empty storage': (numbers(0), 'numbers are missing'),
    'half a pickle': (lambda m: m | {'data.pkl': m['data.pkl'][:2000]}, 'damaged'),
    'empty pickle': (lambda m: m | {'data.pkl': b''}, 'damaged'),
    'a number': (lambda m: m | {'data.pkl': pickle.dumps(3, 2)}, 'damaged'),
    'a list': (lambda m: m | {'data.pkl': pickle.dumps([1, 2], 2)}, 'damaged'),
    'a dictionary': (lambda m: m | {'data.pkl': pickle.dumps({'a': 1, 'b': 2}, 2)}, 'damaged'),
    'no state': (lambda m: m | {'data.pkl': b'\x80\x02c__torch__.a\nB\n)\x81.'}, 'damaged'),
    'a loop': (lambda m: m | {'data.pkl': LOOP, 'code/__torch__/a.py':
                              b'class B(Module):\n  __parameters__ = []\n  __buffers__ = []\n'},
               'without end'),
}

@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_archives(case, vit, tmp_path):
    change, says = DAMAGED[case]
    path = altered(vit[0], tmp_path/'w.pt', change)
    with pytest.raises(ValueError) as e: read_weights(path)
    one_line(e, 'w.pt', 'damaged', says, 'get it again')


def test_members_that_claim_to_be_large(vit, tmp_path):
    "By a number in the zip's list of contents, and by 200 MB of zeros in 200 kB"
    data = bytearray(vit[0].read_bytes())
    at = data.rindex(b'PK\x01\x02', 0, data.rindex(b'vit/data/3'))
    for size in (2**31, 2**32-2):
        data[at+24:at+28] = struct.pack('<I', size)
        (tmp_path/'w.pt').write_bytes(data)
        with pytest.raises(ValueError) as e: read_weights(tmp_path/'w.pt')
        one_line(e, 'w.pt', 'too large')
    small = altered(vit[0], tmp_path/'bomb.pt', lambda m: m)
    with zipfile.ZipFile(small, 'a', zipfile.ZIP_DEFLATED) as z:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            z.writestr('vit/data/3', bytes(200_000_000))
    assert small.stat().st_size < 10_000_000
    with pytest.raises(ValueError) as e: read_weights(small)
    one_line(e, 'bomb.pt', 'data/3', 'too large')


def test_sizes_that_nobody_could_store(tmp_path):
    "Strides of zero make a tensor of any size out of one number"
    state = (b'\x80\x02c__torch__.a\nB\n)\x81}(' + unicode('w') + b'ctorch._utils\n'
             b'_rebuild_tensor_v2\n((' + unicode('storage') + b'ctorch\nFloatStorage\n'
             + unicode('0') + unicode('cpu') + b'K\x04tQ')
    end = b'\x89ccollections\nOrderedDict\n)RtR' + b'ub.'
    code = b'class B(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n'
    def write(order):
        with zipfile.ZipFile(tmp_path/'w.pt', 'w') as z:
            z.writestr('w/constants.pkl', b'')
            z.writestr('w/code/__torch__/a.py', code)
            z.writestr('w/data/0', bytes(16))
            z.writestr('w/data.pkl', state + order + end)
        return tmp_path/'w.pt'
    fine = b'K\x00K\x02K\x02\x86K\x02K\x01\x86'
    assert read_weights(write(fine))['w'].shape == (2, 2)
    big = b'\x8a\x05' + (2**33).to_bytes(5, 'little')
    minus = b'J' + struct.pack('<i', -2)
    for order in (b'K\x00' + big + b'K\x02\x86K\x00K\x00\x86',        # 2^34 numbers
                  b'K\x00K\x02K\x02\x86K\x04K\x01\x86',               # strides lead out
                  b'K\x03K\x02K\x02\x86K\x02K\x01\x86',               # the offset does
                  minus + b'K\x02K\x02\x86K\x02K\x01\x86',
                  b'K\x00' + minus + minus + b'\x86K\x00K\x00\x86',
                  b'K\x00K\x02K\x02\x86' + minus + b'K\x01\x86'):
        with pytest.raises(ValueError) as e: read_weights(write(order))
        one_line(e, 'w.pt', 'damaged', 'get it again')


def test_any_flipped_byte_ends_well(vit, tmp_path):
    "Either a table or one sentence, and soon"
    rng, good = random.Random(0), zipfile.ZipFile(vit[0]).read('vit/data.pkl')
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 3, 30])): bad[rng.randrange(len(bad))] = rng.randrange(256)
        path = altered(vit[0], tmp_path/'w.pt', lambda m: m | {'data.pkl': bytes(bad)})
        try: table = read_weights(path)
        except ValueError as e: assert str(path) in str(e) and '\n' not in str(e)
        else: assert all(isinstance(v, torch.Tensor) for v in table.values())


def test_no_weight_files(tmp_path):
    torch.save([torch.zeros(2)], tmp_path/'list.pt')
    torch.save({}, tmp_path/'empty.pt')
    torch.save(dict(state_dict=dict(context_length=torch.tensor(77))), tmp_path/'numbers.pt')
    save_file({}, tmp_path/'empty.safetensors')
    for name in ('list.pt', 'empty.pt', 'numbers.pt', 'empty.safetensors'):
        with pytest.raises(ValueError) as e: read_weights(tmp_path/name)
        one_line(e, name, 'no tensors', 'save_file')
    for path, says in ((tmp_path, 'a folder'), (tmp_path/'gone.pt', 'no file')):
        with pytest.raises(ValueError) as e: read_weights(path)
        one_line(e, str(path), says)
    for data in (b'', b'version https://git-lfs.github.com/spec/v1\n', bytes(100), b'PK\3\4'):
        (tmp_path/'w.bin').write_bytes(data)
        with pytest.raises(ValueError) as e: read_weights(tmp_path/'w.bin')
        one_line(e, 'w.bin', 'damaged', 'get it again')
    save_file(dict(a=torch.ones(9)), tmp_path/'w.bin')
    (tmp_path/'w.bin').write_bytes((tmp_path/'w.bin').read_bytes()[:-3])
    with pytest.raises(ValueError) as e: read_weights(tmp_path/'w.bin')
    assert 'pickled' not in one_line(e, 'w.bin', 'damaged (SafetensorError)', 'get it again')


# ---- names of transformers -----------------------------------------------------------------------

def hf_model(act='quick_gelu'):
    transformers = pytest.importorskip('transformers')
    text = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
                hidden_act=act)
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3,
                  num_attention_heads=2, image_size=32, patch_size=8, hidden_act=act)
    cfg = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(cfg).eval()
    for p in model.parameters():
        if p.ndim < 2: p.data += .3*torch.randn_like(p)
    return model


def rows(features):
    "transformers 5 wraps them"
    return getattr(features, 'pooler_output', features)


@pytest.mark.parametrize('act,quick', [('quick_gelu', True), ('gelu', False)])
@pytest.mark.parametrize('safe', [True, False])
def test_transformers_gives_the_same_features(act, quick, safe, tmp_path, monkeypatch):
    model = hf_model(act)
    path = tmp_path/'model.safetensors'
    model.save_pretrained(tmp_path)
    if not safe: torch.save(model.state_dict(), path)
    monkeypatch.setitem(CONFIGS, 'mine', TINY | dict(quick_gelu=quick))
    clip = load_backbone('mine', path, device='cpu')
    ids = clip.tokenize(['a photo of a cat', 'two dogs'])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        text = rows(model.get_text_features(input_ids=ids))
        image = rows(model.get_image_features(pixel_values=images))
        torch.testing.assert_close(clip.model.encode_text(ids), text, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip.model.encode_image(images), image, rtol=1e-5, atol=1e-5)
    assert torch.equal(clip.model.logit_scale, model.logit_scale)
    direct = build_backbone(TINY | dict(quick_gelu=quick))
    direct.model.load_state_dict(as_open_clip(read_weights(path)))
    assert direct.fingerprint == clip.fingerprint


def test_names_of_transformers():
    "Written out, so that the test does not need the library"
    v = torch.arange(4.).view(2, 2)
    layer = 'vision_model.encoder.layers.10.'
    ours = as_open_clip({
        'text_model.embeddings.position_ids': torch.zeros(1, 2),
        'vision_model.embeddings.position_ids': torch.zeros(1, 2),
        'vision_model.pre_layrnorm.bias': v[0], 'text_projection.weight': v,
        layer+'self_attn.q_proj.weight': v, layer+'self_attn.k_proj.weight': v+1,
        layer+'self_attn.v_proj.weight': v+2, layer+'self_attn.out_proj.bias': v[0]})
    block = 'visual.transformer.resblocks.10.attn.'
    same(ours, {'visual.ln_pre.bias': v[0], 'text_projection': v.T, block+'out_proj.bias': v[0],
                block+'in_proj_weight': torch.cat([v, v+1, v+2])})


def test_strange_names_stay():
    v, q = torch.zeros(2, 2), 'text_model.encoder.layers.0.self_attn.q_proj.weight'
    known = {'vision_model.embeddings.class_embedding': v[0]}
    for more in ({'vision_model.head.probe': v}, {'logit_bias': v[0]}, {q: v},
                 {q: v, q.replace('q_', 'k_'): v, q.replace('q_', 'v_'): v[:1]},
                 {q.replace('q_', f'{x}_'): torch.tensor(1.) for x in 'qkv'},
                 {'visual_projection.weight': v[0]}):
        out = as_open_clip(known | more)
        assert len(out) == 1+len(more)
        assert all(any(o is t for o in out.values()) for t in more.values())
    plain = {'visual.proj': v}
    assert as_open_clip(plain) is plain


# ---- whose weights -------------------------------------------------------------------------------

def blank(name):
    cfg = dict(open_clip.get_model_config(name))
    kind = open_clip.CustomTextCLIP if cfg.pop('custom_text', False) else open_clip.CLIP
    with torch.device('meta'): return kind(**cfg).state_dict()


def ours(name):
    cfg = open_clip.get_model_config(name)
    foreign = 'timm_model_name' in cfg['vision_cfg'] or 'hf_model_name' in cfg['text_cfg']
    return not foreign and 'multimodal_cfg' not in cfg


@pytest.mark.parametrize('name', ['ViT-B-32', 'ViT-B-16-quickgelu', 'RN50'])
def test_fits(name):
    table, plain = blank(name), name.removesuffix('-quickgelu')
    assert fits(table)[:2] == [plain, f'{plain}-quickgelu']
    half = dict(list(table.items())[1::2])
    assert plain in fits(half)
    assert fits(table | {'foreign': torch.zeros(2)}) == []
    assert fits(table | {'logit_scale': torch.zeros(1)}) == fits(table)


@pytest.mark.stress
def test_every_architecture_is_known():
    names = [n for n in open_clip.list_models() if ours(n)]
    assert len(names) > 50
    tables, alike = {n: blank(n) for n in names}, {}
    for n, table in tables.items():
        alike.setdefault(tuple((k, v.shape) for k, v in table.items()), []).append(n)
    for same in alike.values():
        found = fits(tables[same[0]])
        assert set(found) == set(same)
        assert found == sorted(found, key=len)


def test_fits_nothing():
    assert fits({}) == fits({'a': torch.zeros(3, 3)}) == []
    assert fits({'logit_scale': torch.zeros(())}) == []


@pytest.fixture
def two(monkeypatch):
    "Two small models by name, of different depth, plain and with QuickGELU"
    deep = TINY | dict(vision_cfg=TINY['vision_cfg'] | dict(layers=4))
    for name, cfg in (('small', TINY), ('deeper', deep)):
        monkeypatch.setitem(CONFIGS, name, cfg)
        monkeypatch.setitem(CONFIGS, f'{name}-quickgelu', cfg | dict(quick_gelu=True))
    return {name: build_backbone(cfg).model.state_dict()
            for name, cfg in (('small', TINY), ('deeper', deep))}


@pytest.mark.parametrize('asked,told', [('small', 'deeper'),
                                        ('small-quickgelu', 'deeper-quickgelu')])
def test_weights_of_another_architecture(asked, told, two, tmp_path):
    path = tmp_path/'w.safetensors'
    save_file(two['deeper'], path)
    with pytest.raises(ValueError) as e: load_backbone(asked, path)
    one_line(e, f'holds the weights of {told}, not of {asked}',
             f"load_backbone('{told}', '{path}')")
    save_file(dict(list(two['small'].items())[::2]), path)
    with pytest.raises(ValueError) as e: load_backbone(asked, path)
    one_line(e, 'w.safetensors', f'the weights of {asked}', 'is missing, and', 'more',
             'get the whole file')


def test_openai_files_are_recognised(two, tmp_path, monkeypatch):
    "By the hash in their published address, whatever their name is"
    model = open_clip.CLIP(**TINY).eval()
    path = tmp_path/'renamed.bin'
    jitted(model, path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    def cfg(name, tag):
        return dict(url=f'https://example.org/{known}/x.pt') if name.startswith('small') else {}
    monkeypatch.setattr(open_clip, 'get_pretrained_cfg', cfg)
    for asked in ('small', 'deeper', 'deeper-quickgelu'):
        with pytest.raises(ValueError) as e: load_backbone(asked, path)
        one_line(e, f'holds the weights of small-quickgelu, not of {asked}', 'load_backbone(')
    clip = load_backbone('small-quickgelu', path, device='cpu')
    assert torch.equal(clip.model.visual.proj, model.visual.proj)
    path.write_bytes(path.read_bytes() + b' ')  # another file: the user's word counts
    assert load_backbone('small', path, device='cpu').name == 'small/renamed'


def test_published_hashes_are_where_we_look():
    urls = {n: open_clip.get_pretrained_cfg(n, 'openai').get('url', '')
            for n in open_clip.list_models() if n.endswith('-quickgelu')}
    found = {n: u.split('/')[-2] for n, u in urls.items() if u}
    assert {'ViT-B-16-quickgelu', 'RN50-quickgelu'} <= found.keys() and len(found) == 9
    assert all(len(h) == 64 for h in found.values())


def test_misfit_of_a_path_that_is_none(two):
    small = two['small']
    assert misfit('nowhere.pt', 'small', small, small) == ''
    assert 'foreign' in misfit('nowhere.pt', 'small', small | {'x': torch.zeros(1)}, small)
    wrong = small | {'ln_final.bias': torch.zeros(3)}
    assert 'ln_final.bias is of another shape;' in misfit('nowhere.pt', 'small', wrong, small)
