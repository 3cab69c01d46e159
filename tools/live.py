#!/usr/bin/env python3
"""Make the page that draws and answers: `python tools/live.py FOLDER`.

The page's own files come from data/live. Beside them this writes what it reads: both towers,
prompts and pictures of the shipped tasks, and the book's runs for the explorer.
`python tools/live.py --learn TASK...` learns the prompts again (minutes a task).
"""
import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

from clipprompt.backbone import assets, load_backbone
from clipprompt.deep import IVLP
from clipprompt.evaluation import evaluate
from clipprompt.evidence import stored_file
from clipprompt.methods import find_method, load, look
from clipprompt.mudpt import _first_words
from clipprompt.pictures import test_transform
from clipprompt.sets import load_dataset

TASKS = 'tools', 'messages', 'arrows', 'devices', 'weather', 'files'
SHOTS, SEED, SHOWN = 16, 1, 18
TITLES = {  # in the page's order: the book's own seeds first
    'zero-shot': ('Zero-shot', 'words only, nothing learned'),
    'coop': ('CoOp', 'learned words'),
    'mudpt': ('MuDPT', 'both sides, fused in both directions'),
    'provp-ref': ('ProVP-Ref', 'progressive image prompts'),
    'metaprompt': ('MetaPrompt', 'prompted and frozen encoders'),
    'map-dafe': ('MAP-DAFE', 'both sides, gates keep a share'),
    'variational-coop': ('Variational CoOp', 'ten draws of learned words'),
    'vpt': ('VPT', 'image prompts in each block'),
    'maple': ('MaPLe', 'image prompts made from words'),
}
LOOKS = dict(as_drawn='drawn', pixelate='pixels', edge_map='edges', photographed='photo')
PAGE = assets()/'live'
PROMPTS, STAMP = PAGE/'prompts', PAGE/'prompts'/'stamp.json'


def stamp():
    "What shipped prompts depend on"
    suite = (assets()/'suite.sha256').read_text().split()[0]
    return dict(backbone=load_backbone().fingerprint, suite=suite, shots=SHOTS, seed=SEED)


# ---- learning ----

def small(learner):
    """The same answers from fewer numbers: nets that only make tokens are left out.

    MuDPT and MaPLe are, once learned, independent prompts.
    """
    if learner.method == 'mudpt':
        text, image = learner.fused()
        first = _first_words(learner.backbone, learner.backbone.phrase, text.shape[1])
    elif learner.method == 'maple':
        text, image, first = learner.ctx.tokens, learner.proj(learner.ctx.tokens), 'auto'
    else: return learner
    same = IVLP(learner.backbone, learner.classnames, text.shape[1], image.shape[1], len(text),
                len(image), first)
    same.ctx.tokens.data.copy_(text.detach())
    same.visual_ctx.tokens.data.copy_(image.detach())
    return same.eval()


def learn(task, clip, epochs=None):
    "Learn the prompts of a task at the tuned settings; what they reach is noted"
    data, scores = load_dataset('pictograms', task), {}
    few = data.few_shot(SHOTS, SEED)
    for name in TITLES:
        method = find_method(name)
        recipe = method.recipe
        if epochs and recipe.epochs: recipe = replace(recipe, epochs=epochs)
        learner = method.train(clip, few, SEED, recipe).eval()
        found = small(learner)
        scores[name] = round(evaluate(found, data).accuracy, 2)
        (PROMPTS/task).mkdir(parents=True, exist_ok=True)
        found.save(PROMPTS/task/f'{name}.safetensors')
        print(f'{task} {name}: {scores[name]} % of {len(data.test)} pictures', flush=True)
    notes = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    tasks = notes.get('tasks', {}) | {task: dict(epochs=epochs or 'tuned', accuracy=scores)}
    STAMP.write_text(json.dumps(stamp() | dict(tasks=tasks), indent=1) + '\n')


def learned(task, clip):
    "The shipped learners of a task, in the page's order"
    files = {name: PROMPTS/task/f'{name}.safetensors' for name in TITLES}
    return {name: load(file, clip) for name, file in files.items() if file.is_file()}


# ---- what a learner puts into the towers ----

class Spy:
    "Notes what a tower is given"
    def __init__(self, tower): self.tower, self.seen = tower, []

    def __call__(self, what, prompts=None):
        self.seen.append((what, prompts))
        return self.tower(what, prompts)

    def __getattr__(self, name): return getattr(self.tower, name)


def schedule(prompts, first, blocks):
    """Fresh tokens [J, ...] of the first blocks, and the share of the carried ones that each keeps.

    What enters is keep*carried + (1-keep)*fresh; ValueError for prompts that do anything else.
    """
    tokens, keep = [first], [0.]
    zero, one = torch.zeros_like(first), torch.ones_like(first)
    for l in range(1, blocks):
        at0, at1 = prompts.enter(l, zero), prompts.enter(l, one)
        k = float((at1-at0).mean())
        if (at1-at0-k).abs().max() > 1e-5: raise ValueError('the page knows one share per block')
        fresh = torch.zeros_like(first) if k > 1-1e-6 else at0/(1-k)
        tokens.append(fresh.expand_as(first))
        keep.append(k)
    last = max(l for l, k in enumerate(keep) if k < 1)   # behind it nothing fresh enters
    return torch.stack(tokens[:last+1]), keep


def image_side(learner):
    "Branches in the order of the feature, tokens [J, n, D] and shares kept"
    clip, spy = learner.backbone, Spy(learner.vision)
    size, blocks = clip.image_size, clip.vision_layers
    learner.vision = spy
    learner.image_features(torch.zeros(1, 3, size, size))
    learner.vision = spy.tower
    branches = ['frozen' if p is None else 'prompted' for _, p in spy.seen]
    given = [p for _, p in spy.seen if p is not None]
    if not given: return branches, None, [0.]*blocks
    first = given[0].enter(0, None)
    if first.ndim != 2:
        raise ValueError(f'{learner.method} has tokens for each image, which the page cannot show')
    tokens, keep = schedule(given[0], first, blocks)
    if spy.tower.ln_pre: tokens[0] = spy.tower.vit.ln_pre(first)  # acts on each token alone
    return branches, tokens, keep


def around(clip, ids, eot, name):
    "Token ids before the class name and behind it: a full stop, or nothing"
    encode, end = clip.tokenizer.encode, int(eot)
    tail = [t for t in encode('.') if t == ids[end-1]]
    return dict(prefix=ids[:end-len(tail)-len(encode(name))].tolist(), tail=tail)


def text_side(learner):
    "For each part of the text feature: how a sentence of any name becomes it"
    clip, names, spy = learner.backbone, learner.classnames, Spy(learner.text)
    blocks, parts = clip.text_layers, []
    if hasattr(learner, 'reading'):
        r, first = learner.reading, learner.ctx.enter(0, None)
        tokens, keep = schedule(learner.ctx, first, blocks)
        start = around(clip, r.ids[0], r.eot[0], names[0])
        return [dict(kind='beside', keep=keep, tokens=tokens[None]) | start]
    learner.text, learner._frozen_text = spy, {}
    learner.text_features()
    learner.text = spy.tower
    for sentences, prompts in spy.seen:
        start = around(clip, sentences.ids[0], sentences.eot[0], names[0])
        part = dict(kind='sentence') | start
        if prompts is not None:
            first = prompts.enter(0, None)                          # [n, D] or [S, 1, n, D]
            tokens, keep = schedule(prompts, first, blocks)
            tokens = tokens[:, None] if first.ndim == 2 else tokens[:, :, 0]  # [J, S, n, D]
            part |= dict(kind='slots', keep=keep, tokens=tokens.transpose(0, 1))
        parts.append(part)
    return parts


def exported(name, learner):
    "What the page needs of a learner: tensors, and a description"
    branches, image, keep = image_side(learner)
    text, tensors = learner.text_features(), {}
    if text is None:
        raise ValueError(f'{name} makes class features for each image, which the page cannot show')
    tensors[f'{name}.text'] = text.reshape(-1, len(learner.classnames), text.shape[-1])  # [S, C, E]
    if image is not None: tensors[f'{name}.image'] = image
    parts = text_side(learner)
    for i, part in enumerate(parts):
        if 'tokens' in part: tensors[f'{name}.words.{i}'] = part.pop('tokens')
    title, what = TITLES[name]
    says = dict(name=name, title=title, what=what, colour=look(name)[0], branches=branches,
                slots=0 if image is None else image.shape[1], keep=keep, parts=parts)
    if getattr(getattr(learner, 'visual_ctx', None), 'alpha', None) is not None:
        says['alpha'] = learner.visual_ctx.alpha
    return {k: v.detach().float().contiguous() for k, v in tensors.items()}, says


# ---- files ----

def half(tensors):
    "In fp16, as picto-clip is stored: nothing may be lost"
    small = {k: v.half().contiguous() for k, v in tensors.items()}
    lossy = [k for k, v in tensors.items() if not torch.equal(small[k].float(), v)]
    if lossy: raise ValueError(f'{lossy[0]} does not fit into fp16')
    return small


def write_towers(clip, out):
    "The image tower, and the text tower with the words that picto-clip read"
    state = clip.model.state_dict()
    image = {k.removeprefix('visual.'): v for k, v in state.items() if k.startswith('visual.')}
    says = dict(heads=clip.visual.transformer.resblocks[0].attn.num_heads, mean=clip.mean,
                std=clip.std, size=clip.image_size, scale=float(clip.logit_scale))
    save_file(half(image), out/'tower.safetensors', dict(info=json.dumps(says)))
    words = {k: v for k, v in state.items()
             if not k.startswith(('visual.', 'token_embedding', 'logit_scale'))}
    table = state['token_embedding.weight']
    known = table.abs().sum(1).nonzero()[:, 0]
    words |= dict(rows=table[known])
    heads = clip.text.transformer.resblocks[0].attn.num_heads
    save_file(half(words) | dict(ids=known.int()), out/'text.safetensors',
              dict(info=json.dumps(dict(heads=heads, length=clip.context_length))))
    (out/'merges.txt').write_text('\n'.join(merges()) + '\n', encoding='utf-8')


def merges():
    "CLIP's byte pairs, most frequent first"
    import open_clip
    file = Path(open_clip.__file__).parent/'bpe_simple_vocab_16e6.txt.gz'
    lines = gzip.decompress(file.read_bytes()).decode().split('\n')
    return lines[1:49152-256-2+1]


def credits():
    "{family: (title, copyright, licence)}, as data/PICTURES.md has them"
    text = (assets()/'PICTURES.md').read_text(encoding='utf-8')
    plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', text)
    rows = re.findall(r'^\| ([\w-]+) \| (.+?) \| (.+?) \| (.+?) \|$', plain, re.M)
    return {row[0]: row[1:] for row in rows}


def chosen(data):
    "Places of test pictures: another class each time, from as many artists as there are"
    used, found = set(), {}
    order = np.random.default_rng(0).permutation(len(data.test)).tolist()
    for i in sorted(order, key=lambda i: data.test[i].domain in used):
        item = data.test[i]
        if item.label in found: continue
        found[item.label] = i
        used.add(item.domain)
    return sorted(found.values())[:SHOWN]


def write_pictures(data, out):
    "A strip of test pictures; what they show and who drew them"
    known, places = credits(), chosen(data)
    drawn = [np.asarray(data.source(data.test[i].path).convert('L')) for i in places]
    file = f'pictures-{data.task}.png'
    Image.fromarray(np.concatenate(drawn, 1)).save(out/file, optimize=True)
    items = [dict(place=i, label=data.classnames[data.test[i].label],
                  credit=', '.join(known.get(data.test[i].domain, (data.test[i].domain,))))
             for i in places]
    return dict(file=file, size=drawn[0].shape[0], items=items)


@torch.no_grad()
def most_disputed(data, learners):
    "Which of the strip's pictures gets the most different answers: the page opens with it"
    transform = test_transform(next(iter(learners.values())).backbone)
    x = torch.stack([transform(data.read(data.test[i])) for i in chosen(data)])
    answers = torch.stack([learner(x).argmax(-1) for learner in learners.values()])   # [M, N]
    return max(range(len(x)), key=lambda i: len(answers[:, i].unique()))


def write_task(task, clip, out):
    "Prompts and pictures of a task; its line in about.json"
    data, tensors, methods = load_dataset('pictograms', task), {}, []
    learners = learned(task, clip)
    with torch.no_grad():
        for name, learner in learners.items():
            mine, says = exported(name, learner)
            tensors |= mine
            methods.append(says)
    info = dict(task=task, classnames=data.classnames, methods=methods)
    save_file(tensors, out/f'methods-{task}.safetensors', dict(info=json.dumps(info)))
    return dict(task=task, look=LOOKS[data.domain.__name__], classes=len(data.classnames),
                start=most_disputed(data, learners), pictures=write_pictures(data, out))


def write_runs(out):
    "The book's runs for the explorer, column by column"
    rows = pd.read_csv(stored_file())
    rows = rows[rows.protocol == 'base-to-new']
    columns, names = {}, {}
    for name in ('part', 'method', 'task'):
        codes, values = pd.factorize(rows[name])
        columns[name], names[name] = codes.tolist(), values.tolist()
    for name in ('shots', 'seed', 'halves', 'trainable'): columns[name] = rows[name].tolist()
    for name in ('base', 'new', 'h', 'seconds'):
        numbers = rows[name].round(2)
        columns[name] = numbers.astype(object).where(numbers.notna(), None).tolist()
    columns['run'] = rows['run'].tolist()
    learners = rows['learner'].where(rows['learner'].notna(), rows['method'])
    colours = {m: look(l)[0] for m, l in zip(rows['method'], learners)}
    found = dict(names=names, columns=columns, colours=colours)
    (out/'explorer.json').write_text(json.dumps(found, separators=(',', ':')))


def make(out, tasks=None):
    "The whole page in a folder"
    out.mkdir(parents=True, exist_ok=True)
    for file in PAGE.iterdir():
        shown = file.suffix in ('.html', '.css', '.mjs', '.wasm') and file.name != 'widget.mjs'
        if shown: shutil.copy(file, out/file.name)
    clip = load_backbone()
    write_towers(clip, out)
    here = [t for t in tasks or TASKS if (PROMPTS/t).is_dir()]
    if not here: raise SystemExit('no prompts in data/live/prompts; run with --learn first')
    about = dict(server=False, backbone=clip.name, image_size=clip.image_size,
                 tasks=[write_task(t, clip, out) for t in here])
    write_runs(out)
    heavy = sorted(out.glob('*.safetensors'))
    for file in heavy: file.chmod(0o644)   # a server of another user reads them
    about['bytes'] = {file.name: file.stat().st_size for file in heavy}
    (out/'about.json').write_text(json.dumps(about, indent=1, ensure_ascii=False) + '\n',
                                  encoding='utf-8')
    return about


def compiled():
    "Compile the kernel: needs npm's AssemblyScript, and is needed after a change of linear.ts only"
    subprocess.run(['npx', '--yes', '-p', 'assemblyscript@0.28', 'asc', PAGE/'linear.ts', '-o',
                    PAGE/'linear.wasm', '--runtime', 'stub', '--importMemory', '--noAssert',
                    '-O3', '--enable', 'simd'], check=True)
    note_kernel()


def sha256(file): return hashlib.sha256(file.read_bytes()).hexdigest()


def note_kernel():
    "Which source the kernel was compiled from"
    both = [sha256(PAGE/name) for name in ('linear.ts', 'linear.wasm')]
    (PAGE/'linear.sha256').write_text('\n'.join(both) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', nargs='?', type=Path, help='where the page is written')
    parser.add_argument('--learn', nargs='+', metavar='TASK', choices=TASKS,
                        help=f'learn prompts instead: {", ".join(TASKS)}')
    parser.add_argument('--epochs', type=int, help='of --learn; the tuned number where not given')
    parser.add_argument('--compile', action='store_true', help='compile the kernel instead')
    given = parser.parse_args()
    if given.compile: return compiled()
    if given.learn:
        clip = load_backbone()
        for task in given.learn: learn(task, clip, given.epochs)
        return
    if given.folder is None: parser.error('name a folder to write to')
    make(given.folder)
    total = sum(f.stat().st_size for f in given.folder.rglob('*') if f.is_file())
    print(f'{given.folder}: {total/1e6:.1f} MB')


if __name__ == '__main__': sys.exit(main())
