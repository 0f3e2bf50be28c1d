"""Drop-in modules: recurrent cells and a vector quantizer, each with its hot path in one fused kernel."""

from vpfast.nn.convlstm import ConvLSTMCell
from vpfast.nn.edlstm import EDLSTMCell
from vpfast.nn.enc_lstm_dec import EncLSTMDecCell
from vpfast.nn.hierarchical_residual_vq import HierarchicalResidualVQ

__all__ = ["ConvLSTMCell", "EDLSTMCell", "EncLSTMDecCell", "HierarchicalResidualVQ"]
