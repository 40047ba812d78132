#include "cuda/context.h"

#include <dlfcn.h>

namespace mmkd::cuda {
namespace {

// A function of a library torch has loaded already; null where it has not. Nothing of torch's CUDA libraries is linked,
// so that the same binary is built with a CPU torch at hand.
void* symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

#if !defined(MMKD_SIMT)
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = reinterpret_cast<Get>(symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  MMKD_CHECK(get, "mmkd: this torch has no aoti_torch_get_current_cuda_stream; it needs torch >= 2.10 with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

}  // namespace

// The stable ABI does not tell the flag, so torch's own functions are looked up by name. A torch that has renamed them
// gets the deterministic path always: slower, never wrong.
bool deterministic() {
  using Context = void* (*)();
  using Flag = bool (*)(const void*);
  static const Context context = reinterpret_cast<Context>(symbol("libtorch_cpu.so", "_ZN2at13globalContextEv"));
  static const Flag flag =
      reinterpret_cast<Flag>(symbol("libtorch_cpu.so", "_ZNK2at7Context23deterministicAlgorithmsEv"));
  return !context || !flag || flag(context());
}

#if defined(MMKD_SIMT)
Device::Device(const Tensor&) {}
#else
Device::Device(const Tensor& t) : guard_(t.get_device_index()), stream_(current_stream(t.get_device_index())) {}
#endif

}  // namespace mmkd::cuda
