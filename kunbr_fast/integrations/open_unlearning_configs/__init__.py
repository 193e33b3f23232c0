"""Hydra's search path finds these configs here: `pkg://kunbr_fast.integrations.open_unlearning_configs`."""
