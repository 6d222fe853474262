"""The native library: how it is found, its C interface, and the objects behind it."""
