#!/usr/bin/env python3
"""What Quarto leaves to do in a book's folder: the page for addresses that lead nowhere stands at
the top."""
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == '__main__':
    shutil.copy(ROOT/'site'/'404.html',
                Path(os.environ.get('QUARTO_PROJECT_OUTPUT_DIR', ROOT/'_docs'))/'404.html')
