"""`python -m t2v_ds VERB`: the same as `t2v VERB`; what launchers that start a module are given."""

from t2v_ds.cli import main

if __name__ == "__main__":
    main()
