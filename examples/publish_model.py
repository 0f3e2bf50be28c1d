"""Measure a trained model and write a folder to share: weights, training configuration and a model card.
Needs ``pip install 'vpfast[cli]'``.

    python examples/publish_model.py runs/mspn-one-digit shared/mspn-one-digit --name me/mspn-one-digit --license mit \\
        --command "vpfast train --config mspn/one-digit --out runs/mspn-one-digit" --about "Moves one digit."
    hf upload me/mspn-one-digit shared/mspn-one-digit        # with the extra vpfast[hub]

The models that come with vpfast were published in this way.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from vpfast.models import HRVQVAE, MSPN, SHRVQVAE
from vpfast.training import TrainConfig, dataset, evaluate, read_weights


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of vpfast train, or of weights")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--name", help="what others load it by (default: the folder's name)")
    parser.add_argument("--license", default="", help="of the weights, such as mit")
    parser.add_argument("--about", default="", help="what the model is for")
    parser.add_argument("--command", default="", help="what trained it")
    parser.add_argument("--took", default="", help="how long that took, and on what")
    parser.add_argument("--context", type=int, default=10, help="real frames it is given when it is measured")
    parser.add_argument("--horizon", type=int, default=10, help="frames it predicts then")
    parser.add_argument("--clips", type=int, default=1000, help="clips of the test split")
    return parser


def training(config: TrainConfig, run: Path, command: str, took: str) -> str:
    """How the weights were made: the command, its seed, and what it took."""
    steps = sum(len(path.read_text().splitlines()) for path in run.rglob("log.jsonl"))
    told = [f"```\n{command}\n```\n"] if command else []
    told += [f"Seed {config.seed}{f', {steps:,} steps' if steps else ''}, torch {torch.__version__}."]
    return "\n".join([*told, *([took] if took else [])])


def quality(model: nn.Module, config: TrainConfig, context: int, horizon: int, clips: int) -> str:
    """What ``vpfast evaluate`` measures of it on clips that it was not trained on."""
    predicts = not isinstance(model, HRVQVAE)
    length = context + (horizon if predicts else 0)
    measured = evaluate(model, dataset(config.data, "test", length, clips, config.seed), context, progress=True)
    task = f"{horizon} frames from {context}" if predicts else f"{context} frames coded and made again"
    rules = measured.reports[measured.judged].protocol
    return f"{clips:,} clips of the test split, {task}, protocol `{rules}`:\n\n{measured.markdown(per_frame=predicts)}"


def main() -> None:
    parser = options()
    asked = parser.parse_args()
    model, config = read_weights(asked.run, nn.Module)
    assert isinstance(model, MSPN | HRVQVAE | SHRVQVAE)
    if config is None:
        parser.error(f"{asked.run} has no training.json, which says on which clips the model is measured")
    texts = {"name": asked.name or asked.out.name, "license": asked.license, "about": asked.about}
    texts["training"] = training(config, asked.run, asked.command, asked.took)
    texts["quality"] = quality(model, config, asked.context, asked.horizon, asked.clips)
    model.save_pretrained(asked.out, model_card_kwargs=texts)
    print(f"{asked.out}: {', '.join(sorted(path.name for path in asked.out.iterdir()))}")


if __name__ == "__main__":
    main()
