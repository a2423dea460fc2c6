"""Recurrent modules that a rewrite morphs torch's own into; public, so that pickles load."""

from rnnguard.nn.output_norm import OutputNormGRU as OutputNormGRU
from rnnguard.nn.output_norm import OutputNormLSTM as OutputNormLSTM
from rnnguard.nn.output_norm import OutputNormRNN as OutputNormRNN
from rnnguard.nn.tracing import Tracer as Tracer
