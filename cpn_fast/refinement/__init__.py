"""From seeds to pseudo-masks: dense CRF, pixel affinities, random walk."""
