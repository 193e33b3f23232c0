"""Knowledge density: whose gradients, how measured, which blocks."""
