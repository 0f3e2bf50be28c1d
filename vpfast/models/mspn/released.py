"""Checkpoints of the MSPN authors' released code: their names, their shapes, and what of them is never used."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vpfast.models.mspn.config import MSPNConfig

GATE_ORDER = "ifog"

# This package's names within a level -> theirs, applied in turn. {s} is an encoder or decoder stage.
_EDLSTM_NAMES = (
    (r"^head\.", "out_conv.0."),
    (r"^cell\.share\.", "en_decoder.Merge_Hidden.0."),
    (r"^cell\.(encoder|decoder)\.", r"en_decoder.\1."),
)
_ENC_LSTM_DEC_NAMES = (
    (r"^cell\.gates\.", "lstm_conv.0."),
    (r"^cell\.out\.", "lstm_out_conv.0."),
    (r"^cell\.(encoder|decoder)\.", r"\1."),
)
_CODEC_NAMES = (
    (r"encoder\.stem\.", "in_conv.0."),
    (r"encoder\.stages\.(\d+)\.before\.", r"encoder\1.0."),
    (r"encoder\.stages\.(\d+)\.after\.", r"encoder\1.2."),
    (r"decoder\.stages\.(\d+)\.before\.", r"upsample\1.0."),
    (r"decoder\.stages\.(\d+)\.after\.", r"upsample\1.2."),
    (r"decoder\.stages\.(\d+)\.merge\.", r"merge_conv\1.0."),
)
_BOTTLENECK_NAMES = ((r"\bbody\.", "bottleneck."), (r"\bskip\.", "res."))
_DISCRIMINATOR_NAMES = (
    (r"^first\.", "layer1."),
    (r"^last\.", "full_conv."),
    (r"^score\.", "linear."),
)


def convert_network(released: Mapping[str, Tensor], own: Mapping[str, Tensor], config: MSPNConfig) -> dict[str, Tensor]:
    """Released tensors under the names of ``own``, an MSPN's state dict. Raises as ``MSPN.load_released``."""
    names = {key: _network_name(key, config) for key in own}
    state = _convert(released, own, names, _never_used(config))
    for key, name in names.items():
        if ".en_decoder.out_conv." in name or ".lstm_conv." in name:
            state[key] = _reorder_gates(state[key], config.gate_order)
    return state


def convert_discriminator(released: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors under the names of ``own``, a Discriminator's state dict."""
    names = {}
    for key in own:
        name = _rename(key, (*_DISCRIMINATOR_NAMES, *_BOTTLENECK_NAMES))
        # Their Bottlenecks and max pools stand in one sequence: every second entry has weights.
        names[key] = re.sub(r"^blocks\.(\d+)\.", lambda match: f"conv.{2 * int(match[1])}.", name)
    return _convert(released, own, names, frozenset())


def _network_name(key: str, config: MSPNConfig) -> str:
    _, index, rest = key.split(".", 2)
    level, stages = int(index), len(config.level_channels(int(index))) - 1
    # The last merging convolution makes the cell's output; what they call by its name is never used.
    rest = re.sub(rf"decoder\.stages\.{stages - 1}\.merge\.", "decoder.out_conv.0.", rest)
    names = _EDLSTM_NAMES if config.recurrence == "edlstm" else _ENC_LSTM_DEC_NAMES
    rest = _rename(rest, (*names, *_CODEC_NAMES, *_BOTTLENECK_NAMES)).replace("decoder.out_conv.", "out_conv.", 1)
    if not config.batch_norm:
        rest = rest.replace(".res.0.", ".res.")
    return f"{_level_name(level, config)}.{rest}"


def _level_name(level: int, config: MSPNConfig) -> str:
    if level == 0:
        return "EHcell"
    return "ELcell" if level == config.levels - 1 else f"ELHcell{level}"


def _never_used(config: MSPNConfig) -> frozenset[str]:
    """Names that the released code registers and does not use in its graph."""
    codec = "en_decoder." if config.recurrence == "edlstm" else ""
    names = set()
    for level in range(config.levels):
        prefix = f"{_level_name(level, config)}.{codec}"
        last = len(config.level_channels(level)) - 2
        names |= {f"{prefix}scale", f"{prefix}merge_conv{last}.0.weight", f"{prefix}merge_conv{last}.0.bias"}
        if config.recurrence == "enc_lstm_dec":
            names.add(f"{prefix}Merge_Hidden.0.weight")
    return frozenset(names)


def _reorder_gates(tensor: Tensor, order: str) -> Tensor:
    part = dict(zip(GATE_ORDER, tensor.chunk(4), strict=True))
    return torch.cat([part[gate] for gate in order])


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _convert(
    released: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Mapping[str, str], never_used: frozenset[str]
) -> dict[str, Tensor]:
    found = _without_prefix(released)
    state = {}
    for key, needed in own.items():
        name = names[key]
        if name not in found:
            raise ValueError(f"the checkpoint lacks {name!r}, needed with shape {tuple(needed.shape)}")
        if found[name].shape != needed.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(found[name].shape)} in the checkpoint, but this network needs "
                f"{tuple(needed.shape)}: it was built with other widths, levels or options"
            )
        state[key] = found[name]
    for name in sorted(found.keys() - set(names.values()) - never_used):
        raise ValueError(
            f"the checkpoint holds {name!r} of shape {tuple(found[name].shape)}, which this network does not have: it "
            "was built with other levels or options"
        )
    return state


def _without_prefix(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(released, Mapping):
        raise TypeError(f"a released checkpoint is a mapping of names to tensors, got {type(released).__name__}")
    for key, value in released.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"a released checkpoint is a mapping of names to tensors, but {key!r} is {type(value).__name__}; pass "
                "the state dict inside it"
            )
    return {key.removeprefix("module."): value for key, value in released.items()}
