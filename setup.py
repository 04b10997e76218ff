from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cpn-fast",
    version="0.1.0",
    description="Complementary Patch Network (ICCV 2021): segmentation from image-level tags, fast and restartable",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # Bare, "kernels" and "pipelines" would shadow other packages: they are installed inside cpn_fast.
    packages=[
        *find_packages(include=["cpn_fast", "cpn_fast.*"]),
        "cpn_fast.kernels",
        "cpn_fast.pipelines",
        "cpn_fast.configs",
    ],
    package_dir={
        "cpn_fast.kernels": "kernels",
        "cpn_fast.pipelines": "pipelines",
        "cpn_fast.configs": "configs",
    },
    package_data={"cpn_fast": ["py.typed", "report.html"], "cpn_fast.configs": ["*.yaml"]},
    entry_points={"console_scripts": ["cpn-fast = cpn_fast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-dali-cuda130>=2.0; platform_system == 'Linux'",
        "numpy>=1.26",
        "opencv-python-headless>=4.8",
        "Pillow>=10",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13",
        "typer>=0.12",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "scikit-learn>=1.4",
        "filelock>=3.12",
        "fast-slic>=0.4",
        "pydensecrf2>=1.1",
    ],
    extras_require={
        "coco": ["pycocotools>=2.0.8"],
        "timm": ["timm>=1.0.16", "torchvision"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "scikit-image>=0.22",
            "pycocotools>=2.0.8",
            "types-PyYAML",
        ],
    },
)
