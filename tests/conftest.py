def pytest_collection_modifyitems(items):
    """The longest tests first, so that `pytest -n` does not end with one worker waiting for the
    other"""
    items.sort(key=lambda item: 'test_notebook[' not in item.nodeid)
