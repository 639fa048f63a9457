"""What `fresh_costs` runs in a process of its own: load one model, answer once, print seconds and bytes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(job: str) -> None:
    """Load, answer, and print."""
    wanted = json.loads(job)
    from seawall.inference import Backend, Decoder
    from seawall.inference.models.cache import read_facts

    begun = time.perf_counter()
    if wanted["text"]:
        context = min(2048, read_facts(Path(wanted["model"]))["config"]["context"])
        with Decoder.load(wanted["model"], threads=wanted["threads"], context=context, check_quality=False) as decoder:
            seconds = time.perf_counter() - begun
            with decoder.start([1] * 16, max_tokens=16) as sequence:
                for _ in sequence:
                    pass
            sys.stdout.write(json.dumps([seconds, resident()]))
        return
    with Backend.load(wanted["model"], threads=wanted["threads"], check_quality=False) as backend:
        seconds = time.perf_counter() - begun
        backend.warm_up()
        sys.stdout.write(json.dumps([seconds, resident()]))


def resident() -> int:
    """Bytes of resident memory; the most there ever was where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main(sys.argv[1])
