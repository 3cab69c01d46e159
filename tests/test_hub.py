"""Prompts go to the Hugging Face hub and come back: the hub's real client against a small server
on this machine, no network."""
import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants, file_download, utils
from safetensors.torch import save_file

from clipprompt import __version__
from clipprompt.backbone import load_backbone
from clipprompt.coop import CoOp
from clipprompt.hub import HUB_FILE, local_prompts, model_card
from clipprompt.learner import read_prompts
from clipprompt.methods import find_method, load as load_prompts, methods
from clipprompt.zeroshot import ZeroShot
from helpers import one_line, refused, shapes, tiny_clip, works

METHODS = {name: find_method(name) for name in methods()}

NAMES = ['disc', 'two bars', 'cross', 'ring']


class Hub(BaseHTTPRequestHandler):
    "The few routes that `create_repo`, `create_commit` and `hf_hub_download` use"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def answer(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            headers = {'Content-Type': 'application/json'} | headers
            body = json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Length': len(body), **headers}.items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, {'error': code}, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self):
        hub, size = self.server, int(self.headers.get('Content-Length') or 0)
        if size or 'Transfer-Encoding' not in self.headers: body = self.rfile.read(size)
        else:
            body = b''
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        hub.asked.append((self.command, self.path))
        if hub.status: return self.answer(hub.status, {'error': 'for the test'})
        if self.path == '/api/validate-yaml':
            bad = 'license: "none-of-them"' in json.loads(body)['content']
            errors = [{'message': '"license" must be one of [mit]'}] if bad else []
            return self.answer(400 if bad else 200, {'errors': errors, 'warnings': []})
        if self.headers.get('Authorization') != 'Bearer hf_right':
            return self.answer(401, {'error': 'Invalid username or password.'})
        if self.path == '/api/repos/create':
            repo = json.loads(body)
            name = f"{repo['organization']}/{repo['name']}"
            if name.startswith('foe/'):
                error = "You don't have the rights to create a model under the namespace foe"
                return self.answer(403, {'error': error})
            if name in hub.repos:
                error = 'You already created this model repo'
                return self.answer(409, {'url': f'{hub.url}/{name}', 'error': error})
            private = repo.get('visibility') == 'private' or bool(repo.get('private'))
            hub.repos[name] = dict(private=private, commits=[])
            return self.answer(200, {'url': f'{hub.url}/{name}', 'name': name, 'id': '1'})
        if m := re.fullmatch(r'/api/models/(.+?/.+?)/preupload/main', self.path):
            files = [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                     for f in json.loads(body)['files']]
            return self.answer(200, {'files': files})
        if m := re.fullmatch(r'/api/models/(.+?/.+?)/commit/main', self.path.split('?')[0]):
            lines = [json.loads(l) for l in body.splitlines()]
            files = {l['value']['path']: base64.b64decode(l['value']['content'])
                     for l in lines if l['key'] == 'file'}
            oid = hashlib.sha1(body).hexdigest()
            hub.repos[m[1]]['commits'].append((oid, files))
            url = f'{hub.url}/{m[1]}/commit/{oid}'
            return self.answer(200, {'commitUrl': url, 'commitOid': oid, 'success': True})
        self.refuse(404, 'RepoNotFound')

    def do_GET(self):
        hub = self.server
        hub.asked.append((self.command, self.path))
        if hub.status: return self.answer(hub.status, {'error': 'for the test'})
        if not (m := re.fullmatch(r'/(.+?/.+?)/resolve/([^/]+)/(.+)', self.path.split('?')[0])):
            return self.refuse(404, 'RepoNotFound')
        repo = hub.repos.get(m[1])
        if not repo or repo['private'] and self.headers.get('Authorization') != 'Bearer hf_right':
            return self.refuse(401, 'RepoNotFound')
        if repo.get('gated'): return self.refuse(403, 'GatedRepo')
        commits = dict(repo['commits']) | {'main': repo['commits'][-1][1]}
        if m[2] not in commits: return self.refuse(404, 'RevisionNotFound')
        oid = repo['commits'][-1][0] if m[2] == 'main' else m[2]
        if (content := commits[m[2]].get(m[3])) is None:
            return self.answer(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit=oid)
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=oid)
    do_HEAD = do_GET


def point_to(monkeypatch, url):
    "What HF_ENDPOINT does in a new process"
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    for module in (constants, file_download):
        monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            url + '/{repo_id}/resolve/{revision}/{filename}', raising=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub without repositories, an empty cache, and a user who is logged in there and nowhere else"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url = f'http://127.0.0.1:{server.server_port}'
    server.repos, server.asked, server.status = {}, [], None
    threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
    point_to(monkeypatch, server.url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub-cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path/'no-token'))
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
    yield server
    server.shutdown(), server.server_close()


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


def learner_of(clip, seed=0, **kwargs): return CoOp(clip, NAMES, n_ctx=2, seed=seed, **kwargs)


def test_push_and_load(hub, clip):
    a, b = learner_of(clip), learner_of(clip, 1)
    first, second = a.push_to_hub('ada/shapes'), b.push_to_hub('hf://ada/shapes')
    assert re.fullmatch(r'hf://ada/shapes@[0-9a-f]{40}', first) and first != second
    latest = load_prompts('hf://ada/shapes', clip)
    assert torch.equal(latest.ctx.tokens, b.ctx.tokens)
    assert latest.classnames == NAMES
    assert type(latest) is CoOp
    # what was pinned stays
    assert torch.equal(CoOp.load(first, clip).ctx.tokens, a.ctx.tokens)
    assert not hub.repos['ada/shapes']['private']
    assert [sorted(f) for _, f in hub.repos['ada/shapes']['commits']] == [['README.md', HUB_FILE]]*2
    fetched = {
        path
        for command, path in hub.asked
        if command == 'GET' and not path.startswith('/api/')
    }
    # nothing else is ever fetched
    assert fetched and all(p.endswith('/'+HUB_FILE) for p in fetched)


@pytest.mark.parametrize('name', METHODS)
def test_every_method(name, hub, clip):
    learner = METHODS[name].cls(clip, NAMES, **(METHODS[name].hparams or {}))
    again = load_prompts(learner.push_to_hub('ada/it'), clip)
    assert type(again) is type(learner)
    pairs = zip(learner.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert name in hub.repos['ada/it']['commits'][0][1]['README.md'].decode()


def test_private(hub, clip, monkeypatch):
    name = learner_of(clip).push_to_hub('ada/secret', private=True)
    assert hub.repos['ada/secret']['private'] and load_prompts(name, clip)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', constants.HF_HUB_CACHE+'2')
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(FileNotFoundError) as e: load_prompts('hf://ada/secret', clip)
    one_line(e, 'ada/secret', 'private', 'hf auth login')
    assert CoOp.load(local_prompts('hf://ada/secret', token='hf_right'), clip)


def forget_sessions():
    "Before 1.0 the client's sessions remember whether they are offline"
    getattr(utils, 'reset_sessions', lambda: None)()


def test_the_cache_serves_when_the_network_is_gone(hub, clip, monkeypatch):
    """A second load asks and fetches nothing; without network, or in offline mode, what was
    fetched is still there"""
    learner = learner_of(clip)
    pinned = learner.push_to_hub('ada/shapes')
    same = lambda name: torch.equal(load_prompts(name, clip).ctx.tokens, learner.ctx.tokens)
    assert same('hf://ada/shapes')
    hub.asked.clear()
    assert same('hf://ada/shapes')
    assert {c for c, p in hub.asked if not p.startswith('/api/')} == {'HEAD'}
    hub.asked.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    forget_sessions()
    assert same('hf://ada/shapes') and same(pinned) and not hub.asked
    for call in (lambda: load_prompts('hf://ada/other', clip),
                 lambda: learner.push_to_hub('ada/shapes')):
        with pytest.raises(ConnectionError) as e: call()
        one_line(e, 'ada/', 'HF_HUB_OFFLINE', 'unset it')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    forget_sessions()
    point_to(monkeypatch, 'http://127.0.0.1:9')  # where nobody listens
    # the client tries again, more and more slowly
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    assert same('hf://ada/shapes')
    with pytest.raises(ConnectionError) as e: load_prompts('hf://ada/other', clip)
    one_line(e, 'ada/other', 'not in the cache', 'check the network', '127.0.0.1:9')
    with pytest.raises(ConnectionError) as e: learner.push_to_hub('ada/shapes')
    one_line(e, 'ada/shapes', 'cannot be reached', 'save')


# ---- what can go wrong ---------------------------------------------------------------------------


def put(hub, name, **files):
    files = {k.replace('__', '.'): v for k, v in files.items()}
    hub.repos[name] = dict(private=False, commits=[('0'*40, files)])

@pytest.mark.parametrize('name,error,says', [
    ('hf://ada/gone', FileNotFoundError, ['no ada/gone', 'check the name', 'hf auth login']),
    ('hf://ada/shapes@v9', FileNotFoundError, ["no revision 'v9'", 'leave it out']),
    ('hf://ada/empty', FileNotFoundError, ['ada/empty', HUB_FILE, 'push_to_hub']),
    ('hf://ada/gated', PermissionError, ['ada/gated', 'hf auth login']),
    ('hf://ada/foreign', ValueError, ['holds no prompts']),
    ('hf://ada/damaged', ValueError, ['no intact safetensors']),
    ('hf://ada/pickle', ValueError, ['no intact safetensors', 'pickle']),
    ('hf://ada', ValueError, ['hf://ada', 'write hf://user/name']),
    ('hf://ada/b/c', ValueError, ['write hf://user/name']),
    ('hf://ada/shapes@', ValueError, ['or hf://user/name@revision']),
    ('hf://../../etc', ValueError, ['write hf://user/name'])])
def test_what_is_not_there(hub, clip, tmp_path, name, error, says):
    "The same line from Python and from the command line"
    learner_of(clip).push_to_hub('ada/shapes')
    put(hub, 'ada/empty', README__md=b'x')
    put(hub, 'ada/gated'); hub.repos['ada/gated']['gated'] = True
    save_file({'a': torch.zeros(1)}, tmp_path/'f')
    put(hub, 'ada/foreign', prompts__safetensors=(tmp_path/'f').read_bytes())
    put(hub, 'ada/damaged',
        prompts__safetensors=hub.repos['ada/shapes']['commits'][0][1][HUB_FILE][:-9])
    put(hub, 'ada/pickle', prompts__safetensors=pickle.dumps({'a': 1}))
    with pytest.raises(error) as e: load_prompts(name, clip)
    one_line(e, *says)
    (photo,) = (p for p in shapes(tmp_path/'p', ['disc'], 1).rglob('*.png'))
    for command in (('predict', name, photo), ('evaluate', name, tmp_path/'p'), ('info', name)):
        refused(*command, says=says)


@pytest.mark.parametrize(
    'token,status,name,error,says',
    [(None, None, 'ada/shapes', PermissionError, ['ada/shapes', 'hf auth login', 'token']),
     ('hf_wrong', None, 'ada/shapes', PermissionError, ['ada/shapes', '401', 'may write there']),
     ('hf_right', None, 'foe/shapes', PermissionError, ['foe/shapes', '403', 'may write there']),
     ('hf_right', 418, 'ada/shapes', OSError, ['ada/shapes', '418', 'try again']),
     ('hf_right', None, 'shapes', ValueError, ['hf://shapes', 'user/name']),
     ('hf_right', None, 'ada/shapes@main', ValueError, ["'ada/shapes'", 'not to a revision']),
     ('hf_right', None, '', ValueError, ['user/name'])],
    ids='nobody stranger foe teapot short revision empty'.split())
def test_push_is_refused(hub, clip, monkeypatch, token, status, name, error, says):
    monkeypatch.delenv('HF_TOKEN')
    hub.status = status
    with pytest.raises(error) as e: learner_of(clip).push_to_hub(name, token=token)
    # tokens are never said
    assert 'hf_' not in one_line(e, *says) and not hub.repos


def test_licence_that_the_hub_does_not_know(hub, clip):
    with pytest.raises(ValueError) as e:
        learner_of(clip).push_to_hub('ada/shapes', license='none-of-them')
    one_line(e, 'ada/shapes', 'license', 'must be one of')


def test_other_backbone(hub, clip):
    name = learner_of(clip).push_to_hub('ada/shapes')
    with pytest.raises(ValueError) as e: load_prompts(name, load_backbone(device='cpu'))
    one_line(e, name, 'tiny-0', 'load that backbone')


# ---- the card ------------------------------------------------------------------------------------

def parts(card):
    _, head, text = card.split('---\n', 2)
    return yaml.safe_load(head), text


def test_card(clip):
    names = [f'thing {i}' for i in range(30)]
    card = model_card(CoOp(clip, names, n_ctx=2), 'ada/things', 'mit', 'Made of *clay*.')
    head, text = parts(card)
    assert head == dict(library_name='clipprompt', tags=['clip', 'prompt-learning', 'coop'],
                        pipeline_tag='image-classification', license='mit')
    for words in ('# ada/things', 'Made of *clay*.', '30 classes', '`thing 19`', 'and 10 more',
                  f'clipprompt {__version__}', clip.name, clip.fingerprint, '48', '"n_ctx": 2',
                  "load('hf://ada/things'"):
        assert words in text, words
    assert 'thing 20' not in text
    head, text = parts(model_card(ZeroShot(clip, ['cat'])))
    assert 'license' not in head and 'not stated' in text and '1 class:' in text
    assert 'take no other names' in model_card(CoOp(clip, NAMES, csc=True))
    assert 'take no other names' not in text


@pytest.mark.parametrize('name', ['a `tick`', '``', 'a|b', '---', '# x', 'a\nb', '<b>'])
def test_card_with_strange_names(clip, name):
    head, text = parts(model_card(CoOp(clip, [name, 'cat'], n_ctx=1)))
    line = next(l for l in text.splitlines() if l.startswith('2 classes: '))
    assert line.endswith(', `cat`.') and ' '.join(name.split()) in line


def test_the_lines_on_the_card_run(hub, monkeypatch):
    "As printed, with picto-clip"
    learner = CoOp(load_backbone(device='cpu'), NAMES, n_ctx=2)
    learner.push_to_hub('ada/picto')
    card = hub.repos['ada/picto']['commits'][0][1]['README.md'].decode()
    space = {}
    exec(re.search('```python\n(.*?)```', card, re.S)[1], space)
    assert torch.equal(space['learner'].ctx.tokens.cpu(), learner.ctx.tokens)


@pytest.mark.stress
def test_the_command_in_a_process_of_its_own(hub, tmp_path):
    """In offline mode, with nothing but the hub's environment variables and a cache that holds the
    prompts"""
    learner = CoOp(load_backbone(device='cpu'), NAMES, n_ctx=2)
    pinned = learner.push_to_hub('ada/picto')
    photo = shapes(tmp_path/'p', ['disc'], 1)/'disc'/'0.png'
    here = works('predict', pinned, photo)
    env = {
        **os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_CACHE': constants.HF_HUB_CACHE,
        'HF_HOME': str(tmp_path/'home'), 'HF_HUB_OFFLINE': '1'
    }
    code = 'from clipprompt.cli import main; main()'
    r = subprocess.run([sys.executable, '-c', code, 'predict', pinned, photo], env=env,
                       capture_output=True, text=True)
    assert r.stdout == here.out and r.stdout.count('%') == 3, r.stderr


def test_paths_are_left_alone(tmp_path):
    for path in ('p.safetensors', tmp_path/'hf:x', './hf:/a/b'):
        assert str(local_prompts(path)) == str(path).removeprefix('./')
    with pytest.raises(FileNotFoundError): read_prompts(tmp_path/'hf')
