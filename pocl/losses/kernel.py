"""The Triton kernel of one response token: cross-entropy, divergence, and the gradient, which overwrites the logits.

``token.py`` computes the same in torch, with each divergence in ``divergences.py``; a test compares
them. torch's operations pass over a chunk's logits some thirty times in float32. Here one program handles the row of
one token and passes over it three times, in the precision of the logits: for the sums of both softmaxes, for the
divergence and the sum of its slope, and for the gradient. Only pocl/losses/fused.py imports this file, since Triton is
not available everywhere.
"""

# Triton reads annotations itself: they are its types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from pocl.losses.divergences import MAX_LOG_RATIO, MIN_SHIFTED

# Which divergence: 0 is cross-entropy alone, without a teacher.
NONE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, TOTAL_VARIATION, SKEW_FORWARD_KL, SKEW_REVERSE_KL = (
    tl.constexpr(number) for number in range(7)
)
_MIN_SHIFTED = tl.constexpr(MIN_SHIFTED)
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_LOWEST = tl.constexpr(-3.0e38)  # initial maximum: finite, so that a block of -inf gives no NaN


@triton.jit
def _read(row, places, num_entries, num_read):
    """The logits at some places of a row; -inf past its V entries."""
    logits = tl.load(row + places, places < num_read, other=float("-inf")).to(tl.float32)
    return tl.where(places < num_entries, logits, float("-inf"))


@triton.jit
def _shifted(logits, maximum, inverse_temperature):
    """(logits - maximum) / T, bounded below; NaN stays."""
    shifted = (logits - maximum) * inverse_temperature
    return tl.where(shifted < _MIN_SHIFTED, _MIN_SHIFTED, shifted)


@triton.jit
def _log_mixture_over(ratio, weight):
    """log(weight + (1 - weight) exp(ratio)), with the ratio bounded where an exponential would overflow."""
    bounded = tl.where(ratio > _MAX_LOG_RATIO, _MAX_LOG_RATIO, ratio)
    bounded = tl.where(bounded < -_MAX_LOG_RATIO, -_MAX_LOG_RATIO, bounded)
    return tl.log(weight + (1.0 - weight) * tl.exp(bounded))


@triton.jit
def _value_and_slope(q, p, log_q, ratio, parameter, KIND: tl.constexpr):
    """What each vocabulary entry adds to the divergence, and the slope: its derivative w.r.t. the student's log q.

    ``ratio`` is log(p / q).
    """
    if KIND == FORWARD_KL:
        return p * ratio, -p
    elif KIND == REVERSE_KL:
        slope = -q * ratio
        return slope, slope
    elif KIND == JENSEN_SHANNON:
        slope = (parameter - 1.0) * q * _log_mixture_over(ratio, 1.0 - parameter)
        return slope - parameter * p * _log_mixture_over(-ratio, parameter), slope
    elif KIND == TOTAL_VARIATION:
        difference = q - p
        sign = tl.where(difference > 0.0, 1.0, 0.0) - tl.where(difference < 0.0, 1.0, 0.0)
        return 0.5 * tl.abs(difference), 0.5 * sign * q
    elif KIND == SKEW_FORWARD_KL:
        over_p = _log_mixture_over(-ratio, parameter)
        return -p * over_p, (parameter - 1.0) * tl.exp(log_q - over_p)
    else:
        over_q = _log_mixture_over(ratio, parameter)
        return -q * over_q, -q * (parameter * tl.exp(-over_q) + over_q)


@triton.jit
def _terms(
    z,
    z_t,
    largest,
    largest_t,
    inverse_q,
    inverse_p,
    log_total_q,
    log_total_p,
    inverse_temperature,
    parameter,
    KIND: tl.constexpr,
):
    """(value, slope, q) of vocabulary entries, from both models' logits and the statistics of their softmaxes at T."""
    shifted = _shifted(z, largest, 1.0) * inverse_temperature  # bounded first, as in Softmax.tempered
    shifted_t = _shifted(z_t, largest_t, inverse_temperature)
    ratio = (shifted_t - shifted) - (log_total_p - log_total_q)
    q, p = tl.exp(shifted) * inverse_q, tl.exp(shifted_t) * inverse_p
    value, slope = _value_and_slope(q, p, shifted - log_total_q, ratio, parameter, KIND)
    return value, slope, q


@triton.jit
def token_objective(
    student,  # [N, V] logits; then their gradient
    teacher,  # [N, V] logits; not read if KIND is NONE
    labels,  # [N]
    divergence_weight,  # [N], r T^k
    cross_entropy_weight,  # [N], 1 - r
    loss,  # [N], written
    cross_entropy,  # [N], written
    divergence,  # [N], written
    student_stride,
    teacher_stride,
    num_entries,  # V
    num_read,  # V, or slightly more if rows are wider
    inverse_temperature,
    parameter,  # the divergence's own
    KIND: tl.constexpr,
    TEMPERED: tl.constexpr,  # whether T differs from 1
    CROSS_ENTROPY: tl.constexpr,  # whether it is part of the loss
    BLOCK: tl.constexpr,  # entries at a time
):
    """The row of one token; see ``pocl.losses.token.token_objective``."""
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    teacher += token * teacher_stride
    at_label = tl.load(student + tl.load(labels + token)).to(tl.float32)
    entries = tl.arange(0, BLOCK)

    largest = tl.full((), _LOWEST, tl.float32)
    largest_t = largest
    sum_1 = tl.zeros((BLOCK,), tl.float32)  # of the student at T = 1
    sum_q, sum_p = sum_1, sum_1  # of both at T
    for start in range(0, num_entries, BLOCK):
        z = _read(student, start + entries, num_entries, num_read)
        before, largest = largest, tl.maximum(largest, tl.max(z, 0))
        sum_1 = sum_1 * tl.exp(before - largest) + tl.exp(z - largest)
        if TEMPERED:
            sum_q = sum_q * tl.exp((before - largest) * inverse_temperature)
            sum_q += tl.exp((z - largest) * inverse_temperature)
        if KIND != NONE:
            z = _read(teacher, start + entries, num_entries, num_read)
            before, largest_t = largest_t, tl.maximum(largest_t, tl.max(z, 0))
            sum_p = sum_p * tl.exp((before - largest_t) * inverse_temperature)
            sum_p += tl.exp((z - largest_t) * inverse_temperature)
    total_1 = tl.sum(sum_1, 0)
    inverse_1 = 1.0 / total_1
    total_q = tl.sum(sum_q, 0) if TEMPERED else total_1
    inverse_q, log_total_q = 1.0 / total_q, tl.log(total_q)

    value_ce = tl.log(total_1) - _shifted(at_label, largest, 1.0)
    tl.store(cross_entropy + token, value_ce)
    if KIND == NONE:
        weight_d, weight_ce, share = 0.0, 1.0, 0.0
        inverse_p, log_total_p = 1.0, 0.0
        tl.store(loss + token, value_ce)
        tl.store(divergence + token, 0.0)
    else:
        total_p = tl.sum(sum_p, 0)
        inverse_p, log_total_p = 1.0 / total_p, tl.log(total_p)
        values = tl.zeros((BLOCK,), tl.float32)
        slopes = values
        for start in range(0, num_entries, BLOCK):
            z = _read(student, start + entries, num_entries, num_read)
            z_t = _read(teacher, start + entries, num_entries, num_read)
            value, slope, _ = _terms(
                z,
                z_t,
                largest,
                largest_t,
                inverse_q,
                inverse_p,
                log_total_q,
                log_total_p,
                inverse_temperature,
                parameter,
                KIND,
            )
            values += value
            slopes += slope
        value_d, share = tl.sum(values, 0), tl.sum(slopes, 0)
        weight_d = tl.load(divergence_weight + token)
        weighted = weight_d * value_d
        weight_ce = 0.0
        if CROSS_ENTROPY:
            weight_ce = tl.load(cross_entropy_weight + token)
            weighted += weight_ce * value_ce
        tl.store(loss + token, weighted)
        tl.store(divergence + token, value_d)

    label = tl.load(labels + token)
    weight_d *= inverse_temperature
    for start in range(0, num_entries, BLOCK):
        z = _read(student, start + entries, num_entries, num_read)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if KIND != NONE:
            z_t = _read(teacher, start + entries, num_entries, num_read)
            _, slope, q = _terms(
                z,
                z_t,
                largest,
                largest_t,
                inverse_q,
                inverse_p,
                log_total_q,
                log_total_p,
                inverse_temperature,
                parameter,
                KIND,
            )
            gradient = weight_d * (slope - q * share)
        if CROSS_ENTROPY:
            at_one = tl.exp(_shifted(z, largest, 1.0)) * inverse_1
            gradient += weight_ce * (at_one - tl.where(start + entries == label, 1.0, 0.0))
        tl.store(student + start + entries, gradient.to(student.dtype.element_ty), start + entries < num_read)
