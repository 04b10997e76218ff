"""The command line: one function for each command of ``cpn-fast``."""

from __future__ import annotations

import io
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import cpn_fast
from cpn_fast.runtime import distributed, progress
from cpn_fast.runtime.errors import UserError, is_out_of_memory, refusal, some
from cpn_fast.runtime.interrupts import EXIT_CODE, Stopped, acted_on
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.reading import expanded
from cpn_fast.runtime.terminal import command_line, escaping, shown

if TYPE_CHECKING:
    from cpn_fast.config import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in train.lr=0.02. Repeatable.")
]
ListFile = Annotated[
    Path | None, typer.Option("--list", help="A list of images instead of data.eval_list.", show_default=False)
]

SHARED = {"doctor", "superpixels", "shards", "train", "cam", "evaluate", "refine", "segment", "run", "reproduce"}
"""Commands that torchrun may start. ``doctor`` only reads, the others share their work among the processes."""

# Commands import what they run when they are called, most of them after they read CONFIG. So neither --help nor a
# misspelt key waits for torch.


def _settings(config: Path, overrides: list[str]) -> Config:
    from cpn_fast import config_file

    return config_file.load(config, overrides)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cpn-fast {cpn_fast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress, only errors, results and their paths.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object a line to stdout, for programs; the rest to stderr.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Train semantic segmentation from image-level tags with CPN, the Complementary Patch Network."""
    if quiet and json:
        raise UserError("--quiet and --json exclude each other: give only one of them")
    world = distributed.announced().world
    if world > 1 and context.invoked_subcommand not in SHARED:
        raise UserError(
            f"{context.invoked_subcommand} works in one process, but WORLD_SIZE is {world}: start it without torchrun, "
            "or unset WORLD_SIZE"
        )
    progress.use("json" if json else "quiet" if quiet else "text")


@app.command(rich_help_panel="Start")
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Also check this config's data, weights and disk.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 (typer reads it as "none given")
) -> None:
    """Check this machine and, with CONFIG, its data and weights. Says how to fix what does not work."""
    from cpn_fast.commands import doctor

    sound = doctor.run(None if config is None else _settings(config, overrides))
    then = command_line("demo") if config is None else command_line("run", config, overrides=overrides)
    _done("doctor", then=then if sound else None, sound=sound)
    if not sound:
        raise typer.Exit(1)


@app.command(rich_help_panel="Start")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the generated data set and the runs.")] = Path("runs/demo"),
) -> None:
    """Generate a small data set, train CPN and a plain CAM on it, and score both."""
    from cpn_fast.commands import demo

    with owned(out):
        demo.run(out)
    _done("demo", then=command_line("report", out / "demo"), folder=out)


@app.command(rich_help_panel="Start")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Your photos.", show_default=False)],
    tags: Annotated[
        Path | None, typer.Option(help="Tags of the photos: CSV, JSON, VOC's XML ... Without it, looks in FOLDER.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the config and lists. By default FOLDER's name and -cpn.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Pretrained weights of MobileNetV2 or ResNet38d.")] = None,
) -> None:
    """Write a config for a folder of tagged photos that trains on this machine in at most an hour."""
    from cpn_fast.commands import init

    started = init.run(expanded(folder), tags and expanded(tags), out, weights)
    for line in started.remarks:
        print(line)
    print(f"The config is {started.config}. When doctor finds no fault: {command_line('run', started.config)}")
    _done("init", then=command_line("doctor", started.config), config=started.config)


@app.command(rich_help_panel="The whole chain")
def run(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Run all stages with scores: train, cam, refine, segment. Skips finished work and continues interrupted work."""

    settings = _settings(config, overrides)
    from cpn_fast.stages import chain

    stages = chain.run(settings)
    results = [{"name": name, "list": path, "mean_iou": miou} for name, path, miou in stages]
    _done("run", then=command_line("report", settings.run), results=results)


@app.command(rich_help_panel="The whole chain")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, for example runs/voc.")],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write a run's report: one HTML page with curves, scores and pictures. Moved images: --set data.root=FOLDER."""
    from cpn_fast.commands import report

    page, then = report.run(run, overrides)
    print(f"The report is {page}: open it in a browser")
    _done("report", then=then, page=page)


@app.command(rich_help_panel="The whole chain")
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.", show_default=False),
    ],
    model: Annotated[
        Path,
        typer.Option(help="A run's folder, its segmenter's (RUN/segment/deeplab), or weights.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for masks, overlays and JSON.")] = Path("predictions"),
    tags: Annotated[
        str | None,
        typer.Option(
            help="Classes of all images, as in 'dog;person', or a file of tags. Without it the model finds them."
        ),
    ] = None,
    annotations: Annotated[
        list[str], typer.Option(help="Also write coco, coco-polygons, label-studio or cvat. Repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Segment images with a trained model. Writes an overlay, a palette mask and JSON of classes for each image."""
    from cpn_fast.commands import predict

    predicted = predict.run(model, images, out, tags, annotations)
    print(f"Overlays, masks and JSON of {predicted.images} images are in {out}")
    if predicted.left_out:
        examples = some([str(path) for path in predicted.left_out])
        print(f"Left out: {len(predicted.left_out)} files that are not images ({examples})")
    for line in (*predicted.remarks, *(f"Annotations are in {path}" for path in predicted.annotations)):
        print(line)
    if predicted.unreadable:
        lines = "\n".join(f"  {name}" for name in predicted.unreadable)
        raise UserError(f"{len(predicted.unreadable)} images cannot be read, the others are done:\n{lines}")
    _done("predict", folder=out, images=predicted.images, annotations=predicted.annotations)


@app.command(rich_help_panel="Its stages")
def superpixels(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006 (typer reads it as "none given")
    """Fill the superpixel cache for the training list. Finished superpixels are kept."""
    from cpn_fast.data.dataset import load_samples
    from cpn_fast.pipelines.superpixels import SuperpixelCache

    settings = _settings(config, overrides)
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=False, masks=False)
    cache = SuperpixelCache(settings.superpixel_cache, settings.superpixels)
    cache.build(samples)
    print(f"Superpixels of {len(samples)} images are in {cache.folder}")
    _done("superpixels", then=command_line("train", config, overrides=overrides), superpixels=cache.folder)


@app.command(rich_help_panel="Its stages")
def train(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Train, or continue an interrupted run. Writes RUN/model.safetensors."""

    settings = _settings(config, overrides)
    from cpn_fast.stages import train

    weights = train.run(settings)
    from cpn_fast.training.validation import best_of

    metrics = weights.parent / "metrics.jsonl"
    print(f"Weights are in {weights}, curves in {metrics} (and for TensorBoard)")
    if best := best_of(settings.run):
        used = f"the {settings.train.use_weights} weights (train.use_weights)"
        print(f"The best validation: {best}. Later stages use {used}")
    then = command_line("cam", config, "--checkpoint", weights, overrides=overrides)
    _done("train", then=then, weights=weights, metrics=metrics)


@app.command(rich_help_panel="Its stages")
def cam(
    config: ConfigFile,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Other trained weights than the run's: a file or another run's folder.")
    ] = None,
    list_file: ListFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Make CAM seeds, masks and overlays for a list of tagged images."""

    settings = _settings(config, overrides)
    from cpn_fast.models.weights import FINAL, weights_of
    from cpn_fast.stages import cam

    if checkpoint is None and not (final := settings.run / FINAL).exists():
        raise UserError(f"{final}: no such file; `cpn-fast train {config}` writes it, --checkpoint names another")

    weights = checkpoint or settings.run
    if weights.is_dir():
        weights = weights_of(weights, settings)
    folder = cam.run(settings, weights, list_file)
    print(f"Seeds, masks and overlays are in {folder}")
    print("  overlays: each image under its mask, with the names of its classes. Look at these first")
    print("  masks: PNGs. 0 is background, and 1, 2, ... are the classes in the config's order")
    print("  seeds: scores of the tagged classes, for refine and evaluate")
    list_option = ("--list", list_file) if list_file else ()
    then = _scored(settings, list_file or settings.data.eval_list) and command_line(
        "evaluate", config, "--cams", folder / "seeds", *list_option, overrides=overrides
    )
    _done("cam", then=then or _reported(settings), **{name: folder / name for name in ("seeds", "masks", "overlays")})


@app.command(rich_help_panel="Its stages")
def evaluate(
    config: ConfigFile,
    cams: Annotated[
        Path | None, typer.Option(help="A folder of seeds (.npz). Give this or --masks.", show_default=False)
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="A folder of mask PNGs.", show_default=False)] = None,
    list_file: ListFile = None,
    threshold_from: Annotated[
        Path | None, typer.Option(help="Use the best threshold of this evaluation.json.", show_default=False)
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Score seeds (at every background threshold) or masks against the ground truth."""

    settings = _settings(config, overrides)
    from cpn_fast.stages import evaluate

    evaluation = evaluate.run(settings, cams=cams, masks=masks, list_path=list_file, threshold_from=threshold_from)
    figures = [
        {"kind": result.kind, "threshold": result.threshold, "mean_iou": float(result.scores.mean_iou)}
        for result in evaluation.results
    ]
    _done("evaluate", then=command_line("report", settings.run), evaluation=evaluation.path, results=figures)


@app.command(rich_help_panel="Its stages")
def refine(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Refine the training list's seeds into pseudo-masks: CRF, AffinityNet, random walk. Finished parts are kept."""

    settings = _settings(config, overrides)
    from cpn_fast.stages import refine

    masks = refine.run(settings)
    print(f"Pseudo-masks are in {masks}")
    words: tuple[object, ...] = ("segment", config)
    if _scored(settings, settings.data.train_list):
        words = ("evaluate", config, "--masks", masks, "--list", settings.data.train_list)
    _done("refine", then=command_line(*words, overrides=overrides), masks=masks)


@app.command(rich_help_panel="Its stages")
def segment(
    config: ConfigFile,
    masks: Annotated[
        Path | None, typer.Option(help="A folder of pseudo-masks instead of refine's.", show_default=False)
    ] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Images to segment instead of segment.eval_list.", show_default=False)
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(help="Also pack the masks into this .tar.gz for VOC's evaluation server.", show_default=False),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train the DeepLab segmenter on the training list's pseudo-masks, then segment another list, without tags."""
    from cpn_fast.data.dataset import load_samples

    settings = _settings(config, overrides)
    list_path = list_file or settings.segment.eval_list
    # The list is checked before training, which takes hours.
    load_samples(settings.data, settings.classes, list_path, labels=False, masks=False)
    from cpn_fast.stages import segment

    if submission:
        segment.check_submission(submission)
    weights = segment.run(settings, masks or settings.run / "refine" / "masks")
    folder = segment.segment(settings, weights, list_file)
    best = folder / ("crf" if settings.segment.crf else "masks")
    print(f"Weights are in {weights}, masks in {best}")
    if submission:
        packed = segment.write_submission(settings, best, submission, list_file)
        print(f"{packed} masks are packed in {submission}")
    then = _scored(settings, list_path) and command_line(
        "evaluate", config, "--masks", best, "--list", list_path, overrides=overrides
    )
    _done("segment", then=then or _reported(settings), weights=weights, masks=best)


@app.command(rich_help_panel="Data and weights")
def shards(
    config: ConfigFile,
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="A new folder.", show_default=False)],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Pack the training list (images, tags, superpixels) into WebDataset shards. train reads them with data.shards."""

    settings = _settings(config, overrides)
    from cpn_fast.config_file import override
    from cpn_fast.data.dataset import load_samples
    from cpn_fast.pipelines.shards import pack
    from cpn_fast.pipelines.superpixels import SuperpixelCache

    train = settings.train
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=True, masks=False)
    cached = settings.superpixels.mode == "cached"
    cache = SuperpixelCache(settings.superpixel_cache, settings.superpixels) if cached else None
    packed = pack(samples, settings.classes, cache, destination, seed=train.seed, workers=train.data_threads)
    print(f"{len(samples)} samples are in {destination}, {packed} shards were made")
    with_shards = [*overrides, override("data.shards", destination.absolute())]
    _done("shards", then=command_line("train", config, overrides=with_shards), shards=destination)


@app.command(rich_help_panel="Data and weights")
def import_coco(
    instances: Annotated[
        Path, typer.Argument(metavar="JSON", help="For example instances_train2014.json.", show_default=False)
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="The folder of its images. Links to it, no copies.")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="The data set's folder.")],
) -> None:
    """Make tags, masks and a list from COCO's instances JSON, or from another JSON of the same form."""
    from cpn_fast.commands import import_coco

    with owned(destination):
        imported = import_coco.run(instances, images, destination)
    list_path = destination / imported.list_path
    print(f"{imported.images} images of {len(imported.classes)} classes are listed in {list_path}")
    if imported.negatives:
        print(f"{imported.negatives} of them show no object and are negatives")
    then = None
    if imported.classes == import_coco.coco_classes():
        from cpn_fast.config_file import override

        then = command_line("doctor", "configs/coco.yaml", overrides=[override("data.root", destination)])
    else:
        lines = import_coco.config_lines(imported, destination)
        print(f"A config for this data set needs these keys, and a section train:\n\n{lines}")
    _done("import-coco", then=then, list=list_path, classes=imported.classes)


@app.command(rich_help_panel="Data and weights")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Weights, or for .pt2 and .onnx a run's folder.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="A new file: .safetensors, .pth, .pt2 or .onnx.")
    ],
) -> None:
    """Convert weights (.params, .pth, .safetensors), or write a run or its segmenter for torch.export or as ONNX."""
    if destination.suffix not in (".pt2", ".onnx"):
        from cpn_fast.models.weights import convert

        print(convert(source, destination))
        _done("convert", weights=destination)
        return
    from cpn_fast.commands import trained_model

    model = trained_model.load(source, "cpu")
    model.export(destination)
    inputs = ", ".join(["images", "tags"][: len(model.outputs)])
    print(f"{destination}: takes {inputs}; gives {', '.join(model.outputs)}")
    print("images: RGB from 0 to 255, float32 (N, 3, H, W)")
    if isinstance(model, trained_model.CamModel):
        print(f"tags: 0 or 1, float32 (N, {len(model.classes)})")
    if destination.suffix == ".pt2":
        print(f"network = torch.export.load({str(destination)!r}).module()")
    _done("convert", program=destination)


@app.command(rich_help_panel="Data and weights")
def export(
    seeds: Annotated[Path, typer.Argument(metavar="SEEDS", help="A folder of seeds (.npz).")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="A folder for the .npy files.")],
    form: Annotated[str, typer.Option(help="The released code that will read the seeds: cpn, seam or irn.")],
) -> None:
    """Write seeds in the form that released code reads."""
    from cpn_fast.data.seeds import export_seeds

    print(f"{export_seeds(seeds, destination, form)} seeds in {form}'s form are in {destination}")
    _done("export", seeds=destination)


@app.command(rich_help_panel="The paper")
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="table1, table2, table3, table4, table5, fig6 or fig7.")],
    config: Annotated[Path, typer.Option(help="CPN's config. The runs change some of its keys.", show_default=False)],
    commands: Annotated[
        bool, typer.Option("--commands", help="Only print one command for each run, for a cluster.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train the missing runs of a table or figure of the paper, and print the results beside the paper's."""
    from cpn_fast.commands import reproduce

    if commands:
        for line in reproduce.commands(name, config, overrides):
            print(line)
            progress.tell("command", command=line)
        _done("reproduce")
        return
    picture = reproduce.run(name, config, overrides)
    print(f"Curves are in {picture}, figures in the .json beside it")
    _done("reproduce", picture=picture, figures=picture.with_suffix(".json"))


@app.command(rich_help_panel="The paper")
def information(
    config: ConfigFile,
    checkpoint: Annotated[Path, typer.Option(help="Trained weights: .safetensors, .pt or .pth.", show_default=False)],
    list_file: ListFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Count the seeds that the sum of a pair's CAMs adds over the plain CAM, for several sizes of patches."""

    settings = _settings(config, overrides)
    from cpn_fast.commands import information

    picture = information.run(settings, checkpoint, list_file)
    print(f"Curves are in {picture}, figures in the .json beside it")
    _done("information", picture=picture, figures=picture.with_suffix(".json"))


def _scored(settings: Config, list_path: Path) -> bool:
    """Return whether there is ground truth to score a list's results."""
    from cpn_fast.data.dataset import has_ground_truth

    return has_ground_truth(settings.data, settings.classes, list_path)


def _reported(settings: Config) -> str | None:
    """Return the command that reports a run. None for an untrained run: its seeds may be of another run's weights."""
    return command_line("report", settings.run) if (settings.run / "config.yaml").is_file() else None


def _done(command: str, *, then: str | None = None, **made: object) -> None:
    """Print the command to run next, and tell programs what this command made."""
    if then:
        print(f"Next: {then}")
    progress.tell("done", command=command, **made, **({"next": then} if then else {}))


def main() -> None:
    """Run the command line. A UserError is printed without a traceback, with exit code 1. A stop on demand has 75.

    Under torchrun only the first process writes to standard output. Every process may write errors.
    """
    _open_closed_streams()
    with suppress(UserError):  # the command says it
        if not distributed.announced().first:
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open to the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a name that the terminal's encoding lacks
    with escaping():
        try:
            _run()
        except Exception:
            distributed.tell_torchrun(shown(traceback.format_exc()))
            raise


def _open_closed_streams() -> None:
    """Connect closed standard streams (``>&-``) to the null device.

    Else the next file that is opened gets a stream's number, and what a library says there is written into the file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 (stays open to the end)


def _with_home(argument: str) -> str:
    """Expand ``~`` in ``--OPTION=~/FILE``, which a shell leaves as it is."""
    option, equals, value = argument.partition("=")
    return f"{option}={expanded(Path(value))}" if equals and option[:2] == "--" and value[:1] == "~" else argument


def _run() -> None:
    try:
        with acted_on():
            app([_with_home(argument) for argument in sys.argv[1:]])
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a last resort: readers and writers name their file themselves
        _fail(f"{os.fsdecode(error.filename) if error.filename else 'standard output or a file'}: {refusal(error)}")
    except (MemoryError, RuntimeError) as error:
        if distributed.lost_another(error):
            _fail(f"this process ends, because another one ended and says why ({_first_line(error)})", cause=False)
        if not is_out_of_memory(error):
            raise
        reason = _first_line(error) or "no more can be allocated"
        _fail(
            f"the memory is full ({reason}). Lower the key batch (of train, affinity.train, segment.train or cam) or "
            "cam.pixels, or set train.checkpoint_activations=true"
        )
    except Stopped as stopped:
        message = f"{stopped}. The same command goes on from there."
        progress.tell("stopped", message=message)
        print(message, file=sys.stderr)
        sys.exit(EXIT_CODE)
    finally:
        progress.use("text")


def _fail(message: str, *, cause: bool = True) -> NoReturn:
    progress.tell("error", message=message)
    said = shown(f"Error: {message}")
    distributed.tell_torchrun(said, cause=cause)
    sys.exit(said)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
