"""A run: settings, state on disk, stages."""
