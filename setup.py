from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cpn-fast",
    version="0.1.0",
    description="Semantic segmentation from image-level tags with CPN, the Complementary Patch Network (ICCV 2021)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # cpn_fast has links to kernels, pipelines and configs. As top-level packages they would shadow other packages.
    packages=find_packages(include=["cpn_fast", "cpn_fast.*"]),
    package_data={"cpn_fast": ["py.typed"], "cpn_fast.commands": ["report.html"], "cpn_fast.configs": ["*.yaml"]},
    entry_points={"console_scripts": ["cpn-fast = cpn_fast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-dali-cuda130>=2.0; platform_system == 'Linux'",
        "numpy>=1.26",
        "opencv-python-headless>=4.8",
        "Pillow>=10.1",  # 10.0 turns TIFFs twice
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13",
        "typer>=0.12",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "scikit-learn>=1.4",
        "pydensecrf2>=1.1",
    ],
    extras_require={
        "fast-slic": ["fast-slic>=0.4"],
        "coco": ["pycocotools>=2.0.8"],
        "onnx": ["onnx>=1.16", "onnxscript>=0.5"],
        "timm": ["timm>=1.0.16", "torchvision"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6.100",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "ruff>=0.6",
            "mypy>=1.11",
            "scikit-image>=0.22",
            "pycocotools>=2.0.8",
            "onnx>=1.16",
            "onnxscript>=0.5",
            "onnxruntime>=1.18",
            "mkdocs-material>=9.5",
            "types-PyYAML",
        ],
    },
)
