"""`mlx-flash serve`, which prints at its end what MLX held at most, and what it read.

    serve_measured.py PORT [MODEL MEMORY CONTEXT [FOLDER]]

FOLDER is where KV caches outlive it.
"""

import json
import sys
import threading
from pathlib import Path

import mlx.core as mx

import mlx_flash
from mlx_flash.server import Settings, open_server
from mlx_flash.server.prefix_folder import Saving

LOOK_S = 0.002


def watch(most: dict[str, int], end: threading.Event) -> None:
    """Note the most that arrays and kept buffers take together."""
    while not end.wait(LOOK_S):
        now = mx.get_active_memory() + mx.get_cache_memory()
        most["bytes"] = max(most["bytes"], now)


def main(port, model=mlx_flash.DEMO_MODEL, memory="50%", context=None, folder=None):
    settings = Settings(port=int(port))
    saving = Saving(Path(folder), 10**9) if folder else None
    wanted = {"context": int(context)} if context else {}
    with open_server(str(model), memory, settings, saving, **wanted) as listener:
        flash = listener.worker.model.flash
        most, end = {"bytes": 0}, threading.Event()
        threading.Thread(target=watch, args=(most, end)).start()
        try:
            listener.serve_forever()
        except KeyboardInterrupt:
            pass
        end.set()
        facts = {
            "peak_bytes": mx.get_peak_memory(),
            "with_cache_bytes": most["bytes"],
            "budget_bytes": flash.budget.total_bytes,
            "bytes_read": flash.stats.bytes_read,
            "kept": len(listener.worker.conversations),
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
