# Programs that run the CUDA kernels on the CPU and compare them with float64; they need g++ only, no CUDA.
