"""The remedies, one file each; this tuple is the only place where they are registered."""

from rnnguard.remedies.adamw import ADAMW
from rnnguard.remedies.amsgrad import AMSGRAD
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.clip_gradient import CLIP_GRADIENT
from rnnguard.remedies.critical_gain import CRITICAL_GAIN
from rnnguard.remedies.layer_norm import LAYER_NORM
from rnnguard.remedies.nonfinite_guard import NONFINITE_GUARD
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.recurrent_gain import RECURRENT_GAIN
from rnnguard.remedies.remedy import Remedy
from rnnguard.remedies.uniform_gate_bias import UNIFORM_GATE_BIAS
from rnnguard.remedies.variance_scaling import VARIANCE_SCALING
from rnnguard.remedies.warmup_cosine import WARMUP_COSINE
from rnnguard.remedies.written_chrono_bias import WRITTEN_CHRONO_BIAS
from rnnguard.remedies.written_critical_gain import WRITTEN_CRITICAL_GAIN
from rnnguard.remedies.written_orthogonal import WRITTEN_ORTHOGONAL

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
    LAYER_NORM,
    WRITTEN_ORTHOGONAL,
    WRITTEN_CHRONO_BIAS,
    WRITTEN_CRITICAL_GAIN,
)
