"""Recurrent modules that a rewrite morphs torch's own into; public, so that pickles load."""

from rnnguard.nn.attention_readout import AttentionReadout as AttentionReadout
from rnnguard.nn.between_layers import BetweenLayers as BetweenLayers
from rnnguard.nn.bounded_rnn import BoundedRNN as BoundedRNN
from rnnguard.nn.fused import FusedGRU as FusedGRU
from rnnguard.nn.fused import FusedLSTM as FusedLSTM
from rnnguard.nn.fused import FusedRNN as FusedRNN
from rnnguard.nn.gate_last_gru import GateLastGRU as GateLastGRU
from rnnguard.nn.gated_rnn import GatedRNN as GatedRNN
from rnnguard.nn.indrnn import IndRNN as IndRNN
from rnnguard.nn.layer_norm_cells import LayerNormGRU as LayerNormGRU
from rnnguard.nn.layer_norm_cells import LayerNormLSTM as LayerNormLSTM
from rnnguard.nn.layer_norm_cells import LayerNormRNN as LayerNormRNN
from rnnguard.nn.output_norm import OutputNormGRU as OutputNormGRU
from rnnguard.nn.output_norm import OutputNormLSTM as OutputNormLSTM
from rnnguard.nn.output_norm import OutputNormRNN as OutputNormRNN
from rnnguard.nn.recurrent_weights import DropConnect as DropConnect
from rnnguard.nn.recurrent_weights import Orthogonal as Orthogonal
from rnnguard.nn.recurrent_weights import SpectralBound as SpectralBound
from rnnguard.nn.recurrent_weights import WeightNorm as WeightNorm
from rnnguard.nn.residual_rnn import ResidualRNN as ResidualRNN
from rnnguard.nn.retention_penalty import PenalizedRNN as PenalizedRNN
from rnnguard.nn.retention_penalty import RetentionPenalty as RetentionPenalty
from rnnguard.nn.tracing import Tracer as Tracer
from rnnguard.nn.zoneout import ZoneoutGRU as ZoneoutGRU
from rnnguard.nn.zoneout import ZoneoutLSTM as ZoneoutLSTM
