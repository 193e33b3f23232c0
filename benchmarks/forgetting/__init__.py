"""What benchmarks/evidence.py is made of: worlds, methods, one measurement as a unit, tables and pictures."""
