# Programs that run the CUDA kernels on the CPU and compare them with float64; they need g++ only, no CUDA.
add_library(emulator OBJECT cuda/emulator/emulator.cpp cuda/emulator/emulator_memory.cpp cuda/emulator/emulator_warp.cpp
            cuda/emulator/emulator_sm90.cpp cuda/emulator/emulator_wgmma.cpp)
# What these programs call of the host side; the kernels of CPUs, which take longest to compile, are not among it.
add_library(host OBJECT packing.cpp cuda/pack.cpp cuda/plan.cpp)
foreach(program cuda_check rows_check cuda_check_sm90)
  add_executable(${program} cuda/checks/${program}.cpp)
  target_link_libraries(${program} PRIVATE host emulator Threads::Threads)
endforeach()

# The CUDA operators for ONNX Runtime's CPU provider, on an emulated device: for tests/runtime/cuda/test_operators.py.
add_library(operators_check SHARED cuda/checks/operators_check.cpp cuda/emulator/emulated/launches.cpp
            cuda/emulator/emulated/runtime.cpp
            cuda/weight.cpp cuda/machine.cpp cuda/operators.cpp cuda/device_c_api.cpp cuda/host_c_api.cpp cuda/pack.cpp
            cuda/plan.cpp custom_op.cpp node.cpp)
target_include_directories(operators_check PRIVATE cuda/emulator/emulated)
target_compile_definitions(operators_check PRIVATE QCOMPILE_CUDA_HOPPER=1
                           "QCOMPILE_CUDA_ARCHITECTURES=\"emulated\"")
target_link_libraries(operators_check PRIVATE emulator Threads::Threads)

# Weights and their products whole, on the same device; a libcublas.so.13 beside the program stands for cuBLAS.
add_library(emulated_cublas SHARED EXCLUDE_FROM_ALL cuda/emulator/emulated/cublas.cpp)
set_target_properties(emulated_cublas PROPERTIES OUTPUT_NAME cublas SOVERSION 13 LIBRARY_OUTPUT_DIRECTORY emulated)
add_executable(weight_check cuda/checks/weight_check.cpp cuda/weight.cpp cuda/machine.cpp cuda/cublas.cpp
               cuda/emulator/emulated/launches.cpp cuda/emulator/emulated/runtime.cpp)
target_include_directories(weight_check PRIVATE cuda/emulator/emulated)
target_link_libraries(weight_check PRIVATE host emulator Threads::Threads ${CMAKE_DL_LIBS})
set_target_properties(weight_check PROPERTIES BUILD_RPATH "$<TARGET_FILE_DIR:emulated_cublas>")
add_dependencies(weight_check emulated_cublas)
