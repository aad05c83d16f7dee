"""`python -m mlx_flash`, as the installed command."""

from .cli import main

main(prog_name="mlx-flash")
