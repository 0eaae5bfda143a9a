// _C: what this build is, and nothing else. It links no torch, so that it can speak even when the ops cannot load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MOERGE_HAS(feature) \
  if (__builtin_cpu_supports(feature)) found.emplace_back(feature)
  MOERGE_HAS("avx2");
  MOERGE_HAS("fma");
  MOERGE_HAS("f16c");
  MOERGE_HAS("avx512f");
  MOERGE_HAS("avx512bw");
  MOERGE_HAS("avx512vl");
  MOERGE_HAS("avx512dq");
  MOERGE_HAS("avx512vnni");
  MOERGE_HAS("avx512bf16");
#undef MOERGE_HAS
#endif
  return found;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MOERGE_VERSION;
  info["torch"] = MOERGE_TORCH_VERSION;
  info["torch_cuda"] = MOERGE_TORCH_CUDA;
  std::istringstream built(MOERGE_CUDA_BUILT);
  const std::vector<std::string> architectures{std::istream_iterator<std::string>(built), {}};
  info["cuda"] = !architectures.empty();
  info["cuda_architectures"] = architectures;
  info["compiler"] = MOERGE_COMPILER;
#if defined(MOERGE_X86)
  info["instruction_sets"] = std::vector<std::string>{"avx512", "avx2", "portable"};
#else
  info["instruction_sets"] = std::vector<std::string>{"portable"};
#endif
  info["cpu_capabilities"] = cpu_capabilities();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How moerge_ext was built.";
  module.def("build_info", &build_info,
             "Version, the torch it was built against, CUDA or not, architectures, instruction sets built and the "
             "capabilities of this CPU.");
}
