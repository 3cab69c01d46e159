"""Prompt learning for CLIP: readable, exact and fast

    import clipprompt as cp
    learner = cp.load('prompts.safetensors')
    cp.predict(learner, 'photos/')

Each name is imported when it is first used; `__init__.pyi` lists them.
"""
import lazy_loader

__version__ = "0.3.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
