"""Benchmarks that anyone can run on their own machine: `mlx-flash bench --help`.

Each module measures one thing: its `run` returns a `report.Report`, and is a command
whose options are the parameters, typed as `options.py` says.
"""
