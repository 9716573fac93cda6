"""Results of an evaluation as text."""

from magnet_jax.metrics import PROTOCOLS


def table(results: dict[str, dict]) -> str:
    """Results of several splits as text: a row per protocol, then per expression type the first protocol and its floor."""
    lines = []
    for split, result in results.items():
        protocols = [name for name in result if name in PROTOCOLS]
        for protocol in protocols:
            figures = {k: v for k, v in result[protocol].items() if k != "types"}
            shown = "  ".join(f"{k} {_cell(v)}" for k, v in figures.items())
            lines.append(f"{split:<8}{protocol:<10}{shown}")
        if "left_out" in result:
            lines.append(
                f"{split:<8}{'left out':<10}{result['left_out']['count']} examples that cannot be read"
            )
        if "constant_mask" in result:
            lines.append(
                f"{split:<8}{'constant':<10}oIoU {_cell(result['constant_mask']['oIoU'])}  (best constant mask)"
            )
        for protocol in protocols[:1]:
            floors = result.get("shuffled_text", {}).get(protocol)
            if floors is None and not result[protocol]["types"]:
                continue
            main = next(iter(result[protocol]))  # oIoU or gIoU.
            lines.append(
                f"{split:<8}{protocol:<10}{main + ' by type':<18}{'model':>8}{'shuffled':>10}{'gain':>8}{'count':>8}"
            )
            for name, figures in {"all": result[protocol], **result[protocol]["types"]}.items():
                floor = None if floors is None else (floors if name == "all" else floors["types"][name])[main]
                gain = None if floor is None else figures[main] - floor
                cells = f"{_cell(figures[main]):>8}{_cell(floor):>10}{_cell(gain):>8}{figures['count']:>8}"
                lines.append(f"{'':<18}{name:<18}{cells}")
    return "\n".join(lines)


def _cell(value) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
