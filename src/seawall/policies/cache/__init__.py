"""Cache: an answer serves again for a while, a run all who ask meanwhile, an old answer where there is no new one."""

from seawall.policies.cache.policy import Cache, CacheSnapshot, RefreshFailed, StaleAnswered

__all__ = ["Cache", "CacheSnapshot", "RefreshFailed", "StaleAnswered"]
