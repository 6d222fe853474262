"""Where this package keeps what is cheap to keep and dear to make again, by its public name."""

from .common.cache import cache_folder

__all__ = ["cache_folder"]
