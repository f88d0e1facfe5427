# The CUDA side of the library, or what stands in for it in a build without CUDA (find.cmake has looked).
if(NOT cuda_architectures)
  target_sources(qcompile_kernels PRIVATE cuda/no_cuda.cpp)
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the library loads where there is no CUDA at all
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
string(APPEND CMAKE_CUDA_FLAGS " --expt-relaxed-constexpr")  # kernels share constexpr functions with the host
string(APPEND CMAKE_CUDA_FLAGS " -Xcompiler=-Wno-unknown-pragmas")  # of which g++ sees `unroll`
# Kernels over their budget fail the build. Behind a launcher that the user has set, such as ccache.
set(budget "${CMAKE_CURRENT_LIST_DIR}/budget.sh" "${CMAKE_CURRENT_LIST_DIR}/budgets.txt")
list(APPEND CMAKE_CUDA_COMPILER_LAUNCHER sh ${budget})
set_source_files_properties(cuda/decode.cu cuda/rows.cu cuda/hopper.cu PROPERTIES OBJECT_DEPENDS "${budget}")

string(REPLACE "-real" "" listed "${cuda_architectures}")
string(REPLACE ";" "," listed "${listed}")
add_library(cuda_kernels OBJECT cuda/decode.cu cuda/rows.cu cuda/weight.cpp cuda/machine.cpp cuda/cublas.cpp
            cuda/operators.cpp cuda/device_c_api.cpp)
add_library(cuda_hopper OBJECT cuda/hopper.cu)
if(cuda_hopper_architectures)  # elsewhere its kernels are empty, and nothing may choose them
  set_target_properties(cuda_hopper PROPERTIES CUDA_ARCHITECTURES "${cuda_hopper_architectures}")
  target_compile_definitions(cuda_kernels PRIVATE QCOMPILE_CUDA_HOPPER=1)
endif()
foreach(target cuda_kernels cuda_hopper)
  target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${target} PRIVATE "QCOMPILE_CUDA_ARCHITECTURES=\"${listed}\"")
endforeach()
target_compile_definitions(qcompile_kernels PRIVATE QCOMPILE_CUDA=1)
target_link_libraries(qcompile_kernels PRIVATE cuda_kernels cuda_hopper)
