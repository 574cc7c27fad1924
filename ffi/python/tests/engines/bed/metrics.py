"""Counters and gauges as an engine's ``/metrics`` shows them."""

import re
from typing import Dict, List, Tuple

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One reading of ``/metrics``."""

    def __init__(self, text: str):
        self.samples: List[Tuple[str, Dict[str, str], float]] = []
        for line in text.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            found = _SAMPLE.match(line)
            if found is None:
                raise ValueError(f"not a metric: {line!r}")
            labels = dict(_LABEL.findall(found["labels"] or ""))
            self.samples.append((found["name"], labels, float(found["value"])))

    def sum(self, name: str, **labels: str) -> float:
        """All samples of this name that carry these labels, added up; 0 if there are none.

        A counter may be named with or without its ``_total``.
        """
        names = {name, f"{name}_total"}
        return sum(
            value
            for sample, carried, value in self.samples
            if sample in names and labels.items() <= carried.items()
        )

    def names(self) -> List[str]:
        """Every name that was seen, in order, once each."""
        return list(dict.fromkeys(name for name, _, _ in self.samples))

    @property
    def local_hits(self) -> float:
        """Prompt tokens that the engine found in its own prefix cache."""
        return self.sum("vllm:prefix_cache_hits")

    @property
    def external_hits(self) -> float:
        """Prompt tokens that the engine got through its connector."""
        return self.sum("vllm:external_prefix_cache_hits")

    @property
    def external_queries(self) -> float:
        """Prompt tokens that the engine asked its connector for."""
        return self.sum("vllm:external_prefix_cache_queries")
