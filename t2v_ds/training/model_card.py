"""README.md of a trained model's folder, made from its run, so that the folder can be given away as it is.

The front matter is what the Hugging Face Hub reads of a model card (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from t2v_ds.data.manifest import Manifest
from t2v_ds.files import write_atomically

CARD = "README.md"
TITLES = {"tokenizer": "Residual VQ-VAE: frames of animated GIFs to codes and back", "generator": "Text to animated GIFs"}
LOADS = {
    "tokenizer": """tokenizer = t2v_ds.Tokenizer.from_pretrained("THIS/FOLDER")
codes = tokenizer.encode(frames)                            # uint8 [T, H, W, 3] -> uint16 [T, h, w]""",
    "generator": """generator = t2v_ds.Generator.from_pretrained("THIS/FOLDER")
[clip] = generator.generate("a red circle moves right")     # uint8 [T, H, W, 3]""",
}


def write_model_card(
    folder: Path, kind: str, parameters: int, settings: dict[str, Any], metrics: dict[str, float], data: Manifest
) -> None:
    """Write `folder`/README.md.

    Args:
        folder: of the model.
        kind: "tokenizer" or "generator".
        parameters: how many numbers were trained.
        settings: of the run.
        metrics: its last ones.
        data: what it was trained on.
    """
    front = {
        "library_name": "t2v_ds",
        "pipeline_tag": "text-to-video" if kind == "generator" else "image-feature-extraction",
        "tags": ["animated-gif", "vq-vae" if kind == "tokenizer" else "autoregressive"],
    }
    figures = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()) if name.split("/")[0] not in ("performance", "train")]
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {TITLES[kind]}", "",
        f"{parameters / 1e6:.1f} million parameters, trained with t2v_ds {version('t2v_ds')}.", "",
        "```python", "import t2v_ds", LOADS[kind], "```", "",
        "## Data", "",
        f"{data.total_clips} clips, {data.total_frames} frames of {data.image_size} x {data.image_size} pixels; digest "
        f"`{data.digest()[:16]}`; source: `{data.source}`. Whose clips these are, and what their licences allow, is for whoever gives the "
        "model away to say here.", "",
        "## What was reached", "",
        "| at the end of training | |", "|---|---:|", *figures, "",
        "## Limits", "",
        "It draws what it was trained on, at that size and length, and knows nothing else. Nothing keeps it from what it should not draw.",
        "",
        "## Settings", "",
        "```yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(), "```", "",
    ]  # fmt: skip
    write_atomically(folder / CARD, "\n".join(lines).encode())
