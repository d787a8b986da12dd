"""What tests/project/test_warm.py runs: it tells of itself, fails or sleeps."""

import os
import sys
import time

if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "tell":
        print(*sys.argv)
        print(os.getcwd())
        print(*sorted(name for name in os.environ if name in ("MINE", "PATH", "HOME")))
        print(__name__, "torch:", "torch" in sys.modules, "utils:", "utils" in sys.modules)
        print("to stderr", file=sys.stderr)
        sys.exit(5)
    elif what == "fail":
        raise ValueError("on purpose")
    elif what == "message":
        sys.exit("a message")
    elif what == "sleep":
        print("asleep", flush=True)
        time.sleep(600)
