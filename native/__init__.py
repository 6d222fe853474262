"""libentmtp, and how the llama.cpp below it is made: llama_cpp.py is the command line of that."""
