# Assertions name their source file. By these names, not by paths of the machine that builds, so that the same sources
# give the same bytes wherever they lie. Of two that match, compilers take the later.
#
# CMakeLists.txt includes this, and so does the build of llama.cpp (native/llama_build.py). MSVC is left as it is: its
# /pathmap is experimental.
if (NOT MSVC)
    set(ENTMTP_PATHS "${PROJECT_SOURCE_DIR}=${PROJECT_NAME}" "${PROJECT_BINARY_DIR}=build")
    if (ENTMTP_LLAMA_PREFIX)
        list(APPEND ENTMTP_PATHS "${ENTMTP_LLAMA_PREFIX}=llama.cpp")
    endif()
    foreach(map IN LISTS ENTMTP_PATHS)
        add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX,OBJC,OBJCXX>:-ffile-prefix-map=${map}>") # GCC 8, Clang 10
    endforeach()
endif()
