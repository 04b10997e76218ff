from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cpn_fast import config_file
from cpn_fast.data.dataset import load_samples
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.refinement.crf import process_pool
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, evaluate, evaluation_files, refine, segment, train


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to 300 bytes. The kernel refuses the same calls as with a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_stage_says_that_the_disk_is_full_and_goes_on_when_it_is_not(short_chain) -> None:
    settings = config_file.load(short_chain)
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=True, masks=True)
    cache = SuperpixelCache(settings.superpixel_cache, settings.superpixels)
    with process_pool(1) as pool:  # starts the fork server, which must not inherit the limit
        pool.submit(int).result()

    def refused(work: Callable[[], object]) -> None:
        before = {file: file.read_bytes() for file in short_chain.parent.rglob("*") if file.is_file()}
        with full_disk(), pytest.raises(UserError, match="make room and give the same command again"):
            work()
        assert all(file.read_bytes() == content for file, content in before.items() if ".lock" not in file.name)
        assert not list(short_chain.parent.rglob("*.tmp"))

    refused(lambda: cache.build(samples, workers=1))
    assert cache.build(samples, workers=1) == len(samples)
    weights = train.run(settings)
    refused(lambda: cam.run(settings, weights))
    seeds = cam.run(settings, weights) / "seeds"
    refused(lambda: refine.run(settings))
    masks = refine.run(settings)
    deeplab = segment.run(settings, masks)
    refused(lambda: segment.segment(settings, deeplab))
    segment.segment(settings, deeplab)
    scores = evaluate.evaluate_cams(
        samples, seeds, settings.evaluate, settings.classes, list_path=str(settings.data.eval_list), workers=1
    )
    refused(lambda: evaluation_files.write_evaluation(settings.run / "evaluation", scores))
