"""Drop-in modules: recurrent cells, a vector quantizer, and causal attention and convolution over (t, y, x)."""

from vpfast.nn.convlstm import ConvLSTMCell
from vpfast.nn.edlstm import EDLSTMCell
from vpfast.nn.enc_lstm_dec import EncLSTMDecCell
from vpfast.nn.hierarchical_residual_vq import HierarchicalResidualVQ
from vpfast.nn.masked_attention3d import AttentionCache, MaskedAttention3d
from vpfast.nn.masked_conv3d import MaskedConv3d
from vpfast.nn.positions import sinusoidal_positions

__all__ = [
    "AttentionCache",
    "ConvLSTMCell",
    "EDLSTMCell",
    "EncLSTMDecCell",
    "HierarchicalResidualVQ",
    "MaskedAttention3d",
    "MaskedConv3d",
    "sinusoidal_positions",
]
