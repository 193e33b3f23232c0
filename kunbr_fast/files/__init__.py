"""Files: written whole or not at all, tensors, models on disk, merging."""
