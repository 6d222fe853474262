"""Types that llama.cpp can keep the keys and values of a text in; with others it ends the process."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
