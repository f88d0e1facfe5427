# Whether the library gets its kernels for the CUDA provider, and for which architectures.
#
# Sets cuda_architectures and, of those, cuda_hopper_architectures; empty where there is nothing to build.
set(QCOMPILE_CUDA AUTO CACHE STRING "Kernels for the CUDA provider: AUTO (where nvcc works), ON (an error if not), OFF")
set_property(CACHE QCOMPILE_CUDA PROPERTY STRINGS AUTO ON OFF)
# Machine code for Ampere, Ada and Hopper, PTX for what came later. The Hopper kernel needs 90a, which nothing else runs.
set(QCOMPILE_CUDA_ARCHITECTURES "80-real;86-real;89-real;90a-real;90-virtual" CACHE STRING
    "Architectures of the CUDA kernels, as in CMAKE_CUDA_ARCHITECTURES")

# For a reason not to build: an error with ON, a message of this kind with AUTO.
macro(without_cuda kind reason)
  if(QCOMPILE_CUDA STREQUAL "AUTO")
    message(${kind} "built without kernels for the CUDA provider: ${reason}")
  else()
    message(FATAL_ERROR "QCOMPILE_CUDA=${QCOMPILE_CUDA}, but ${reason}")
  endif()
  return()
endmacro()

set(cuda_architectures "")
set(cuda_hopper_architectures "")
if(NOT QCOMPILE_CUDA)
  return()
elseif(QCOMPILE_SANITIZE)
  without_cuda(STATUS "the sanitizers do not go with nvcc")
elseif(CMAKE_CROSSCOMPILING)
  without_cuda(STATUS "this build is for another machine")
endif()

set(nvcc "$ENV{CUDACXX}")
if(NOT nvcc)
  find_program(QCOMPILE_NVCC nvcc PATHS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(QCOMPILE_NVCC)
  set(nvcc "${QCOMPILE_NVCC}")
endif()
if(NOT nvcc AND NOT CMAKE_CUDA_COMPILER)
  without_cuda(STATUS "no nvcc found")
elseif(NOT CMAKE_CUDA_COMPILER)  # an earlier run may have found none
  unset(CMAKE_CUDA_COMPILER CACHE)
  unset(CMAKE_CUDA_COMPILER)
  set(ENV{CUDACXX} "${nvcc}")
  check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  without_cuda(WARNING "${nvcc} compiles nothing (see CMakeError.log in the build folder)")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${QCOMPILE_CUDA_ARCHITECTURES})
enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  without_cuda(WARNING "${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}, not nvcc 12 "
                       "or newer")
endif()
set(cuda_architectures ${QCOMPILE_CUDA_ARCHITECTURES})
set(cuda_hopper_architectures ${QCOMPILE_CUDA_ARCHITECTURES})
list(FILTER cuda_hopper_architectures INCLUDE REGEX "^90a")
