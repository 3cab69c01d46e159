#!/usr/bin/env python3
"""What Quarto leaves to do in a book's folder: the page for addresses that lead nowhere stands at
the top, and the page that draws beside the chapters."""
import os
import shutil
from pathlib import Path

from live import make

ROOT = Path(__file__).resolve().parent.parent

if __name__ == '__main__':
    out = Path(os.environ.get('QUARTO_PROJECT_OUTPUT_DIR', ROOT/'_docs'))
    shutil.copy(ROOT/'site'/'404.html', out/'404.html')
    # A preview renders one chapter at a time; the page that draws depends on none of them
    if os.environ.get('QUARTO_PROJECT_RENDER_ALL') or not (out/'live').exists(): make(out/'live')
