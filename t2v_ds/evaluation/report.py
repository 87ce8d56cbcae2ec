"""The demo's report: one page of Markdown with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2v_ds.evaluation.faithfulness import HOW_READ, faithfulness_table
from t2v_ds.files import write_atomically


def write_report(out: Path, config: dict[str, Any], seconds: dict[str, float], results: dict[str, Any]) -> Path:
    """Write `out`/report.md.

    Args:
        out: the demo's folder.
        config: its settings.
        seconds: a stage.
        results: "data", "reconstruction", "losses" and "faithfulness", as `pipeline` measures them.
    """
    path = out / "report.md"
    write_atomically(path, render(config, seconds, results).encode())
    return path


def render(config: dict[str, Any], seconds: dict[str, float], results: dict[str, Any]) -> str:
    """The report's text."""
    data, reconstruction = results["data"], results["reconstruction"]
    rejected = ", ".join(f"{count} {reason}" for reason, count in data["rejected"].items()) or "none"
    lines = [
        "# Demo: from moving shapes to a generated GIF",
        "",
        f"'{config['prompts'][0]}':",
        "",
        "![the first prompt](generated.gif)",
        "",
        "![more prompts](sheet.png)",
        "",
        f"Data: {data['clips']} clips, {data['frames']} frames of {config['prepare']['image_size']} x {config['prepare']['image_size']} "
        f"pixels; rejected: {rejected}.",
        "",
        "## Time",
        "",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {stage} | {spent:.0f} |" for stage, spent in seconds.items()),
        f"| **all** | **{sum(seconds.values()):.0f}** |",
        "",
        "## Faithfulness",
        "",
        HOW_READ,
        "In other words: prompts such as 'a crimson disc drifts to the right', of words that no caption holds.",
        "",
        *faithfulness_table(_row(name, values) for name, values in results["faithfulness"].items()),
        "",
        "## Reconstruction",
        "",
        f"{reconstruction['clips']} clips that were not trained on ({reconstruction['frames']} frames): "
        f"PSNR {reconstruction['psnr']:.1f} dB "
        f"from codes alone; predicting each frame's mean colour gives {reconstruction['psnr_mean_colour']:.1f} dB. "
        f"They use {100 * reconstruction['codes_used']:.0f} % of the codebook.",
        "",
        "## Last losses",
        "",
        "| model | what | value |",
        "|---|---|---:|",
    ]
    for model, metrics in results["losses"].items():
        lines += [f"| {model} | {name} | {value:.4g} |" for name, value in sorted(metrics.items()) if name.split("/")[0] != "performance"]
    return "\n".join([*lines, ""])


def _row(name: str, values: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{100 * values[key]:.1f} %" for key in ("colour", "shape", "direction", "all")) + " |"
