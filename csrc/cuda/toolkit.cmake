# Whether a CUDA toolkit can build the engine.

# Sets `result` to why `nvcc`, of the release `version`, cannot be used, or to nothing if it can.
# `torch_cuda` is the release that torch is built for; nothing: a CPU build, which goes with any.
# One process must not have the runtimes of two major releases: the engine has its own linked in, and
# torch hands it streams and graphs of the other.
function(check_toolkit nvcc version torch_cuda result)
  string(REGEX MATCH "^[0-9]+" major "${version}")
  string(REGEX MATCH "^[0-9]+" torch_major "${torch_cuda}")
  set(reason "")
  if(version VERSION_LESS 12.8)
    set(reason "${nvcc} is ${version}; it takes 12.8 or newer")
  elseif(torch_major AND NOT major EQUAL torch_major)
    string(CONCAT reason
           "${nvcc} is of CUDA ${version}, but torch is built for CUDA ${torch_cuda}; set CUDACXX to "
           "an nvcc of CUDA ${torch_major}, or install a torch for CUDA ${major}")
  endif()
  set(${result} "${reason}" PARENT_SCOPE)
endfunction()
