"""An evaluation's report as a page of Markdown, a contact sheet and scalars in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.video import contact_sheet
from t2v_ds.evaluation.faithfulness import HOW_READ, faithfulness_table
from t2v_ds.evaluation.work import EVENTS, SHEET
from t2v_ds.files import write_atomically
from t2v_ds.training.monitor import Monitor

_GAP = 12  # pixels between drawn clips and their neighbours


def pair_sheet(drawn: Sequence[np.ndarray], prompts: Sequence[str], nearest: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """A row a clip: eight frames of a drawn one and, beside them, eight of the training clip that it looks most like: uint8 [H, W, 3]."""
    left, right = contact_sheet(drawn, prompts), contact_sheet(nearest, captions)
    return np.concatenate([left, np.full((len(left), _GAP, 3), 255, dtype=np.uint8), right], axis=1)


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    write_atomically(path, render(report).encode())


def render(report: dict[str, Any]) -> str:
    """The page's text."""
    sections = [
        _heading(report),
        ["![drawn clips, each beside the training clip that it looks most like](" + SHEET + ")"],
        _loss(report["loss"]),
        _frechet(report["frechet"]),
        _motion(report["motion"]),
        _distinctness(report["distinctness"]),
        _memorisation(report["memorisation"]),
        _faithfulness(report["faithfulness"]),
        _identity(report["identity"]),
    ]
    return "\n".join("\n".join([*section, ""]) for section in sections)


def _heading(report: dict[str, Any]) -> list[str]:
    trained = {True: "is", False: "is **not**", None: "may or may not be"}[report["data_is_of_the_training"]]
    return [
        "# Evaluation",
        "",
        f"`--data` {trained} what the model was trained on. The loss is measured on {report['loss']['measured_on']};",
        f"clips are drawn for {report['drawn_for']}. Real clips: {report['frechet']['real_clips']}.",
        "What the figures mean, and what they do not: docs/evaluation.md.",
    ]


def _loss(loss: dict[str, Any]) -> list[str]:
    rows = []
    for name, title in (("training", "training clips"), ("held_out", "held-out clips")):
        if name in loss:
            one = loss[name]
            interval = f"{one['low']:.4f} to {one['high']:.4f}" if "low" in one else "-"
            others = _number(one["bits_with_captions_of_others"], 4)
            rows.append(f"| {title} | {one['clips']} | {one['bits']:.4f} | {interval} | {others} |")
    return [
        "## Loss, bits a code",
        "",
        "| | clips | bits | 95 % | with captions of other clips |",
        "|---|---:|---:|---:|---:|",
        *rows,
        f"| always foretelling the shares of the codes (unigram) | | {loss['unigram_bits']:.4f} | | |",
        f"| all codes alike | | {loss['uniform_bits']:.4f} | | |",
    ]


def _frechet(fvd: dict[str, Any]) -> list[str]:
    floor, short = fvd["floor"], fvd["shorter_clips"]
    lines = [
        f"## {fvd['measure']}",
        "",
        f"Network: {fvd['network']} (sha256 `{fvd['sha256']}`), {fvd['features']} features.",
        "",
        "| clips | of each | distance |",
        "|---|---:|---:|",
        f"| drawn, real | {fvd['clips']} | {fvd['distance']:.4g} |",
    ]
    if floor:
        lines.append(f"| real, other real (floor) | {floor['clips']} | {floor['distance']:.4g} |")
    lines += ["", f"Frames: {fvd['frames_taken']} (shorter: {short['drawn']} drawn, {short['real']} real). Resized: {fvd['resizing']}."]
    if fvd["clips"] <= fvd["features"]:
        lines.append("Fewer clips than features: the distance is too high, the floor too; compare them only at this number of clips.")
    return lines


def _motion(motion: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {one['levels']:.2f} | {one['median_levels']:.2f} | {_share(one['stills'])} | {one['mean_frames']:.1f} |"
        for name, one in motion.items()
    ]
    head = ["| clips | mean change a frame, levels | median | stills | frames |", "|---|---:|---:|---:|---:|"]
    return ["## Motion", "", *head, *rows]


def _distinctness(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return ["## Do prompts decide?", "", f"Not measured: {found['skipped']}."]
    return [
        "## Do prompts decide?",
        "",
        f"Mean distance of clips ({found['space']}; {found['unit']}), {found['prompts']} prompts.",
        "",
        "| clips | distance |",
        "|---|---:|",
        f"| of different prompts | {found['between_prompts']:.3f} |",
        f"| of one prompt, two seeds | {found['between_seeds']:.3f} |",
        f"| ratio | {_number(found['ratio'], 2)} |",
        f"| real, of these captions | {found['between_real_clips']:.3f} |",
    ]


def _memorisation(found: dict[str, Any]) -> list[str]:
    own = found["nearest_is_own"]
    return [
        "## Copies of training clips",
        "",
        f"Distance to the nearest of {found['training_clips']} training clips ({found['space']}; {found['unit']}).",
        "",
        "| what | value |",
        "|---|---:|",
        f"| drawn clip to its nearest training clip, median | {found['nearest']:.3f} |",
        f"| training clip to its nearest other, median | {found['nearest_of_training']:.3f} |",
        f"| ratio | {_number(found['ratio'], 2)} |",
        f"| drawn clips nearer than the 1st percentile of that ({found['near']:.3f}) | {_share(found['nearer_than_1st_percentile'])} |",
        f"| nearest training clip is the one whose caption was drawn | {_share(own) if own else '- (captions of held-out clips)'} |",
        f"| training clips nearer than that one, median | {_number(found['median_rank_of_own'], 0)} |",
    ]


def _faithfulness(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return ["## Faithfulness", "", f"Not measured: {found['skipped']}."]
    names = ("colour", "shape", "direction", "all")
    rows = [f"| {clips} ({row['all']['of']}) | " + " | ".join(_share(row[name]) for name in names) + " |" for clips, row in found.items()]
    return [
        "## Faithfulness",
        "",
        HOW_READ,
        "In brackets: the 95 % interval (Wilson).",
        "",
        *faithfulness_table(rows),
    ]


def _identity(identity: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in leaves(identity)]
    return ["## What was measured, and how", "", "| what | value |", "|---|---|", *rows]


def _share(one: dict[str, Any]) -> str:
    return f"{100 * one['share']:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary(out: str, report: dict[str, Any]) -> list[str]:
    """What to tell whoever asked for the report: a line a figure."""
    loss, frechet, copies = report["loss"], report["frechet"], report["memorisation"]
    held_out = loss.get("held_out")
    drawn, real = (report["motion"][name] for name in ("drawn", "real"))
    lines = [
        f"{out}/report.md",
        f"  loss: {(held_out or loss['training'])['bits']:.4f} bits a code, measured on {loss['measured_on']} "
        f"(unigram {loss['unigram_bits']:.4f})",
        f"  {frechet['measure']}: {frechet['distance']:.4g}"
        + (f" (real clips: {frechet['floor']['distance']:.4g})" if frechet["floor"] else "")
        + f", {frechet['clips']} clips; real clips: {frechet['real_clips']}",
        f"  motion: {drawn['levels']:.2f} levels a frame (real clips: {real['levels']:.2f})",
        f"  nearer to a training clip than these are to one another: {_share(copies['nearer_than_1st_percentile'])}",
    ]
    if copies["nearest_is_own"]:
        lines.append(f"  nearest training clip is the one whose caption was drawn: {_share(copies['nearest_is_own'])}")
    if "skipped" not in report["faithfulness"]:
        lines += [f"  faithful, {clips}: {_share(report['faithfulness'][clips]['all'])}" for clips in ("seen", "held out")]
    return lines


def leaves(values: dict[str, Any], prefix: str = "", separator: str = ".") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested dictionaries, names joined."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}{separator}", separator)
        else:
            yield f"{prefix}{name}", value


def write_scalars(out: Path, report: dict[str, Any], sheet: np.ndarray) -> None:
    """Every figure and the sheet in TensorBoard, at the step that the model was trained to."""
    shutil.rmtree(out / EVENTS, ignore_errors=True)  # of a run that was killed here
    groups = ("loss", "frechet", "motion", "distinctness", "memorisation", "faithfulness")
    figures = {f"{name}/{rest}": value for group in groups for name, rest, value in _figures(group, report[group])}
    step = report["step"] or 0
    monitor = Monitor(out / EVENTS, 0, 0)
    monitor.scalars(figures, step)
    monitor.image("drawn beside nearest training clips", sheet, step)
    monitor.close()


def _figures(group: str, values: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    name = values["measure"].replace(" ", "_") if group == "frechet" else group
    for rest, value in leaves(values, separator="/"):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, rest.replace(" ", "_"), float(value)
