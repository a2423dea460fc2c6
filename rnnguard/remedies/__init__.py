"""The remedies, one file each; this tuple is the only place where they are registered."""

from rnnguard.remedies.adamw import ADAMW
from rnnguard.remedies.amsgrad import AMSGRAD
from rnnguard.remedies.attention_readout import ATTENTION_READOUT
from rnnguard.remedies.bounded_rnn import BOUNDED_RNN
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.clip_gradient import CLIP_GRADIENT
from rnnguard.remedies.critical_gain import CRITICAL_GAIN
from rnnguard.remedies.gate_last_gru import GATE_LAST_GRU
from rnnguard.remedies.gated_rnn import GATED_RNN
from rnnguard.remedies.gradient_flossing import GRADIENT_FLOSSING
from rnnguard.remedies.indrnn import INDRNN
from rnnguard.remedies.layer_norm import LAYER_NORM
from rnnguard.remedies.layer_norm_between import LAYER_NORM_BETWEEN
from rnnguard.remedies.layer_norm_inside import LAYER_NORM_INSIDE
from rnnguard.remedies.nonfinite_guard import NONFINITE_GUARD
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.orthogonal_parametrization import ORTHOGONAL_PARAMETRIZATION
from rnnguard.remedies.recurrent_gain import RECURRENT_GAIN
from rnnguard.remedies.remedy import Remedy
from rnnguard.remedies.residual import RESIDUAL
from rnnguard.remedies.residual_rnn import RESIDUAL_RNN
from rnnguard.remedies.retention_penalty import RETENTION_PENALTY
from rnnguard.remedies.spectral_bound import SPECTRAL_BOUND
from rnnguard.remedies.uniform_gate_bias import UNIFORM_GATE_BIAS
from rnnguard.remedies.variance_scaling import VARIANCE_SCALING
from rnnguard.remedies.variational_dropout import VARIATIONAL_DROPOUT
from rnnguard.remedies.warmup_cosine import WARMUP_COSINE
from rnnguard.remedies.weight_drop import WEIGHT_DROP
from rnnguard.remedies.weight_norm import WEIGHT_NORM
from rnnguard.remedies.written_chrono_bias import WRITTEN_CHRONO_BIAS
from rnnguard.remedies.written_critical_gain import WRITTEN_CRITICAL_GAIN
from rnnguard.remedies.written_orthogonal import WRITTEN_ORTHOGONAL
from rnnguard.remedies.zoneout import ZONEOUT

REMEDIES: tuple[Remedy, ...] = (
    CLIP_GRADIENT,
    NONFINITE_GUARD,
    WARMUP_COSINE,
    AMSGRAD,
    ADAMW,
    ORTHOGONAL,
    CHRONO_BIAS,
    UNIFORM_GATE_BIAS,
    RECURRENT_GAIN,
    CRITICAL_GAIN,
    VARIANCE_SCALING,
    GRADIENT_FLOSSING,
    WRITTEN_ORTHOGONAL,
    WRITTEN_CHRONO_BIAS,
    WRITTEN_CRITICAL_GAIN,
    LAYER_NORM,
    LAYER_NORM_BETWEEN,
    RESIDUAL,
    VARIATIONAL_DROPOUT,
    WEIGHT_DROP,
    WEIGHT_NORM,
    ORTHOGONAL_PARAMETRIZATION,
    SPECTRAL_BOUND,
    ATTENTION_READOUT,
    LAYER_NORM_INSIDE,
    ZONEOUT,
    RETENTION_PENALTY,
    RESIDUAL_RNN,
    BOUNDED_RNN,
    INDRNN,
    GATED_RNN,
    GATE_LAST_GRU,
)
