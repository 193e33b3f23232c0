"""A run as a page that people read: one HTML file with all in it, no script, nothing loaded."""
