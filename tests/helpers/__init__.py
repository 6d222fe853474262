"""What tests share: models and checkpoints made for them, references, servers, a terminal."""
