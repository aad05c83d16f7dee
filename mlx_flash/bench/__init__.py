"""Benchmarks that anyone can run on their own machine: `mlx-flash bench --help`.

Each module measures one thing and returns a `report.Report`; nothing here is imported
by the library itself.
"""
