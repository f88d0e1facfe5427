# Programs that run the CUDA kernels on the CPU and compare them with float64; they need g++ only, no CUDA.
add_library(emulator OBJECT cuda/emulator.cpp cuda/emulator_memory.cpp cuda/emulator_warp.cpp)
foreach(program rows_check)
  add_executable(${program} cuda/${program}.cpp)
  target_link_libraries(${program} PRIVATE kernels emulator Threads::Threads)
endforeach()
