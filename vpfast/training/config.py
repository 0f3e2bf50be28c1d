"""What a training run is made of: plain frozen dataclasses, checked before any data is read."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vpfast.data.resize import LARGEST

T = TypeVar("T")

Stage = Literal["all", "disjoint", "autoencoder", "prior", "joint"]


def option(default: T, text: str) -> T:
    """A dataclass field with a help text for the command line."""
    made: T
    if isinstance(default, dict):
        made = field(default_factory=lambda: cast(T, dict(default)), metadata={"help": text})
    else:
        made = field(default=default, metadata={"help": text})
    return made


def _require(fine: bool, key: str, given: object, accepted: str) -> None:
    if not fine:
        raise ValueError(f"{key}: {given} given, must be {accepted}")


_PLAIN = {int: "a whole number", bool: "true or false", str: "a text", float: "a finite number", type(None): "null"}
MOST = 99_999_999
"""Of whatever is counted: the names of checkpoints have eight digits."""


def _check_values(config: Any, prefix: str = "") -> None:
    """What the types of the fields promise and Python does not hold anyone to."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        _require(_fits(value, hint), prefix + name, repr(value), _in_words(hint))
        if isinstance(value, int):
            _require(value <= MOST, prefix + name, value, f"at most {MOST}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what ``hint`` says; a list counts as a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        hints = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        return len(hints) == len(value) and all(map(_fits, value, hints))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    kind = origin or hint
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_words(hint: Any) -> str:
    """What :func:`_fits` accepts."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        many = inner[1:] == (...,)
        return f"a list, each {_in_words(inner[0])}" if many else f"[{', '.join(map(_in_words, inner))}]"
    return "keys and values" if origin is dict or hint is dict else _PLAIN.get(hint, "keys of its own")


@dataclass(frozen=True)
class SplitConfig:
    """Which files of a video folder belong to one split: glob patterns on the path relative to ``data.root``. In a
    prepared set, which of the split's recordings to take, by name; no pattern takes all."""

    include: tuple[str, ...] | str = option((), "patterns of the files in this split; none means the split is empty")
    exclude: tuple[str, ...] | str = option((), "patterns of files to leave out again")

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str | list):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from, and how large they are."""

    kind: Literal["moving-digits", "video-folder", "prepared"] = option(
        "moving-digits", "moving handwritten digits, a folder of videos, or what `vpfast data prepare` made"
    )
    root: str | None = option(
        None,
        "video-folder: the folder (or one file) of videos; prepared: what `vpfast data prepare` made; moving-digits: "
        "MNIST idx files or mnist_test_seq.npy (default: the digits that come with scikit-learn)",
    )
    size: int | tuple[int, int] = option(
        64, "height and width of the frames, [H, W] or one number for both; prepared: those of the set"
    )
    fit: Literal["squash", "crop"] = option(
        "squash", "frames of another aspect ratio: squash, or crop to the centre; prepared: as it was"
    )
    channels: Literal[1, 3] = option(1, "1 for grey, 3 for RGB")
    digits: int = option(2, "moving-digits: how many digits move in a clip")
    digit_size: int = option(28, "moving-digits: height and width of a digit")
    speed: float = option(0.1, "moving-digits: how much of the way from wall to wall a digit covers in one frame")
    supersample: int = option(
        1, "moving-digits: draw so many times larger and average down, so that digits move by fractions of a pixel"
    )
    clips: int = option(10_000, "moving-digits: clips in the training split")
    stride: int | None = option(
        None, "videos: frames from one clip's start to the next (default: the prepared set's own rule, else no overlap)"
    )
    cache: str | None = option(None, "video-folder: where decoded videos are kept (default: beside the user's caches)")
    train: SplitConfig = option(
        SplitConfig(include=("*",)), "video-folder: the files to train on; prepared: some of them"
    )
    val: SplitConfig = option(SplitConfig(), "video-folder: the files to watch training with; never the test files")
    test: SplitConfig = option(SplitConfig(), "video-folder: the files `vpfast evaluate` reports on")

    def __post_init__(self) -> None:
        """Raises ValueError: one line that names the key."""
        _check_values(self, "data.")
        for split in ("train", "val", "test"):
            _check_values(getattr(self, split), f"data.{split}.")

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True)
class LossConfig:
    """The pixel loss, and what the network sees while it is trained on it."""

    norm: Literal["sum_squares", "l2", "mse"] = option("sum_squares", "norm of the prediction error")
    level_weights: Literal["paper", "uniform"] = option("paper", "(L - l)/L, or 1, for level l of L")
    feedback: Literal["fixed", "random", "detached", "scheduled", "none"] = option(
        "fixed",
        "predictions given back in place of real frames: the last `horizon` ones, with gradient (fixed) or without "
        "(detached); the last few, a number drawn each step (random); each of the last `horizon` ones by a draw that "
        "spares it ever less often (scheduled); none of them",
    )
    feedback_range: tuple[int, int] = option((3, 5), "feedback random: fewest and most frames fed back")
    sampling: Literal["linear", "exponential", "sigmoid"] = option(
        "linear", "feedback scheduled: how the share of real frames falls"
    )
    sampling_steps: int = option(50_000, "feedback scheduled: steps until hardly a real frame is left")

    def __post_init__(self) -> None:
        """Raises ValueError: one line that names the key."""
        _check_values(self, "loss.")


@dataclass(frozen=True)
class AdversarialConfig:
    """MSPN's improved adversarial training (paper, Algorithm 2): a discriminator and a generator, by turns."""

    enabled: bool = option(False, "mspn: train against a discriminator")
    loss: Literal["least_squares", "linear"] = option(
        "least_squares", "what the scores are held to: that of Algorithm 2, or of Eq. 6 and 7"
    )
    weight: float = option(100.0, "lambda, the weight of the generator's adversarial loss beside the pixel loss")
    upper_tolerance: float = option(
        0.01, "c1 / |Rs|: the discriminator's turn ends when the predictions' score is below Rs - c1"
    )
    lower_tolerance: float = option(
        0.02, "c2 / |Rs|: the generator's turn ends when the predictions' score is above Rs - c2"
    )
    window: int = option(3, "updates over which the scores are averaged before they are compared")
    cap: int = option(100, "updates after which a turn ends whatever the scores")
    first_frame: int = option(5, "the first frame of a clip, from 0, that the discriminator sees")
    lr: float = option(1e-7, "learning rate of the discriminator")
    weight_decay: float = option(0.0, "L2 penalty of the discriminator, added to the gradient")
    channels: tuple[int, ...] = option(
        (64, 64, 128, 256, 256, 512), "widths of the discriminator; each further one halves the frame"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: one line that names the key."""
        _check_values(self, "adversarial.")


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule."""

    lr: float = option(1e-3, "learning rate")
    weight_decay: float = option(0.0, "L2 penalty, added to the gradient as torch.optim.Adam does")
    clip_norm: float | None = option(None, "clip the gradient to this norm")
    schedule: Literal["constant", "cosine"] = option("constant", "how the learning rate goes on after warm-up")
    warmup: int = option(0, "steps over which the learning rate rises from 0")
    accumulate: int = option(1, "parts of batch_size clips whose gradients make one step, as those of a larger batch")
    ema_decay: float | None = option(
        None, "average the weights over the steps with this decay, such as 0.999: validated and written in their place"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: one line that names the key."""
        _check_values(self, "optim.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a key of the YAML file and an option of ``vpfast train``.

    ``model`` holds ``name`` (default ``mspn``), optionally ``preset``, and any field of the model's configuration,
    which overrides the preset's. A model that is trained in stages (``shrvqvae``: ``autoencoder``, ``prior``,
    ``joint``) has each as a run of its own, to which ``stages`` gives its own values of these keys.
    """

    out: str = option("runs/train", "folder of the run: config.yaml, log.jsonl, checkpoints/, weights/, curves.png")
    init: str | None = option(
        None, "a folder of weights to start from, in place of random ones, or the name of packaged ones"
    )
    model: dict[str, Any] = option({}, "name, preset, and any field of the model's configuration")
    stage: Stage = option(
        "all",
        "shrvqvae: the stage to train; all of them one after another; disjoint: all but joint; or one alone",
    )
    stages: dict[str, dict[str, Any]] = option(
        {}, "shrvqvae: what a stage does otherwise, such as stages.prior.steps or stages.joint.optim.lr"
    )
    data: DataConfig = option(DataConfig(), "")
    loss: LossConfig = option(LossConfig(), "")
    adversarial: AdversarialConfig = option(AdversarialConfig(), "")
    optim: OptimConfig = option(OptimConfig(), "")
    context: int = option(10, "real frames the network is given")
    horizon: int = option(10, "frames to predict after them; 0 for a model that makes the frames it is given again")
    steps: int = option(10_000, "updates of the weights")
    batch_size: int = option(8, "clips a step and process; with optim.accumulate so many times that")
    seed: int = option(0, "decides the first weights, the order of the clips, and every other draw")
    workers: int = option(0, "processes that prepare clips; 0 does it in the training process")
    device: Literal["auto", "cpu"] = option("auto", "auto takes the GPU when there is one")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "arithmetic of the network; weights stay float32")
    checkpoint_activations: bool = option(
        False, "mspn: keep one frame's activations in memory at a time and compute them again in the backward pass"
    )
    channels_last: bool = option(True, "lay maps out channels last wherever that is the faster way; false never does")
    val_every: int = option(500, "steps between validations; 0 for none")
    val_clips: int = option(64, "clips of the validation split to use")
    patience: int | None = option(None, "end the run after so many validations that were no better than the best")
    save_every: int = option(500, "steps between checkpoints; 0 for the last step alone")
    keep: int = option(2, "checkpoints to keep")
    tensorboard: bool = option(False, "tell TensorBoard too, in the folder tensorboard/ of the run")
    strip_every: int = option(500, "TensorBoard: steps between strips of a clip beside its prediction; 0 for none")

    def __post_init__(self) -> None:
        """Raises ValueError: one line that names the key."""
        _check_values(self)
        _check_numbers(self)
        _check_adversarial(self)
        _check_together(self)

    @property
    def clip_length(self) -> int:
        """Frames of a training clip."""
        return self.context + self.horizon


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass ``kind`` from nested plain values of the right types, as YAML gives them.

    Raises:
        ValueError: an unknown key, with the nearest known one; or what the dataclass itself refuses.
    """
    hints = get_type_hints(kind)
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(unknown_key(key, hints))
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            value = from_dict(hints[key], value)  # type: ignore[arg-type]
        elif isinstance(value, list) and hints[key] != dict[str, Any]:
            value = tuple(value)
        made[key] = value
    return kind(**made)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, lists for tuples: what YAML and JSON hold."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every key of a configuration class: (dotted key, type, default, help)."""
    hints = get_type_hints(kind)
    default = kind()
    for entry in dataclasses.fields(kind):
        name, value = prefix + entry.name, getattr(default, entry.name)
        if dataclasses.is_dataclass(value):
            for key, hint, _, text in leaves(type(value), name + "."):
                yield key, hint, _dig(value, key.removeprefix(name + ".")), text
        else:
            yield name, hints[entry.name], value, str(entry.metadata["help"])


def _dig(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = getattr(value, part)
    return value


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One line for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _check_numbers(config: TrainConfig) -> None:
    _require(bool(config.out.strip()), "out", repr(config.out), "the name of a folder")
    for key in ("context", "steps", "batch_size", "keep", "val_clips"):
        _require(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    for key in ("horizon", "workers", "val_every", "save_every", "strip_every", "seed"):
        _require(getattr(config, key) >= 0, key, getattr(config, key), "at least 0")
    data, optim = config.data, config.optim
    _require(min(data.frame_size) >= 1 and len(data.frame_size) == 2, "data.size", data.size, "positive, [H, W] or one")
    drawn = max(data.frame_size) * data.supersample
    _require(drawn <= LARGEST, "data.size", data.size, f"at most {LARGEST}, times data.supersample where that is given")
    _require(0 <= data.speed < 1, "data.speed", data.speed, "at least 0 and below 1")
    for key in ("digits", "digit_size", "supersample", "clips"):
        _require(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    _require(data.stride is None or data.stride >= 1, "data.stride", data.stride, "at least 1")
    _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
    _require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "at least 0")
    _require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", optim.clip_norm, "above 0, or null")
    _require(config.loss.sampling_steps >= 1, "loss.sampling_steps", config.loss.sampling_steps, "at least 1")
    _require(optim.accumulate >= 1, "optim.accumulate", optim.accumulate, "at least 1")
    decay = optim.ema_decay
    _require(decay is None or 0 < decay < 1, "optim.ema_decay", decay, "above 0 and below 1, or null")
    _require(config.patience is None or config.patience >= 1, "patience", config.patience, "at least 1, or null")
    _require(0 <= optim.warmup <= config.steps, "optim.warmup", optim.warmup, f"from 0 to steps ({config.steps})")


def _check_adversarial(config: TrainConfig) -> None:
    given = config.adversarial
    for key in ("window", "cap"):
        _require(getattr(given, key) >= 1, f"adversarial.{key}", getattr(given, key), "at least 1")
    for key in ("weight", "weight_decay"):
        _require(getattr(given, key) >= 0, f"adversarial.{key}", getattr(given, key), "at least 0")
    _require(given.lr > 0, "adversarial.lr", given.lr, "above 0")
    upper, lower = given.upper_tolerance, given.lower_tolerance
    _require(upper > 0, "adversarial.upper_tolerance", upper, "above 0")
    _require(lower > upper, "adversarial.lower_tolerance", lower, f"above adversarial.upper_tolerance ({upper})")
    widths = list(given.channels)
    fine = len(widths) > 1 and all(isinstance(width, int) and width >= 1 for width in widths)
    _require(fine, "adversarial.channels", widths, "at least two positive whole numbers")
    if not given.enabled:
        return
    factor = 2 ** (len(widths) - 1)
    fits = all(side % factor == 0 for side in config.data.frame_size)
    accepted = f"multiples of {factor}, which the {len(widths)} widths of adversarial.channels divide by"
    _require(fits, "data.size", list(config.data.frame_size), accepted)
    parts = config.optim.accumulate
    _require(parts == 1, "optim.accumulate", parts, "1 with adversarial.enabled: scores are of a whole batch")
    first, length = given.first_frame, config.clip_length
    _require(0 <= first < length, "adversarial.first_frame", first, f"from 0 to {length - 1}, a frame of the clip")


def _check_together(config: TrainConfig) -> None:
    data, (fewest, most) = config.data, config.loss.feedback_range
    watched = config.patience is None or bool(config.val_every)
    _require(watched, "patience", config.patience, "null where val_every is 0: nothing is validated")
    if config.loss.feedback == "random":
        fine = 0 <= fewest <= most < config.clip_length
        _require(fine, "loss.feedback_range", [fewest, most], f"[fewest, most] below the clip's {config.clip_length}")
    if data.kind == "video-folder":
        _require(data.root is not None, "data.root", "nothing", "the folder of videos when data.kind is video-folder")
        _require(bool(data.train.include), "data.train.include", "no pattern", "at least one pattern")
        if config.val_every:
            _require(bool(data.val.include), "data.val.include", "no pattern", "at least one pattern, or val_every 0")
    elif data.kind == "prepared":
        _require(
            data.root is not None,
            "data.root",
            "nothing",
            "a folder of `vpfast data prepare` when data.kind is prepared",
        )
    else:
        _require(data.channels == 1, "data.channels", data.channels, "1 when data.kind is moving-digits")
        square = data.frame_size[0] == data.frame_size[1]
        _require(square, "data.size", list(data.frame_size), "square when data.kind is moving-digits")
        fits = data.digit_size <= data.frame_size[0]
        _require(fits, "data.digit_size", data.digit_size, f"at most data.size ({data.frame_size[0]})")
