# Programs that run the CUDA kernels on the CPU and compare them with float64; they need g++ only, no CUDA.
add_library(emulator OBJECT cuda/emulator.cpp cuda/emulator_memory.cpp cuda/emulator_warp.cpp cuda/emulator_sm90.cpp
            cuda/emulator_wgmma.cpp)
foreach(program cuda_check rows_check cuda_check_sm90)
  add_executable(${program} cuda/${program}.cpp)
  target_link_libraries(${program} PRIVATE kernels emulator Threads::Threads)
endforeach()
