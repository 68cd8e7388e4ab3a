"""Every option once: its names, its type, its help. Defaults come from `config`, where the commands pass them in.

An option's parameter in a command has the name of the config field that it fills.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mvcr_cli import config
from mvcr_cli.errors import UsageError
from mvcr_cli.paths import display_name


def _filled(name: str, text: str) -> str:
    if not text:
        raise UsageError(f"{name} is empty", "give it a value")
    return text


def _path(name: str, text: str) -> Path:
    """A path as given; without this, "" would mean the current folder."""
    return Path(_filled(name, text))


def run_folder(name: str | None, run: Path | None) -> Path | None:
    """Where a training run goes: `--name X` is short for `--run runs/X`."""
    if name is None:
        return run
    if run is not None:
        raise UsageError("--name and --run both say where the run goes", "give one of them")
    if name in ("", ".", "..") or name[0] == "-" or set(name) & set("/\\") or len(name.encode(errors="replace")) > 255:
        raise UsageError(
            f"--name {display_name(name)!r} is no name for a folder", "write --name leaves, or --run some/folder"
        )
    return Path("runs") / name


_auto = partial(typer.Option, show_default="auto")
_file = partial(typer.Option, metavar="PATH", show_default=False)
_model = partial(typer.Option, rich_help_panel="Model")
_recipe = partial(typer.Option, rich_help_panel="Recipe")
_recipe_auto = partial(_auto, rich_help_panel="Recipe")
_augment = partial(typer.Option, rich_help_panel="Augmentation")
_machine = partial(typer.Option, rich_help_panel="Machine")
_machine_auto = partial(_auto, rich_help_panel="Machine")
_talk = partial(typer.Option, rich_help_panel="Output")
_flag = partial(typer.Option, metavar="")
_recipe_flag = partial(_flag, rich_help_panel="Recipe")
_augment_flag = partial(_flag, rich_help_panel="Augmentation")
_machine_flag = partial(_flag, rich_help_panel="Machine")
_talk_flag = partial(_flag, rich_help_panel="Output")

# Shared by several commands
Run = Annotated[
    Path | None,
    _file("--run", "-r", parser=partial(_path, "--run"),
          help="Run folder or weights file; the newest finished run below ./runs when left out."),
]  # fmt: skip
Workers = Annotated[
    int | None,
    _machine_auto("--workers", "-j", parser=partial(config.parse_auto, "--workers"), metavar="N|auto",
                  help="Threads that read pictures."),
]  # fmt: skip
Threads = Annotated[
    int | None,
    _machine_auto("--threads", metavar="N", help="Threads that compute; default: OMP_NUM_THREADS, or one a core."),
]
Device = Annotated[config.Device, _machine("--device", help="Where to compute.")]
Precision = Annotated[config.Precision, _machine("--precision", help="Number format of the arithmetic.")]
Batch = Annotated[int, _machine("--batch", "-b", metavar="N", help="Pictures computed at once.")]
Offline = Annotated[bool, _machine_flag("--offline", envvar="MVCR_OFFLINE", help="Never use the network.")]
FollowLinks = Annotated[bool, _flag("--follow-links", help="Follow links to folders; links to files always are.")]
KeepGoing = Annotated[bool, _talk_flag("--keep-going", help="Exit 0 even when some pictures are bad.")]
Json = Annotated[bool, _talk_flag("--json", help="One JSON record a line on stdout.")]

Views = Annotated[
    str,
    typer.Option("--views", metavar="1|all|auto|SCALES",
                 help="Look once (about a plain ResNet's cost), through all scales, or until a view is sure; or through these"
                      " scales, such as 2..1/4, of which the surest decides; auto:2..1/4 begins with the cheapest."),
]  # fmt: skip

# mvcr train
TrainData = Annotated[
    Path,
    typer.Argument(metavar="DATA", parser=partial(_path, "DATA"), show_default=False,
                   help="Folder of class folders, or of train/val folders with class folders."),
]  # fmt: skip
Val = Annotated[Path | None, _file("--val", parser=partial(_path, "--val"), help="Validation folder elsewhere.")]
Split = Annotated[
    float,
    typer.Option(
        "--split",
        metavar="SHARE",
        help="Share of each class that validates, where DATA has no val folder; not beside --val.",
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", show_default=False, help="The run goes to runs/NAME.")
]
NewRun = Annotated[
    Path | None,
    _file("--run", "-r", parser=partial(_path, "--run"),
          help="Run folder to make, or to --resume; runs/<model>-<number> when left out."),
]  # fmt: skip
Strict = Annotated[bool, _flag("--strict", help="Decode every picture first; refuse bad, doubled or leaking ones.")]
Resume = Annotated[bool, _flag("--resume", help="Go on where the run stopped.")]
DryRun = Annotated[
    bool, _flag("--dry-run", help="Decode every picture, say what is wrong with the data, train nothing.")
]

Model = Annotated[
    str | None,
    _model("--model", "-m", metavar="NAME", show_default="auto", help=f"Network: {', '.join(config.PRESET_NAMES)}."),
]
Weights = Annotated[
    str, _model("--weights", metavar="WHICH", parser=partial(_filled, "--weights"),
                help="Where to begin: auto, imagenet, none, or a safetensors file."),
]  # fmt: skip
ImgSize = Annotated[
    int | None,
    _model("--imgsz", parser=partial(config.parse_auto, "--imgsz"), metavar="PX|auto", show_default="auto",
           help="Side of the view at scale 1."),
]  # fmt: skip
Fit = Annotated[config.Fit, _model("--fit", help="Keep the aspect and pad, or stretch to a square.")]
Scales = Annotated[
    Any,
    _model("--scales", parser=config.parse_scale_set, metavar="LIST|auto", show_default="auto",
           help="Scale set: sides of the views relative to --imgsz, such as 1,1/2 or 2..1/2 (half octaves)."),
]  # fmt: skip

Layers = Annotated[
    Any,
    _model("--layers", parser=config.parse_layers, metavar="LIST", show_default="blur,gem; none for resnet",
           help="The optional layers, or none: blur, gem (both mvcr's own), max (pools in the place of gem), heads (on two"
                " more levels), sacs (scale-aware convolutions), detail (a thin branch sees --imgsz, the trunk half of it),"
                " sift (dense RootSIFT)."),
]  # fmt: skip

ZoomMode = Annotated[
    Any,
    _model("--zoom", parser=config.parse_zoom_mode, metavar="auto|on|off", show_default="auto",
           help="Look at tiles of large pictures at full resolution; auto when they are large."),
]  # fmt: skip
Tiles = Annotated[
    int | None,
    _model("--tiles", parser=partial(config.parse_auto, "--tiles"), metavar="N|auto", show_default="auto",
           help="Tiles of a large picture that the network looks at; searched for, unless so many cover it."),
]  # fmt: skip
TilePx = Annotated[
    int | None,
    _model("--tile-px", parser=partial(config.parse_auto, "--tile-px"), metavar="PX|auto", show_default="auto",
           help="Side of a tile: about 1.5 times what must be seen."),
]  # fmt: skip
Memory = Annotated[
    Any,
    _machine("--memory", parser=config.parse_memory, metavar="4G", show_default="4G",
             help="What batches and cached tiles may take when zooming."),
]  # fmt: skip

Epochs = Annotated[int | None, _recipe_auto("--epochs", metavar="N", help="Passes over the training pictures.")]
Seconds = Annotated[
    float | None,
    _recipe("--time", parser=config.parse_seconds, metavar="3m", show_default=False,
            help="Wall time for everything, from start to finished run: 90s, 3m, 1h30m; in the place of --epochs."),
]  # fmt: skip
TrainBatch = Annotated[
    int | None,
    _recipe_auto("--batch", "-b", parser=partial(config.parse_auto, "--batch"), metavar="N|auto",
                 help="Pictures a step."),
]  # fmt: skip
Accumulate = Annotated[int, _recipe("--accumulate", metavar="N", help="Steps summed for one update.")]
Lr = Annotated[float | None, _recipe_auto("--lr", metavar="X", help="Peak learning rate.")]
WeightDecay = Annotated[float, _recipe("--weight-decay", metavar="X", help="Decoupled weight decay.")]
Warmup = Annotated[float, _recipe("--warmup", metavar="SHARE", help="Share of the steps that warms up.")]
Clip = Annotated[float, _recipe("--clip", metavar="X", help="Largest gradient norm; 0 is off.")]
LabelSmoothing = Annotated[float, _recipe("--label-smoothing", metavar="X", help="Label smoothing; 0 is off.")]
Unsure = Annotated[
    float,
    _recipe(
        "--unsure",
        metavar="X",
        help="Teach doubt at foreign scales with this weight; the surest view decides. --layers defaults to blur,max.",
    ),
]
Distill = Annotated[float, _recipe("--distill", metavar="X", help="Weight of the views' agreement; 0 is off.")]
Ema = Annotated[float, _recipe("--ema", metavar="X", help="Decay of the averaged weights; 0 is off.")]
PreciseBn = Annotated[
    int,
    _recipe("--precise-bn", metavar="N",
            help="Measure the batch norms of the averaged weights anew on N batches before each validation; 0 is off."),
]  # fmt: skip
Balance = Annotated[
    config.Balance,
    _recipe(
        "--balance",
        help="Make up for rare classes; auto where the largest has over 5 times as many pictures as the smallest.",
    ),
]
NoProgressive = Annotated[
    bool, _recipe_flag("--no-progressive", help="Full size from the start, not half and growing.")
]
Patience = Annotated[int, _recipe("--patience", metavar="N", help="Epochs without gain before stopping; 0 is never.")]

NoAugment = Annotated[
    bool, _augment_flag("--no-augment", help="Everything below off, but for what is given beside it.")
]
Crop = Annotated[float, _augment("--crop", metavar="SHARE", help="Smallest share of the area kept; 1 is off.")]
Zoom = Annotated[float, _augment("--zoom-range", metavar="X", help="Up to 1 + X times smaller or larger.")]
Shear = Annotated[float, _augment("--shear", metavar="X", help="Shear, as a fraction of the side.")]
Shift = Annotated[float, _augment("--shift", metavar="X", help="Shift, as a fraction of the side.")]
Rotate = Annotated[float, _augment("--rotate", metavar="DEG", help="Rotation in degrees.")]
HFlip = Annotated[bool, _augment_flag("--hflip/--no-hflip", help="Mirror left and right.")]
VFlip = Annotated[bool, _augment_flag("--vflip", help="Mirror top and bottom.")]
Turn = Annotated[bool, _augment_flag("--turn", help="Quarter turns.")]
Trivial = Annotated[float, _augment("--trivial", metavar="P", help="Probability of one colour operation.")]
Erase = Annotated[float, _augment("--erase", metavar="P", help="Probability of erasing a rectangle.")]
Resolution = Annotated[
    float, _augment("--resolution", metavar="P", help="Probability of coarser pixels at the same size.")
]
Coarsest = Annotated[float, _augment("--coarsest", metavar="X", help="How many times coarser at most.")]
MixUp = Annotated[float, _augment("--mixup", metavar="BETA", help="MixUp; 0 is off.")]
CutMix = Annotated[float, _augment("--cutmix", metavar="BETA", help="CutMix; 0 is off.")]

CacheMb = Annotated[int, _machine("--cache", metavar="MB", help="Memory for decoded pictures; 0 is off.")]
Seed = Annotated[int, _machine("--seed", metavar="N", help="Same seed, same result.")]
SaveEvery = Annotated[
    int, _machine("--save-every", metavar="STEPS", help="Steps between resumable states; 0 is once an epoch.")
]

# mvcr eval
EvalData = Annotated[
    Path | None,
    typer.Argument(metavar="DATA", parser=partial(_path, "DATA"), show_default=False,
                   help="Folder of class folders; the run's own validation pictures when left out."),
]  # fmt: skip
EvalOut = Annotated[
    Path | None,
    _file("--out", parser=partial(_path, "--out"), rich_help_panel="Output",
          help="FILE.csv or FILE.jsonl with every prediction, or a folder for all results and plots; no name that ends like"
               " another kind of file, as .json, .txt or .png."),
]  # fmt: skip
EvalScales = Annotated[
    Any,
    typer.Option("--scales", parser=config.parse_factors, metavar="RANGE|LIST", show_default=False,
                 help="Accuracy against object scale instead: pictures shown at these factors of their size, as"
                      " 1/4..4 (in half octaves) or 1/2,1,2."),
]  # fmt: skip
Against = Annotated[
    Path | None,
    _file("--against", parser=partial(_path, "--against"), metavar="RUN",
          help="Another run, whose curve over --scales is laid beside."),
]  # fmt: skip
IgnoreExtraClasses = Annotated[
    bool, _flag("--ignore-extra-classes", help="Skip class folders that the run does not know.")
]

# mvcr predict
PredictRun = Annotated[
    Path | None,
    _file("--run", "-r", parser=partial(_path, "--run"),
          help="Run folder, weights file or exported file; the newest finished run below ./runs when left out, else"
               " the ImageNet network."),
]  # fmt: skip
Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUTS", parser=partial(_filled, "INPUTS"), show_default=False,
                   help="Pictures, folders, patterns, or - for names on stdin, one a line."),
]  # fmt: skip
Explain = Annotated[
    Path | None,
    _file("--explain", parser=partial(_path, "--explain"), rich_help_panel="Output",
          help="Folder for one PNG a picture that shows what decided."),
]  # fmt: skip
TopK = Annotated[int, typer.Option("--topk", metavar="K", help="Classes a picture.")]
PredictFormat = Annotated[
    config.PredictFormat, _talk("--format", help="auto is a table on a terminal, else JSON lines.")
]
JsonLines = Annotated[
    bool, _talk_flag("--json", help="JSON lines with a summary at the end; the same as --format jsonl.")
]

# mvcr export
FromTorch = Annotated[
    Path | None,
    _file("--from-torch", parser=partial(_path, "--from-torch"),
          help="Instead of a run, a torch file (.pt, .pth) to convert to safetensors for train --weights: tensors by name,"
               " read in a confined process."),
]  # fmt: skip
ExportViews = Annotated[
    str,
    typer.Option("--views", metavar="1|all|SCALES",
                 help="The view at scale 1 alone (about a plain ResNet's cost), or all scales; or these, such as 2..1/4, of"
                      " which the surest decides."),
]  # fmt: skip
ExportFormat = Annotated[config.ExportFormat, typer.Option("--format", help="What to write.")]
ExportOut = Annotated[
    Path | None,
    _file("--out", parser=partial(_path, "--out"),
          help="File to write, .onnx, .pt2 or .safetensors as --format says; in the run's folder when left out, or in the"
               " current one with --from-torch."),
]  # fmt: skip
Images = Annotated[int, typer.Option("--images", metavar="N", help="Pictures of the check against the run.")]
Tolerance = Annotated[float, typer.Option("--tolerance", metavar="X", help="Largest difference of a probability.")]
Overwrite = Annotated[bool, _flag("--overwrite", help="Replace a file that exists.")]

# mvcr benchmark
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODELS", parser=partial(_filled, "MODELS"), show_default=False,
                   help=f"Any of {', '.join(config.PRESET_NAMES)}; a useful few when left out."),
]  # fmt: skip
BenchmarkRun = Annotated[
    Path | None,
    _file("--run", "-r", parser=partial(_path, "--run"),
          help="Time this run, at its own size; beside it those MODELS alone that are named."),
]  # fmt: skip
BenchmarkData = Annotated[
    Path | None,
    _file("--data", parser=partial(_path, "--data"), help="Folder of pictures, to time the reading of them."),
]
Sizes = Annotated[
    str,
    typer.Option(
        "--imgsz", parser=partial(config.parse_list, "--imgsz"), metavar="PX,PX", help="Sides of MODELS to time."
    ),
]
Batches = Annotated[
    str,
    typer.Option("--batch", "-b", parser=partial(config.parse_list, "--batch"), metavar="N,N", help="Batch sizes."),
]
Classes = Annotated[int, typer.Option("--classes", metavar="N", help="Classes of MODELS.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", help="Timed repetitions.")]
BenchmarkPrecision = Annotated[
    config.Precision,
    _machine("--precision", help="Number format; auto is fp32 to judge, and what mvcr train takes to train."),
]
NoOnnx = Annotated[bool, _flag("--no-onnx", help="Leave out onnxruntime.")]
NoTrain = Annotated[bool, _flag("--no-train", help="Leave out training steps.")]
