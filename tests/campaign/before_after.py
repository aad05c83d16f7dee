"""Two trees of this project decode the same tokens in turn, token by token.

A busy machine changes its speed within seconds, and two runs one after the other then
say more about it than about the code. Here each token is computed by both trees, in an
order that is drawn anew, and the ratio of every pair counts.

    python tests/campaign/before_after.py OLD_TREE NEW_TREE MODEL --memory 80%

Each tree needs its compiled reader (`pip install -e .` in it once, or a `.so` of it).
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

CHILD = """
import sys, time
from pathlib import Path
tree, folder, memory, context = sys.argv[1:]
sys.path.insert(0, tree)
import mlx.core as mx
import mlx_flash
from mlx_flash.loading import load_model
from mlx_lm.models.cache import make_prompt_cache
assert Path(mlx_flash.__file__).is_relative_to(tree), mlx_flash.__file__
model, _ = load_model(Path(folder), memory, page_cache=False, context=int(context))
cache = make_prompt_cache(model)
mx.eval(model(mx.array([list(range(3, 11))]), cache=cache))
print("ready", flush=True)
for token in sys.stdin:
    since, cpu = time.perf_counter(), time.process_time()
    mx.eval(model(mx.array([[int(token)]]), cache=cache))
    print(time.perf_counter() - since, time.process_time() - cpu, flush=True)
"""


class Tree:
    """A process that runs the model with the code of one tree."""

    def __init__(self, tree: Path, model: Path, memory: str, context: int):
        words = [str(tree.resolve()), str(model.resolve()), memory, str(context)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
        )
        if self._process.stdout.readline() != "ready\n":
            sys.exit(f"{tree} did not load {model}. Its error stands above.")
        self.seconds: list[tuple[float, float]] = []

    def decode(self, token: int) -> None:
        """Compute one token, and keep (seconds by the clock, seconds of CPU)."""
        self._process.stdin.write(f"{token}\n")
        self._process.stdin.flush()
        clock, cpu = self._process.stdout.readline().split()
        self.seconds.append((float(clock), float(cpu)))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def ratios(old: list[float], new: list[float]) -> dict[str, float]:
    """The median and quartiles of new / old, pair by pair."""
    pairs = [after / before for before, after in zip(old, new, strict=True)]
    low, _, high = quantiles(pairs, n=4)
    return {"median": median(pairs), "from": low, "to": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model", type=Path, help="a folder that both trees read")
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--warm", type=int, default=20, help="tokens not counted")
    a = parser.parse_args()
    context = a.tokens + 24
    trees = [Tree(tree, a.model, a.memory, context) for tree in (a.old, a.new)]
    for i in range(a.tokens):
        for tree in random.sample(trees, 2):
            tree.decode((i * 37 + 11) % 2000)
    for tree in trees:
        tree.close()
    old, new = (list(zip(*tree.seconds[a.warm :], strict=True)) for tree in trees)
    told = {
        "ms_before": median(old[0]) * 1e3,
        "ms_after": median(new[0]) * 1e3,
        "ratio": ratios(old[0], new[0]),
        "cpu_ratio": ratios(old[1], new[1]),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
