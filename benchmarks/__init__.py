"""Benchmarks, installed as `kunbr_fast.benchmarks`: `kunbr-fast bench`."""
