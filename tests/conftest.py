import os

# Tests run in two processes (pyproject.toml), and towers as small as theirs gain little from a
# second thread. Set before PyTorch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_collection_modifyitems(items):
    "The longest tests first, so that no worker waits for another at the end"
    items.sort(key=lambda item: 'test_notebook[' not in item.nodeid)
