"""Model files: by which names they are found, what is in them, and how they are read."""
