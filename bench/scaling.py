"""Training throughput of 1, 2, 4 ... processes under torchrun, each with the same number of images a step.

On a CPU two Gloo processes of one thread train the demo's narrow net; the machine must have a free core for each. On
GPUs one NCCL process per GPU trains ResNet38d at 448 px from random weights. All read JPEGs through the whole pipeline.
Rates are the medians of metrics.jsonl without its first lines.

    python bench/scaling.py [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from schedule import write_network
from timing import arguments, folder, logged_rate, machine, plot_bars, print_table, write_json

from cpn_fast.commands.demo_data import DEMO_CLASSES, generate
from cpn_fast.config import Model
from cpn_fast.models import build_backbone
from cpn_fast.models.network import Network

IMAGES = 4  # a process and step


def config(root: Path, processes: int, steps: int, gpu: bool) -> dict[str, Any]:
    side = 448 if gpu else 112
    return {
        "name": f"{processes}-processes",
        "out": str(root / "runs"),
        "classes": list(DEMO_CLASSES),
        "data": {"root": str(root / "data"), "train_list": "ImageSets/Segmentation/train.txt"},
        "superpixels": {"count": 200 if gpu else 60},
        "augment": {"long_side": [side, 2 * side], "crop": side},
        "model": {"backbone": "resnet38d" if gpu else "narrow", "weights": str(random_weights(root)) if gpu else None},
        "train": {"batch": IMAGES * processes, "steps": steps, "log_every": 5, "lr": 1e-5, "data_threads": 1},
    }


def random_weights(root: Path) -> Path:
    return root / "random.safetensors"


def rate(root: Path, processes: int, steps: int, gpu: bool) -> float:
    """Return images/s of all processes together."""
    tree = config(root, processes, steps, gpu)
    path = root / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    subprocess.run(
        [sys.executable, *start, "-m", "cpn_fast", "train", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return logged_rate(root / "runs" / tree["name"], skip=2)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    device, gpu = options.device, options.device.type == "cuda"
    most = torch.cuda.device_count() if gpu else 2
    if most == 1:
        print("nothing to compare: there is one GPU")
        return
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        generate(root / "data", seed=0, train=8 * IMAGES, val=1)
        if gpu:
            write_network(Network(build_backbone(Model()), len(DEMO_CLASSES), Model()), random_weights(root))
        rates = {count: rate(root, count, options.steps, gpu) for count in counts}
    rows: list[dict[str, Any]] = []
    for count, speed in rates.items():
        way = "1 process" if count == 1 else f"{count} processes"
        rows.append({"way": way, "images/s": speed, "efficiency": speed / rates[1] / count})
    described = machine(device) | {"cores": os.cpu_count()}
    title = f"Training, {IMAGES} images a process and step, {described['device']}"
    print_table(title, rows)
    out = folder(options.out, device)
    write_json(out / "scaling.json", described, rows)
    bars = {row["way"]: {"images/s": row["images/s"]} for row in rows}
    plot_bars(out / "scaling.png", title, "images/s", bars)


if __name__ == "__main__":
    main()
