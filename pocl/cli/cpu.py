"""Float32 matrix products on the CPU, with oneDNN where MKL leaves half of the processor idle.

torch multiplies float32 matrices on the CPU with MKL, which runs its AVX-512 kernels on Intel's processors only. On an
AMD EPYC (Zen 5, two cores) it reached 225 GFLOP/s where oneDNN, which ships with torch, reached 500; limited to AVX2,
oneDNN reached 254, and with 16 rows 121 to MKL's 125. So ``use_fastest`` replaces the kernels of torch's own operators
there, and trunks, heads, backward passes and generation use them without any change.

oneDNN compiles a kernel for every shape and keeps those of the last 1,024, about half a megabyte each, scattered over
the heap; hardly any two micro-batches have the same number of tokens, so 400 of them took up 1.3 GB for good.
A new kernel takes a quarter of a millisecond, so few are kept; 400 micro-batches then took about 0.1 GB.

A call of oneDNN's takes some 20 microseconds more than one of torch's, more where the kernel is new, so small products
stay torch's. On another EPYC (Zen 4, one thread), microseconds of torch's and of oneDNN's x @ w + b, where each shape
is new and used four times, for [M, K] x [K, N]: 46 and 164 (400, 64, 64), 154 and 177 (400, 64, 256), 399 and 393
(400, 128, 384), 615 and 651 (400, 256, 256), 2,330 and 2,113 (400, 256, 1024), 7,721 and 7,221 (400, 576, 1536).
"""

import os
import platform
import warnings
from pathlib import Path

import torch
from torch import DispatchKeySet, Tensor

CPUINFO = Path("/proc/cpuinfo")  # Linux: names the processor's vendor
_LEAST = 1 << 24  # multiplications of a product that is worth a call of oneDNN's
_BLOCK = 1 << 19  # elements copied at a time: what the caches hold
# oneDNN's kernel cache, and torch's own cache on top of it. 24 are more than a layer has, and were 1 to 4 % slower
# than 64 in training, not slower in generation, with less scattered over the heap.
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24", "LRU_CACHE_CAPACITY": "1"}

_library: torch.library.Library | None = None  # the kernels stay registered while it lives


def onednn_is_better() -> bool:
    """Whether torch's matmuls go through MKL on a processor that is not Intel's; POCL_ONEDNN=0 says no.

    A property of the machine alone, so that a resumed run computes the same.
    """
    if os.environ.get("POCL_ONEDNN") == "0":
        return False
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.is_file():
        return False
    vendors = {line.split(":")[1].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("vendor_id")}
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "GenuineIntel" not in vendors


def use_fastest() -> None:
    """From now on, in this process, use oneDNN's matmuls where they are better, and torch's own elsewhere."""
    (use_onednn if onednn_is_better() else use_torchs_own)()


def in_use() -> str:
    """The library of this process's CPU matmuls, for records: torch or oneDNN."""
    return "torch" if _library is None else "oneDNN"


def use_onednn() -> None:
    """From now on, in this process, use oneDNN for float32 matmuls on the CPU."""
    global _library
    if _library is not None:
        return
    for name, value in _CACHES.items():  # read at the first matmul
        os.environ.setdefault(name, value)
    mm, addmm, addmm_ = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm", "addmm_"))

    def product(keys: DispatchKeySet, left: Tensor, right: Tensor) -> Tensor:
        """left @ right.  [M, K], [K, N] -> [M, N]."""
        if _fits(left, right):
            return _multiply(left, right, None)
        result: Tensor = mm.call_boxed(keys, left, right)
        return result

    def sum_with_product(
        keys: DispatchKeySet, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """beta * bias + alpha * left @ right.  [N] or another shape that broadcasts to [M, N], [M, K], [K, N]."""
        plain = bias.shape == right.shape[1:] and bias.dtype == torch.float32 and beta == alpha == 1
        if plain and _fits(left, right):
            return _multiply(left, right, bias)
        result: Tensor = addmm.call_boxed(keys, bias, left, right, beta=beta, alpha=alpha)
        return result

    def add_product(
        keys: DispatchKeySet, total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """beta * total + alpha * left @ right, in place.  [M, N], [M, K], [K, N]."""
        plain = total.dtype == torch.float32 and total.shape == (len(left), right.shape[1]) and alpha == 1
        if plain and beta in (0, 1) and _fits(left, right):
            return _multiply(left, right, None, total, keep=beta == 1)
        result: Tensor = addmm_.call_boxed(keys, total, left, right, beta=beta, alpha=alpha)
        return result

    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced, which is intended
        warnings.simplefilter("ignore")
        _library.impl("mm", product, "CPU", with_keyset=True)
        _library.impl("addmm", sum_with_product, "CPU", with_keyset=True)
        _library.impl("addmm_", add_product, "CPU", with_keyset=True)


def use_torchs_own() -> None:
    """Undo ``use_onednn``."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _fits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these.  Other layouts of the right factor would hit its slow reference kernel."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[1] >= _LEAST
        and left.shape[1] == right.shape[0]  # else torch reports the error
        and (right.is_contiguous() or right.t().is_contiguous())
    )


def _multiply(
    left: Tensor, right: Tensor, bias: Tensor | None, total: Tensor | None = None, *, keep: bool = False
) -> Tensor:
    """left @ right + bias, written to ``total`` if given; ``keep`` adds to what that holds.

    [M, K], [K, N], [N], [M, N] -> [M, N].
    """
    if left.is_contiguous() or not left.t().is_contiguous():
        product = _linear(left, right, bias)
        return product if total is None else _put(total, product, keep=keep)
    # In a weight's gradient the left factor is transposed. oneDNN would copy all of it, so take some rows at a time.
    total = left.new_empty(len(left), right.shape[1]) if total is None else total
    rows = max(1, _BLOCK // left.shape[1])
    for start in range(0, len(left), rows):
        block = slice(start, start + rows)
        _put(total[block], _linear(left[block].contiguous(), right, bias), keep=keep)
    return total


def _put(total: Tensor, part: Tensor, *, keep: bool) -> Tensor:
    """Add ``part`` to ``total``, or overwrite it."""
    return total.add_(part) if keep else total.copy_(part)


def _linear(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return product
