# Builds llama.cpp with native/llama_cpp.py while configuring, and defines the imported target `llama_cpp`.
#
# A separate build, not add_subdirectory: its result is cached across build directories and virtual environments, so
# the minutes of compiling are spent once.

find_package(Python3 3.10 COMPONENTS Interpreter REQUIRED)

set(ENTMTP_LLAMA_ARGS
    build
    --cmake "${CMAKE_COMMAND}"
    --generator "${CMAKE_GENERATOR}"
    --make-program "${CMAKE_MAKE_PROGRAM}"
    "-DCMAKE_BUILD_TYPE=${ENTMTP_LLAMA_BUILD_TYPE}"
)
if (ENTMTP_CACHE)
    list(APPEND ENTMTP_LLAMA_ARGS --cache "${ENTMTP_CACHE}")
endif()
if (ENTMTP_LLAMA_CPP_DIR)
    list(APPEND ENTMTP_LLAMA_ARGS --llama-dir "${ENTMTP_LLAMA_CPP_DIR}")
endif()

# Whatever the user set for llama.cpp reaches it. This project defines no variable with these names itself.
get_cmake_property(ENTMTP_CACHE_VARIABLES CACHE_VARIABLES)
foreach(name IN LISTS ENTMTP_CACHE_VARIABLES)
    if (name STREQUAL "LLAMA_BUILD")
        continue()  # llama-cpp-python's own option; CMAKE_ARGS may hold it for that package
    endif()
    if (ENTMTP_FUZZ AND name MATCHES "^CMAKE_(C|CXX)_COMPILER$")
        continue()  # Clang is needed for our own code; llama.cpp is the one that is in the cache
    endif()
    if (name MATCHES "^(GGML_|LLAMA_|CMAKE_CUDA_|CMAKE_HIP_|CUDAToolkit_|CUDA_|Vulkan_|BLAS_|OpenMP_)"
        OR name MATCHES "^CMAKE_(C|CXX)_(COMPILER|FLAGS|COMPILER_LAUNCHER)$"
        OR name MATCHES "^CMAKE_(TOOLCHAIN_FILE|SYSTEM_NAME|SYSTEM_PROCESSOR|OSX_ARCHITECTURES|OSX_DEPLOYMENT_TARGET|OSX_SYSROOT)$")
        # CMAKE_PREFIX_PATH is not among them: pip's build sets it to a temporary directory, and every build would be a
        # new one. As an environment variable it reaches llama.cpp.
        # An empty one is CMake's own, unset by the user; a list goes over as one argument
        if (NOT "${${name}}" STREQUAL "")
            string(REPLACE ";" "\\;" value "${${name}}")
            list(APPEND ENTMTP_LLAMA_ARGS "-D${name}=${value}")
        endif()
    endif()
endforeach()

execute_process(
    COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/native/llama_cpp.py" ${ENTMTP_LLAMA_ARGS}
    OUTPUT_VARIABLE ENTMTP_LLAMA_PREFIX
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE ENTMTP_LLAMA_RESULT
)
if (NOT ENTMTP_LLAMA_RESULT EQUAL 0)
    message(FATAL_ERROR "llama.cpp could not be built; the cause is above")
endif()
message(STATUS "llama.cpp: ${ENTMTP_LLAMA_PREFIX}")

# configure again when one of these changes
file(GLOB ENTMTP_PATCHES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/native/patches/*.patch")
file(GLOB ENTMTP_LLAMA_STEPS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/native/llama_*.py")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${ENTMTP_PATCHES}
    "${CMAKE_CURRENT_SOURCE_DIR}/native/llama.cpp.pin.json"
    ${ENTMTP_LLAMA_STEPS}
    "${ENTMTP_LLAMA_PREFIX}/build-info.json" # gone when the cache was deleted
)

# llama, and the ggml libraries whose public API we call. ggml-cpu is there for native/kernels alone; other backends are
# found by ggml and never named here.
add_library(llama_cpp INTERFACE)
target_include_directories(llama_cpp SYSTEM INTERFACE
    "${ENTMTP_LLAMA_PREFIX}/include"
    "${ENTMTP_LLAMA_PREFIX}/src"
)
target_compile_definitions(llama_cpp INTERFACE LLAMA_SHARED GGML_SHARED GGML_BACKEND_SHARED)
foreach(name llama ggml ggml-base ggml-cpu)
    string(TOUPPER "${name}" variable)
    string(MAKE_C_IDENTIFIER "ENTMTP_LIB_${variable}" variable)
    unset(${variable} CACHE)  # the prefix may have changed since the last configure
    find_library(${variable} NAMES ${name} PATHS "${ENTMTP_LLAMA_PREFIX}/lib" NO_DEFAULT_PATH REQUIRED)
    target_link_libraries(llama_cpp INTERFACE "${${variable}}")
endforeach()
