"""The counts of several servers as those of one; see [`Metrics`] for what each of them counts."""

from collections.abc import Mapping


class Sums:
    """Adds up what replicas count. What one had counted when it was last asked stays when it is gone.

    A counter that falls would tell Prometheus that the server has begun anew.
    """

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def render(self, told: Mapping[str, str], more: Mapping[str, tuple[str, float]]) -> str:
        """All counts, in Prometheus' text format.

        Args:
            told: replica -> what its `/metrics` says now; those that said something before and do not now are gone,
                and their gauges with them.
            more: name -> type and value of what is counted before all replicas.
        """
        self._told.update(told)
        lines: dict[str, str] = {}  # the comment itself, or name and labels -> the line
        sums: dict[str, float] = {}
        for replica, text in self._told.items():
            kind = ""
            for line in text.splitlines():
                if line.startswith("#"):
                    lines.setdefault(line, line)
                    kind = line.rpartition(" ")[2] if line.startswith("# TYPE ") else kind
                    continue
                name, _, value = line.rpartition(" ")
                lines.setdefault(name, "")
                if kind != "gauge" or replica in told:
                    sums[name] = sums.get(name, 0) + (float(value) if "." in value else int(value))
        for name, (kind, number) in more.items():
            lines[f"# TYPE {name} {kind}"] = f"# TYPE {name} {kind}"
            lines[name], sums[name] = "", number
        return "".join(f"{line or f'{key} {_shown(sums.get(key, 0))}'}\n" for key, line in lines.items())


def _shown(value: float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)
