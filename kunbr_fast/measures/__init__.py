"""The measures that people publish: what a model knows, remembers, gives away and has lost."""
