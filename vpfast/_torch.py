"""Whether there is a torch that vpfast runs with: looked at before anything else is imported."""

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "vpfast needs torch 2.11 or later, and none is installed: pip install torch, "
        "or pip install torch --index-url https://download.pytorch.org/whl/cpu for a build without CUDA",
        name="torch",
    ) from None

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"vpfast needs torch 2.11 or later, found {torch.__version__}: pip install --upgrade torch")
