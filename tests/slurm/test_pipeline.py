"""slurm/pipeline.sh on a real cluster of four nodes on this machine: undisturbed, and through failures, to the same files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.slurm.cluster import LOCAL_SLURM, Slurm

PIPELINE = ROOT / "slurm" / "pipeline.sh"
SETTINGS = """
CHUNKS=4
PREPARE=(--source moving-shapes clips=80 chunk_clips=20 shard_clips=10 image_size=16 min_frames=4 max_frames=6 workers=1)
VQVAE=(
    model.image_size=16 model.stem_channels=8 'model.channel_multipliers=[1,2]' 'model.residual_blocks=[0,1]' model.norm_groups=8
    model.quantizer.codebook_size=32 model.quantizer.codebook_dim=8 losses.perceptual=0 losses.ssim=0 frames_per_clip=1
    train.batch=4 train.warmup_steps=2 train.precision=fp32 held_out=0.2 train.save_every=20 train.log_every=5
)
START=(train.steps=8 balance=true model.quantizer.warmup_steps=3)
THREAD=(train.steps=400)
MERGE=(steps=8)
TOKENIZE=(text.encoder=hashing text.tokens=14 text.width=8)
TRANSFORMER=(
    model.width=16 model.layers=1 model.heads=2 model.max_frames=6 model.group=2 text.encoder=
    train.steps=200 train.batch=4 train.warmup_steps=2 train.precision=fp32 train.save_every=20 train.log_every=5
)
EVALUATE=(clips=4 training_clips=8 second_draws=2 shape_prompts=4 fvd.frames=2)
PROMPTS=("a large red circle moves right slowly")
"""
# Element 1 fails the first time that it runs; jobs do not read this repository's environment.
CLUSTER_ENV = """
source "{root}/slurm/cluster.env"
PREPARE_PARTS=2
TOKENIZE_PARTS=2
CPUS_PER_RANK=1
setup() {{
    if [ "${{SLURM_ARRAY_TASK_ID:-}}" = 1 ] && [[ $SLURM_JOB_NAME == *thread ]] && [ -e "{flag}" ]; then
        rm "{flag}"
        echo "this element fails once"
        exit 7
    fi
}}
"""


def pipeline(slurm: Slurm, out: Path, *more: str) -> str:
    settings = slurm.folder / "settings.env"
    settings.write_text(SETTINGS)
    return slurm.call(str(PIPELINE), "--out", str(out), "--settings", str(settings), *more)


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm) -> Path:
    out = slurm.folder / "undisturbed"
    (slurm.folder / "plain.env").write_text(CLUSTER_ENV.format(root=ROOT, flag="/nowhere"))
    said = pipeline(slurm, out, "--cluster", str(slurm.folder / "plain.env"))
    assert [line.split()[0] for line in said.splitlines()[:9]] == [
        "prepare", "pack", "vqvae_start", "vqvae_thread", "merge", "tokenize", "transformer", "generate", "evaluate",
    ]  # fmt: skip
    slurm.wait(lambda: ended(out) and not slurm.queue(), "the pipeline's end", out / "logs", 360)
    return out


def ended(out: Path) -> bool:
    return (out / "sheet.png").exists() and (out / "evaluation/report.json").exists()


def artefacts(out: Path) -> dict[str, bytes]:
    names = (
        "tokenizer/model.safetensors", "tokens/manifest.json", "generator/model.safetensors", "generated.gif", "evaluation/report.json",
    )  # fmt: skip
    return {name: (out / name).read_bytes() for name in names}


def test_one_command_makes_everything_and_again_does_nothing(slurm: Slurm, undisturbed: Path) -> None:
    assert (undisturbed / "generated.gif").read_bytes().startswith(b"GIF8")
    assert "stand-in FVD" in (undisturbed / "evaluation/report.md").read_text()
    assert "| merged |" in (undisturbed / "tokenizer/report.md").read_text()
    log = next((undisturbed / "logs").glob("transformer-*.log")).read_text()
    assert "rank 0 of 2" in log
    said = pipeline(slurm, undisturbed, "--cluster", str(slurm.folder / "plain.env"))
    assert said.count(" finished") == 9
    assert said.endswith("nothing is left to do\n")
    assert not slurm.queue()


def test_a_merge_with_a_thread_missing_says_so(slurm: Slurm, undisturbed: Path) -> None:
    out = slurm.folder / "incomplete"
    out.mkdir()
    for name in ("raw", "thread-0", "thread-1", "thread-3"):
        (out / name).symlink_to(undisturbed / name)
    files = {"SETTINGS": slurm.folder / "settings.env", "CLUSTER": slurm.folder / "plain.env"}
    known = {"OUT": out, "SLURM": ROOT / "slurm", **files}
    slurm.env.update({f"T2V_{name}": str(value) for name, value in known.items()})
    job = slurm.call("sbatch", "--parsable", "--export=ALL", f"--output={out}/merge.log", str(ROOT / "slurm/merge.sbatch")).strip()
    slurm.wait(lambda: "JobState=FAILED" in slurm.call("scontrol", "show", "job", job), "the job's failure", out)
    assert "chunks [2] have no thread" in (out / "merge.log").read_text()
    assert not (out / "tokenizer").exists()


def test_through_failures_to_the_same_files(slurm: Slurm, undisturbed: Path) -> None:
    out, flag = slurm.folder / "drill", slurm.folder / "fail-once"
    flag.touch()
    (slurm.folder / "drill.env").write_text(CLUSTER_ENV.format(root=ROOT, flag=flag))
    cluster = ("--cluster", str(slurm.folder / "drill.env"))
    pipeline(slurm, out, *cluster)
    array = next(line.split()[1] for line in (out / "jobs.txt").read_text().splitlines() if line.startswith("vqvae_thread"))

    # Element 2 is preempted twice in mid-training, element 3 is cancelled, element 1 fails.
    log = out / f"logs/vqvae_thread-{array}_2.log"

    def said(what: str) -> int:
        return log.read_text().count(what) if log.exists() else 0

    def wait_until_said(what: str, times: int) -> None:
        slurm.wait(lambda: said(what) == times, f"'{what}' in the log of element 2", out / "logs")

    for number in (1, 2):
        wait_until_said("rank 0 of 1", number)
        time.sleep(1)
        slurm.call("scancel", "--batch", "--signal=USR1", f"{array}_2")
        wait_until_said("back into the queue", number)
        if number == 1:
            slurm.call("scancel", f"{array}_3")
    slurm.wait(lambda: any("DependencyNeverSatisfied" in line for line in slurm.queue()), "a stage that cannot start", out / "logs")
    slurm.wait(lambda: (out / "thread-0/DONE").exists() and (out / "thread-2/DONE").exists(), "the other threads", out / "logs")
    assert not (out / "thread-1/DONE").exists()
    assert not (out / "tokenizer").exists()
    slurm.wait(lambda: not any("vqvae_thread" in line for line in slurm.queue()), "the array's end", out / "logs")
    # The same command mends it.
    assert "finished" in pipeline(slurm, out, *cluster).splitlines()[0]
    # A node dies under the transformer.
    slurm.wait(lambda: list((out / "generator/checkpoints").glob("*")), "a checkpoint of the transformer", out / "logs")
    nodes = [line.split()[-1] for line in slurm.queue() if "t2v-transformer RUNNING" in line]
    crashed = slurm.call("scontrol", "show", "hostnames", nodes[0]).split()[-1] if nodes else ""
    if crashed:
        slurm.call(str(LOCAL_SLURM), "crash", crashed)
    slurm.wait(lambda: ended(out), "the pipeline's end", out / "logs", 360)
    assert crashed, "the transformer ended before its node could be crashed: give it more steps"
    assert artefacts(out) == artefacts(undisturbed)
