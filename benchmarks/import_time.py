"""What `import jaxpeft` adds to `import jax`: python benchmarks/import_time.py

Medians over fresh processes, run in turn so that both see the same load. The last line is JSON.
"""

import json
import statistics
import subprocess
import sys

RUNS = 9

# jax is imported first in both, so that the difference is what jaxpeft itself brings in.
CODE = """
import time
begin = time.perf_counter()
import jax
middle = time.perf_counter()
import jaxpeft
print(middle - begin, time.perf_counter() - middle)
"""


def main() -> None:
    times = []
    for _ in range(RUNS + 1):  # the first one writes the byte code and is dropped
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        times.append([float(number) for number in done.stdout.split()])
    jax_seconds, added_seconds = (statistics.median(t) for t in zip(*times[1:], strict=True))
    print(f"import jax {jax_seconds:.2f} s, then import jaxpeft {added_seconds:.2f} s")
    print(json.dumps({"jax_seconds": jax_seconds, "added_seconds": added_seconds}))


if __name__ == "__main__":
    main()
