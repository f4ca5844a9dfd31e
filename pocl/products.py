"""Matrix products in float32 on the CPU, by oneDNN where MKL leaves half of the processor idle.

torch multiplies float32 matrices on the CPU with MKL, which has its AVX-512 kernels run on Intel's processors alone.
On an AMD EPYC (Zen 5, two cores) it reached 225 GFLOP/s where oneDNN, which torch brings along, reached 500; held to
AVX2, oneDNN reached 254, and with 16 rows 121 to MKL's 125. So ``use_fastest`` gives torch's own operators another
kernel there, and trunks, heads, backward passes and answers come to it without knowing.

oneDNN compiles a kernel for every shape, and a third to two thirds of a megabyte of each are never given back
(measured). Hardly two micro-batches have the same number of tokens, so that number is filled up to one of a few.
"""

import platform
import warnings
from pathlib import Path

import torch
from torch import DispatchKeySet, Tensor

CPUINFO = Path("/proc/cpuinfo")  # Linux: whose processor this is
_BLOCK = 1 << 19  # numbers that are copied at a time: what the caches hold

_library: torch.library.Library | None = None  # the kernels are in force while it lives


def onednn_is_better() -> bool:
    """Whether torch's products go through MKL on a processor that is not Intel's; a property of the machine alone."""
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.is_file():
        return False
    vendors = {line.split(":")[1].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("vendor_id")}
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "GenuineIntel" not in vendors


def use_fastest() -> None:
    """From now on, in this process, products are oneDNN's where that is better, and torch's own elsewhere."""
    (use_onednn if onednn_is_better() else use_torchs_own)()


def use_onednn() -> None:
    """From now on, in this process, products of float32 matrices on the CPU are oneDNN's."""
    global _library
    if _library is not None:
        return
    mm, addmm, addmm_ = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm", "addmm_"))

    def product(keys: DispatchKeySet, left: Tensor, right: Tensor) -> Tensor:
        """left @ right.  [M, K], [K, N] -> [M, N]."""
        return _multiply(left, right, None) if _fits(left, right) else mm.call_boxed(keys, left, right)

    def sum_with_product(
        keys: DispatchKeySet, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """beta * bias + alpha * left @ right.  [N] or another shape that spreads to [M, N], [M, K], [K, N]."""
        plain = bias.shape == right.shape[1:] and bias.dtype == torch.float32 and beta == alpha == 1
        if plain and _fits(left, right):
            return _multiply(left, right, bias)
        return addmm.call_boxed(keys, bias, left, right, beta=beta, alpha=alpha)

    def add_product(
        keys: DispatchKeySet, total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """beta * total + alpha * left @ right, in place.  [M, N], [M, K], [K, N]."""
        plain = total.dtype == torch.float32 and total.shape == (len(left), right.shape[1]) and alpha == 1
        if plain and beta in (0, 1) and _fits(left, right):
            return _multiply(left, right, None, total, keep=beta == 1)
        return addmm_.call_boxed(keys, total, left, right, beta=beta, alpha=alpha)

    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced, which is what is wanted
        warnings.simplefilter("ignore")
        _library.impl("mm", product, "CPU", with_keyset=True)
        _library.impl("addmm", sum_with_product, "CPU", with_keyset=True)
        _library.impl("addmm_", add_product, "CPU", with_keyset=True)


def use_torchs_own() -> None:
    """Take ``use_onednn`` back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _fits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these.  Other layouts of the right factor go to its slow reference kernel."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.numel() * right.numel() > 0
        and left.shape[1] == right.shape[0]  # else torch says what is wrong
        and (right.is_contiguous() or right.t().is_contiguous())
    )


def _multiply(
    left: Tensor, right: Tensor, bias: Tensor | None, total: Tensor | None = None, *, keep: bool = False
) -> Tensor:
    """left @ right + bias in shapes of which there are few (``_few``), written to ``total`` where there is one.

    ``keep`` adds it to what that holds.  [M, K], [K, N], [N], [M, N] -> [M, N].
    """
    if left.is_contiguous() or not left.t().is_contiguous():  # its rows are tokens
        product = _of_tokens(left, right, bias)
        return product if total is None else _put(total, product, keep=keep)
    # In a weight's gradient its columns are tokens. oneDNN would copy the whole of it: some rows at a time.
    (num_rows, inner), whole = left.shape, _few(left.shape[1])
    right = _with_rows(right, whole)
    total = left.new_empty(num_rows, right.shape[1]) if total is None else total
    rows = max(1, _BLOCK // whole)
    for start in range(0, num_rows, rows):
        piece = left[start : start + rows]
        filled = piece.new_empty(len(piece), whole)
        filled[:, :inner], filled[:, inner:] = piece, 0.0
        _put(total[start : start + rows], _linear(filled, right, bias), keep=keep)
    return total


def _put(total: Tensor, part: Tensor, *, keep: bool) -> Tensor:
    """Add ``part`` to ``total``, or overwrite it."""
    return total.add_(part) if keep else total.copy_(part)


def _of_tokens(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left @ right + bias, filled up below or, where that would copy much, in two parts.  [M, K], [K, N] -> [M, N]."""
    whole = len(left) // _step(len(left)) * _step(len(left))
    if whole in (0, len(left)) or left.shape[1] <= right.shape[1]:
        return _linear(_with_rows(left, _few(len(left))), right, bias)[: len(left)]
    rest = left[whole:]
    return torch.cat([_linear(left[:whole], right, bias), _of_tokens(rest, right, bias)])


def _few(count: int) -> int:
    """The next of the few numbers of tokens that products are made for."""
    return -(-count // _step(count)) * _step(count)


def _step(count: int) -> int:
    """How far these numbers lie apart."""
    return 8 if count <= 64 else 16 if count <= 256 else 64


def _with_rows(matrix: Tensor, num_rows: int) -> Tensor:
    """The matrix with zeros below.  [n, C] -> [num_rows, C]."""
    if len(matrix) == num_rows:
        return matrix
    longer = matrix.new_empty(num_rows, matrix.shape[1])
    longer[: len(matrix)], longer[len(matrix) :] = matrix, 0.0
    return longer


def _linear(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
