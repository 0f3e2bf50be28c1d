"""Drop-in recurrent modules, each with its gating in one fused kernel."""

from vpfast.nn.convlstm import ConvLSTMCell
from vpfast.nn.edlstm import EDLSTMCell
from vpfast.nn.enc_lstm_dec import EncLSTMDecCell

__all__ = ["ConvLSTMCell", "EDLSTMCell", "EncLSTMDecCell"]
