"""Run a frozen language model once, keep every layer of its hidden states, and train readers on them.

Each public name is imported when it is first used (PEP 562): ``FeatureCache`` needs h5py and NumPy only, ``extract``,
``train`` and ``Predictor`` need torch and transformers.
"""

from kr2cache.version import __version__

TYPE_CHECKING = False  # type checkers know this name; importing typing would be a third of this package's import time
if TYPE_CHECKING:
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.calls import extract, train
    from kr2cache.errors import KR2CacheError
    from kr2cache.prediction.predict import Predictor

__all__ = [
    "FeatureCache",
    "KR2CacheError",
    "Predictor",
    "__version__",
    "extract",
    "train",
]

_MODULES = {
    "FeatureCache": "cache.reader",
    "KR2CacheError": "errors",
    "Predictor": "prediction.predict",
    "extract": "calls",
    "train": "calls",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
