"""generation: what generate() and decode loops need, over transformers."""
