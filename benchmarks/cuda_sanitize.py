"""A few products of every route, for compute-sanitizer: small, without torch's caching allocator hiding bad accesses.

compute-sanitizer --tool memcheck python benchmarks/cuda_sanitize.py build/cuda/libqcompile_kernels.so
"""

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own, whose ends are watched

import torch
from cuda_harness import CHOSEN, CudaError, DeviceWeight, Library, Shape, Weight, torch_dtype

SHAPES = (Shape(1000, 333, 128), Shape(512, 130, 32, element="bf16"), Shape(640, 192, 64, bits=8, element="fp32"))
ROWS = (1, 9, 40, 130)


def main() -> None:
    library, products = Library(sys.argv[1]), 0
    for shape in SHAPES:
        weight = DeviceWeight(library, Weight(shape, zero_points=True))
        for m in ROWS:
            x = torch.ones(m, shape.k, device="cuda", dtype=torch_dtype(shape.element))
            y = torch.empty(m, shape.n, device="cuda", dtype=x.dtype)
            for route in CHOSEN:
                try:
                    wanted, _ = weight.scratch(m, route)
                except CudaError:
                    continue  # no Hopper kernel for this device
                scratch = torch.empty(max(wanted, 1), device="cuda", dtype=torch.uint8)
                weight.multiply(x, y, scratch, route=route)
                torch.cuda.synchronize()
                products += 1
    print(f"{products} products")


if __name__ == "__main__":
    main()
