"""The page answers as `predict` does, to nobody but itself, and whatever is wrong is one line."""
import errno
import json
import socket
import struct
import sys
import zlib
from http.client import HTTPConnection
from io import BytesIO
from threading import Thread

import pytest
import torch
from PIL import Image

from clipprompt import cli, page as page_module
from clipprompt.backbone import assets, load_backbone
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.deep import VPT, MaPLe
from clipprompt.inference import predict
from clipprompt.looking import looks_at
from clipprompt.map_dafe import MAPDAFE
from clipprompt.metaprompt import MetaPrompt
from clipprompt.page import (MOST_BYTES, Page, Refused, Told, find_file, gaze, heard, live,
                             open_page, opened)
from clipprompt.pictures import test_transform
from clipprompt.provp import ProVP
from clipprompt.sets import load_dataset
from clipprompt.zeroshot import LinearProbe, ZeroShot
from helpers import clipprompt, one_line, refused, shapes, tiny_clip

NAMES = ['disc', 'two bars', 'cross', 'ring']


def as_file(image, kind='PNG', **how):
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def drawn(seed=0, size=(40, 40)):
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


@pytest.fixture(scope='module')
def answers(clip, photos):
    learners = [ZeroShot(clip, NAMES), CoOp(clip, NAMES, n_ctx=2), VPT(clip, NAMES, n_visual=3)]
    return Told(learners, sorted(photos.rglob('*.png')))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('page')/'live'
    (root/'parts').mkdir(parents=True)
    (root/'index.html').write_text('<!doctype html><title>A page</title>')
    (root/'parts'/'a.mjs').write_text('export default 1;')
    (root/'notes.md').write_text('not for the page')
    (root.parent/'secret.txt').write_text('PRIVATE')
    (root.parent/'live-too').mkdir()
    (root.parent/'live-too'/'near.txt').write_text('PRIVATE')
    (root/'link.txt').symlink_to('../secret.txt')
    return root


@pytest.fixture(scope='module')
def page(answers, folder):
    p = Page(answers, folder=folder)
    Thread(target=p.serve_forever, daemon=True).start()
    yield p
    p.shutdown()
    p.server_close()


UPLOAD = {'Content-Type': 'image/png', 'X-Clipprompt': '1'}

def ask(page, target, body=None, method=None, **headers):
    "Status, headers and body; the target goes out as it is"
    c = HTTPConnection('127.0.0.1', page.server_port, timeout=20)
    sent = {k.replace('_', '-'): v for k, v in headers.items()}
    c.request(method or ('POST' if body is not None else 'GET'), target, body, sent)
    r = c.getresponse()
    got = r.status, r.headers, r.read()
    c.close()
    return got

def refused_as(got, status, *says):
    "One line of JSON with cause and cure, and the headers of every reply"
    assert got[0] == status and got[1]['Content-Type'] == 'application/json', got
    said = json.loads(got[2])['error']
    assert said and '\n' not in said and len(said) < 300 and b'PRIVATE' not in got[2]
    for words in says: assert words in said, f'{words!r} not in: {said}'
    assert got[1]['X-Content-Type-Options'] == 'nosniff' and got[1]['Cache-Control'] == 'no-store'


# ---- what is said --------------------------------------------------------------------------------

LEARNERS = dict(zero=ZeroShot, coop=CoOp, cocoop=CoCoOp, vpt=VPT, maple=MaPLe, provp=ProVP,
                meta=MetaPrompt, map_dafe=MAPDAFE)

@pytest.mark.parametrize('cls', LEARNERS.values(), ids=LEARNERS)
def test_answers_are_those_of_predict_and_looks_at(clip, cls):
    "Feature, five classes, every block"
    learner, picture = cls(clip, NAMES).eval(), drawn()
    said, = Told(learner)(picture)
    p, = predict(learner, picture, top=5)
    assert [c for c, _ in said['top']] == [c for c, _ in p.top]
    assert all(abs(a-b) < 1e-5 for (_, a), (_, b) in zip(said['top'], p.top, strict=True))
    image = test_transform(clip)(picture)[None]
    for l in range(clip.vision_layers):
        maps, own = looks_at(learner, image, block=l)
        torch.testing.assert_close(torch.tensor(said['attention'][l]), maps.flatten(),
                                   rtol=0, atol=2e-5)
        slots = said['slots'][l] if said['slots'] else []
        assert abs(sum(slots) - own.item()) < 1e-3
    assert not any(b.ln_1._forward_hooks for b in learner.vision.blocks)


def test_many_are_answered_as_each_alone(clip):
    "The shared run of the frozen tower changes nothing, in whatever order"
    some = [cls(clip, NAMES).eval() for cls in (VPT, CoOp, LinearProbe, CoCoOp, MaPLe)]
    together = Told(some)(drawn())
    for learner, said in zip(some, together, strict=True): assert [said] == Told(learner)(drawn())


def test_half_precision(clip):
    clip = tiny_clip()
    clip.precision = 'bf16'
    _, patches, slots = gaze(VPT(clip, NAMES).eval(), test_transform(clip)(drawn())[None])
    assert all(0 < 1-p.sum()-s.sum() < 1 and len(s) for p, s in zip(patches, slots))


def test_about(answers, clip):
    about = answers.about()
    assert about['server'] and about['backbone'] == clip.name and about['image_size'] == 32
    assert [m['name'] for m in about['methods']] == ['zero-shot', 'coop', 'vpt']
    assert [m['slots'] for m in about['methods']] == [0, 0, 3]
    assert all(m['blocks'] == 3 and m['classnames'] == NAMES and m['colour'][0] == '#'
               for m in about['methods'])
    assert about['pictures'][1]['url'] == 'pictures/1'


def test_titles_and_bad_learners(clip):
    one = CoOp(clip, NAMES)
    assert [*Told([one, one]).learners] == ['CoOp', 'CoOp 2']
    assert Told([one, one]).names == ['coop', 'coop-2']
    assert [*Told(dict(mine=one)).learners] == ['mine']
    for wrong, says in (([], 'at least one'), (['p.safetensors'], 'cp.load'),
                        ([one, CoOp(tiny_clip(1), NAMES)], 'pages of their own')):
        with pytest.raises(ValueError) as e: Told(wrong)
        one_line(e, says)


def test_pictures_to_choose_from(clip, photos):
    data = load_dataset(photos)
    told = Told(ZeroShot(clip, data.classnames), data)
    assert [p['label'] for p in told.about()['pictures']] == data.classnames
    assert opened(told.picture(0)).size == (40, 40)
    with pytest.raises(Refused): told.picture(4)
    assert Told(told.learners).about()['pictures'] == []
    with pytest.raises(FileNotFoundError): Told(told.learners, photos/'*.nothing')


def test_a_picture_that_broke_meanwhile(clip, tmp_path):
    (tmp_path/'a.png').write_bytes(as_file(drawn()))
    told = Told(ZeroShot(clip, NAMES), tmp_path)
    (tmp_path/'a.png').write_text('broken')
    with pytest.raises(Refused) as e: told.picture(0)
    one_line(e, 'a cannot be read', 'repair it')


# ---- pictures from outside -----------------------------------------------------------------------

def test_forms_of_pictures():
    "As a browser or a camera stores them, with transparency, palette and turn"
    picture = drawn()
    for kind in ('PNG', 'BMP'): assert opened(as_file(picture, kind)).tobytes() == picture.tobytes()
    for kind in ('JPEG', 'WEBP', 'GIF'): assert opened(as_file(picture, kind)).size == picture.size
    clear = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    assert opened(as_file(clear)).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new('RGB', (8, 4))
    turned.getexif()[0x0112] = 6
    assert opened(as_file(turned, 'JPEG', exif=turned.getexif())).size == (4, 8)


def claiming(side):
    "A PNG whose header says that it is so large"
    small = as_file(Image.new('1', (1, 1)))
    head = b'IHDR' + struct.pack('>II', side, side) + small[24:29]
    return small[:12] + head + struct.pack('>I', zlib.crc32(head)) + small[33:]


@pytest.mark.parametrize('side,status', [(6324, 200), (6325, 413), (10_000, 413), (20_000, 413)])
def test_sizes(side, status, recwarn):
    "40 megapixels and not one more; PIL's warning and its error never show"
    if status == 200:
        assert opened(as_file(Image.new('1', (side, side)))).size == (side, side)
        return
    sent = claiming(side)
    with pytest.raises(Refused) as e: opened(sent)
    one_line(e, 'make it smaller')
    assert e.value.status == status and not recwarn.list


def test_no_pictures():
    whole = as_file(drawn())
    for sent in (b'', b'some words', b'\x89PNG\r\n\x1a\n', whole[:200], whole[:-30],
                 as_file(drawn(), 'TIFF'), b'<svg xmlns="http://www.w3.org/2000/svg"/>'):
        with pytest.raises(Refused) as e: opened(sent)
        one_line(e)
        assert e.value.status == 400


# ---- the server ----------------------------------------------------------------------------------

def test_it_answers(page, answers):
    status, got, body = ask(page, '/about.json')
    assert status == 200 and json.loads(body) == answers.about()
    status, got, body = ask(page, '/')
    assert b'A page' in body and got['Content-Type'].startswith('text/html')
    assert "default-src 'self'" in got['Content-Security-Policy']
    assert got['X-Content-Type-Options'] == 'nosniff' and got['Server'].strip() == 'clipprompt'
    assert ask(page, '/parts/a.mjs?v=2')[1]['Content-Type'].startswith('text/javascript')
    _, _, picture = ask(page, '/pictures/0')
    for host in ('127.0.0.1', 'localhost'):
        host = f'{host}:{page.server_port}'
        status, _, body = ask(page, '/predict', picture, Host=host, Origin=f'http://{host}',
                              **UPLOAD)
        assert status == 200
        assert json.loads(body) == dict(methods=answers(opened(picture)), error=None)


def test_many_at_a_time(page, answers):
    "Each gets the answer to its own picture"
    pictures = [drawn(i) for i in range(8)]
    got = {}
    def one(i): got[i] = json.loads(ask(page, '/predict', as_file(pictures[i]), **UPLOAD)[2])
    threads = [Thread(target=one, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(got[i]['methods'] == answers(p) for i, p in enumerate(pictures))


@pytest.mark.parametrize('host', ['evil.example', 'evil.example:{}', '127.0.0.1', 'localhost:1',
                                  '127.0.0.1.evil.example:{}', '', '0.0.0.0:{}'])
def test_a_foreign_host(page, host):
    "DNS rebinding: the name of the site that asks"
    host = host.format(page.server_port)
    refused_as(ask(page, '/about.json', Host=host), 403, 'is not served', 'open http://127.0.0.1')
    refused_as(ask(page, '/', Host=host), 403, 'is not served')
    refused_as(ask(page, '/predict', as_file(drawn()), Host=host, **UPLOAD), 403)


def test_two_hosts_and_none(page):
    for hosts in ((), ('evil.example', f'127.0.0.1:{page.server_port}')):
        c = HTTPConnection('127.0.0.1', page.server_port, timeout=20)
        c.putrequest('GET', '/about.json', skip_host=True)
        for host in hosts: c.putheader('Host', host)
        c.endheaders()
        assert c.getresponse().status == 403
        c.close()


@pytest.mark.parametrize('origin', ['https://evil.example', 'null', 'http://127.0.0.1:1', 'file://',
                                    'https://127.0.0.1:{}', 'http://127.0.0.1:{}.evil.example'])
def test_a_foreign_page(page, origin):
    origin = origin.format(page.server_port)
    for target, body in (('/predict', as_file(drawn())), ('/about.json', None)):
        refused_as(ask(page, target, body, Origin=origin, **UPLOAD), 403, 'may not ask')


def test_what_a_foreign_page_sends_without_asking(page):
    "A form, and a script's simple request: no header of ours"
    for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data',
                 'image/png'):
        refused_as(ask(page, '/predict', as_file(drawn()), Content_Type=kind), 403, 'X-Clipprompt')
    status, got, _ = ask(page, '/predict', method='OPTIONS', Origin='https://evil.example',
                         Access_Control_Request_Method='POST')
    assert status == 501 and not [h for h in got if h.lower().startswith('access-control')]


OUTSIDE = ['/../secret.txt', '/%2e%2e/secret.txt', '/..%2fsecret.txt', '/parts/../../secret.txt',
           '/../live-too/near.txt', '/link.txt', '/%2e%2e/%2e%2e/%2e%2e/etc/hosts.txt']

@pytest.mark.parametrize('target', OUTSIDE)
def test_a_path_that_leaves_the_folder(page, target):
    refused_as(ask(page, target), 403, 'leaves the folder')


@pytest.mark.parametrize('target', ['/gone.html', '/notes.md', '/parts', '/parts/', '/%00.html',
                                    '//etc/passwd', '/C:/secret.txt', '/..\\secret.txt',
                                    '/' + 'a'*5000 + '.html', '/pictures/99', '/pictures/-1',
                                    '/pictures/0/../1', '/%252e%252e/secret.txt'])
def test_what_is_not_there(page, target):
    refused_as(ask(page, target), 404)


def test_targets_that_are_no_paths(folder):
    for target in ('http://[', 'http://127.0.0.1:1/../secret.txt'):
        with pytest.raises(Refused): find_file(folder, target)
    assert find_file(folder, 'http://127.0.0.1:1/index.html').name == 'index.html'


def test_bad_uploads(page):
    huge = as_file(Image.new('1', (10_000, 10_000)))
    refused_as(ask(page, '/predict', huge, **UPLOAD), 413, '10000 x 10000', 'make it smaller')
    refused_as(ask(page, '/predict', b'some words', **UPLOAD), 400, 'no picture')
    refused_as(ask(page, '/predict', b'', **UPLOAD), 400, 'no picture')
    refused_as(ask(page, '/predict', bytes(MOST_BYTES+1), **UPLOAD), 413, 'MB')
    refused_as(ask(page, '/predict', as_file(drawn()), **UPLOAD | {'Content-Type': 'text/html'}),
               415, 'text/html')
    refused_as(ask(page, '/elsewhere', as_file(drawn()), **UPLOAD), 404, 'predict')
    c = HTTPConnection('127.0.0.1', page.server_port, timeout=20)
    c.putrequest('POST', '/predict')
    for name, value in UPLOAD.items(): c.putheader(name, value)
    c.endheaders()   # nobody says how much comes
    assert c.getresponse().status == 411
    c.close()
    assert ask(page, '/predict', as_file(drawn()), **UPLOAD)[0] == 200


def test_other_verbs_and_garbage(page):
    for verb in ('PUT', 'DELETE', 'HEAD', 'TRACE'): assert ask(page, '/', method=verb)[0] == 501
    with socket.create_connection(('127.0.0.1', page.server_port), timeout=20) as s:
        s.sendall(b'\x16\x03\x01 nonsense\r\n\r\n')
        assert b'"error"' in s.recv(4096)
    with socket.create_connection(('127.0.0.1', page.server_port), timeout=20) as s:
        s.sendall(b'GET /about.json HTTP/1.0\r\n')   # and gone
    assert ask(page, '/about.json')[0] == 200


def test_a_method_that_fails(clip, folder, monkeypatch, capsys):
    "One line, status 500, and the next picture is answered"
    told = Told(ZeroShot(clip, NAMES))
    whole = as_file(drawn())
    with monkeypatch.context() as m:
        def fail(*_): raise RuntimeError('out of\nmemory')
        m.setattr(page_module, 'gaze', fail)
        status, said = told.told(whole)
    assert status == 500 and 'RuntimeError: out of memory' in said['error']
    assert told.told(whole)[0] == 200


def test_it_listens_on_this_machine_only(page):
    assert page.server_address[0] == '127.0.0.1'
    with pytest.raises(OSError):
        socket.create_connection(('127.0.0.2', page.server_port), timeout=2).close()


# ---- from a shell --------------------------------------------------------------------------------

@pytest.fixture
def shown(monkeypatch, folder):
    "Pages that `clipprompt live` would show, closed at the end"
    pages = []
    monkeypatch.setattr(page_module, 'assets', lambda: folder.parent)
    monkeypatch.setattr(cli, 'show_page', lambda page, browser: pages.append((page, browser)))
    yield pages
    for p, _ in pages: p.server_close()


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    at, clip = tmp_path_factory.mktemp('prompts'), load_backbone(device='cpu')
    for name, names in (('coop', ['camera', 'clock']), ('twin', NAMES)):
        CoOp(clip, names, n_ctx=2).save(at/f'{name}.safetensors')
    CoOp(tiny_clip(), NAMES).save(at/'tiny.safetensors')
    return at


def test_live_with_prompt_files(shown, prompts):
    r = clipprompt('live', prompts/'coop.safetensors', prompts/'twin.safetensors', '--no-browser')
    (page, browser), = shown
    assert r.code in (0, None) and page.url in r.out and not browser, r
    about = page.answers.about()
    assert [m['classnames'] for m in about['methods']] == [['camera', 'clock'], NAMES]
    assert [m['name'] for m in about['methods']] == ['coop', 'coop-2']
    assert about['task'] == 'pictograms/devices' and len(about['pictures']) == 24


def test_live_without(shown):
    "Zero-shot on the usual task, or on the one that is named; a browser opens"
    for args, task in (((), 'devices'), (('--task', 'arrows'), 'arrows')):
        clipprompt('live', *args)
        page, browser = shown[-1]
        about = page.answers.about()
        assert browser and about['task'] == f'pictograms/{task}'
        assert about['methods'][0]['name'] == 'zero-shot'
        assert about['methods'][0]['classnames'] == load_dataset(task=task).classnames


def test_a_port_that_is_taken(shown):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        r = clipprompt('live', '--port', port, '--no-browser')
    page, _ = shown[-1]
    assert page.server_port > port and page.url in r.out
    assert f'port {port} is taken, so it is {page.server_port}' in r.err


def test_no_port_at_all(answers, folder, monkeypatch):
    def taken(*_): raise OSError(errno.EADDRINUSE, 'Address already in use')
    monkeypatch.setattr(page_module, 'Page', taken)
    with pytest.raises(OSError) as e: open_page(answers, 65530, folder)
    one_line(e, 'no port from 65530 to 65535', '--port')


def test_ctrl_c_ends_quietly(monkeypatch, folder):
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(page_module, 'assets', lambda: folder.parent)
    monkeypatch.setattr(page_module.Page, 'serve_forever', stop)
    r = clipprompt('live', '--no-browser')
    assert r.code in (0, None) and r.err == '' and 'http://127.0.0.1:' in r.out, r


def test_live_refuses(shown, prompts, tmp_path, monkeypatch):
    tiny, coop = prompts/'tiny.safetensors', prompts/'coop.safetensors'
    refused('live', coop, tiny, says=['tiny-0', 'picto-clip', 'a page of its own'])
    refused('live', tiny, '--backbone', 'picto-clip', says=['tiny-0', 'picto-clip', 'of its own'])
    refused('live', tmp_path/'gone.safetensors', says=['no prompt file', 'clipprompt train'])
    (tmp_path/'p.safetensors').write_text('broken')
    refused('live', tmp_path/'p.safetensors', says=['no intact safetensors'])
    refused('live', '--task', 'devises', says=['devises', 'did you mean'])
    refused('live', '--port', '70000', says=['--port', '65535'], code=2)
    monkeypatch.setattr(page_module, 'assets', lambda: tmp_path)
    refused('live', says=['no index.html', 'reinstall'])
    assert not shown


# ---- in Jupyter ----------------------------------------------------------------------------------

def test_the_widget_without_anywidget(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    page_module._widget.cache_clear()
    with pytest.raises(ImportError) as e: live(ZeroShot(clip, NAMES))
    one_line(e, 'anywidget', 'pip install "clipprompt[live]"')


def test_the_widget(clip, photos):
    "A message goes in, an answer comes out, whatever was sent"
    pytest.importorskip('anywidget')
    page_module._widget.cache_clear()
    widget, sent = live(VPT(clip, NAMES), photos), []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    widget._handle_custom_msg(dict(kind='about'), [])
    about, pictures = sent.pop()
    assert about['kind'] == 'about' and len(pictures) == len(about['pictures']) == 24
    widget._handle_custom_msg(dict(kind='picture', turn=3), [memoryview(pictures[0])])
    answer, _ = sent.pop()
    assert answer['turn'] == 3 and answer['methods'] == widget.answers(opened(pictures[0]))
    for files in ([], [b'some words'], [as_file(Image.new('1', (10_000, 10_000)))]):
        widget._handle_custom_msg(dict(kind='picture', turn=4), files)
        answer, _ = sent.pop()
        assert answer['turn'] == 4 and answer['error'] and 'methods' not in answer


def test_the_message_is_json(answers):
    reply, pictures = heard(answers, dict(kind='about'), [])
    json.dumps(reply)
    assert all(isinstance(p, bytes) for p in pictures)
    assert (assets()/'live'/'widget.mjs').is_file()
