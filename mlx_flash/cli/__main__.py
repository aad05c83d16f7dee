"""`python -m mlx_flash.cli`, as the installed command."""

from . import main

main(prog_name="mlx-flash")
