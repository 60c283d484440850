"""A fixed fusion that is stored beside its layers, because the layers are too large for memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, DiskSpaceError
from kr2cache.fusion import parse_fusion
from kr2cache.store.derive import derive, plan_fusion
from kr2cache.system.console import bytes_text, note, seconds_text
from kr2cache.training.features import fits_in_memory


def with_fusion_stored(cache: FeatureCache, ids: Sequence[str], config: TrainConfig) -> FeatureCache:
    """``cache``, or a cache of only its fixed fusion if that is too large for memory. Otherwise every run would read
    all layers again to average them.

    Args:
        cache: The cache that fits.
        ids: The sequences that the run uses.
        config: Of the run.
    """
    fusion = parse_fusion(config.fusion, cache.model_layers)
    tokens = int(cache.n_tokens[cache.positions(ids)].sum(dtype=np.int64))
    if (
        not config.extract
        or fusion.trainable
        or len(fusion.layers) == 1
        or config.projection == "direct"
        or cache.fusion is not None
        or not DTYPES[cache.dtype].is_exact
        or not cache.complete.all()
        or 2 * len(ids) < len(cache)  # the run would not read most of what is stored
        or fits_in_memory(tokens * cache.width * cache.states_dtype.itemsize)
    ):
        return cache
    plan = plan_fusion(cache, config.fusion, cache_dir=config.cache_dir)
    try:
        result = derive(plan)
    except (DiskSpaceError, ConfigError) as error:  # the disk is full, or the folder cannot be written
        note(f"{config.fusion} is not stored beside its layers: {error.message}")
        return cache
    if result.made:
        note(
            f"Stored {config.fusion} of {cache.folder.name}, which is too large for memory: from now on runs read "
            f"{bytes_text(result.bytes)} instead of {bytes_text(cache.stored_bytes)} (made in "
            f"{seconds_text(result.seconds)})."
        )
    return FeatureCache.open(result.cache)
