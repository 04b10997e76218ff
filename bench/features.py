"""Size of a backbone's features, and hardness of PRCM's softmax over pixels: docs/results.md.

    python bench/features.py CONFIG --set data.root=FOLDER [--weights FILE ...] [--times FACTOR ...]

Runs the first 64 images of the training list at scale 1 through the config's network, with each file of weights and the
inner features times each factor. The default file is model.weights. Heads that a file lacks are random, from
train.seed.

  image, low, middle   root mean square of PCM's and PRCM's inputs: the image, and the inner features low and middle
  zero                 share of zeros among the backbone's last features
  spread               standard deviation over the pixels of PRCM's logits, mean of all regions
  share                largest weight of a pixel in PRCM's softmax, median of all regions: near 1 it is a hard maximum
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import arguments, folder, machine, print_table, write_json
from torch import Tensor

from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data.dataset import Sample, load_samples, tags
from cpn_fast.kernels import region_correlation
from cpn_fast.models.backbone import Features
from cpn_fast.models.inference import images_for
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.pretrained import start_from

IMAGES = 64


@contextmanager
def seen_by_prcm() -> Iterator[tuple[list[float], list[float]]]:
    """Record the spread and the largest share of every region that goes through PRCM in the block."""
    spreads: list[float] = []
    shares: list[float] = []

    def correlation(cam: Tensor, keys: Tensor, embedding: Tensor, *, scale: float) -> Tensor:
        logits = scale * keys.float() @ embedding.flatten(2).float()  # (N, regions, pixels)
        spreads.extend(logits.std(2).flatten().tolist())
        shares.extend(logits.softmax(2).amax(2).flatten().tolist())
        return region_correlation(cam, keys, embedding, scale=scale)

    with mock.patch("cpn_fast.models.network.region_correlation", correlation):
        yield spreads, shares


def measure(network: Network, samples: list[Sample], config: Config, times: float) -> dict[str, Any]:
    sizes: dict[str, list[float]] = {"image": [], "low": [], "middle": [], "zero": []}

    def enlarge(_module: torch.nn.Module, inputs: tuple[Tensor], features: Features) -> Features:
        features = features._replace(low=times * features.low, middle=times * features.middle)
        for name, x in (("image", inputs[0]), ("low", features.low), ("middle", features.middle)):
            sizes[name].append(x.square().mean().item())
        sizes["zero"].append((features.last == 0).float().mean().item())
        return features

    hook = network.backbone.register_forward_hook(enlarge)
    with seen_by_prcm() as (spreads, shares), torch.inference_mode():
        for batch in images_for(network, samples, config, (1.0,), batch=1):
            (index,), (images,) = batch.indices, batch.scales
            network(images, torch.from_numpy(tags(samples[index])[None].copy()).to(images))
    hook.remove()
    mean = {name: sum(values) / len(values) for name, values in sizes.items()}
    return {
        **{name: mean[name] ** 0.5 for name in ("image", "low", "middle")},
        "zero": mean["zero"],
        "spread": sum(spreads) / len(spreads) if spreads else None,
        "share": sorted(shares)[len(shares) // 2] if shares else None,
    }


def run(config: Config, weights: list[Path], factors: list[float], images: int, device: torch.device) -> list[Any]:
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)[:images]
    rows = []
    for path in weights:
        torch.manual_seed(config.train.seed)
        network = build_network(config).eval()
        start_from(network, path)
        network.to(device)
        for times in factors:
            figures = measure(network, samples, config, times)
            rows.append({"weights": f"{path.parent.name}/{path.name}", "times": times, **figures})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--weights", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--times", nargs="+", type=float, default=[1.0], metavar="FACTOR")
    options = parser.parse_args()
    config = load(options.config, options.overrides)
    weights = options.weights or [config.model.weights]
    if None in weights:
        parser.error("no weights: give --weights FILE, or set model.weights")
    rows = run(config, weights, options.times, IMAGES, options.device)
    write_json(folder(options.out, options.device) / "features.json", machine(options.device), rows)
    print_table(f"Features of {config.name}", rows)


if __name__ == "__main__":
    main()
