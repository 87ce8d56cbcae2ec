"""Recipes by name, installed as `t2v_ds.configs`."""
