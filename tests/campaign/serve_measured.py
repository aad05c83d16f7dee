"""`mlx-flash serve`, which prints at its end what MLX held at most, and its budget."""

import json
import sys

import mlx.core as mx

import mlx_flash
from mlx_flash.server import open_server


def main(port: str) -> None:
    # As `serve` has it; the log would fill the disk.
    options = ["--port", port, "--log-level", "CRITICAL"]
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", options) as listener:
        try:
            listener.serve_forever()
        except KeyboardInterrupt:
            pass
        budget = listener.worker.model.flash.budget.total_bytes
    print(json.dumps({"peak_bytes": mx.get_peak_memory(), "budget_bytes": budget}))


if __name__ == "__main__":
    main(sys.argv[1])
