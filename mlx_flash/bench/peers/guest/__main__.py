"""`python -m guest JOB`."""

import json
import sys

from .run import run

if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
