"""cpn-fast: semantic segmentation learned from image-level tags with the Complementary Patch Network."""

__version__ = "0.1.0"
