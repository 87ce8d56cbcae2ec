"""DeepSpeed settings by name (`train.ds_config=zero2`), installed as `t2v_ds.ds_configs`."""
