"""Reports of the commands on saved adapters, for people."""

from __future__ import annotations


def describe_merge(report: dict) -> str:
    """What was written and how exact it is, in sentences."""
    kind = "as training on the quantized base saw it" if report["onto"] == "quantized" else "as it is"
    lines = [f"{report['output']}: {report['values']:,} values of {report['adapter']} merged onto the base {kind}"]
    if report["repaired"]:
        others = "Q(W), what quantization left of it" if report["onto"] == "quantized" else "W"
        lines.append(
            f"{report['repaired']:,} of the values were trained from W, the weight before quantization: these entries "
            f"are W + S, the others of their matrices {others}"
        )
    done = len(report["files"]) - len(report["files_written"])
    if done:
        lines.append(f"{done} of {len(report['files'])} files were finished already and are not measured")
    if report["matrices_measured"]:
        lines.append(
            f"Rounding to the base's dtype changed the delta by {report['rounding_error']:.2%}; "
            f"{report['without_effect']:,} values have no effect in it"
        )
        if report["trained_on_quantized"]:
            lines.append(
                f"Difference from the weights that training computed with: {report['difference_from_trained']:.3%}"
                + (", the quantization error of the base" if report["onto"] == "base" else "")
            )
    return "\n".join(lines)


def describe_extract(output: str, report: dict) -> str:
    """What `extract` kept, in sentences."""
    lines = [
        f"{output}: {report['values']:,} values in {report['matrices']} matrices, {report['density']:.3%} of their "
        f"entries; error left: {report['error_left']:.3%} of the difference"
    ]
    if report["modules_kept_whole"]:
        lines.append(f"Kept whole, as they differ: {_names(report['modules_kept_whole'])}")
    if report["parameters_not_kept"]:
        lines.append(f"Not kept, although they differ: {_names(report['parameters_not_kept'])}")
    return "\n".join(lines)


def describe_combine(output: str, report: dict) -> str:
    """The table of overlaps and conflicts of `combine`."""
    columns = ("positions", "shared", "conflicts", "kept")
    rows: list[tuple[str, ...]] = [("module type", *columns)]
    rows += [(name, *(f"{row[column]:,}" for column in columns)) for name, row in report["modules"].items()]
    rows.append(("all", *(f"{sum(row[column] for row in report['modules'].values()):,}" for column in columns)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([*table, f"{output}: {report['values']:,} values"])


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
