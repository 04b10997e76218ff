from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpn_fast import config, config_file
from cpn_fast.runtime.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = "name: x\ndata: {root: there}\ntrain: {epochs: 2}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path, write) -> None:
    loaded = config_file.load(path)
    assert loaded.name == path.stem
    assert config_file.load(write(config_file.dump(loaded))) == loaded


# The values of SEAM's released code, which CPN uses for its later stages.
STAGES = {
    "crf": {"parameters": "seam-labels", "low_alpha": 4, "high_alpha": 24},
    "affinity": {
        "radius": 5,
        "augment": {  # crop, flip, jitter, and no rescaling
            "scale": (1, 1),
            "crop": 448,
            "flip": 0.5,
            "brightness": 0.3,
            "contrast": 0.3,
            "saturation": 0.3,
            "hue": 0.1,
        },
        # the released code passes weight decay as momentum
        "train": {
            "batch": 8,
            "accumulate": 1,
            "epochs": 8,
            "steps": None,
            "lr": 0.01,
            "power": 0.9,
            "momentum": 0.0005,
            "weight_decay": 0.0005,
        },
    },
    "walk": {"alpha": 6, "beta": 8, "logt": 6, "crf": None},  # the released CRF is switched off
    "segment": {
        "augment": {  # hue by 10 of 180, saturation and value by 10 of 255
            "scale": (0.5, 1.5),
            "crop": 448,
            "flip": 0.5,
            "brightness": 0.04,
            "contrast": 0,
            "saturation": 0.04,
            "hue": 0.056,
        },
        "train": {
            "batch": 10,
            "accumulate": 1,
            "epochs": None,
            "steps": 20_000,
            "lr": 0.001,
            "power": 0.9,
            "momentum": 0.9,
            "weight_decay": 0.0005,
        },
        "bn_momentum": 0.0003,
        "scales": (0.5, 0.75, 1, 1.25, 1.5, 1.75),
        "flip": True,
        "crf": "segmentation",
    },
}


@pytest.mark.parametrize("source", ["defaults", "voc.yaml"])
def test_later_stages_are_the_released_ones(source: str, write) -> None:
    shipped = Path(__file__).parent.parent / "configs" / source
    settings = config_file.load(write(MINIMAL) if source == "defaults" else shipped).model_dump()

    def same_keys(tree: dict, expected: dict) -> dict:
        return {key: same_keys(tree[key], e) if isinstance(e, dict) else tree[key] for key, e in expected.items()}

    assert same_keys(settings, STAGES) == STAGES


def test_all_problems_are_reported_at_once_with_the_nearest_key(write) -> None:
    path = write("name: x\ndata: {root: there, imags: a}\ntrain: {epochs: 2, lr: -1}\nmetod: cpn\n")
    with pytest.raises(UserError) as error:
        config_file.load(path)
    text = str(error.value)
    assert "3 problem(s)" in text
    assert "data.imags: unknown key; did you mean images?" in text
    assert "metod: unknown key; did you mean method?" in text
    assert "train.lr" in text
    assert "-1" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\ndata: {root: a}\ntrain: {}\n",
            "set the other to null; found neither",
        ),
        ("name: x\ndata: {root: a}\ntrain: {epochs: 1, steps: 2}\n", "found steps 2 and epochs 1"),
        (MINIMAL + "classes: [a, b, a]\n", "classes has a more than once"),
        (
            MINIMAL + "classes: [a, Background]\n",
            "classes has 'Background': expected printable names without spaces around them. background is always",
        ),
        (MINIMAL + "classes: [a, '']\n", "classes has '': expected printable names"),
        (MINIMAL + 'classes: [a, "b\\nc"]\n', "expected printable names"),
        (MINIMAL + "classes: [a, ' b']\n", "classes has ' b': expected printable names without spaces around them"),
        (MINIMAL + "augment: {long_side: [9, 8]}\n", "long_side goes from 9 down to 8"),
        (MINIMAL + "model: {pcm: false, prcm: false}\n", "cam.map is refined"),
        (MINIMAL + "method: cam\n", "method cam trains no refinement"),
        (MINIMAL + "model: {backbone: resnet38}\n", "found 'resnet38'; did you mean resnet38d?"),
        (MINIMAL + "model: {backbone: 'timm:'}\n", "narrow or timm:NAME, found 'timm:'"),
        (
            MINIMAL + "classes: [yes, no]\n",
            'classes.1: Input should be a valid string, found False; quote it ("no", "7")',
        ),
        (MINIMAL + "model: {weights: timm}\n", "model.weights timm is for model.backbone timm:NAME"),
        (MINIMAL + "superpixels: {compactness: 20000}\n", "superpixels.compactness"),
        (MINIMAL + "patches: {grid_sizes: []}\n", "grid_sizes is empty"),
        (MINIMAL + "crf: {low_alpha: 24, high_alpha: 4}\n", "low_alpha is 24, more than high_alpha, 4: swap them"),
        (MINIMAL.replace("epochs: 2", "epochs: 1, lr: .nan"), "train.lr"),
        (MINIMAL.replace("name: x", "name: .."), "name ..: its folder would not be the run's alone"),
        (MINIMAL.replace("name: x", "name: superpixels"), "name superpixels: its folder would not be the run's alone"),
        (MINIMAL + "name: y\n", "the key name occurs twice, in lines 1 and 4"),
        (MINIMAL + "cam: {batch: 1, flip: true, batch: 2}\n", "the key batch occurs twice"),
        (MINIMAL + "out: ~nobody-of-this-name/x\n", "no home folder of ~nobody-of-this-name is known"),
        (MINIMAL + 'out: "runs\\0412"\n', "out: no path has a character of value 0, found 'runs\\x00412'"),
        (MINIMAL.replace("name: x", "name: 2026-11-28"), "name: Input should be a valid string, found datetime.date"),
        (MINIMAL.replace("name: x", "name: 2026-11-28"), "null, digits and dates as text"),
        (
            MINIMAL.replace("name: x", "name: my run"),
            "name: expected only letters, digits, dots, dashes and underscores",
        ),
        ('base: "\\0.yaml"\n', "base: expected the path of another config, found '\\x00.yaml'"),
        ("- a\n- b\n", "expected keys and values, found list"),
        ("a: [\n", "not readable as YAML"),
        ("base: nowhere.yaml\n", "no such config"),
        ("base: x.yaml\n", "leads back to itself"),
        ("base:\n", "base: expected the path of another config, found None"),
        ("base: ~nobody-of-this-name/x.yaml\n", "no home folder of ~nobody-of-this-name is known"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, write) -> None:
    with pytest.raises(UserError) as error:
        config_file.load(write(text))
    assert message in str(error.value)


def test_base_holds_where_the_file_says_nothing(write) -> None:
    write(MINIMAL + "loss: {tcp: 0.5, cpcr: 0.25}\n", "base.yaml")
    loaded = config_file.load(write("base: base.yaml\nname: own\nloss: {tcp: 2}\n"))
    assert loaded.name == "own"
    assert (loaded.loss.tcp, loaded.loss.cpcr) == (2, 0.25)
    assert loaded.train.epochs == 2


def test_overrides_are_yaml_values_and_are_validated(write) -> None:
    path = write(MINIMAL)
    loaded = config_file.load(path, ["augment.long_side=[100, 200]", "model.weights=a.pth", "patches.kind=grid"])
    assert loaded.augment.long_side == (100, 200)
    assert loaded.model.weights == Path("a.pth")
    assert loaded.patches.kind == "grid"
    for wrong in ("train.epochs", "name.sub=1", "train.epoch=3", "train.lr=[1"):
        with pytest.raises(UserError):
            config_file.load(path, [wrong])


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert config_file.load(path).name == "x"


def test_a_missing_config_names_its_neighbours(write) -> None:
    path = write(MINIMAL)
    with pytest.raises(UserError, match=r"There are: .*x\.yaml"):
        config_file.load(path.with_name("something.yaml"))
    for near in (path.with_name("xx.yaml"), path.with_suffix("")):
        with pytest.raises(UserError, match=r"no such config. Did you mean .*x\.yaml\?"):
            config_file.load(near)
    with pytest.raises(UserError, match=r"no such config. There are: .*x\.yaml"):
        config_file.load(path.parent)


def test_every_key_is_documented() -> None:
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                yield from undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description and prefix:
                yield prefix + name

    assert list(undocumented(config.Config)) == []


def numbers(node: Any, definitions: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and schema of every number in a JSON schema."""
    if "$ref" in node:
        yield from numbers(definitions[node["$ref"].rpartition("/")[2]], definitions, path)
    if node.get("type") in ("integer", "number") and "enum" not in node:
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from numbers(inner, definitions, f"{path}.{name}")
    for inner in (*node.get("anyOf", ()), *node.get("allOf", ()), *node.get("prefixItems", ())):
        yield from numbers(inner, definitions, path)
    if isinstance(node.get("items"), dict):
        yield from numbers(node["items"], definitions, path)


def test_every_number_has_both_bounds() -> None:
    schema = config.Config.model_json_schema()
    found = list(numbers(schema, schema["$defs"]))
    assert len(found) > 60
    for path, node in found:
        assert {"minimum", "exclusiveMinimum"} & node.keys(), path
        assert {"maximum", "exclusiveMaximum"} & node.keys(), path


def test_a_switch_is_not_taken_as_the_number_one(write) -> None:
    schema = config.Config.model_json_schema()
    keys = {path.removeprefix(".") for path, _ in numbers(schema, schema["$defs"])}
    file = write(MINIMAL)
    for override in [*(f"{key}=true" for key in keys), "cam.scales=[on]", "model.mean=[1, 2, yes]", "augment.flip=no"]:
        with pytest.raises(UserError, match=re.escape(override.partition("=")[0])):
            config_file.load(file, [override])
    assert config_file.load(file, ["model.pcm=false"]).model.pcm is False


@pytest.mark.parametrize(
    "override",
    [
        *(
            "train.seed=18446744073709551616",
            "train.data_threads=100000",
            "train.lr=1.0e+308",
            "augment.crop=100000000",
        ),
        *("augment.long_side=[1,100000000000000000000]", "augment.scale=[1.0e+300,1.0e+300]", "model.std=[0,0,0]"),
        *("model.mean=[1.0e+300,0,0]", "superpixels.iterations=1000000000000", "train.batch=10000000000"),
        *("cam.scales=[1.0e+9]", "crf.workers=1000000", "walk.beta=1.0e+30", "loss.tcp=1.0e+39", "cam.pixels=1e+15"),
    ],
)
def test_what_no_machine_can_carry_out_is_refused_with_its_key(override: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        config_file.load(path, [override])


@pytest.mark.parametrize(
    ("override", "stage", "expected"),
    [
        ("affinity.train.batch=3", "affinity", (3, 8, None)),
        ("affinity.train.steps=7", "affinity", (8, None, 7)),
        ("segment.train.batch=3", "segment", (3, None, 20_000)),
        ("segment.train.epochs=2", "segment", (10, 2, None)),
    ],
)
def test_a_key_of_a_stage_keeps_its_other_defaults(override: str, stage: str, expected: tuple, write) -> None:
    train = getattr(config_file.load(write(MINIMAL), [override]), stage).train
    assert (train.batch, train.epochs, train.steps) == expected


def test_results_of_a_list_are_called_as_no_others(tmp_path) -> None:
    for name in ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt", "a/test.txt", "b/test.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = {"root": str(tmp_path), "train_list": "ImageSets/Segmentation/train.txt", "eval_list": "a/test.txt"}
    tree = {"name": "x", "data": data, "train": {"steps": 1}}
    settings = config_file.parse(tree, "test")

    def named(path: str) -> str:
        return settings.list_name(Path(path))

    for path in ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt", "a/test.txt", "a/./test.txt"):
        assert named(path) == Path(path).stem
    assert named(str(tmp_path / "ImageSets/Segmentation/val.txt")) == "val"
    others = ["b/test.txt", "ImageSets/Segmentation/test.txt", "val.txt", "ImageSets/Segmentation/deeplab.txt"]
    others += ["ImageSets/Segmentation/DeepLab.txt", "ImageSets/Segmentation/val.lst", "/elsewhere/val.txt"]
    others += [f"ImageSets/Segmentation/{stem}.txt" for stem in (".", "..", "x" * 240)]
    names = [named(path) for path in others]
    assert len({*names, "train", "val", "test", "deeplab"}) == len(names) + 4
    assert all(re.fullmatch(r"[\w-]{1,50}-[0-9a-f]{8}", name) for name in names)


def test_an_override_changes_no_section_that_shares_an_alias(write) -> None:
    text = MINIMAL + "affinity: {train: &short {batch: 4, steps: 5}}\nsegment: {train: *short}\n"
    loaded = config_file.load(write(text), ["segment.train.batch=2"])
    assert (loaded.affinity.train.batch, loaded.segment.train.batch) == (4, 2)


@pytest.mark.parametrize(
    "folder", ["runs/demo #2", "2024", "2024-13-45", "a: b", "no", "[x", "plain/name", "naïve 'q' \"r\""]
)
def test_a_path_is_taken_as_it_stands(folder: str, write) -> None:
    settings = config_file.load(write(MINIMAL), [config_file.override("out", Path(folder))])
    assert settings.out == Path(folder)
