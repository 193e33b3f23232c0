"""Steps of full-parameter and of block training."""
