"""MSPN's improved adversarial training (paper, section III-B, Algorithm 2).

Two networks by turns: the discriminator learns until it scores predictions a little below real frames, then the model,
as the generator, learns until its predictions score almost as high, and so on; so the discriminator is always slightly
the stronger. One step of a run is one update of one of them, on new clips, as in the authors' released code.
"""

import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from vpfast.models.mspn import Discriminator, pixel_loss
from vpfast.training.config import AdversarialConfig, TrainConfig
from vpfast.training.device import lay_out
from vpfast.training.feedback import unrolled
from vpfast.training.recipes.recipe import Loss
from vpfast.training.synced import synced
from vpfast.training.update import Context, check_finite, clip, learning_rate, scale, set_rate, tell, to_minimise

Kind = Literal["least_squares", "linear"]


def discriminator_loss(real: Tensor, predicted: Tensor, kind: Kind = "least_squares") -> Tensor:
    """What the discriminator minimises, of its scores for real and predicted frames, of any shape.

    ``least_squares``: mean (Rs - 1)^2 + mean (Ps + 1)^2 (Algorithm 2, line 7). ``linear``: the negative of Eq. 6, which
    the paper maximises: -(mean Rs + mean (1 - Ps)); it has no bound below.
    """
    if kind == "linear":
        return predicted.mean() - real.mean() - 1
    return (real - 1).square().mean() + (predicted + 1).square().mean()


def generator_loss(predicted: Tensor, kind: Kind = "least_squares") -> Tensor:
    """What the generator minimises beside the pixel loss, of the scores for its predictions.

    ``least_squares``: mean (Ps - 1)^2 (Algorithm 2, line 17). ``linear``: the negative of Eq. 7, -mean Ps.
    """
    return -predicted.mean() if kind == "linear" else (predicted - 1).square().mean()


class Standing(NamedTuple):
    """What the scores say after an update: Rs and Ps, their means over the last updates; Rs - c2 and Rs - c1, between
    which Ps is to lie; whether the turn ends here, and whether that is because it reached the cap."""

    real: float
    predicted: float
    lower: float
    upper: float
    ends: bool
    capped: bool


class Turns(nn.Module):
    """Whose turn it is: the two loops of Algorithm 2, an update at a time.

    A turn has at least one update. The discriminator's ends with Ps < Rs - c1 (line 9), the generator's with
    Ps > Rs - c2 (line 20), either after ``config.cap`` updates at the latest, since nothing makes sure that it ends
    otherwise. Rs and Ps are means over the last ``config.window`` updates, whosever they were. No weights; the state
    lies in buffers, so that a checkpoint holds it.
    """

    generators: Tensor
    updates: Tensor
    scores: Tensor
    known: Tensor

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("generators", torch.tensor(False))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("scores", torch.zeros(config.window, 2, dtype=torch.float64))
        self.register_buffer("known", torch.tensor(0))

    def after(self, real: float, predicted: float) -> Standing:
        """Count an update in which real and predicted frames had these mean scores."""
        config = self.config
        self.scores.copy_(self.scores.roll(-1, dims=0))
        self.scores[-1] = self.scores.new_tensor([real, predicted])
        self.known.add_(1).clamp_(max=config.window)
        self.updates.add_(1)
        real, predicted = self.scores[-int(self.known) :].mean(dim=0).tolist()
        upper, lower = real - config.upper_tolerance * abs(real), real - config.lower_tolerance * abs(real)
        reached = predicted > lower if self.generators else predicted < upper
        capped = not reached and int(self.updates) >= config.cap
        if reached or capped:
            self.generators.logical_not_()
            self.updates.zero_()
        return Standing(real, predicted, lower, upper, reached or capped, capped)


class AdversarialUpdate:
    """One update of the discriminator or of the generator, whoever's turn it is.

    Both score frames ``config.adversarial.first_frame`` and later ones of a clip. While one learns the other is in
    evaluation mode. What the log tells beside the loss that is minimised:

    - ``generator``: 1 where it was the generator's update, and then ``pixel`` and ``adversarial``, the parts of Eq. 8;
    - ``score``: by name, ``Rs`` and ``Ps``, and between which ``Ps`` is to lie, ``Rs - c2`` and ``Rs - c1``;
    - ``turn_ends``: 1 where the turn ends with this update; ``capped``: 1 where the cap ended it.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        config, accelerator = context.config, context.accelerator
        self.turns = Turns(config.adversarial)
        discriminator: nn.Module = build_discriminator(config)
        if accelerator.num_processes > 1:
            discriminator = synced(discriminator)
        lay_out(discriminator, config)
        self.discriminator = discriminator
        optim, own = config.optim, config.adversarial
        made = Adam(context.parameters, optim.lr, weight_decay=optim.weight_decay)
        judging = Adam(discriminator.parameters(), own.lr, weight_decay=own.weight_decay)
        self._generator, self._judge, self._making, self._judging = accelerator.prepare(
            context.model, discriminator, made, judging
        )
        self.modules: dict[str, nn.Module] = {"discriminator": discriminator, "turns": self.turns}
        self.optimizers: dict[str, Optimizer] = {"model": self._making, "discriminator": self._judging}

    def __call__(self, frames: Tensor, step: int) -> dict[str, Any]:
        config, generators = self.context.config, bool(self.turns.generators)
        share = learning_rate(config, step) / config.optim.lr
        optimizer = self._making if generators else self._judging
        set_rate(optimizer, share * (config.optim.lr if generators else config.adversarial.lr))
        optimizer.zero_grad()
        loss = self._generator_loss(frames, step) if generators else self._discriminator_loss(frames, step)
        self.context.accelerator.backward(to_minimise(loss, 1, self.context.accelerator.num_processes))
        told = tell(loss, self.context.accelerator)
        check_finite(told["loss"], step, config)
        parameters = self.context.parameters if generators else list(self.discriminator.parameters())
        clip(self.context.accelerator, optimizer, parameters, config.optim.clip_norm)
        optimizer.step()
        standing = self._stand(told.pop("real_score"), told.pop("predicted_score"), step)
        told |= {"generator": float(generators), "lr": share * config.optim.lr}
        return {**told, **standing, **scale(self.context.accelerator)}

    def _discriminator_loss(self, frames: Tensor, step: int) -> Loss:
        """Algorithm 2, lines 5-7."""
        context, first = self.context, self.context.config.adversarial.first_frame
        context.model.eval()
        self.discriminator.train().requires_grad_(True)
        with torch.no_grad(), context.accelerator.autocast():
            predictions = unrolled(context.model, frames, context.config, step).predictions[0]
        predicted, real = self._judge(predictions[:, first:].float()), self._judge(frames[:, first:])
        loss = discriminator_loss(real, predicted, context.config.adversarial.loss)
        return Loss(loss, {"real_score": real.mean(), "predicted_score": predicted.mean()})

    def _generator_loss(self, frames: Tensor, step: int) -> Loss:
        """Algorithm 2, lines 15-18."""
        config, own = self.context.config, self.context.config.adversarial
        self.context.train_mode()
        self.discriminator.eval().requires_grad_(False)
        output = unrolled(self._generator, frames, config, step)
        pixel = pixel_loss(output, frames, config.loss.norm, config.loss.level_weights)
        summed = config.loss.norm != "mse"
        with self.context.accelerator.autocast():
            predicted = self.discriminator(output.predictions[0][:, own.first_frame :].float()).float()
            with torch.no_grad():
                real = self.discriminator(frames[:, own.first_frame :]).float()
        adversarial = generator_loss(predicted, own.loss)
        scores = {"real_score": real.mean(), "predicted_score": predicted.mean()}
        parts = {"pixel": pixel, "adversarial": adversarial, **scores}
        return Loss(pixel + own.weight * adversarial, parts, pixel if summed else None, ("pixel",) if summed else ())

    def _stand(self, real: float, predicted: float, step: int) -> dict[str, Any]:
        """Move the turns on, and what the log tells of it."""
        whose = "generator" if self.turns.generators else "discriminator"
        now = self.turns.after(real, predicted)
        if now.capped and self.context.accelerator.is_main_process:
            tqdm.write(
                f"step {step + 1}: the {whose}'s turn ended at adversarial.cap ({self.turns.config.cap} updates) "
                f"with Ps {now.predicted:.4g}, Rs - c2 {now.lower:.4g}, Rs - c1 {now.upper:.4g}",
                file=sys.stderr,
            )
        return {
            "score": {"Rs": now.real, "Ps": now.predicted, "Rs - c2": now.lower, "Rs - c1": now.upper},
            "turn_ends": float(now.ends),
            "capped": float(now.capped),
        }


def build_discriminator(config: TrainConfig) -> Discriminator:
    """A new discriminator for frames of ``config.data``, as ``config.adversarial`` describes it."""
    height, width = config.data.frame_size
    factor = 2 ** (len(config.adversarial.channels) - 1)
    return Discriminator(config.adversarial.channels, (height // factor, width // factor), config.data.channels)
