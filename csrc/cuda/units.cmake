# What is compiled at once of the CUDA sources: what a unit costs before its first kernel, torch's headers read by the host's
# compiler and once more for each architecture, is as much as most sources' own.
#
# fastft_cuda_units(<variable> <suffix>): writes the units into the binary directory, and their names into the variable.
function(fastft_cuda_units variable suffix)
  file(GLOB rest CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
  foreach(unit lora grouped others)
    set(members ${rest})
    if(NOT unit STREQUAL "others")
      list(FILTER members INCLUDE REGEX "/${unit}[^/]*$")
      list(FILTER rest EXCLUDE REGEX "/${unit}[^/]*$")
    endif()
    list(TRANSFORM members REPLACE "(.+)" "#include \"\\1\"\n")
    list(JOIN members "" includes)
    set(file ${CMAKE_CURRENT_BINARY_DIR}/${unit}${suffix})
    file(CONFIGURE OUTPUT ${file} CONTENT "${includes}")
    list(APPEND files ${file})
  endforeach()
  set(${variable} ${files} PARENT_SCOPE)
endfunction()
