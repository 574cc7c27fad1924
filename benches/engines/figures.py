"""How the programs in this folder tell their figures to kv-bench: a JSON object a line."""

import json
import sys
from typing import Sequence


def tell(subject: str, case: str, metric: str, unit: str, samples: Sequence[float]) -> None:
    """One figure: who, at what, which, in what, and each measurement."""
    figure = {
        "subject": subject,
        "case": case,
        "metric": metric,
        "unit": unit,
        "samples": list(samples),
    }
    print(json.dumps(figure), flush=True)


def say(text: str) -> None:
    """Something for people."""
    print(text, file=sys.stderr, flush=True)
