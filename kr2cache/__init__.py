"""Run a frozen language model once, keep every layer of its hidden states, and train readers on them.

What is named here is loaded when it is first used: ``FeatureCache`` needs h5py and NumPy, torch and transformers come
with the stages that need them.
"""

TYPE_CHECKING = False  # what typing calls so; importing typing is a third of this package's start
if TYPE_CHECKING:
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.errors import KR2CacheError

__version__ = "0.1.0"

__all__ = ["FeatureCache", "KR2CacheError", "__version__"]


def __getattr__(name: str) -> object:
    if name == "FeatureCache":
        from kr2cache.cache.reader import FeatureCache

        return FeatureCache
    if name == "KR2CacheError":
        from kr2cache.errors import KR2CacheError

        return KR2CacheError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
