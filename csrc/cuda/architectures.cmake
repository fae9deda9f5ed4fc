# What the CUDA engine is compiled for, unless TORCH_CUDA_ARCH_LIST says otherwise: machine code for
# what torch's own wheels for CUDA 13 run on (8.0 serves 8.6 and 8.9 too), and PTX of the last for
# what comes after. The tests look at the code for each.
set(RECAP_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)

# From torch's notation, "8.0;9.0a+PTX", to CMake's, "80-real;90a".
function(read_torch_architectures list out)
  set(architectures "")
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  foreach(item IN LISTS list)
    if(NOT item MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${item}' is not a version such as 9.0 or 9.0+PTX")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    if(CMAKE_MATCH_4)
      list(APPEND architectures ${number})
    else()
      list(APPEND architectures ${number}-real)
    endif()
  endforeach()
  set(${out} "${architectures}" PARENT_SCOPE)
endfunction()
