"""The data set and its files: lists, tags, images, masks, seeds, scores, pictures, provenance."""
