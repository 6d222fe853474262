"""CPU kernels by their public name; see `entmtp.native.kernels`."""

from .native.kernels import available, current, machine_peaks, missed, use, using

__all__ = ["available", "current", "machine_peaks", "missed", "use", "using"]
