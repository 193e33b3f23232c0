"""What a run will take, from config.json alone."""
