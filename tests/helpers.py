"What several test files need: small worlds, and the command line run in this process."
import contextlib
import io
import re
import sys
from itertools import combinations, product

import pytest
import torch
from PIL import Image, ImageDraw

from clipprompt.backbone import build_backbone

TINY = dict(embed_dim=16,
            vision_cfg=dict(image_size=32, layers=3, width=32, head_width=16, patch_size=8),
            text_cfg=dict(context_length=77, vocab_size=49408, width=24, heads=2, layers=3))


def tiny_clip(seed=0, dtype=torch.float32):
    """An untrained CLIP with three blocks in each tower; biases and layer norms are no identities,
    so that leaving one out shows"""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = build_backbone(TINY, name=f'tiny-{seed}')
        for p in clip.model.parameters():
            if p.ndim == 1: p.data += .5*torch.randn_like(p)
        return clip.to(device='cpu', dtype=dtype)


def images(clip, n=4):
    "Noise of the size that a CLIP reads, always the same"
    return torch.randn(n, 3, clip.image_size, clip.image_size, dtype=clip.dtype,
                       generator=torch.Generator().manual_seed(0))


def shapes(folder, classes=('disc', 'two_bars', 'cross', 'ring'), n=6):
    """One folder per class with n drawings of one shape each, black on white: a linear probe tells
    them apart"""
    for c, name in enumerate(classes):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = Image.new('RGB', (40, 40), 'white')
            pen, (x, y), r = ImageDraw.Draw(image), (18 + i % 3, 18 + i//3), 12 + i % 2
            if c % 4 == 0: pen.ellipse((x-r, y-r, x+r, y+r), 'black')
            if c % 4 == 1:
                pen.rectangle((x - r, y - 9, x + r, y - 4), 'black')
                pen.rectangle((x - r, y + 4, x + r, y + 9), 'black')
            if c % 4 == 2:
                pen.line((x - r, y - r, x + r, y + r), 'black', 4)
                pen.line((x - r, y + r, x + r, y - r), 'black', 4)
            if c % 4 == 3: pen.ellipse((x-r, y-r, x+r, y+r), None, 'black', 3)
            image.save(folder/name/f'{i}.png')
    return folder


def pairwise(**choices):
    """A mark: few cases, in which any two values of two parameters meet at least once. What one
    parameter breaks, or two together, is found as in the full product, at a tenth of its price"""
    names, cases = list(choices), []
    every = list(product(*(range(len(c)) for c in choices.values())))
    pairs = lambda case: set(combinations(enumerate(case), 2))
    left = set().union(*map(pairs, every))
    while left:
        cases.append(max(every, key=lambda case: len(pairs(case) & left)))
        left -= pairs(cases[-1])
    values = [[choices[n][i] for n, i in zip(names, case)] for case in cases]
    ids = ['-'.join(str(v).removeprefix('torch.') for v in case) for case in values]
    return pytest.mark.parametrize(','.join(names), values, ids=ids)


class Result:
    def __init__(self, code, out, err): self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f'exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}'

    @property
    def said(self):
        """Lines on stderr, without progress bars and without the line by which `compare` says what
        it is about to do"""
        lines = re.split(r'[\r\n]', re.sub(r'\x1b\[\w', '', self.err))
        return [
            l for l in lines if l.strip()
            and not re.search(r'\d+(/\d+)? ?(run|epoch|batch|\[\d\d:)', l) and ' on cpu, ' not in l
            and not re.search(r'\b(run|epoch) \d+ of \d+, ', l)
        ]


def clipprompt(*args):
    "`clipprompt ARGS` through the installed command's own entry point"
    from clipprompt.cli import main  # here, because it imports all chapters
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ['clipprompt', *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
    except SystemExit as e: code = e.code
    finally: sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def works(*args):
    r = clipprompt(*args)
    assert r.code in (0, None), r
    return r


def refused(*args, says=(), code=1):
    """The command line's contract for bad input: one line on stderr with cause and cure, exit code
    1, no traceback"""
    r = clipprompt(*args)
    assert r.code == code and 'Traceback' not in r.err + r.out, r
    assert len(r.said) == 1 and r.said[0].startswith('error: ') and len(r.said[0]) < 500, r
    for words in says: assert words in r.said[0], f'{words!r} not in: {r.said[0]}'
    return r


def one_line(error, *says):
    "The same for an exception"
    message = str(error.value)
    assert message and '\n' not in message and len(message) < 500, message
    for words in says: assert words in message, f'{words!r} not in: {message}'
    return message
