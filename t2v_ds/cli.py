"""`t2v VERB`: the one place where flags become settings, and the only one that prints.

    flags + --config YAML + key=value -> a config dataclass -> the stage's function

A mistake that the user can mend ends with one sentence and exit code 2; anything else is a bug and shows its traceback.
Only light modules are imported here: worker processes import this file again.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from t2v_ds.config import (
    DemoConfig,
    EvaluateConfig,
    IndexConfig,
    MergeConfig,
    PlanConfig,
    PrepareConfig,
    SamplingConfig,
    TokenizeConfig,
    TransformerRunConfig,
    VerifyConfig,
    VQVAERunConfig,
)
from t2v_ds.config_loader import load_config, load_plan, resolve_recipe
from t2v_ds.errors import ConfigError, DataError, UserError, nearest
from t2v_ds.files import FORBIDDEN, FULL, require_writable, write_atomically


@dataclass(frozen=True)
class Flag:
    """`--name VALUE`, a short way to write the setting of the same name."""

    name: str
    help: str
    metavar: str = "DIR"
    many: bool = False  # takes several values
    switch: bool = False  # takes no value: true
    number: bool = False


@dataclass(frozen=True)
class Verb:
    """A subcommand."""

    summary: str
    description: str
    example: str
    config: type[Any] | None
    flags: tuple[Flag, ...]
    run: Callable[[Any, argparse.Namespace], None]
    recipe: str = ""  # used when --config is not given


def _prepare(config: PrepareConfig, _: argparse.Namespace) -> None:
    from t2v_ds.data.manifest import MANIFEST
    from t2v_ds.data.prepare import prepare, prepare_part
    from t2v_ds.data.report import REPORT, write_report

    if config.report and config.out and Path(config.out, MANIFEST).exists():
        print(write_report(config.out))
        return
    if config.part:
        prepare_part(config)
        print(f"{config.out}: part {config.part} is done; when all are, run this without part= to write the shards")
        return
    manifest = prepare(config)
    print(f"{config.out}: {manifest.total_clips} clips, {manifest.total_frames} frames, {len(manifest.shards)} shards")
    for reason, count in sorted(manifest.rejected.items()):
        listed = "quarantine.jsonl" if reason.startswith("quarantined_") else "rejected.jsonl"
        print(f"  rejected, {reason}: {count} (listed in {config.out}/{listed})")
    if config.report:
        print(Path(config.out, REPORT).read_text(encoding="utf-8"))


def _index(config: IndexConfig, _: argparse.Namespace) -> None:
    from t2v_ds.data.manifest import StoredText
    from t2v_ds.data.validate import QUARANTINE, Codes, index_folder

    if not config.data:
        raise ConfigError("--data is not given; name a folder of .tar files")
    codes = text = tokenizer = None
    if config.tokenizer:
        from t2v_ds.models.facade import load_tokenizer

        tokenizer = load_tokenizer(config.tokenizer)
        model = tokenizer.model.config
        codes = Codes(tokenizer.tokenizer_id, model.quantizer.codebook_size, model.grid_size, model.image_size)
    if config.text.encoder:
        from t2v_ds.models.text import build_text_encoder

        encoder = build_text_encoder(config.text)
        text = StoredText(encoder.identity(), config.text, encoder.width)
    indexed = index_folder(config, codes, text)
    if tokenizer is not None and indexed.manifest.kind == "tokens":
        tokenizer.export_beside(Path(config.data))
    print(f"{config.data}: {indexed.manifest.total_clips} good clips in {len(indexed.manifest.shards)} shards")
    for reason, count in sorted(indexed.quarantined.items()):
        print(f"  left out, {reason}: {count} (listed in {config.data}/{QUARANTINE})")


def _verify(config: VerifyConfig, _: argparse.Namespace) -> None:
    from t2v_ds.data.validate import verify_folder

    if not config.data:
        raise ConfigError("--data is not given; name a folder of shards")
    manifest, problems = verify_folder(config.data)
    for problem in problems:
        print(problem)
    if problems:
        raise DataError(
            f"{config.data} is damaged in {len(problems)} {'places' if len(problems) > 1 else 'place'}: restore the files named above, "
            f"or leave out damaged clips of shards that are there with t2v index --data {config.data} again=true"
        )
    print(f"{config.data}: {manifest.total_clips} clips in {len(manifest.shards)} shards; every byte is as it was written")


def _train_vqvae(config: VQVAERunConfig, _: argparse.Namespace) -> None:
    from t2v_ds.training.health import install_stop_signals

    install_stop_signals()  # before torch is imported: a signal in those seconds must not kill the run
    from t2v_ds.training.run import train_vqvae

    _print_metrics(config.out, train_vqvae(config))


def _merge(config: MergeConfig, _: argparse.Namespace) -> None:
    from t2v_ds.training.health import install_stop_signals

    install_stop_signals()
    from t2v_ds.merge import merge

    _print_metrics(config.out, merge(config))


def _train_transformer(config: TransformerRunConfig, _: argparse.Namespace) -> None:
    from t2v_ds.training.health import install_stop_signals

    install_stop_signals()
    from t2v_ds.training.run import train_transformer

    _print_metrics(config.out, train_transformer(config))


def _print_metrics(out: str, metrics: dict[str, float]) -> None:
    if os.environ.get("RANK", "0") == "0":
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()) if not name.startswith("performance/"))
        print(f"{out}: {shown}")


def _tokenize(config: TokenizeConfig, _: argparse.Namespace) -> None:
    from t2v_ds.tokenize import tokenize

    manifest = tokenize(config)
    if manifest is None:
        print(f"{config.out}: part {config.part} is done; shards of other parts are missing")
        return
    print(f"{config.out}: {manifest.total_clips} clips, {manifest.total_frames} frames, tokenizer {manifest.tokenizer_id}")
    if stored := manifest.stored_text:
        print(f"  text vectors of {stored.identity}; {manifest.text_truncated} captions are cut to text.tokens={stored.settings.tokens}")


def _plan(config: tuple[PlanConfig, Any], flags: argparse.Namespace) -> None:
    settings, run = config
    if flags.json:
        if not Path(flags.json).absolute().parent.is_dir():
            raise ConfigError(f"--json is {flags.json!r}, but {Path(flags.json).parent} is no folder")
        require_writable("--json", flags.json)  # before minutes of planning
    from t2v_ds.training.planning.fit import changes_that_fit
    from t2v_ds.training.planning.planner import Planner
    from t2v_ds.training.planning.report import to_json, write_text

    planner = Planner(settings)
    plan = planner.complete(planner.plan(run))
    changes = [] if plan.fits else changes_that_fit(plan, planner)
    print(write_text(plan, changes))
    if flags.json:
        write_atomically(Path(flags.json), (json.dumps(to_json(plan, changes), indent=1) + "\n").encode())


def _generate(config: SamplingConfig, flags: argparse.Namespace) -> None:
    if not flags.model:
        raise ConfigError("--model is not given; name the folder that t2v train-transformer wrote")
    prompts = flags.prompt or []
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--prompt is empty; describe a clip, such as --prompt 'a red circle moves right'")
    begin_frames = _count("--begin-frames", flags.begin_frames)
    if begin_frames and not flags.begin:
        raise ConfigError("--begin-frames is given without --begin")
    from t2v_ds.generate import check_outputs, generate_files

    check_outputs(flags.out, flags.sheet)  # before minutes of drawing
    import torch

    from t2v_ds.models.facade import load_generator

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = load_generator(flags.model, flags.tokenizer or None, device)
    for path in generate_files(generator, prompts, flags.out, config, flags.sheet or None, flags.begin, flags.end, begin_frames):
        print(path)


def _count(flag: str, value: str | None) -> int:
    if value is None:
        return 0
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{flag} is {value!r}; allowed: a whole number >= 1")
    return int(value)


def _evaluate(config: EvaluateConfig, _: argparse.Namespace) -> None:
    from t2v_ds.evaluation.evaluate import evaluate
    from t2v_ds.evaluation.generator_report import summary

    for line in summary(config.out, evaluate(config)):
        print(line)


def _demo(config: DemoConfig, _: argparse.Namespace) -> None:
    from t2v_ds.pipeline import run_demo

    print(run_demo(config))


def _doctor(_: None, __: argparse.Namespace) -> None:
    from t2v_ds.doctor import report

    marks = {"ok": "ok     ", "missing": "MISSING", "note": "note   "}
    for status, what, detail in report():
        print(f"{marks[status]} {what}: {detail}")


OUT = Flag("out", "folder to write; run again with the same command to go on after an interruption")
NEW_DATA = Flag("accept_new_data", "where the data has changed since, begin the epoch anew on it", switch=True)
LAUNCH = (
    "\n\nThe same command runs on several processes or nodes:\n"
    "  deepspeed --num_gpus 2 --module t2v_ds {verb} ...      (on a machine without GPU too)\n"
    "  torchrun --nproc_per_node 2 --module t2v_ds {verb} ...\n"
    "  srun --ntasks-per-node=2 t2v {verb} ...\n"
    "train.batch counts clips over all processes, so the result does not depend on their number."
)
VERBS: dict[str, Verb] = {
    "prepare": Verb(
        "a folder of GIFs, a TSV of URLs, or moving shapes -> raw shards",
        "Reads clips and captions, keeps clips of min_frames to max_frames frames, resizes them and writes WebDataset shards.\n"
        "SRC is a folder of GIFs (captions from captions.tsv inside, FOLDER.tsv beside it, or captions=FILE; else file names),\n"
        "a TSV file of `url TAB caption` lines, or moving-shapes. What is rejected is counted, and listed in rejected.jsonl.\n"
        "--report shows what is in the folder, and writes it to report.md and contact_sheet.png there.",
        "t2v prepare --source my_gifs --out data/raw",
        PrepareConfig,
        (
            Flag("source", "folder of GIFs, TSV file, or moving-shapes", "SRC"),
            OUT,
            Flag("report", "describe the folder, too; if it is finished, do nothing else", switch=True),
        ),
        _prepare,
    ),
    "index": Verb(
        "WebDataset tars that others wrote -> raw or token shards",
        "Checks every clip of the .tar files in a folder and writes the index and manifest that training reads, beside them.\n"
        "A clip is KEY.frames.npy, uint8 [T, S, S, 3], or KEY.codes.npy, uint16 [T, S, S], and KEY.json with \"caption\" (text),\n"
        "\"durations_ms\" (T whole numbers) and \"provenance\" (an object). Bad clips are left out and listed in quarantine.jsonl;\n"
        "too many are an error. text.encoder=NAME: codes also have KEY.text.npy, fp16 [n, width], which that encoder made.",
        "t2v index --data my_tars max_bad_share=0.001",
        IndexConfig,
        (Flag("data", "folder of .tar files"), Flag("tokenizer", "of codes: folder of the tokenizer that made them")),
        _index,
    ),
    "verify": Verb(
        "reads shards to their last byte and names what is damaged",
        "Compares every shard, index and clip with the checksums that were taken when they were written; changes nothing.",
        "t2v verify --data data/raw",
        VerifyConfig,
        (Flag("data", "folder written by t2v prepare, tokenize or index"),),
        _verify,
    ),
    "train-vqvae": Verb(
        "raw shards -> tokenizer",
        "Trains the VQ-VAE that turns frames into codes and back." + LAUNCH.format(verb="train-vqvae"),
        "t2v train-vqvae --config tgif_vqvae --data data/raw --out runs/tokenizer train.steps=20000",
        VQVAERunConfig,
        (Flag("data", "folder written by t2v prepare"), OUT, NEW_DATA),
        _train_vqvae,
    ),
    "merge": Verb(
        "VQ-VAEs trained on a chunk each -> one tokenizer",
        "Averages runs of t2v train-vqvae chunk=0, chunk=1, ... that began from one start (start=RUN) and had the same settings, after\n"
        "aligning their codebooks. Then trains on all chunks alike from there, and writes report.md: what each model makes of every chunk."
        + LAUNCH.format(verb="merge"),
        "t2v merge --threads runs/thread-0 runs/thread-1 --data data/raw --out runs/tokenizer epochs=1",
        MergeConfig,
        (
            Flag("threads", "finished runs, one a chunk", "RUN", many=True),
            Flag("data", "folder written by t2v prepare"),
            Flag("compare", "further tokenizers to measure beside", "RUN", many=True),
            OUT,
        ),
        _merge,
    ),
    "tokenize": Verb(
        "raw shards + tokenizer -> token shards",
        "Encodes every clip once, so that training the transformer reads codes and runs no VQ-VAE; with text.encoder=NAME every caption\n"
        "as well, so that it runs no text encoder either (t2v train-transformer text.encoder=).",
        "t2v tokenize --data data/raw --tokenizer runs/tokenizer --out data/tokens text.encoder=hashing text.tokens=32",
        TokenizeConfig,
        (Flag("data", "folder written by t2v prepare"), Flag("tokenizer", "folder written by t2v train-vqvae"), OUT),
        _tokenize,
    ),
    "plan": Verb(
        "what a training run takes: memory of each GPU, time, and what to change where it does not fit",
        "Runs the real model's forward and backward pass on tensors without data, adds what DeepSpeed holds, and says how much memory\n"
        "each GPU needs, how long the run takes, and whether it fits; if not, what makes it fit. Nothing is trained, no GPU is needed.\n"
        "YAML is a recipe of t2v train-transformer or train-vqvae; all settings of those can be given as well (see their --help).",
        "t2v plan --config tgif_transformer --gpus 8 --memory 80 clips=100000 train.micro_batch=2",
        PlanConfig,
        (
            Flag("gpus", "of the run", "N", number=True),
            Flag("memory", "of each GPU, GiB (default: what the accelerator has)", "GIB", number=True),
            Flag("data", "folder that the run would train on: its clips are counted"),
            Flag("measure", "run a step of two layers here, and tell the time from it (without GPU: accelerator=cpu)", switch=True),
        ),
        _plan,
    ),
    "train-transformer": Verb(
        "token shards -> generator",
        "Trains the transformer that turns captions into codes." + LAUNCH.format(verb="train-transformer"),
        "t2v train-transformer --config tgif_transformer --data data/tokens --out runs/generator",
        TransformerRunConfig,
        (
            Flag("data", "folder written by t2v tokenize"),
            Flag("tokenizer", "another folder of the tokenizer that made the data"),
            OUT,
            NEW_DATA,
        ),
        _train_transformer,
    ),
    "generate": Verb(
        "prompt -> GIF or MP4",
        "Draws a clip for each prompt. Several prompts become OUT-0.gif, OUT-1.gif, ...; --sheet adds a contact sheet.",
        "t2v generate --model runs/generator --prompt 'a red circle moves right' --out x.gif temperature=0.9 seed=1",
        SamplingConfig,
        (),
        _generate,
    ),
    "evaluate": Verb(
        "generator + token shards -> report: loss, FVD, motion, copies, faithfulness",
        "Measures a generator: its loss in bits a code, and clips that it draws for captions of the data, beside real ones. Writes\n"
        "report.md, report.json, sheet.png (drawn clips, each beside the training clip that it looks most like) and TensorBoard scalars.\n"
        "Without fvd.weights, the file of a network, the distance of drawn and real clips is a stand-in and no FVD (docs/evaluation.md).",
        "t2v evaluate --model runs/generator --data data/tokens --raw data/raw --out runs/evaluation fvd.weights=i3d_torchscript.pt",
        EvaluateConfig,
        (
            Flag("model", "folder written by t2v train-transformer"),
            Flag("data", "token shards that it was trained on"),
            Flag("validation", "token shards that it was not trained on"),
            Flag("raw", "raw shards that the token shards were made of", many=True),
            Flag("tokenizer", "another folder of the tokenizer that the model was trained with"),
            OUT,
        ),
        _evaluate,
    ),
    "demo": Verb(
        "everything, at a size that a laptop finishes in minutes",
        "Draws captioned clips of moving shapes, trains both models on them, measures the result and draws a GIF.",
        "t2v demo --out runs/demo",
        DemoConfig,
        (OUT,),
        _demo,
        "demo",
    ),
    "doctor": Verb("what this machine has and lacks", "Looks at the machine; changes nothing.", "t2v doctor", None, (), _doctor),
}


class _Parser(argparse.ArgumentParser):
    """Mistakes become one sentence with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser(name: str, verb: Verb) -> _Parser:
    settings = ""
    if verb.config is not None:
        settings = "\n\nsettings (key=value on the command line, or in --config's YAML):\n" + _settings_help(verb.config)
    parser = _Parser(
        prog=f"t2v {name}",
        description=f"{verb.description}\n\nexample:\n  {verb.example}{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if verb.config is not None:
        parser.add_argument("--config", metavar="YAML", help="a file of settings, or the name of a recipe in configs/")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; they win over the file and over flags")
    for flag in verb.flags:
        if flag.switch:
            parser.add_argument(f"--{flag.name.replace('_', '-')}", action="store_const", const=True, help=flag.help)
        else:
            parser.add_argument(f"--{flag.name.replace('_', '-')}", metavar=flag.metavar, help=flag.help, nargs="+" if flag.many else None)
    if name == "plan":
        parser.add_argument("--json", metavar="FILE", help="also write all figures, in bytes, seconds and FLOPs")
    if name == "generate":
        parser.add_argument("--model", metavar="DIR", help="folder written by t2v train-transformer")
        parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
        parser.add_argument("--out", default="clip.gif", metavar="FILE", help=".gif or .mp4 (default: clip.gif)")
        parser.add_argument("--sheet", metavar="FILE", help="also write a contact sheet (.png): a row of frames a clip")
        parser.add_argument("--begin", metavar="GIF", help="begin with the frames of this one (continuation)")
        parser.add_argument("--begin-frames", metavar="N", help="only with its last N frames: room for others in what the model can draw")
        parser.add_argument("--end", metavar="GIF", help="end on this one's last frame (of models trained with last_frame_share)")
        parser.add_argument("--tokenizer", metavar="DIR", help="another folder of the tokenizer that the model was trained with")
    return parser


def _settings_help(config: type[Any], prefix: str = "  ") -> str:
    """A line a setting: name, default, and the comment that stands behind it in config.py."""
    comments: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):  # what a class inherits is described where it is first written
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), flags=re.MULTILINE)
    hints = typing.get_type_hints(config)
    lines = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            lines.append(_settings_help(typing.cast("type[Any]", hints[field.name]), f"{prefix}{field.name}."))
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        comment = comments.get(field.name, "")
        lines.append(f"{prefix}{field.name}={default!s}" + (f"  ({comment})" if comment else ""))
    return "\n".join(lines)


def overview() -> str:
    """What `t2v --help` shows."""
    lines = ["t2v: from a folder of GIFs to a model that draws GIFs.", "", "usage: t2v VERB ...      (t2v VERB --help teaches each)", ""]
    lines += [f"  {name:<18} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> None:
    """Parse the command line and run its verb.

    Raises:
        UserError: a mistake that the user can mend.
    """
    # The launcher of DeepSpeed puts --local_rank=N somewhere; the rank is read from the environment.
    arguments = [a for a in arguments if not re.fullmatch(r"--local[-_]rank=\d+", a)]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if arguments[0] == "--version":
        import t2v_ds

        print(t2v_ds.__version__)
        return
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise ConfigError(f"unknown verb '{name}': {nearest(name, VERBS)}")
    verb = VERBS[name]
    flags = _parser(name, verb).parse_intermixed_args(rest)
    for flag in verb.flags:  # settings behind the last value of a flag that takes several
        values = getattr(flags, flag.name)
        if flag.many and values:
            settings = [value for value in values if re.match(r"[\w.]+=", value)]
            flags.overrides += settings
            setattr(flags, flag.name, [value for value in values if value not in settings])
    config = None
    if verb.config is not None:
        values = {flag: getattr(flags, flag.name) for flag in verb.flags if getattr(flags, flag.name) is not None}
        given = [f"{flag.name}={value if flag.number else json.dumps(value)}" for flag, value in values.items()]
        recipe = flags.config or verb.recipe
        path, settings = resolve_recipe(recipe) if recipe else None, [*given, *flags.overrides]
        if verb.config is PlanConfig:
            config = load_plan(path, settings)
        else:
            config = load_config(verb.config, path, settings)
            if OUT in verb.flags and config.out and not Path(config.out).is_dir():
                require_writable("--out", config.out, folder=True)
    verb.run(config, flags)


def main() -> None:
    """The command `t2v`."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("t2v_ds").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    code = 0
    try:
        run(sys.argv[1:])
    except UserError as error:
        code = _say(str(error), rank)
    except OSError as error:
        code = _say(_reason(error), rank)
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on", rank)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    _end(code)


def _reason(error: OSError) -> str:
    """One sentence for what the machine refuses; other errors are ours, and raised."""
    if error.errno in FULL:
        return f"the disk is full{f' ({error.filename})' if error.filename else ''}: make room, then run the same command again"
    if error.errno in FORBIDDEN and error.filename:
        return f"{error.filename}: {error.strerror}; allow it, or choose another place"
    raise error


def _say(sentence: str, rank: str) -> int:
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"t2v: error{where}: {sentence}", file=sys.stderr)
    return 2


def _end(code: int) -> NoReturn:
    if "torch" in sys.modules:
        from t2v_ds.training.distributed import finish

        finish(code)
    sys.exit(code)
