"""Commands that can be served, one of each kind, and which values each of their options refuses.

``bad_commands.py`` makes something of them that cannot be served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from bad_files import Things

FRAMES = 24
"""Of every video."""

Draw = Callable[[Random], Sequence[object]]
"""Draws what stands after an option and is refused there."""


@dataclass(frozen=True)
class Command:
    """A command that can be served, and what can be wrong with it.

    Attributes:
        words: what comes first: the command, and the names of its parts.
        given: positional arguments and options (``--name``) with their values, by name.
        wrong: what is refused, by option.
        clashes: options that do not go with what is given or with each other.
        inputs: which of ``given`` are files, and of which kind.
        out: which option says what is written, and what that is: see :func:`bad_files.bad_place`.
        forced: whether ``--force`` replaces what is there.
        needed: which of ``given`` cannot be left out.
        served: whether it is; one of a data set that is not at hand is not.
    """

    words: tuple[str, ...]
    given: Mapping[str, Sequence[object]]
    wrong: Mapping[str, Draw]
    clashes: Sequence[Mapping[str, Sequence[object]]] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    out: tuple[str, str] | None = None
    forced: bool = False
    needed: Sequence[str] = ()
    served: bool = True


# --- values that are refused ----------------------------------------------------------------------------------------


def one_of(*texts: object) -> Draw:
    return lambda random: [random.choice(texts)]


def either(*draws: Draw) -> Draw:
    return lambda random: random.choice(draws)(random)


_NO_NUMBERS = (
    "",
    " ",
    "x",
    "many",
    "[1, x]",
    "{a: 1}",
    "1,5",
    "0x",
    "--",
    "½",
    "1 2",
    "\x1b[31m",
    "[",
    "'",
    "%s",
    "é" * 99,
)
_NO_WHOLE = (*_NO_NUMBERS, "1.5", "nan", "inf", "-inf", "1e-3", "true", "[1]", "9" * 30, "-9", str(-(2**70)))


def whole(lowest: int, most: int | None = None) -> Draw:
    """No whole number of at least ``lowest`` (0 or 1) and at most ``most``."""
    beyond = (lowest - 1,) + (() if most is None else (most + 1, 2**31, 2**63))
    return one_of(*_NO_WHOLE, *beyond)


def real(*beyond: object) -> Draw:
    """No number, or one of those given."""
    return one_of(*_NO_NUMBERS, "nan", "true", "[1]", *beyond)


def size(multiple: int) -> Draw:
    """No height and width, or one that the model cannot take."""
    side = whole(1)
    wrong_side = either(side, one_of(multiple + 1, 10**6 * multiple))
    return either(
        lambda random: [*wrong_side(random), multiple],
        lambda random: [multiple, *wrong_side(random)],
        lambda random: [multiple],
    )


def listed_size(*beyond: object) -> Draw:
    """No height and width in one word, as YAML has it."""
    return one_of(
        *_NO_NUMBERS, "[1, 2, 3]", "[]", "[0, 16]", "[16, -16]", "[16, x]", "1.5", "[1.5, 2]", "0", "-4", *beyond
    )


choice = one_of("", "nonsense", "AUTO", "0", "[auto]", "cpu,cuda", " cpu")
switch = one_of("", "maybe", "2", "yess", "[true]", "null")


# --- the commands ---------------------------------------------------------------------------------------------------


def commands(things: Things) -> list[Command]:
    """One of each kind."""
    return [
        *_predict(things),
        *_codes(things),
        _export(things),
        *_of_clips(things),
        _train(things),
        _train_in_stages(things),
        _resume(things),
        *_data(things),
        *_bench(things),
        _demo(things),
        Command(("doctor",), {}, {"--verbose": one_of("", "1")}),
        Command((), {}, {"--versions": one_of("1"), "trian": one_of("--out")}, served=False),
    ]


def _predict(things: Things) -> Iterator[Command]:
    given = {"video": [things.video], "--weights": [things.weights["mspn"]], "--device": ["cpu"]}
    inputs = {"video": "clip", "--weights": "predicting weights"}
    shared = {"--device": choice, "--horizon": whole(1), "--size": size(2)}
    drawn = {"--temperature": real("-1", "inf", "0.5"), "--top-k": either(whole(1), one_of(3)), "--seed": whole(0)}
    place = {
        "--start": one_of(*_NO_NUMBERS, "1.5", "nan", FRAMES, -FRAMES - 1, "9" * 30, 2**63),
        "--context": either(whole(1), one_of(FRAMES + 1, 10**7)),
        "--fps": whole(1, 50),
    }
    only_live = [{"--loop": []}, {"--pace": []}, {"--bfloat16": []}, {"--json": []}, {"--frames": [3]}]
    never_live = [{name: [1]} for name in ("--start", "--temperature", "--top-k", "--futures", "--seed")]
    whole_clip = {**given, "--horizon": [2], "--context": [3], "--out": ["out"]}
    yield Command(
        ("predict",),
        whole_clip,
        {**shared, **place, **drawn, "--futures": either(whole(1), one_of(2))},
        clashes=only_live,
        inputs=inputs,
        out=("--out", "folder"),
        forced=True,
        needed=("video", "--weights", "--out"),
    )
    yield Command(
        ("predict",),
        {**whole_clip, "--weights": [things.weights["shrvqvae"]], "--temperature": [1]},
        {"--temperature": real("-1", "inf"), "--top-k": either(whole(1), one_of(5)), "--futures": whole(1)},
        clashes=[{"--temperature": [0], "--futures": [2]}, {"--temperature": [0], "--top-k": [2]}],
        inputs=inputs,
    )
    yield Command(
        ("predict",),
        {**given, "--live": []},
        {**shared, "--frames": whole(1), "--context": one_of(3, "x", 0), "--fps": whole(1)},
        clashes=never_live,
        inputs={**inputs, "video": "video"},
        out=("--out", ".mp4"),
        forced=True,
        needed=("video", "--weights"),
    )


def _codes(things: Things) -> Iterator[Command]:
    given = {"--weights": [things.weights["hrvqvae"]], "--device": ["cpu"]}
    yield Command(
        ("encode",),
        {**given, "video": [things.video], "--out": ["a.vpc"]},
        {
            "--start": either(whole(0), one_of(FRAMES, 10**7)),
            "--count": whole(1),
            "--size": size(4),
            "--device": choice,
        },
        inputs={"video": "video", "--weights": "weights of codes"},
        out=("--out", "file"),
        forced=True,
        needed=("video", "--weights", "--out"),
    )
    for out, kind in (("out", "folder"), ("out.gif", "file"), ("out.mp4", "file"), ("out.npy", "file")):
        yield Command(
            ("decode",),
            {**given, "file": [things.codes], "--out": [out]},
            {
                "--layers": either(whole(1), one_of(4)),
                "--fps": either(whole(1), one_of(2**31) if out == "out.npy" else one_of(1001 if "4" in out else 51)),
                "--device": choice,
            },
            clashes=[{"--out": [f"a{ending}"]} for ending in (".png", ".avi", ".webm", ".jpg")],
            inputs={"file": "codes", "--weights": "weights of codes"},
            out=("--out", kind),
            forced=True,
            needed=("file", "--weights", "--out"),
        )


def _export(things: Things) -> Command:
    given = {"--weights": [things.weights["mspn"]], "--out": ["m.pt2"], "--horizon": [1], "--format": ["export"]}
    counts = {name: whole(1) for name in ("--horizon", "--frames", "--batch")}
    return Command(
        ("export",),
        given,
        {**counts, "--size": size(2), "--format": choice, "--device": choice},
        inputs={"--weights": "predicting weights"},
        out=("--out", ".pt2"),
        forced=True,
        needed=("--weights", "--out", "--horizon"),
    )


def _of_clips(things: Things) -> Iterator[Command]:
    """What is measured on held-out clips: options as YAML has them."""
    data = {"--data.kind": ["video-folder"], "--data.root": [things.videos], "--data.test.include": ["*"]}
    given = {"--weights": [things.weights["mspn"]], "--device": ["cpu"], "--clips": [1], **data}
    wrong = {
        "--split": choice,
        "--context": either(whole(1), one_of(FRAMES + 1, 10**7)),
        "--horizon": either(whole(1), one_of(FRAMES + 1, 10**7)),
        "--clips": whole(1),
        "--batch_size": whole(1),
        "--seed": whole(0),
        "--device": choice,
        "--temperature": real("-1", "0.5", "inf"),
        "--top_k": either(whole(1), one_of(3)),
        "--futures": either(whole(1), one_of(2)),
        "--name": one_of("truth", "", "repeat last frame"),
        "--beside": one_of("", "x", "[1]", "3"),
        "--beside.prediction": one_of(things.weights["mspn"]),
        "--beside.other": one_of("", "/nowhere", things.video, things.weights["hrvqvae"], "3", "{a: 1}"),
        "--beside.a.b": one_of("x", things.weights["mspn"]),
        "--protocol": choice,
        "--lpips": switch,
        "--config": one_of("", "/nowhere", things.video, things.videos, things.config, "mspn/nothing"),
        **{f"--data.{name}": draw for name, draw in _data_wrong(things, 2).items()},
    }
    pictures = {
        "--rows": whole(1),
        "--clip": either(whole(0), one_of(10**7)),
        "--fps": real(0, -1, 51, "inf"),
        "--blur": real(0, -1, "inf"),
    }
    table = {
        "--strip": one_of("a.gif", "a", "/nowhere/a.png", things.videos),
        "--strip_clip": either(whole(0), one_of(10**7)),
        "--table": choice,
        "--part": one_of("kth", "x"),
        "--add": one_of("x", things.table),
    }
    inputs = {"--weights": "weights", "--data.root": "videos"}
    needed = ("--weights", "--data.root", "--data.test.include")
    yield Command(("evaluate",), given, {**wrong, **table}, inputs=inputs, out=("--out", "replaced"), needed=needed)
    yield Command(
        ("evaluate",),
        {**given, "--table": ["mspn-3"], "--add": [things.table]},
        {"--table": choice},
        clashes=[
            {"--context": [3]},
            {"--horizon": [2]},
            {"--strip": ["a.png"]},
            {"--table": ["mspn-5"]},
            {"--table": ["mspn-5"], "--part": ["moon"]},
            {"--table": ["shrvqvae-1"]},
            {"--weights": [things.weights["hrvqvae"]]},
        ],
        inputs={"--add": "table"},
        out=("--out", "replaced"),
    )
    yield Command(
        ("report",),
        {**given, "--out": ["a.html"]},
        {**wrong, "--show": whole(0), "--fps": real(0, -1, 51, "inf"), "--out": one_of("", "a.txt", "a")},
        inputs=inputs,
        out=("--out", ".html"),
        forced=True,
        needed=("--out", *needed),
    )
    yield Command(
        ("visualize",),
        {**given, "--out": ["out"]},
        {**wrong, **pictures},
        clashes=[{"--start": [1]}, {"--count": [2]}, {"--size": [16, 24]}, {"--noise": [3]}],
        inputs=inputs,
        out=("--out", "folder"),
        forced=True,
        needed=("--out", *needed),
    )
    yield Command(
        ("visualize",),
        {"video": [things.video], "--weights": [things.weights["hrvqvae"]], "--out": ["out"], "--device": ["cpu"]},
        {
            **pictures,
            "--noise": real("inf"),
            "--fragment": either(whole(1), one_of(99)),
            "--salt-and-pepper": real(-1, 2),
            "--start": either(whole(0), one_of(FRAMES)),
            "--count": whole(1),
            "--size": size(4),
            "--context": whole(1),
        },
        inputs={"video": "video", "--weights": "weights"},
        out=("--out", "folder"),
        forced=True,
        needed=("--out", "--weights"),
    )


def _data_wrong(things: Things, multiple: int) -> dict[str, Draw]:
    return {
        "kind": one_of("", "videos", "null", "3", "prepared"),
        "root": one_of("/nowhere", things.table),
        "size": listed_size(f"[{multiple + 1}, {multiple}]", "[16, 100000]", multiple * 10**5, 2**70),
        "fit": choice,
        "channels": one_of(*_NO_WHOLE, 0, 2, 3, 4),
        "digits": whole(1),
        "digit_size": whole(1),
        "speed": real(-1, 1, "inf"),
        "supersample": whole(1),
        "clips": whole(1),
        "stride": whole(1),
        "surplus": one_of(1),
        "train": one_of("x", "[1]"),
        "train.surplus": one_of("*"),
        "size.height": one_of(3),
    }


SMALL = {
    "--data.size": [16],
    "--data.digit_size": [8],
    "--context": [2],
    "--horizon": [1],
    "--steps": [1],
    "--batch_size": [1],
    "--val_every": [0],
    "--device": ["cpu"],
    "--out": ["run"],
}


def _train_wrong(things: Things, multiple: int) -> dict[str, Draw]:
    return {
        **{f"--data.{name}": draw for name, draw in _data_wrong(things, multiple).items()},
        **{f"--{name}": whole(1) for name in ("context", "steps", "batch_size", "keep", "val_clips")},
        **{f"--{name}": whole(0) for name in ("seed", "workers", "val_every", "save_every", "strip_every")},
        "--horizon": whole(1),
        "--patience": either(whole(1), one_of(3)),
        "--init": one_of("/nowhere", things.video, things.weights["hrvqvae"], things.weights["mspn"]),
        "--optim.lr": real(0, -1, "inf", "1e999"),
        "--optim.weight_decay": real(-1, "inf"),
        "--optim.clip_norm": real(0, -1, "inf"),
        "--optim.schedule": choice,
        "--optim.warmup": either(whole(0), one_of(2)),
        "--optim.accumulate": whole(1),
        "--optim.ema_decay": real(0, 1, -1, 2),
        "--optim": one_of("", "3", "[1]"),
        "--loss.norm": choice,
        "--loss.feedback": choice,
        "--loss.sampling_steps": whole(1),
        "--loss.feedback_range": one_of("3", "[1]", "[1, x]", "[1, 2, 3]"),
        "--adversarial.cap": whole(1),
        "--adversarial.lr": real(0, -1, "inf"),
        "--adversarial.channels": one_of("x", "[1]", "[1, -2]", "3"),
        "--adversarial.enabled": switch,
        "--precision": one_of("", "fp64", "fp16", "3"),
        "--channels_last": switch,
        "--tensorboard": switch,
        "--stage": either(choice, one_of("prior" if multiple == 2 else "priors")),
        "--stages.prior.surplus": one_of(1),
        "--stages.prior": one_of("x", "3", "[1]"),
        "--stages": one_of("x", "3"),
        "--model": one_of("x", "3", "[1]"),
        "--model.name": one_of("", "lstm", "3", "[1]", "{a: 1}"),
        "--model.preset": one_of("", "nonsense", "3", "[1]", "{a: 1}"),
        "--model.surplus": one_of(1),
        "--model.channels": one_of("", "x", "3", "[]", "[0]", "[x]", "[1.5]", "{a: 1}", f"[{2**70}, 1]"),
        "--model.in_channels": either(whole(1), one_of(3)),
        "--config": one_of("", "/nowhere", things.videos, things.video, "mspn/nothing"),
        "--resume": one_of("yes", "false"),
        "--dry-run": one_of("yes", "3"),
    }


def _train(things: Things) -> Command:
    small = {"--model.preset": ["compact"], "--model.channels": ["[4, 8]"], "--model.levels": [1]}
    wrong = {
        **_train_wrong(things, 2),
        "--model.levels": either(whole(1), one_of(2)),
        "--model.hidden_channels": whole(1),
        "--model.gate_order": one_of("", "fiof", "x", "3"),
        "--model.recurrence": choice,
        "--model.input_kernel_size": either(whole(1), one_of(2)),
    }
    clashes = [
        {"--data.kind": ["video-folder"]},
        {"--data.kind": ["video-folder"], "--data.root": [things.videos], "--data.size": ["[17, 24]"]},
        {"--data.kind": ["video-folder"], "--data.root": [things.videos], "--val_every": [1]},
        {"--data.kind": ["prepared"], "--data.root": [things.videos]},
        {"--data.kind": ["prepared"], "--data.root": [things.prepared], "--data.size": [32]},
        {"--data.size": ["[16, 32]"]},
        {"--data.size": [4]},
        {"--horizon": [0]},
        {"--adversarial.enabled": ["true"], "--optim.accumulate": [2]},
        {"--adversarial.upper_tolerance": [1], "--adversarial.lower_tolerance": [0.5]},
        {"--loss.feedback": ["random"], "--loss.feedback_range": ["[2, 9]"]},
        {"--stages.prior.steps": [3]},
        {"--resume": [], "--config": ["/nowhere"]},
    ]
    given = {**SMALL, **small, "--config": [things.config]}
    return Command(("train",), given, wrong, clashes=clashes, inputs={"--config": "config"}, out=("--out", "folder"))


def _train_in_stages(things: Things) -> Command:
    small = {"--model.name": ["shrvqvae"], "--model.preset": ["mnist-3x4"], "--model.channels": ["[4, 8]"]}
    wrong = {
        **_train_wrong(things, 4),
        "--model.layers": either(whole(1), one_of(17, 30)),
        "--model.codebook_size": either(whole(1), one_of(1, 10**9)),
        "--model.commitment_weight": real(-1, "inf", "[1, 2]"),
        "--model.prior_attention_every": either(whole(1), one_of(99)),
        "--model.conditioning": choice,
        "--stages.prior.steps": whole(1),
        "--stages.prior.optim.lr": real(0, -1, "inf"),
        "--stages.joint.data.size": listed_size("[18, 16]"),
        "--stages.autoencoder.horizon": one_of(1, "x"),
    }
    clashes = [
        {"--stage": ["prior"]},
        {"--stage": ["joint"], "--init": [things.weights["mspn"]]},
        {"--loss.norm": ["l2"]},
        {"--adversarial.enabled": ["true"]},
        {"--checkpoint_activations": ["true"]},
        {"--stages.prior.horizon": [0]},
        {"--stages.prior.model.layers": [2]},
        {"--stages.first.steps": [2]},
    ]
    return Command(("train",), {**SMALL, **small}, wrong, clashes=clashes, out=("--out", "folder"))


def _resume(things: Things) -> Command:
    return Command(
        ("train", "--resume"),
        {"--out": [things.run]},
        {"--steps": whole(1), "--optim.lr": real(0.5, 7), "--model.levels": one_of(3), "--context": one_of(5)},
        inputs={"--out": "run"},
        needed=("--out",),
    )


def _data(things: Things) -> Iterator[Command]:
    given = {"--src": [things.videos], "--out": ["set"], "--size": ["[16, 24]"], "--workers": [0]}
    written = {"out": ("--out", "folder"), "forced": True, "needed": ("--src", "--out")}
    yield Command(
        ("data", "prepare", "folder"),
        given,
        {
            "--size": listed_size("[16, 100000]", "[9000, 9000]", 2**70),
            "--fit": choice,
            "--channels": one_of(*_NO_WHOLE, 0, 2),
            "--workers": whole(0),
            "--train": one_of("[no/*]", "[test/*]"),
            "--test": one_of("[train/*]"),
            "--config": one_of("", "/nowhere", things.config),
        },
        inputs={"--src": "videos"},
        **written,
    )
    foreign = one_of(things.videos, things.frames, things.video, "/nowhere", "")
    for name in ("kth", "kitti", "caltech", "human36m", "moving-mnist"):
        yield Command(("data", "prepare", name), given, {"--src": foreign, "--fit": choice}, **written, served=False)
    yield Command(
        ("data", "check"),
        {"folder": [things.prepared], "--workers": [0]},
        {"--workers": whole(0)},
        inputs={"folder": "prepared"},
        needed=("folder",),
    )
    words = {"prepares": one_of("kth"), "--src": one_of("x"), "prepare": one_of("mnist", "--out")}
    yield Command(("data",), {}, words, served=False)


def _bench(things: Things) -> Iterator[Command]:
    yield Command(
        ("bench", "edlstm_gates", "--rehearse"),
        {"--no-growth": [], "--seconds": [0.01]},
        {
            "--device": one_of("", "gpu", "tpu"),
            "--seconds": real(0, -1, "inf", "1e999"),
            "--case": one_of("no such case"),
            "--out": one_of(things.video, things.video / "out"),
            "name": one_of("no-such", "edlstm", "", "../mspn"),
        },
        clashes=[{"--plot": []}, {"--compare": ["a"]}, {"--compare": [things.record, things.record]}],
    )
    yield Command(
        ("bench",),
        {"--compare": [things.record, things.record]},
        {"--compare": one_of("x")},
        clashes=[{"--list": []}, {"--plot": []}, {"--case": ["x"]}, {"--out": ["x"]}, {"name": ["mspn"]}],
    )
    yield Command(
        ("bench", "--compare", str(things.record)),
        {"after": [things.record]},
        {"--seconds": one_of(3)},
        inputs={"after": "record"},
        needed=("after",),
    )


def _demo(things: Things) -> Command:
    return Command(  # served, it takes minutes; other tests do
        ("demo",),
        {"--out": ["out"]},
        {"--scale": real(0, -1, "inf"), "--mnist": one_of("/nowhere", things.video, things.videos)},
        out=("--out", "folder"),
        served=False,
    )
