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
                f"Difference from {_computed_with(report['trained_on'])}: {report['difference_from_trained']:.3%}"
                + (", the quantization error of the base" if report["onto"] == "base" else "")
            )
    lines += _not_known(report["trained_on"])
    if report["config_of_run"]["changed"]:
        lines.append(f"As in the run: {', '.join(report['config_of_run']['changed'])} of the config")
    if other := report["config_of_run"]["of_another_model"]:
        lines.append(f"{other} is of another model than this, and was not read")
    commit, trained = (report["base"][key] for key in ("commit", "trained_commit"))
    if trained and commit != trained:
        lines.append(f"The adapter records the commit {trained} of its base; this is merged onto {commit}")
    return "\n".join(lines)


def _computed_with(trained_on: dict) -> str:
    """The weights that a merge is compared with, which are those of the training only where that is recorded."""
    if trained_on["told_by"] == "record":
        return "the weights that training computed with"
    return f"Q(W) + S of the base in {_kind(trained_on)}"


def _not_known(trained_on: dict) -> list[str]:
    """What a merge does not know, or has taken for granted, of the base that was trained on."""
    recorded, told_by, dtype = trained_on["recorded"], trained_on["told_by"], trained_on["dtype"]
    lines = []
    if told_by == "nothing":
        lines.append("The adapter does not record how its base was quantized: not at all is assumed")
    elif told_by == "record":
        if method := (recorded["quantization"] or {}).get("quant_method"):
            lines.append(f"Not known is the difference from a base quantized by {method}, which was trained on")
    elif recorded:
        lines.append(f"The adapter records another base, {_kind(recorded)}")
    if trained_on["assumed_dtype"]:
        lines.append(f"Nothing tells what the base was loaded in: {dtype} is assumed (`--dtype` tells)")
    return lines


def _kind(base: dict) -> str:
    """How a base was quantized, in a few words."""
    settings = base["quantization"] or {}
    if "quant_method" in settings:
        return f"{settings['quant_method']} of {base['dtype']}"
    if settings.get("load_in_4bit"):
        double = " with double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"{settings.get('bnb_4bit_quant_type', 'fp4')} of {base['dtype']}{double}"
    return f"int8 of {base['dtype']}" if settings else f"{base['dtype']}, not quantized"


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
    """The table of overlaps and conflicts of `combine`, and which tokenizer was taken where there are several."""
    columns = ("positions", "shared", "conflicts", "kept")
    rows: list[tuple[str, ...]] = [("module type", *columns)]
    rows += [(name, *(f"{row[column]:,}" for column in columns)) for name, row in report["modules"].items()]
    rows.append(("all", *(f"{sum(row[column] for row in report['modules'].values()):,}" for column in columns)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines = [*table, f"{output}: {report['values']:,} values"]
    if report["other_tokenizers"]:
        lines.append(
            f"Tokenizer and chat template: those of {report['tokenizer_of']}; others are in "
            f"{_names(report['other_tokenizers'])}"
        )
    return "\n".join(lines)


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
