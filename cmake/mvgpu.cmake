# Compiler settings and the two helpers that every folder uses.

add_library(mvgpu_build_flags INTERFACE)
target_include_directories(mvgpu_build_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(mvgpu_build_flags INTERFACE
  -Wall -Wextra -Wconversion -Wshadow -fno-rtti -fno-strict-aliasing -fvisibility=hidden
  $<$<CXX_COMPILER_ID:Clang>:-Wthread-safety>
  $<$<BOOL:${MVGPU_WERROR}>:-Werror>)
if(CMAKE_BUILD_TYPE STREQUAL "Debug" OR MVGPU_DCHECKS)
  target_compile_definitions(mvgpu_build_flags INTERFACE MVGPU_DCHECKS=1)
endif()
if(MVGPU_SANITIZE)
  target_compile_options(mvgpu_build_flags INTERFACE
    -fsanitize=${MVGPU_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1")  # before the options of targets, so that these win; lines are all a report needs
  target_link_options(mvgpu_build_flags INTERFACE -fsanitize=${MVGPU_SANITIZE})
  if(MVGPU_SANITIZE MATCHES "thread" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # g++ warns that tsan does not follow fences. Ours order accesses towards the guest, which tsan does not
    # see in any case; threads of ours meet at mutexes.
    target_compile_options(mvgpu_build_flags INTERFACE -Wno-tsan)
  endif()
endif()

# mvgpu_without_vulkan(WHY): something of Vulkan is left out; an error with MVGPU_REQUIRE_VULKAN.
function(mvgpu_without_vulkan why)
  if(MVGPU_REQUIRE_VULKAN)
    # The space in front keeps it one line.
    message(FATAL_ERROR " ${why}; install it, or configure with -DMVGPU_REQUIRE_VULKAN=OFF")
  endif()
  message(STATUS "${why}")
endfunction()

# mvgpu_library(FOLDER SOURCES a.cc ... DEPS targets ...)
# The library of one folder: target mvgpu_<folder>, alias mvgpu::<folder> (dashes become underscores).
function(mvgpu_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  string(REPLACE "-" "_" name ${folder})
  add_library(mvgpu_${name} STATIC ${ARG_SOURCES})
  add_library(mvgpu::${name} ALIAS mvgpu_${name})
  target_link_libraries(mvgpu_${name} PUBLIC mvgpu_build_flags ${ARG_DEPS})
endfunction()

# Tests are compiled quickly, whatever the preset; what they test is not. At -O3 g++ 12 also sees overflows in
# std::vector that are not there (gcc bug 107852). With the undefined-behaviour checks -O1 takes twice as long as -O0.
set(mvgpu_test_options -O1)
if(MVGPU_SANITIZE MATCHES "undefined")
  set(mvgpu_test_options -O0)
endif()

# GoogleTest's headers take longer to compile than most tests: once for all of them.
function(mvgpu_test_headers)
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/headers.cc "")
  add_library(mvgpu_test_headers OBJECT ${CMAKE_CURRENT_BINARY_DIR}/headers.cc)
  target_link_libraries(mvgpu_test_headers PRIVATE mvgpu_build_flags fmt::fmt GTest::gmock)
  target_compile_options(mvgpu_test_headers PRIVATE ${mvgpu_test_options})
  target_precompile_headers(mvgpu_test_headers PRIVATE
    <gmock/gmock.h> <gtest/gtest.h> <fmt/format.h> <map> <memory> <random> <string> <thread> <vector>)
endfunction()

# mvgpu_test(NAME SOURCES a_test.cc ... DEPS targets ... [LABELS unit ...])
# One GoogleTest binary; every test in it becomes a ctest entry with the labels.
function(mvgpu_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE mvgpu_build_flags ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_precompile_headers(${name} REUSE_FROM mvgpu_test_headers)
  target_compile_options(${name} PRIVATE ${mvgpu_test_options})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  gtest_discover_tests(${name} TEST_PREFIX ${name}: PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 120
                       DISCOVERY_TIMEOUT 60)
endfunction()
