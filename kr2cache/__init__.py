"""Run a frozen language model once, keep every layer of its hidden states, and train readers on them.

Importing the package loads h5py and NumPy alone; torch and transformers come with the stages that need them.
"""

from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import KR2CacheError

__version__ = "0.1.0"

__all__ = ["FeatureCache", "KR2CacheError", "__version__"]
