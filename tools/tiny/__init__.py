"""The tiny model: the grammar of its world, its corpus, its training and its measurements."""
