"""Readers of untrusted files: GGUF headers, safetensors, PyTorch archives. No code of a file is executed."""
