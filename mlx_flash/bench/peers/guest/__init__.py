"""One engine reads a prompt and decodes, in a process and perhaps a Python of its own.

`python -m guest JOB`, with this package's folder in PYTHONPATH, prints what it took as
one line of JSON. The Python that runs it need not have mlx-flash: an engine's modules
are imported where the engine is asked for. Every engine runs its own loop, and is given
its next tokens by a sampler that also looks at the clock; so all do the same work, and
tokens have the same borders for all.
"""
